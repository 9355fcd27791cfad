"""What of the learner's parts decides why the train loop waits."""

from __future__ import annotations

from typing import Any

import pytest

from learner.idle import LearnerWaits, why_learner_waits
from tests.learners import make_desk


@pytest.mark.parametrize(
    ("servers", "cause"),
    [
        ({}, LearnerWaits.NO_SERVER),
        ({"north": {"live": None}}, LearnerWaits.WEIGHTS),
        ({"north": {"silent": True}}, LearnerWaits.NO_SERVER),
        ({"north": {"silent": True, "live": None}}, LearnerWaits.NO_SERVER),
        ({"north": {"draining": True}}, LearnerWaits.NO_SERVER),
        ({"north": {"silent": True}, "south": {"draining": True}}, LearnerWaits.NO_SERVER),
        ({"north": {"silent": True}, "south": {"live": None}}, LearnerWaits.WEIGHTS),
        ({"north": {"silent": True}, "south": {}}, LearnerWaits.DATA),
    ],
)
def test_a_server_that_is_silent_or_drains_is_none_that_weights_would_help(
    servers: dict[str, dict[str, Any]], cause: LearnerWaits
) -> None:
    desk = make_desk()
    for name, state in servers.items():
        server = desk.join(name, live=state.get("live", 0))
        server.draining = "draining" in state
        if "silent" in state:
            server.heard_s -= 0.75 * desk.fleet.liveness_s
    assert why_learner_waits(desk.coordinator.idle.situation()) is cause
