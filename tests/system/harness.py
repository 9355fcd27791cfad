"""Real processes under test: start the public commands on config files, wait for what they show, kill them.

Everything is observed as a user would: metrics.jsonl, summary.json, log events, exit codes. `wait_until` is the only
place in tests/system that waits; every wait has a deadline, and a failed one shows the ends of all logs. A Lab owns its
processes: leaving it kills them with everything they started.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(sys.executable)
POLL_S = 0.02
START_S = 60.0
"""Limit for a learner to import torch and to open its sockets on a busy machine."""
RUN_S = 90.0
"""Limit of a short run. Generous: a hang is what it is for, and a hang fails anyway."""
END_S = 30.0
SHOWN_CHARACTERS = 3000

T = TypeVar("T")
Event = dict[str, str]
_FIELD = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)')


def parse_event(line: str) -> Event:
    """Read one line of protocol/logs.py back: its fields, event included; empty for any other line."""
    if " event=" not in line:
        return {}
    fields = _FIELD.findall(line)
    return {key: json.loads(value) if value.startswith('"') else value for key, value in fields}


def read_events(path: Path, name: str = "") -> list[Event]:
    """Return the events of a log file, or those of one name."""
    if not path.exists():
        return []
    events = [parse_event(line) for line in path.read_text("utf-8").splitlines()]
    return [event for event in events if event and name in ("", event["event"])]


class Process:
    """A command that runs, as the leader of a process group of its own."""

    def __init__(self, name: str, command: Sequence[str], output: Path, log_file: Path) -> None:
        self.name = name
        self.output = output
        self.log_file = log_file
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with output.open("wb") as out:
            self._popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=ROOT, env=environment, process_group=0
            )
        self.pid = self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative when a signal ended it."""
        return self._popen.poll()

    def text(self) -> str:
        """Everything it has printed."""
        return self.output.read_text("utf-8", errors="replace")

    def events(self, name: str = "") -> list[Event]:
        """The events it has logged, or those of one name."""
        return read_events(self.log_file, name)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this process alone: not to what it started."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9, and prove that it was what ended the process."""
        self.signal(signal.SIGKILL)
        assert self.wait_exit(END_S) == -signal.SIGKILL

    def wait_exit(self, deadline_s: float) -> int:
        """Wait for its end and return the exit code."""
        try:
            return self._popen.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} had not ended after {deadline_s:g} s{self.tail()}") from None

    def tail(self) -> str:
        """The ends of its output and of its log, for an error text."""
        log = self.log_file.read_text("utf-8") if self.log_file.exists() else ""
        return "".join(
            f"\n--- {self.name}: {what}\n{text[-SHOWN_CHARACTERS:]}"
            for what, text in (("printed", self.text()), ("logged", log))
        )

    def end(self) -> None:
        """Kill it and all it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()


class Run:
    """The files of a run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[dict[str, Any]]:
        """Whole lines of metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def step(self) -> int:
        """The newest policy_version in metrics.jsonl."""
        return max((row["policy_version"] for row in self.rows()), default=0)

    def events(self, name: str = "") -> list[Event]:
        """What the learners of this run have logged."""
        return read_events(self.path / "logs" / "learner.log", name)

    def summary(self) -> dict[str, Any]:
        """summary.json."""
        summary: dict[str, Any] = json.loads((self.path / "summary.json").read_text("utf-8"))
        return summary

    def checkpoints(self) -> list[str]:
        """Names of the checkpoints in place."""
        return sorted(path.name for path in (self.path / "checkpoints").glob("step-*") if path.suffix == "")

    def ledger(self, checkpoint: str) -> dict[str, Any]:
        """The ledger's snapshot in a checkpoint."""
        state = json.loads((self.path / "checkpoints" / checkpoint / "state.json").read_text("utf-8"))
        ledger: dict[str, Any] = state["ledger"]
        return ledger


class Lab:
    """A directory, an address and the processes started in it.

    `learner` and `server` start the public commands with small defaults: a scripted engine without a model, a random
    model in the learner, four groups of four a step. Every argument is a key of the configuration.
    """

    def __init__(self, directory: Path, model: Path) -> None:
        self.directory = directory
        self.model = model
        self.processes: list[Process] = []
        # A socket's path may have 107 characters, and pytest's directories are deep.
        self._sockets = tempfile.TemporaryDirectory(prefix="hw-")
        self.address = f"ipc://{self._sockets.name}/learner"
        self.run = Run(directory / "runs" / "run")
        directory.mkdir(parents=True, exist_ok=True)
        write_jsonl(self.data(), ({"prompt": f"{i} + {i} =", "answer": str(2 * i)} for i in range(64)))

    def data(self) -> Path:
        """The data set."""
        return self.directory / "data.jsonl"

    def learner(
        self, *, faults: Mapping[str, Any] | None = None, name: str = "learner", ranks: int = 1, **changes: Any
    ) -> Process:
        """Start a learner; with `faults`, through faulty_learner.py; of several ranks, through torchrun."""
        config = {
            "bind": self.address, "model": str(self.model), "dataset": str(self.data()),
            "output_dir": str(self.directory / "runs"), "run_name": "run", "num_generations": 4,
            "max_completion_length": 8, "prompts_per_step": 4, "max_staleness": 2, "max_steps": 6,
            "learning_rate": 1e-3, "filter_zero_std": False, "heartbeat_s": 0.25, "liveness_s": 4.0,
            "staging_dir": str(self.directory / "staging"), **changes,
        }  # fmt: skip
        module = ["learner"]
        if faults is not None:
            module = ["tests.system.faulty_learner", str(self._write(f"{name}-faults.json", json.dumps(faults)))]
        if ranks > 1:
            module = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", *module]
        log_file = Path(config["output_dir"]) / config["run_name"] / "logs" / "learner.log"
        return self.start(name, [*module, "train"], self.write_config(name, config), log_file)

    def server(
        self, name: str = "server", *, module: str = "rollout_server", python: Path = PYTHON, **changes: Any
    ) -> Process:
        """Start a rollout server."""
        config = {
            "learner": self.address, "name": name, "engine": "scripted", "room": 16, "reward_workers": 1,
            "log_file": str(self.directory / f"{name}.log"), "staging_dir": str(self.directory / "staging"), **changes,
        }  # fmt: skip
        if config["engine"] == "scripted":
            config["scripted"] = {"vocab_size": 40, "mean_length": 6.0, "token_s": 0.002, **changes.get("scripted", {})}
        return self.start(name, [module], self.write_config(name, config), Path(config["log_file"]), python=python)

    def start(
        self, name: str, command: Sequence[str], config: Path, log_file: Path, *, python: Path = PYTHON
    ) -> Process:
        """Start `python -m` command with a configuration file."""
        process = Process(
            name,
            [str(python), "-m", *command, "--config", str(config)],
            self.directory / f"{name}-{len(self.processes)}.out",
            log_file,
        )
        self.processes.append(process)
        return process

    def wait_until(
        self, condition: Callable[[], T], deadline_s: float, what: str, *, alive: Sequence[Process] = ()
    ) -> T:
        """Wait until `condition` returns something true, and return it.

        Raises:
            AssertionError: it took longer than `deadline_s`, or a process of `alive` has ended; with all logs' ends.
        """
        deadline = time.monotonic() + deadline_s
        while True:
            ended = [process.name for process in alive if process.exit_code is not None]  # before looking: no race
            if result := condition():
                return result
            tails = "".join(process.tail() for process in self.processes)
            assert not ended, f"{', '.join(ended)} ended while waiting for {what}{tails}"
            assert time.monotonic() < deadline, f"waited {deadline_s:g} s for {what}{tails}"
            time.sleep(POLL_S)

    def wait_step(self, step: int, *, alive: Sequence[Process] = ()) -> None:
        """Wait until metrics.jsonl has a step."""
        self.wait_until(lambda: self.run.step() >= step, START_S + RUN_S, f"step {step}", alive=alive)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self.processes:
            process.end()
        self._sockets.cleanup()

    def write_config(self, name: str, config: Mapping[str, Any]) -> Path:
        return self._write(f"{name}-{len(self.processes)}.toml", to_toml(config))

    def _write(self, name: str, text: str) -> Path:
        path = self.directory / name
        path.write_text(text, "utf-8")
        return path


def reward(name: str) -> str:
    """Name a function of reward_functions.py as a server's configuration does."""
    return f"{ROOT / 'tests' / 'system' / 'reward_functions.py'}:{name}"


def to_toml(values: Mapping[str, Any]) -> str:
    """Write a table and its sub-tables: JSON spells everything else as TOML does."""
    flat = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in flat.items())
    return text + "".join(f"[{key}]\n{to_toml(value)}" for key, value in tables.items())


def write_jsonl(path: Path, rows: Iterator[Mapping[str, Any]]) -> None:
    """Write a data set."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
