"""Numba kernels over the memory of many arrays, by address: sums of squares, scaling and spikes at memory speed.

Every call takes whole lists: addresses (bytes) and sizes (elements) are int64 arrays with one entry per tensor, each
tensor contiguous and aligned to its dtype; the caller has checked them and keeps the memory alive. `dtype` is
"float16", "bfloat16", "float32" or "float64".

Inside, every tensor is an (outer, units, inner) array, cut into tasks. Tasks are handed to threads in blocks, but each
writes results of its own, which are put together in a fixed order: no result depends on the number of threads, and
sums, added in an order that is spelled out here, not on the processor either.
"""

import functools

from clipcore.clipping.fast.compiler import compiled
from clipcore.clipping.fast.plans import fill
from clipcore.clipping.fast.scaling import scale_units
from clipcore.clipping.fast.spikes import spike
from clipcore.clipping.fast.sums import unit_sums_of_squares

__all__ = ["available", "scale_units", "spike", "unit_sums_of_squares"]


@functools.cache
def available() -> bool:
    """Whether the kernels can be used: Numba is installed, works with this NumPy, and compiles.

    The first call imports Numba and compiles the smallest kernel (about half a second), later calls look that up.
    """
    try:
        compiled(fill)
    except Exception:
        return False
    return True
