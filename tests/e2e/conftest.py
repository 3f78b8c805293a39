"""What the end-to-end tests share."""


def pytest_configure(config):
    # Keras's writers convert variables in a way that NumPy 2 deprecates
    config.addinivalue_line("filterwarnings", "ignore:__array__ implementation doesn't accept:DeprecationWarning")
