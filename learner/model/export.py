"""The weights as others see them: names and shapes, a published version, a Hugging Face directory.

Names are those of the model's state dict. A tensor that has several (tied weights) goes under the first of them only,
so `lm_head.weight` is absent where it is the embedding; every loader ties again from config.json.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from learner.model.load import DTYPES
from protocol.errors import WeightsError
from protocol.parallel import in_threads
from protocol.weights.layout import Layout, MappedWeights
from protocol.weights.manifest import BLOCK_BYTES, Algorithm, TensorSpec, new_hasher

SAFETENSORS_DTYPES: dict[str, Literal["F32", "BF16"]] = {"float32": "F32", "bfloat16": "BF16"}

PIECE_BYTES = 512 << 10
"""Of the file: with what it is cast from it fits the cache of a core. Divides BLOCK_BYTES."""


class WritableWeights(Protocol):
    """What a version is written into (protocol.weights.layout.MappedWeights)."""

    def view(self, name: str) -> memoryview:
        """Return the writable bytes of a tensor."""


def unique_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return every tensor of the state dict once, under its first name, detached.

    Not by `state_dict()`: asked for that, a sharded model gives up the weights it has gathered.
    """
    unique: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for prefix, module in model.named_modules():
        buffers = [pair for pair in module.named_buffers(recurse=False) if _is_persistent(module, pair[0])]
        for name, tensor in (*module.named_parameters(recurse=False), *buffers):
            identity = (tensor.data_ptr(), tensor.shape)
            if identity not in seen:
                seen.add(identity)
                unique[f"{prefix}.{name}" if prefix else name] = tensor.detach()
    return unique


def _is_persistent(module: torch.nn.Module, name: str) -> bool:
    return name not in module._non_persistent_buffers_set


def specs_of(model: PreTrainedModel, dtype: str) -> list[TensorSpec]:
    """Describe the tensors of a published version, all in `dtype` (float32 or bfloat16)."""
    return describe(unique_tensors(model), dtype)


def describe(tensors: Mapping[str, Tensor], dtype: str) -> list[TensorSpec]:
    """Describe these tensors as published in `dtype`; of shards the shapes are those of the whole."""
    return [TensorSpec(name, SAFETENSORS_DTYPES[dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]


def write_weights(model: PreTrainedModel, dtype: str, mapped: WritableWeights) -> None:
    """Write all weights of the model; see `write_tensors`."""
    write_tensors(unique_tensors(model), dtype, mapped)


def write_tensors(
    tensors: Mapping[str, Tensor], dtype: str, mapped: WritableWeights, algorithm: Algorithm | None = None
) -> dict[str, list[str]]:
    """Cast every tensor straight into its place in `mapped`; no second copy of the model exists at any time.

    Copied, looked at and hashed piece by piece, while a piece is in the cache: the memory is read once, by several
    threads, unless torch has threads of its own for each copy (eight of them under each of four took twice as long as
    one alone). Safe beside a forward and backward pass in another thread: it only reads the parameters.

    Returns:
        With an algorithm, the digests of each tensor's blocks, as `build_manifest` would compute them.

    Raises:
        WeightsError: a tensor is not finite in that dtype. `mapped` is then half written and must not be published.
    """

    def write(name: str) -> tuple[float, list[str]]:
        return _write(tensors[name], mapped.view(name), DTYPES[dtype], algorithm)

    names = sorted(tensors, key=lambda name: -tensors[name].numel())  # the longest last would be waited for alone
    has_threads = torch.get_num_threads() > 1 and all(tensor.is_cpu for tensor in tensors.values())
    nbytes = sum(tensor.numel() for tensor in tensors.values()) * DTYPES[dtype].itemsize
    digests: dict[str, list[str]] = {}
    for number, (total, of_blocks) in (
        enumerate(map(write, names)) if has_threads else in_threads(write, names, nbytes=nbytes)
    ):
        name = names[number]
        # Whatever is not finite makes the sum so; a sum of finite numbers may still overflow.
        if not math.isfinite(total) and not torch.isfinite(tensors[name].to(DTYPES[dtype])).all():
            raise WeightsError(f"tensor {name} is not finite as {dtype}: this version cannot be published")
        digests[name] = of_blocks
    return digests


def _write(
    tensor: Tensor, view: memoryview, dtype: torch.dtype, algorithm: Algorithm | None
) -> tuple[float, list[str]]:
    """Cast a tensor into its bytes.

    Returns:
        A number that is finite only where all written elements are, and, with an algorithm, the blocks' digests.
    """
    flat, target = tensor.reshape(-1), torch.frombuffer(view, dtype=dtype)
    length = (PIECE_BYTES if tensor.is_cpu else BLOCK_BYTES) // dtype.itemsize
    by_bits = tensor.is_cpu and dtype is torch.bfloat16
    total, end, hasher = 0.0, 0, None
    digests: list[str] = []
    for piece, place in zip(flat.split(length), target.split(length), strict=True):
        source = piece if tensor.is_cpu else piece.to(dtype)
        place.copy_(source)
        begin, end = end, end + place.nbytes
        total += _largest_bf16(view[begin:end]) if by_bits else source.sum().item()
        if algorithm is None:
            continue
        hasher = hasher or new_hasher(algorithm)
        hasher.update(view[begin:end])
        if end % BLOCK_BYTES == 0 or end == len(view):
            digests.append(hasher.hexdigest())
            hasher = None
    return total, digests


def _largest_bf16(octets: memoryview) -> float:
    """Return infinity where an element is not finite, else 0.

    Then its exponent is all ones: no finite number is larger than the positive ones of them as a signed integer, nor
    than the negative ones as an unsigned integer. Half the bytes of a sum of float32 sources, and faster.
    """
    bits = np.frombuffer(octets, np.int16)
    return math.inf if bits.max() >= 0x7F80 or bits.view(np.uint16).max() >= 0xFF80 else 0.0


def save_pretrained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a directory that plain `AutoModelForCausalLM.from_pretrained(directory)` loads, in the master dtype."""
    model.save_pretrained(directory, max_shard_size="1TB")
    tokenizer.save_pretrained(directory)


def save_gathered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    tensors: Iterable[tuple[str, Tensor]],
    directory: Path,
) -> None:
    """Write what `save_pretrained` writes, of tensors that come one by one: none outlives its place in the file.

    Args:
        model: for its configuration, names and shapes; its own weights are not read.
        tokenizer: goes beside it.
        dtype: of the tensors, float32 or bfloat16.
        tensors: every parameter once, by the name it has in `unique_tensors`.
        directory: exists.
    """
    parameters = dict(model.named_parameters())
    buffers = [(name, tensor) for name, tensor in unique_tensors(model).items() if name not in parameters]
    write_file(directory / "model.safetensors", specs_of(model, dtype), itertools.chain(buffers, tensors))
    model.config.dtype = DTYPES[dtype]
    model.config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_file(path: Path, specs: list[TensorSpec], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a safetensors file of float32 or bfloat16 tensors that come one by one."""
    dtypes = {published: dtype for dtype, published in SAFETENSORS_DTYPES.items()}
    with MappedWeights.create(path, Layout(specs)) as mapped:
        for name, tensor in tensors:
            _place(mapped, name, tensor, dtypes[specs[0].dtype])  # type: ignore[index]


def _place(mapped: WritableWeights, name: str, tensor: Tensor, dtype: str) -> None:
    target = torch.frombuffer(mapped.view(name), dtype=DTYPES[dtype])
    target.view(tensor.shape).copy_(tensor)
