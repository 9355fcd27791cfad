"""The controller at the knob: reads the row of every step, turns the depth, says why and what came of it."""

from __future__ import annotations

import asyncio
import logging
from typing import Literal, Protocol

from learner.coordinator import Coordinator
from learner.journal_records import KnobRecord
from learner.knobs.core import Knob
from learner.recorder import Recorder
from learner.tuning.controller import DepthController, observe
from protocol.logs import event
from protocol.waits import Waits

log = logging.getLogger(__name__)

ROWS_WAITING = 64
"""A turn waits for the end of a step, so one or two."""


class Desk(Protocol):
    """Where knobs are turned."""

    async def turn(
        self, name: str, value: float, *, who: Literal["user", "controller"], reason: str = ""
    ) -> KnobRecord:
        """Change a knob between two steps; return when it has taken effect."""


async def steer_loop(recorder: Recorder, coordinator: Coordinator, desk: Desk, waits: Waits) -> None:
    """Move the depth by what the steps show (staleness_control auto), from where it is.

    consumes: the row of every step      waits for: the next one; the end of a step      unblocked by: train_loop
    produces: turns of the knob `depth`, each with its reason; what came of them, in the log
    """
    ledger, knobs = coordinator.ledger, coordinator.knobs
    rows = recorder.steered = asyncio.Queue(ROWS_WAITING)
    controller = DepthController(
        depth=knobs.depth, lowest=ledger.bounds.lowest_depth, highest=ledger.bounds.steps_ahead
    )
    while True:
        row = await waits.wait(rows.get(), name="step", owner="train_loop", deadline_s=None)
        if row["skipped"]:
            continue
        seen, before = observe(row), controller.effect
        if knobs.depth != controller.depth:  # a person has turned it
            controller.turned(knobs.depth, seen.step)
        move = controller.decide(seen)
        if controller.effect != before:
            event(log, "depth_effect", step=seen.step, effect=controller.effect)
        if move is not None:
            await desk.turn(Knob.DEPTH, move.new, who="controller", reason=move.reason)
