"""clipcore: gradients clipped with one exact meaning in every framework, weights migrated and the result proved."""

from clipcore.backend import Backend
from clipcore.clipping.api import clip, clip_, clip_grads_, limit_
from clipcore.clipping.policies import ClipByGlobalNorm, ClipByNorm, ClipByValue, Policy
from clipcore.clipping.report import ClipReport
from clipcore.errors import (
    BackendError,
    ClipcoreError,
    InvalidInput,
    InvalidPolicy,
    MappingError,
    MigrationError,
    NonFinite,
)
from clipcore.hookspecs import hookimpl
from clipcore.plugins import backend_of, backends, get_backend
from clipcore.training import Attachment, attach, compile

__version__ = "0.1.0"

__all__ = [
    "Attachment",
    "Backend",
    "BackendError",
    "ClipByGlobalNorm",
    "ClipByNorm",
    "ClipByValue",
    "ClipReport",
    "ClipcoreError",
    "InvalidInput",
    "InvalidPolicy",
    "MappingError",
    "MigrationError",
    "NonFinite",
    "Policy",
    "attach",
    "backend_of",
    "backends",
    "clip",
    "clip_",
    "clip_grads_",
    "compile",
    "get_backend",
    "hookimpl",
    "limit_",
]
