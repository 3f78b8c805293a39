"""clipcore on TensorFlow and Keras 3; `clipcore.get_backend("tensorflow")` obtains it."""

__version__ = "0.1.0"
