"""The façade that holds a policy's state from step to step, saves it and takes it up again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clipcore.clipping.api import bound, bound_in_place, rebuilt, refuse_parameters
from clipcore.clipping.call import Call
from clipcore.clipping.given import State
from clipcore.clipping.policies import Policy, check_policy
from clipcore.clipping.report import ClipReport
from clipcore.clipping.states import check_dtypes, check_flat_state, copied, flat_state, nested_state, saved_state
from clipcore.clipping.together import bound_together, call_together


class Clipper:
    """A policy together with what it has learned: `clip` step by step, save in the middle, go on elsewhere.

    The state takes shape with the first gradients, in their order; a dict may later come in another one. It is the same
    in every framework: warm up in one, save, and go on in another, with gradients in the same order.

    Args:
        policy: what bounds the gradients.
        model: as for `clipcore.clip`.
        backend: as for `clipcore.clip`.

    >>> import numpy as np
    >>> import clipcore as cc
    >>> clipper = cc.Clipper(cc.AutoClip(50.0))
    >>> for norm in (1.0, 3.0):
    ...     clipped, report = clipper.clip([np.array([norm])])
    >>> clipped, report.limit
    ([array([2.])], 2.0)
    >>> sorted(clipper.state_dict())
    ['AutoClip.count', 'AutoClip.norms']
    """

    def __init__(self, policy: Policy, model: Any = None, *, backend: str | None = None) -> None:
        check_policy(policy)
        self.policy = policy
        self._model, self._backend = model, backend
        self._state: State | None = None
        self._signature: Any = None  # of the tensors that the state is of
        self._names: Sequence[str] | None = None  # of these, in the order of the first gradients
        self._loaded: dict[str, Any] | None = None  # until the first gradients tell the shapes

    def clip(self, grads: Any, params: Any = None) -> tuple[Any, ClipReport]:
        """(clipped, report), as `clipcore.clip`; the state moves on."""
        call = self._call(grads, params)
        bounded, self._state, report = bound(call, self.policy, self._current(call), owns_state=True)
        return rebuilt(call, grads, bounded), report

    def clip_(self, grads: Any, params: Any = None) -> ClipReport:
        """The report, as `clipcore.clip_`; the state moves on."""
        call = self._call(grads, params, writable=True)
        refuse_parameters(call)
        self._state, report = bound_in_place(call, self.policy, self._current(call), owns_state=True)
        return report

    def clip_together(
        self, grads: Mapping[str, Any], params: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], ClipReport]:
        """(clipped, report), as `clipcore.clip_together`; the state moves on. `model` is then a dict of models."""
        call = call_together(grads, self.policy, params, self._model).in_order(self._names)
        clipped, self._state, report = bound_together(call, grads, self.policy, self._current(call))
        return clipped, report

    def state_dict(self) -> dict[str, np.ndarray]:
        """What the policy has learned, as NumPy arrays by name, for a safetensors file, say; empty before it began."""
        if self._state is None:
            return dict(self._loaded or {})
        return {name: copied(value) for name, value in flat_state(self.policy, self._state).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave, here or in another framework.

        Raises:
            InvalidInput: it is of another policy, or, here or with the next gradients, of tensors of other shapes.
        """
        arrays = saved_state(self.policy, state)
        if self._state is not None and arrays:
            check_flat_state(self.policy, arrays, flat_state(self.policy, self._state))
        self._state, self._loaded = None, arrays or None  # an empty one was saved before the first step

    def _call(self, grads: Any, params: Any, *, writable: bool = False) -> Call:
        call = Call.of(grads, self.policy, params, self._model, self._backend, writable=writable)
        return call.in_order(self._names)

    def _current(self, call: Call) -> State:
        """The state to go on from, which must be one for these tensors."""
        if not self.policy.stateful and not self.policy.members:
            return {}
        state, signature = self._state, call.signature()
        if state is not None and signature == self._signature:
            return state
        fresh = self.policy.start(call.specs())
        if state is None:
            state = fresh if self._loaded is None else nested_state(self.policy, self._loaded)
        check_flat_state(self.policy, flat_state(self.policy, state), flat_state(self.policy, fresh))
        check_dtypes(self._loaded or {}, flat_state(self.policy, fresh))
        self._signature, self._names = signature, call.all_names
        return state
