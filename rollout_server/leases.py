"""What the server owes the learner: leases under way, and finished groups until they are acknowledged. Pure.

    accept -> in flight -> finish -> unacknowledged -> ack -> (gone)
                        -> drop (cancelled, failed, returned) -> (gone)

A group that was dropped may be leased anew while the work of its first lease still winds down: what that work comes to
is nobody's any more, so work is known by the lease it began with, not by the group's id.

The server is nearly stateless: this book is all it has, and losing it costs only the work in it.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from protocol.messages import Group, Lease, Purpose


class LeaseBook:
    """Leases and unacknowledged groups by group id."""

    def __init__(self) -> None:
        self.in_flight: dict[str, Lease] = {}
        self.unacked: dict[str, Group] = {}
        self._begun: dict[str, Lease] = {}
        """By group in flight, the lease that its work began with; `in_flight` has the newest attempt."""
        self.finished = 0
        """Groups finished since the start."""

    def accept(self, lease: Lease) -> bool:
        """Take a lease. False when the group is known already: a newer attempt only renames what is under way."""
        known = lease.group_id in self.in_flight or lease.group_id in self.unacked
        if lease.group_id not in self.unacked:
            self.in_flight[lease.group_id] = lease
            self._begun.setdefault(lease.group_id, lease)
        else:
            group = self.unacked[lease.group_id]
            self.unacked[lease.group_id] = msgspec.structs.replace(group, attempt=lease.attempt)
        return not known

    def wants(self, begun: Lease) -> bool:
        """Whether the work that began with this lease is still the one under way for its group."""
        return self._begun.get(begun.group_id) is begun

    def finish(self, begun: Lease, group: Group) -> Group | None:
        """Hold what the work of a lease has made until its Ack. None when nobody wants it any more."""
        if not self.wants(begun):
            return None
        lease = self.in_flight.pop(group.group_id)
        del self._begun[group.group_id]
        group = msgspec.structs.replace(group, attempt=lease.attempt)
        self.unacked[group.group_id] = group
        self.finished += 1
        return group

    def acknowledged(self, group_id: str) -> None:
        """Forget a finished group. What is in flight stays: the Ack is of an earlier answer to an earlier lease."""
        self.unacked.pop(group_id, None)

    def drop(self, group_id: str) -> Lease | None:
        """Forget a group in whatever state. Return its lease if it was in flight."""
        self.unacked.pop(group_id, None)
        self._begun.pop(group_id, None)
        return self.in_flight.pop(group_id, None)

    def keep(self, wanted: Iterable[str]) -> list[str]:
        """Forget all but `wanted` (after a new Welcome) and return the ids in flight that are to be aborted."""
        kept = set(wanted)
        unwanted = [group_id for group_id in self.in_flight if group_id not in kept]
        for group_id in [*unwanted, *(g for g in self.unacked if g not in kept)]:
            self.drop(group_id)
        return unwanted


def why_cut(lease: Lease, max_length: int) -> str:
    """Say why an engine may cut a lease's completions sooner than it asks for; empty where it need not.

    Args:
        lease: a prompt, and how long its completions may be.
        max_length: tokens of both together that the engine takes; 0: any.
    """
    prompt, completion = len(lease.prompt_tokens), lease.sampling.max_completion_length
    if not 0 < max_length < prompt + completion:
        return ""
    word = "eval_max_completion_length" if lease.purpose is Purpose.EVAL else "max_completion_length"
    return (
        f"a prompt of {prompt} tokens with completions of {completion} ({word}) was leased, and this engine takes"
        f" {max_length} in all: longer completions are cut, and count as such. Raise the server's max_model_length, as"
        f" far as the model goes, or lower the learner's {word}"
    )
