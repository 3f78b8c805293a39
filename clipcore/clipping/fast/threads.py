"""Running a kernel over the blocks of a plan, in several threads.

They are our own, since of Numba's layers one aborts on concurrent callers and another dies in a forked child.
"""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from clipcore.clipping.fast.compiler import LIKE, F, Function, compiled, kernel, lock
from clipcore.clipping.fast.plans import WIDTH, Plan

_BLOCKS_PER_THREAD = 4  # a thread is woken for no fewer
_MOST_THREADS = 8

_pool: ThreadPoolExecutor | None = None


def blockwise(letters: str) -> Callable[[F], F]:
    """A kernel for `run`: arguments of the types `letters` follow those that `run` passes."""
    return kernel("ltbfiiit" + letters)


def run(function: Function, dtype: str, plan: Plan, *arguments: Any) -> None:
    """Run a kernel over all blocks of a plan: in this thread, and in others if there is enough to do."""
    compute, like = compiled(function, dtype), LIKE[dtype]
    shape = plan.outer, plan.units, plan.inner, plan.table
    blocks = collections.deque(range(plan.blocks))

    def work() -> None:
        scratch = np.empty(WIDTH)
        while True:
            try:
                block = blocks.popleft()
            except IndexError:
                return
            compute(like, plan.cuts, block, scratch, *shape, *arguments)

    helpers = _submit(work, min(_count(), 1 + plan.blocks // _BLOCKS_PER_THREAD) - 1)
    try:
        work()
    finally:
        # also when interrupted: nobody may touch the caller's memory once this has returned
        blocks.clear()
        for helper in helpers:
            if not helper.cancel():
                helper.result()


def _count() -> int:
    """How many threads a call may use, the calling one included."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_THREADS)


def _submit(work: Callable[[], None], count: int) -> list[Future[None]]:
    """Start `work` in up to `count` other threads; in fewer, or none, where the interpreter grants no more."""
    global _pool
    helpers: list[Future[None]] = []
    if count:
        with lock:
            pool = _pool = _pool or ThreadPoolExecutor(_MOST_THREADS - 1, "clipcore")
        with contextlib.suppress(RuntimeError):  # the interpreter is shutting down, or out of threads
            for _ in range(count):
                helpers.append(pool.submit(work))
    return helpers


def _in_forked_child() -> None:
    global _pool
    _pool = None  # its threads stayed behind
    lock.release()


if hasattr(os, "register_at_fork"):
    # A fork waits for a compilation to end: the child would find Numba's lock taken for ever.
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=_in_forked_child)
