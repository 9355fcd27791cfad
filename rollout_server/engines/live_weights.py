"""A model's tensors by their published names, and swapping them for those of a version's file.

The rule of names, the same on the learner's side (protocol/README.md states it in words): names are those of
`model.state_dict()`, which are the safetensors and Hugging Face names and leave out non-persistent buffers; of tied
tensors only the name that comes first there is kept (`model.embed_tokens.weight` stays, `lm_head.weight` goes).

Everything is checked before the first byte of the model changes, so a version is applied whole or not at all (I5).
Of a version that is known to change few elements of the live one only those are read and written; a tensor of which
more than DENSE_ABOVE changes is copied whole, which is faster then.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from protocol.parallel import in_threads
from protocol.weights.layout import MappedWeights
from protocol.weights.manifest import Dtype, TensorSpec, schema_digest
from rollout_server.engines.base import EngineFailure, Positions
from rollout_server.engines.changes import Changes, check_changes

NAMES_SHOWN = 3
DTYPES: dict[Dtype, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
PAGE_BYTES = 4096
LINE_BYTES = 64
"""Of a cache: what one element brings with it."""
DENSE_ABOVE = 0.03
"""Share of a tensor's elements. Seen on one CPU thread of a shared machine, 8M elements: 1 % takes 0.06 (float32)
and 0.4 (bfloat16) of the time of copying all, 3 % takes 0.6 to 0.9, and 5 % (bfloat16) or 10 % (float32) as long."""


@dataclass(frozen=True, slots=True)
class Few:
    """Some elements of a tensor, and what they become."""

    positions: Tensor
    """[n] int64, in the flat tensor (C order)"""
    values: Tensor
    """[n], in the live tensor's dtype"""


Staged = dict[str, Tensor | Few]
"""By published name: the whole tensor, or what changes of it."""


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> live tensor, in the order of `state_dict()`, each storage once."""
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in seen:
            seen.add(key)
            tensors[name] = tensor
    return tensors


def digest_of(tensors: dict[str, Tensor]) -> str:
    """The model digest of Hello: of names and shapes."""
    # A schema digest leaves dtypes out, so any one will do.
    return schema_digest(TensorSpec(name=name, dtype="F32", shape=tuple(t.shape)) for name, t in tensors.items())


def read_weights(
    path: Path, model: dict[str, Tensor], mapping: MappedWeights | None = None, changes: Changes | None = None
) -> Staged:
    """Map a version's file and check it against the model's `unique_tensors`. Touches only the file.

    What is to be copied is read here, off the decode thread: what is left for the pause is the copy.

    Args:
        path: of the file.
        model: the live tensors, by name.
        mapping: of the same file, where this process has one: its pages are there.
        changes: what differs from them; None: not known. Tensors that do not change are not in the result.

    Raises:
        EngineFailure: the file cannot be read, or names, shapes, kinds of dtype or positions do not fit; names the
            first few.
    """
    mapped = _load(path) if mapping is None else _tensors(mapping)
    wrong = [f"{name} is missing" for name in model if name not in mapped]
    wrong += [f"{name} is not in the model" for name in mapped if name not in model]
    wrong += [
        f"{name} is {_describe(mapped[name])}, the model has {_describe(tensor)}"
        for name, tensor in model.items()
        if name in mapped and not _fits(mapped[name], tensor)
    ]
    if wrong:
        more = f" and {len(wrong) - NAMES_SHOWN} more" if len(wrong) > NAMES_SHOWN else ""
        raise EngineFailure(f"weights {path.name} do not fit the model: {'; '.join(wrong[:NAMES_SHOWN])}{more}")
    if changes is None:
        return {**mapped}
    check_changes(path.name, changes, {name: tuple(tensor.shape) for name, tensor in model.items()})
    return {name: _pick(mapped[name], model[name], positions) for name, positions in changes.items() if len(positions)}


def copy_weights(staged: Staged, model: dict[str, Tensor]) -> None:
    """Copy what was read into the live tensors, cast to their dtype. Tied names follow, sharing the storage."""

    @torch.inference_mode()  # of the thread that runs it
    def copy(name: str) -> None:
        what = staged[name]
        if isinstance(what, Few):
            _set(model[name], what)
        else:
            model[name].copy_(what)

    names = sorted(staged, key=lambda name: -model[name].numel())  # the longest last would be waited for alone
    nbytes = sum(LINE_BYTES * len(what.values) if isinstance(what, Few) else what.nbytes for what in staged.values())
    if torch.get_num_threads() == 1 and all(model[name].is_cpu for name in names):
        deque(in_threads(copy, names, nbytes=nbytes), maxlen=0)
    else:  # torch, or the device, has threads of its own
        for name in names:
            copy(name)


def _pick(mapped: Tensor, live: Tensor, positions: Positions) -> Tensor | Few:
    """Read what changes of a tensor."""
    if len(positions) > DENSE_ABOVE * mapped.numel():
        _fault_in(mapped)
        return mapped
    chosen = torch.from_numpy(np.ascontiguousarray(positions))
    values = mapped.reshape(-1).index_select(0, chosen)
    return Few(chosen.to(live.device), values.to(device=live.device, dtype=live.dtype))


def _set(live: Tensor, few: Few) -> None:
    if live.is_contiguous():
        live.view(-1).index_copy_(0, few.positions, few.values)
    else:
        live.index_put_(torch.unravel_index(few.positions, live.shape), few.values)


def _fits(staged: Tensor, live: Tensor) -> bool:
    return staged.shape == live.shape and staged.is_floating_point() == live.is_floating_point()


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _load(path: Path) -> dict[str, Tensor]:
    try:
        loaded: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise EngineFailure(f"weights {path.name} cannot be read: {error}") from error
    for tensor in loaded.values():
        _fault_in(tensor)
    return loaded


def _fault_in(tensor: Tensor) -> None:
    """Read one byte of every page. numpy sums without the interpreter lock: the decode thread goes on."""
    content = tensor.reshape(-1).view(torch.uint8).numpy()
    content[::PAGE_BYTES].sum(dtype=np.uint64)


class _Bytes:
    """Memory as numpy takes it for writable: torch would warn of each that is not. Nobody here writes."""

    def __init__(self, mapped: MappedWeights) -> None:
        self._memory = np.frombuffer(mapped.bytes(0, mapped.layout.file_bytes), np.uint8)
        address = self._memory.__array_interface__["data"][0]
        self.__array_interface__ = {**self._memory.__array_interface__, "data": (address, False)}


def _tensors(mapped: MappedWeights) -> dict[str, Tensor]:
    """View every tensor of a mapped file. The views keep its memory."""
    file = torch.from_numpy(np.asarray(_Bytes(mapped)))
    tensors = {}
    for spec in mapped.layout.specs:
        begin = mapped.layout.offset(spec.name)
        tensors[spec.name] = file[begin : begin + spec.nbytes].view(DTYPES[spec.dtype]).view(spec.shape)
    return tensors
