"""The pool against reward functions that hang, crash, lie and shout. Real processes, one pool for most tests."""

import asyncio
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing import active_children
from pathlib import Path

import pytest

from protocol.errors import ConfigError
from protocol.messages import RewardStatus
from rollout_server.rewards import workers
from rollout_server.rewards.base import RewardCall
from rollout_server.rewards.pool import RewardPool

OK, TIMEOUT, ERROR, UNSCORED = RewardStatus
HOSTILE = str(Path(__file__).with_name("hostile_rewards.py"))
NAMES = ("obey", "fail", "coroutine", "surroundings", "all_keywords", "some_keywords", "needs_column", "process_id")
A_STEP = "as a step of a completion; allowed is a pair of the index of its last token and a number"
TIMEOUT_S = 1.0
BOUND_S = 3 * TIMEOUT_S + 20.0
"""A call and the search for culprits, and as much again as a busy machine may take to start processes."""


def call(*completions, **columns):
    return RewardCall(
        prompts=["2+2="] * len(completions),
        completions=list(completions),
        completion_ids=[[5, 2]] * len(completions),
        finish_reasons=["stop"] * len(completions),
        columns=columns,
    )


class Session:
    """One pool with every hostile function, driven from plain tests; functions are scored one by one."""

    def __init__(self, runner, pool):
        self.run, self.pool = runner.run, pool

    def score(self, name, *completions, **columns):
        """Values, statuses and the note of one function."""
        column = self.run(self.pool._score_with(NAMES.index(name), call(*completions, **columns)))
        return column.values, column.statuses, column.note

    def settle(self):
        """Score until the pool has its full size again; the ids of its processes."""
        deadline = time.monotonic() + 20.0
        while len(workers_alive()) < 3 and time.monotonic() < deadline:
            assert self.score("obey", "yes")[1] == [OK]
        return workers_alive()


@pytest.fixture(scope="module")
def session():
    with socket.socket() as inheritable, asyncio.Runner() as runner:
        inheritable.set_inheritable(True)
        functions = [f"{HOSTILE}:{name}" for name in NAMES]
        pool = RewardPool(functions, workers=2, timeout_s=TIMEOUT_S, on_timeout=-2.0)
        runner.run(pool.__aenter__())
        yield Session(runner, pool)
        runner.run(pool.__aexit__(None, None, None))


def workers_alive():
    return {process.pid for process in active_children() if process.name == "pebble_pool_worker"}


def test_a_group_is_scored_by_every_function_in_order(session):
    scores = session.run(session.pool.score(call("number 2", "number -1", solution="x")))
    by_name = dict(zip(NAMES, scores.values.T.tolist(), strict=True))
    assert scores.values.shape == scores.statuses.shape == scores.seconds.shape == (2, len(NAMES))
    assert by_name["obey"] == [2.0, -1.0]
    assert by_name["coroutine"] == [0.25, 0.25]
    assert scores.statuses[:, NAMES.index("needs_column")].tolist() == [OK, OK]
    assert scores.statuses[:, NAMES.index("surroundings")].tolist() == [ERROR, ERROR]
    assert scores.notes == ("surroundings: ValueError: returned 4 values for 2 completions",)
    assert (scores.seconds > 0).all()


@pytest.mark.parametrize(
    ("order", "value", "status", "note"),
    [
        ("none", math.nan, UNSCORED, ""),
        ("yes", 1.0, OK, ""),
        ("numpy", 0.5, OK, ""),
        ("number nan", math.nan, ERROR, "returned nan for a completion; allowed is up to 1e+12 either way"),
        ("number -inf", math.nan, ERROR, "returned -inf for a completion; allowed is up to 1e+12 either way"),
        (
            "number 2e18",
            math.nan,
            ERROR,
            "returned 2e+18 for a completion; allowed is up to 1e+12 either way",
        ),
        ("huge", math.nan, ERROR, "returned inf for a completion; allowed is up to 1e+12 either way"),
        ("text", math.nan, ERROR, "returned a str for a completion; allowed is a number, None or a list of steps"),
        ("list", math.nan, ERROR, f"returned a float {A_STEP}"),
        ("steps (0, 1.5), (1, -1), (0, 0.25)", 0.75, OK, ""),
        ("steps", math.nan, ERROR, "returned no step for a completion; allowed is a step at least, or None"),
        ("steps (0, 1, 2),", math.nan, ERROR, f"returned a tuple {A_STEP}"),
        ("steps (0.0, 1),", math.nan, ERROR, f"returned a tuple {A_STEP}"),
        (
            "steps (2, 1),",
            math.nan,
            ERROR,
            "returned a step that ends with token 2 of a completion of 2 tokens; they are counted from 0",
        ),
        (
            "steps (-1, 1),",
            math.nan,
            ERROR,
            "returned a step that ends with token -1 of a completion of 2 tokens; they are counted from 0",
        ),
        (
            "steps (10 ** 5000, 1),",
            math.nan,
            ERROR,
            "returned a step that ends with token inf of a completion of 2 tokens; they are counted from 0",
        ),
        ("steps (0, 'high'),", math.nan, ERROR, "returned a step worth a str for a completion; allowed is a number"),
        (
            "steps (0, 1), (1, float('nan'))",
            math.nan,
            ERROR,
            "returned a step worth nan for a completion; allowed is up to 1e+12 either way",
        ),
        (
            "steps (0, 9e11), (1, 9e11)",
            math.nan,
            ERROR,
            "returned steps worth 1800000000000.0 for a completion; allowed is up to 1e+12 either way",
        ),
    ],
)
def test_only_finite_numbers_steps_and_none_are_results(session, order, value, status, note):
    values, statuses, noted = session.score("obey", "number 3", order)
    assert values == pytest.approx([3.0, value], nan_ok=True)
    assert statuses == [OK, status]
    assert noted == note


def test_steps_come_back_from_the_worker_with_their_completion(session):
    scores = session.run(session.pool.score(call("number 1", "steps (1, 0.5), (0, 2)", "none", "steps (0, 1), (9, 9)")))
    column = NAMES.index("obey")
    assert scores.steps == {(1, column): [(1, 0.5), (0, 2.0)]}
    assert scores.values[:, column].tolist() == pytest.approx([1.0, 2.5, math.nan, math.nan], nan_ok=True)
    assert scores.statuses[:, column].tolist() == [OK, OK, UNSCORED, ERROR]


@pytest.mark.parametrize("order", ["hang", "kill"])
def test_steps_survive_the_search_for_a_culprit(session, order):
    session.settle()
    column = session.run(session.pool._score_with(0, call("steps (0, 1),", order, "steps (1, 2),")))
    assert column.steps == {0: [(0, 1.0)], 2: [(1, 2.0)]}
    assert column.statuses[0] == column.statuses[2] == OK


@pytest.mark.parametrize(
    ("how", "note"),
    [
        ("value", "ValueError: ?[31mcannot read"),
        ("memory", "MemoryError"),
        ("exit", "SystemExit: 0"),
        ("unpicklable", "UnpicklableError: not"),
        ("short", "ValueError: returned 1 values for 2 completions"),
        ("scalar", "TypeError: returned float; allowed is a list of 2 numbers or None"),
    ],
)
def test_a_function_that_fails_as_a_whole_is_an_error_without_the_models_text(session, how, note):
    before = workers_alive()
    values, statuses, noted = session.score("fail", how, "a secret of the model")
    assert all(map(math.isnan, values))
    assert statuses == [ERROR, ERROR]
    assert noted == note
    assert workers_alive() == before, "no process is lost to an exception"


def test_arguments_are_columns_repeated_and_only_those_accepted(session):
    assert session.score("all_keywords", "a", "b", answer="4", extra=[1])[0] == [8.0, 8.0]
    assert session.score("some_keywords", "a", "b", answer="4", extra=[1])[0] == [42.0, 42.0]


def test_a_column_the_row_lacks_is_named_with_those_it_has(session):
    _, statuses, note = session.score("needs_column", "a", answer="4")
    assert statuses == [ERROR]
    assert note == (
        "TypeError: needs solution; the row has answer, completion_ids, completions, finish_reason, prompts"
    )


def test_a_worker_has_one_thread_no_socket_no_terminal_and_its_own_group(session):
    assert session.score("surroundings", *"abcd")[0] == [1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("order", ["hang", "spin", "deaf", "exit 0"])
def test_a_hang_is_killed_and_only_the_culprit_marked(session, order):
    before = session.settle()
    started = time.monotonic()
    values, statuses, note = session.score("obey", "number 1", order, "number 3")
    assert statuses == [OK, TIMEOUT, OK]
    assert values == [1.0, -2.0, 3.0]
    assert note == "killed after 1 s, scoring a completion"
    assert time.monotonic() - started < BOUND_S, "a bounded wait"
    assert before - workers_alive(), "a process was really killed"


@pytest.mark.parametrize(("order", "how"), [("exit 3", "exit code 3"), ("segfault", "SIGSEGV"), ("kill", "SIGKILL")])
def test_a_crash_is_an_error_of_the_culprit_alone(session, monkeypatch, order, how):
    # One that dies at once can break pebble, which then takes seconds to be built anew on a busy machine.
    monkeypatch.setattr(session.pool, "_timeout_s", 20.0)
    before = session.settle()
    values, statuses, note = session.score("obey", "number 1", order, "number 3")
    assert statuses == [OK, ERROR, OK]
    assert values == pytest.approx([1.0, math.nan, 3.0], nan_ok=True)
    assert note == f"its process died ({how}), scoring a completion"
    assert before - workers_alive(), "a process really died"


def test_hangs_use_up_a_bounded_time_and_those_whose_turn_never_came_are_not_punished(session, monkeypatch):
    monkeypatch.setattr(session.pool, "_timeout_s", 0.3)
    started = time.monotonic()
    values, statuses, _ = session.score("obey", *["hang"] * 12)
    assert time.monotonic() - started < BOUND_S
    assert statuses == [TIMEOUT] * 12
    assert values[0] == -2.0
    assert math.isnan(values[-1])


def test_twenty_hangs_leave_the_pool_its_size(session, monkeypatch):
    monkeypatch.setattr(session.pool, "_timeout_s", 0.3)

    async def hang_often():
        await asyncio.gather(*(session.pool._score_with(0, call("hang")) for _ in range(20)))

    before = session.settle()
    threads = threading.active_count()
    session.run(hang_often())
    after = session.settle()
    assert len(after) == 3
    assert not before & after, "every process was replaced"
    assert threading.active_count() <= threads


def test_idle_processes_that_die_break_pebble_and_are_replaced(session):
    killed = session.settle()
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    values, statuses, _ = session.score("obey", "process")
    assert statuses == [OK]
    assert values[0] not in killed
    assert not session.settle() & killed


@pytest.mark.parametrize("order", ["hang", "exit 0"])
@pytest.mark.parametrize("cause", ["the lock is never free", "the thread has died"])
def test_a_limit_that_pebble_does_not_see_to_is_seen_to(session, monkeypatch, order, cause):
    """Its lock went with a process that was killed while it held it; or its thread ran into a race of its own."""
    monkeypatch.setattr(session.pool, "_timeout_s", 0.3)
    monkeypatch.setattr(workers, "OVERDUE_S", 0.3)
    session.settle()
    broken = session.pool._workers._pool
    if cause == "the lock is never free":
        monkeypatch.setattr(broken._pool_manager.worker_manager, "maybe_stop_worker", lambda worker_id: False)
    else:
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        monkeypatch.setattr(broken._pool_manager, "update_status", lambda: 1 / 0)
    started = time.monotonic()
    values, statuses, _ = session.score("obey", order)
    assert (values, statuses) == ([-2.0], [TIMEOUT])
    assert time.monotonic() - started < BOUND_S
    assert session.pool._workers._pool is not broken, "it was replaced"


@pytest.fixture
def pipe(tmp_path):
    path = tmp_path / "pids"
    os.mkfifo(path)
    return path


async def hung_with_child(pool, pipe):
    """Start scoring with a function that starts a process and hangs; handles on both processes."""
    scoring = asyncio.create_task(pool.score(call("x", path=str(pipe))))
    pids = (await asyncio.to_thread(pipe.read_text)).split()
    return scoring, [handle_on(int(pid)) for pid in pids]


def handle_on(pid):
    """A pidfd; None when the process has ended already."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def end(handle):
    """Whether the process of a pidfd ends within twenty seconds."""
    if handle is None:
        return True
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    ended = bool(poll.poll(20_000))
    os.close(handle)
    return ended


def hanging_pool(timeout_s):
    return RewardPool([f"{HOSTILE}:hang_with_child"], workers=1, timeout_s=timeout_s, on_timeout=None)


def test_what_a_hung_function_started_dies_with_it(pipe):
    async def time_out():
        async with hanging_pool(TIMEOUT_S) as pool:
            scoring, handles = await hung_with_child(pool, pipe)
            scores = await scoring
            return scores.statuses.tolist(), [end(handle) for handle in handles]

    assert asyncio.run(time_out()) == ([[TIMEOUT]], [True, True])


def test_cancelling_and_leaving_kills_at_once_and_leaks_nothing(pipe):
    async def cancel_and_leave():
        threads = threading.active_count()
        async with hanging_pool(60.0) as pool:
            scoring, handles = await hung_with_child(pool, pipe)
            assert len(workers_alive() - before) == 2
            started = time.monotonic()
            scoring.cancel()
            with pytest.raises(asyncio.CancelledError):
                await scoring
        left_after = time.monotonic() - started
        # to_thread's own threads stay for the loop's life
        extra = [thread.name for thread in threading.enumerate() if "asyncio" not in thread.name]
        return [end(handle) for handle in handles], left_after, len(extra) <= threads

    before = workers_alive()
    ended, left_after, no_threads_left = asyncio.run(cancel_and_leave())
    assert ended == [True, True]
    assert left_after < 20.0
    assert no_threads_left
    assert workers_alive() == before


def test_a_score_still_going_on_when_the_pool_closes_ends_as_an_error(pipe):
    async def leave_early():
        async with hanging_pool(60.0) as pool:
            scoring, handles = await hung_with_child(pool, pipe)
        return await asyncio.wait_for(scoring, 20.0), [end(handle) for handle in handles]

    scores, ended = asyncio.run(leave_early())
    assert ended == [True, True]
    assert scores.statuses.tolist() == [[ERROR]]
    assert scores.notes[0].startswith("hang_with_child: ")


def test_a_hung_worker_dies_with_a_killed_server(pipe):
    program = (
        "import asyncio, sys; sys.path[:0] = sys.argv[2:]\n"
        "from tests_pool import call, hanging_pool\n"
        "async def main():\n"
        "    async with hanging_pool(60.0) as pool:\n"
        "        await pool.score(call('x', path=sys.argv[1]))\n"
        "asyncio.run(main())\n"
    ).replace("tests_pool", Path(__file__).stem)
    server = subprocess.Popen([sys.executable, "-c", program, str(pipe), str(Path(__file__).parent)])
    worker_pid, child_pid = map(int, pipe.read_text().split())
    handle = handle_on(worker_pid)
    server.kill()
    server.wait(10)
    assert end(handle)
    os.kill(child_pid, signal.SIGKILL)


def test_what_cannot_be_loaded_fails_at_the_start_in_one_line():
    async def enter():
        async with RewardPool([f"{HOSTILE}:obeys"], workers=1, timeout_s=1.0, on_timeout=None):
            pass

    before = workers_alive()
    with pytest.raises(ConfigError, match=r"'obeys' is not there.*did you mean 'obey'\?") as error:
        asyncio.run(enter())
    assert "\n" not in str(error.value)
    assert workers_alive() == before


@pytest.mark.parametrize(
    ("source", "start_s", "message"),
    [
        (
            "import threading; threading.Event().wait()",
            1.0,
            "not ready after 1 s: importing .* hangs or takes too long",
        ),
        ("import os; os._exit(7)", 60.0, "a reward worker died while importing"),
    ],
)
def test_an_import_that_hangs_or_kills_its_process_fails_at_the_start(tmp_path, source, start_s, message):
    (tmp_path / "bad.py").write_text(source)

    async def enter():
        spec = f"{tmp_path / 'bad.py'}:f"
        async with RewardPool([spec], workers=1, timeout_s=1.0, on_timeout=None, start_s=start_s):
            pass

    with pytest.raises(ConfigError, match=message):
        asyncio.run(enter())


def test_names_are_checked_before_any_process_starts():
    with pytest.raises(ConfigError, match="reward_funcs is empty"):
        RewardPool([], workers=1, timeout_s=1.0, on_timeout=None)
    with pytest.raises(ConfigError, match=r"two functions are named 'f'; names must differ"):
        RewardPool(["a.f", "b.py:f"], workers=1, timeout_s=1.0, on_timeout=None)
