"""The Keras callback that logs what a policy did in each epoch."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from clipcore.errors import InvalidInput
from clipcore_tensorflow._figures import Figures
from clipcore_tensorflow._training import Clipped, inner_optimizer

# What tf.summary.scalar writes, which since TensorFlow 2.21 needs TensorBoard to be installed.
_SCALAR = tf.compat.v1.SummaryMetadata(
    plugin_data=tf.compat.v1.SummaryMetadata.PluginData(plugin_name="scalars"), data_class="DATA_CLASS_SCALAR"
)


class ClipLogger(keras.callbacks.Callback):
    """Log what the policy on a model's optimizer did in each epoch of `fit`, compiled or not.

    Into `logs`, and so into `History` and what later callbacks write: "clip/norm", the mean norm before clipping;
    "clip/limit", the mean limit of the steps that had one, inf where none had; "clip/scale", the mean of the smallest
    factors; "clip/share_clipped", the share of steps that were clipped. A step with a norm that is not finite counts in
    the share alone. Where an optimizer accumulates gradients, a step is one of its own.

    Args:
        log_dir: a folder for TensorBoard, where the same figures go.
        writer: a tf.summary writer in its place; it stays open.
    Raises:
        InvalidInput: at `fit`, the model's optimizer has no policy; or both arguments are given.
    """

    def __init__(self, log_dir: str | None = None, *, writer: Any = None) -> None:
        super().__init__()
        if log_dir is not None and writer is not None:
            raise InvalidInput("ClipLogger has both log_dir and writer; expected one of them")
        self._log_dir, self._writer = log_dir, writer

    def set_model(self, model: Any) -> None:
        """Called by Keras before it traces the train step, which adds to the figures from here on."""
        super().set_model(model)
        optimizer = getattr(model, "optimizer", None)
        optimizer = inner_optimizer(optimizer) if optimizer is not None else None
        if not isinstance(optimizer, Clipped):
            raise InvalidInput("ClipLogger: the model's optimizer has no policy; attach one first, with cc.attach")
        self._attached = optimizer._clipcore
        if self._attached.figures is None:
            self._attached.figures = Figures(optimizer._distribution_strategy)
            model.train_function = None  # what was traced knows nothing of them

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        if self._log_dir is not None and self._writer is None:
            self._writer = tf.summary.create_file_writer(self._log_dir)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._attached.figures.reset()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        figures = {f"clip/{name}": value for name, value in self._attached.figures.means().items()}
        if logs is not None:
            logs.update(figures)
        if self._writer is not None:
            with self._writer.as_default():
                for name, value in figures.items():
                    tf.summary.write(name, tf.constant(value, tf.float32), step=epoch, metadata=_SCALAR)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._writer is not None:
            self._writer.flush()
        if self._log_dir is not None and self._writer is not None:
            self._writer.close()
            self._writer = None
