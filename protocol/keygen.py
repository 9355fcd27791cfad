"""`headway-learner keygen DIR` and `headway-server keygen DIR`: make a pair of keys, and say what to do with each.

The secret key stays on the host where it was made; the public one is copied to the other side, by whatever way tells
the two apart from a stranger's (it need not be secret, only be the right one).
"""

from __future__ import annotations

import argparse
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NoReturn

from protocol.errors import ConfigError
from protocol.keys import SECRET

Side = Literal["learner", "server"]
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
NEXT = {
    "learner": """\
On each rollout server's host: copy {public} there and name it, --learner-key {public_name}
Here: start the learner with --key {secret} --allowed-keys FILE, FILE being the lines of the servers' .pub files.
""",
    "server": """\
On the learner's host: append that line (it is all of {public}) to the file that --allowed-keys names there;
a learner that runs takes it up by itself.
Here: start the server with --key {secret} --learner-key FILE, FILE being the learner's .pub file.
""",
}


class _Parser(argparse.ArgumentParser):
    """Mistakes are one line, as everywhere."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"keygen: {message}")


def keygen(argv: Sequence[str], *, prog: str, side: Side) -> int:
    """Write NAME.key and NAME.pub into a directory and print what to do with them; return the exit code.

    Raises:
        ConfigError: a flag is wrong, or one of the files exists or cannot be written. Nothing is left half-written.
        SystemExit: with code 0, after --help.
    """
    parser = _Parser(prog=prog, description="Make a secret key, and the public key that the other side is given.")
    parser.add_argument("directory", metavar="DIR", type=Path, help="where both files go; it is made if need be")
    name = "learner" if side == "learner" else _plain(socket.gethostname())
    parser.add_argument("--name", default=name, help="of the files, and of the owner in lists (default: %(default)s)")
    given = parser.parse_args(argv)
    if not _NAME.fullmatch(given.name):
        raise ConfigError(f"keygen: --name {given.name!r}: must be of letters, digits and . _ -")
    secret, public = (given.directory / f"{given.name}{ending}" for ending in (".key", ".pub"))
    line = write_pair(secret, public, given.name)
    print(f"{secret}: the secret key. It stays on this host, readable by you alone.\n{public}: the public key:\n")
    print(f"    {line}\n")
    print(NEXT[side].format(secret=secret, public=public, public_name=public.name), end="")
    return 0


def write_pair(secret: Path, public: Path, name: str) -> str:
    """Write new keys to both files, and return the line of the public one.

    Raises:
        ConfigError: one of them exists, or cannot be written.
    """
    public_key, secret_key = _new_pair()
    line = f"{public_key} {name}"
    made: list[Path] = []
    try:
        secret.parent.mkdir(parents=True, exist_ok=True)
        for path, mode, text in (
            (
                secret,
                0o600,
                f"# Secret key of {name}: stays on its host, read by its owner alone.\n{SECRET} {secret_key}\n",
            ),
            (public, 0o644, f"{line}\n"),
        ):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
            made.append(path)
            with open(descriptor, "w", encoding="ascii") as file:
                file.write(text)
                file.flush()
                os.fsync(descriptor)
    except OSError as error:
        for path in made:
            path.unlink()
        if isinstance(error, FileExistsError):
            raise ConfigError(
                f"keygen: {error.filename} exists, and no key in use must be lost: choose another DIR or --name"
            ) from None
        raise ConfigError(f"keygen: {error.filename or secret.parent}: {error.strerror}") from None
    return line


def _new_pair() -> tuple[str, str]:
    """Return (public, secret) in Z85; the public key begins with a letter or a digit, so that lists read well."""
    import zmq

    while True:
        public, secret = (key.decode("ascii") for key in zmq.curve_keypair())
        if public[0].isalnum():
            return public, secret


def _plain(host: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", host) or "server"
