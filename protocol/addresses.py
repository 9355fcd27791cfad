"""Addresses of the two planes: what is allowed, and how one follows from another. Pure; makes no sockets.

An address is `tcp://HOST:PORT` (port 0 or `*`: any free one, for listening) or `ipc://PATH`. Without keys traffic is
neither authenticated nor encrypted, so anything but loopback and ipc is refused then, unless the user says otherwise.
"""

from __future__ import annotations

import ipaddress

from protocol.errors import ConfigError, MalformedMessage

WILDCARD_HOSTS = ("*", "0.0.0.0", "::")  # noqa: S104 - recognized, never a default


def check_address(address: str, *, off_host: bool) -> None:
    """Refuse an address that would carry weights and rollouts unprotected off this host.

    Raises:
        ConfigError: no address, or not loopback although traffic may not leave the host (`off_host`).
    """
    transport, host, _ = parse_address(address)
    if transport == "ipc" or off_host or _is_loopback(host):
        return
    raise ConfigError(
        f"address {address}: {host} is not loopback, and without keys whoever reaches the port can read the weights and"
        " feed the learner data. Make a key on each host, `headway-learner keygen DIR` and `headway-server keygen DIR`,"
        " and name them: the learner's --key and --allowed-keys, a server's --key and --learner-key, with --relay its"
        " --allowed-keys, too. Or use"
        " tcp://127.0.0.1:PORT or ipc://PATH; in a closed lab only, --insecure-plaintext"
    )


def is_local(address: str) -> bool:
    """Whether only processes of this host can reach the address."""
    transport, host, _ = parse_address(address)
    return transport == "ipc" or _is_loopback(host)


def bulk_address(control_address: str) -> str:
    """Return where the weights go: the next tcp port (0 stays 0, any free one), or PATH-weights.

    Raises:
        ConfigError: no address, or no next port.
    """
    transport, host, port = parse_address(control_address)
    if transport == "ipc":
        return f"ipc://{host}-weights"
    if port == 65535:
        raise ConfigError(f"address {control_address}: weights use the next port, so the highest is 65534")
    return tcp_address(host, port + 1 if port else 0)


def resolve_address(address: str, dialed: str) -> str:
    """Fill the host of an address that the learner announced: `*` is the host that this server dialed.

    Raises:
        MalformedMessage: the announced text is no address, or `*` was reached over ipc.
    """
    try:
        transport, host, port = parse_address(address)
    except ConfigError as error:
        raise MalformedMessage(f"announced address: {error}") from None
    if transport == "ipc" or host not in WILDCARD_HOSTS:
        return address
    dialed_transport, dialed_host, _ = parse_address(dialed)
    if dialed_transport == "ipc":
        raise MalformedMessage(f"announced address {address} has no host, and {dialed} was dialed")
    return tcp_address(dialed_host, port)


def parse_address(address: str) -> tuple[str, str, int]:
    """Split an address into (transport, host or path, port); port `*` is 0.

    Raises:
        ConfigError: not of the form tcp://HOST:PORT or ipc://PATH.
    """
    transport, _, rest = address.partition("://")
    if transport == "ipc" and rest:
        return transport, rest, 0
    host, _, port = rest.rpartition(":")
    if port == "*":
        port = "0"
    if transport == "tcp" and host and port.isascii() and port.isdigit() and int(port) < 65536:
        return transport, host.strip("[]"), int(port)
    raise ConfigError(f"address {address!r}: expected tcp://HOST:PORT or ipc://PATH")


def tcp_address(host: str, port: int) -> str:
    """Write a tcp address; port 0 becomes `*`."""
    return f"tcp://[{host}]:{port or '*'}" if ":" in host else f"tcp://{host}:{port or '*'}"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name: where it leads is not ours to know
