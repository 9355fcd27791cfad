"""Writes a run's `weights/`. Nothing of it takes part in recovery: lines are flushed, not synced.

A version's directory is complete or not there: it is made under another name and renamed. A disk that refuses ends the
keeping, with one error in the log, and not the run.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import blake3
import msgspec

from learner.deltas import MadeDelta
from protocol.logs import event
from protocol.messages import WeightsLive
from protocol.versions import Version
from protocol.weights.manifest import Algorithm, Manifest

log = logging.getLogger(__name__)

VERSIONS, MANIFEST, DELTA, DATA = "versions.jsonl", "manifest.json", "delta.json", "delta.bin"


class PublishedRow(msgspec.Struct, frozen=True, kw_only=True, tag_field="what", tag="published"):
    """A version was published."""

    version: Version
    bytes: int
    """Of its file."""
    density: float | None
    """Share of the elements that it changed, counted or by a sample; None: nobody looked."""
    delta_bytes: int | None
    """Of the delta from the version before; None: none was made."""
    snapshot_s: float
    hash_s: float
    delta_s: float
    """Comparing and encoding."""
    digest: str = ""
    """Of all its bytes: `version_digest`; empty in what an older headway wrote."""


class LiveRow(msgspec.Struct, frozen=True, kw_only=True, tag_field="what", tag="live"):
    """A server brought a version live."""

    version: Version
    server: str
    path: str
    bytes: int
    transfer_s: float
    verify_s: float
    pause_s: float
    check_s: float


class WeightsArchive:
    """A run's `weights/` directory.

    Args:
        directory: made if it is not there.
        keep_versions: whose deltas are kept; 0: of none.
    """

    def __init__(self, directory: Path, keep_versions: int) -> None:
        self.directory = directory
        self.keep_versions = keep_versions
        self._refused = False
        directory.mkdir(exist_ok=True)
        for unfinished in directory.glob("*.tmp"):
            shutil.rmtree(unfinished)
        if (directory / VERSIONS).exists():
            _cut_torn_line(directory / VERSIONS)

    def published(self, row: PublishedRow, manifest: Manifest, made: MadeDelta | None) -> None:
        """Keep a version. On a thread of its own."""
        self._append(row)
        if self.keep_versions and not self._refused:
            try:
                self._keep(manifest, made)
            except OSError as error:
                self._give_up(error)

    def _keep(self, manifest: Manifest, made: MadeDelta | None) -> None:
        final = self.directory / str(manifest.version)
        temporary = final.with_name(f"{final.name}.tmp")
        temporary.mkdir()
        (temporary / MANIFEST).write_bytes(manifest.to_json())
        if made is not None:
            (temporary / DELTA).write_bytes(msgspec.json.encode(made.manifest))
            (temporary / DATA).write_bytes(made.data)
        temporary.rename(final)
        for version in kept_versions(self.directory)[: -self.keep_versions]:
            shutil.rmtree(self.directory / str(version))

    def live(self, server: str, report: WeightsLive) -> None:
        """Take note of what a version took at a server. On the event loop: one short line."""
        self._append(
            LiveRow(
                version=report.version, server=server, path=report.path, bytes=report.bytes,
                transfer_s=report.transfer_s, verify_s=report.verify_s, pause_s=report.pause_s, check_s=report.check_s,
            )
        )  # fmt: skip

    def _append(self, row: PublishedRow | LiveRow) -> None:
        if self._refused:
            return
        try:
            with (self.directory / VERSIONS).open("ab") as file:
                file.write(msgspec.json.encode(row) + b"\n")
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._refused = True
        text = f"{self.directory} keeps nothing more of this run's versions: {error.strerror}; the run goes on"
        event(log, "weights_not_kept", level=logging.ERROR, reason=text)


def version_digest(algorithm: Algorithm, digests: Mapping[str, Sequence[str]]) -> str:
    """Reduce the digests of a version's blocks, by tensor, to one; of two algorithms they are never equal."""
    content = msgspec.json.encode({name: list(blocks) for name, blocks in digests.items()}, order="sorted")
    return f"{algorithm}:{blake3.blake3(content).hexdigest(16)}"


def _cut_torn_line(path: Path) -> None:
    """Cut what a crash has left of a line, so that the next one begins anew."""
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def kept_versions(directory: Path) -> list[Version]:
    """Return the versions that have a directory, in order."""
    found = []
    for path in directory.iterdir():
        incarnation, dot, policy_version = path.name.partition(".")
        if dot and incarnation.isdigit() and policy_version.isdigit():
            found.append(Version(int(incarnation), int(policy_version)))
    return sorted(found)


def read_rows(directory: Path) -> list[PublishedRow | LiveRow]:
    """Read versions.jsonl, but for a last line that a crash has torn.

    Raises:
        OSError: it cannot be read.
        msgspec.DecodeError: it is something else.
    """
    lines: list[Any] = (directory / VERSIONS).read_bytes().split(b"\n")[:-1]
    return [msgspec.json.decode(line, type=PublishedRow | LiveRow) for line in lines]
