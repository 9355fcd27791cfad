"""Learner and servers with keys over tcp: who is known trains, who is not is told of, and joins when it is added."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from learner.demo.pair import free_port_pair
from tests.keyrings import Keyring
from tests.system.harness import END_S, RUN_S, START_S, Lab, Process

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]
TOLD_S = 5.0
STEPS = 60
SLOW = {"token_s": 0.15}


@dataclass
class Keyed:
    """The run, when it is over."""

    lab: Lab
    ring: Keyring
    learner: Process
    servers: dict[str, Process]
    command_lines: str
    """Of all processes, while they ran."""


@pytest.fixture(scope="module")
def keyed(module_lab: Lab) -> Keyed:
    """One known server trains a step; an unknown one waits, is added, and both see the run's end."""
    lab, ring = module_lab, Keyring(module_lab.directory)
    for name in ("known", "late", "thief"):
        ring.make(name)
    ring.allow("known", "thief")
    address = f"tcp://127.0.0.1:{free_port_pair()}"
    learner = lab.learner(
        bind=address, key=str(ring.directory / "learner.key"), allowed_keys=str(ring.allowed), max_steps=STEPS
    )

    def server(name: str, called: str = "", **changes: object) -> Process:
        keys = {"key": str(ring.directory / f"{name}.key"), "learner_key": str(ring.directory / "learner.pub")}
        return lab.server(called or name, learner=address, **keys, **changes)

    known = server("known", scripted=SLOW)
    lab.wait_step(1, alive=[learner, known])
    thief = server("thief", called="known", log_file=str(lab.directory / "thief.log"))
    late = server("late")
    ready = lab.wait_until(lambda: late.events("waiting_for_learner"), START_S, "the late server", alive=[late])
    assert ready
    lab.wait_until(lambda: late.events("handshake_failed"), TOLD_S, "the server to say it is unknown", alive=[late])
    lab.wait_until(lambda: lab.run.events("key_refused"), TOLD_S, "the learner to say the same", alive=[learner])
    assert not [event for event in lab.run.events("server_joined") if event["server"] == "late"]
    command_lines = "".join(Path(f"/proc/{p.pid}/cmdline").read_text() for p in (learner, known, late))
    ring.allow("known", "thief", "late")
    lab.wait_until(
        lambda: [event for event in lab.run.events("server_joined") if event["server"] == "late"],
        3 * TOLD_S, "the late server to join", alive=[learner, late],
    )  # fmt: skip
    thief.wait_exit(START_S)
    known.signal(signal.SIGTERM)
    assert known.wait_exit(END_S) == 0
    assert learner.wait_exit(RUN_S) == 0, learner.tail()
    assert late.wait_exit(END_S) == 0
    return Keyed(lab, ring, learner, {"known": known, "late": late, "thief": thief}, command_lines)


def test_the_run_ends_and_loses_nothing(keyed: Keyed) -> None:
    summary = keyed.lab.run.summary()
    assert (summary["steps"], summary["groups_unaccounted"], summary["groups_quarantined"]) == (STEPS, 0, 0)
    assert "Traceback" not in "".join(process.text() for process in keyed.lab.processes)


def test_an_unknown_key_is_said_on_both_sides(keyed: Keyed) -> None:
    key = keyed.ring.public["late"]
    assert f"does not know this server's key {key}" in keyed.servers["late"].events("handshake_failed")[0]["text"]
    assert f"refused key {key} from 127.0.0.1" in keyed.lab.run.events("key_refused")[0]["text"]
    assert f"refused key {key} from 127.0.0.1" in keyed.learner.text().replace("\n", ""), "on the screen, too"


def test_a_name_belongs_to_the_key_that_first_used_it(keyed: Keyed) -> None:
    thief = keyed.servers["thief"]
    assert thief.exit_code == 1
    assert "(name_in_use): the name known belongs to the key of known, and this server came with" in thief.text()


def test_no_secret_is_anywhere_but_in_its_file(keyed: Keyed) -> None:
    secrets = {file.read_text().split()[-1].encode() for file in keyed.ring.directory.glob("*.key")}
    assert len(secrets) == 4
    assert not [secret for secret in secrets if secret.decode() in keyed.command_lines]
    looked_at = 0
    for folder, _, names in os.walk(keyed.lab.directory):
        for file in (Path(folder) / name for name in names if not name.endswith(".key")):
            looked_at += 1
            content = file.read_bytes()
            assert not [secret for secret in secrets if secret in content], file
    assert looked_at > 10
