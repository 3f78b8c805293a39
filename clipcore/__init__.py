"""clipcore: gradients clipped with one exact meaning in every framework, weights migrated and the result proved."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from clipcore.backend import Backend
from clipcore.clipping.adaptive import AdaGC, AutoClip, SpikeClip, ZClip
from clipcore.clipping.api import clip, clip_, clip_grads_, limit_
from clipcore.clipping.clipper import Clipper
from clipcore.clipping.combine import Chain, PerGroup
from clipcore.clipping.examples import PerExampleClip, QuantileClip
from clipcore.clipping.limits import Box, MaxNorm, MinMaxNorm, SpectralLimit, UnitNorm
from clipcore.clipping.policies import (
    AdaptiveClip,
    ClipByAverageNorm,
    ClipByBlockRMS,
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    Policy,
)
from clipcore.clipping.report import ClipReport
from clipcore.clipping.steps import apply_scale, combine, norm, scale_for
from clipcore.clipping.together import clip_together
from clipcore.errors import (
    BackendError,
    ClipcoreError,
    InvalidInput,
    InvalidPolicy,
    MappingError,
    MigrationError,
    NonFinite,
)
from clipcore.plugins import backend_of, backends, get_backend
from clipcore.training import Attachment, attach, compile, per_example_grads, to_tensorboard

if TYPE_CHECKING:
    from clipcore.backend import Stored
    from clipcore.hookspecs import hookimpl
    from clipcore.mapping.diff import diff
    from clipcore.mapping.find import plan
    from clipcore.mapping.kinds import Kind
    from clipcore.mapping.plan import Difference, Part, Plan, Row, Term
    from clipcore.mapping.registry import layer_kinds, register_kind
    from clipcore.migration.apply import MigratedTensor, MigrationResult, migrate
    from clipcore.migration.diagnosis import Divergence, LayerAgreement
    from clipcore.migration.limits import Delta
    from clipcore.migration.verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "AdaGC",
    "AdaptiveClip",
    "Attachment",
    "AutoClip",
    "Backend",
    "BackendError",
    "Box",
    "Chain",
    "ClipByAverageNorm",
    "ClipByBlockRMS",
    "ClipByGlobalNorm",
    "ClipByNorm",
    "ClipByValue",
    "ClipReport",
    "ClipcoreError",
    "Clipper",
    "Delta",
    "Difference",
    "Divergence",
    "InvalidInput",
    "InvalidPolicy",
    "Kind",
    "LayerAgreement",
    "MappingError",
    "MaxNorm",
    "MigratedTensor",
    "MigrationError",
    "MigrationResult",
    "MinMaxNorm",
    "NonFinite",
    "Part",
    "PerExampleClip",
    "PerGroup",
    "Plan",
    "Policy",
    "QuantileClip",
    "Row",
    "SpectralLimit",
    "SpikeClip",
    "Stored",
    "Term",
    "UnitNorm",
    "Verification",
    "ZClip",
    "apply_scale",
    "attach",
    "backend_of",
    "backends",
    "clip",
    "clip_",
    "clip_grads_",
    "clip_together",
    "combine",
    "compile",
    "diff",
    "get_backend",
    "hookimpl",
    "layer_kinds",
    "limit_",
    "migrate",
    "norm",
    "per_example_grads",
    "plan",
    "register_kind",
    "scale_for",
    "to_tensorboard",
    "verify",
]

# Half of the import's time, which someone who only clips need not wait for.
_ON_FIRST_USE = {
    "hookimpl": "clipcore.hookspecs",
    "Delta": "clipcore.migration.limits",
    "Difference": "clipcore.mapping.plan",
    "Divergence": "clipcore.migration.diagnosis",
    "Kind": "clipcore.mapping.kinds",
    "LayerAgreement": "clipcore.migration.diagnosis",
    "MigratedTensor": "clipcore.migration.apply",
    "MigrationResult": "clipcore.migration.apply",
    "Part": "clipcore.mapping.plan",
    "Plan": "clipcore.mapping.plan",
    "Row": "clipcore.mapping.plan",
    "Stored": "clipcore.backend",
    "Term": "clipcore.mapping.plan",
    "Verification": "clipcore.migration.verify",
    "migrate": "clipcore.migration.apply",
    "diff": "clipcore.mapping.diff",
    "layer_kinds": "clipcore.mapping.registry",
    "plan": "clipcore.mapping.find",
    "register_kind": "clipcore.mapping.registry",
    "verify": "clipcore.migration.verify",
}


def __getattr__(name: str) -> Any:
    """Names that are imported when they are first used."""
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module 'clipcore' has no attribute {name!r}")
    value = getattr(import_module(_ON_FIRST_USE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
