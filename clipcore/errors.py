"""Every error that clipcore raises: one base, few children.

A message has the value, the place, what was expected and what to do.
"""


class ClipcoreError(Exception):
    """The base of every error that clipcore raises."""

    # Said, though inherited: an error that leaves a tf.function keeps its class only where this is so. AutoGraph makes
    # it anew with a longer message, and makes nothing of classes whose constructor it does not know.
    __init__ = Exception.__init__


class InvalidPolicy(ClipcoreError, ValueError):
    """A policy was built with an argument that has no meaning."""


class InvalidInput(ClipcoreError, ValueError):
    """Tensors, a model or a sample are not what the call takes."""


class NonFinite(ClipcoreError, ArithmeticError):
    """An element is inf or NaN where that is refused."""


class BackendError(ClipcoreError, ImportError):
    """A backend is missing, broken, or named twice."""


class MappingError(ClipcoreError):
    """No mapping, or no single mapping, between two models."""


class MigrationError(ClipcoreError):
    """Weights could not be moved; the target is as it was before."""
