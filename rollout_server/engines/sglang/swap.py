"""A new version on its way into SGLang: exchanged between two steps, then checked while sampling goes on."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from protocol.messages import Float32
from protocol.versions import Version
from protocol.waits import Waits
from rollout_server.engines.base import Canaries, EngineFailure, StagedWeights
from rollout_server.engines.sglang.answers import score_body, scores
from rollout_server.engines.sglang.check import Gate, Mismatch, compare
from rollout_server.engines.sglang.client import UPDATE_S, ServerInfo
from rollout_server.engines.sglang.life import Life
from rollout_server.engines.sglang.meter import Meter

UpdateMode = Literal["retract", "in_place", "drain"]


async def swap(
    life: Life,
    directory: Path,
    version: Version,
    mode: UpdateMode,
    *,
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
        meter: told of the pause.
        waits: where waiting for samples to end is shown.
        clock: monotonic seconds.

    Raises:
        EngineFailure: SGLang did not do it; what it holds is not known.
    """
    life.admission.close()
    if mode == "drain":
        await waits.wait(life.admission.idle.wait(), name="drain", owner="sglang", deadline_s=None)
    begun_s = clock()
    meter.pauses(True)
    life.standing = True
    try:
        if mode != "drain":
            await life.client.pause(mode)
        await life.client.update_weights(str(directory), str(version), flush_cache=mode != "in_place")
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
    mismatch = None
    if weights.canaries is not None:
        length = min(weights.canaries.tokens.shape[1], max_length - 1)
        mismatch = compare(weights.canaries.logprobs[:, : length - 1], await score(life, weights.canaries, length))
        gate.check_canaries(mismatch)
    gate.passed(weights.digest, checksum, mismatch)
    return named, mismatch


async def score(life: Life, canaries: Canaries, length: int) -> Float32:
    """[N, length - 1] the engine's logprobs of the canary tokens."""
    rows = [row[:length] for row in canaries.tokens]
    rids = [life.next_rid() for _ in rows]
    bodies = [score_body(row, rid=rid, cache_key=rid) for row, rid in zip(rows, rids, strict=True)]
    try:
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(life.client.generate(body, deadline_s=UPDATE_S)) for body in bodies]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return np.stack([scores(task.result(), row) for task, row in zip(asked, rows, strict=True)])


def gate_kind(info: ServerInfo) -> str:
    """Name of what engines must have in common for their checksums to be comparable."""
    parallel = f"tp{info.tp_size}-pp{info.pp_size}-dp{info.dp_size}"
    return "-".join(["sglang", info.version, info.device, info.dtype, info.quantization or "plain", parallel])


def link_weights(file: Path) -> Path:
    """Give the file a directory in which it is the only weights file, as SGLang wants it.

    Raises:
        EngineFailure: none can be made.
    """
    directory = file.with_suffix("")
    link = directory / "model.safetensors"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        if not link.is_symlink():
            os.symlink(f"../{file.name}", link)
    except OSError as error:
        raise EngineFailure(f"weights {file.name} cannot be given a directory for SGLang: {error}") from error
    return directory


def unlink_weights(file: Path) -> None:
    """Remove what `link_weights` made; what else is there stays."""
    directory = file.with_suffix("")
    with contextlib.suppress(OSError):
        (directory / "model.safetensors").unlink(missing_ok=True)
        directory.rmdir()
