"""The PyTorch backend of clipcore. Importing this package imports no torch; `clipcore_torch.backend` does."""

__version__ = "0.1.0"
