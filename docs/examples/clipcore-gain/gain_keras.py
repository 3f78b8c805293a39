"""The layer in Keras."""

import keras


class Gain(keras.layers.Layer):
    """(x + shift) * g, a factor per feature."""

    def __init__(self, shift=0.0, **kwargs):
        super().__init__(**kwargs)
        self.shift = shift

    def build(self, input_shape):
        self.g = self.add_weight(shape=input_shape[-1:], initializer="ones", name="g")

    def call(self, x):
        return (x + self.shift) * self.g
