"""What bounds the weights that move."""

from __future__ import annotations

from dataclasses import dataclass

from clipcore.clipping.policies import Policy, check_policy


@dataclass(frozen=True)
class Delta:
    """A limit on the difference: source minus target is taken as an update of the target, and bounded by a policy.

    A tensor whose difference is in range becomes the source's, bit for bit; else it is target + bounded difference,
    computed in float64 and rounded once to the target's dtype.

    Args:
        policy: bounds the differences of all the target's trainable tensors, in the unit of the weights.
    Raises:
        InvalidPolicy: `policy` is none.

    >>> import clipcore as cc
    >>> Delta(cc.ClipByGlobalNorm(1.0))
    Delta(policy=ClipByGlobalNorm(nonfinite='propagate', max_norm=1.0, p=2.0))
    """

    policy: Policy

    def __post_init__(self) -> None:
        check_policy(self.policy)


Limit = Policy | Delta
