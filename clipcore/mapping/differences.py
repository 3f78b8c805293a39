"""Settings in which two matched layers differ, and what would make up for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from clipcore.backend import Layer
from clipcore.mapping import reference
from clipcore.mapping.kinds import kernel_role, kind_of
from clipcore.mapping.layouts import canonical_shape
from clipcore.mapping.plan import Difference
from clipcore.mapping.recording import Call

_REMEDIES = {
    "eps": "build the target's layer with eps={source}",
    "padding": "build the target's layer with padding {source} (before, after) per axis",
    "stride": "build the target's layer with stride {source}",
    "dilation": "build the target's layer with dilation {source}",
    "padding_mode": "build the target's layer with padding mode {source}",
    "crop": "let the target's layer cut {source} (before, after) per axis from its whole result",
    "reset_after": "build the target's GRU with reset_after={source}",
    "activation": "build the target's layer with the activation {source}",
    "recurrent_activation": "build the target's layer with the recurrent activation {source}",
    "heads": "build the target's attention with {source} heads",
    "function": "give the target the activation {source}",
    "slope": "build the target's layer with the slope {source}",
    "count_include_pad": "pad in a layer of its own before a pooling without padding, where zeros are to count",
    "groups": "build the target's layer with {source} groups",
    "momentum": "it acts in training alone; in the target's own convention, give it the source's value",
    "bias": "build the target's layer with a bias",
    "input": "an operation without weights before it (pooling, activation, padding, reshaping) is not the same",
    "training": "run the target's layer in inference mode: let nothing pass training=True to it",
    "activation before it": "give the target the activation {source} before this layer",
    "place": "let the target's layer take {source}",
    "pooling": "pool in the target with {source}",
    "preprocessing": "leave it out of the target, or give the source's sample through the same",
    "scale before it": "leave it out of the target",
    "scale": "build the target's layer with a scale",
}
# An activation may stand inside a layer here and behind it there: then a differing one is no difference.
_FUSED = frozenset({"activation"})


def differences_between(
    source: Layer, target: Layer, call: Call | None, ignore: frozenset[str] = frozenset(), *, strict: bool = False
) -> list[Difference]:
    """Every setting in which two matched layers differ.

    Args:
        call: one call of the source's layer, for paddings that depend on the size of the input.
        ignore: settings that are known to make no difference between these two.
        strict: whether a setting that only one of two layers without tensors has is a difference.
    """
    kind = kind_of(target.kind)
    if kind is None:
        return []
    found = [
        difference(target.name, role, "present", "absent")
        for role in source.tensors
        if role in kind.optional and role not in target.tensors and role in _REMEDIES
    ]
    for setting in (*kind.settings, *kind.training_settings):
        has = [setting in layer.settings for layer in (source, target)]
        if setting in ignore or not (any(has) if strict and not kind.roles else all(has)):
            continue
        if setting in _FUSED and not kind.sequence and None in (source.settings[setting], target.settings[setting]):
            continue
        ours, theirs = (_setting(layer, setting, source, call) for layer in (source, target))
        if not _equal(ours, theirs) and _acts(setting, source, target):
            found.append(difference(target.name, setting, ours, theirs))
    return found


def _acts(setting: str, source: Layer, target: Layer) -> bool:
    """Whether a setting can change anything: nothing that was padded counts where nothing was."""
    paddings = [layer.settings.get("padding", "same") for layer in (source, target)]
    return setting != "count_include_pad" or any(padding == "same" or any(map(any, padding)) for padding in paddings)


def difference(layer: str, setting: str, source: Any, target: Any, *, tested: bool = False) -> Difference:
    """A difference, with what would mend it in words."""
    remedy = _REMEDIES.get(setting)
    repair = remedy.format(source=source) if remedy else None
    return Difference(layer, setting, source, target, repair, tested=tested)


def _setting(layer: Layer, setting: str, source: Layer, call: Call | None) -> Any:
    value = layer.settings.get(setting)
    if setting == "padding" and value == "same" and call is not None and call.inputs:
        shape = call.inputs[0].shape
        first = source.settings.get("channels", "first") == "first"
        return explicit_padding(layer, shape[2:] if first else shape[1:-1])
    return value


def explicit_padding(layer: Layer, sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """A convolution's padding per spatial axis; TensorFlow's rule "same" makes it depend on the input's sizes."""
    settings = layer.settings
    window = canonical_shape(layer, kernel_role(layer))[3:]
    pads = reference.paddings(settings["padding"], sizes, window, settings["stride"], settings["dilation"])
    return tuple((int(before), int(after)) for before, after in pads)


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        # 1 - 0.99 is not 0.01 to the last bit
        return math.isclose(ours, theirs, rel_tol=1e-6)
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(_equal, ours, theirs))
    return bool(ours == theirs)
