"""Activation offloading: what the backward pass needs waits in the host's memory, not in the device's.

torch's `save_on_cpu` does it, in pinned memory. Weights, which the forward pass saves too, stay where they are: they
are on the device anyway. With checkpointed layers what is saved is their inputs, and nothing else is moved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from protocol.errors import ConfigError


def check_device(device: torch.device) -> None:
    """Refuse devices whose memory is the host's.

    Raises:
        ConfigError: it is no CUDA device.
    """
    if device.type != "cuda":
        raise ConfigError(
            f"activation_offloading moves activations from a CUDA device to the host, and device is {device.type!r}:"
            " leave it out; gradient_checkpointing and a smaller token_budget save memory everywhere"
        )


class HostActivations(saved_tensors_hooks):
    """A context for one forward pass; the backward pass, outside of it, fetches what it needs, when it needs it.

    Args:
        model: whose weights are not moved. Sharded ones must be gathered.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        host = save_on_cpu(pin_memory=True)
        weights = {_address(parameter) for parameter in model.parameters()}

        def pack(tensor: Tensor) -> Any:
            return tensor if _address(tensor) in weights else host.pack_hook(tensor)

        def unpack(packed: Any) -> Tensor:
            tensor: Tensor = packed if isinstance(packed, Tensor) else host.unpack_hook(packed)
            return tensor

        super().__init__(pack, unpack)


def _address(tensor: Tensor) -> int:
    """Of its storage: a layer saves its weight as a transposed view."""
    return tensor.untyped_storage().data_ptr()
