"""How compiled code touches memory, by address: the element at an index, or `VECTOR` of them from there on.

Only Numba can carry these out: each is the method of that name in `elements.Elements`.
"""

from __future__ import annotations

from clipcore.clipping.fast.compiler import helper, instruction
from clipcore.clipping.kernels import Array

VECTOR = 16  # elements that an instruction takes at once; LLVM makes of it what the processor has
AHEAD = 1 << 13  # bytes that are fetched ahead of their use


@instruction()
def view(like: Array, address: int, count: int) -> Array:
    """The array of `count` elements at an address.

    Nobody owns it, so that passing it on counts no references: counting them takes longer than a small tensor.
    """
    raise NotImplementedError


@instruction()
def load(like: Array, address: int, index: int) -> float:
    """An element as float64."""
    raise NotImplementedError


@helper
def square(like: Array, address: int, index: int) -> float:
    x = load(like, address, index)
    return x * x


@instruction()
def store(like: Array, address: int, index: int, value: float) -> None:
    """Write an element, rounded once from float64."""
    raise NotImplementedError


@instruction()
def multiply(like: Array, source: int, target: int, index: int, factor: float) -> None:
    """Write source * factor: factor and product in float32, of float64 in float64, then rounded to the dtype."""
    raise NotImplementedError


@instruction(lanes=VECTOR)
def multiply_all(like: Array, source: int, target: int, ahead: int, index: int, factor: float) -> None:
    """As `multiply`, a vector by one factor; fetches what lies `ahead` bytes further."""
    raise NotImplementedError


@instruction(lanes=VECTOR)
def multiply_each(like: Array, source: int, target: int, ahead: int, index: int, factors: Array) -> None:
    """As `multiply`, a vector by the vector of factors at the same index; fetches what lies `ahead` bytes further."""
    raise NotImplementedError


@instruction(lanes=VECTOR)
def add_squares(like: Array, address: int, index: int, sums: Array) -> None:
    """Add a vector's squares to the vector of sums at the same index."""
    raise NotImplementedError


@instruction(lanes=VECTOR)
def add_four_squares(like: Array, address: int, step: int, ahead: int, index: int, sums: Array) -> None:
    """Add to the sums at the same index the squares of four vectors that lie `step` bytes apart.

    Fetches what lies `ahead` bytes further into the cache: the processor does not foresee rows (a quarter slower).
    """
    raise NotImplementedError


@instruction(lanes=VECTOR)
def add_spikes(like: Array, grads: int, moments: int, ahead: int, index: int, threshold: float, sums: Array) -> None:
    """Add to the vector of sums at the same index 1 where a square exceeds `threshold` times its float32 moment.

    Fetches what lies `ahead` bytes further.
    """
    raise NotImplementedError


@instruction(lanes=VECTOR)
def advance_all(
    like: Array, grads: int, moments: int, after: int, index: int, decay: float, rest: float, largest: float
) -> None:
    """Write a vector of float32 moments, decay * moment + rest * square, at most `largest`."""
    raise NotImplementedError
