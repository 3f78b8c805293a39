"""The layer in PyTorch."""

import torch
from torch import nn


class Gain(nn.Module):
    """(x + shift) * factor, a factor per feature."""

    def __init__(self, features, shift=0.0):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(features))
        self.shift = shift

    def forward(self, x):
        return (x + self.shift) * self.factor
