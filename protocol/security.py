"""What protects a connection: CURVE keys on both planes, made once from the configuration. Used by channel.py alone.

    security = load_security(key=Path("learner.key"), allowed_keys=Path("allowed_keys"))     # who listens
    security = load_security(key=Path("server.key"), learner_key=Path("learner.pub"))        # who connects

With keys, both ends are authenticated and everything is encrypted (rfc.zeromq.org/spec/25 and 26): a peer is who has
the secret key, and nothing that an unknown peer sends is received. Without, only this host may connect, unless the user
insists. The texts that tell a refused peer's two users what to do are here, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import zmq

from protocol.errors import ConfigError
from protocol.keys import KeyPair, PublicKeys, TrustedKeys

SAY_AGAIN_S: Final = 60.0
MOST_SAID: Final = 20
"""Different lines a minute: who knocks with ever new keys cannot flood a log."""
HANDSHAKE_FAILURES: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """Who this process is and whom it knows. Made where configuration enters; loopback and ipc need none of it."""

    pair: KeyPair | None = None
    """Its own keys. None: connections are neither authenticated nor encrypted."""
    allowed: PublicKeys | None = None
    """Who may connect to its listening sockets."""
    trusted: TrustedKeys | None = None
    """Whom it takes for the learner."""
    insecure_plaintext: bool = False

    @property
    def off_host(self) -> bool:
        """Whether connections may leave this host."""
        return self.pair is not None or self.insecure_plaintext

    def protect_client(self, socket: zmq.Socket[bytes], server_public_key: str | None = None) -> None:
        """Let a socket connect to nobody but the owner of `server_public_key`, by default the learner."""
        if self.pair is None:
            return
        if server_public_key is None:
            assert self.trusted is not None, "keys without the learner's: load_security lets nobody connect so"
            server_public_key = self.trusted.current
        socket.set(zmq.CURVE_PUBLICKEY, self.pair.public.encode())
        socket.set(zmq.CURVE_SECRETKEY, self.pair.secret)
        socket.set(zmq.CURVE_SERVERKEY, server_public_key.encode())

    def protect_server(self, socket: zmq.Socket[bytes], domain: bytes) -> None:
        """Let a socket listen to those alone whom the context's door.py admits to `domain`: without it, to nobody."""
        assert self.pair is not None
        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.CURVE_SECRETKEY, self.pair.secret)
        socket.set(zmq.ZAP_DOMAIN, domain)
        socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)


PLAIN: Final = Security()
"""No keys: for loopback and ipc."""


def load_security(
    *,
    key: Path | None,
    allowed_keys: Path | None = None,
    learner_key: Path | None = None,
    insecure_plaintext: bool = False,
) -> Security:
    """Read the files that a configuration names; a secret key comes with the public keys of the other side.

    Raises:
        ConfigError: one is missing, readable by the wrong people, or no key file.
    """
    if key is None:
        for setting, path in (("allowed_keys", allowed_keys), ("learner_key", learner_key)):
            if path is not None:
                raise ConfigError(f"{setting} {path} without key: name this process's own secret key, --key FILE")
        return Security(insecure_plaintext=insecure_plaintext)
    return Security(
        pair=KeyPair.read(key.expanduser()),
        allowed=None if allowed_keys is None else PublicKeys(allowed_keys.expanduser(), "allowed_keys"),
        trusted=None if learner_key is None else TrustedKeys(learner_key.expanduser(), "learner_key"),
        insecure_plaintext=insecure_plaintext,
    )


class Said:
    """Which lines were said in the last minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since_s = clock()
        self._said: set[str] = set()

    def is_new(self, what: str) -> bool:
        """Whether to say it: it was not said yet in this minute, nor was too much else."""
        now_s = self._clock()
        if now_s - self._since_s >= SAY_AGAIN_S:
            self._since_s, self._said = now_s, set()
        if what in self._said or len(self._said) >= MOST_SAID:
            return False
        self._said.add(what)
        return True


def is_mismatch(event: int, value: int) -> bool:
    """Whether a handshake failed because one end uses keys and the other does not."""
    return event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH


def why_turned_away(security: Security, address: str, event: int, value: int) -> str:
    """What a server's user is told when the handshake with the learner failed."""
    learner = f"the learner at {address}"
    if security.pair is None:
        how = "`headway-server keygen DIR` makes its key, and --key and --learner-key name both"
        if is_mismatch(event, value):
            return f"{learner} wants keys, and this server has none: {how}"
        return f"{learner} broke off the handshake: perhaps it wants keys, and this server has none ({how})"
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return (
            f"{learner} does not know this server's key {security.pair.public}: add it to its allow-list"
            " (allowed_keys), and this server joins by itself"
        )
    if is_mismatch(event, value):
        return (
            f"{learner} uses no keys, and this server does: start the learner with --key and --allowed-keys, or this"
            " server without --key and --learner-key"
        )
    assert security.trusted is not None
    return (
        f"{learner} broke off the handshake: its key is none of the {len(security.trusted.names)} in learner_key"
        f" {security.trusted.path}, or it uses no keys. Its keygen wrote its public key to a .pub file: copy that one"
    )


def why_refused(security: Security, peer: str, event: int, value: int) -> str:
    """What a learner's user is told of a peer whose handshake failed, other than by an unknown key."""
    if security.pair is None:
        if is_mismatch(event, value):
            return f"refused {peer}: it uses keys, and this process has none (--key, --allowed-keys)"
        return (
            f"{peer} broke off the handshake: perhaps it uses keys, and this process has none (--key, --allowed-keys)"
        )
    if is_mismatch(event, value):
        return f"refused {peer}: it has no keys, and this process wants them (a server's --key and --learner-key)"
    return (
        f"refused {peer}: no handshake with it. Its learner_key must be this process's public key,"
        f" {security.pair.public}"
    )
