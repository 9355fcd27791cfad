"""Whether an address is free to listen on: asked before anything is loaded or written, without ZeroMQ."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from protocol.addresses import bulk_address, parse_address
from protocol.errors import ConfigError

IN_USE = "another process has it: stop that one or choose another address"
MAX_PATH_BYTES = 107
"""Of a socket on Linux."""


def check_free(control_address: str) -> None:
    """Refuse a learner's address, or the one that follows from it for the weights, that nobody could listen on.

    The answer holds for the moment: who listens later is told by the socket itself.

    Raises:
        ConfigError: says which address and why not.
    """
    for address in (control_address, bulk_address(control_address)):
        transport, host, port = parse_address(address)
        if transport == "ipc":
            check_ipc_path_free(host)
        elif port:
            _check_port_free(address, host, port)


def check_ipc_path_free(path: str) -> None:
    """Refuse a path in use: ZeroMQ would unlink what lies there, a live peer's socket or a user's file.

    The socket of a process that was killed stays behind. Nobody accepts on it, and it is no obstacle.

    Raises:
        ConfigError: says why not.
    """
    if path.startswith("@"):
        return
    where = f"cannot listen on ipc://{path}"
    if not Path(path).parent.is_dir():
        raise ConfigError(f"{where}: {os.strerror(errno.ENOENT)}: make the directory {Path(path).parent}")
    if (length := len(os.fsencode(path))) > MAX_PATH_BYTES:
        raise ConfigError(f"{where}: the path has {length} bytes, a socket's may have {MAX_PATH_BYTES}")
    if not Path(path).exists():
        return
    if not Path(path).is_socket():
        raise ConfigError(f"{where}: a file that is no socket lies there")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return  # left behind by a process that died
    raise ConfigError(f"{where}: {IN_USE}")


def remove_ipc_socket(address: str) -> None:
    """Remove the file of a listening socket that is about to close, for ZeroMQ leaves it there.

    Before the close: as long as somebody accepts on it, nobody else takes the path.
    """
    transport, path, _ = parse_address(address)
    if transport == "ipc" and not path.startswith("@"):
        Path(path).unlink(missing_ok=True)


def _check_port_free(address: str, host: str, port: int) -> None:
    host = {"*": "0.0.0.0", "localhost": "127.0.0.1"}.get(host, host)  # noqa: S104 - as ZeroMQ reads it
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as ZeroMQ: connections of the dead do not count
        try:
            probe.bind((host, port))
        except OSError as error:
            why = IN_USE if error.errno == errno.EADDRINUSE else error.strerror
            raise ConfigError(f"cannot listen on {address}: {why}") from None
