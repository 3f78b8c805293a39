"""The definition of clipping: every element a rational number, every rounding written out. Slow, and always right.

It imports NumPy alone and shares no line with the code that users run: agreement between the two is evidence. What
adaptive policies learn is computed from everything that they ever saw, in float64.
"""

from __future__ import annotations

from clipcore.clipping.reference.adaptive import adagc, auto_clip, spike_clip, zclip
from clipcore.clipping.reference.examples import per_example_clip, quantile_clip
from clipcore.clipping.reference.norms import (
    clip_by_average_norm,
    clip_by_block_rms,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_value,
)
from clipcore.clipping.reference.units import adaptive_clip, box, max_norm, min_max_norm, spectral_limit, unit_norm

__all__ = [
    "adagc",
    "adaptive_clip",
    "auto_clip",
    "box",
    "clip_by_average_norm",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_value",
    "max_norm",
    "min_max_norm",
    "per_example_clip",
    "quantile_clip",
    "spectral_limit",
    "spike_clip",
    "unit_norm",
    "zclip",
]
