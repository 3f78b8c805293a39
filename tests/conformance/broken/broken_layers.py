"""The torch backend, made wrong on purpose in how it builds, describes, reads, writes or runs a layer."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from clipcore_torch.backend import TorchBackend


class Healthy(TorchBackend):
    """The torch backend under another name."""

    name = "broken"


class _Redescribes(Healthy):
    """Declares another layout for the kernels of one kind."""

    kind = layout = ""

    def layers(self, model):
        return [
            dataclasses.replace(layer, tensors={role: self._changed(layer, t) for role, t in layer.tensors.items()})
            for layer in super().layers(model)
        ]

    def _changed(self, layer, tensor):
        wrong = (layer.kind, tensor.role) == (self.kind, "kernel")
        return dataclasses.replace(tensor, layout=self.layout) if wrong else tensor


class TransposesLinearKernels(_Redescribes):
    kind, layout = "linear", "in out"


class TransposesEmbeddings(_Redescribes):
    kind, layout = "embedding", "dim num"


class SwapsGroupsAndOutputs(_Redescribes):
    """The multiplier before the channel, (m, C) for (C, m)."""

    kind, layout = "conv", "(out group) in ..."


class SwapsInAndOutOfTransposedKernels(_Redescribes):
    kind, layout = "conv_transpose", "(group out) in ..."


class _SwapsRoles(Healthy):
    """Gives each of two roles of one kind the tensor of the other."""

    kind = ""
    roles: tuple[tuple[str, str], ...] = ()

    def layers(self, model):
        return [self._swapped(layer) if layer.kind == self.kind else layer for layer in super().layers(model)]

    def _swapped(self, layer):
        tensors = dict(layer.tensors)
        for first, second in self.roles:
            if first in tensors and second in tensors:
                tensors[first] = dataclasses.replace(layer.tensors[second], role=first)
                tensors[second] = dataclasses.replace(layer.tensors[first], role=second)
        return dataclasses.replace(layer, tensors=tensors)


def _gates(first, second):
    bases = ("kernel", "recurrent_kernel", "bias", "recurrent_bias")
    return tuple((f"{base}.{first}", f"{base}.{second}") for base in bases)


class TakesTheResetGateForTheUpdateGate(_SwapsRoles):
    kind, roles = "gru", _gates("reset", "update")


class OrdersGatesAsInputForgetOutputCell(_SwapsRoles):
    kind, roles = "lstm", _gates("cell", "output")


class TakesOneGateTwice(_SwapsRoles):
    """Says that the forget gate lies where the input gate lies."""

    kind = "lstm"

    def _swapped(self, layer):
        tensors = {
            role: dataclasses.replace(tensor, within=layer.tensors[role.replace("forget", "input")].within)
            for role, tensor in layer.tensors.items()
        }
        return dataclasses.replace(layer, tensors=tensors)


class _Changes(Healthy):
    """Stores something else than it is given."""

    def write(self, model, values):
        super().write(model, self.changed(model, values))

    def changed(self, model, values):
        raise NotImplementedError


class SumsTheBiasesOfAGru(_Changes):
    """Right for the gates, and wrong for the new state, where the reset gate stands between the two."""

    def changed(self, model, values):
        pairs = {name: name.replace("bias_ih", "bias_hh") for name in values if "bias_ih" in name}
        sums = {name: values[name] + values[other] for name, other in pairs.items()}
        return {**values, **sums, **{other: values[other] * 0 for other in pairs.values()}}


class KeepsOneBiasOfTwo(_Changes):
    def changed(self, model, values):
        return {name: array * 0 if "bias_hh" in name else array for name, array in values.items()}


class FlipsTransposedKernels(_Changes):
    def changed(self, model, values):
        transposed = any(layer.kind == "conv_transpose" for layer in self.layers(model))
        return {
            name: np.flip(array, range(2, array.ndim)).copy() if transposed and array.ndim > 2 else array
            for name, array in values.items()
        }


class SwapsHeadsAndTheirSizes(_Changes):
    """The head as the faster axis of the features of query, key and value."""

    def changed(self, model, values):
        heads = [module.num_heads for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
        return {
            name: _regrouped(array, heads[0]) if heads and "in_proj" in name else array
            for name, array in values.items()
        }


def _regrouped(array, heads):
    rest = array.shape[1:]
    return np.ascontiguousarray(array.reshape(3, heads, -1, *rest).swapaxes(1, 2)).reshape(array.shape)


class ListsValueBeforeKey(Healthy):
    """Keras's order of arguments, (query, value, key), for torch's."""

    def layers(self, model):
        listed = super().layers(model)
        at = [index for index, layer in enumerate(listed) if "heads" in layer.settings]
        if at:
            listed[at[1]], listed[at[2]] = listed[at[2]], listed[at[1]]
        return listed


class GivesReversedSequencesInTheOrderOfTime(Healthy):
    def run(self, model, sample, watcher=None):
        output = super().run(model, sample, watcher)
        reverse = any(layer.settings.get("reverse") for layer in self.layers(model))
        return output[:, ::-1].copy() if reverse else output


class _BuildsWith(Healthy):
    """Builds the layers of one kind with other settings."""

    kind = ""

    def other(self, settings, shapes):
        raise NotImplementedError

    def build_layer(self, kind, settings, shapes):
        changes = self.other(settings, shapes) if kind == self.kind else {}
        return super().build_layer(kind, {**settings, **changes}, shapes)


class NormalisesEachChannelAlone(_BuildsWith):
    kind = "group_norm"

    def other(self, settings, shapes):
        return {"groups": next(iter(shapes.values()))[0]}


class DividesByTheRootWithoutEps(_BuildsWith):
    kind = "rms_norm"

    def other(self, settings, shapes):
        return {"eps": 0.0}


class HasOneSlopeForAll(_BuildsWith):
    kind = "activation"

    def other(self, settings, shapes):
        return {"slope": 0.01} if "slope" in settings else {}


class AlwaysCountsWhatIsPadded(_BuildsWith):
    kind = "avg_pool"

    def other(self, settings, shapes):
        return {"count_include_pad": True}


class PutsSlopesOnTheLastAxis(Healthy):
    def run(self, model, sample, watcher=None):
        if not any(layer.kind == "prelu" for layer in self.layers(model)):
            return super().run(model, sample, watcher)
        return np.swapaxes(super().run(model, np.swapaxes(sample, 1, -1).copy(), watcher), 1, -1).copy()


class NormalisesWeightsOverTheOutputs(Healthy):
    """The norm over the wrong axis of a linear kernel, with a magnitude that is transposed to fit."""

    def build_layer(self, kind, settings, shapes):
        if kind != "linear" or "kernel.direction" not in shapes:
            return super().build_layer(kind, settings, shapes)
        outs, ins = shapes["kernel.direction"]
        return weight_norm(nn.Linear(ins, outs, bias="bias" in shapes), dim=1)

    def layers(self, model):
        return [
            dataclasses.replace(
                layer,
                tensors={
                    role: dataclasses.replace(tensor, layout="in out") if self._wrong(layer, role) else tensor
                    for role, tensor in layer.tensors.items()
                },
            )
            for layer in super().layers(model)
        ]

    def _wrong(self, layer, role):
        return (layer.kind, role) == ("linear", "kernel.magnitude")


class SwapsScaleAndBias(_Redescribes):
    def _changed(self, layer, tensor):
        other = {"scale": "bias", "bias": "scale"}.get(tensor.role)
        if layer.kind != "batch_norm" or other is None:
            return tensor
        return dataclasses.replace(
            tensor, name=tensor.name.replace("weight", "#").replace("bias", "weight").replace("#", "bias")
        )


class DropsBiases(Healthy):
    def write(self, model, values):
        super().write(model, {name: array for name, array in values.items() if not name.endswith("bias")})


class IgnoresEps(Healthy):
    def build_layer(self, kind, settings, shapes):
        return super().build_layer(kind, {**settings, "eps": 1e-5} if "eps" in settings else settings, shapes)


class IgnoresDilation(Healthy):
    def build_layer(self, kind, settings, shapes):
        ones = {"dilation": (1,) * len(settings["dilation"])} if "dilation" in settings else {}
        return super().build_layer(kind, {**settings, **ones}, shapes)


class RunsInTrainingMode(Healthy):
    def run(self, model, sample, watcher=None):
        arrays = sample if isinstance(sample, tuple) else (sample,)
        model(*(torch.from_numpy(np.array(array)) for array in arrays))  # the statistics move before they are used
        return super().run(model, sample, watcher)


class KeepsWhatIsWritten(Healthy):
    def write(self, model, values):
        super().write(model, values)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, array in values.items():
            tensors[name].data = torch.from_numpy(array)


class KeepsViews(Healthy):
    def read(self, model, names, *, keep=False):
        return super().read(model, names)


class WritesBeforeItChecks(Healthy):
    def write(self, model, values):
        for name, array in values.items():
            super().write(model, {name: array})


class IgnoresWhatAWatcherGivesBack(Healthy):
    def run(self, model, sample, watcher=None):
        return super().run(model, sample, watcher and _Deaf(watcher))


class _Deaf:
    def __init__(self, watcher):
        self._watcher = watcher

    def before(self, layer, inputs):
        self._watcher.before(layer, inputs)

    def after(self, layer, output):
        self._watcher.after(layer, output)
