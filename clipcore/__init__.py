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
from clipcore.mapping.find import plan
from clipcore.mapping.plan import Difference, Plan, Row
from clipcore.migration.apply import MigratedTensor, MigrationResult, migrate
from clipcore.migration.diagnosis import Divergence, LayerAgreement
from clipcore.migration.limits import Delta
from clipcore.migration.verify import Verification, verify
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
    "Delta",
    "Difference",
    "Divergence",
    "InvalidInput",
    "InvalidPolicy",
    "LayerAgreement",
    "MappingError",
    "MigratedTensor",
    "MigrationError",
    "MigrationResult",
    "NonFinite",
    "Plan",
    "Policy",
    "Row",
    "Verification",
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
    "migrate",
    "plan",
    "verify",
]
