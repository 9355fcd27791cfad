"""How a process ends: with one cause, after what must not be cut has ended; signals reach the loop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal

import pytest

from protocol.errors import ConfigError, RunStopped
from protocol.signals import Signal
from protocol.tasks import finish, on_signals, run_loop


async def fail_with(error: BaseException, *after: asyncio.Event) -> None:
    for event in after:
        await event.wait()
    raise error


def failing(*errors: BaseException):
    """A main whose tasks all fail, in this order, before any of them can be cancelled."""

    async def main():
        begin = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            for error in errors:
                tasks.create_task(fail_with(error, begin))
            await asyncio.sleep(0)
            begin.set()
            await asyncio.sleep(60)

    return main


def test_run_loop_returns_what_main_returns():
    async def main():
        await asyncio.sleep(0)
        return 7

    assert run_loop(main) == 7


def test_run_loop_raises_an_error_of_main_as_it_is():
    error = ConfigError("no such model")
    with pytest.raises(ConfigError, match="no such model") as raised:
        run_loop(lambda: fail_with(error))
    assert raised.value is error


def test_of_several_failures_ours_is_the_cause_and_the_others_are_logged(caplog):
    stopped, bug = RunStopped("5 steps in a row"), KeyError("a consequence")
    with caplog.at_level(logging.WARNING, "protocol.tasks"), pytest.raises(RunStopped, match="5 steps") as raised:
        run_loop(failing(bug, stopped))
    assert raised.value is stopped
    assert raised.value.__cause__ is None
    assert [record.getMessage() for record in caplog.records] == ["event=also_failed error=KeyError('a consequence')"]


def test_an_operating_system_error_is_a_known_cause():
    with pytest.raises(OSError, match="No space left"):
        run_loop(failing(ValueError("late"), OSError(28, "No space left on device")))


def test_without_a_known_cause_the_first_failure_is_raised(caplog):
    with pytest.raises(ZeroDivisionError, match="first"):
        run_loop(failing(ZeroDivisionError("first"), KeyError("second")))
    assert "KeyError('second')" in caplog.text


def test_causes_are_found_in_nested_groups():
    async def main():
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(failing(ValueError("x"), ConfigError("inner"))())

    with pytest.raises(ConfigError, match="inner"):
        run_loop(main)


def test_finish_returns_the_result_or_raises_the_tasks_own_error():
    async def main():
        async def work():
            await asyncio.sleep(0)
            return "done"

        assert await finish(asyncio.ensure_future(work())) == "done"
        with pytest.raises(ValueError, match="bad"):
            await finish(asyncio.ensure_future(fail_with(ValueError("bad"))))
        with pytest.raises(TimeoutError, match="its own"):
            await finish(asyncio.ensure_future(fail_with(TimeoutError("its own"))))

    asyncio.run(main())


@pytest.mark.parametrize("cancellations", [1, 3])
def test_finish_holds_a_cancellation_back_until_the_task_is_done(cancellations):
    async def main():
        done, finished = asyncio.Event(), []

        async def work():
            await done.wait()
            finished.append(True)
            return "result"

        async def caller():
            await finish(asyncio.ensure_future(work()))

        task = asyncio.create_task(caller())
        for _ in range(cancellations):
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not task.done()
        done.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert finished == [True]

    asyncio.run(main())


def test_a_cancelled_finish_speaks_of_the_cancellation_not_of_the_tasks_error():
    """And the task's error counts as retrieved: nothing is said of it when it is collected (warnings are errors)."""

    async def main():
        fails = asyncio.Event()
        task = asyncio.create_task(finish(asyncio.ensure_future(fail_with(ValueError("lost"), fails))))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        fails.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_finish_passes_on_that_the_task_itself_was_cancelled():
    async def main():
        inner = asyncio.ensure_future(asyncio.sleep(60))
        task = asyncio.create_task(finish(inner))
        await asyncio.sleep(0)
        inner.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 5)

    asyncio.run(main())


def test_signals_reach_the_handler_on_the_loop_and_only_while_inside():
    heard = []

    async def main():
        arrived = asyncio.Event()

        def handler(name):
            heard.append((name, asyncio.get_running_loop() is not None))
            arrived.set()

        with on_signals(handler, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(os.getpid(), signal.SIGUSR2)
            await asyncio.wait_for(arrived.wait(), 5)
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL

    run_loop(main)
    assert heard == [("SIGUSR2", True)]


def test_a_signal_wakes_all_who_wait_and_keeps_nothing():
    async def main():
        changed, woken = Signal(), []

        async def waiter(name):
            await changed.wait()
            woken.append(name)

        changed.notify()  # nobody waits: it is gone
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(waiter("a"))
            tasks.create_task(waiter("b"))
            await asyncio.sleep(0)
            assert woken == []
            changed.notify()
        assert woken == ["a", "b"]
        again = asyncio.ensure_future(changed.wait())
        await asyncio.sleep(0)
        assert not again.done(), "each notify is for those who wait at that moment"
        again.cancel()

    asyncio.run(main())
