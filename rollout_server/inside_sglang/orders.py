"""What SGLang's schedulers are ordered to do. See the package.

    map      where SGLang puts what it loads: its own loader runs, and every copy into a parameter is noted, not made
    compare  whether the parameters hold, through that map, exactly what the version's file says
    apply    set elements of parameters, all of them checked before the first

The map is not a list of models: whatever a model's `load_weights` fuses, shards, ties or repeats is seen as it does so.
What it computes from weights instead of copying them cannot be mapped; that is said, and everything is loaded then.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rollout_server.inside_sglang import answer_file, changes_file

Box = tuple[str, str, int, int, list[int], list[int], list[int]]
"""A rectangle of elements that is copied as it is: (published name, parameter, offset in the one, offset in the other,
lengths, strides in the one, strides in the other), in elements of the flat tensors."""

FILLS = frozenset({torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor, torch.ops.aten.zero_.default})
"""Padding: what they write is not of the file."""


class Unmapped(Exception):
    """The model's loader does more than to copy. The text says what."""


def map_model(model: Any, directory: Path) -> dict[str, Any]:
    """Note where the model's own loader would put every element of the file. Nothing is changed."""
    targets = _tensors_of(model)
    before = {name: _where(tensor) for name, tensor in targets.items()}
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        sources = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    with Noting(sources, targets) as noting:
        model.load_weights(iter(sources.items()))
        for module in model.modules():  # SGLang does so at the end of each update
            if hasattr(module, "quant_method") and hasattr(module.quant_method, "process_weights_after_loading"):
                module.quant_method.process_weights_after_loading(module)
    if noting.unmapped:
        raise Unmapped(noting.unmapped)  # in case somebody has caught the first one
    if {name: _where(tensor) for name, tensor in _tensors_of(model).items()} != before:
        raise Unmapped("its loader exchanges parameters for others")
    used = sorted({box[1] for box in noting.boxes})
    return {
        "boxes": noting.boxes,
        "parameters": {name: [targets[name].numel(), _dtype(targets[name])] for name in used},
    }


def compare_model(model: Any, directory: Path) -> dict[str, Any]:
    """Compare every mapped element with the file's."""
    boxes: list[Box] = json.loads(answer_file(directory, "map", os.getpid()).read_text("utf-8"))["boxes"]
    targets = _tensors_of(model)
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        for name, parameter, begin, place, lengths, strides, steps in boxes:
            source, target = file.get_tensor(name), targets[parameter]
            wanted = source.as_strided(lengths, strides, source.storage_offset() + begin).to(target.dtype)
            held = target.as_strided(lengths, steps, target.storage_offset() + place)
            if not torch.equal(held.cpu(), wanted):
                raise Unmapped(f"{parameter} does not hold {name} where its loader puts it")
    return {"compared": len(boxes)}


def apply_changes(model: Any, directory: Path) -> dict[str, Any]:
    """Set the elements that the process's file of changes names."""
    targets = _tensors_of(model)
    few: list[tuple[Tensor, Tensor, Tensor]] = []
    path = changes_file(directory, os.getpid())
    with safe_open(path, framework="pt") as file:
        sizes = json.loads(file.metadata()["sizes"])
        for name, (size, dtype) in sizes.items():
            target = targets[name]
            if (target.numel(), _dtype(target), target.is_contiguous()) != (size, dtype, True):
                raise Unmapped(f"{name} is not what it was: {size} elements of {dtype}")
            positions, values = file.get_tensor(f"positions {name}"), file.get_tensor(f"values {name}")
            few.append((target.view(-1), positions.to(target.device), values.to(target.device)))
    for target, positions, values in few:
        target.index_copy_(0, positions, values)
    if any(target.is_cuda for target, _, _ in few):
        torch.cuda.synchronize()  # the file goes
    return {"elements": sum(len(positions) for _, positions, _ in few)}


ORDERS = {"map": map_model, "compare": compare_model, "apply": apply_changes}


class Noting(TorchDispatchMode):
    """Notes copies from sources into targets instead of making them; gives up when either is used otherwise.

    Args:
        sources: contiguous tensors of the file.
        targets: the model's.
    """

    def __init__(self, sources: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.boxes: list[Box] = []
        self.unmapped = ""
        self._sources, self._targets = Owners(sources), Owners(targets)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let pass what only looks at tensors from another side."""
        if func is torch.ops.aten.copy_.default and self._targets.owner(args[0]):
            self._note(args[0], args[1])
            return args[0]
        if func in FILLS and self._targets.owner(args[0]):
            return args[0]
        if not _is_view(func):
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and (owner := self._sources.owner(leaf) or self._targets.owner(leaf)):
                    self._give_up(f"its loader does {func} with {owner}")
        return func(*args, **(kwargs or {}))

    def _note(self, target: Tensor, source: Tensor) -> None:
        to, of = self._targets.owner(target), self._sources.owner(source)
        if not of:
            self._give_up(f"its loader computes what it copies into {to}")
        if target.shape != source.shape:
            self._give_up(f"its loader repeats {of} over {to}")
        begin, place = self._sources.offset(source), self._targets.offset(target)
        lengths, strides, steps = _collapse(target.shape, source.stride(), target.stride())
        self.boxes.append((of, to, begin, place, lengths, strides, steps))

    def _give_up(self, why: str) -> None:
        self.unmapped = self.unmapped or why
        raise Unmapped(why)


class Owners:
    """Tells of which tensor a view is, by the memory it is in."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._in_storage: dict[int, list[tuple[int, int, str]]] = {}
        for name, tensor in tensors.items():
            begin = int(tensor.storage_offset())
            ranges = self._in_storage.setdefault(_storage(tensor), [])
            ranges.append((begin * tensor.itemsize, (begin + tensor.numel()) * tensor.itemsize, name))

    def owner(self, view: Tensor) -> str:
        """Its name; empty when it is none of them."""
        return self._find(view)[1]

    def offset(self, view: Tensor) -> int:
        """Where the view begins in it, in elements."""
        return int(view.storage_offset()) - self._find(view)[0] // view.itemsize

    def _find(self, view: Tensor) -> tuple[int, str]:
        at = int(view.storage_offset()) * view.itemsize
        for begin, end, name in self._in_storage.get(_storage(view), ()):
            if begin <= at < end:
                return begin, name
        return 0, ""


def _tensors_of(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers by name, each once; those that are not contiguous could not be written flat."""
    tensors = {name: parameter.data for name, parameter in model.named_parameters()}
    tensors |= dict(model.named_buffers())
    return {name: tensor for name, tensor in tensors.items() if tensor.is_contiguous()}


def _collapse(lengths: Any, strides: Any, steps: Any) -> tuple[list[int], list[int], list[int]]:
    """Join neighboring dimensions that lie one behind the other on both sides; leave out those of length 1."""
    joined: list[tuple[int, int, int]] = []
    for length, stride, step in zip(lengths, strides, steps, strict=True):
        if length == 1:
            continue
        if joined and joined[-1][1] == length * stride and joined[-1][2] == length * step:
            joined[-1] = (joined[-1][0] * length, stride, step)
        else:
            joined.append((length, stride, step))
    joined = joined or [(1, 1, 1)]
    return [j[0] for j in joined], [j[1] for j in joined], [j[2] for j in joined]


def _is_view(func: Any) -> bool:
    return any(
        returned.alias_info is not None and not returned.alias_info.is_write for returned in func._schema.returns
    )


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _where(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
