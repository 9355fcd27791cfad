"""The run directory: one learner at a time, an incarnation that only grows, no silent change of configuration."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from learner import run_lock as module
from learner.config import LearnerConfig
from learner.durable import write_atomic
from learner.rundir import FREE_TO_CHANGE, RunDirectory, config_fingerprint
from protocol.errors import ConfigError


def make_config(root: Path, **changes: Any) -> LearnerConfig:
    return LearnerConfig(
        **{"output_dir": root, "run_name": "r", "model": "m", "dataset": "d.jsonl", "eval_dataset": "e", **changes}
    )


def begin(config: LearnerConfig) -> RunDirectory:
    run = RunDirectory.open(config)
    run.begin_incarnation()
    return run


def test_a_new_run_has_its_places_and_its_name(tmp_path: Path) -> None:
    run = RunDirectory.open(make_config(tmp_path))
    assert run.path == tmp_path / "r"
    assert not run.continued
    run.begin_incarnation()
    for directory in (run.samples_dir, run.checkpoints_dir, run.journal_dir, run.logs_dir):
        assert directory.is_dir()
        assert directory.parent == run.path
    assert (run.metrics_path.name, run.summary_path.name) == ("metrics.jsonl", "summary.json")
    assert json.loads(run.config_path.read_text())["num_generations"] == 64, "resolved: defaults too"
    assert len(bytes.fromhex(run.run_id)) == 16
    run.close()


def test_a_continued_run_keeps_its_id_and_grows_its_incarnation(tmp_path: Path) -> None:
    seen = []
    for _ in range(3):
        run = RunDirectory.open(make_config(tmp_path))
        seen.append((run.run_id, run.continued, run.begin_incarnation(), run.incarnation))
        run.close()
    assert len({run_id for run_id, *_ in seen}) == 1
    assert [rest for _, *rest in seen] == [[False, 1, 1], [True, 2, 2], [True, 3, 3]]


def test_two_runs_have_two_ids(tmp_path: Path) -> None:
    one, two = (RunDirectory.open(make_config(tmp_path, run_name=name)) for name in "ab")
    assert one.run_id != two.run_id


def test_the_incarnation_is_synced_before_it_is_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory.open(make_config(tmp_path))
    events: list[str] = []
    fsync = os.fsync

    def logged_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(path.name)
        if path.name == "run.json.tmp":
            assert json.loads(path.read_text())["incarnation"] == 1
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    assert run.begin_incarnation() == 1
    assert events == ["config.json.tmp", "run.json.tmp", "r"], "the bytes, then the names"


def test_a_second_learner_is_told_who_is_first(tmp_path: Path) -> None:
    run = begin(make_config(tmp_path))
    config_before = run.config_path.read_bytes()
    with pytest.raises(ConfigError, match=rf"r is in use by another learner \(pid {os.getpid()} on .*\): stop it"):
        RunDirectory.open(make_config(tmp_path, bind="tcp://127.0.0.1:6000"))
    assert run.config_path.read_bytes() == config_before
    run.close()
    RunDirectory.open(make_config(tmp_path)).close()


HOLD = """
import sys
from pathlib import Path
from learner.config import LearnerConfig
from learner.rundir import RunDirectory
same = {"run_name": "r", "model": "m", "dataset": "d.jsonl", "eval_dataset": "e"}
run = RunDirectory.open(LearnerConfig(output_dir=Path(sys.argv[1]), **same))
run.begin_incarnation()
print("held", flush=True)
sys.stdin.read()
"""


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"in use by another learner \(pid {holder.pid} on "):
            RunDirectory.open(make_config(tmp_path))
        holder.kill()
        assert holder.wait() == -signal.SIGKILL
    run = RunDirectory.open(make_config(tmp_path))
    assert run.begin_incarnation() == 2
    run.close()


def test_a_refused_learner_does_not_keep_the_lock(tmp_path: Path) -> None:
    begin(make_config(tmp_path)).close()
    with pytest.raises(ConfigError, match="began differently"):
        RunDirectory.open(make_config(tmp_path, seed=1))
    RunDirectory.open(make_config(tmp_path)).close()


CHANGED: dict[str, Any] = {
    "num_generations": 8, "max_staleness": 2, "learning_rate": 1e-3, "model": "other", "dataset": "e.jsonl",
    "reward_funcs": ["exact_match"], "temperature": 0.5, "dataset_config": {"size": 3}, "beta": 0.1, "seed": 7,
}  # fmt: skip
UNASKED: dict[str, Any] = {
    "max_steps": 7, "bind": "tcp://127.0.0.1:7777", "save_steps": 3, "save_total_limit": 5, "eval_steps": 2,
    "heartbeat_s": 0.5, "liveness_s": 9.0, "server_wait_s": 3.0, "num_completions_logged": 0,
    "insecure_plaintext": True, "token_budget": 100, "device": "cpu", "share_prefix": False,
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), CHANGED.items())
def test_a_key_that_matters_needs_permission(tmp_path: Path, key: str, value: object) -> None:
    first = begin(make_config(tmp_path))
    first.close()
    old = make_config(tmp_path).model_dump(mode="json")[key]
    with pytest.raises(ConfigError) as caught:
        RunDirectory.open(make_config(tmp_path, **{key: value}))
    assert f"{key} was {old!r}, is {value!r}" in str(caught.value)
    assert f"allow_changed = ['{key}']" in str(caught.value)
    allowed = begin(make_config(tmp_path, **{key: value}, allow_changed=[key]))
    assert allowed.config_fingerprint != first.config_fingerprint
    allowed.close()
    RunDirectory.open(make_config(tmp_path, **{key: value})).close()  # it is the run's configuration now


@pytest.mark.parametrize(("key", "value"), UNASKED.items())
def test_keys_that_do_not_matter_change_unasked(tmp_path: Path, key: str, value: object) -> None:
    assert key in FREE_TO_CHANGE
    first = begin(make_config(tmp_path))
    first.close()
    second = begin(make_config(tmp_path, **{key: value}))
    assert second.config_fingerprint == first.config_fingerprint
    assert json.loads(second.config_path.read_text())[key] == value
    second.close()


def test_every_free_key_exists() -> None:
    assert set(LearnerConfig.model_fields) >= FREE_TO_CHANGE


def test_max_steps_matters_where_it_bends_the_schedule(tmp_path: Path) -> None:
    begin(make_config(tmp_path, lr_scheduler_type="cosine")).close()
    with pytest.raises(ConfigError, match="max_steps was 100, is 200"):
        RunDirectory.open(make_config(tmp_path, lr_scheduler_type="cosine", max_steps=200))


def test_all_changes_are_listed_at_once(tmp_path: Path) -> None:
    begin(make_config(tmp_path)).close()
    with pytest.raises(ConfigError, match=r"beta was .*; seed was .*allow_changed = \['beta', 'seed'\]"):
        RunDirectory.open(make_config(tmp_path, seed=3, beta=0.2, max_steps=9))


def test_a_run_that_never_began_may_change_in_any_way(tmp_path: Path) -> None:
    """The first start failed over a wrong model: fixing it must not need a new name."""
    first = RunDirectory.open(make_config(tmp_path))
    first.check_fingerprints({"dataset": "aa"})
    first.close()
    second = RunDirectory.open(make_config(tmp_path, model="right", dataset="e.jsonl"))
    second.check_fingerprints({"dataset": "bb"})
    assert not second.continued
    assert second.begin_incarnation() == 1
    second.close()


def test_a_refused_start_of_a_new_run_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "not" / "yet"
    run = RunDirectory.open(make_config(root))
    run.check_fingerprints({"dataset": "aa"})
    assert (root / "r" / "learner.lock").exists()
    run.close()
    assert list(tmp_path.iterdir()) == []


def test_a_refused_start_leaves_what_others_have_written(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "learner.toml").write_text("")
    RunDirectory.open(make_config(tmp_path)).close()
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["learner.toml"]


def test_a_refused_start_of_a_run_that_goes_on_changes_no_file(tmp_path: Path) -> None:
    run = begin(make_config(tmp_path))
    run.close()
    run.summary_path.write_text("{}")
    (tmp_path / "r" / "learner.lock").write_text("pid 1 on another-host\n")
    before = contents(tmp_path)
    run = RunDirectory.open(make_config(tmp_path, beta=0.5, allow_changed=["beta"]))
    run.require_unfinished(policy_version=3, max_steps=100)
    run.check_fingerprints({"dataset": "aa", "eval_dataset": "bb"})
    run.close()
    assert contents(tmp_path) == before
    run = RunDirectory.open(make_config(tmp_path, beta=0.5, allow_changed=["beta"]))
    run.begin_incarnation()
    run.close()
    assert contents(tmp_path).keys() == before.keys() - {"r/summary.json"}, "of the run as it was"
    assert contents(tmp_path)["r/config.json"] != before["r/config.json"]


def contents(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def test_a_lock_that_a_refused_learner_took_away_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between another's open and its flock the file goes, directory and all: a lock on it would lock nobody out."""
    refused = RunDirectory.open(make_config(tmp_path))
    flock, calls = fcntl.flock, []

    def late_flock(descriptor: int, operation: int) -> None:
        if not calls:
            refused.close()
        calls.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(module.fcntl, "flock", late_flock)
    run = begin(make_config(tmp_path))
    assert len(calls) == 2
    with pytest.raises(ConfigError, match="in use by another learner"):
        RunDirectory.open(make_config(tmp_path))
    run.close()


def test_a_key_of_a_newer_headway_was_at_its_default(tmp_path: Path) -> None:
    run = begin(make_config(tmp_path))
    run.close()
    older = json.loads(run.config_path.read_text())
    del older["beta"], older["dataset_config"]
    run.config_path.write_text(json.dumps(older))
    RunDirectory.open(make_config(tmp_path)).close()
    run.config_path.write_text(json.dumps(older))
    with pytest.raises(ConfigError, match=r"beta was 0\.0, is 0\.3"):
        RunDirectory.open(make_config(tmp_path, beta=0.3))


def test_contents_are_compared_by_fingerprint(tmp_path: Path) -> None:
    run = begin(make_config(tmp_path))
    run.check_fingerprints({"dataset": "aa", "tokenizer": "bb"})
    run.close()
    run = begin(make_config(tmp_path))
    run.check_fingerprints({"dataset": "aa", "tokenizer": "bb"})
    with pytest.raises(ConfigError, match=r"dataset was 'content aa', is 'content cc'.*allow_changed = \['dataset'\]"):
        run.check_fingerprints({"dataset": "cc", "tokenizer": "bb"})
    run.close()
    run = begin(make_config(tmp_path, allow_changed=["dataset"]))
    run.check_fingerprints({"dataset": "cc"})
    run.close()
    run = begin(make_config(tmp_path))
    run.check_fingerprints({"dataset": "cc", "tokenizer": "bb"})
    assert run.incarnation == 4, "fingerprints do not disturb the incarnation"
    run.close()


def test_fingerprint_is_of_what_matters_only(tmp_path: Path) -> None:
    assert config_fingerprint(make_config(tmp_path)) == config_fingerprint(make_config(tmp_path / "x", max_steps=3))
    assert config_fingerprint(make_config(tmp_path)) != config_fingerprint(make_config(tmp_path, epsilon=0.1))


@pytest.mark.parametrize("name", ["run.json", "config.json"])
@pytest.mark.parametrize("damage", [b"{", b"\xff\xfe", b"[]"])
def test_damage_is_refused_by_name(tmp_path: Path, name: str, damage: bytes) -> None:
    begin(make_config(tmp_path)).close()
    (tmp_path / "r" / name).write_bytes(damage)
    with pytest.raises(ConfigError, match=rf"r/{name} is damaged \(.*\): restore it, or choose another run_name"):
        RunDirectory.open(make_config(tmp_path))


def test_a_place_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/r cannot be written \(Not a directory\): .*another output_dir"):
        RunDirectory.open(make_config(tmp_path / "file"))


FULL_DISK = """
import resource, sys
from pathlib import Path
from learner.config import LearnerConfig
from learner.rundir import RunDirectory
from protocol.errors import ConfigError
same = {"run_name": "r", "model": "m", "dataset": "d.jsonl", "eval_dataset": "e"}
run = RunDirectory.open(LearnerConfig(output_dir=Path(sys.argv[1]), **same))
run.check_fingerprints({"dataset": "aa"})
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    run.begin_incarnation()
except ConfigError as error:
    print(error)
run.close()
"""


@pytest.mark.parametrize("continued", [False, True])
def test_a_full_disk_is_one_clear_line_and_nothing_is_lost_or_left(tmp_path: Path, continued: bool) -> None:
    if continued:
        begin(make_config(tmp_path)).close()
    before = contents(tmp_path)
    child = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), "100"], capture_output=True, text=True, check=True
    )
    assert child.stdout == (
        f"the run directory {tmp_path / 'r'} cannot be written (File too large): free some space, or choose another"
        " output_dir\n"
    )
    assert contents(tmp_path) == before
    assert (tmp_path / "r").exists() == continued


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", unsupported)
    with pytest.raises(ConfigError, match="No locks available"):
        RunDirectory.open(make_config(tmp_path / "runs"))
    assert list(tmp_path.iterdir()) == []


def test_write_atomic_replaces_or_leaves_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"

    def failing(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"newer")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
