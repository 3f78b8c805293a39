"""Network B of `clipcore demo`, and how it is trained: the PyTorch half."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

import clipcore as cc


class DigitsB(nn.Module):
    """A small classifier of 8 x 8 images: two convolutions with batch norm, two dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, kernel_size=3, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=2, stride=2)
        self.bn2 = nn.BatchNorm2d(32)
        self.fc1 = nn.Linear(32 * 4 * 4, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (n, 10) of images (n, 1, 8, 8)."""
        x = torch.relu(self.bn1(self.conv1(images)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


def build(seed: int) -> DigitsB:
    """Network B with fresh weights; torch's random state stays what it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitsB()


def as_input(images: np.ndarray) -> np.ndarray:
    """Images (n, 8, 8) as the network takes them: (n, 1, 8, 8)."""
    return np.ascontiguousarray(images[:, None], dtype=np.float32)


def train(
    model: nn.Module,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    policy: cc.Policy,
    learning_rate: float,
    momentum: float,
) -> list[float]:
    """One step of SGD per batch of (images, labels) under the policy; the norm of the gradients before each clip."""
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=momentum)
    clipping = cc.attach(optimizer, policy)
    loss_fn = nn.CrossEntropyLoss()
    model.train()
    with _one_thread():
        for images, labels in batches:
            optimizer.zero_grad()
            loss_fn(model(torch.from_numpy(as_input(images))), torch.from_numpy(labels)).backward()
            optimizer.step()
    return [float(report.norm) for report in clipping.reports]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Batches this small keep several threads waiting for each other: 18 s rather than 1 s beside another process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def accuracy(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of images (n, 8, 8) whose largest logit is that of their label."""
    model.eval()
    with torch.no_grad():
        answers = model(torch.from_numpy(as_input(images))).argmax(1)
    return float(np.mean(answers.numpy() == labels))
