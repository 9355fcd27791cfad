"""Turning a knob in a running learner.

    headway-learner knob RUN_DIR depth 2 --> socket of the run directory --> knob_loop --> KnobDesk.turn
    a controller of the learner's own ---------------------------------------------------------'

A change takes effect between two steps: never between what the journal says of a step and what is applied. It is on
disk before it takes effect, so that a continued run, and a replay, find it at its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import Literal, Protocol

import msgspec

from learner.coordinator import Coordinator
from learner.journal_records import KnobRecord, Record
from learner.knobs.core import KnobRefused
from learner.knobs.socket import Answer, Request, Shown, receive, send
from protocol.logs import event

log = logging.getLogger(__name__)

PATIENCE_S = 5.0
"""For a request to be sent and an answer to be taken: one at a time, so nobody may hold up the others."""


class Rated(Protocol):
    """The trainer, as far as a knob reaches into it."""

    peak_learning_rate: float


class KnobJournal(Protocol):
    """What a change needs of the journal."""

    async def append(self, *records: Record) -> None:
        """Return when the records are on disk."""


class KnobDesk:
    """See the module's text. On the event loop."""

    def __init__(self, coordinator: Coordinator, trainer: Rated, journal: KnobJournal) -> None:
        self._coordinator, self._trainer, self._journal = coordinator, trainer, journal
        trainer.peak_learning_rate = coordinator.knobs.learning_rate

    async def turn(
        self, name: str, value: float, *, who: Literal["user", "controller"], reason: str = ""
    ) -> KnobRecord:
        """Change a knob before or after a step; return when it has taken effect. Not from inside a step.

        Raises:
            KnobRefused: no such knob, or outside its range.
            JournalError: the disk refused; nothing has changed.
        """
        coordinator = self._coordinator
        async with coordinator.step_boundary:
            record = coordinator.knobs.change(
                name, value, who=who, reason=reason, step=coordinator.ledger.policy_version,
                incarnation=coordinator.identity.incarnation,
            )  # fmt: skip
            await self._journal.append(record)
            coordinator.knobs.turned(record)
            coordinator.ledger.limit_depth(coordinator.knobs.depth)
            self._trainer.peak_learning_rate = coordinator.knobs.learning_rate
        fields = {name: value for name, value in msgspec.structs.asdict(record).items() if name != "name"}
        event(log, "knob", knob=record.name, **fields)
        coordinator.notices.append(f"{record.who}: {describe(record)}")
        coordinator.changed.notify()  # more room, or more slots
        return record

    async def answer(self, request: Request) -> Answer:
        """Do what a command asks for, and say what the knobs are then."""
        changed, refused = None, ""
        if request.name:
            try:
                changed = await self.turn(request.name, request.value, who="user", reason=request.reason)
            except KnobRefused as error:
                refused = str(error)
        ledger, knobs = self._coordinator.ledger, self._coordinator.knobs
        shown = [
            Shown(name=knob, value=knobs[knob], configured=allowed.configured, allowed=str(allowed))
            for knob, allowed in knobs.ranges.items()
        ]
        return Answer(
            refused=refused, changed=changed, step=ledger.policy_version, slots_in_use=ledger.slots_in_use,
            slots_allowed=ledger.slots_allowed, knobs=shown, history=knobs.history,
        )  # fmt: skip


async def knob_loop(listener: socket.socket, desk: KnobDesk) -> None:
    """Answer one command after another.

    consumes: requests      waits for: somebody at the socket; the end of a step      unblocked by: the command
    produces: changed knobs, answers
    """
    loop = asyncio.get_running_loop()
    while True:
        connection, _ = await loop.sock_accept(listener)
        with connection, contextlib.suppress(OSError, TimeoutError, msgspec.DecodeError):  # whoever asked has gone
            async with asyncio.timeout(PATIENCE_S):
                request = await receive(loop, connection)
            answer = await desk.answer(request)
            async with asyncio.timeout(PATIENCE_S):
                await send(loop, connection, answer)


def describe(record: KnobRecord) -> str:
    """Say a change in a line."""
    reason = f": {record.reason}" if record.reason else ""
    return f"{record.name} {record.old:g} -> {record.value:g} at step {record.step}{reason}"
