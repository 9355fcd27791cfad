"""Groups that arrive: put together, validated, journaled, acknowledged, offered to the buffer. In that order.

I6: what is malformed or out of range is refused with its reason, and its lease is given out again. I7: the Ack leaves
only when the journal has the group on disk. A group is judged by what it is (its ordinal, the versions of its tokens),
never by which attempt or connection it came over: a late answer to a lost lease is as good as any.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from learner.batch import TrainGroup
from learner.buffer import Buffer, why_filtered
from learner.coordinator import Coordinator
from learner.journal_records import GroupRecord, Record
from learner.leases import prompt_text
from learner.ledger import End, Entry, Verdict
from learner.token_ledger import TokenEnd
from protocol.completions import group_versions
from protocol.errors import InvalidGroup, PeerGone
from protocol.logs import event
from protocol.messages import Ack, AckStatus, Cancel, Group, Purpose
from protocol.parts import PartAssembler
from protocol.validation import validate_group
from protocol.versions import Version

log = logging.getLogger(__name__)

MOST_WAITING = 65_536
MOST_AT_ONCE = 64
"""Groups that share one journal append."""


class GroupJournal(Protocol):
    """What arrivals need of the journal."""

    async def append(self, *records: Record) -> None:
        """Return when the records are on disk."""


class FilteredGroups(Protocol):
    """Who is told of groups that will not train (stats)."""

    def record_filtered(self, group: Group) -> None:
        """Count its rewards and lengths."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A whole group in the queue."""

    peer: bytes
    group: Group
    counts: bool
    """Whether its tokens are under way since it came; else this process has sent them before."""


class Arrivals:
    """Owns the path of a group from the connection to the buffer."""

    def __init__(self, coordinator: Coordinator, buffer: Buffer, journal: GroupJournal, stats: FilteredGroups) -> None:
        self._coordinator = coordinator
        self._buffer = buffer
        self._journal = journal
        self._stats = stats
        self.validate = validate_group
        """I6, of a group that came over a wire."""
        self._parts = PartAssembler()
        self.queue: asyncio.Queue[Arrival] = asyncio.Queue(MOST_WAITING)
        """Whole groups, not yet judged. An honest fleet cannot fill it: it never sends more than was leased."""
        self.restored: dict[int, TrainGroup] = {}
        """Groups of an earlier incarnation, by ordinal, whose prompt has not been granted again yet."""
        self._told_of_steps = False

    def receive(self, peer: bytes, group: Group) -> None:
        """Take in a message: a whole group, or a part of one."""
        try:
            whole = group if group.num_parts == 1 else self._parts.add(group)
        except InvalidGroup as error:
            self._refuse(peer, group, error)
            return
        if whole is None:
            return
        self._parts.discard(whole.group_id)  # parts of attempts that were cut off
        self._coordinator.fleet.answered(peer, whole.group_id)  # now: its Goodbye may be right behind
        tokens = f"{whole.completion_tokens.size} tokens"
        self._coordinator.spans.end(whole.group_id, self._coordinator.clock(), tokens)
        process = self._coordinator.fleet.servers[peer].process
        arrival = Arrival(peer, whole, counts=self._coordinator.tokens.arrived(process, whole))
        if not self.queue.full():
            self.queue.put_nowait(arrival)
            return
        self._coordinator.counters["groups_overflowed"] += 1
        reason = "more groups at once than were ever leased"
        self._ack(peer, whole, AckStatus.REFUSED, reason)
        self._end(arrival, TokenEnd.REFUSED)
        self._release(whole, fault=False, reason=reason)

    async def accept_next(self) -> None:
        """Wait for groups, then deal with all that are there.

        Raises:
            JournalError: the disk refused; none of them is acknowledged.
        """
        arrived = [await self.queue.get()]
        while not self.queue.empty() and len(arrived) < MOST_AT_ONCE:
            arrived.append(self.queue.get_nowait())
        accepted = [arrival for arrival in arrived if self._judge(arrival)]
        if not accepted:
            return
        ends = self._coordinator.take_unjournaled()
        first: dict[int, Group] = {}  # of two answers to one lease only this one trains, so only it is recorded
        for arrival in accepted:
            first.setdefault(arrival.group.ordinal, arrival.group)
        self._coordinator.idle.arriving = len(first)
        self._coordinator.idle.observe()
        await self._journal.append(*map(self._record, first.values()), *ends)
        self._coordinator.idle.arriving = 0
        for arrival in accepted:
            self._written(arrival)
        self._coordinator.changed.notify()

    def restore(self, restored: dict[int, TrainGroup]) -> None:
        """Take over what an earlier incarnation journaled: now, or when the prompt is granted again."""
        self.restored = restored
        self._coordinator.granted = self.granted
        for entry in list(self._coordinator.ledger.entries.values()):
            self.granted(entry)

    def granted(self, entry: Entry) -> None:
        """A prompt got its slot: if an earlier incarnation journaled its group, nobody needs to sample it again."""
        group = self.restored.pop(entry.ordinal, None)
        if group is not None and self._coordinator.ledger.judge(entry.ordinal, _oldest(group.group)) is Verdict.ACCEPT:
            self._coordinator.tokens.restored(group.group)
            self._admit(dataclasses.replace(group, sequence=entry.sequence), None)
            self._coordinator.counters["groups_restored"] += 1
            self._coordinator.changed.notify()  # no server has a part in it: nothing else may tell batch_loop

    def _written(self, arrival: Arrival) -> None:
        """A group is on disk: acknowledge it, and take it in if it is still wanted."""
        peer, group = arrival.peer, arrival.group
        self._ack(peer, group, AckStatus.OK)
        verdict = self._coordinator.ledger.judge(group.ordinal, _oldest(group))
        if verdict is Verdict.ACCEPT:
            if not arrival.counts:
                self._coordinator.tokens.wanted_after_all(group)  # a restarted learner grants its prompt only now
            self._admit(self._train_group(group), peer)
            return
        # its own duplicate; or a short batch was formed meanwhile, and now it is too old
        self._end(arrival, TokenEnd.STALE if verdict is Verdict.STALE else TokenEnd.DUPLICATE)
        self._release(group, fault=False, reason="too old to train once it was on disk")

    def _end(self, arrival: Arrival, how: TokenEnd) -> None:
        if arrival.counts:
            self._coordinator.tokens.ended(arrival.group, how)

    def _judge(self, arrival: Arrival) -> bool:
        """Answer at once what need not be journaled; say whether the group is to be."""
        peer, group = arrival.peer, arrival.group
        coordinator, config = self._coordinator, self._coordinator.config
        evaluation = group.purpose is Purpose.EVAL
        if evaluation and not coordinator.evaluates(group.group_id):
            self._ack(peer, group, AckStatus.DUPLICATE, "that evaluation is over")
            self._end(arrival, TokenEnd.EVAL)
            return False
        limits = (config.eval_num_generations, config.eval_max_completion_length or config.max_completion_length)
        try:
            self.validate(
                group,
                num_generations=limits[0] if evaluation else config.num_generations,
                max_completion_length=limits[1] if evaluation else config.max_completion_length,
                vocab_size=coordinator.identity.vocab_size,
                reward_functions=coordinator.reward_functions,
            )
            versions = group_versions(group)
            self._check_identity(group, versions)
        except InvalidGroup as error:
            self._end(arrival, TokenEnd.REFUSED)
            self._refuse(peer, group, error)
            return False
        if evaluation:
            self._end(arrival, TokenEnd.EVAL)
            self._evaluated(peer, group)
            return False
        orphaned = [version for version in versions if version not in coordinator.lineage]
        verdict = coordinator.ledger.judge(group.ordinal, _oldest(group))
        if verdict in (Verdict.DUPLICATE, Verdict.UNKNOWN):
            coordinator.counters["groups_duplicate"] += 1
            self._end(arrival, TokenEnd.DUPLICATE)
            self._ack(
                peer, group, AckStatus.DUPLICATE, "" if verdict is Verdict.DUPLICATE else "not leased by this run"
            )
            return False
        if orphaned or verdict is Verdict.STALE:
            reason = f"sampled by version {min(orphaned)}, which this run has left" if orphaned else "too old to train"
            coordinator.counters["groups_stale"] += 1
            self._end(arrival, TokenEnd.STALE)
            self._ack(peer, group, AckStatus.STALE, reason)
            self._release(group, fault=False, reason=reason)
            return False
        return True

    def _check_identity(self, group: Group, versions: Iterable[Version]) -> None:
        """Check what only this run can know: the id, the temperature leased, the versions.

        Raises:
            InvalidGroup: it is not an answer to its lease.
        """
        coordinator, config = self._coordinator, self._coordinator.config
        evaluation = group.purpose is Purpose.EVAL
        name = coordinator.eval_id if evaluation else coordinator.train_id
        if group.group_id != name(group.ordinal):
            raise InvalidGroup(f"group {group.ordinal}: id {group.group_id} is not that of its lease")
        leased = (config.eval_temperature or 1.0) if evaluation else config.temperature  # greedy logprobs have T = 1
        if group.temperature != leased:
            raise InvalidGroup(f"group {group.ordinal}: temperature {group.temperature:g}, leased at {leased:g}")
        for version in versions:
            if coordinator.is_unborn(version):
                raise InvalidGroup(f"group {group.ordinal}: sampled by version {version}, which was never trained")

    def _leased_id(self, group: Group) -> str:
        """The lease that a message answers. For training its ordinal tells, whatever id it bears."""
        return self._coordinator.train_id(group.ordinal) if group.purpose is Purpose.TRAIN else group.group_id

    def _evaluated(self, peer: bytes, group: Group) -> None:
        coordinator = self._coordinator
        assert coordinator.evaluation is not None
        self._ack(peer, group, AckStatus.OK)
        coordinator.fleet.release(group.group_id)
        coordinator.evaluation.delivered(group.ordinal, group)
        coordinator.changed.notify()

    def _refuse(self, peer: bytes, group: Group, error: InvalidGroup) -> None:
        coordinator = self._coordinator
        coordinator.counters["groups_refused"] += 1
        server = coordinator.fleet.servers.get(peer)
        coordinator.notice(
            "group_refused", f"refused {error}", server=server.name if server else "?", ordinal=group.ordinal
        )
        self._parts.discard(group.group_id)
        coordinator.fleet.answered(peer, self._leased_id(group))
        self._ack(peer, group, AckStatus.REFUSED, str(error))
        self._release(group, fault=True, reason=str(error))

    def _release(self, group: Group, *, fault: bool, reason: str) -> None:
        """Give a refused group's lease out again, unless another server works on it: who sent this may be anybody."""
        leased_id = self._leased_id(group)
        if self._coordinator.fleet.holder(leased_id) is None:
            self._coordinator.lost(leased_id, fault=fault, reason=reason)

    def _ack(self, peer: bytes, group: Group, status: AckStatus, reason: str = "") -> None:
        ack = Ack(group_id=group.group_id, attempt=group.attempt, status=status, reason=reason)
        with contextlib.suppress(PeerGone):  # it will send the group again, and hear that it is a duplicate
            self._coordinator.channel.send(peer, ack)

    def _record(self, group: Group) -> GroupRecord:
        row = self._coordinator.rows[group.ordinal]
        return GroupRecord(
            incarnation=self._coordinator.identity.incarnation,
            prompt=prompt_text(row),
            prompt_tokens=row.prompt_tokens,
            group=group,
        )

    def _train_group(self, group: Group) -> TrainGroup:
        entry = self._coordinator.ledger.find(group.ordinal)
        assert entry is not None
        return dataclasses.replace(self._record(group).train_group(), sequence=entry.sequence)

    def _admit(self, group: TrainGroup, sender: bytes | None) -> None:
        """The group is on disk and wanted: filter it, or hold it for a batch. Whoever else works on it may stop."""
        coordinator = self._coordinator
        entry = coordinator.ledger.find(group.ordinal)
        assert entry is not None
        holder = coordinator.fleet.release(group.group.group_id)
        if holder is not None and holder.peer != sender:
            coordinator.send(holder, Cancel(group_id=group.group.group_id, attempt=entry.attempt, reason="answered"))
        coordinator.ledger.delivered(group.ordinal, _oldest(group.group))
        coordinator.quarantined_in_a_row = 0
        config = coordinator.config
        reason = why_filtered(
            group.group,
            filter_zero_std=config.filter_zero_std,
            mask_truncated_completions=config.mask_truncated_completions,
            min_scored=config.min_scored,
            compares_steps=config.compares_steps,
        )
        self._tell_of_steps(group.group)
        if reason is None:
            self._buffer.offer(group)
            return
        coordinator.ledger.end(entry.sequence, End.FILTERED)
        coordinator.ended(entry, End.FILTERED, reason)
        coordinator.tokens.ended(group.group, TokenEnd.FILTERED)
        self._stats.record_filtered(group.group)
        event(log, "group_filtered", ordinal=group.ordinal, reason=reason)

    def _tell_of_steps(self, group: Group) -> None:
        """Say once when groups bring steps that nobody compares, or none where they are compared."""
        estimator, has_steps = self._coordinator.config.advantage_estimator, group.step_rewards is not None
        if has_steps and estimator not in ("process", "gae"):
            text = f"has step rewards: advantage_estimator {estimator} trains on their sum, process on each of them"
        elif not has_steps and estimator == "process":
            text = "has no step rewards: its rewards count as one step each, and advantage_estimator process is grpo"
        else:
            return
        if not self._told_of_steps:
            self._told_of_steps = True
            self._coordinator.notice("step_rewards", f"group {group.ordinal} {text}", ordinal=group.ordinal)


def _oldest(group: Group) -> int:
    """policy_version of the group's oldest token."""
    return int(group.span_versions[:, 1].min()) if group.span_versions.size else 0
