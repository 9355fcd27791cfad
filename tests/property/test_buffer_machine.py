"""The buffer against a plain dictionary, driven at random."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from learner.buffer import Buffer
from tests.factories import make_train_group


class BufferMachine(RuleBasedStateMachine):
    """Nothing is lost, doubled or reordered; bytes are always those of what is held (what is reserved covers them)."""

    def __init__(self):
        super().__init__()
        self.buffer = Buffer()
        self.held = {}
        self.next_sequence = 0

    @rule(skipped=st.integers(0, 3), lengths=st.lists(st.integers(1, 9), min_size=2, max_size=4))
    def offer(self, skipped, lengths):
        sequence = self.next_sequence + skipped
        self.next_sequence = sequence + 1
        group = make_train_group(ordinal=sequence, rewards=[1.0] * len(lengths), lengths=lengths)
        self.buffer.offer(group)
        self.held[sequence] = group

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def take(self, data):
        wanted = data.draw(st.lists(st.sampled_from(sorted(self.held)), unique=True))
        taken = self.buffer.take(wanted)
        assert [id(group) for group in taken] == [id(self.held.pop(sequence)) for sequence in wanted]

    @invariant()
    def counts_agree(self):
        assert len(self.buffer) == len(self.held)
        tokens = sum(int(train.group.completion_lengths.sum()) for train in self.held.values())
        assert self.buffer.num_bytes == 8 * tokens


BufferMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestBuffer = BufferMachine.TestCase
