"""What each kind of layer computes, in float64, written from the definitions: slow, and always right.

Data has the channel axis first, (batch, channel, *spatial); linear layers, layer norm and RMS norm act on the last
axes; sequences are (batch, time, feature). Tensors are in the canonical layouts of `clipcore.mapping.kinds`, settings
by the names that stand there. It imports NumPy alone and shares no line with the code that moves weights: agreement
between the two is evidence.
"""

from clipcore.mapping.reference.activations import ACTIVATIONS, Activation, activate, activation, dropout, prelu
from clipcore.mapping.reference.arrays import Array, Forward
from clipcore.mapping.reference.attention import attention
from clipcore.mapping.reference.kernels import conv, conv_transpose, embedding, kernel_of, linear
from clipcore.mapping.reference.norms import batch_norm, group_norm, layer_norm, rms_norm
from clipcore.mapping.reference.recurrent import gru, lstm, rnn
from clipcore.mapping.reference.windows import avg_pool, max_pool, paddings

# every kind, and "attention", which is four linear layers and what stands between them
FORWARD: dict[str, Forward] = {
    forward.__name__: forward
    for forward in (
        linear,
        conv,
        conv_transpose,
        batch_norm,
        layer_norm,
        group_norm,
        rms_norm,
        embedding,
        lstm,
        gru,
        rnn,
        prelu,
        activation,
        avg_pool,
        max_pool,
        dropout,
        attention,
    )
}

__all__ = ["ACTIVATIONS", "FORWARD", "Activation", "Array", "Forward", "activate", "kernel_of", "paddings"]
