"""The layer kinds: roles with their canonical axes, and the settings that change what a layer computes.

A backend says, in the same words, how its framework stores each role; `clipcore.mapping.reference` says in NumPy what
each kind computes from the canonical tensors. A composed axis, "(group out)", is stored as one. A role of several
parts is written with a dot: "kernel.forget" is the kernel of the forget gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from clipcore.backend import Layer
from clipcore.errors import MappingError


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
        sequence: whether it gives one output per step, of which a layer may keep the last alone.
    """

    name: str
    roles: Mapping[str, str]
    optional: frozenset[str] = frozenset()
    sizes: Mapping[str, str] = field(default_factory=dict)
    features: Mapping[str, str] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    training_settings: tuple[str, ...] = ()
    sequence: bool = False


def _recurrent(name: str, gates: tuple[str, ...], *settings: str) -> Kind:
    """One direction of one recurrent layer; a gate's bias is `bias` + `recurrent_bias`, where both are there."""
    parts = [f".{gate}" for gate in gates] or [""]
    axes = {"kernel": "unit in", "recurrent_kernel": "unit state", "bias": "unit", "recurrent_bias": "unit"}
    roles = {f"{role}{part}": layout for role, layout in axes.items() for part in parts}
    return Kind(
        name,
        roles,
        optional=frozenset(role for role in roles if "bias" in role),
        features={f"kernel{part}": "in" for part in parts},
        units={role: "unit" for role in roles if "kernel" in role},
        settings=("activation", *settings, "reverse"),
        sequence=True,
    )


LSTM_GATES = ("input", "forget", "cell", "output")
GRU_GATES = ("reset", "update", "new")

# Settings, in every backend's description of a layer:
#   stride, dilation   one integer per spatial axis
#   padding            one (before, after) pair per spatial axis, or "same" where TensorFlow's rule makes it depend on
#                      the size of the input (stride above 1)
#   crop               of a transposed convolution, one (before, after) pair per spatial axis: what its whole result,
#                      of (n - 1) stride + (window - 1) dilation + 1 places, loses; negative where zeros are added
#   padding_mode       "zeros", "reflect", "replicate", "circular"
#   groups             an integer
#   activation         None, or the lower-case name of what the layer applies to its result ("relu", "softmax" …); of
#                      a recurrent layer, of what it applies to its state
#   recurrent_activation   what a recurrent layer applies to its gates
#   reset_after        whether a GRU's reset gate acts on what the recurrent kernel gives, and not on the state
#   reverse            whether a recurrent layer reads the sequence from its end; its outputs stand in that order
#   heads              how many heads the features that a projection of attention gives (or takes) are divided into
#   eps                as added to the variance, under the root
#   momentum           the weight of the new value in the running statistics (torch's convention; Keras has 1 - it)
#   channels           "first" or "last": where the layer's data has the channel axis
#   function           what an activation is: "gelu" (with erf), "gelu_tanh", "leaky_relu" … (reference.ACTIVATIONS)
#   slope, alpha, threshold, low, high, axis    its numbers
#   window, count_include_pad, ceil        of pooling; whether what was padded counts, whether a last window that
#                      begins inside and ends outside counts
#   rate               of dropout
_REGISTERED: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "linear",
            {"kernel": "out in", "bias": "out"},
            optional=frozenset({"bias"}),
            features={"kernel": "in"},
            units={"kernel": "out"},
            settings=("activation", "heads"),
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
            "conv_transpose",
            {"kernel": "group in out ...", "bias": "(group out)"},
            optional=frozenset({"bias"}),
            sizes={"group": "groups"},
            units={"kernel": "group out"},
            settings=("stride", "crop", "dilation", "groups", "activation"),
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
        Kind(  # instance norm is one with as many groups as channels
            "group_norm",
            {"scale": "channel", "bias": "channel"},
            optional=frozenset({"scale", "bias"}),
            settings=("groups", "eps"),
        ),
        Kind("rms_norm", {"scale": "..."}, features={"scale": "..."}, settings=("eps",)),
        Kind("embedding", {"kernel": "num dim"}, units={"kernel": "num"}),
        _recurrent("lstm", LSTM_GATES, "recurrent_activation"),
        _recurrent("gru", GRU_GATES, "recurrent_activation", "reset_after"),
        _recurrent("rnn", ()),
        Kind("prelu", {"slope": "channel"}),
        # without tensors: a difference in one of these settings is one of the two models all the same
        Kind("activation", {}, settings=("function", "slope", "alpha", "threshold", "low", "high", "axis")),
        Kind("avg_pool", {}, settings=("window", "stride", "padding", "count_include_pad", "ceil")),
        Kind("max_pool", {}, settings=("window", "stride", "padding", "dilation", "ceil")),
        Kind("dropout", {}, training_settings=("rate",)),
    )
}
KINDS: Mapping[str, Kind] = _REGISTERED

# A reparametrised kernel stands in a layer as the tensors that it is made of; clipcore.mapping.rows says how.
#   weight norm     kernel.direction, kernel.magnitude (its axes of length 1 are those of the norm)
#   spectral norm   kernel.original, kernel.u, kernel.v (the vectors of its largest singular value)


def kind_of(name: str) -> Kind | None:
    """The kind of that name; None for "raw", and for a word that no one registered."""
    return KINDS.get(name)


def add_kind(kind: Kind) -> None:
    """Add a kind of a user's; see `clipcore.register_kind`."""
    if kind.name in _REGISTERED:
        raise MappingError(
            f"there is a layer kind {kind.name!r} already, with roles {sorted(_REGISTERED[kind.name].roles)}; "
            f"expected another name, or that kind itself"
        )
    _REGISTERED[kind.name] = kind


def kernel_role(layer: Layer) -> str:
    """The role in which a layer has its kernel: itself, or the tensor of its shape that it is made of."""
    return next(role for role in ("kernel", "kernel.direction", "kernel.original") if role in layer.tensors)


def base_role(role: str) -> str:
    """A role without its part: "kernel" of "kernel.forget"."""
    return role.partition(".")[0]
