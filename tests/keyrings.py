"""Key files for tests: a learner, servers, and who knows whom."""

from __future__ import annotations

import os
from pathlib import Path

from protocol.keygen import write_pair
from protocol.security import Security, load_security


class Keyring:
    """A directory with the keys of a learner and of servers, and its allow-list."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.allowed = directory / "allowed_keys"
        self.allowed.write_text("")
        self.public: dict[str, str] = {}
        self.make("learner")

    @classmethod
    def of(cls, directory: Path) -> Keyring:
        """The keys that another process has made there."""
        ring = cls.__new__(cls)
        ring.directory, ring.allowed = directory, directory / "allowed_keys"
        ring.public = {path.stem: path.read_text().split()[0] for path in directory.glob("*.pub")}
        return ring

    def make(self, name: str) -> str:
        """Make a pair of keys, and return the public one."""
        line = write_pair(self.directory / f"{name}.key", self.directory / f"{name}.pub", name)
        self.public[name] = line.split()[0]
        return self.public[name]

    def allow(self, *names: str) -> None:
        """Let those servers in, and nobody else. The file is replaced, as editors do."""
        fresh = self.allowed.with_suffix(".new")
        fresh.write_text("".join((self.directory / f"{name}.pub").read_text() for name in names))
        os.replace(fresh, self.allowed)

    def trust(self, *names: str) -> Path:
        """A server's list of the learner's public keys."""
        path = self.directory / "learner_keys"
        path.write_text("".join((self.directory / f"{name}.pub").read_text() for name in names))
        return path

    def listening(self, name: str = "learner") -> Security:
        """Of a process that listens with that key."""
        return load_security(key=self.directory / f"{name}.key", allowed_keys=self.allowed)

    def dialing(self, name: str, learner: str = "learner") -> Security:
        """Of a process with that key that knows that learner."""
        if name not in self.public:
            self.make(name)
        return load_security(key=self.directory / f"{name}.key", learner_key=self.directory / f"{learner}.pub")
