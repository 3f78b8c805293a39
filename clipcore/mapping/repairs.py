"""Repairs: changes of weights that make up exactly, in inference, for what two matched layers differ in.

Within a layer the recipes of `clipcore.mapping.rows` make them (another eps, a batch norm without bias); here are those
that a layer and the batch norm after it make together, and the words for all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from clipcore.backend import Bounds, Layer, Tensor
from clipcore.mapping.flow import Flow
from clipcore.mapping.layouts import unit_axes
from clipcore.mapping.plan import Difference, Part, Term
from clipcore.mapping.recording import Call

Parts = dict[tuple[str, Bounds], Part]  # of the target's tensors, by name and place


class Repair(NamedTuple):
    """What one operation of a plan does, for a reader.

    Attributes:
        kinds: the kinds of layers that it is about.
        setting: the difference that it makes up for.
        done: what is done.
        training: what differs when the target trains on.
        values: of the setting, in the source and in the target, where only the operation shows that they differ.
    """

    kinds: tuple[str, ...]
    setting: str
    done: str
    training: str
    values: tuple[str, str] = ("", "")


_CONVOLUTIONS = ("conv", "conv_transpose")
_WITH_KERNEL = ("linear", *_CONVOLUTIONS)
_ONE_SUM = ("lstm", "rnn")  # a GRU with one bias computes something else than one with two
_NORM = ("batch_norm",)

# by operation; of those that come together, the first
REPAIRS: Mapping[str, Repair] = {
    "rescaled": Repair(
        _NORM, "eps", "the scale is multiplied by sqrt((variance + target) / (variance + source))", "eps differs"
    ),
    "scale_for_eps": Repair(
        _NORM, "eps", "the scale is sqrt((variance + target) / (variance + source))", "eps differs"
    ),
    "moved_variance": Repair(
        _NORM, "eps", "source - target is added to the running variance", "eps and the variance differ"
    ),
    "block_diagonal": Repair(
        _CONVOLUTIONS,
        "groups",
        "the groups' kernels stand on the diagonal of the dense one",
        "the zeros between them are weights like any other",
    ),
    "diagonal_blocks": Repair(
        _CONVOLUTIONS,
        "groups",
        "the dense kernel is 0 between the groups, and its blocks move",
        "nothing differs",
    ),
    "mean_without_bias": Repair(
        _NORM,
        "bias",
        "bias * sqrt(variance + eps) / scale is taken from the running mean",
        "the batch's own mean takes its place, and the bias is lost",
    ),
    "mean_of_biased": Repair(
        _WITH_KERNEL,
        "bias",
        "the bias is taken from the running mean of the batch norm that follows",
        "a batch norm takes it away anyway, and the running mean goes on without it",
    ),
    "scaled_mean": Repair(
        _NORM,
        "scale",
        "the scale is multiplied into the kernel and bias of the layer before, and the running mean made to fit",
        "a batch norm takes the scale away again, so that it is lost",
    ),
    "sum": Repair(
        _ONE_SUM,
        "biases",
        "two biases that are added anyway become one",
        "one bias takes smaller steps than the two did",
        ("two", "one"),
    ),
    "weight_norm": Repair(
        _WITH_KERNEL,
        "weight norm",
        "direction and magnitude are multiplied out into a kernel",
        "the kernel learns without the norm",
        ("present", "absent"),
    ),
    "spectral_norm": Repair(
        _WITH_KERNEL,
        "spectral norm",
        "the kernel is divided by its largest singular value",
        "the kernel is no longer held to it",
        ("present", "absent"),
    ),
    "norm": Repair(
        _WITH_KERNEL,
        "weight norm",
        "a plain kernel becomes the direction, its norm the magnitude",
        "the kernel learns by the two apart",
        ("absent", "present"),
    ),
    "right_vector": Repair(
        _WITH_KERNEL,
        "spectral norm",
        "a plain kernel gets vectors that divide it by 1",
        "the power iteration goes on from them, and the kernel is divided by its largest singular value",
        ("absent", "present"),
    ),
    "repeat": Repair(
        ("prelu",),
        "slopes",
        "one slope is repeated for every channel",
        "each channel learns its own",
        ("one", "one per channel"),
    ),
    "the_one": Repair(
        ("prelu",),
        "slopes",
        "equal slopes become one",
        "the channels learn one together",
        ("one per channel", "one"),
    ),
}

# operations that make a running mean, and the number of their terms, after which the bias before it may follow
_TAKE_A_BIAS = {"mean_of_biased": 1, "mean_without_bias": 4}
# of these, the layers give other outputs one by one, and the same together
TOGETHER = frozenset({"scaled", "scaled_mean"})


class Pair(NamedTuple):
    """Two matched layers."""

    source: Layer
    target: Layer


def repaired(target: Layer, differences: Sequence[Difference], parts: Sequence[Part]) -> list[Difference]:
    """The differences of one layer, those marked that an operation of its parts makes up for, and those added that
    nothing but an operation shows.
    """
    operations = dict.fromkeys(name for part in parts for name in (part.operation, part.then) if name in REPAIRS)
    done = {REPAIRS[name].setting: name for name in operations if target.kind in REPAIRS[name].kinds}
    found = [_marked(d, done[d.setting]) if d.setting in done else d for d in differences]
    shown = {difference.setting for difference in found}
    silent = [name for setting, name in done.items() if setting not in shown and any(REPAIRS[name].values)]
    return found + [_marked(Difference(target.name, REPAIRS[n].setting, *REPAIRS[n].values), n) for n in silent]


def _marked(difference: Difference, operation: str) -> Difference:
    repair = REPAIRS[operation]
    text = f"repaired, exactly in inference: {repair.done}; in training {repair.training}"
    return replace(difference, repair=text, repaired=True)


def repair_together(
    pairs: Mapping[str, Pair], flow: Flow, parts: Parts, differences: Sequence[Difference]
) -> list[Difference]:
    """Let a batch norm and the layer before it make up for a missing bias or scale; the parts are changed in place.

    Args:
        pairs: the matched layers, by the target's names.
        flow: the source's run, which tells whether the layer's result goes to the batch norm alone.
    """
    found = list(differences)
    by_source = {pair.source.name: pair for pair in pairs.values()}
    links = {
        (before.source.name, norm.source.name): (before, norm)
        for before, norm in _followed_by_norm(flow.calls, by_source)
        if _lacks(before, "bias") or _lacks(norm, "scale")
    }
    exclusive = flow.exclusive(list(links))
    for before, norm in (pair for link, pair in links.items() if link in exclusive):
        if _takes_bias(before, norm, parts):
            found = [_marked(d, "mean_of_biased") if _is(d, before, "bias") else d for d in found]
        if _takes_scale(before, norm, parts):
            found = [_marked(d, "scaled_mean") if _is(d, norm, "scale", "bias", "eps") else d for d in found]
    return found


def _is(difference: Difference, pair: Pair, *settings: str) -> bool:
    return difference.layer == pair.target.name and difference.setting in settings


def _lacks(pair: Pair, role: str) -> bool:
    return role in pair.source.tensors and role not in pair.target.tensors


def _followed_by_norm(calls: Sequence[Call], by_source: Mapping[str, Pair]) -> Iterator[tuple[Pair, Pair]]:
    """The linear layers that a batch norm takes the result of, with that batch norm; both called once."""
    counts = Counter(call.layer for call in calls)
    givers: dict[tuple[Any, ...], str] = {}  # by what a call gave, its layer
    for call in calls:
        norm = by_source.get(call.layer)
        if norm is not None and norm.source.kind == "batch_norm":
            giver = givers.get(_digest(call.inputs[0]), "")
            if giver in by_source and counts[giver] == counts[call.layer] == 1 and _is_linear(by_source[giver]):
                yield by_source[giver], norm
        if isinstance(call.output, np.ndarray):
            givers[_digest(call.output)] = call.layer


def _digest(value: np.ndarray) -> tuple[Any, ...]:
    return value.shape, hash(value.tobytes())


def _is_linear(pair: Pair) -> bool:
    """Whether both layers give their kernel's product, and the bias added, as it is: no activation fused in."""
    activations = {layer.settings.get("activation") for layer in pair}
    return pair.source.kind in _WITH_KERNEL and activations == {None}


def _takes_bias(before: Pair, norm: Pair, parts: Parts) -> bool:
    """Take the bias that the target's layer lacks from the running mean of the batch norm after it."""
    if not _lacks(before, "bias"):
        return False
    place = _place(norm.target, "running_mean")
    mean, bias = parts[place], before.source.tensors["bias"]
    operation = mean.operation or "mean_of_biased"
    if operation not in _TAKE_A_BIAS:
        return False
    parts[place] = replace(mean, terms=(*mean.terms, _flat(bias)), operation=operation)
    return True


def _takes_scale(before: Pair, norm: Pair, parts: Parts) -> bool:
    """Multiply the scale that the target's batch norm lacks into the layer before it."""
    ours, theirs = norm.source.tensors, norm.target.tensors
    places = {role: _place(before.target, role) for role in ("kernel", "bias") if role in before.target.tensors}
    mean = parts[_place(norm.target, "running_mean")]
    untouched = not any(parts[place].operation or parts[place].then for place in places.values())
    plain = mean.operation in ("", *_TAKE_A_BIAS)
    before_it = mean.terms[_TAKE_A_BIAS.get(mean.operation, 1) :]
    if not _lacks(norm, "scale") or "kernel" not in places or not untouched or not plain:
        return False
    if not unit_axes(before.source, "kernel"):
        return False
    eps = {"source_eps": float(norm.source.settings["eps"]), "target_eps": float(norm.target.settings["eps"])}
    factor = (_flat(ours["scale"]), _flat(ours["running_var"]))
    for role, place in places.items():
        part = parts[place]
        if part.terms:
            every = tuple(range(len(before.source.tensors[role].shape)))
            axes = unit_axes(before.source, role) if role == "kernel" else every
            numbers = {**eps, "axes": axes}
            parts[place] = replace(part, terms=(*part.terms, *factor), operation="scaled", numbers=numbers)
    further = dict(zip(("the bias before it",), before_it, strict=False))
    if "bias" in ours and "bias" not in theirs:
        further["its own bias"] = _flat(ours["bias"])
    parts[_place(norm.target, "running_mean")] = replace(
        mean,
        terms=(mean.terms[0], *factor, *further.values()),
        operation="scaled_mean",
        numbers={**eps, "less": tuple(further)},
    )
    return True


def _flat(tensor: Tensor) -> Term:
    """One value per unit, in order."""
    axes = " ".join(f"axis{index}" for index in range(len(tensor.shape)))
    return Term(tensor.name, tensor.within, f"{axes} -> ({axes})" if len(tensor.shape) > 1 else "")


def _place(layer: Layer, role: str) -> tuple[str, Bounds]:
    tensor = layer.tensors[role]
    return tensor.name, tensor.within
