"""What the screen looks like: from a `RunView` to text and rich renderables. Pure.

Nothing here is markup: every string becomes a `Text`, and foreign ones pass `printable`. State is told by words and
shapes; color (blue, yellow) only repeats it.
"""

from __future__ import annotations

import math

from rich.box import ROUNDED
from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from learner.dashboard.text import duration, histogram, percent, printable, quantity, score, sparkline
from learner.dashboard.view import RunView
from learner.stats import ServerView
from protocol.loop_lag import LIMIT_MS

BUSY = 0.95
"""A side that is less busy is shown with the cause."""
MAX_WIDTH = 100
LABEL_WIDTH = 11
FIXED_LINES = 15
"""At most so many lines are about something else than single servers, with two waits."""
MOST_WAITS = 5

ACCENT = "bold blue"
WARN = "bold yellow"
DIM = "dim"
BORDER = "bright_black"


def step_line(view: RunView) -> str:
    """Return the last step in one line of ASCII."""
    last = view.last
    return " | ".join(
        (
            f"step {last.step}/{view.total_steps}",
            duration(last.step_time_s),
            f"reward {score(last.reward)}",
            f"staleness {score(last.staleness_mean)} mean {last.staleness_max} max (bound {view.max_staleness})",
            f"learner {percent(last.learner_busy)} busy {quantity(last.learner_tokens_per_s)} tok/s",
            f"rollout {percent(last.rollout_busy)} busy {quantity(last.rollout_tokens_per_s)} tok/s",
            f"ETA {duration(view.eta_s)}",
        )
    )


def waiting_line(view: RunView) -> str:
    """Say that no server is there, and where one should come."""
    return f"waiting for a rollout server at {printable(view.address)} ({duration(view.serverless_s)})"


def render(view: RunView, width: int, height: int = 24) -> RenderableType:
    """Draw the whole screen for a terminal of `width` x `height` characters."""
    width = min(width, MAX_WIDTH)
    inner = max(20, width - 6 - LABEL_WIDTH)
    grid = Table.grid(padding=(0, 0))
    grid.add_column(width=LABEL_WIDTH, no_wrap=True, style=DIM)
    grid.add_column(width=inner, no_wrap=True, overflow="ellipsis")
    grid.add_row("step", _step(view, inner))
    grid.add_row("reward", _reward(view, inner))
    if view.evals:
        grid.add_row("eval", _evals(view))
    grid.add_row("staleness", _staleness(view, inner))
    grid.add_row("groups", _groups(view))
    grid.add_row("", "")
    grid.add_row("learner", _learner(view))
    for line in _waits(view):
        grid.add_row("", line)
    grid.add_row("rollout", _rollout(view))
    for label, line in _servers(view, max(1, height - FIXED_LINES - max(0, min(len(view.waits), MOST_WAITS) - 2))):
        grid.add_row(label, line)
    for i, notice in enumerate(view.notices[-2:]):
        if i == 0:
            grid.add_row("", "")
        grid.add_row("notice", Text(printable(notice)))
    return Panel(
        grid,
        box=ROUNDED,
        width=width,
        padding=(0, 2),
        border_style=BORDER,
        title=Text.assemble(("headway ", ACCENT), (printable(view.run_name, max(10, width - 40)), "bold default")),
        title_align="left",
        subtitle=_status(view),
        subtitle_align="right",
    )


def _status(view: RunView) -> Text:
    text = Text.assemble((f"{printable(view.phase, 20)}, {duration(view.elapsed_s)}", "default"))
    if view.loop_lag_ms > LIMIT_MS:
        text.append(f", ! event loop {quantity(view.loop_lag_ms)} ms late", style=WARN)
    return text


def _step(view: RunView, width: int) -> Text:
    done = min(1.0, view.last.step / view.total_steps)
    text = Text.assemble((_pad(f"{view.last.step} / {view.total_steps}", 11), "bold"))
    started = math.isfinite(view.last.step_time_s)
    rest = f"  {duration(view.last.step_time_s)} a step, ETA {duration(view.eta_s)}" if started else ""
    text.append_text(_bar(((done, "━", ACCENT),), max(8, width - len(text) - len(rest)), empty="─"))
    return text.append(rest)


def _reward(view: RunView, width: int) -> Text:
    finite = [reward for reward in view.rewards if math.isfinite(reward)]
    spread = f"  {score(min(finite))} to {score(max(finite))}" if finite else ""
    spark = sparkline(view.rewards, max(8, width - 11 - len(spread)))
    return Text.assemble((_pad(score(view.last.reward), 11), "bold"), (spark, ACCENT), (spread, DIM))


def _evals(view: RunView) -> Text:
    """The first result and the last ones: what a run is judged by."""
    shown = [*view.evals[:1], *view.evals[1:][-3:]]
    text = Text()
    for i, point in enumerate(shown):
        if i:
            text.append(" ... " if i == 1 and len(view.evals) > len(shown) else " → ", style=DIM)
        text.append(score(point.reward), style="bold")
        text.append(f" {point.label}", style=DIM)
    return text


def _staleness(view: RunView, width: int) -> Text:
    """Solid up to the mean, shaded up to the oldest token, open up to the bound."""
    last, bound = view.last, view.max_staleness
    text = Text.assemble((score(last.staleness_mean), "bold"), " mean")
    text.append(" " * (11 - len(text)))
    if bound == 0:
        text.append("synchronous: every token is of the weights it trains", style=DIM)
    else:
        blocks = histogram(last.staleness_hist)
        hist = f"0{blocks}{len(blocks) - 1}" if blocks else ""
        words = f" oldest {last.staleness_max} of {bound}"
        mean = last.staleness_mean / bound if math.isfinite(last.staleness_mean) else 0.0
        segments = ((mean, "█", ACCENT), (last.staleness_max / bound, "▒", ACCENT))
        room = width - len(text) - len(words) - 2 - (len(hist) + 2 if hist else 0)
        text.append_text(_bar(segments, min(24, max(8, room)), empty="·"))
        text.append("│").append(words)
        if len(hist) <= room:
            text.append(f"  {hist}", style=ACCENT)
    if last.staleness_max > bound:
        text.append(" ! above the bound", style=WARN)
    return text


def _groups(view: RunView) -> Text:
    return Text.assemble(
        (_pad(f"{view.slots_in_use} / {view.slots_total}", 11), "bold"),
        f"slots in use: {view.in_flight} in flight, {view.buffered} buffered",
        (_tokens(view.last.generated_per_trained), DIM),
    )


def _tokens(generated_per_trained: float) -> str:
    known = math.isfinite(generated_per_trained)
    return f"  {generated_per_trained:.2f} tokens sampled per token trained" if known else ""


def _learner(view: RunView) -> Text:
    last = view.last
    text = _use(last.learner_busy, last.learner_tokens_per_s)
    text.append(printable(view.activity, 40), style=ACCENT)
    if last.learner_waits_for and last.learner_busy < BUSY:
        text.append(f"{'  ' if view.activity else ''}waits: {last.learner_waits_for}", style=DIM)
    return text


def _use(busy: float, tokens_per_s: float) -> Text:
    """How busy a side is, and what comes out of it."""
    if not (math.isfinite(busy) or math.isfinite(tokens_per_s)):
        return Text.assemble((_pad("no numbers yet", 29), DIM))
    return Text.assemble((percent(busy), "bold"), _pad(f" busy  {quantity(tokens_per_s):>7} tok/s", 25))


def _waits(view: RunView) -> list[Text]:
    """The longest waits: for what, who ends it, how long, until when."""
    lines = []
    for wait in view.waits[:MOST_WAITS]:
        limit = "" if wait.deadline_s is None else f" of {duration(wait.deadline_s)}"
        lines.append(
            Text.assemble(
                f"waits {duration(view.now_s - wait.started_s)}{limit} for {printable(wait.name, 40)}",
                (f" ({printable(wait.owner, 30)})", DIM),
            )
        )
    return lines


def _rollout(view: RunView) -> Text:
    if not view.servers:
        return Text(f"! {waiting_line(view)}", style=WARN)
    num = len(view.servers)
    text = _use(view.last.rollout_busy, view.last.rollout_tokens_per_s)
    text.append(f"{num} server{'s' * (num != 1)}")
    if view.last.seats_empty_for and view.last.rollout_busy < BUSY:
        text.append(f"  empty seats: {view.last.seats_empty_for}", style=DIM)
    return text


def _servers(view: RunView, limit: int) -> list[tuple[Text, Text]]:
    shown = list(view.servers) if len(view.servers) <= limit else list(view.servers[: limit - 1])
    lines = [(Text(f" {printable(server.name, LABEL_WIDTH - 2)}"), _server(server)) for server in shown]
    if hidden := len(view.servers) - len(shown):
        lines.append((Text(""), Text(f"and {hidden} more", style=DIM)))
    return lines


def _server(server: ServerView) -> Text:
    version = "no weights" if server.policy_version is None else f"v{server.policy_version}"
    text = Text.assemble((f"{version}  ", ACCENT), f"{server.samples_running}/{server.room} samples")
    if server.state != "healthy":
        text.append(f"  ! {printable(server.state, 12)}", style=WARN)
    if server.status is not None:
        if server.status.waiting_for:
            text.append(f"  waits for {printable(server.status.waiting_for, 40)}", style=DIM)
        if server.status.loop_lag_ms > LIMIT_MS:
            text.append(f"  ! event loop {quantity(server.status.loop_lag_ms)} ms late", style=WARN)
    return text


def _bar(segments: tuple[tuple[float, str, str], ...], width: int, *, empty: str) -> Text:
    """Draw a bar: each (share of the width at which it ends, glyph, style) follows the one before it."""
    text = Text()
    for share, glyph, style in segments:
        end = min(width, max(0, round(share * width)))
        text.append(glyph * (end - len(text)), style=style)
    return text.append(empty * (width - len(text)), style=DIM)


def _pad(text: str, width: int) -> str:
    """Fill up to `width`, and keep a blank after whatever is wider."""
    return f"{text:<{width - 1}} "
