"""Every token once: the ledger against servers that keep count themselves, whatever happens between them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from learner.token_ledger import TokenEnd, TokenLedger, costs, group_digest, sampled_tokens
from protocol.messages import FinishReason, Group
from tests.factories import make_group

LENGTHS = st.lists(st.integers(1, 5), min_size=2, max_size=4)


def a_group(ordinal: int, lengths: list[int], serial: int) -> Group:
    """One whose tokens are those of no other."""
    tokens = np.full(sum(lengths), serial, np.int32)
    return make_group(ordinal=ordinal, lengths=lengths, rewards=[1.0] * len(lengths), completion_tokens=tokens)


@dataclass
class Truth:
    """A server process, which knows what it has sampled."""

    generated: int = 0
    held: list[Group] = field(default_factory=list)
    unacked: list[Group] = field(default_factory=list)
    """Finished, and not arrived at this learner."""
    sent: list[Group] = field(default_factory=list)
    """Arrived; may be sent again."""
    connected: bool = True
    uncounted: int | None = 0
    """Of generated: what came of it before it first reported to this learner, and never arrives; None until then."""

    @property
    def tokens_held(self) -> int:
        return tokens_of(self.held)

    @property
    def counted(self) -> int:
        """What the ledger is to know of once it has reported."""
        assert self.uncounted is not None
        return self.generated - self.uncounted


def tokens_of(groups: Iterable[Group]) -> int:
    return sum(map(sampled_tokens, groups))


class TokenMachine(RuleBasedStateMachine):
    """Servers sample, send, send again, give up, report, leave and come back; the learner ends what came, or ends."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = TokenLedger()
        self.servers: dict[str, Truth] = {}
        self.here: list[Group] = []
        self.excluded: dict[str, set[str]] = {}
        """Of each process of an earlier learner: what it held unacknowledged when it first reported here."""
        self.serial = 0

    @initialize()
    def a_server(self) -> None:
        self.join()

    @precondition(lambda self: len(self.servers) < 4)
    @rule()
    def join(self) -> None:
        name = f"process{len(self.servers)}"
        self.servers[name] = Truth()
        self.ledger.joined(name, fresh=True)

    def able(self, *, connected: bool, having: str = "connected") -> list[str]:
        """Who is so, and has any of that."""
        return [
            n for n, s in self.servers.items() if s.connected is connected and (getattr(s, having) or not connected)
        ]

    @rule(data=st.data(), lengths=LENGTHS)
    def sample(self, data, lengths) -> None:
        server = self.servers[data.draw(st.sampled_from(list(self.servers)))]
        self.serial += 1
        group = a_group(self.serial, lengths, self.serial)
        server.generated += sampled_tokens(group)
        server.held.append(group)

    @precondition(lambda self: self.able(connected=True, having="held"))
    @rule(data=st.data())
    def send(self, data) -> None:
        name = data.draw(st.sampled_from(self.able(connected=True, having="held")))
        group = self.servers[name].held.pop()
        self.servers[name].sent.append(group)
        assert self.ledger.arrived(name, group), "it had not been sent before"
        self.here.append(group)

    @precondition(lambda self: self.able(connected=True, having="sent"))
    @rule(data=st.data())
    def send_again(self, data) -> None:
        name = data.draw(st.sampled_from(self.able(connected=True, having="sent")))
        before = self.ledger.generated
        assert not self.ledger.arrived(name, data.draw(st.sampled_from(self.servers[name].sent)))
        assert self.ledger.generated == before

    @precondition(lambda self: self.able(connected=False))
    @rule(data=st.data())
    def finish_unheard(self, data) -> None:
        """The connection is gone, or this is lost with it."""
        server = self.servers[data.draw(st.sampled_from(self.able(connected=False)))]
        if server.held:
            server.unacked.append(server.held.pop())

    @precondition(lambda self: self.able(connected=True, having="unacked"))
    @rule(data=st.data())
    def resend(self, data) -> None:
        """After its Welcome, which may come long after its Hello."""
        name = data.draw(st.sampled_from(self.able(connected=True, having="unacked")))
        self.it_resends(name, data.draw(st.integers(0, len(self.servers[name].unacked) - 1)))

    def it_resends(self, name: str, index: int) -> None:
        server = self.servers[name]
        group = server.unacked.pop(index)
        server.sent.append(group)
        if group.group_id in self.excluded.get(name, ()):
            assert server.uncounted is not None
            server.uncounted -= sampled_tokens(group)
        assert self.ledger.arrived(name, group), "it had not come to this learner"
        self.here.append(group)

    @precondition(lambda self: any(server.sent for server in self.servers.values()))
    @rule(acked=st.sets(st.integers(0, 99)), report=st.booleans())
    def new_ledger(self, acked, report) -> None:
        """The learner ends, and another begins. Of what had arrived, not all had been acknowledged."""
        self.ledger, self.here, self.excluded = TokenLedger(), [], {}
        for name, server in self.servers.items():
            server.unacked += [group for group in server.sent if group.ordinal not in acked]
            server.sent, server.connected, server.uncounted = [], False, None
            self.it_comes_back(name)
            if report:
                self.it_reports(name)

    @rule(data=st.data())
    def give_up(self, data) -> None:
        server = self.servers[data.draw(st.sampled_from(list(self.servers)))]
        if server.held:
            server.held.pop()

    @precondition(lambda self: self.able(connected=True))
    @rule(data=st.data())
    def report(self, data) -> None:
        self.it_reports(data.draw(st.sampled_from(self.able(connected=True))))

    def it_reports(self, name: str) -> None:
        server = self.servers[name]
        if server.uncounted is None:
            self.excluded[name] = {group.group_id for group in server.unacked}
            server.uncounted = server.generated - server.tokens_held - tokens_of(server.sent)
        self.ledger.reported(name, generated=server.generated, held=server.tokens_held)

    @precondition(lambda self: self.able(connected=True))
    @rule(data=st.data())
    def leave(self, data) -> None:
        name = data.draw(st.sampled_from(self.able(connected=True)))
        self.servers[name].connected = False
        self.ledger.left(name)

    @precondition(lambda self: self.able(connected=False))
    @rule(data=st.data())
    def come_back(self, data) -> None:
        self.it_comes_back(data.draw(st.sampled_from(self.able(connected=False))))

    def it_comes_back(self, name: str) -> None:
        self.servers[name].connected = True
        unacked = [group.group_id for group in self.servers[name].unacked]
        self.ledger.joined(name, fresh=False, unacked=unacked)

    @precondition(lambda self: self.here)
    @rule(how=st.sampled_from([end for end in TokenEnd if end not in (TokenEnd.TRAINED, TokenEnd.ABORTED)]))
    def end(self, how) -> None:
        self.ledger.ended(self.here.pop(), how)

    @precondition(lambda self: self.here)
    @rule(mask=st.booleans())
    def train(self, mask) -> None:
        self.ledger.trained([self.here.pop()], mask_truncated_completions=mask)

    @invariant()
    def sums_are_exact(self) -> None:
        ledger = self.ledger
        assert ledger.generated == sum(ledger.ends.values()) + ledger.under_way
        assert ledger.under_way >= tokens_of(self.here)
        assert all(count >= 0 for count in ledger.ends.values())
        arrived = sum(tokens_of(server.sent) for server in self.servers.values())
        assert arrived <= ledger.generated <= sum(server.generated for server in self.servers.values())

    @rule()
    def once_all_have_reported_it_is_the_truth(self) -> None:
        for name, server in self.servers.items():
            if not server.connected:
                self.it_comes_back(name)
            self.it_reports(name)
        held = sum(server.tokens_held for server in self.servers.values())
        assert self.ledger.generated == sum(server.counted for server in self.servers.values())
        assert self.ledger.under_way == held + tokens_of(self.here)

    @rule(data=st.data())
    def once_all_is_over_it_is_the_truth(self, data) -> None:
        for name in self.able(connected=False):
            self.it_comes_back(name)
        for name, server in self.servers.items():
            if data.draw(st.booleans()):
                self.it_reports(name)
            while server.unacked:
                self.it_resends(name, 0)
            server.held.clear()
        self.once_all_have_reported_it_is_the_truth()


TestTokenMachine = TokenMachine.TestCase
TestTokenMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_a_trained_group_ends_completion_by_completion():
    group = make_group(
        lengths=[3, 4, 5, 6],
        rewards=[1.0, 0.0, None, None],
        finish_reasons=[FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT, FinishReason.STOP],
    )
    for mask, expected in ((True, (3, 4)), (False, (7, 0))):
        ledger = TokenLedger()
        ledger.restored(group)
        ledger.trained([group], mask_truncated_completions=mask)
        ends = ledger.ends
        assert (ends[TokenEnd.TRAINED], ends[TokenEnd.TRUNCATED]) == expected
        assert (ends[TokenEnd.ABORTED], ends[TokenEnd.FILTERED], ledger.under_way) == (5, 6, 0)


def test_what_a_server_held_is_aborted_while_it_is_gone():
    ledger = TokenLedger()
    ledger.joined("p", fresh=True)
    ledger.reported("p", generated=20, held=8)
    ledger.left("p")
    assert (ledger.ends[TokenEnd.ABORTED], ledger.under_way, ledger.generated) == (20, 0, 20)
    ledger.joined("p", fresh=False)
    ledger.reported("p", generated=22, held=10)
    assert (ledger.ends[TokenEnd.ABORTED], ledger.under_way, ledger.generated) == (12, 10, 22)


def test_what_an_environment_wrote_was_not_sampled():
    group = make_group(lengths=[3, 2], rewards=[1.0, 0.0], loss_mask=np.array([1, 0, 1, 0, 1], np.uint8))
    ledger = TokenLedger()
    ledger.restored(group)
    assert ledger.generated == 3
    ledger.trained([group], mask_truncated_completions=False)
    assert ledger.ends[TokenEnd.TRAINED] == 3


def test_a_continued_run_goes_on_with_the_last_row():
    ledger, group = TokenLedger(), make_group(lengths=[3, 4], rewards=[1.0, 0.0])
    ledger.joined("p", fresh=True)
    assert ledger.arrived("p", group)
    ledger.trained([group], mask_truncated_completions=False)
    ledger.reported("p", generated=20, held=8)
    row = ledger.metrics()
    assert (row["tokens/generated"], row["tokens/aborted"], row["tokens/under_way"]) == (20, 5, 8)
    continued = TokenLedger()
    continued.resume(row)
    assert continued.generated == sum(continued.ends.values()) == 12
    assert continued.under_way == 0, "it is counted when it arrives"
    continued.joined("p", fresh=False)
    continued.reported("p", generated=30, held=10)
    assert (continued.generated, continued.under_way) == (22, 10), (
        "what came of the other incarnation is not this one's"
    )
    continued.reported("p", generated=35, held=4)
    assert (continued.generated, continued.ends[TokenEnd.ABORTED]) == (27, 16)


def test_a_restored_group_whose_ack_was_lost_with_the_learner_counts_once():
    ledger, group = TokenLedger(), make_group(lengths=[3, 4], rewards=[1.0, 0.0])
    ledger.journaled({group.group_id: group_digest(group)})
    ledger.joined("p", fresh=False)
    assert not ledger.arrived("p", group), "also while its prompt is not granted again"
    assert ledger.generated == 0
    ledger.restored(group)
    assert not ledger.arrived("p", group)
    assert ledger.generated == ledger.under_way == 7


def test_a_group_turned_away_and_taken_later_counts_once():
    """A restarted learner hears of it before it has granted the prompt, and then again."""
    ledger, group = TokenLedger(), make_group(lengths=[3, 4], rewards=[1.0, 0.0])
    ledger.joined("p", fresh=True)
    assert ledger.arrived("p", group)
    ledger.ended(group, TokenEnd.DUPLICATE)
    assert (ledger.ends[TokenEnd.DUPLICATE], ledger.under_way) == (7, 0)
    assert not ledger.arrived("p", group)
    ledger.wanted_after_all(group)
    assert (ledger.ends[TokenEnd.DUPLICATE], ledger.under_way, ledger.generated) == (0, 7, 7)


def test_what_was_not_acknowledged_before_the_learner_restarted_counts_when_it_comes_again():
    """The heartbeat comes first: nothing holds it back until the Welcome."""
    ledger, group = TokenLedger(), make_group(lengths=[100, 200], rewards=[1.0, 0.0])
    ledger.joined("p", fresh=False, unacked=[group.group_id])
    ledger.reported("p", generated=1000, held=200)
    assert ledger.generated == ledger.under_way == 200
    assert ledger.arrived("p", group)
    assert (ledger.generated, ledger.under_way) == (500, 500), "what it holds, it still holds"
    ledger.reported("p", generated=1000, held=0)
    assert (ledger.generated, ledger.under_way, ledger.ends[TokenEnd.ABORTED]) == (500, 300, 200)
    ledger.left("p")
    ledger.joined("p", fresh=False, unacked=[group.group_id])
    assert not ledger.arrived("p", group)
    ledger.reported("p", generated=1010, held=10)
    assert (ledger.generated, ledger.under_way, ledger.ends[TokenEnd.ABORTED]) == (510, 310, 200)
    assert ledger.arrived("p", make_group(lengths=[4, 6], rewards=[1.0, 0.0])), "the same id, sampled anew"
    assert (ledger.generated, ledger.under_way, ledger.ends[TokenEnd.ABORTED]) == (510, 310, 200)


def test_what_arrives_after_all_was_not_aborted():
    ledger, group = TokenLedger(), make_group(lengths=[3, 4], rewards=[1.0, 0.0])
    ledger.joined("p", fresh=True)
    ledger.reported("p", generated=7, held=7)
    ledger.left("p")
    ledger.joined("p", fresh=False, unacked=[group.group_id])
    assert ledger.arrived("p", group)
    assert (ledger.generated, ledger.under_way, ledger.ends[TokenEnd.ABORTED]) == (7, 7, 0)


def test_servers_that_come_and_go_leave_their_numbers_and_nothing_else(monkeypatch):
    monkeypatch.setattr("learner.token_ledger.ARRIVALS_KEPT", 8)
    monkeypatch.setattr("learner.token_ledger.DEPARTED_KEPT", 4)
    ledger = TokenLedger()
    for number in range(50):
        process, group = f"p{number}", a_group(number, [3, 4], number)
        ledger.joined(process, fresh=True)
        assert ledger.arrived(process, group)
        ledger.ended(group, TokenEnd.FILTERED)
        ledger.reported(process, generated=12, held=2)
        ledger.left(process)
    assert (ledger.generated, ledger.under_way) == (600, 0)
    assert (ledger.ends[TokenEnd.ABORTED], ledger.ends[TokenEnd.FILTERED]) == (250, 350)
    assert (len(ledger._servers), len(ledger._departed), len(ledger._seen)) == (0, 4, 8)


def test_costs():
    found = costs(2_000_000, 3_000_000, learner_s=100.0, servers_s=400.0)
    assert found == {
        "cost/generated_per_trained": 1.5, "cost/learner_s_per_mtok": 50.0, "cost/server_s_per_mtok": 200.0,
    }  # fmt: skip
    assert all(math.isnan(cost) for cost in costs(0, 5, learner_s=1.0, servers_s=1.0).values())
