"""A new version on its way into SGLang: exchanged between two steps, then checked while sampling goes on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from protocol.logs import event
from protocol.messages import Float32
from protocol.versions import Version
from protocol.waits import Waits
from protocol.weights.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from protocol.weights.staging import links_directory
from rollout_server.engines.base import Canaries, EngineFailure, SamplesWithheld, StagedWeights
from rollout_server.engines.sglang.answers import score_body, scores
from rollout_server.engines.sglang.check import Gate, Mismatch, WeightsSuspect, compare
from rollout_server.engines.sglang.client import UPDATE_S, ServerInfo
from rollout_server.engines.sglang.life import Life
from rollout_server.engines.sglang.meter import Meter
from rollout_server.engines.sglang.sparse import files_beside

log = logging.getLogger(__name__)

UpdateMode = Literal["retract", "in_place", "drain"]


async def swap(
    life: Life,
    directory: Path,
    version: Version,
    mode: UpdateMode,
    *,
    few: bool,
    meter: Meter,
    waits: Waits,
    clock: Callable[[], float],
) -> float:
    """Exchange the weights, and return for how many seconds nothing was sampled. No request ends by it.

    retract: running samples lose their keys and values and get new ones of the new weights. in_place: they keep them.
    drain: they end first, and others wait here.

    Args:
        life: of SGLang.
        directory: of `link_weights`.
        version: in it.
        mode: what becomes of running samples.
        few: only what was staged for it beside, where SGLang takes that; else all weights.
        meter: told of the pause.
        waits: where waiting for samples to end is shown.
        clock: monotonic seconds.

    Raises:
        EngineFailure: SGLang did not do it; what it holds is not known.
    """
    assert life.sparse is not None
    life.admission.close()
    if mode == "drain":
        await waits.wait(life.admission.idle.wait(), name="drain", owner="sglang", deadline_s=None)
    begun_s = clock()
    meter.pauses(True)
    life.standing = True
    try:
        if mode != "drain":
            await life.client.pause(mode)
        flush_cache = mode != "in_place"
        if not (few and await life.sparse.apply(directory, str(version), flush_cache=flush_cache)):
            await life.sparse.load_all(directory, str(version), flush_cache=flush_cache)
        life.put_back += mode == "retract"
        life.sampling = version
        if mode != "drain":
            await life.client.resume()
    finally:
        life.standing = False
        meter.pauses(False)
    life.admission.open()
    return clock() - begun_s


async def check(
    life: Life, weights: StagedWeights, gate: Gate, *, exact: bool, max_length: int
) -> tuple[str, Mismatch | None]:
    """See that SGLang holds the version: its bytes, and what they say of the canaries.

    Args:
        life: of SGLang, sampling with the version.
        weights: the version.
        gate: what it is measured by.
        exact: whether SGLang keeps weights in the dtype they came in.
        max_length: tokens SGLang takes in all.

    Returns:
        (`kind:checksum`, how learner and engine differ; None without canaries)

    Raises:
        WeightsSuspect: it does not hold the version.
        EngineFailure: SGLang does not answer.
    """
    checksum = await life.client.checksum()
    named = gate.check_bytes(weights.digest, checksum, weights.checksums, exact=exact)
    mismatch = await check_canaries(life, weights, gate, max_length=max_length)
    gate.passed(weights.digest, checksum, mismatch)
    return named, mismatch


async def check_adapter(
    life: Life, weights: StagedWeights, gate: Gate, *, max_length: int
) -> tuple[str, Mismatch | None]:
    """See that SGLang has loaded the adapter, before anything is sampled with it; see `check`.

    The checksum is of the base model, which no adapter changes: it is looked at once in a life.
    """
    adapters, adapter = life.adapters, weights.adapter
    assert adapters is not None
    assert adapter is not None
    if not adapters.base_checksum:
        checksum = await life.client.checksum()
        adapters.base_checksum = gate.check_bytes(adapter.base_digest, checksum, weights.checksums, exact=False)
        gate.passed(adapter.base_digest, checksum, None)
    name = adapters.name(weights.version)
    mismatch = await check_canaries(life, weights, gate, max_length=max_length, lora_path=name)
    gate.measured(mismatch)
    return adapters.base_checksum, mismatch


async def check_canaries(
    life: Life, weights: StagedWeights, gate: Gate, *, max_length: int, **under: str
) -> Mismatch | None:
    """Compare what the version says of the canaries with what the learner does; None without canaries.

    Args:
        life: of SGLang.
        weights: the version.
        gate: what it is measured by.
        max_length: tokens SGLang takes in all.
        under: what the requests say beside.

    Raises:
        WeightsSuspect: they differ too much.
        EngineFailure: SGLang does not answer.
    """
    if weights.canaries is None:
        return None
    length = min(weights.canaries.tokens.shape[1], max_length - 1)
    scored = await score(life, weights.canaries, length, under)
    mismatch = compare(weights.canaries.logprobs[:, : length - 1], scored)
    gate.check_canaries(mismatch)
    return mismatch


async def score(life: Life, canaries: Canaries, length: int, under: dict[str, str]) -> Float32:
    """[N, length - 1] the engine's logprobs of the canary tokens."""
    rows = [row[:length] for row in canaries.tokens]
    rids = [life.next_rid() for _ in rows]
    bodies = [score_body(row, rid=rid, cache_key=rid) | under for row, rid in zip(rows, rids, strict=True)]
    try:
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(life.client.generate(body, deadline_s=UPDATE_S)) for body in bodies]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return np.stack([scores(task.result(), row) for task, row in zip(asked, rows, strict=True)])


@contextlib.contextmanager
def condemning(life: Life, version: Version, *, but: type[EngineFailure] | None = None) -> Iterator[None]:
    """End the life by whatever goes wrong while a version comes in (but by one kind of failure).

    Raises:
        SamplesWithheld: the version has failed its check.
    """
    try:
        yield
    except WeightsSuspect as suspect:
        failure = SamplesWithheld(f"weights {version} failed their check in SGLang: {suspect}")
        event(log, "weights_suspect", level=logging.ERROR, version=version, reason=suspect)
        life.condemn(failure)
        raise failure from suspect
    except BaseException as error:  # also a cancellation: SGLang stands still, or holds nobody knows what
        if but is None or not isinstance(error, but):
            why = (
                "it was called off" if isinstance(error, asyncio.CancelledError) else str(error) or type(error).__name__
            )
            life.condemn(SamplesWithheld(f"the swap to weights {version} failed: {why}"))
        raise


def gate_kind(info: ServerInfo) -> str:
    """Name of what engines must have in common for their checksums to be comparable."""
    parallel = f"tp{info.tp_size}-pp{info.pp_size}-dp{info.dp_size}"
    return "-".join(["sglang", info.version, info.device, info.dtype, info.quantization or "plain", parallel])


def link_weights(file: Path) -> Path:
    """Give the file a directory in which it is the only weights file, as SGLang wants it.

    Raises:
        EngineFailure: none can be made.
    """
    directory = links_directory(file)
    link = directory / "model.safetensors"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        if not link.is_symlink():
            os.symlink(f"../{file.name}", link)
    except OSError as error:
        raise EngineFailure(f"weights {file.name} cannot be given a directory for SGLang: {error}") from error
    return directory


def unlink_weights(file: Path) -> None:
    """Remove what `link_weights` made, `adapters.write_adapter` and `SparseLoads`; what else is there stays."""
    directory = links_directory(file)
    with contextlib.suppress(OSError):
        for name in ("model.safetensors", ADAPTER_WEIGHTS, ADAPTER_CONFIG):
            (directory / name).unlink(missing_ok=True)
        for path in files_beside(directory):
            path.unlink(missing_ok=True)
        directory.rmdir()
