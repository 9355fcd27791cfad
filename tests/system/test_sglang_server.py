"""A rollout server that runs SGLang, in an environment of its own, with a learner in another one.

SGLang is started by the server here, unlike in tests/sglang: so its death, its arguments and its errors are at stake.
HEADWAY_SGLANG_KILLS sets how often its scheduler is killed (1; the figure in rollout_server/README.md is of 20).
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.models import build_tiny_model
from tests.sglang_cpu.launch import ENVIRONMENT, PYTHON
from tests.system.harness import END_S, Lab, Process

pytestmark = [pytest.mark.system, pytest.mark.sglang, pytest.mark.timeout(1800)]
START_S = 150.0
WEIGHTS_S = 5.0
"""From an engine that has started to one that serves the right version."""
KILLS = int(os.environ.get("HEADWAY_SGLANG_KILLS", "1"))


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def sglang_server(lab: Lab, **changes: object) -> Process:
    """A server that starts SGLang with the Lab's model."""
    options = {
        "engine": "sglang", "model": str(lab.model), "dtype": "float32", "max_model_length": 256, "room": 16,
        "reward_funcs": ["exact_match"], **changes,
    }  # fmt: skip
    return lab.server(python=PYTHON, **options)


def scheduler_of(server: Process) -> psutil.Process | None:
    """SGLang's scheduler, once there is one."""
    for process in psutil.Process(server.pid).children(recursive=True):
        try:
            if process.cmdline()[0].startswith("sglang::scheduler"):
                return process
        except (psutil.NoSuchProcess, IndexError):
            continue
    return None


def serves(server: Process) -> bool:
    """Whether its engine has weights of the learner in the life it is in."""
    names = [event["event"] for event in server.events()]
    return "weights_live" in names[len(names) - names[::-1].index("engine_up") :]


def kill_scheduler(lab: Lab, server: Process, learner: Process) -> int:
    """Kill -9 it, and wait until steps are trained of what its successor has sampled."""
    scheduler, lives = scheduler_of(server), len(server.events("engine_up"))
    assert scheduler is not None
    scheduler.send_signal(signal.SIGKILL)
    alive = [server, learner]
    lab.wait_until(lambda: len(server.events("engine_lost")) == lives, 10, "the loss to be noticed", alive=alive)
    lab.wait_until(lambda: len(server.events("engine_up")) > lives, START_S, "a new life", alive=alive)
    lab.wait_until(lambda: serves(server), WEIGHTS_S, "the newest weights, checked", alive=alive)
    step = lab.run.step()
    lab.wait_until(lambda: lab.run.step() > step + 3, START_S, "new steps", alive=alive)
    return scheduler.pid


def test_two_environments_train_together_and_the_scheduler_may_die(lab: Lab) -> None:
    steps = 6 + 8 * KILLS
    server = sglang_server(lab)
    learner = lab.learner(max_steps=steps, max_completion_length=64, reward_funcs=["exact_match"], max_attempts=50)
    lab.wait_until(lambda: lab.run.step() >= 3, START_S, "step 3", alive=[server, learner])
    killed = [kill_scheduler(lab, server, learner) for _ in range(KILLS)]
    assert len(set(killed)) == KILLS
    assert learner.wait_exit(START_S) == 0, learner.tail() + server.tail()
    assert server.wait_exit(END_S) == 0, server.tail()
    summary = lab.run.summary()
    assert summary["steps"] == steps
    assert summary["groups_trained"] == 4 * steps
    assert (summary["groups_unaccounted"], summary["groups_quarantined"]) == (0, 0)
    assert summary["staleness_max"] <= summary["max_staleness"]
    deaths = [event["reason"] for event in server.events("engine_lost") if event["reason"].startswith("SGLang died")]
    assert deaths == [f"SGLang died: sglang::scheduler ({pid}) died" for pid in killed], server.text()
    assert all(float(row["mismatch_kl"]) < 1e-6 for row in lab.run.rows() if "mismatch_kl" in row)
    assert any("mismatch_kl" in row for row in lab.run.rows())


def refusal(lab: Lab, **changes: object) -> str:
    """What a server says that ends at once, in one error, and leaves nothing running."""
    server = sglang_server(lab, engine_start_s=120.0, **changes)
    assert server.wait_exit(START_S) == 2, server.tail()
    sessions = {int(event["pid"]) for event in server.events("engine_started")}
    assert not [pid for pid in psutil.pids() if runs_in(pid, sessions)]
    return server.text()


def runs_in(pid: int, sessions: set[int]) -> bool:
    """Whether a process of these sessions still runs; one that has been killed may wait to be reaped for a moment."""
    try:
        return os.getsid(pid) in sessions and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def test_an_argument_that_sglang_does_not_know(lab: Lab) -> None:
    said = refusal(lab, sglang={"no-such-flag": 1})
    assert "unrecognized arguments: --no-such-flag 1" in said
    assert "SGLang ended while starting (exit code 2). The end of its log, " in said


def test_a_model_that_sglang_cannot_load(lab: Lab, tmp_path: Path) -> None:
    broken = build_tiny_model(tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    said = refusal(lab, model=str(broken))
    assert "SGLang ended while starting" in said
    assert "SafetensorError" in said


def test_a_port_in_use(lab: Lab) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"sglang.port = {port}: Address already in use; choose another one" in refusal(
            lab, sglang={"port": port}
        )
