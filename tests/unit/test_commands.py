"""The commands as a user meets them: quick help, one line for a mistake, the right exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import learner.__main__ as learner_command
import rollout_server.__main__ as server_command
from learner.commands import TrainCommand, train
from learner.config import LearnerConfig
from learner.dry_run import describe
from learner.model.memory import memory_estimate
from protocol.command import run_command
from protocol.errors import ConfigError, RunStopped

HEAVY = ("torch", "transformers", "zmq", "matplotlib")


def run_quickly(*argv: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run a module as a command; also return which heavy libraries it had imported when it ended."""
    program = (
        "import atexit, runpy, sys\n"
        f"atexit.register(lambda: print('HEAVY', *[m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr))\n"
        f"sys.argv = {list(argv)!r}\n"
        f"runpy.run_module({argv[0]!r}, run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    *lines, heavy = done.stderr.splitlines()
    done.stderr = "\n".join(lines)
    return done, heavy.split()[1:]


@pytest.mark.parametrize(
    "argv",
    [["learner"], ["learner", "--help"], ["learner", "train", "--help"], ["learner", "demo", "--help"],
     ["learner", "bench", "ppo-vs-grpo", "--help"],
     ["rollout_server", "--help"]],
)  # fmt: skip
def test_help_is_quick_and_loads_nothing_heavy(argv: list[str]) -> None:
    started = os.times().children_user
    done, heavy = run_quickly(*argv)
    assert done.returncode == 0
    assert "usage: headway-" in done.stdout
    assert done.stderr == ""
    assert heavy == []
    assert os.times().children_user - started < 1.5, "CPU seconds, so that a busy machine does not fail this"


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["learner", "train", "--max-stalenes", "2"],
         "headway-learner: error: unknown flag --max-stalenes; did you mean --max-staleness?"),
        (["learner", "trian"],
         "headway-learner: error: unknown command 'trian': allowed are train, demo, knob, simulate, tune, replay,"),
        (["learner", "bench"],
         "headway-learner: error: unknown bench '': the one there is is headway-learner bench ppo-vs-grpo [--quick]"),
        (["learner", "bench", "ppo"], "headway-learner: error: unknown bench 'ppo': the one there is is"),
        (["learner", "bench", "ppo-vs-grpo", "--num-seeds", "0"],
         "headway-learner: error: --num-seeds 0: "),
        (["learner", "train"], "headway-learner: error: model is empty: name the directory"),
        (["learner", "demo", "--task", "sum"], "headway-learner: error: --task sum: must be 'add' or 'sort'"),
        (["rollout_server", "--engine", "transformers"],
         "headway-server: error: model is empty: engine transformers needs"),
        (["rollout_server", "--engine", "sglang", "--device", "cpu", "--model", "m"],
         "headway-server: error: engine sglang: "),
        (["rollout_server", "--engine-url", "http://127.0.0.1:1", "--model", "m"],
         "headway-server: error: engine_admin_key is empty: start the SGLang"),
        (["rollout_server", "--sglang.api-key", "k"], "headway-server: error: sglang.api-key: api-key is made up"),
        (["rollout_server", "--config", "none.toml"],
         "headway-server: error: --config none.toml: No such file or directory"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(argv: list[str], complaint: str) -> None:
    done, heavy = run_quickly(*argv)
    assert done.returncode == 2
    assert done.stderr.startswith(complaint)
    assert "\n" not in done.stderr.strip()
    assert done.stdout == ""
    assert heavy == []


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--engine", "transformers"], "model is empty: engine transformers .* --model DIR"),
        (["--engine-url", "http://127.0.0.1:1", "--engine-admin-key", "k"], "model is empty: engine sglang needs"),
        (["--engine", "transformers", "--model", "m"], "reward_funcs is empty: .* --reward-funcs exact_match"),
    ],
)
def test_what_a_server_cannot_do_without(argv: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        server_command.serve(argv)


def test_what_a_learner_cannot_do_without() -> None:
    with pytest.raises(ConfigError, match=r"model is empty: .* --model DIR"):
        learner_command.dispatch(["train", "--dataset", "a.jsonl"])
    with pytest.raises(ConfigError, match=r"dataset is empty: .* --dataset reasoning_gym:chain_sum"):
        learner_command.dispatch(["train", "--model", "m"])


def test_a_scripted_server_needs_neither_model_nor_rewards() -> None:
    from rollout_server.config import ServerConfig

    server_command.check_complete(ServerConfig(engine="scripted"))


def test_the_commands_own_flag_stays_out_of_the_configuration() -> None:
    command = TrainCommand(model="m", max_steps=7, dry_run=True)
    assert command.config == LearnerConfig(model="m", max_steps=7)
    assert type(command.config) is LearnerConfig
    assert command.config.model_fields_set == {"model", "max_steps"}


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        (lambda: 0, 0, ""),
        (lambda: 3, 3, ""),
        (lambda: _raise(ConfigError("beta -1:\n  bad\nvalue")), 2, "try: error: beta -1: bad value\n"),
        (lambda: _raise(RunStopped("5 steps skipped")), 1, "try: error: 5 steps skipped\n"),
        (lambda: _raise(OSError(28, "No space left on device", "a/b")), 1,
         "try: error: [Errno 28] No space left on device: 'a/b'\n"),
        (lambda: _raise(KeyboardInterrupt()), 130, "try: interrupted\n"),
    ],
)  # fmt: skip
def test_exit_codes(body: Callable[[], int], code: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("try", body) == code
    assert capsys.readouterr().err == text


def test_a_bug_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command("try", lambda: 1 // 0)


def _raise(error: BaseException) -> int:
    raise error


def test_a_token_budget_that_no_sequence_fits_is_refused(tiny_model_dir: Path) -> None:
    told = ["--model", str(tiny_model_dir), "--dataset", "reasoning_gym:chain_sum", "--dry-run"]
    with pytest.raises(
        ConfigError, match=r"token_budget 5119 is smaller than one sequence.* at least 5120 \(max_prompt"
    ):
        train([*told, "--token-budget", "5119"], prog="headway-learner train")


def test_a_dry_run_shows_what_follows_from_the_configuration(tiny_model_dir: Path) -> None:
    config = LearnerConfig(
        model=str(tiny_model_dir), dataset="d.jsonl", prompts_per_step=2, num_generations=4, max_staleness=4,
        autocast="bfloat16", beta=0.1,
    )  # fmt: skip
    text = describe(config)
    assert '"prompts_per_step": 2' in text
    bounds, estimate = config.granted_bounds, memory_estimate(config)
    for name, value in {
        "max_staleness": 4, "S": bounds.steps_ahead, "W": bounds.reorder_window, "bound": 4,
        "slots_total": bounds.slots_total, "samples": 8, "parameters": f"{estimate['parameters']:,}",
    }.items():  # fmt: skip
        assert [line.split()[1] for line in text.splitlines() if line.split()[:1] == [name]] == [str(value)]
    for part in ("weights", "gradients", "optimizer", "autocast", "reference", "publishing", "total"):
        assert f"\n  {part} " in text


def test_a_dry_run_says_when_the_byte_budget_lowers_s() -> None:
    config = LearnerConfig(model="a/b", dataset="d", buffer_bytes=1 << 27)
    assert f"lowered from {config.bounds.steps_ahead}" in describe(config)


def test_a_dry_run_counts_the_published_version_too(tiny_model_dir: Path) -> None:
    config = LearnerConfig(model=str(tiny_model_dir), dataset="d", publish_dtype="bfloat16")
    estimate = memory_estimate(config)
    total = (estimate["total_bytes"] + 2 * estimate["parameters"]) / 1e6
    assert ["total", f"{total:,.1f}", "MB"] in [line.split() for line in describe(config).splitlines()]


def test_a_dry_run_command_loads_nothing_heavy(tiny_model_dir: Path) -> None:
    done, heavy = run_quickly(
        "learner", "train", "--model", str(tiny_model_dir), "--dataset", "reasoning_gym:gcd", "--dry-run"
    )
    assert (done.returncode, done.stderr, heavy) == (0, "", [])
    assert "slots_total" in done.stdout


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (("--model", "/nowhere", "--dataset", "reasoning_gym:gcd"), "model '/nowhere': no such directory"),
        (("--model", ".", "--dataset", "nothing.jsonl"), "dataset 'nothing.jsonl': no such file"),
        (("--model", ".", "--dataset", "reasoning_gym:gcd", "--eval-dataset", "e"), "eval_dataset 'e': no such file"),
    ],
)
def test_a_path_that_leads_nowhere_is_said_before_torch_is_loaded(flags: tuple[str, ...], error: str) -> None:
    done, heavy = run_quickly("learner", "train", *flags)
    assert (done.returncode, heavy) == (2, [])
    assert error in done.stderr


def test_a_dry_run_of_a_missing_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        describe(LearnerConfig(model=str(tmp_path / "none"), dataset="d"))
    with pytest.raises(ConfigError, match=r"no readable config\.json"):
        describe(LearnerConfig(model=str(tmp_path), dataset="d"))
    assert "a hub name is resolved later" in describe(LearnerConfig(model="some/model", dataset="d"))
