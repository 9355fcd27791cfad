"""Every error headway raises on purpose. Each also is the standard library's error of its kind.

HeadwayError
+-- ConfigError (ValueError)              the user's configuration; exit code 2
+-- ProtocolError (ValueError)            what the other process sent
|   +-- MalformedMessage                  bytes that are no message: counted, refused, never fatal
|   +-- VersionMismatch                   another PROTOCOL_VERSION
|   +-- InvalidGroup                      well formed, but against invariant I6: refused with its reason
+-- Refused (ConnectionError)             the learner turned this server away at Hello
+-- PeerGone (ConnectionError)            nobody is connected under that peer id
+-- PeerSilent (TimeoutError)             nothing heard for longer than the liveness limit
+-- WeightsError (RuntimeError)           a version that cannot be fetched, verified or applied
|   +-- IntegrityError                    bytes that do not hash to their manifest (I5)
|   +-- Superseded                        a newer version took the place of the one being fetched
+-- StalenessViolation (RuntimeError)     I4 would be broken: the run stops rather than train stale
+-- InvariantViolation (RuntimeError)     another of I1-I9 is broken: a bug of ours
+-- RunStopped (RuntimeError)             the run ends by its own rule, naming the last good checkpoint
"""

from __future__ import annotations


class HeadwayError(Exception):
    """Root of everything headway raises on purpose."""


class ConfigError(HeadwayError, ValueError):
    """The user's configuration is wrong. The text says what, the value, what is allowed, what to do."""


class ProtocolError(HeadwayError, ValueError):
    """The other process sent something that the contract does not allow."""


class MalformedMessage(ProtocolError):
    """The frames are not a message of this protocol. Never echoes the payload."""


class VersionMismatch(ProtocolError):
    """The message is of another PROTOCOL_VERSION."""


class InvalidGroup(ProtocolError):
    """The group breaks invariant I6 (lengths, finiteness, vocabulary) or does not answer its lease."""


class Refused(HeadwayError, ConnectionError):
    """The learner refused this server; the reason is the learner's own text."""


class PeerGone(HeadwayError, ConnectionError):
    """No connected peer has that id."""


class PeerSilent(HeadwayError, TimeoutError):
    """The peer sent nothing, not even a heartbeat, for longer than the liveness limit."""


class WeightsError(HeadwayError, RuntimeError):
    """A version of the weights cannot be published, fetched or applied."""


class IntegrityError(WeightsError):
    """Bytes do not hash to the digest in the manifest."""


class Superseded(WeightsError):
    """The version is no longer served: a newer one has taken its place."""


class StalenessViolation(HeadwayError, RuntimeError):
    """A batch holds a token older than max_staleness (I4)."""


class InvariantViolation(HeadwayError, RuntimeError):
    """One of the other invariants is broken. A bug of headway's, never the user's."""


class RunStopped(HeadwayError, RuntimeError):
    """The run ends by a rule the user set (too many skipped steps in a row, ...)."""
