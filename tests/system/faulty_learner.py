"""headway-learner with faults: `python -m tests.system.faulty_learner FAULTS.json train --config ...`.

Patches the shipped code at named places, then runs the shipped command. Faults, as keys of the JSON file:

    witness             file to which every fault that happens appends a line (die_at writes before it dies)
    corrupt_chunks      of the first so many weight chunks a byte is flipped
    truncate_chunks     of so many after those the second half is missing
    poison_loss         forward_backward calls (from 1) whose loss is NaN
    poison_gradient     forward_backward calls whose loss is finite and whose gradient is not
    file_limit          no file may grow beyond so many bytes, as on a disk that is full
    die_at              SIGKILL itself at this moment: "groups_journaled:N" (on disk, not acknowledged, the N-th time),
                        "forward_backward:STEP", "step_journaled:STEP" or "checkpoint:STEP:FAILPOINT"
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Witness = Callable[[str], None]


def main() -> None:
    """Patch, then run the command line behind the fault file."""
    faults = json.loads(Path(sys.argv.pop(1)).read_text("utf-8"))
    witness_file = Path(faults["witness"])

    def witness(line: str) -> None:
        with witness_file.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    if "corrupt_chunks" in faults:
        damage_chunks(faults["corrupt_chunks"], faults["truncate_chunks"], witness)
    if "poison_loss" in faults or "poison_gradient" in faults:
        poison(faults.get("poison_loss", []), faults.get("poison_gradient", []), witness)
    if "file_limit" in faults:
        resource.setrlimit(resource.RLIMIT_FSIZE, (faults["file_limit"], resource.RLIM_INFINITY))
    if "die_at" in faults:
        die_at(*faults["die_at"].split(":"), witness=witness)

    from learner.__main__ import main as learner_main

    learner_main()


def damage_chunks(corrupt: int, truncate: int, witness: Witness) -> None:
    """Send some chunks of weights with a wrong byte, and some that are too short."""
    from protocol.messages import UInt8
    from protocol.weights.parking import Parked
    from protocol.weights.serving import WeightsServer

    send = WeightsServer._send
    todo = ["corrupted"] * corrupt + ["truncated"] * truncate

    def damaged_send(self: WeightsServer, to: Parked, data: UInt8 | None) -> bool:
        if todo and data is not None and data.size:
            how = todo.pop(0)
            wrong = np.array(data)
            wrong[len(wrong) // 2] ^= 0xFF
            data = wrong if how == "corrupted" else wrong[: len(wrong) // 2]
            witness(f"{how} {to.version} {to.offset}")
        return send(self, to, data)

    WeightsServer._send = damaged_send  # type: ignore[method-assign]


def poison(loss_calls: list[int], gradient_calls: list[int], witness: Witness) -> None:
    """Make the loss, or only the gradient, of some calls not finite."""
    import learner.objective as objective
    import learner.trainer as trainer

    calls = witnessed = 0
    forward_backward, grpo_loss = trainer.Trainer.forward_backward, objective.grpo_loss

    def counted(self: trainer.Trainer, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward_backward(self, batch)

    def once(line: str) -> None:
        """The loss is evaluated in several pieces."""
        nonlocal witnessed
        if witnessed < calls:
            witnessed = calls
            witness(line)

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        result = grpo_loss(*args, **kwargs)
        if calls in loss_calls:
            once(f"poisoned the loss of call {calls}")
            return result._replace(loss=result.loss * float("nan"))
        if calls in gradient_calls and result.loss.requires_grad:
            once(f"poisoned the gradient of call {calls}")
            result.loss.register_hook(lambda gradient: gradient * float("inf"))
        return result

    trainer.Trainer.forward_backward = counted  # type: ignore[method-assign]
    objective.grpo_loss = poisoned


def die_at(moment: str, number: str, failpoint: str = "", *, witness: Witness) -> None:
    """Arrange for a SIGKILL, which leaves no time for anything, at a moment that a test could not hit from outside."""
    count = int(number)

    def die() -> None:
        witness(f"died at {moment} {count} {failpoint}".rstrip())
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "forward_backward":
        die_in_forward_backward(count, die)
    elif moment == "checkpoint":
        die_in_checkpoint(count, failpoint, die)
    else:
        die_after_append(moment, count, die)


def die_in_forward_backward(step: int, die: Callable[[], None]) -> None:
    """With the gradients computed and nothing applied."""
    from learner.trainer import Trainer

    forward_backward = Trainer.forward_backward

    def wrapped(self: Trainer, batch: Any) -> Any:
        result = forward_backward(self, batch)
        if batch.step == step:
            die()
        return result

    Trainer.forward_backward = wrapped  # type: ignore[method-assign]


def die_in_checkpoint(step: int, failpoint: str, die: Callable[[], None]) -> None:
    """Inside a save."""
    import learner.recorder as recorder
    from learner.checkpoint import FAILPOINTS, save_checkpoint

    assert failpoint in FAILPOINTS

    def reached(point: str) -> None:
        if point == failpoint:
            die()

    def wrapped(directory: Path, policy_version: int, *args: Any, **kwargs: Any) -> Path:
        extra = {"reached": reached} if policy_version == step else {}
        return save_checkpoint(directory, policy_version, *args, **kwargs, **extra)

    recorder.save_checkpoint = wrapped


def die_after_append(moment: str, count: int, die: Callable[[], None]) -> None:
    """With records on disk that nobody has acted on yet."""
    from learner.journal import Journal
    from learner.journal_records import GroupRecord, StepRecord

    append = Journal.append
    appends = 0

    async def wrapped(self: Journal, *records: Any) -> None:
        nonlocal appends
        await append(self, *records)
        appends += any(isinstance(record, GroupRecord) for record in records)
        if moment == "groups_journaled" and appends == count:
            die()
        if moment == "step_journaled" and any(isinstance(r, StepRecord) and r.step == count for r in records):
            die()

    Journal.append = wrapped  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
