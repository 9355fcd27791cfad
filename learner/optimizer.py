"""AdamW, its schedule, and its state as a safetensors file (no pickle).

The learning rate is a pure function of the number of updates done, so a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from learner.config import OptimizerOptions
from protocol.errors import ConfigError

STATE_FILE = "optimizer.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(named_parameters: dict[str, torch.nn.Parameter], options: OptimizerOptions) -> torch.optim.AdamW:
    """Make AdamW (arXiv 1711.05101) over the parameters; weight decay on matrices only (not on norms and biases)."""
    matrices = [p for p in named_parameters.values() if p.ndim >= 2]
    vectors = [p for p in named_parameters.values() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        fused=True,
    )


def scheduled_rate(options: OptimizerOptions, updates_done: int) -> float:
    """Compute the learning rate of the update after `updates_done` others.

    Update i (from 1) has  i / warmup_steps  of the peak while it warms up: the first one is small but not lost. After
    that `linear` and `cosine` fall from the peak towards 0, which they would reach at max_steps + 1.
    """
    if updates_done < options.warmup_steps:
        return options.learning_rate * (updates_done + 1) / options.warmup_steps
    falling_steps = max(1, options.max_steps - options.warmup_steps)
    done = min(1.0, (updates_done - options.warmup_steps) / falling_steps)
    match options.lr_scheduler_type:
        case "constant":
            return options.learning_rate
        case "linear":
            return options.learning_rate * (1.0 - done)
        case "cosine":
            return options.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))


def save_state(optimizer: torch.optim.AdamW, named_parameters: dict[str, torch.nn.Parameter], directory: Path) -> None:
    """Write the moments of every parameter; nothing for parameters that were never updated."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in named_parameters.items():
        state = optimizer.state.get(parameter, {})
        tensors |= {f"{key}.{name}": value for key, value in state.items()}
    save_file(tensors, directory / STATE_FILE)


def load_state(optimizer: torch.optim.AdamW, named_parameters: dict[str, torch.nn.Parameter], directory: Path) -> None:
    """Read back what `save_state` wrote.

    Raises:
        ConfigError: the file is of another model.
    """
    with safe_open(directory / STATE_FILE, "pt") as file:
        saved = set(file.keys())
        for name, parameter in named_parameters.items():
            keys = [key for key in (*MOMENTS, "step") if f"{key}.{name}" in saved]
            state = {key: file.get_tensor(f"{key}.{name}").to(parameter.device) for key in keys}
            if any(state[key].shape != parameter.shape for key in MOMENTS if key in state):
                raise ConfigError(f"{directory / STATE_FILE}: {name} is not of shape {list(parameter.shape)}")
            if state:
                optimizer.state[parameter] = state
            saved -= {f"{key}.{name}" for key in keys}
    if saved:
        raise ConfigError(f"{directory / STATE_FILE} is of another model: it has {min(saved)}")
