"""Few changed elements on their way into SGLang, without all the others.

    first load of a life:  map -> all weights from the file -> compare        (rollout_server/inside_sglang.py)
    later ones:            positions in published tensors -> positions in SGLang's -> a file for each of its processes
                           -> pause -> apply -> go on

The map comes from SGLang's own loader and is compared, element by element, with what that loader did before it is used.
Where there is none everything is loaded, and the log says once why. What travels to SGLang is one order: the name of a
private directory. The call that carries it takes pickles; the one that is sent is put together here from constants and
that name, and nothing that came from elsewhere is ever pickled or unpickled.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from protocol.logs import event
from protocol.weights.layout import MappedWeights
from rollout_server.engines.base import EngineFailure, Positions
from rollout_server.engines.changes import Changes
from rollout_server.engines.sglang.client import CallRefused, Client, ServerInfo
from rollout_server.inside_sglang import answer_file, changes_file

log = logging.getLogger(__name__)

LOADER = "rollout_server.inside_sglang.load"
DENSE_ABOVE = 0.05
"""Share of all elements. A version that changes more is loaded whole: a position takes 8 bytes beside its value, and
setting so many was seen to take as long as copying all (live_weights.DENSE_ABOVE)."""

T = TypeVar("T", bound="Answer")


class Box(msgspec.Struct, array_like=True, frozen=True):
    """Elements of a published tensor that SGLang copies as they are: see inside_sglang.Box."""

    tensor: str
    parameter: str
    begin: int
    place: int
    lengths: tuple[int, ...]
    strides: tuple[int, ...]
    steps: tuple[int, ...]


class Answer(msgspec.Struct, kw_only=True):
    """Of one of SGLang's processes."""

    failed: str = ""


class Mapped(Answer, kw_only=True):
    """Where a process has the model's weights."""

    boxes: list[Box] = []
    parameters: dict[str, tuple[int, str]] = {}
    """Name -> (elements, dtype in torch's words)."""


class NotSparse(Exception):
    """SGLang cannot be given few elements. The text says why."""


class SparseLoads:
    """Whether one life of SGLang takes few elements, and how.

    Args:
        client: of this life.
        info: of this life.
    """

    def __init__(self, client: Client, info: ServerInfo) -> None:
        self._client, self._info = client, info
        self._mapped: dict[int, Mapped] = {}
        """By process id; empty until the map is proven."""
        self.why_not = ""
        """Why everything is loaded; empty while nothing speaks against it."""
        if unfit := _unfit(info):
            self._give_up(unfit)

    @property
    def ready(self) -> bool:
        """Whether `apply` can be tried."""
        return bool(self._mapped) and not self.why_not

    async def load_all(self, directory: Path, version: str, *, flush_cache: bool) -> None:
        """Load all weights of a directory (`link_weights`); the first time, learn where SGLang puts them.

        Raises:
            EngineFailure: SGLang did not do it.
        """
        learned: dict[int, Mapped] = {}
        if not self._mapped and not self.why_not:
            with self._giving_up():
                learned = await self._order("map", directory, Mapped)
                await self._client.end_update()
        await self._client.update_weights(str(directory), version, flush_cache=flush_cache)
        if learned:
            with self._giving_up():
                await asyncio.to_thread(_check_covered, learned, directory)
                await self._order("compare", directory, Answer)
                await self._client.end_update()
                self._mapped = learned

    def stage(self, file: Path, changes: Changes, directory: Path) -> int:
        """Write, for each of SGLang's processes, what it is to set and where. Takes its time: not for the event loop.

        Args:
            file: of the version.
            changes: checked.
            directory: of `link_weights`.

        Returns:
            Bytes written.

        Raises:
            EngineFailure: they cannot be written.
        """
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import save_file

        try:
            with safe_open(file, framework="pt") as opened:
                few = {name: (where, _values(opened, name, where)) for name, where in changes.items() if len(where)}
            written = 0
            for pid, mapped in self._mapped.items():
                tensors, sizes = _placed(mapped, few)
                path = changes_file(directory, pid)
                path.touch(0o600)
                save_file(tensors, path, {"sizes": json.dumps(sizes)})
                written += path.stat().st_size
        except (OSError, SafetensorError) as error:
            raise EngineFailure(f"changes of {file.name} cannot be written for SGLang: {error}") from error
        return written

    async def apply(self, directory: Path, version: str, *, flush_cache: bool) -> bool:
        """Have every process set what was staged. False: one did not, and everything must be loaded.

        Raises:
            EngineFailure: SGLang did not do what it was told; what it holds is not known.
        """
        with self._giving_up():
            await self._order("apply", directory, Answer, weight_version=version, flush_cache=flush_cache)
            await self._client.end_update()
        return self.ready

    async def _order(self, what: str, directory: Path, kind: type[T], **update: Any) -> dict[int, T]:
        """Have all processes do something in an update that stays open; return their answers by process id.

        It is closed by whoever is content with the answers: SGLang then works on weights as after a load (it packs
        them for some CPUs, for instance), which those that no load came before may not bear.

        Raises:
            NotSparse: one has not done it.
            EngineFailure: SGLang has not passed it on.
        """
        await asyncio.to_thread(_forget_answers, directory, what)
        try:
            await self._client.begin_update()
        except CallRefused as refused:
            try:
                await self._client.end_update()  # who was here before may have left one open
            except CallRefused:
                raise refused from None
            await self._client.begin_update()
        text = json.dumps({"do": what, "directory": str(directory)})
        await self._client.update_from_tensor([pickled_order(text)] * self._info.tp_size, LOADER, **update)
        processes = self._info.tp_size * self._info.pp_size
        return await asyncio.to_thread(_read_answers, directory, what, kind, processes)

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        """Turn what speaks against few elements into a notice: from now on everything is loaded."""
        try:
            yield
        except (NotSparse, CallRefused) as error:
            self._give_up(str(error))

    def _give_up(self, why: str) -> None:
        self.why_not = why
        event(log, "engine_not_sparse", reason=why, text="every version is loaded whole")


def files_beside(directory: Path) -> list[Path]:
    """What orders have left in a directory."""
    patterns = [answer_file(directory, what, "*") for what in ("map", "compare", "apply")]
    return [path for pattern in [*patterns, changes_file(directory, "*")] for path in directory.glob(pattern.name)]


def pickled_order(text: str) -> bytes:
    """Pickle `[(text, torch.FloatTensor())]`, by hand: protocol 2, one global, which SGLang's own unpickler allows.

    The opcodes are those of pickletools: an empty list, a mark, the text, the class called with no arguments, a pair,
    appended.
    """
    name = text.encode()
    return b"\x80\x02](X" + len(name).to_bytes(4, "little") + name + b"ctorch\nFloatTensor\n)R\x86e."


def place(box: Box, positions: Positions) -> tuple[slice | NDArray[np.intp], Positions]:
    """Find which positions of a published tensor a box has, and where they are in the parameter.

    Args:
        box: of that tensor; its strides are those of a part of a contiguous tensor, in whatever order.
        positions: [n], ascending.

    Returns:
        (which of them, their positions in the parameter)
    """
    extent = sum((length - 1) * stride for length, stride in zip(box.lengths, box.strides, strict=True)) + 1
    low, high = np.searchsorted(positions, [box.begin, box.begin + extent]).tolist()
    rest = positions[low:high] - box.begin
    if box.strides == (1,) and box.steps == (1,):
        return slice(low, high), rest + box.place
    inside = np.ones(len(rest), bool)
    to = np.full(len(rest), box.place, np.int64)
    for stride, length, step in sorted(zip(box.strides, box.lengths, box.steps, strict=True), reverse=True):
        index, rest = np.divmod(rest, stride)
        inside &= index < length
        to += index * step
    inside &= rest == 0
    return np.flatnonzero(inside) + low, to[inside]


def _unfit(info: ServerInfo) -> str:
    if LOADER not in (info.custom_weight_loader or ()):
        return f"SGLang was started without --custom-weight-loader {LOADER}"
    if info.quantization or info.dp_size > 1 or info.speculative_algorithm:
        return "SGLang quantizes, has data parallelism or a draft model"
    return ""


def _check_covered(mapped: Mapping[int, Mapped], directory: Path) -> None:
    """See that every element of the file is somewhere in SGLang: what is not could not be changed.

    Raises:
        NotSparse: some are not.
    """
    boxes = {(box.tensor, box.begin, box.lengths, box.strides) for answer in mapped.values() for box in answer.boxes}
    found: defaultdict[str, int] = defaultdict(int)
    for tensor, _, lengths, _ in boxes:
        found[tensor] += math.prod(lengths)
    with MappedWeights.open(directory / "model.safetensors") as weights:
        for spec in weights.layout.specs:
            if found[spec.name] < math.prod(spec.shape):
                raise NotSparse(f"its loader does not copy all of {spec.name}")


def _forget_answers(directory: Path, what: str) -> None:
    for stale in directory.glob(answer_file(directory, what, "*").name):
        stale.unlink()


def _read_answers(directory: Path, what: str, kind: type[T], processes: int) -> dict[int, T]:
    """Read what every process has answered.

    Raises:
        NotSparse: one has not, or has failed.
    """
    answers = {}
    for file in directory.glob(answer_file(directory, what, "*").name):
        try:
            answer = msgspec.json.decode(file.read_bytes(), type=kind)
        except (OSError, msgspec.MsgspecError) as error:
            raise NotSparse(f"an answer to {what} that is none: {error}") from error
        if answer.failed:
            raise NotSparse(f"{what}: {answer.failed}")
        answers[int(file.stem.rpartition("-")[2])] = answer
    if len(answers) != processes:
        raise NotSparse(f"{len(answers)} of {processes} processes answered to {what}: they must see {directory}")
    return answers


def _values(opened: Any, name: str, where: Positions) -> Any:
    import torch

    return opened.get_tensor(name).reshape(-1).index_select(0, torch.from_numpy(np.ascontiguousarray(where)))


def _placed(mapped: Mapped, few: Mapping[str, tuple[Positions, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a process is to set: (tensors of its file, name -> (elements, dtype) of the parameters)."""
    import torch

    parts: defaultdict[str, list[tuple[Positions, Any]]] = defaultdict(list)
    for box in mapped.boxes:
        if box.tensor not in few:
            continue
        positions, values = few[box.tensor]
        which, to = place(box, positions)
        if len(to):
            chosen = values[which] if isinstance(which, slice) else values[torch.from_numpy(which)]
            parts[box.parameter].append((to, chosen))
    tensors = {}
    for name, pairs in parts.items():
        dtype = getattr(torch, mapped.parameters[name][1])
        tensors[f"positions {name}"] = torch.from_numpy(np.concatenate([to for to, _ in pairs]))
        tensors[f"values {name}"] = torch.cat([values for _, values in pairs]).to(dtype)
    return tensors, {name: mapped.parameters[name] for name in parts}
