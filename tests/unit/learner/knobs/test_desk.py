"""Turning a knob in a running learner: between two steps, on disk before it takes effect, one at a time."""

from __future__ import annotations

import asyncio
import stat
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from learner.journal import JournalError
from learner.journal_records import KnobRecord
from learner.knobs.command import knob
from learner.knobs.core import KnobRefused
from learner.knobs.desk import KnobDesk, knob_loop
from learner.knobs.socket import SOCKET_FILE, knob_socket
from protocol.errors import ConfigError
from tests.learners import Desk, make_desk, run


class Rate:
    """The trainer, as far as a knob reaches."""

    peak_learning_rate = 0.0


def make(**options: Any) -> tuple[Desk, Rate, KnobDesk]:
    desk, trainer = make_desk(**options), Rate()
    return desk, trainer, KnobDesk(desk.coordinator, trainer, desk.journal)


def turn(knobs: KnobDesk, name: str, value: float) -> KnobRecord:
    return run(knobs.turn(name, value, who="user", reason="why not"))


def test_a_change_is_in_the_journal_and_in_effect():
    desk, trainer, knobs = make(learning_rate=1e-5)
    assert trainer.peak_learning_rate == 1e-5
    turn(knobs, "learning_rate", 2e-6)
    turn(knobs, "depth", 1)
    assert (trainer.peak_learning_rate, desk.ledger.depth) == (2e-6, 1)
    records = [record for record in desk.journal.records if isinstance(record, KnobRecord)]
    assert [(record.name, record.old, record.value, record.reason) for record in records] == [
        ("learning_rate", 1e-5, 2e-6, "why not"), ("depth", 2, 1, "why not"),
    ]  # fmt: skip
    assert desk.coordinator.knobs.history == records


def test_concurrency_limits_what_each_server_is_leased_for_training():
    desk, _, knobs = make(num_generations=4, prompts_per_step=4, eval_rows=1)
    turn(knobs, "concurrency", 5)
    desk.join("north", room=100)
    desk.join("south", room=100)
    desk.pump()
    assert [len(desk.leases(name)) for name in ("north", "south")] == [1, 1]
    turn(knobs, "concurrency", 12)
    desk.pump()
    assert [len(desk.leases(name)) for name in ("north", "south")] == [2, 2]
    turn(knobs, "concurrency", 4)
    assert [server.training_samples for server in desk.fleet.servers.values()] == [12, 12], "nothing is called back"
    turn(knobs, "concurrency", 0)
    desk.pump()
    assert sum(len(desk.leases(name)) for name in ("north", "south")) == 6


def test_what_the_disk_refuses_does_not_happen():
    desk, trainer, knobs = make(learning_rate=1e-5)
    desk.journal.error = JournalError("no space")
    with pytest.raises(JournalError):
        turn(knobs, "learning_rate", 2e-6)
    assert trainer.peak_learning_rate == 1e-5
    assert not desk.coordinator.knobs.history


def test_a_knob_waits_for_the_step_that_is_being_applied():
    desk, trainer, knobs = make(learning_rate=1e-5)

    async def main() -> None:
        async with desk.coordinator.step_boundary:
            turning = asyncio.create_task(knobs.turn("learning_rate", 2e-6, who="controller", reason="auto"))
            for _ in range(10):
                await asyncio.sleep(0)
            assert trainer.peak_learning_rate == 1e-5
            assert not desk.journal.records
        await turning
        assert trainer.peak_learning_rate == 2e-6

    run(main())


def test_two_at_once_go_one_after_the_other():
    desk, _, knobs = make()

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            for depth in (1, 0, 2):
                tasks.create_task(knobs.turn("depth", depth, who="user"))

    run(main())
    history = desk.coordinator.knobs.history
    assert [(record.number, record.old, record.value) for record in history] == [(1, 2, 1), (2, 1, 0), (3, 0, 2)]


async def command(run_dir: Path, *argv: str) -> int:
    return await asyncio.to_thread(knob, [str(run_dir), *argv], prog="headway-learner knob")


async def serve(run_dir: Path, knobs: KnobDesk, *commands: tuple[str, ...]) -> list[int]:
    """Run commands at once against a learner that is there."""
    (run_dir / "config.json").write_text("{}")
    with knob_socket(run_dir) as listener:
        loop = asyncio.create_task(knob_loop(listener, knobs))
        try:
            return list(await asyncio.gather(*(command(run_dir, *argv) for argv in commands)))
        finally:
            loop.cancel()


def test_the_command_turns_a_knob_and_lists_them(tmp_path, capsys):
    desk, _, knobs = make(learning_rate=1e-5)
    assert run(serve(tmp_path, knobs, ("depth", "1", "--reason", "servers are slow"))) == [0]
    assert capsys.readouterr().out == "depth: 2 -> 1, from step 1 on\n"
    assert desk.ledger.depth == 1
    run(serve(tmp_path, knobs, ()))
    listed = capsys.readouterr().out
    assert "step 0; 0 of 4 slots in use" in listed
    assert "depth          1           allowed: 0 to 2 (S = 2 of max_staleness 2)  (configured: 2)" in listed
    assert "learning_rate  1e-05       allowed: 1e-12 to 1\n" in listed
    assert "#1  step 0  depth 2 -> 1  user  servers are slow" in listed


def test_a_lower_depth_says_what_it_waits_for(tmp_path, capsys):
    desk, _, knobs = make()
    desk.join("north", room=100)
    desk.pump()
    run(serve(tmp_path, knobs, ("depth", "0")))
    assert "6 slots are in use, nothing new begins until fewer than 2 are" in capsys.readouterr().out


def test_commands_at_once_are_all_done(tmp_path):
    desk, _, knobs = make()
    asked = [("depth", str(depth)) for depth in (0, 1, 2, 0, 1, 2)]
    assert run(serve(tmp_path, knobs, *asked)) == [0] * 6
    history = desk.coordinator.knobs.history
    assert sorted(record.value for record in history) == [0, 0, 1, 1, 2, 2]
    assert all(later.old == earlier.value for earlier, later in pairwise(history))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("depth", "3"), r"depth 3 is refused: allowed is 0 to 2 \(S = 2 of max_staleness 2\); now it is 2"),
        (("depth", "-1"), "depth -1 is refused"),
        (("speed", "3"), "there is no knob 'speed': allowed are depth, concurrency, learning_rate"),
        (("depth", "two"), "depth 'two': the value of a knob is a number"),
        (("depth", "nan"), "depth 'nan': the value of a knob is a number"),
        (("learning_rate", "inf"), "learning_rate 'inf': the value of a knob is a number"),
        (("depth", "-inf"), "depth '-inf': the value of a knob is a number"),
        (("depth",), "depth '': the value of a knob is a number"),
        (("depth", "1", "extra"), "extra"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(argv, said, tmp_path):
    desk, _, knobs = make()
    with pytest.raises(ConfigError, match=said):
        run(serve(tmp_path, knobs, argv))
    assert (desk.ledger.depth, desk.journal.records) == (2, [])


def test_the_socket_is_the_users_own_and_goes_with_the_run(tmp_path):
    with knob_socket(tmp_path):
        assert stat.S_IMODE((tmp_path / SOCKET_FILE).stat().st_mode) == 0o600
    assert not (tmp_path / SOCKET_FILE).exists()


def test_a_run_directory_with_a_long_name_has_knobs_too(tmp_path):
    deep = tmp_path / ("d" * 120) / "run"
    deep.mkdir(parents=True)
    desk, _, knobs = make()
    assert run(serve(deep, knobs, ("depth", "1"))) == [0]
    assert desk.ledger.depth == 1


def test_without_a_learner_there_is_one_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="is no run directory"):
        knob([str(tmp_path)], prog="knob")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "learner.lock").write_text("pid 7 on node-3\n")
    with pytest.raises(ConfigError, match=r"no learner is training in .* \(the last one was pid 7 on node-3\)"):
        knob([str(tmp_path), "depth", "1"], prog="knob")
    with knob_socket(tmp_path):
        left_behind = (tmp_path / SOCKET_FILE).rename(tmp_path / "dead")
    left_behind.rename(tmp_path / SOCKET_FILE)  # of a learner that was killed
    with pytest.raises(ConfigError, match="no learner is training in"):
        knob([str(tmp_path), "depth", "1"], prog="knob")
    with knob_socket(tmp_path):
        pass  # the next learner takes its place


def test_the_desk_refuses_a_controller_as_it_does_a_user():
    _, _, knobs = make(max_staleness=3, weight_sync_steps=3)
    with pytest.raises(KnobRefused, match="below 2, weight_sync_steps 3 would deadlock"):
        run(knobs.turn("depth", 1, who="controller", reason="auto: idle"))
