"""Gradients per example of a Keras model, all examples at once where TensorFlow can."""

from __future__ import annotations

import contextlib
from typing import Any

import keras
import tensorflow as tf

from clipcore.errors import InvalidInput
from clipcore_tensorflow._keras import check_keras
from clipcore_tensorflow._models import check_model, parameters, weights
from clipcore_tensorflow._tensors import tf_variable


def per_example_grads(model: Any, loss_fn: Any, batch: tuple[Any, Any]) -> dict[str, tf.Tensor]:
    """See `clipcore.per_example_grads`; inside a tf.function it is traced once, outside of one at every call."""
    if not isinstance(model, keras.layers.Layer):
        raise InvalidInput(f"{type(model).__name__} is no keras.Model; compute gradients per example yourself")
    check_keras()
    check_model(model)
    _check_apart(model)
    try:
        loss = keras.losses.get(loss_fn)
    except ValueError as err:
        raise InvalidInput(f"loss_fn is {loss_fn!r:.60}; expected a Keras loss or its name, say 'mse'") from err
    names = {id(variable): name for name, variable in parameters(model).items()}
    variables = weights(model)
    plain = [tf_variable(variable) for variable in variables]

    def gradients(example: Any) -> list[tf.Tensor]:
        inputs, targets = tf.nest.map_structure(lambda value: value[None], example)
        with tf.GradientTape() as tape:
            # the mean over what a loss gives for each place of a sequence or picture
            value = tf.reduce_mean(loss(targets, model(inputs, training=True)))
        grads = tape.gradient(value, plain, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return [tf.convert_to_tensor(grad) for grad in grads]

    examples = tf.nest.map_structure(tf.convert_to_tensor, batch)
    specs = [tf.TensorSpec(variable.shape, variable.dtype) for variable in plain]
    # all at once, examples would share what a generator draws: the units that dropout leaves out, say
    draws = any(not tf.as_dtype(variable.dtype).is_floating for variable in model.variables)
    grads = _one_by_one(gradients, examples, specs) if draws else _mapped(gradients, examples, specs)
    return {names[id(variable)]: grad for variable, grad in zip(variables, grads, strict=True)}


def _mapped(function: Any, examples: Any, specs: list[tf.TensorSpec]) -> list[tf.Tensor]:
    # it refuses operations that it knows no form over many examples of, with errors of several classes
    with contextlib.suppress(ValueError, TypeError, NotImplementedError, tf.errors.OpError):
        return list(tf.vectorized_map(function, examples, fallback_to_while_loop=False))
    return _one_by_one(function, examples, specs)


def _one_by_one(function: Any, examples: Any, specs: list[tf.TensorSpec]) -> list[tf.Tensor]:
    return list(tf.map_fn(function, examples, fn_output_signature=specs))


def _check_apart(model: keras.layers.Layer) -> None:
    """Refuse a model that mixes examples while it trains."""
    layers = [model, *model._flatten_layers(include_self=False)]
    for layer in layers:
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable:
            raise InvalidInput(
                f"layer {layer.name!r} normalises over the examples of a batch, so that the gradient of one depends on "
                f"the others: freeze it (trainable = False), or use LayerNormalization or GroupNormalization"
            )
