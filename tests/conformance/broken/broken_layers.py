"""The torch backend, made wrong on purpose in how it builds, describes, reads, writes or runs a layer."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

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
    kind, layout = "conv", "(out group) in ..."


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
        model(torch.from_numpy(np.array(sample)))  # the statistics move before they are used
        return super().run(model, sample, watcher)


class KeepsWhatIsWritten(Healthy):
    def write(self, model, values):
        super().write(model, values)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, array in values.items():
            tensors[name].data = torch.from_numpy(array)


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
