"""One rank of data-parallel training over gloo, a process of its own: python data_parallel.py FOLDER POLICY RANK."""

import json
import pathlib
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import clipcore as cc
from clipcore.clipping.policies import policy_from_config


def train(policy, rank, size):
    """Three clipped steps on this rank's part of each batch: what was reported, learned and trained, by name."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    wrapped = nn.parallel.DistributedDataParallel(network) if size > 1 else network
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    attachment = cc.attach(optimizer, policy, network)
    for _ in range(3):
        wrapped.zero_grad()
        part = (torch.randn(8, 4).double() * 10).chunk(size)[rank]
        wrapped(part).square().mean().backward()
        optimizer.step()
    reports = np.array([[r.norm, r.scale, r.clipped, r.nonfinite] for r in attachment.reports], float)
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    return {"reports": reports, **attachment.state_dict(), **weights}


if __name__ == "__main__":
    folder, config, rank = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    np.savez(folder / f"{rank}.npz", **train(policy_from_config(config), rank, 2))
    dist.destroy_process_group()
