from __future__ import annotations

import asyncio
import dataclasses
import io
import math
from typing import Any

import pytest
from rich.console import Console

from learner.dashboard.render import render, step_line
from learner.dashboard.terminal import Screen, screen_loop
from learner.dashboard.view import RunView, StepView
from learner.stats import EvalPoint, ServerView
from protocol.messages import ServerStatus
from protocol.waits import Waiting

STEP = StepView(
    step=34,
    reward=0.53,
    step_time_s=5.1,
    staleness_mean=2.1,
    staleness_max=4,
    staleness_hist=(120, 510, 830, 330, 90),
    learner_busy=0.81,
    learner_tokens_per_s=1240.0,
    rollout_busy=0.97,
    rollout_tokens_per_s=2310.0,
)


def make_server(name: str = "gpu-a", **changes: Any) -> ServerView:
    fields = {
        "state": "healthy",
        "policy_version": 33,
        "samples_running": 12,
        "room": 16,
        "status": ServerStatus(),
        "connected_s": 60.0,
        **changes,
    }
    return ServerView(name=name, **fields)


def make_point(step: int, reward: float) -> EvalPoint:
    return EvalPoint(step=step, reward=reward, oldest=step, newest=step)


def make_view(**changes: Any) -> RunView:
    fields = {
        "run_name": "addition",
        "address": "tcp://127.0.0.1:5555",
        "total_steps": 120,
        "max_staleness": 4,
        "slots_total": 40,
        "now_s": 100.0,
        "elapsed_s": 192.0,
        "activity": "forward/backward",
        "last": STEP,
        "rewards": [0.29, 0.4, 0.53],
        "eta_s": 438.0,
        "slots_in_use": 32,
        "in_flight": 24,
        "buffered": 8,
        "servers": (make_server(),),
        **changes,
    }
    return RunView(**fields)


def screenshot(view: RunView, width: int = 80, height: int = 24) -> list[str]:
    """The lines of the screen, checked to fit the terminal."""
    console = Console(width=width, height=height, file=io.StringIO(), force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(render(view, width, height))
    lines = capture.get().splitlines()
    assert len(lines) <= height
    assert all(console.render_str(line, markup=False).cell_len <= width for line in lines)
    return lines


def terminal(file: io.StringIO, **options: Any) -> Console:
    return Console(file=file, width=80, height=24, force_terminal=True, color_system=None, **options)


def plain(file: io.StringIO) -> Console:
    return Console(file=file, width=80, force_terminal=False)


def test_the_screen_says_everything_a_run_is_watched_for():
    view = make_view(
        evals=[make_point(0, 0.28), EvalPoint(step=20, reward=0.5, oldest=20, newest=21)],
        waits=[Waiting("a whole batch", "batch_loop", 96.8, None), Waiting("weights 33 live", "servers", 99.5, 60.0)],
        notices=["older still", "server gpu-b left", "server gpu-c joined"],
    )
    text = "\n".join(screenshot(view))
    for part in (
        "headway addition",
        "34 / 120",
        "5.1 s a step, ETA 7:18",
        "0.53",
        "▁▄█",
        "0.29 to 0.53",
        "0.28 v0 → 0.50 v20-21",
        "2.10 mean",
        "oldest 4 of 4",
        "0▂▅█▄▁4",
        "32 / 40",
        "24 in flight, 8 buffered",
        "81 % busy    1,240 tok/s",
        "forward/backward",
        "waits 3.2 s for a whole batch (batch_loop)",
        "waits 0.5 s of 60 s for weights 33 live (servers)",
        "97 % busy    2,310 tok/s",
        "1 server",
        "gpu-a",
        "v33  12/16 samples",
        "server gpu-c joined",
        "training, 3:12",
    ):
        assert part in text, part
    assert "older still" not in text
    assert "!" not in text


def test_the_staleness_bar_ends_at_the_bound():
    def bar(**changes: Any) -> str:
        view = make_view(last=dataclasses.replace(STEP, staleness_hist=(), **changes), max_staleness=8)
        line = next(line for line in screenshot(view) if "staleness" in line)
        return line.split("mean")[1].split("│")[0].strip()

    assert bar(staleness_mean=4.0, staleness_max=6) == "█" * 12 + "▒" * 6 + "·" * 6
    assert bar(staleness_mean=0.0, staleness_max=0) == "·" * 24
    assert bar(staleness_mean=8.0, staleness_max=8) == "█" * 24
    assert bar(staleness_mean=math.nan, staleness_max=0) == "·" * 24


def test_staleness_above_the_bound_is_called_that():
    view = make_view(last=dataclasses.replace(STEP, staleness_max=9), max_staleness=4)
    assert any("! above the bound" in line for line in screenshot(view, width=100))


def test_a_synchronous_run_has_no_bar():
    view = make_view(max_staleness=0, last=StepView(step=3, reward=0.5, step_time_s=1.0, staleness_mean=0.0))
    text = "\n".join(screenshot(view))
    assert "synchronous" in text
    assert "of 0" not in text


def test_waiting_for_the_first_server_is_said_with_its_address():
    view = make_view(servers=(), serverless_s=12.3, last=StepView(), rewards=(), phase="starting", eta_s=math.nan)
    text = "\n".join(screenshot(view))
    assert "! waiting for a rollout server at tcp://127.0.0.1:5555 (12 s)" in text
    assert "0 / 120" in text
    assert "nan" not in text


def test_a_server_that_is_not_healthy_says_why():
    joining = make_server(
        state="joining", policy_version=None, samples_running=0, status=ServerStatus(waiting_for="weights v33")
    )
    text = "\n".join(screenshot(make_view(servers=(joining,))))
    assert "no weights  0/16 samples  ! joining  waits for weights v33" in text


@pytest.mark.parametrize("width", [40, 80, 100, 300])
def test_late_event_loops_are_shown_on_both_sides(width):
    server = make_server(status=ServerStatus(loop_lag_ms=80.0))
    text = "\n".join(screenshot(make_view(loop_lag_ms=130.0, servers=(server,)), width))
    if width >= 80:
        assert "! event loop 130 ms late" in text
        assert "! event loop 80 ms late" in text


def test_many_servers_never_outgrow_the_terminal():
    servers = [make_server(f"server-{i}") for i in range(50)]
    text = "\n".join(screenshot(make_view(servers=servers, notices=["a", "b"]), height=24))
    assert "50 servers" in text
    assert "and 42 more" in text


def test_as_many_servers_as_lines_are_all_shown():
    text = "\n".join(screenshot(make_view(servers=[make_server(f"server-{i}") for i in range(9)])))
    assert "server-8" in text
    assert "more" not in text


def test_many_evaluations_show_the_first_and_the_last_ones():
    points = [make_point(step, step / 100) for step in range(0, 60, 10)]
    text = "\n".join(screenshot(make_view(evals=points)))
    assert "0.00 v0 ... 0.30 v30 → 0.40 v40 → 0.50 v50" in text


EXTREMES = {
    "nothing": make_view(
        servers=(), last=StepView(), rewards=(), eta_s=math.nan, slots_in_use=0, in_flight=0, buffered=0, activity=""
    ),
    "no numbers": make_view(
        rewards=[math.nan] * 5,
        last=StepView(step=5, reward=math.nan, step_time_s=math.nan),
        loop_lag_ms=math.nan,
        elapsed_s=math.inf,
    ),
    "huge": make_view(
        total_steps=10**12,
        slots_total=10**9,
        slots_in_use=10**9,
        in_flight=10**9,
        buffered=10**9,
        max_staleness=10**6,
        rewards=[1e300, -1e300, math.inf, -math.inf],
        eta_s=1e15,
        elapsed_s=1e15,
        evals=[EvalPoint(step=10**9, reward=-1e300, oldest=10**9, newest=10**9 + 1)] * 9,
        last=StepView(
            step=10**11,
            reward=-1e300,
            step_time_s=1e9,
            staleness_mean=1e6,
            staleness_max=10**6,
            staleness_hist=[10**15] * 200,
            learner_busy=1.0,
            learner_tokens_per_s=1e20,
            rollout_busy=1.0,
            rollout_tokens_per_s=1e20,
        ),
    ),
    "past the end": make_view(last=dataclasses.replace(STEP, step=500, staleness_max=500)),
    "hostile": make_view(
        run_name="[red]\x1b[2J\nx" * 40,
        address="tcp://[/bold]\x1b]0;title\x07",
        phase="\u202ephase",
        activity="[link=http://x]act\x00",
        servers=[make_server("\x1b[31m" * 30, state="\x9bstate", status=ServerStatus(waiting_for="[blink]\r" * 50))],
        waits=[Waiting("\x1bname" * 50, "owner\n" * 50, -1e9, 1e9)],
        notices=["[/nothing]\x1b[1A\x1b[2K" * 50, "网络" * 200],
    ),
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("size", [(80, 24), (60, 10), (30, 24), (400, 100)])
def test_no_view_breaks_the_screen(name, size):
    width, height = size
    console = Console(width=width, height=height, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    with console.capture() as capture:
        console.print(render(EXTREMES[name], width, height))
    shown = capture.get()
    assert "nan" not in shown
    assert all(console.render_str(line, markup=False).cell_len <= width for line in screenshot_lines(shown))


def screenshot_lines(shown: str) -> list[str]:
    """Lines without the style codes that rich itself wrote; any other escape stays and is caught."""
    from rich.text import Text

    lines = [Text.from_ansi(line).plain for line in shown.splitlines()]
    assert not any(ord(c) < 32 or ord(c) == 0x9B for line in lines for c in line)
    return lines


def test_hostile_text_never_reaches_the_terminal_as_control():
    lines = "\n".join(screenshot(EXTREMES["hostile"]))
    assert not any(c in lines for c in "\x1b\x00\x07\x9b\r\u202e")
    assert "[red]\\x1b[2J\\nx" in lines


def test_the_step_line():
    assert step_line(make_view()) == (
        "step 34/120 | 5.1 s | reward 0.53 | staleness 2.10 mean 4 max (bound 4)"
        " | learner 81 % busy 1,240 tok/s | rollout 97 % busy 2,310 tok/s | ETA 7:18"
    )


@pytest.mark.parametrize("name", EXTREMES)
def test_the_step_line_is_one_line_of_ascii(name):
    line = step_line(EXTREMES[name])
    assert line.isascii()
    assert line.isprintable()


def test_off_a_terminal_each_step_is_one_line_and_the_screen_is_not_drawn():
    file = io.StringIO()
    with Screen(plain(file)) as screen:
        screen.show(make_view())
        screen.print_step(make_view())
        screen.show(make_view())
        screen.print_notice("server gpu-a joined\x1b[2J")
    assert file.getvalue() == step_line(make_view()) + "\nserver gpu-a joined\\x1b[2J\n"


def test_off_a_terminal_waiting_for_a_server_is_said_at_once_and_then_ever_more_rarely():
    file = io.StringIO()
    with Screen(plain(file)) as screen:
        for tenth in range(0, 1000, 5):
            screen.show(make_view(servers=(), serverless_s=tenth / 10))
    assert [line.split("(")[1] for line in file.getvalue().splitlines()] == [
        "0.0 s)", "10 s)", "20 s)", "40 s)", "80 s)"
    ]  # fmt: skip


def test_losing_the_last_server_is_said_at_once_again():
    file = io.StringIO()
    with Screen(plain(file)) as screen:
        screen.show(make_view(servers=(), serverless_s=300.0))
        screen.show(make_view())
        screen.show(make_view(servers=(), serverless_s=0.2))
    assert [line.split("(")[1] for line in file.getvalue().splitlines()] == ["5:00)", "0.2 s)"]


def test_off_a_terminal_each_notice_is_said_once_and_cannot_flood():
    output = io.StringIO()
    with Screen(plain(output)) as screen:
        screen.show(make_view(notices=["refused server b: it scores with luck", "odd\x1b[31m"]))
        screen.show(make_view(notices=["odd\x1b[31m", "odd\x1b[31m", "a third"]))
        screen.show(make_view(notices=["a third"]))
        screen.show(make_view(notices=[]))
        screen.show(make_view(notices=["a third"]))
    lines = output.getvalue().splitlines()
    assert lines[0] == "refused server b: it scores with luck"
    assert "\x1b" not in lines[1]
    assert lines[2:] == ["a third", "a third"], "once more when it is news again"


def test_on_a_terminal_the_screen_is_drawn_and_steps_print_nothing_more():
    file = io.StringIO()
    with Screen(terminal(file)) as screen:
        assert screen.live
        screen.show(make_view())
        drawn = file.getvalue()
        assert "34 / 120" in drawn
        screen.print_step(make_view())
        screen.print_notice("joined")
        assert file.getvalue() == drawn
        screen.show(make_view(last=dataclasses.replace(STEP, step=35)))
    assert "35 / 120" in file.getvalue()
    assert file.getvalue().endswith("\x1b[?25h")  # the cursor is back


def test_a_terminal_without_cursor_movement_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert not Screen(terminal(io.StringIO())).live


class GoneFile(io.StringIO):
    """A terminal whose session has ended."""

    def write(self, _text: str) -> int:
        raise OSError(5, "Input/output error")

    def flush(self) -> None:
        raise OSError(5, "Input/output error")


def test_a_terminal_that_goes_away_does_not_end_the_run():
    with Screen(terminal(GoneFile())) as screen:
        screen.show(make_view())
        screen.show(make_view())
        screen.print_step(make_view())
    with Screen(plain(GoneFile())) as screen:
        screen.print_step(make_view())
        screen.print_step(make_view())


def test_a_terminal_that_goes_away_between_two_looks_does_not_end_the_run():
    class Leaving(io.StringIO):
        gone = False

        def write(self, text: str) -> int:
            if self.gone:
                raise OSError(5, "Input/output error")
            return super().write(text)

    for look_again in (True, False):
        file = Leaving()
        with Screen(terminal(file)) as screen:
            screen.show(make_view())
            file.gone = True
            if look_again:
                screen.show(make_view())
                assert not screen.live
    assert "34 / 120" in file.getvalue()


def test_a_closed_pipe_does_not_end_the_run(monkeypatch):
    """`headway-learner train | head`: rich would exit the process."""

    class ClosedPipe(io.StringIO):
        def write(self, _text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", ClosedPipe())
    with Screen() as screen:
        screen.print_step(make_view())
        screen.print_step(make_view())


def test_characters_that_the_output_cannot_encode_are_escaped():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    with Screen(Console(file=file, width=80, force_terminal=False)) as screen:
        screen.print_notice("réseau")
    file.flush()
    assert raw.getvalue() == b"r\\xe9seau\n"


def test_the_loop_shows_a_new_view_every_interval():
    shown: list[RunView] = []
    asked: list[float] = []

    class Recorder(Screen):
        def show(self, view: RunView) -> None:
            shown.append(view)

    async def sleep(seconds: float) -> None:
        asked.append(seconds)
        if len(asked) == 3:
            raise asyncio.CancelledError

    def view_of_now() -> RunView:
        return make_view(now_s=float(len(shown)))

    async def run() -> None:
        await screen_loop(view_of_now, Recorder(plain(io.StringIO())), 0.5, sleep=sleep)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())
    assert [view.now_s for view in shown] == [0.0, 1.0, 2.0]
    assert asked == [0.5, 0.5, 0.5]
