"""The kind "gain": one factor per channel, and a number that is added under it. No framework is imported here."""

import clipcore as cc

GAIN = cc.Kind("gain", {"gain": "channel"}, settings=("shift",))


def _settings(layer):
    return {"shift": layer.shift}


cc.register_kind(
    GAIN,
    {
        "gain_torch.Gain": cc.Stored("gain", {"factor": ("gain", "channel")}, _settings),
        "gain_keras.Gain": cc.Stored("gain", {"g": ("gain", "channel")}, _settings),
    },
)
