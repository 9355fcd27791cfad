"""Key files: the secret key of a process, and lists of the public keys that it knows.

    NAME.key   a line `secret-key KEY`, readable by its owner alone (0600). Never leaves its host
    NAME.pub   a line `KEY NAME`: what others put into their lists
    a list     any number of such lines; what comes after the key names its owner, and may be left out

KEY is 32 bytes of Curve25519 in Z85 (rfc.zeromq.org/spec/32): 40 printable characters. Lines that are empty or begin
with `#` are comments (no key does: its first five characters would be above 2**32). A list is read again when its file
changes. This file knows nothing of sockets.
"""

from __future__ import annotations

import logging
import os
import re
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final, Self

import zmq
from zmq.utils import z85

from protocol.errors import ConfigError
from protocol.logs import event

log = logging.getLogger(__name__)

KEY_CHARACTERS: Final = 40
SECRET: Final = "secret-key"  # noqa: S105 - the word before one
MAX_FILE_BYTES: Final = 1 << 20
_Z85: Final = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_HOW: Final = "`headway-learner keygen DIR` and `headway-server keygen DIR` make one"

Signature = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class KeyPair:
    """What a process proves itself with."""

    public: str
    secret: bytes = field(repr=False)
    """Z85, as ZeroMQ takes it. In no log, no message and no file but its own."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a secret key; its public key follows from it.

        Raises:
            ConfigError: no such file, others may read it, or it holds no secret key, which is not repeated.
        """
        try:
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode & 0o777
                text = file.read(MAX_FILE_BYTES).decode("ascii", "replace")
        except OSError as error:
            raise ConfigError(f"key {path}: {error.strerror}; {_HOW}") from None
        if mode & 0o077:
            raise ConfigError(f"key {path}: others than its owner may read it (mode {mode:04o}): chmod 600 {path}")
        lines = [line.split() for line in text.splitlines() if not is_comment(line)]
        if len(lines) != 1 or len(lines[0]) != 2 or lines[0][0] != SECRET or not is_key(lines[0][1]):
            raise ConfigError(
                f"key {path}: holds no secret key, which is one line `{SECRET} KEY`: name the file that ends in .key"
                f" ({_HOW})"
            )
        secret = lines[0][1].encode()
        return cls(zmq.curve_public(secret).decode(), secret)


class PublicKeys:
    """A list of public keys, read again when its file changes. May be used from any thread."""

    def __init__(self, path: Path, setting: str) -> None:
        """Read the file that the user named in `setting`.

        Raises:
            ConfigError: it cannot be read, anybody may write it, or a line is no key.
        """
        self.path = path
        self._setting = setting
        self._lock = threading.Lock()
        self._signature: Signature | None = None
        self._names: Mapping[str, str] = MappingProxyType({})
        self._signature, self._names = self._load()

    @property
    def names(self) -> Mapping[str, str]:
        """Public key to its owner's name, which may be empty; in the order of the file. Replaced, never changed."""
        return self._names

    def owner(self, key: str) -> str:
        """Who has that key: its name, or the key itself. Two keys of one name, as in a rotation, have one owner."""
        return self._names.get(key) or key

    def knows(self, owner: str) -> bool:
        """Whether any key of the list has that owner."""
        names = self._names
        return owner in names or owner in names.values()

    def refresh(self) -> None:
        """Read the file again if it changed. What cannot be read is said once, and the list stays as it was."""
        with self._lock:
            try:
                signature = _signature(self.path.stat())
            except OSError:
                signature = None  # being replaced, perhaps
            if signature == self._signature:
                return
            self._signature = signature
            try:
                self._signature, self._names = self._load()
            except ConfigError as error:
                event(log, "keys_not_read", level=logging.WARNING, text=f"{error}; the keys read before stay in force")
            else:
                event(log, "keys_read", file=self.path, keys=len(self._names))

    def _load(self) -> tuple[Signature, Mapping[str, str]]:
        where = f"{self._setting} {self.path}"
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                text = file.read(MAX_FILE_BYTES).decode("utf-8", "replace")
        except OSError as error:
            raise ConfigError(f"{where}: {error.strerror}; it lists public keys, one a line") from None
        if stat.st_mode & 0o002:
            raise ConfigError(f"{where}: anybody may write it (mode {stat.st_mode & 0o777:04o}): chmod o-w {self.path}")
        return _signature(stat), MappingProxyType(parse_public_keys(text, where))


class TrustedKeys(PublicKeys):
    """The public keys that a learner may have: more than one while its key is being changed. For one thread."""

    def __init__(self, path: Path, setting: str) -> None:
        super().__init__(path, setting)
        if not self.names:
            raise ConfigError(f"{setting} {path}: has no key; it is the .pub file that the learner's keygen wrote")
        self._current = next(iter(self.names))

    @property
    def current(self) -> str:
        """The one to connect with: the first, or the one after those that failed."""
        if self._current not in self.names:
            self._current = next(iter(self.names), self._current)
        return self._current

    def turn(self) -> bool:
        """The current one failed: take the next, also of a file that has changed. False: all have had their turn."""
        self.refresh()
        keys = [*self.names] or [self._current]
        place = keys.index(self._current) + 1 if self._current in keys else 0
        self._current = keys[place % len(keys)]
        return place < len(keys)


def parse_public_keys(text: str, where: str) -> dict[str, str]:
    """Read a list: key to name.

    Raises:
        ConfigError: names the line, and never repeats it.
    """
    names: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if is_comment(line):
            continue
        key, *rest = line.split(maxsplit=1)
        if key == SECRET:
            raise ConfigError(
                f"{where} line {number}: a secret key does not belong here: take the file that ends in .pub"
            )
        if not is_key(key):
            raise ConfigError(
                f"{where} line {number}: must begin with a public key, {KEY_CHARACTERS} characters as keygen wrote it"
            )
        names[key] = " ".join(rest[0].split()) if rest else ""
    return names


def is_comment(line: str) -> bool:
    """Whether a line says nothing."""
    return not line.strip() or line.lstrip().startswith("#")


def is_key(text: str) -> bool:
    """Whether that is a key in Z85."""
    if not _Z85.fullmatch(text):
        return False
    try:
        z85.decode(text.encode())
    except struct.error:  # five characters above 2**32
        return False
    return True


def _signature(stat: os.stat_result) -> Signature:
    return stat.st_mtime_ns, stat.st_ino, stat.st_size
