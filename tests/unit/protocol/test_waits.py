"""Every wait is named, shown while it lasts, kept as a span when it ends, and over at its deadline."""

from __future__ import annotations

import asyncio

import pytest

from learner.tuning.virtual_time import run_virtual
from protocol.errors import HeadwayError
from protocol.waits import SPANS_KEPT, Reminders, Span, Waiting, Waits, WaitTimeout


def on_virtual_time(scenario):
    """Run `scenario(waits)` with waits on the loop's own clock."""

    async def main():
        await scenario(Waits(asyncio.get_running_loop().time))

    run_virtual(main())


def test_a_wait_returns_what_it_waited_for_and_leaves_a_span():
    async def scenario(waits):
        assert (
            await waits.wait(asyncio.sleep(3, "groups"), name="batch", owner="batch_loop", deadline_s=None) == "groups"
        )
        assert list(waits.spans) == [Span("batch", "batch_loop", 0.0, 3.0)]
        assert waits.current() == []

    on_virtual_time(scenario)


def test_waits_going_on_are_shown_longest_first():
    async def scenario(waits):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(waits.wait(asyncio.sleep(5), name="batch", owner="server", deadline_s=None))
            await asyncio.sleep(2)
            tasks.create_task(waits.wait(asyncio.sleep(1), name="disk", owner="journal", deadline_s=10))
            await asyncio.sleep(0.5)
            assert [(w.name, w.owner, w.started_s, w.deadline_s) for w in waits.current()] == [
                ("batch", "server", 0.0, None),
                ("disk", "journal", 2.0, 10),
            ]
            assert waits.total_s("batch") == 2.5
            assert waits.total_s("disk") == 0.5
        assert (waits.total_s("batch"), waits.total_s("disk"), waits.total_s("nothing")) == (5.0, 1.0, 0.0)
        assert [span.name for span in waits.spans] == ["disk", "batch"], "in the order of their ends"

    on_virtual_time(scenario)


def test_totals_add_up_over_waits_of_one_name():
    async def scenario(waits):
        for seconds in (1, 2, 4):
            await waits.wait(asyncio.sleep(seconds), name="batch", owner="server", deadline_s=None)
        assert waits.total_s("batch") == 7.0

    on_virtual_time(scenario)


def test_a_deadline_raises_with_the_waits_name():
    async def scenario(waits):
        with pytest.raises(WaitTimeout, match=r"waited 2\.5 s for publish \(publisher\)"):
            await waits.wait(asyncio.Event().wait(), name="publish", owner="publisher", deadline_s=2.5)
        assert asyncio.get_running_loop().time() == 2.5
        assert (waits.current(), [span.name for span in waits.spans]) == ([], ["publish"])

    on_virtual_time(scenario)


def test_a_timeout_is_ours_and_the_standard_librarys():
    assert issubclass(WaitTimeout, HeadwayError)
    assert issubclass(WaitTimeout, TimeoutError)


@pytest.mark.parametrize("error", [ValueError("bad"), TimeoutError("the disk's own")])
def test_an_error_of_what_is_waited_for_passes_through(error):
    async def fail():
        await asyncio.sleep(1)
        raise error

    async def scenario(waits):
        with pytest.raises(type(error)) as raised:
            await waits.wait(fail(), name="disk", owner="journal", deadline_s=5)
        assert raised.value is error
        assert waits.current() == []
        assert waits.total_s("disk") == 1.0

    on_virtual_time(scenario)


def test_a_cancelled_wait_is_no_longer_shown():
    async def scenario(waits):
        task = asyncio.create_task(waits.wait(asyncio.Event().wait(), name="batch", owner="server", deadline_s=None))
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (waits.current(), waits.total_s("batch")) == ([], 1.0)

    on_virtual_time(scenario)


def test_spans_are_bounded():
    async def scenario(waits):
        for _ in range(SPANS_KEPT + 5):
            await waits.wait(asyncio.sleep(0), name="batch", owner="server", deadline_s=None)
        assert len(waits.spans) == SPANS_KEPT

    on_virtual_time(scenario)


def test_a_long_wait_is_logged_and_again_when_it_has_doubled(caplog):
    caplog.set_level("INFO", logger="protocol.waits")
    reminders, publish = Reminders(), Waiting("publish", "publisher", 100.0, 120.0)
    told = [now_s for now_s in range(100, 200) if reminders.tell([publish], float(now_s))]
    assert told == [110, 120, 140, 180]
    assert "event=waiting wait=publish owner=publisher seconds=10 deadline_s=120" in caplog.text
    assert reminders.tell([], 300.0) == []
    assert reminders.tell([Waiting("publish", "publisher", 295.0, None)], 300.0) == [], "another wait of that name"


def test_a_wait_says_its_owner_its_seconds_and_its_deadline():
    assert Waiting("publish", "publisher", 1.0, 120.0).describe(4.2) == "publish (publisher) for 3 s of 120 s"
    assert Waiting("groups", "rollout servers", 1.0, None).describe(4.2) == "groups (rollout servers) for 3 s"
