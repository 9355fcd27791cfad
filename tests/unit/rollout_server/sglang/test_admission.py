"""Who is let into SGLang, when, and how many at once."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rollout_server.engines.sglang.admission import Admission, Limit

GROUPS = st.sampled_from("abc")


class AdmissionMachine(RuleBasedStateMachine):
    """Samples come, are cancelled, aborted and leave in any order; the limit moves, the door opens and closes."""

    @initialize(limit=st.integers(1, 4))
    def begin(self, limit: int) -> None:
        self.loop = asyncio.new_event_loop()
        self.admission = self.in_loop(self.make(limit))
        self.open = True
        self.queue: list[tuple[str, asyncio.Task[bool]]] = []
        """Who has neither been let in nor sent away, by arrival."""
        self.inside: list[asyncio.Task[bool]] = []

    async def make(self, limit: int) -> Admission:
        admission = Admission(Limit(room=4))
        admission.limit.value = limit
        return admission

    def in_loop(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def settle(self) -> None:
        """Let every task that can run, run; see who is in."""
        before = len(self.inside)
        for _ in range(4):
            self.in_loop(asyncio.sleep(0))
        let_in = [task for _, task in self.queue if task.done() and not task.cancelled() and task.result()]
        assert let_in == [task for _, task in self.queue][: len(let_in)], "first come, first served"
        assert not let_in or before + len(let_in) <= self.admission.limit.value
        assert self.open or not let_in
        self.inside += let_in
        self.queue = [(group, task) for group, task in self.queue if task not in let_in]

    @rule(group=GROUPS)
    def enter(self, group: str) -> None:
        self.queue.append((group, self.loop.create_task(self.admission.enter(group))))
        self.settle()

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.inside.remove(data.draw(st.sampled_from(self.inside)))
        self.admission.leave()
        self.settle()

    @precondition(lambda self: self.queue)
    @rule(data=st.data(), seat_at_the_same_time=st.booleans())
    def cancel(self, data: st.DataObject, seat_at_the_same_time: bool) -> None:
        entry = data.draw(st.sampled_from(self.queue))
        if seat_at_the_same_time and self.inside:
            self.inside.pop()
            self.admission.leave()  # may have given the seat to the very sample that is cancelled now
        entry[1].cancel()
        self.queue.remove(entry)
        self.settle()
        assert entry[1].cancelled()

    @rule(group=GROUPS)
    def abort(self, group: str) -> None:
        self.admission.abort(group)
        sent_away = [task for name, task in self.queue if name == group]
        self.queue = [(name, task) for name, task in self.queue if name != group]
        self.settle()
        assert [task.result() for task in sent_away] == [False] * len(sent_away)

    @rule(value=st.integers(1, 4))
    def move_the_limit(self, value: int) -> None:
        self.admission.limit.value = value
        self.admission.admit()
        self.settle()

    @rule()
    def close(self) -> None:
        self.admission.close()
        self.open = False

    @rule()
    def reopen(self) -> None:
        self.open = True
        self.admission.open()
        self.settle()

    @invariant()
    def nothing_is_lost(self) -> None:
        admission = self.admission
        assert admission.running == len(self.inside)
        assert admission.waiting == len(self.queue)
        assert admission.idle.is_set() == (not self.inside)
        assert not self.open or not self.queue or len(self.inside) >= admission.limit.value

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            for _, task in self.queue:
                task.cancel()
            self.settle()
            self.loop.close()


TestAdmission = AdmissionMachine.TestCase
TestAdmission.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_seat_that_was_given_to_who_is_cancelled_goes_to_the_next() -> None:
    async def case() -> None:
        admission = Admission(Limit(room=1))
        assert await admission.enter("a")
        cancelled, following = (asyncio.create_task(admission.enter("b")) for _ in range(2))
        await asyncio.sleep(0)
        admission.leave()
        assert admission.running == 1, "it is given"
        cancelled.cancel()
        assert await asyncio.wait_for(following, 5)
        assert cancelled.cancelled()
        assert (admission.running, admission.waiting) == (1, 0)

    asyncio.run(case())


REPORTS = st.one_of(
    st.fixed_dictionaries(
        {"usage": st.floats(0, 1), "running": st.integers(0, 64), "queued": st.integers(0, 64),
         "waiting": st.integers(0, 9)}
    ),
    st.fixed_dictionaries({"retracted": st.booleans(), "running": st.integers(0, 64)}),
)  # fmt: skip


@given(room=st.integers(1, 64), reports=st.lists(REPORTS, max_size=200))
def test_the_limit_stays_between_one_and_room(room: int, reports: list[dict[str, Any]]) -> None:
    limit = Limit(room)
    assert limit.value == room
    for report in reports:
        before = limit.value
        moved = limit.ended(**report) if "retracted" in report else limit.observe(**report)
        assert moved == (limit.value != before)
        assert 1 <= limit.value <= room


def lowered(room: int, value: int) -> Limit:
    """A limit that something has lowered, a while ago."""
    limit = Limit(room)
    limit.value = value
    return limit


def turn_over(limit: Limit) -> None:
    for _ in range(limit.value):
        limit.ended(retracted=False, running=limit.value)


def observe(limit: Limit, usage: float, *, queued: int = 0, waiting: int = 5) -> bool:
    return limit.observe(usage=usage, running=limit.value, queued=queued, waiting=waiting)


def test_it_grows_by_a_quarter_with_every_turnover_while_the_cache_has_room() -> None:
    limit = lowered(64, 8)
    values = []
    for _ in range(5):
        assert not observe(limit, 0.3)
        turn_over(limit)
        assert observe(limit, 0.3)
        values.append(limit.value)
    assert values == [10, 12, 15, 18, 22]
    small = lowered(3, 1)
    for value in (2, 3):
        turn_over(small)
        assert observe(small, 0.0)
        assert small.value == value
    turn_over(small)
    assert not observe(small, 0.0)


def test_it_does_not_grow_when_the_cache_fills_or_nobody_waited() -> None:
    limit = lowered(64, 8)
    turn_over(limit)
    assert not observe(limit, 0.7)
    turn_over(limit)
    observe(limit, 0.3, waiting=0)
    assert limit.value == 8
    for _ in range(2):  # nobody waited for a part of this turnover
        limit.ended(retracted=False, running=8)
    observe(limit, 0.3, waiting=0)
    turn_over(limit)
    assert not observe(limit, 0.3)
    turn_over(limit)
    assert observe(limit, 0.3)


def test_a_full_cache_trims_to_what_fits() -> None:
    limit = lowered(64, 40)
    assert observe(limit, 0.9)
    assert limit.value == int(40 * 0.7 / 0.9)
    assert not observe(limit, 0.9), "what was decided must show its effect first"
    for _ in range(limit.value // 2):
        limit.ended(retracted=False, running=31)
    assert observe(limit, 0.9)
    assert limit.value == int(31 * 0.7 / 0.9)


def test_a_retraction_cuts_once_and_again_only_after_half_a_turnover() -> None:
    limit = lowered(64, 40)
    assert limit.ended(retracted=True, running=40)
    assert limit.value == 32
    assert not any(limit.ended(retracted=True, running=40) for _ in range(15))
    assert limit.ended(retracted=True, running=30)
    assert limit.value == 24


def test_a_retraction_of_a_sample_does_not_raise_the_limit() -> None:
    limit = lowered(64, 10)
    assert not limit.ended(retracted=True, running=60)
    assert limit.value == 10


def test_samples_that_queue_inside_for_want_of_memory_lower_it() -> None:
    limit = lowered(64, 40)
    assert not limit.observe(usage=0.7, running=32, queued=8, waiting=5)
    assert limit.observe(usage=0.7, running=31, queued=9, waiting=5)
    assert limit.value == 31


def test_samples_that_have_only_just_come_do_not_lower_it() -> None:
    limit = Limit(64)
    assert not limit.observe(usage=0.0, running=0, queued=64, waiting=5)
    assert limit.value == 64
