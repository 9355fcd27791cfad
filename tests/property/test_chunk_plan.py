"""ChunkPlan against a model that remembers every single byte."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from protocol.weights.chunks import Arrival, ChunkPlan, Stretch

MISSING, OUTSTANDING, HERE = "missing", "outstanding", "here"


class ChunkPlanMachine(RuleBasedStateMachine):
    @initialize(
        sizes=st.lists(st.sampled_from([0, 1, 2, 3, 7, 8, 9, 30]), max_size=8),
        chunk_bytes=st.integers(1, 9),
        begin=st.integers(0, 20),
    )
    def start(self, sizes: list[int], chunk_bytes: int, begin: int) -> None:
        self.tensors = []
        end = begin
        for nbytes in sizes:
            self.tensors.append(Stretch(end, nbytes))
            end += nbytes
        self.chunk_bytes = chunk_bytes
        self.begin, self.end = begin, end
        self.bytes = dict.fromkeys(range(begin, end), MISSING)
        self.plan = ChunkPlan(self.tensors, chunk_bytes)

    def chunks(self, state: str) -> list[Stretch]:
        starts = range(self.begin, self.end, self.chunk_bytes)
        chunks = [Stretch(at, min(self.chunk_bytes, self.end - at)) for at in starts]
        for chunk in chunks:
            assert len({self.bytes[at] for at in range(chunk.offset, sum(chunk))}) == 1
        return [chunk for chunk in chunks if self.bytes[chunk.offset] == state]

    def mark(self, stretch: Stretch, state: str) -> None:
        self.bytes.update(dict.fromkeys(range(stretch.offset, sum(stretch)), state))

    @rule(most=st.integers(1, 4))
    def take(self, most: int) -> None:
        missing = self.chunks(MISSING)
        stretch = self.plan.take(most)
        assert (stretch is None) == (not missing)
        if stretch is not None:
            assert {self.bytes[at] for at in range(stretch.offset, sum(stretch))} == {MISSING}
            assert 0 < stretch.nbytes <= most * self.chunk_bytes
            self.mark(stretch, OUTSTANDING)

    @precondition(lambda self: self.chunks(OUTSTANDING))
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        chunk = data.draw(st.sampled_from(self.chunks(OUTSTANDING)))
        assert self.plan.arrive(*chunk) is Arrival.NEW
        self.mark(chunk, HERE)

    @precondition(lambda self: self.chunks(OUTSTANDING))
    @rule(data=st.data(), nbytes=st.integers(0, 12))
    def answer_of_wrong_size(self, data: st.DataObject, nbytes: int) -> None:
        chunk = data.draw(st.sampled_from(self.chunks(OUTSTANDING)))
        if nbytes != chunk.nbytes:
            assert self.plan.arrive(chunk.offset, nbytes) is Arrival.WRONG_SIZE
            self.mark(chunk, MISSING)

    @precondition(lambda self: self.chunks(HERE) or self.chunks(MISSING))
    @rule(data=st.data(), nbytes=st.integers(0, 12))
    def answer_nobody_waits_for(self, data: st.DataObject, nbytes: int) -> None:
        chunk = data.draw(st.sampled_from(self.chunks(HERE) + self.chunks(MISSING)))
        assert self.plan.arrive(chunk.offset, nbytes) is Arrival.DUPLICATE

    @rule(offset=st.integers(-5, 200), nbytes=st.integers(0, 12))
    def answer_from_elsewhere(self, offset: int, nbytes: int) -> None:
        if offset not in range(self.begin, self.end, self.chunk_bytes):
            assert self.plan.arrive(offset, nbytes) is Arrival.FOREIGN

    @rule()
    def cut(self) -> None:
        self.plan.lose_outstanding()
        for chunk in self.chunks(OUTSTANDING):
            self.mark(chunk, MISSING)

    @precondition(lambda self: self.end > self.begin)
    @rule(data=st.data())
    def refetch(self, data: st.DataObject) -> None:
        """Only tensors with bytes can fail, and only when they are complete."""
        index = data.draw(st.sampled_from([i for i, tensor in enumerate(self.tensors) if tensor.nbytes]))
        offset, nbytes = self.tensors[index]
        if {self.bytes[at] for at in range(offset, offset + nbytes)} != {HERE}:
            return
        touched = [c for c in self.chunks(HERE) if c.offset < offset + nbytes and sum(c) > offset]
        affected = self.plan.refetch(index)
        for chunk in touched:
            self.mark(chunk, MISSING)
        incomplete = {
            i
            for i, (at, size) in enumerate(self.tensors)
            if any(at < sum(chunk) and at + size > chunk.offset and size for chunk in touched)
        }
        assert incomplete <= set(affected)
        assert all(self.tensors[i].nbytes == 0 for i in set(affected) - incomplete)

    @invariant()
    def counts_agree(self) -> None:
        assert self.plan.num_outstanding == len(self.chunks(OUTSTANDING))
        assert self.plan.num_done == len(self.chunks(HERE))
        assert self.plan.done == all(state == HERE for state in self.bytes.values())

    @invariant()
    def contiguous_bytes_agree(self) -> None:
        for index, (offset, nbytes) in enumerate(self.tensors):
            gap = next((at for at in range(offset, offset + nbytes) if self.bytes[at] != HERE), offset + nbytes)
            assert self.plan.contiguous_bytes(index) == gap - offset

    @invariant()
    def blocks_in_every_chunk_agree(self) -> None:
        for at in range(self.begin, self.end, self.chunk_bytes):
            nbytes = min(self.chunk_bytes, self.end - at)
            found = [i for i in self.plan.blocks_in(at, nbytes) if self.tensors[i].nbytes]
            expected = [i for i, (o, n) in enumerate(self.tensors) if n and o < at + nbytes and o + n > at]
            assert found == expected

    def teardown(self) -> None:
        """From any state, honest answers complete the version, and each missing byte is asked for once."""
        if not hasattr(self, "plan"):
            return
        self.plan.lose_outstanding()
        left = sum(state != HERE for state in self.bytes.values())
        asked = 0
        while (stretch := self.plan.take(3)) is not None:
            asked += stretch.nbytes
            for at in range(stretch.offset, sum(stretch), self.chunk_bytes):
                assert self.plan.arrive(at, min(self.chunk_bytes, sum(stretch) - at)) is Arrival.NEW
        assert self.plan.done
        assert asked == left


TestChunkPlan = ChunkPlanMachine.TestCase
