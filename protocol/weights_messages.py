"""What the two processes say to each other about new weights (see messages.py for the rest, and for what a message is).

learner -> server   WeightsReady, WeightsSwap
server -> learner   WeightsStaged, WeightsLive, WeightsFailed, WeightsLost
bulk plane          WeightsRequest (who fetches), WeightsChunk (who serves: the learner, or another server)
"""

from __future__ import annotations

import msgspec

from protocol.kinds import Float32, Int32, UInt8, WeightsPath
from protocol.versions import PROTOCOL_VERSION, Version


class Message(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, eq=False, tag_field="type", tag=str.lower
):
    """Base of all messages."""

    protocol_version: int = PROTOCOL_VERSION


class WeightsReady(Message, frozen=True, kw_only=True):
    """A version may be fetched. A newer one supersedes those before it."""

    version: Version
    manifest: UInt8
    """The manifest, UTF-8 JSON (see weights/manifest.py)."""
    addresses: tuple[str, ...]
    """Bulk endpoints that serve it, best first; `*` as the host is the host the server dialed."""
    address_keys: tuple[str, ...] = ()
    """Public key (Z85) of whoever serves at each of `addresses`, "" for the learner's own; empty without keys."""
    shared: str = ""
    """Name of the learner's file in the staging directory, for servers on its host; empty where there is none."""
    canary_tokens: Int32 | None = None
    """[N, L] sequences to try the weights on, for engines that check (Hello.canaries); N >= 1, L >= 2."""
    canary_logprobs: Float32 | None = None
    """[N, L - 1] log softmax (temperature 1) of canary_tokens[:, 1:] under this version, by the learner."""
    deltas: UInt8 | None = None
    """What leads there from versions before it, UTF-8 JSON (see weights/delta_manifest.py)."""

    def __post_init__(self) -> None:
        """Check that there are canaries, where there are any, and that every token but a first one has its logprob."""
        tokens, logprobs = self.canary_tokens, self.canary_logprobs
        shapes = None if tokens is None else tokens.shape, None if logprobs is None else logprobs.shape
        if shapes == (None, None):
            return
        if not (shapes[0] and shapes[1] and len(shapes[0]) == 2 and shapes[1] == (shapes[0][0], shapes[0][1] - 1)):
            raise ValueError(f"canary_tokens {shapes[0]}, canary_logprobs {shapes[1]}: expected [N, L] and [N, L - 1]")
        if not (shapes[0][0] >= 1 and shapes[0][1] >= 2):  # the mean over no token says nothing of the weights
            raise ValueError(f"canary_tokens {shapes[0]}: expected [N, L] with N >= 1 and L >= 2, or none at all")


class WeightsRequest(Message, frozen=True, kw_only=True):
    """Ask for bytes of a version's file, or of the delta that leads to it from `base`, on the bulk plane."""

    version: Version
    offset: int
    length: int
    base: Version | None = None

    def __post_init__(self) -> None:
        """Only sizes that a server is willing to send."""
        if self.offset < 0 or not 0 < self.length <= 1 << 22:
            raise ValueError(f"bytes [{self.offset}, +{self.length}]: at most 4 MiB a request")


class WeightsChunk(Message, frozen=True, kw_only=True):
    """Answer to WeightsRequest. `data` is None when what it asked of is not, or no longer, served."""

    version: Version
    offset: int
    base: Version | None = None
    data: UInt8 | None = None


class WeightsStaged(Message, frozen=True, kw_only=True):
    """The version is here, whole and verified; the server goes on sampling with the old one until its turn to swap."""

    version: Version


class WeightsSwap(Message, frozen=True, kw_only=True):
    """The server's turn: swap to `version` now. Versions roll over the fleet: never do all engines pause at once."""

    version: Version
    checksums: tuple[str, ...] = ()
    """What other engines have reported of it (WeightsLive.checksum): those of the same kind must agree."""


class WeightsLive(Message, frozen=True, kw_only=True):
    """Every token sampled from now on by this server is of `version` or newer, and the engine passed its checks."""

    version: Version
    path: WeightsPath = WeightsPath.NONE
    bytes: int = 0
    """Fetched for it, over whatever path."""
    transfer_s: float = 0.0
    verify_s: float = 0.0
    pause_s: float = 0.0
    check_s: float = 0.0
    """Checking the engine after the swap; it samples meanwhile, and its groups wait."""
    checksum: str = ""
    """`kind:digest` of the weights as the engine holds them; empty when it cannot tell. Comparable within a kind."""
    mismatch_kl: float | None = None
    """Mean over the canary tokens of exp(d) - 1 - d, d = learner's - engine's logprob; None without canaries."""
    mismatch: float | None = None
    """Mean of |d| over the canary tokens, in nats."""


class WeightsLost(Message, frozen=True, kw_only=True):
    """No version is live any more (the engine died or failed a check, and restarts). No leases until WeightsLive."""

    reason: str


class WeightsFailed(Message, frozen=True, kw_only=True):
    """The server could not make the version live and serves the one it had."""

    version: Version
    reason: str
