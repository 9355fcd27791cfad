"""The optimizer's state as each rank's own safetensors files, read back by any number of ranks.

    <checkpoint>/optimizer/shard-00001-....safetensors     the first rank's rows of every moment, and where they belong
                           shard-00002-....

Written and resharded by torch's distributed checkpoint (DCP) in its Hugging Face format: what DCP otherwise keeps in a
pickled `.metadata` stands in the headers of the files themselves, as JSON. Nothing read from a checkpoint is unpickled.
A checkpoint of one rank (`learner/optimizer.py`) is of the same format, in one file without offsets.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import is_initialized
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from protocol.errors import ConfigError

DIRECTORY = "optimizer"
MOMENTS = ("exp_avg", "exp_avg_sq")


def has_shards(checkpoint: Path) -> bool:
    """Tell whether several ranks saved it."""
    return (checkpoint / DIRECTORY).is_dir()


def save_shards(
    optimizer: torch.optim.Optimizer, named_parameters: dict[str, torch.nn.Parameter], checkpoint: Path
) -> None:
    """Write this rank's shards. Every rank must call it, with the directory on a file system that all see.

    Nothing is written for parameters that were never updated. How often the others were is the same for all.

    Raises:
        OSError: a rank could not write.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in named_parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            # A number per parameter; one row, since DCP reads no tensors without dimensions back.
            tensors[f"{key}.{name}"] = value if key in MOMENTS else value.reshape(1)
    writer = HuggingFaceStorageWriter(str(checkpoint / DIRECTORY), save_distributed=True)
    try:
        save(tensors, storage_writer=writer)
    except CheckpointException as error:  # a BaseException, which nobody would take for a failed write
        raise OSError(f"{checkpoint / DIRECTORY}: {_reason(error)}") from error


def load_shards(
    optimizer: torch.optim.Optimizer, named_parameters: dict[str, torch.nn.Parameter], checkpoint: Path
) -> None:
    """Read the state of these parameters, whole ones or shards of them. Every rank must call it.

    Raises:
        ConfigError: the checkpoint is of another model, or damaged.
    """
    directory = checkpoint / DIRECTORY if has_shards(checkpoint) else checkpoint
    reader = HuggingFaceStorageReader(str(directory))
    saved = reader.read_metadata().state_dict_metadata
    states: dict[str, dict[str, Tensor]] = {}
    for name, parameter in named_parameters.items():
        if f"{MOMENTS[0]}.{name}" not in saved:
            continue
        for key in MOMENTS:
            if (shape := saved[f"{key}.{name}"].size) != parameter.shape:  # type: ignore[union-attr]
                raise ConfigError(
                    f"{directory}: {key} of {name} is of shape {list(shape)}, the parameter of {list(parameter.shape)}"
                )
        states[name] = {key: torch.zeros_like(parameter, requires_grad=False) for key in MOMENTS}
        states[name]["step"] = torch.zeros(saved[f"step.{name}"].size)  # type: ignore[union-attr]
    expected = {f"{key}.{name}" for name in states for key in states[name]}
    strange = {key for key in saved if key.startswith(("exp_avg.", "exp_avg_sq.", "step."))} - expected
    if strange:
        raise ConfigError(f"{directory} is of another model: it has {min(strange)}")
    flat = {f"{key}.{name}": tensor for name, state in states.items() for key, tensor in state.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one rank: that is meant
        try:
            load(flat, storage_reader=reader, no_dist=not is_initialized())
        except CheckpointException as error:
            raise ConfigError(f"{directory} cannot be read: {_reason(error)}") from error
    for name, state in states.items():
        parameter = named_parameters[name]
        step = state["step"].reshape(()).to(parameter.device)  # where a fused AdamW counts
        optimizer.state[parameter] = state | {"step": step}


def _reason(error: CheckpointException) -> str:
    """What happened on the first of the ranks on which something did."""
    failure, _ = error.failures[min(error.failures)]
    return str(failure).strip().partition("\n")[0] or type(failure).__name__
