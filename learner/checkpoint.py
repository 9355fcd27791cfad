"""Checkpoints: one directory per kept version, complete and verified or not there at all.

    checkpoints/
      LATEST               the name of the newest one, for people and scripts
      step-000010/         loads with AutoModelForCausalLM.from_pretrained
        ...                model and optimizer, written by the caller
        state.json         CheckpointState: everything else that a resumed run needs
        MANIFEST.json      size and BLAKE3 of every other file; written last
      step-000020.tmp/     being written, or being removed; means nothing
      step-000010.old/     exists only while the checkpoint of the same version is replaced

Order of a save: write the files, sync each, MANIFEST, sync, rename, sync, LATEST, and only then remove older ones. A
kill or a power cut between any two of these (FAILPOINTS) leaves the previous checkpoint loadable. Nothing here knows
tensors, and nothing is ever pickled.

*Newest* is by (incarnation, policy_version): after a fallback to an older checkpoint the orphaned branch's
step-000010 is older than the new branch's step-000007.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3
import msgspec
from safetensors import SafetensorError

from learner.durable import fsync_directory, fsync_file, write_atomic, write_synced
from learner.journal_records import IncarnationRecord, KnobRecord
from protocol.errors import HeadwayError

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
STATE, MANIFEST, LATEST = "state.json", "MANIFEST.json", "LATEST"
FAILPOINTS = (
    "started", "files_written", "state_written", "files_synced", "manifest_written", "moved_aside", "renamed",
    "rename_synced", "latest_replaced", "set_aside_for_removal", "removed",
)  # fmt: skip
"""Every point at which a save may die, in order; tests kill at each. moved_aside: only when a version is replaced."""
_NAME = re.compile(r"step-(\d{6,})(\.old)?")
UNREADABLE = (OSError, msgspec.DecodeError, UnicodeDecodeError)
"""What reading a damaged checkpoint may raise."""


class CheckpointError(HeadwayError, OSError):
    """A checkpoint cannot be written, or none can be read. Says what is left untouched."""


class CheckpointState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a resumed run needs beside model, optimizer and RNG (those are files of their own)."""

    run_id: str
    incarnation: int
    """The learner incarnation that saved it."""
    forks: tuple[tuple[int, int], ...]
    """`Lineage.forks`: (incarnation, its first policy_version)."""
    policy_version: int
    config_fingerprint: str
    ledger: Mapping[str, Any]
    """The ledger's own snapshot, cursor included: plain JSON values, opaque here."""
    counters: dict[str, int | float] = {}
    """Totals that go on counting after a restart: tokens trained, seconds, ..."""
    knobs: tuple[KnobRecord, ...] = ()
    """Every change of a live knob so far, in order."""
    incarnations: tuple[IncarnationRecord, ...] = ()
    """The beginnings of the lineage's learners, in order: the journal's own are pruned with its oldest segment."""


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file as it was written."""

    bytes: int
    blake3: str
    """64 hex digits."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """MANIFEST.json: proof that the directory is complete."""

    format_version: int = FORMAT_VERSION
    incarnation: int
    policy_version: int
    files: dict[str, FileEntry]
    """By path relative to the checkpoint, with forward slashes; all files but MANIFEST.json."""
    blake3: str = ""
    """Of the compact JSON of this manifest with this field empty."""

    def sealed(self) -> Manifest:
        """Fill in the manifest's own digest."""
        empty = msgspec.structs.replace(self, blake3="")
        return msgspec.structs.replace(self, blake3=blake3.blake3(msgspec.json.encode(empty)).hexdigest())


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose every byte verified."""

    path: Path
    policy_version: int
    state: CheckpointState
    refused: tuple[str, ...] = ()
    """Newer ones that were passed over: which, and why."""


def save_checkpoint(
    checkpoints_dir: Path,
    policy_version: int,
    write: Callable[[Path], None],
    state: CheckpointState,
    *,
    keep: int,
    estimate_bytes: int = 0,
    reached: Callable[[str], None] = lambda failpoint: None,
) -> Path:
    """Save one version durably, then remove those beyond the `keep` newest. Blocks: for a thread of its own.

    Args:
        checkpoints_dir: exists.
        policy_version: of the weights that `write` writes; a checkpoint of the same version is replaced.
        write: fills the directory it is given with model and optimizer files, subdirectories allowed.
        state: goes to state.json.
        keep: checkpoints that stay, this one included; at least 1.
        estimate_bytes: expected size, for the space check while there is no earlier checkpoint to judge by.
        reached: told each of FAILPOINTS as it is passed; tests die there.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: too little space, or the disk refused a write. Earlier checkpoints are untouched, and
            nothing half-written is left.
    """
    assert keep >= 1, f"keep {keep}"
    assert state.policy_version == policy_version, f"state of {state.policy_version} saved as {policy_version}"
    final = checkpoints_dir / f"step-{policy_version:06d}"
    temporary = final.with_name(f"{final.name}.tmp")
    try:
        remove_unfinished(checkpoints_dir)
        _require_space(checkpoints_dir, final.name, estimate_bytes)
        _write_files(temporary, write, state, reached)
        _put_in_place(temporary, final, reached)
        write_atomic(checkpoints_dir / LATEST, f"{final.name}\n".encode())
        reached("latest_replaced")
    except CheckpointError:
        raise
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {final} could not be written ({error}); earlier checkpoints are untouched"
        ) from error
    _remove_old(checkpoints_dir, final, keep, reached)
    return final


def latest_checkpoint(checkpoints_dir: Path) -> Checkpoint | None:
    """Find the newest checkpoint whose every file verifies. Damaged ones are logged and passed over, never removed.

    Returns:
        None when no checkpoint was ever completed.

    Raises:
        CheckpointError: there are some and none verifies; starting over silently would throw the run away.
    """
    refused: list[str] = []
    for path in _newest_first(checkpoints_dir, unreadable_first=True):
        try:
            state = verify_checkpoint(path)
        except UNREADABLE as error:
            refused.append(f"{path.name}: {error}")
            log.warning("checkpoint %s passed over: %s", path, error)
            continue
        if refused:
            log.warning("falling back to checkpoint %s", path)
        return Checkpoint(path, state.policy_version, state, tuple(refused))
    if refused:
        raise CheckpointError(
            f"no checkpoint in {checkpoints_dir} can be trusted: {'; '.join(refused)}. Put an intact copy back, or move"
            " the run directory away to start over"
        )
    return None


def read_manifest(path: Path) -> Manifest:
    """Read MANIFEST.json; the files themselves are not looked at.

    Raises:
        OSError: cannot be read (a CheckpointError says why).
        msgspec.DecodeError, UnicodeDecodeError: it is no manifest.
    """
    if not (path / MANIFEST).exists():
        raise CheckpointError(f"{MANIFEST} is missing")
    manifest = msgspec.json.decode((path / MANIFEST).read_bytes(), type=Manifest)
    if manifest.format_version != FORMAT_VERSION:
        raise CheckpointError(f"has format {manifest.format_version}, this headway reads {FORMAT_VERSION}")
    if manifest != manifest.sealed():
        raise CheckpointError(f"{MANIFEST} does not hash to what was written")
    return manifest


def read_state(path: Path) -> CheckpointState:
    """Read state.json, whatever became of the other files.

    Raises:
        OSError: it or the manifest cannot be read; as CheckpointError: is missing or has changed.
        msgspec.DecodeError, UnicodeDecodeError: MANIFEST.json is no manifest.
    """
    _verify_file(path, STATE, read_manifest(path).files[STATE])
    return msgspec.json.decode((path / STATE).read_bytes(), type=CheckpointState)


def verify_checkpoint(path: Path) -> CheckpointState:
    """Check every byte of a checkpoint.

    Raises:
        OSError: a file cannot be read; as CheckpointError: is missing, has changed, or bears the wrong name.
        msgspec.DecodeError, UnicodeDecodeError: MANIFEST.json is no manifest.
    """
    manifest = read_manifest(path)
    for name, entry in manifest.files.items():
        _verify_file(path, name, entry)
    named = int(path.name.removesuffix(".old").removeprefix("step-"))
    if named != manifest.policy_version:
        raise CheckpointError(f"holds policy_version {manifest.policy_version}, its name says {named}")
    return msgspec.json.decode((path / STATE).read_bytes(), type=CheckpointState)


def remove_unfinished(checkpoints_dir: Path) -> list[Path]:
    """Remove what a crash left: directories being written or removed, and replaced checkpoints.

    Returns:
        What was removed (each also logged).
    """
    stale = [path for path in checkpoints_dir.glob("step-*.tmp") if path.is_dir()]
    stale += [path for path in checkpoints_dir.glob("step-*.old") if path.with_suffix("").exists()]
    for path in stale:
        shutil.rmtree(path)
        log.warning("removed %s, left behind by a crash", path)
    return stale


def _require_space(checkpoints_dir: Path, name: str, estimate_bytes: int) -> None:
    """Refuse before the first byte when the disk has less room than the newest checkpoint takes."""
    previous = max((_size_bytes(path) for path in _newest_first(checkpoints_dir)[:1]), default=0)
    needed, free = max(previous, estimate_bytes), shutil.disk_usage(checkpoints_dir).free
    if free < needed:
        raise CheckpointError(
            f"checkpoint {checkpoints_dir / name} needs about {needed / 1e6:.0f} MB and the disk has"
            f" {free / 1e6:.0f} MB free: nothing was written, earlier checkpoints are untouched; free some space"
        )


def _write_files(
    temporary: Path, write: Callable[[Path], None], state: CheckpointState, reached: Callable[[str], None]
) -> None:
    """Fill `temporary` and sync all of it, MANIFEST last."""
    temporary.mkdir()
    reached("started")
    write(temporary)
    reached("files_written")
    write_synced(temporary / STATE, msgspec.json.format(msgspec.json.encode(state), indent=1))
    reached("state_written")
    # safetensors makes its files readable by their owner only; the run directory's own rule is the umask's.
    mode = (temporary / STATE).stat().st_mode
    entries: dict[str, FileEntry] = {}
    for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
        path.chmod(mode)
        fsync_file(path)
        entries[path.relative_to(temporary).as_posix()] = FileEntry(path.stat().st_size, _digest(path))
    reached("files_synced")
    manifest = Manifest(incarnation=state.incarnation, policy_version=state.policy_version, files=entries).sealed()
    write_synced(temporary / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    for directory in (temporary, *(p for p in temporary.rglob("*") if p.is_dir())):
        fsync_directory(directory)
    reached("manifest_written")


def _put_in_place(temporary: Path, final: Path, reached: Callable[[str], None]) -> None:
    """Give the complete directory its name. A checkpoint of that name stays loadable until then, as `.old`."""
    if final.exists():
        final.rename(final.with_name(f"{final.name}.old"))
        fsync_directory(final.parent)
        reached("moved_aside")
    temporary.rename(final)
    reached("renamed")
    fsync_directory(final.parent)
    reached("rename_synced")


def _remove_old(checkpoints_dir: Path, newest: Path, keep: int, reached: Callable[[str], None]) -> None:
    """Keep `newest` and the `keep - 1` newest others. What cannot be removed is logged: the save has succeeded."""
    others = [path for path in _newest_first(checkpoints_dir) if path != newest]
    replaced = [path for path in others if path.suffix == ".old"]
    beyond = [path for path in others if path.suffix != ".old"][keep - 1 :]
    for path in replaced + beyond:
        try:
            # Renamed first: killed half-way, it must not look like a damaged checkpoint.
            doomed = path.rename(path.with_name(f"{path.name}.tmp"))
            reached("set_aside_for_removal")
            shutil.rmtree(doomed)
            reached("removed")
        except OSError as error:
            log.warning("old checkpoint %s could not be removed: %s", path, error)


def _newest_first(checkpoints_dir: Path, *, unreadable_first: bool = False) -> list[Path]:
    """List all checkpoints by (incarnation, policy_version), intact or not.

    Without a readable MANIFEST one has no incarnation: it is the oldest when room is made, and the newest when an
    intact one is looked for, so that it is reported.
    """
    keys: dict[Path, tuple[float, int, bool]] = {}
    for path in checkpoints_dir.iterdir() if checkpoints_dir.exists() else ():  # not there before a run has begun
        if not (match := _NAME.fullmatch(path.name)):
            continue
        try:
            incarnation: float = read_manifest(path).incarnation
        except UNREADABLE:
            incarnation = math.inf if unreadable_first else -math.inf
        keys[path] = (incarnation, int(match[1]), match[2] is None)
    return sorted(keys, key=keys.__getitem__, reverse=True)


def _size_bytes(path: Path) -> int:
    try:
        return sum(entry.bytes for entry in read_manifest(path).files.values())
    except UNREADABLE:
        return 0


def _verify_file(checkpoint: Path, name: str, entry: FileEntry) -> None:
    file = checkpoint / name
    if not file.is_file():
        raise CheckpointError(f"{name} is missing")
    if (size := file.stat().st_size) != entry.bytes:
        raise CheckpointError(f"{name} has {size} bytes, {entry.bytes} were written")
    if _digest(file) != entry.blake3:
        raise CheckpointError(f"{name} does not hash to what was written")


def _digest(path: Path) -> str:
    digest = blake3.blake3()
    if os.path.getsize(path):
        digest.update_mmap(path)
    return digest.hexdigest()
