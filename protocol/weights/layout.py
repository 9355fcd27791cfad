"""A version's file mapped into memory: written once per version, read by whoever serves or loads it, never copied.

The mapping is a valid safetensors file at all times (its header never changes) and is used again for every later
version of the same layout: writing into pages that exist is several times faster than writing a fresh file. Who may
write when is its owner's business: a mapping that is being served, or loaded by an engine, is not written. This file
must not know sockets or torch; `torch.frombuffer` and `numpy.frombuffer` accept its views.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from protocol.errors import WeightsError
from protocol.parallel import in_threads
from protocol.versions import Version
from protocol.weights.adapters import AdapterSpec
from protocol.weights.manifest import Algorithm, Manifest, TensorEntry, block_digests
from protocol.weights.specs import MAX_HEADER_BYTES, Layout
from protocol.weights.staging import create_staging_file

__all__ = ["Layout", "MappedWeights", "build_manifest", "make_manifest", "map_file"]


class MappedWeights:
    """A safetensors file in memory. Views stay valid after `close`; the pages go with the last of them.

    Example:
        weights = MappedWeights.create(staging_path(directory), Layout(specs))
        torch.frombuffer(weights.view("w"), dtype=torch.float32).copy_(parameter.flatten())
    """

    def __init__(self, path: Path, layout: Layout, memory: memoryview) -> None:
        self.path = path
        self.layout = layout
        self._memory = memory

    @classmethod
    def create(cls, path: Path, layout: Layout) -> Self:
        """Create the file, mapped writable, with its header in place and every page present. The tensors are zero.

        Raises:
            WeightsError: no room, or the file cannot be created. Nothing is left behind.
        """
        descriptor = create_staging_file(path, layout.file_bytes)
        try:
            return cls.blank(path, layout, descriptor)
        finally:
            os.close(descriptor)  # the mapping keeps a duplicate, and with it the owner's lock

    @classmethod
    def blank(cls, path: Path, layout: Layout, descriptor: int) -> Self:
        """Map a file that was just created, and write its header."""
        memory = map_file(descriptor, layout.file_bytes, writable=True)
        memory[: len(layout.header)] = layout.header
        return cls(path, layout, memory)

    @classmethod
    def open(cls, path: Path, writable: bool = False) -> Self:
        """Map a file that exists, after checking its header and size. Its bytes are not verified: manifests do that.

        Raises:
            WeightsError: it cannot be read, or is not a safetensors file that we would load.
        """
        try:
            descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as error:
            raise WeightsError(f"cannot open the weights file {path}: {error.strerror}") from error
        try:
            layout = _read_layout(descriptor)
            return cls(path, layout, map_file(descriptor, layout.file_bytes, writable))
        except (OSError, ValueError) as error:
            raise WeightsError(f"{path} is not a safetensors file that can be loaded: {error}") from error
        finally:
            os.close(descriptor)

    def view(self, name: str) -> memoryview:
        """Return the tensor's bytes, [nbytes] uint8; writable if the mapping is. KeyError for an unknown name."""
        offset = self.layout.offset(name)
        return self._memory[offset : offset + self.layout.spec(name).nbytes]

    def bytes(self, offset: int, length: int) -> memoryview:
        """Return a read-only view of part of the file, header included."""
        return self._memory[offset : offset + length].toreadonly()

    def writable_bytes(self, offset: int, length: int) -> memoryview:
        """Return a writable view of part of the file, for bytes that arrive in file order."""
        return self._memory[offset : offset + length]

    def close(self) -> None:
        """Give the mapping up. The file stays."""
        self._memory.release()

    def remove(self) -> None:
        """Give the mapping up and delete the file."""
        self.path.unlink(missing_ok=True)
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def build_manifest(
    version: Version, mapped: MappedWeights, algorithm: Algorithm, adapter: AdapterSpec | None = None
) -> Manifest:
    """Hash every block of every tensor and name the result. Takes 0.1 s per GB and core: not for the event loop."""
    specs = sorted(mapped.layout.specs, key=lambda spec: -spec.nbytes)  # the longest last would be waited for alone
    hashed = in_threads(
        lambda spec: block_digests(algorithm, mapped.view(spec.name)), specs, nbytes=mapped.layout.file_bytes
    )
    digests = {specs[number].name: of_blocks for number, of_blocks in hashed}
    return make_manifest(version, mapped.layout, algorithm, digests, adapter)


def make_manifest(
    version: Version,
    layout: Layout,
    algorithm: Algorithm,
    digests: Mapping[str, Sequence[str]],
    adapter: AdapterSpec | None = None,
) -> Manifest:
    """Name a version whose blocks were hashed while they were written.

    Args:
        version: what it is called.
        layout: of its file.
        algorithm: of the digests.
        digests: by tensor, of each of its blocks in order (`block_digests`).
        adapter: what its tensors are, where they are not the whole model.
    """
    entries = (
        TensorEntry(spec, layout.offset(spec.name), spec.nbytes, tuple(digests[spec.name])) for spec in layout.specs
    )
    return Manifest(
        version=version, algorithm=algorithm, tensors=tuple(entries), file_bytes=layout.file_bytes, adapter=adapter
    )


def map_file(descriptor: int, file_bytes: int, writable: bool) -> memoryview:
    """Map the file with its pages already faulted in: a fault per 4 KiB would halve the first copy's speed."""
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    return memoryview(mmap.mmap(descriptor, file_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=protection))


def _read_layout(descriptor: int) -> Layout:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is not a regular file")
    prefix = os.pread(descriptor, 8, 0)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, found.st_size - 8):
        raise ValueError(f"{found.st_size} bytes with a header of {length}: at most {MAX_HEADER_BYTES} and the file")
    return Layout.parse(prefix + os.pread(descriptor, length, 8), found.st_size)
