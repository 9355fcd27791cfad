"""AdamW, its schedule, and its state as a safetensors file (no pickle).

The learning rate is a pure function of the number of updates done, so a resumed run needs no scheduler state.
States in 8 bits, and states that a GPU pages out to the host, are bitsandbytes' (an extra); their numbers are those of
Dettmers et al. (arXiv 2110.02861): blocks of 256, parameters of fewer than 4096 elements stay in 32 bits.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from learner.config import OptimizerOptions
from protocol.errors import ConfigError

log = logging.getLogger(__name__)

STATE_FILE = "optimizer.safetensors"
BITSANDBYTES = {
    "adamw_8bit": ("AdamW8bit", "AdamW8bit"),
    "paged_adamw_8bit": ("PagedAdamW8bit", "AdamW8bit"),
    "paged_adamw_32bit": ("PagedAdamW32bit", "AdamW32bit"),
}
"""Its classes by `optim`: for CUDA, and for devices that have nowhere to page to."""
CONSTANTS = ("qmap1", "qmap2")
"""Of bitsandbytes' state: the code book, shared by all parameters and never changed. Not saved."""


def check_library(optim: str) -> None:
    """Refuse an optimizer whose library is missing; before anything is loaded, in a moment.

    Raises:
        ConfigError: it is.
    """
    if optim in BITSANDBYTES and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"optim {optim!r} needs bitsandbytes, which is not installed: pip install '.[optim]' in headway's"
            " directory, or use optim = 'adamw'"
        )


class NotFinite(Exception):
    """A loss or a gradient is not: which, and what it is."""


def total_norm(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """Compute the norm of all gradients together, []."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def finite_gradient_norm(norm: Tensor, name: str, loss: float) -> Tensor:
    """Return the norm.

    Raises:
        NotFinite: it is not finite, or the loss (called `name`) that the gradients are of is not.
    """
    if not math.isfinite(loss):
        raise NotFinite(f"{name} is {loss}")
    if not torch.isfinite(norm):
        raise NotFinite(f"gradient norm{'' if name == 'loss' else f' of the {name}'} is {norm.item()}")
    return norm


def make_optimizer(named_parameters: dict[str, torch.nn.Parameter], options: OptimizerOptions) -> torch.optim.Optimizer:
    """Make AdamW (arXiv 1711.05101) over the parameters; weight decay on matrices only (not on norms and biases)."""
    matrices = [p for p in named_parameters.values() if p.ndim >= 2]
    vectors = [p for p in named_parameters.values() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {
        "lr": options.learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_epsilon,
    }
    if options.optim == "adamw":
        return torch.optim.AdamW(groups, fused=True, **settings)
    import bitsandbytes  # seconds, and only where it is asked for

    paged, resident = BITSANDBYTES[options.optim]
    on_cuda = all(p.device.type == "cuda" for p in named_parameters.values())
    if paged != resident and not on_cuda:
        log.warning("optim %r: only a CUDA device pages; states stay beside the weights", options.optim)
    optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, paged if on_cuda else resident)(groups, **settings)
    return optimizer


def scheduled_rate(options: OptimizerOptions, updates_done: int, *, peak: float) -> float:
    """Compute the learning rate of the update after `updates_done` others.

    Update i (from 1) has  i / warmup_steps  of the peak while it warms up: the first one is small but not lost. After
    that `linear` and `cosine` fall from the peak towards 0, which they would reach at max_steps + 1.

    Args:
        options: the schedule.
        updates_done: so far.
        peak: options.learning_rate, or what a live knob has put in its place.
    """
    if updates_done < options.warmup_steps:
        return peak * (updates_done + 1) / options.warmup_steps
    falling_steps = max(1, options.max_steps - options.warmup_steps)
    done = min(1.0, (updates_done - options.warmup_steps) / falling_steps)
    match options.lr_scheduler_type:
        case "constant":
            return peak
        case "linear":
            return peak * (1.0 - done)
        case "cosine":
            return peak * 0.5 * (1.0 + math.cos(math.pi * done))


def save_state(
    optimizer: torch.optim.Optimizer, named_parameters: dict[str, torch.nn.Parameter], directory: Path
) -> None:
    """Write the moments of every parameter; nothing for parameters that were never updated."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in named_parameters.items():
        state = {key: value for key, value in optimizer.state.get(parameter, {}).items() if key not in CONSTANTS}
        tensors |= {f"{key}.{name}": torch.as_tensor(value) for key, value in state.items()}
    save_file(tensors, directory / STATE_FILE)


def load_state(
    optimizer: torch.optim.Optimizer, named_parameters: dict[str, torch.nn.Parameter], directory: Path
) -> None:
    """Read back what `save_state` wrote.

    Raises:
        ConfigError: the file is of another model, or of another optimizer.
    """
    path = directory / STATE_FILE
    names = {parameter: name for name, parameter in named_parameters.items()}
    with safe_open(path, "pt") as file:
        saved = set(file.keys())
        for group_index, group in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                name = names[parameter]
                if f"step.{name}" not in saved:
                    continue  # never updated
                state = _initial_state(optimizer, parameter, group_index, index)
                for key in state.keys() - set(CONSTANTS):
                    if f"{key}.{name}" not in saved:
                        raise ConfigError(f"{path} is of another optim: it has no {key}.{name}")
                    value = file.get_tensor(f"{key}.{name}")
                    saved.remove(f"{key}.{name}")
                    if not isinstance(state[key], Tensor):
                        state[key] = value.item()
                    elif state[key].shape != value.shape:
                        raise ConfigError(f"{path}: {key}.{name} is not of shape {list(state[key].shape)}")
                    else:
                        state[key].copy_(value)
    if saved:
        raise ConfigError(f"{path} is of another model or optim: it has {min(saved)}")


def _initial_state(
    optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, group_index: int, index: int
) -> dict[str, Any]:
    """Give a parameter the state it has before its first update, as its optimizer keeps it."""
    state: dict[str, Any] = optimizer.state[parameter]
    if isinstance(optimizer, torch.optim.AdamW):
        state["step"] = torch.zeros((), device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    else:  # bitsandbytes: it knows which parameters it quantizes, and where paged memory comes from
        optimizer.init_state(optimizer.param_groups[group_index], parameter, group_index, index)  # type: ignore[attr-defined]
    return state
