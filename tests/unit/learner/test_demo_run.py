"""The demo command: two files that the public commands accept, and two processes that end together."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest

from learner.config import LearnerConfig
from learner.demo import pair, run
from learner.demo.recipes import cpu_has_bf16, recipes, to_toml, write_jsonl
from learner.demo.run import DemoOptions, describe_summary, write_run
from protocol.errors import ConfigError
from protocol.settings import load_settings
from rollout_server.config import ServerConfig

SUMMARY: dict[str, Any] = {
    "eval_first": 0.28125, "eval_last": 0.5625, "staleness_max": 4, "max_staleness": 4,
    "checkpoint": "runs/x/checkpoints/step-30",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _restore_sigterm() -> Any:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("task", ["add", "sort"])
def test_both_files_are_configurations_of_the_public_commands(task: str, tmp_path: Path) -> None:
    options = DemoOptions(task=task, max_steps=3, max_staleness=2, seed=5)  # type: ignore[arg-type]
    run_dir = tmp_path / "runs" / "demo"
    write_run(recipes()[task], options, run_dir=run_dir, model=tmp_path / "model", port=4321)
    server = load_settings(ServerConfig, ["--config", str(run_dir / "server.toml")], prog="s")
    learner = load_settings(LearnerConfig, ["--config", str(run_dir / "learner.toml")], prog="l")
    assert server.learner == learner.bind == "tcp://127.0.0.1:4321"
    assert server.model == learner.model == str(tmp_path / "model")
    assert server.reward_funcs == learner.reward_funcs == ["exact_match"]
    assert learner.run_dir == run_dir
    assert (learner.max_steps, learner.max_staleness, learner.seed) == (3, 2, 5)
    assert server.max_model_length >= learner.max_prompt_length + learner.max_completion_length - 16
    for file in (learner.dataset, learner.eval_dataset):
        assert Path(file).is_file()


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("add", {"prompts_per_step": 8, "num_generations": 16, "learning_rate": 1e-5, "max_completion_length": 5,
                 "warmup_steps": 5, "filter_zero_std": False, "stop": ["\n"], "eval_temperature": 0.0}),
        ("sort", {"prompts_per_step": 16, "num_generations": 16, "learning_rate": 2e-4, "max_completion_length": 9,
                  "warmup_steps": 20, "filter_zero_std": True, "stop": [], "eval_temperature": 1.0}),
    ],
)  # fmt: skip
def test_the_recipes(task: str, expected: dict[str, Any], tmp_path: Path) -> None:
    write_run(recipes()[task], DemoOptions(), run_dir=tmp_path, model=tmp_path, port=1)
    learner = load_settings(LearnerConfig, ["--config", str(tmp_path / "learner.toml")], prog="l")
    assert learner.model_dump(include=set(expected)) == expected
    assert (learner.epsilon, learner.clip_high, learner.anchor, learner.beta) == (0.2, 0.28, "behavior", 0.0)
    assert (learner.adam_beta1, learner.adam_beta2, learner.max_grad_norm) == (0.9, 0.99, 1.0)
    assert (learner.max_staleness, learner.temperature) == (4, 1.0)
    assert len(Path(learner.eval_dataset).read_text().splitlines()) == {"add": 192, "sort": 300}[task]


@pytest.mark.parametrize("engine", ["auto", "transformers", "sglang"])
def test_the_server_is_told_the_engine_and_sglang_its_share_of_the_memory(engine: Any, tmp_path: Path) -> None:
    write_run(recipes()["sort"], DemoOptions(engine=engine), run_dir=tmp_path, model=tmp_path, port=1)
    server = load_settings(ServerConfig, ["--config", str(tmp_path / "server.toml")], prog="s")
    assert server.engine == engine
    assert server.sglang == ({"mem-fraction-static": 0.1, "max-total-tokens": 20000} if engine == "sglang" else {})


def test_the_interpreter_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run._server_python(DemoOptions()) == sys.executable
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    assert run._server_python(DemoOptions(server_python=Path("bin/python"))) == str(tmp_path / "bin" / "python")
    with pytest.raises(ConfigError, match=r"^server_python bin/none: no program is there; name a python with headway"):
        run.demo(["--task", "sort", "--server-python", "bin/none"], prog="headway-learner demo")


def test_toml_and_back() -> None:
    values = {"a": 1e-5, "b": True, "c": ["\n", 'say "x"', "é\\"], "d": 0.0, "e": [], "f": "/a b/c", "g": 3}
    assert tomllib.loads(to_toml(values)) == values
    nested = {"t": {"tp-size": 2, "x": [1]}, "after": 1}
    assert tomllib.loads(to_toml(nested)) == nested


def test_jsonl(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", iter([{"prompt": "a\n"}, {"prompt": "b"}]))
    assert (tmp_path / "a.jsonl").read_text() == '{"prompt": "a\\n"}\n{"prompt": "b"}\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flags\t: fpu avx512_bf16 sse", True),
        ("Features : fp asimd bf16", True),
        ("flags : avx512f", False),
        ("", False),
    ],
)
def test_bf16_is_used_where_the_cpu_has_it(tmp_path: Path, text: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu_has_bf16(tmp_path / "cpuinfo") is expected
    assert cpu_has_bf16(tmp_path / "none") is False


def test_a_new_run_takes_the_first_free_name(tmp_path: Path) -> None:
    (tmp_path / "demo-sort-1").mkdir()
    assert run._run_name(DemoOptions(task="sort", output_dir=tmp_path)) == "demo-sort-2"
    assert run._run_name(DemoOptions(task="sort", output_dir=tmp_path, run_name="mine")) == "mine"


def test_the_summary_says_what_was_learned_and_where_it_is() -> None:
    text = describe_summary(SUMMARY, Path("runs/x"))
    assert "accuracy   0.281 -> 0.562 on the evaluation prompts" in text
    assert "staleness  4 at most, the bound is 4" in text
    assert "run        runs/x\n" in text
    assert "model      AutoModelForCausalLM.from_pretrained('runs/x/checkpoints/step-30')" in text


def test_a_port_is_free_together_with_its_neighbor() -> None:
    import socket

    port = pair.free_port_pair()
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", port))
        second.bind(("127.0.0.1", port + 1))


def child(program: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(program)]


FOREVER = "import signal; signal.pause()"


def test_the_learners_end_is_the_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "logs" / "server.log"
    server = child("print('serving', flush=True); import signal; signal.sigwait([signal.SIGTERM])")
    assert pair.run_pair(child("pass"), child("print('learned')"), server_log=log) == 0
    assert capfd.readouterr().out == "learned\n"
    assert pair.run_pair(server, child("import sys; sys.exit(7)"), server_log=log) == 7


def test_a_learner_with_a_log_leaves_the_terminal_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logs = {"server_log": tmp_path / "s.log", "learner_log": tmp_path / "l.log"}
    assert pair.run_pair(child("pass"), child("print('learned')"), **logs) == 0
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "l.log").read_text() == "learned\n"
    assert pair.run_pair(child("pass"), child("raise SystemExit('no disk')"), **logs) == 1
    shown = capfd.readouterr().err
    assert f"last lines of {tmp_path / 'l.log'}" in shown
    assert "no disk" in shown


def test_a_server_told_to_go_does_not_end_the_learner(tmp_path: Path) -> None:
    done = tmp_path / "done"
    learner = child(f"""
        import os, pathlib, sys
        os.read(os.open({str(tmp_path / "fifo")!r}, os.O_RDONLY), 1)   # until the server has ended
        pathlib.Path({str(done)!r}).touch()
    """)
    os.mkfifo(tmp_path / "fifo")
    server = child(f"open({str(tmp_path / 'fifo')!r}, 'w')")
    assert pair.run_pair(server, learner, server_log=tmp_path / "s.log") == 0
    assert done.exists()


def test_a_failing_server_ends_the_learner_and_shows_its_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    server = child("print('cause of death', flush=True); import sys; sys.exit(3)")
    assert pair.run_pair(server, child(FOREVER), server_log=tmp_path / "s.log") == 3
    shown = capfd.readouterr().err
    assert "the server ended with exit code 3" in shown
    assert "cause of death" in shown


def test_children_of_a_child_end_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even one that ignores being asked. A fifo that the grandchild holds open tells when it is gone."""
    monkeypatch.setattr(pair, "SERVER_GRACE_S", 0.05)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # before any writer: else the end of file wakes no select
    stubborn = """
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("up", flush=True)
        signal.pause()
    """
    server = child(f"""
        import subprocess
        with open({str(fifo)!r}, "w") as held:
            subprocess.run({child(stubborn)!r}, stdout=held)
    """)
    learner = child(f"open({str(fifo)!r}).readline()")
    assert pair.run_pair(server, learner, server_log=tmp_path / "s.log") == 0
    readable, _, _ = select.select([reader], [], [], 10)  # the kill is sent; the kernel carries it out in its time
    assert readable
    assert os.read(reader, 1) == b"", "end of file: nobody holds it open for writing"
    os.close(reader)


def test_a_child_that_ignores_politeness_is_killed(capsys: pytest.CaptureFixture[str]) -> None:
    stubborn = child("""
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("ready", flush=True)
        signal.pause()
    """)
    process = subprocess.Popen(stubborn, stdout=subprocess.PIPE, process_group=0)
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
    pair.end(process, signal.SIGTERM, 0.05)
    assert process.returncode == -signal.SIGKILL
    assert "did not end within 0.05 s of SIGTERM: killed" in capsys.readouterr().err


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_both_in_order(tmp_path: Path, signum: signal.Signals, code: int) -> None:
    """A real demo process with two children that write down how they were asked to go."""
    heard = tmp_path / "heard"

    def program(name: str, ready: str) -> str:
        return f"""
            import pathlib, signal, sys
            def note(signum, frame):
                with open({str(heard)!r}, "a") as file:
                    print({name!r}, signal.Signals(signum).name, file=file)
                sys.exit(0)
            signal.signal(signal.SIGINT, note)
            signal.signal(signal.SIGTERM, note)
            {ready}
            signal.pause()
        """

    for fifo in ("server-up", "both-up"):
        os.mkfifo(tmp_path / fifo)
    server = program("server", f"open({str(tmp_path / 'server-up')!r}, 'w').close()")
    wait = f"open({str(tmp_path / 'server-up')!r}).read(); open({str(tmp_path / 'both-up')!r}, 'w').close()"
    parent = child(f"""
        import sys
        from pathlib import Path
        from learner.demo.pair import run_pair
        from protocol.command import run_command
        log = Path({str(tmp_path / "s.log")!r})
        sys.exit(run_command("try", lambda: run_pair({child(server)!r}, {child(program("learner", wait))!r},
                 server_log=log)))
    """)
    process = subprocess.Popen(parent, stderr=subprocess.DEVNULL)
    with open(tmp_path / "both-up") as up:
        up.read()
    process.send_signal(signum)
    assert process.wait(30) == code
    assert heard.read_text().splitlines() == ["learner SIGINT", "server SIGTERM"]


def test_the_command_from_end_to_end_with_stand_ins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything but the model and the two processes."""
    calls: list[tuple[list[str], list[str]]] = []

    def run_pair(server: list[str], learner: list[str], *, server_log: Path) -> int:
        calls.append((server, learner))
        import json

        (server_log.parent.parent / "summary.json").write_text(json.dumps(SUMMARY))
        return 0

    monkeypatch.setattr(run, "run_pair", run_pair)
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    (tmp_path / "cache" / "sort" / "model").mkdir(parents=True)
    argv = ["--task", "sort", "--run-name", "r", "--output-dir", str(tmp_path), "--cache-dir", str(tmp_path / "cache")]
    argv += ["--engine", "sglang", "--server-python", "/bin/sh"]
    assert run.demo(argv, prog="headway-learner demo") == 0
    assert os.environ["OMP_NUM_THREADS"] == "1"
    ((server, learner),) = calls
    assert server[0] == "/bin/sh"
    assert learner[0] == sys.executable
    assert server[1:] == ["-m", "rollout_server", "--config", str(tmp_path / "r" / "server.toml")]
    assert learner[1:] == ["-m", "learner", "train", "--config", str(tmp_path / "r" / "learner.toml")]
    shown = capsys.readouterr().out
    assert f"headway-server --config {tmp_path / 'r' / 'server.toml'}\n" in shown
    assert f"headway-learner train --config {tmp_path / 'r' / 'learner.toml'}\n" in shown
    assert "accuracy" in shown


def test_no_product_code_knows_a_demonstrations_name() -> None:
    root = Path(run.__file__).resolve().parents[2]
    names = ("smollm", "demo.addition", "demo.sorting", "demo-add", "demo-sort")
    for package in ("protocol", "rollout_server", "learner"):
        for file in (root / package).rglob("*.py"):
            if "demo" not in file.parts:
                text = file.read_text().lower()
                assert not [name for name in names if name in text], file
