"""The layer kinds: roles with their canonical axes, and the settings that change what a layer computes.

A backend says, in the same words, how its framework stores each role; `clipcore.mapping.reference` says in NumPy what
each kind computes from the canonical tensors. A composed axis, "(group out)", is stored as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Kind:
    """One kind of layer.

    Attributes:
        name: the word for it, everywhere.
        roles: canonical axes of each tensor, as einops writes them.
        optional: roles that a layer may lack.
        sizes: axes whose length only a setting tells, and that setting.
        features: of a role, the axis that runs over the features of the layer's input, so that it must follow when
            those come in another order (after Flatten).
        units: of a role, the axes that run over the layer's units: what feeds one output, or one row of a table. A
            role that is not named is one unit.
        settings: settings that change the layer's function in inference.
        training_settings: settings that change only how it trains.
    """

    name: str
    roles: Mapping[str, str]
    optional: frozenset[str] = frozenset()
    sizes: Mapping[str, str] = field(default_factory=dict)
    features: Mapping[str, str] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    training_settings: tuple[str, ...] = ()


# Settings, in every backend's description of a layer:
#   stride, dilation   one integer per spatial axis
#   padding            one (before, after) pair per spatial axis, or "same" where TensorFlow's rule makes it depend on
#                      the size of the input (stride above 1)
#   padding_mode       "zeros", "reflect", "replicate", "circular"
#   groups             an integer
#   activation         None, or the lower-case name of what the layer applies to its result ("relu", "softmax" …)
#   eps                as added to the variance
#   momentum           the weight of the new value in the running statistics (torch's convention; Keras has 1 - it)
#   channels           "first" or "last": where the layer's data has the channel axis
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "linear",
            {"kernel": "out in", "bias": "out"},
            optional=frozenset({"bias"}),
            features={"kernel": "in"},
            units={"kernel": "out"},
            settings=("activation",),
        ),
        Kind(  # a depthwise convolution is one with in = 1; 1 to 3 spatial axes stand in "..."
            "conv",
            {"kernel": "group out in ...", "bias": "(group out)"},
            optional=frozenset({"bias"}),
            sizes={"group": "groups"},
            units={"kernel": "group out"},
            settings=("stride", "padding", "padding_mode", "dilation", "groups", "activation"),
        ),
        Kind(
            "batch_norm",
            {
                "scale": "channel",
                "bias": "channel",
                "running_mean": "channel",
                "running_var": "channel",
                "batch_count": "...",
            },
            optional=frozenset({"scale", "bias", "batch_count"}),
            features=dict.fromkeys(("scale", "bias", "running_mean", "running_var"), "channel"),
            settings=("eps",),
            training_settings=("momentum",),
        ),
        Kind(
            "layer_norm",
            {"scale": "...", "bias": "..."},
            optional=frozenset({"scale", "bias"}),
            features={"scale": "...", "bias": "..."},
            settings=("eps",),
        ),
        Kind("embedding", {"kernel": "num dim"}, units={"kernel": "num"}),
    )
}
