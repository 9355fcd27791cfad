"""Versions that differ from another one in few elements."""

from __future__ import annotations

from typing import Any

import numpy as np

from rollout_server.engines.base import Positions

Tensors = dict[str, Any]


def change_some(tensors: Tensors, *, share: float, seed: int = 0) -> tuple[Tensors, dict[str, Positions]]:
    """Change that share of every tensor's elements, one at least; return the result and where it differs."""
    import torch

    draw = np.random.default_rng(seed)
    changed, changes = {}, {}
    for name, tensor in tensors.items():
        count = max(1, round(share * tensor.numel()))
        positions = np.sort(draw.choice(tensor.numel(), count, replace=False))
        flat = tensor.clone().reshape(-1)
        flat[torch.from_numpy(positions)] += 0.25
        changed[name], changes[name] = flat.reshape(tensor.shape), positions
    return changed, changes
