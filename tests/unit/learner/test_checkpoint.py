"""Checkpoints: complete or absent, whatever point a save dies at; damage is seen, named and passed over."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from learner import checkpoint as module
from learner.checkpoint import (
    FAILPOINTS,
    Checkpoint,
    CheckpointError,
    CheckpointState,
    latest_checkpoint,
    remove_unfinished,
    save_checkpoint,
)


def make_state(policy_version: int, *, incarnation: int = 1, **changes: Any) -> CheckpointState:
    fields: dict[str, Any] = {
        "run_id": "r" * 32,
        "incarnation": incarnation,
        "forks": ((1, 0),),
        "policy_version": policy_version,
        "config_fingerprint": "c" * 64,
        "ledger": {"cursor": 12, "entries": [[3, 4], [5, 6]], "ends": {"trained": 7}},
        "counters": {"tokens_trained": 123, "wall_s": 4.5},
    }
    return CheckpointState(**{**fields, **changes})


def fill(path: Path) -> None:
    """Write what a model would: two files and one in a subdirectory."""
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 4)
    (path / "config.json").write_text("{}")
    (path / "optimizer").mkdir()
    (path / "optimizer" / "moments.safetensors").write_bytes(b"m" * 100)


def save(root: Path, version: int, *, keep: int = 2, incarnation: int = 1, **changes: Any) -> Path:
    return save_checkpoint(root, version, fill, make_state(version, incarnation=incarnation), keep=keep, **changes)


def latest(root: Path) -> Checkpoint:
    found = latest_checkpoint(root)
    assert found is not None
    return found


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def die_in_child(action: Callable[[], object]) -> int:
    """Run `action` in a forked child and return the signal that killed it (0: it ended by itself)."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def kill_at(failpoint: str) -> Callable[[str], None]:
    def reached(name: str) -> None:
        if name == failpoint:
            os.kill(os.getpid(), signal.SIGKILL)

    return reached


def test_what_is_saved_is_found_again(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    found = latest(tmp_path)
    assert (path, path.name) == (found.path, "step-000010")
    assert found.state == make_state(10)
    assert (found.policy_version, found.refused) == (10, ())
    assert (path / "optimizer" / "moments.safetensors").read_bytes() == b"m" * 100
    assert (tmp_path / "LATEST").read_text() == "step-000010\n"


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    (tmp_path / "step-000003.tmp").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert latest_checkpoint(tmp_path) is None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for version in (5, 10, 15, 20):
        save(tmp_path, version, keep=2)
    assert names(tmp_path) == ["LATEST", "step-000015", "step-000020"]
    save(tmp_path, 25, keep=1)
    assert names(tmp_path) == ["LATEST", "step-000025"]


def test_newest_is_by_incarnation_first(tmp_path: Path) -> None:
    """Incarnation 1 reached 10 and was orphaned; incarnation 2 went on from 5: its 7 is the newer."""
    save(tmp_path, 5, keep=9)
    save(tmp_path, 10, keep=9)
    save(tmp_path, 7, keep=2, incarnation=2)
    assert latest(tmp_path).policy_version == 7
    assert names(tmp_path) == ["LATEST", "step-000007", "step-000010"]
    save(tmp_path, 8, keep=2, incarnation=2)
    assert names(tmp_path) == ["LATEST", "step-000007", "step-000008"]


def test_what_was_just_saved_is_never_removed(tmp_path: Path) -> None:
    save(tmp_path, 10, keep=1)
    save(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["LATEST", "step-000005"]


def test_the_same_version_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save_checkpoint(tmp_path, 10, fill, make_state(10, counters={"again": 1}), keep=2)
    assert latest(tmp_path).state.counters == {"again": 1}
    assert names(tmp_path) == ["LATEST", "step-000010"]


@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_killed_at_every_point_an_intact_checkpoint_stays(tmp_path: Path, failpoint: str) -> None:
    """Save 5 and 10, then replace 10 with keep=1 (passes every failpoint) and die at one of them."""
    save(tmp_path, 5, keep=2)
    save(tmp_path, 10, keep=2)
    replacement = make_state(10, incarnation=2, counters={"again": 1})
    died_of = die_in_child(lambda: save_checkpoint(tmp_path, 10, fill, replacement, keep=1, reached=kill_at(failpoint)))
    assert died_of == signal.SIGKILL, f"{failpoint} was not reached"
    found = latest(tmp_path)
    assert found.policy_version == 10
    assert found.refused == (), "a kill never leaves what looks like damage"
    committed = FAILPOINTS.index(failpoint) >= FAILPOINTS.index("renamed")
    assert found.state == (replacement if committed else make_state(10))
    remove_unfinished(tmp_path)
    assert latest(tmp_path).state == found.state
    save(tmp_path, 15, keep=1, incarnation=3)
    assert names(tmp_path) == ["LATEST", "step-000015"]


@pytest.mark.parametrize("failpoint", FAILPOINTS[: FAILPOINTS.index("moved_aside")])
def test_killed_in_the_first_save_there_is_none(tmp_path: Path, failpoint: str) -> None:
    assert die_in_child(lambda: save(tmp_path, 5, reached=kill_at(failpoint))) == signal.SIGKILL
    assert latest_checkpoint(tmp_path) is None
    assert [path.name for path in remove_unfinished(tmp_path)] == ["step-000005.tmp"]


def test_what_a_killed_save_left_does_not_stop_the_next_one(tmp_path: Path) -> None:
    assert die_in_child(lambda: save(tmp_path, 5, reached=kill_at("files_written"))) == signal.SIGKILL
    assert names(tmp_path) == ["step-000005.tmp"]
    save(tmp_path, 5)
    assert names(tmp_path) == ["LATEST", "step-000005"]


def test_half_removed_is_not_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while an old checkpoint is being removed: what is left of it must not pass for a damaged one."""
    save(tmp_path, 5)

    def killed_half_way(path: Path, **_: object) -> None:
        (path / "config.json").unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(module.shutil, "rmtree", killed_half_way)
    assert die_in_child(lambda: save(tmp_path, 10, keep=1)) == signal.SIGKILL
    assert names(tmp_path) == ["LATEST", "step-000005.tmp", "step-000010"]


def test_every_failpoint_is_passed_in_order(tmp_path: Path) -> None:
    save(tmp_path, 10)
    passed: list[str] = []
    save(tmp_path, 10, reached=passed.append)
    assert tuple(passed) == FAILPOINTS


def test_everything_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills leave the page cache alone; against a power cut only the order of syncs and renames helps."""
    events: list[str] = []
    fsync = os.fsync

    def logged_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path).as_posix())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    save(tmp_path, 10, reached=lambda failpoint: events.append(f"<{failpoint}>"))
    before_rename = events[: events.index("<renamed>")]
    files = ["model.safetensors", "config.json", "optimizer/moments.safetensors", "state.json", "MANIFEST.json"]
    assert {f"step-000010.tmp/{name}" for name in files} <= set(before_rename)
    assert {"step-000010.tmp", "step-000010.tmp/optimizer"} <= set(before_rename)
    assert before_rename.index("step-000010.tmp/MANIFEST.json") > before_rename.index("<files_synced>")
    assert events[events.index("<renamed>") + 1] == ".", "the name itself, before LATEST points at it"
    assert events[events.index("<rename_synced>") + 1 :] == ["LATEST.tmp", ".", "<latest_replaced>"]


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "MANIFEST.json", "optimizer/moments.safetensors"])
def test_a_flipped_byte_is_found_wherever_it_is(tmp_path: Path, name: str) -> None:
    save(tmp_path, 5)
    file = save(tmp_path, 10) / name
    intact = file.read_bytes()
    for position in range(0, len(intact), 7):
        damaged = bytearray(intact)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        found = latest(tmp_path)
        if found.policy_version == 10:  # white space in MANIFEST.json: the meaning is untouched
            assert name == "MANIFEST.json"
            assert damaged[position] in b"\n " or intact[position : position + 1].isspace()
            continue
        assert found.policy_version == 5
        assert found.refused[0].startswith("step-000010: ")


def test_the_fallback_says_which_and_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 5)
    newest = save(tmp_path, 10)
    (newest / "model.safetensors").write_bytes(b"x" * 1024)
    with caplog.at_level(logging.WARNING):
        found = latest(tmp_path)
    assert found.refused == ("step-000010: model.safetensors does not hash to what was written",)
    assert "step-000010 passed over" in caplog.text
    assert f"falling back to checkpoint {tmp_path / 'step-000005'}" in caplog.text
    assert newest.exists(), "evidence stays"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / "config.json").unlink(), "config.json is missing"),
        (lambda path: (path / "config.json").write_text("{"), "config.json has 1 bytes, 2 were written"),
        (lambda path: (path / "MANIFEST.json").unlink(), "MANIFEST.json is missing"),
        (lambda path: (path / "MANIFEST.json").write_text("{}"), "missing required field"),
        (lambda path: shutil.rmtree(path / "optimizer"), "optimizer/moments.safetensors is missing"),
        (lambda path: path.rename(path.with_name("step-000011")), "holds policy_version 10, its name says 11"),
    ],
)
def test_every_kind_of_damage_has_its_reason(tmp_path: Path, damage: Callable[[Path], object], reason: str) -> None:
    save(tmp_path, 5)
    damage(save(tmp_path, 10))
    found = latest(tmp_path)
    assert found.policy_version == 5
    assert reason in found.refused[0]


def test_another_format_is_refused_by_number(tmp_path: Path) -> None:
    save(tmp_path, 5)
    manifest = save(tmp_path, 10) / "MANIFEST.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"format_version": 1', b'"format_version": 2'))
    assert latest(tmp_path).refused == ("step-000010: has format 2, this headway reads 1",)


def test_when_none_verifies_the_run_does_not_start_over(tmp_path: Path) -> None:
    for version in (5, 10):
        (save(tmp_path, version) / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* step-000010: .*; step-000005: .*start over"):
        latest_checkpoint(tmp_path)


def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (save(tmp_path, 10) / "MANIFEST.json").unlink()
    save(tmp_path, 15, keep=2)
    assert names(tmp_path) == ["LATEST", "step-000005", "step-000015"]


def test_too_little_space_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    save(tmp_path, 5)
    with pytest.raises(CheckpointError, match=r"step-000010 needs about \d+ MB and the disk has \d+ MB free"):
        save(tmp_path, 10, estimate_bytes=1 << 60)
    assert names(tmp_path) == ["LATEST", "step-000005"]


def test_space_is_judged_by_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(path.stat().st_size for path in save(tmp_path, 5).rglob("*") if path.is_file())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=size // 2))
    with pytest.raises(CheckpointError, match="earlier checkpoints are untouched; free some space"):
        save(tmp_path, 10)
    assert latest(tmp_path).policy_version == 5


def test_a_disk_that_fills_up_leaves_nothing_half_written(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        (path / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    save(tmp_path, 5)
    with pytest.raises(CheckpointError, match=r"step-000010 could not be written \(.*No space left on device\)"):
        save_checkpoint(tmp_path, 10, full, make_state(10), keep=2)
    assert names(tmp_path) == ["LATEST", "step-000005"]
    save(tmp_path, 10)
    assert latest(tmp_path).policy_version == 10


def test_a_directory_that_went_away_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"step-000010 could not be written \(.*No such file or directory"):
        save(tmp_path / "gone", 10)


def test_a_bug_of_the_writer_is_not_dressed_up_as_a_full_disk(tmp_path: Path) -> None:
    def broken(path: Path) -> None:
        raise TypeError("not a tensor")

    with pytest.raises(TypeError, match="not a tensor"):
        save_checkpoint(tmp_path, 10, broken, make_state(10), keep=2)
    assert latest_checkpoint(tmp_path) is None


def test_an_old_one_that_cannot_be_removed_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 5)

    def busy(path: Path, **_: object) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(module.shutil, "rmtree", busy)
    with caplog.at_level(logging.WARNING):
        save(tmp_path, 10, keep=1)
    assert "could not be removed" in caplog.text
    assert latest(tmp_path).policy_version == 10


def test_files_get_the_mode_of_their_directory_not_of_their_library(tmp_path: Path) -> None:
    def private(path: Path) -> None:
        (path / "model.safetensors").touch(mode=0o600)

    path = save_checkpoint(tmp_path, 10, private, make_state(10), keep=1)
    assert {file.stat().st_mode for file in path.iterdir()} == {(path / "state.json").stat().st_mode}


def test_the_state_is_plain_json(tmp_path: Path) -> None:
    plain = msgspec.json.decode((save(tmp_path, 10) / "state.json").read_bytes())
    assert plain["ledger"] == {"cursor": 12, "entries": [[3, 4], [5, 6]], "ends": {"trained": 7}}
    assert plain["forks"] == [[1, 0]]
