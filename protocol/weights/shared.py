"""One version in the memory of one host: written by the learner, read where it lies by the servers beside it.

    learner   begin: claim alone, name without version --> write, hash --> finish: name with version, claim dropped
    server    claim: open by the announced name, claim beside others, same name still? --> verify, load --> release

A buffer is a file of the staging directory (staging.py) in safetensors layout, mapped once by everyone who uses it and
written again for later versions: pages that exist and are mapped already are what makes it fast. The version word is
the end of the file's *name*, `weights-PID-HEX-INCARNATION.POLICY_VERSION.safetensors`: it is flipped last, by a rename,
and taken away first, so that an announced name leads to its version or to nothing. A claim (claims.py) keeps it so: a
file that a reader has claimed is neither renamed nor written, and one being written cannot be claimed. What dies lets
go of its claims. None of this is believed about the bytes: whoever reads them compares them with the manifest (I5).

This file must not know sockets, engines or training. A `SharedBuffer` and a `SharedReader` are each used by one thread
at a time.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from protocol.errors import WeightsError
from protocol.versions import Version
from protocol.weights.claims import claim_alone, claim_shared, drop_claim
from protocol.weights.layout import Layout, MappedWeights, map_file
from protocol.weights.staging import create_staging_file, disown, remove_if_left, staging_path

_NAME = re.compile(r"weights-[0-9]{1,10}-[0-9a-f]{8}-[0-9]{1,10}\.[0-9]{1,10}\.safetensors")
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW


class SharedBuffer:
    """The writer's end: one file, in turn written alone and offered to readers.

    Example:
        buffer = SharedBuffer.create(directory, layout)
        if buffer.begin():
            ...                                    # write into buffer.mapped, hash it
            buffer.finish(version)                 # from here on buffer.name may be announced
    """

    def __init__(self, mapped: MappedWeights, descriptor: int) -> None:
        self.mapped = mapped
        self.version: Version | None = None
        """What it holds; None while it holds nothing whole."""
        self.being_written = False
        self._descriptor = descriptor
        """Carries the owner's lock, and the claims."""
        self._blank = mapped.path

    @classmethod
    def create(cls, directory: Path, layout: Layout) -> Self:
        """Create the file in a directory that `clean_staging` made. It holds nothing, and nobody can read it yet.

        Raises:
            WeightsError: no room, or the file cannot be created. Nothing is left behind.
        """
        path = staging_path(directory)
        descriptor = create_staging_file(path, layout.file_bytes)
        return cls(MappedWeights.blank(path, layout, descriptor), descriptor)

    @property
    def name(self) -> str:
        """What to announce; empty where there is nothing to be had."""
        return self.mapped.path.name if self.version is not None else ""

    def begin(self) -> bool:
        """Take it back for writing. False: a reader in another process has claimed it."""
        if not claim_alone(self._descriptor):
            return False
        self.version, self.being_written = None, True
        self._rename(self._blank)
        return True

    def finish(self, version: Version) -> None:
        """Offer it to readers: the tensors are those of `version`, whole. After `begin`."""
        stem = self._blank.name.removesuffix(self._blank.suffix)
        if self._rename(self._blank.with_name(f"{stem}-{version}{self._blank.suffix}")):
            self.version = version
        self.being_written = False
        drop_claim(self._descriptor)

    def remove(self) -> None:
        """Give the mapping up and delete the file; what a reader has claimed, the last of them deletes.

        Its engine may be about to open it, and some engines die of a file that is gone.
        """
        drop_claim(self._descriptor)
        disown(self._descriptor)  # somebody here may have views of it still, and so a duplicate
        os.close(self._descriptor)
        self.mapped.close()
        remove_if_left(self.mapped.path)

    def _rename(self, target: Path) -> bool:
        """Name the file anew. False: somebody has deleted it; the mapping still serves whoever fetches."""
        try:
            os.rename(self.mapped.path, target)
        except FileNotFoundError:
            return False
        self.mapped.path = target
        return True


@dataclass(slots=True)
class _Known:
    """A file that this process has mapped: the same for all versions that are written into it."""

    descriptor: int
    mapped: MappedWeights


class SharedReader:
    """A reader's end: maps each of the learner's files once, and claims at most one of them for the next load.

    Args:
        directory: this process's own staging directory, made by `clean_staging`: nothing outside it is opened.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[tuple[int, int], _Known] = {}
        """By device and inode, which stay when the name changes."""
        self._claimed: _Known | None = None
        self._doubted: list[_Known] = []

    def claim(self, name: str, layout: Layout) -> MappedWeights:
        """Claim the file announced as `name`, in place of what is claimed so far. Its bytes are not verified here.

        Args:
            name: as announced, by whomever.
            layout: what the file must be laid out as.

        Returns:
            The file, mapped for reading: nobody writes it until `release`, `settle` or `close`.

        Raises:
            WeightsError: it is not here, not (or no longer) to be read, not this user's, or of another layout.
        """
        self.release()
        if self._doubted:
            raise WeightsError("an engine may still be reading the version before: its load was given up")
        if not _NAME.fullmatch(name):
            raise WeightsError(f"the announced name of {len(name)} characters is no name of a version's file")
        path = self._directory / name
        known = self._open(path, layout)
        if not claim_shared(known.descriptor):
            raise WeightsError(f"{name} is being written")
        self._claimed = known
        try:
            _check_still_named(path, known.descriptor)
            if known.mapped.bytes(0, len(layout.header)) != layout.header:
                raise WeightsError(f"{name} has another header than the manifest implies")
        except WeightsError:
            self.release()
            raise
        known.mapped.path = path
        return known.mapped

    def release(self) -> None:
        """Give up what is claimed: nobody will load it, or it is loaded."""
        if self._claimed is not None:
            self._let_go(self._claimed)
        self._claimed = None

    def doubt(self) -> None:
        """Keep what is claimed until `settle`: a load of it was given up, and may still be reading."""
        if self._claimed is not None:
            self._doubted.append(self._claimed)
        self._claimed = None

    def settle(self) -> None:
        """Give up everything claimed: the engine has finished a load, and so whatever it began before."""
        self.release()
        while self._doubted:
            self._let_go(self._doubted.pop())

    def close(self) -> None:
        """Give up everything claimed and mapped."""
        self.settle()
        for key in list(self._known):
            self._forget(key)

    def _open(self, path: Path, layout: Layout) -> _Known:
        for key, known in list(self._known.items()):
            if os.fstat(known.descriptor).st_nlink == 0:
                self._forget(key)  # deleted, with its learner: only this mapping keeps its memory
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | _FLAGS)  # else a pipe would hold us up
        except OSError as error:
            why = "it is not here" if error.errno == errno.ENOENT else error.strerror
            raise WeightsError(f"{path.name} cannot be opened in {path.parent}: {why}") from error
        try:
            found = os.fstat(descriptor)
            _check_file(path.name, found, layout.file_bytes)
            key = found.st_dev, found.st_ino
            if key not in self._known:
                mapped = MappedWeights(path, layout, map_file(descriptor, layout.file_bytes, writable=False))
                self._known[key] = _Known(os.dup(descriptor), mapped)
        except OSError as error:
            raise WeightsError(f"{path.name} cannot be mapped: {error.strerror}") from error
        finally:
            os.close(descriptor)
        return self._known[key]

    def _let_go(self, known: _Known) -> None:
        drop_claim(known.descriptor)
        remove_if_left(known.mapped.path)  # its learner may have died meanwhile, and nobody else knows of it

    def _forget(self, key: tuple[int, int]) -> None:
        known = self._known.pop(key)
        os.close(known.descriptor)
        known.mapped.close()


def _check_file(name: str, found: os.stat_result, file_bytes: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise WeightsError(f"{name} is not a regular file")
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise WeightsError(
            f"{name} is owned by user {found.st_uid}, mode {stat.S_IMODE(found.st_mode):04o}: expected user"
            f" {os.geteuid()} and 0600"
        )
    if found.st_size != file_bytes:
        raise WeightsError(f"{name} has {found.st_size} bytes, its manifest describes {file_bytes}")


def _check_still_named(path: Path, descriptor: int) -> None:
    """With the claim held: it may have been written again between open and claim, and has another name then."""
    try:
        now = os.stat(path, follow_symlinks=False)
    except OSError as error:
        raise WeightsError(f"{path.name} holds that version no longer") from error
    if not os.path.samestat(now, os.fstat(descriptor)):
        raise WeightsError(f"{path.name} is another file by now")
