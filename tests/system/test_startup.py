"""What cannot work is said at once: one line, an exit code that is not 0, nothing half-written."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.system.harness import END_S, RUN_S, START_S, Lab, Process

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]
CONFIG, FAILED = 2, 1


@pytest.fixture(scope="module")
def taken_port() -> Iterator[int]:
    """A loopback port that somebody else listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


@pytest.fixture(scope="module")
def refused(module_lab: Lab, taken_port: int) -> dict[str, Process]:
    """Every command that must fail, started at once: they have nothing to share but the two cores."""
    lab = module_lab
    nowhere = str(lab.directory / "no-such-model")
    needs_a_model = {"engine": "transformers", "reward_funcs": ["exact_match"]}
    processes = {
        "learner bind": lab.learner(name="bind", run_name="bind", bind="tcp://0.0.0.0:5555"),
        "learner model": lab.learner(name="model", run_name="model", model=nowhere),
        "learner port": lab.learner(name="port", run_name="port", bind=f"tcp://127.0.0.1:{taken_port}"),
        "learner key": lab.learner(name="key", run_name="key", max_stalenes=3),
        "learner column": lab.learner(name="column", run_name="column", prompt_column="question"),
        "server address": lab.server("address", learner="tcp://192.0.2.1:5555"),
        "server model": lab.server("model", model=nowhere, **needs_a_model),
        "server key": lab.server("key", reward_timeout=3.0),
        "server reward": lab.server("reward", reward_funcs=["no_such_reward"]),
    }
    for process in processes.values():
        process.wait_exit(START_S)
    return processes


@pytest.mark.parametrize(
    ("who", "texts"),
    [
        ("learner bind", ["address tcp://0.0.0.0:5555: 0.0.0.0 is not loopback", "--insecure-plaintext"]),
        ("learner model", ["no-such-model': no such directory"]),
        ("learner port", ["cannot listen on tcp://127.0.0.1:", "another process has it"]),
        ("learner key", ["unknown key", "max_stalenes", "did you mean max_staleness?"]),
        ("learner column", ["data.jsonl line 1: no column 'question'; found prompt, answer"]),
        ("server address", ["192.0.2.1 is not loopback", "--insecure-plaintext"]),
        ("server model", ["no-such-model"]),
        ("server key", ["unknown key", "did you mean reward_timeout_s?"]),
        ("server reward", ["reward function 'no_such_reward' is no built-in"]),
    ],
)
def test_a_configuration_that_cannot_work_ends_with_one_line(
    refused: dict[str, Process], who: str, texts: list[str]
) -> None:
    process = refused[who]
    assert process.exit_code == CONFIG, process.tail()
    said = [line for line in process.text().splitlines() if "event=" not in line]
    command = "headway-learner" if who.startswith("learner") else "headway-server"
    assert said[-1].startswith(f"{command}: error: ")
    assert [line for line in said if "error" in line] == said[-1:]
    for text in texts:
        assert text in said[-1]
    assert "Traceback" not in process.text()


def test_nothing_is_left(refused: dict[str, Process], module_lab: Lab) -> None:
    assert not (module_lab.directory / "runs").exists()


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(lab: Lab) -> None:
    """A limit on the size of files stands for the disk: a model fits, the state of its optimizer does not."""
    faults = {"witness": str(lab.directory / "witness"), "file_limit": 120_000}
    learner = lab.learner(faults=faults, save_steps=2, max_steps=4)
    server = lab.server()
    assert learner.wait_exit(START_S + RUN_S) == FAILED, learner.tail()
    line = learner.text().splitlines()[-1]
    assert line.startswith("headway-learner: error: checkpoint ")
    assert "step-000002 could not be written" in line
    assert "earlier checkpoints are untouched" in line
    assert "Traceback" not in learner.text()
    assert list((lab.run.path / "checkpoints").iterdir()) == []

    again = lab.learner(save_steps=2, max_steps=4)
    assert again.wait_exit(START_S + RUN_S) == 0, again.tail()
    assert lab.run.summary()["groups_unaccounted"] == 0
    assert server.wait_exit(END_S) == 0
