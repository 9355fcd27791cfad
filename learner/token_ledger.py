"""The token ledger: every token that a server samples ends once, and is under way until then. Pure: numbers only.

    a server samples  --> held by the server --> arrived at the learner --> one end of `TokenEnd`
                                            '--> aborted

    generated == sum over all ends + under way            always, exactly

What arrives is counted where it arrives. What a server still holds, and has given up, follows from two numbers of its
heartbeat: what it has sampled since its start, and what of that is for groups that it has not finished. Messages of a
connection keep their order, so what is in neither of the two had been sent before the heartbeat, or never will be: it
is aborted. A group that is sent again is not sampled again, and counts once.

A process that has worked for an earlier learner counts from its first heartbeat on, which may come before it sends
again what that learner had not acknowledged: its Hello names those groups, and they count when they arrive.

A continued run goes on with the counts of its last row: like all its rows, the ledger is of the lineage of the current
weights. What was under way when the learner ended is counted when it arrives again; what ended after the last row that
is kept is forgotten with those rows.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

import numpy as np
import xxhash

from learner.batch import completions_that_train
from protocol.messages import FinishReason, Group

ARRIVALS_KEPT = 65_536
"""Arrivals that are remembered, to know what is sent again."""
DEPARTED_KEPT = 4_096
"""Processes that are gone and remembered: one that comes back later than that counts as one of an earlier learner."""

Row: TypeAlias = Mapping[str, "float | list[int]"]


class TokenEnd(StrEnum):
    """What became of a token."""

    TRAINED = "trained"
    """Its completion trained in a step that was applied."""
    TRUNCATED = "truncated"
    """Its completion reached max_completion_length and was left out of a step by mask_truncated_completions."""
    FILTERED = "filtered"
    """Nothing to learn from it: its group was filtered, or its completion had no reward in one that trained."""
    STALE = "stale"
    """Its group was too old to train, or of weights that this run has left."""
    SKIPPED = "skipped"
    """Its step was not finite."""
    DUPLICATE = "duplicate"
    """Its group had been answered by another server, or had ended."""
    REFUSED = "refused"
    """Its group was malformed."""
    ABORTED = "aborted"
    """A server gave it up: cancelled, returned, failed, or gone with the server."""
    EVAL = "eval"
    """It was sampled to evaluate."""


@dataclass(slots=True)
class _Server:
    """One server process, over all its connections."""

    base: int | None
    """What it had sampled before it counted here; None until it says."""
    owed: set[str] = field(default_factory=set)
    """Groups that it had sampled before it first reported here, and has not sent here."""
    generated: int = 0
    """What it has sampled since, as of its last heartbeat."""
    arrived: int = 0
    held: int = 0

    @property
    def aborted(self) -> int:
        """In neither of the two. What has arrived may be newer than the last heartbeat."""
        return max(0, self.generated - self.arrived - self.held)


TURNED_AWAY = (TokenEnd.DUPLICATE, TokenEnd.REFUSED, TokenEnd.STALE)
"""Ends of what a server may send again."""


class TokenLedger:
    """See the module's text. One per learner; every token moves through these methods."""

    def __init__(self) -> None:
        self._servers: dict[str, _Server] = {}
        """Connected processes."""
        self._departed: OrderedDict[str, _Server] = OrderedDict()
        """Processes that may come back, the latest last."""
        self._seen: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        """Digest of the last arrival by process and group id."""
        self._ends: Counter[TokenEnd] = Counter()
        self._arrived = 0
        self._journaled: dict[str, bytes] = {}
        """Digests of groups of earlier incarnations, by id."""
        self._turned_away: OrderedDict[str, TokenEnd] = OrderedDict()
        """How the last groups that nobody wanted ended, by id."""

    def joined(self, process: str, *, fresh: bool, unacked: Iterable[str] = ()) -> None:
        """A server process was welcomed, perhaps again.

        Args:
            process: its name.
            fresh: it has never worked for a learner before.
            unacked: ids of finished groups that it holds and will send again.
        """
        server = self._departed.pop(process, None) or _Server(base=0 if fresh else None)
        server.owed = set(unacked) if server.base is None else server.owed.intersection(unacked)
        self._servers[process] = server

    def reported(self, process: str, *, generated: int, held: int) -> None:
        """A heartbeat: tokens sampled since the process began, and those of groups that it has not finished."""
        server = self._servers[process]
        if server.base is None:  # what it holds of earlier work is counted with what will come of it
            server.base = generated - held - server.arrived
        server.generated, server.held = generated - server.base, held

    def left(self, process: str) -> None:
        """Its connection is gone. If the process comes back, its next heartbeat says what it still holds."""
        server = self._departed[process] = self._servers.pop(process)
        server.held = 0
        if len(self._departed) > DEPARTED_KEPT:
            _, forgotten = self._departed.popitem(last=False)
            self._arrived += forgotten.aborted
            self._ends[TokenEnd.ABORTED] += forgotten.aborted

    def arrived(self, process: str, group: Group) -> bool:
        """A whole group came. False when it is the very same as one before: its tokens are counted there."""
        server, digest, key = self._servers[process], group_digest(group), (process, group.group_id)
        again = digest in (self._seen.get(key), self._journaled.get(group.group_id))
        self._seen[key] = digest
        self._seen.move_to_end(key)
        if len(self._seen) > ARRIVALS_KEPT:
            self._seen.popitem(last=False)
        owed = group.group_id in server.owed
        server.owed.discard(group.group_id)
        if again:
            return False
        tokens = sampled_tokens(group)
        self._arrived += tokens
        server.arrived += tokens
        if owed and server.base is not None:
            server.base -= tokens  # the heartbeat took it for work of an earlier learner
            server.generated += tokens
        else:
            server.held = max(0, server.held - tokens)
        return True

    def journaled(self, digests: Mapping[str, bytes]) -> None:
        """Earlier incarnations have these groups on disk, by id: servers that do not know may send them again."""
        self._journaled.update(digests)

    def restored(self, group: Group) -> None:
        """Such a group is under way again: its prompt has been granted again."""
        self._arrived += sampled_tokens(group)

    def ended(self, group: Group, how: TokenEnd) -> None:
        """All tokens of a group that arrived end."""
        self._ends[how] += sampled_tokens(group)
        if how in TURNED_AWAY:
            self._turned_away[group.group_id] = how
            if len(self._turned_away) > ARRIVALS_KEPT:
                self._turned_away.popitem(last=False)

    def wanted_after_all(self, group: Group) -> None:
        """A group that was turned away came again, and is taken: it is under way, as if it had not ended."""
        how = self._turned_away.pop(group.group_id, None)
        if how is None:
            self._arrived += sampled_tokens(group)
        else:
            self._ends[how] -= sampled_tokens(group)

    def trained(self, groups: Sequence[Group], *, mask_truncated_completions: bool) -> None:
        """The groups of a step that was applied end, each completion by what it was to the step."""
        if not groups:
            return
        tokens = np.concatenate([_tokens_per_completion(group) for group in groups])
        reasons = np.concatenate([group.finish_reasons for group in groups])
        could = np.concatenate([completions_that_train(group, mask_truncated_completions=False) for group in groups])
        masked = could & (reasons == FinishReason.LENGTH) if mask_truncated_completions else np.zeros_like(could)
        aborted = reasons == FinishReason.ABORT
        self._ends[TokenEnd.TRAINED] += int(tokens[could & ~masked].sum())
        self._ends[TokenEnd.TRUNCATED] += int(tokens[masked].sum())
        self._ends[TokenEnd.ABORTED] += int(tokens[aborted].sum())
        self._ends[TokenEnd.FILTERED] += int(tokens[~(could | aborted)].sum())

    @property
    def ends(self) -> dict[TokenEnd, int]:
        """Tokens by what became of them."""
        ends = {end: self._ends[end] for end in TokenEnd}
        ends[TokenEnd.ABORTED] += self._aborted
        return ends

    @property
    def under_way(self) -> int:
        """Tokens sampled that have not ended: at a server, in the buffer, in a batch."""
        return self._arrived - self._ends.total() + self._held

    @property
    def generated(self) -> int:
        """Tokens sampled."""
        return self._arrived + self._held + self._aborted

    @property
    def _held(self) -> int:
        return sum(server.held for server in self._servers.values())

    @property
    def _aborted(self) -> int:
        processes = (*self._servers.values(), *self._departed.values())
        return sum(server.aborted for server in processes)

    def metrics(self) -> dict[str, float | list[int]]:
        """The columns of metrics.jsonl: counts since the run began."""
        return {
            "tokens/generated": self.generated,
            **{f"tokens/{end}": count for end, count in self.ends.items()},
            "tokens/under_way": self.under_way,
        }

    def resume(self, row: Row) -> None:
        """Add what the last row of a continued run says."""
        for end in TokenEnd:
            count = row[f"tokens/{end}"]
            assert not isinstance(count, list)
            self._ends[end] += int(count)
            self._arrived += int(count)


def costs(trained: int, generated: int, *, learner_s: float, servers_s: float) -> dict[str, float]:
    """What a trained token costs: NaN before the first.

    `cost/generated_per_trained` is 1 where nothing is thrown away; the others are seconds of the learner, and of all
    servers together, for each million of trained tokens.
    """

    def per(amount: float, tokens: float) -> float:
        return amount / tokens if tokens else math.nan

    return {
        "cost/generated_per_trained": per(generated, trained),
        "cost/learner_s_per_mtok": per(learner_s, trained / 1e6),
        "cost/server_s_per_mtok": per(servers_s, trained / 1e6),
    }


def sampled_tokens(group: Group) -> int:
    """Tokens of a group that the policy sampled; what an environment wrote is not among them."""
    return int(group.completion_tokens.size if group.loss_mask is None else np.count_nonzero(group.loss_mask))


def group_digest(group: Group) -> bytes:
    """Tell two answers to one lease apart."""
    return xxhash.xxh3_64_digest(group.completion_tokens.tobytes())


def _tokens_per_completion(group: Group) -> np.ndarray:
    """[N] tokens that the policy sampled."""
    if group.loss_mask is None:
        return group.completion_lengths.astype(np.int64)
    before_T = np.concatenate([[0], np.cumsum(group.loss_mask != 0)])
    ends_N = np.cumsum(group.completion_lengths)
    counts: np.ndarray = before_T[ends_N] - before_T[ends_N - group.completion_lengths]
    return counts
