"""Every token once: the ledger against servers that keep count themselves, whatever happens between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from learner.token_ledger import TokenEnd, TokenLedger, costs, sampled_tokens
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
    sent: list[Group] = field(default_factory=list)
    """May be sent again."""
    connected: bool = True


class TokenMachine(RuleBasedStateMachine):
    """Servers sample, send, send again, give up, report, leave and come back; the learner ends what arrived."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = TokenLedger()
        self.servers: dict[str, Truth] = {}
        self.here: list[Group] = []
        self.serial = 0

    @initialize()
    def a_server(self) -> None:
        self.join()

    @rule()
    def join(self) -> None:
        name = f"process{len(self.servers)}"
        self.servers[name] = Truth()
        self.ledger.joined(name, fresh=True)

    @rule(data=st.data(), lengths=LENGTHS)
    def sample(self, data, lengths) -> None:
        server = self.servers[data.draw(st.sampled_from(sorted(self.servers)))]
        self.serial += 1
        group = a_group(self.serial, lengths, self.serial)
        server.generated += sampled_tokens(group)
        server.held.append(group)

    def a_connected(self, data) -> str | None:
        names = sorted(name for name, server in self.servers.items() if server.connected)
        return data.draw(st.sampled_from(names)) if names else None

    @rule(data=st.data())
    def send(self, data) -> None:
        name = self.a_connected(data)
        if name is None or not self.servers[name].held:
            return
        group = self.servers[name].held.pop()
        self.servers[name].sent.append(group)
        assert self.ledger.arrived(name, group), "it had not been sent before"
        self.here.append(group)

    @rule(data=st.data())
    def send_again(self, data) -> None:
        name = self.a_connected(data)
        if name is not None and self.servers[name].sent:
            before = self.ledger.generated
            assert not self.ledger.arrived(name, data.draw(st.sampled_from(self.servers[name].sent)))
            assert self.ledger.generated == before

    @rule(data=st.data())
    def give_up(self, data) -> None:
        server = self.servers[data.draw(st.sampled_from(sorted(self.servers)))]
        if server.held:
            server.held.pop()

    @rule(data=st.data())
    def report(self, data) -> None:
        name = self.a_connected(data)
        if name is not None:
            server = self.servers[name]
            held = sum(map(sampled_tokens, server.held))
            self.ledger.reported(name, generated=server.generated, held=held)

    @rule(data=st.data())
    def leave(self, data) -> None:
        name = self.a_connected(data)
        if name is not None:
            self.servers[name].connected = False
            self.ledger.left(name)

    @rule(data=st.data())
    def come_back(self, data) -> None:
        gone = sorted(name for name, server in self.servers.items() if not server.connected)
        if gone:
            name = data.draw(st.sampled_from(gone))
            self.servers[name].connected = True
            self.ledger.joined(name, fresh=False)

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
        assert ledger.under_way >= sum(map(sampled_tokens, self.here))
        assert all(count >= 0 for count in ledger.ends.values())
        arrived = sum(sampled_tokens(group) for server in self.servers.values() for group in server.sent)
        assert arrived <= ledger.generated <= sum(server.generated for server in self.servers.values())

    @rule()
    def once_all_have_reported_it_is_the_truth(self) -> None:
        for name, server in self.servers.items():
            if server.connected:
                held = sum(map(sampled_tokens, server.held))
                self.ledger.reported(name, generated=server.generated, held=held)
        if all(server.connected for server in self.servers.values()):
            held = sum(sampled_tokens(group) for server in self.servers.values() for group in server.held)
            assert self.ledger.generated == sum(server.generated for server in self.servers.values())
            assert self.ledger.under_way == held + sum(map(sampled_tokens, self.here))


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
    ledger.journaled(group)
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


def test_costs():
    found = costs(2_000_000, 3_000_000, learner_s=100.0, servers_s=400.0)
    assert found == {
        "cost/generated_per_trained": 1.5, "cost/learner_s_per_mtok": 50.0, "cost/server_s_per_mtok": 200.0,
    }  # fmt: skip
    assert all(math.isnan(cost) for cost in costs(0, 5, learner_s=1.0, servers_s=1.0).values())
