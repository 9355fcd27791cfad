"""Spans: cheap to add, bounded on disk, and what a trace viewer is given."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest

from learner.spans import FILE, PREVIOUS_FILE, Clock, Span, SpanFile, Spans, collect, read_spans, spans_loop
from learner.trace import chrome_events, trace
from learner.tuning.virtual_time import run_virtual
from protocol.errors import ConfigError
from protocol.waits import Waits
from tests.learners import Clock as FakeClock

HEADER = Clock(incarnation=1, clock_s=100.0, unix_s=1_000_100.0)


def a_span(begun_s: float = 101.0, ended_s: float = 103.0, **changes: str) -> Span:
    return Span(
        **{"process": "learner", "lane": "steps", "name": "optimizer", **changes}, begun_s=begun_s, ended_s=ended_s
    )


def rows_of(events: list[dict]) -> dict[str, int]:
    return {event["name"]: event["tid"] for event in events if event["ph"] == "X"}


def test_spans_come_back_in_the_time_of_day(tmp_path):
    file = SpanFile(tmp_path, HEADER)
    file.write([a_span()])
    file.write([a_span(104.0, 105.0, note="step 3")])
    SpanFile(tmp_path, Clock(incarnation=2, clock_s=0.0, unix_s=1_000_200.0)).write([a_span(1.0, 2.0)])
    with (tmp_path / FILE).open("ab") as torn:
        torn.write(b'{"type":"span","proc')
    found = [
        (1_000_101.0, 1_000_103.0, ""), (1_000_104.0, 1_000_105.0, "step 3"), (1_000_201.0, 1_000_202.0, ""),
    ]  # fmt: skip
    assert [(span.begun_s, span.ended_s, span.note) for span in read_spans(tmp_path)] == found
    SpanFile(tmp_path, Clock(incarnation=3, clock_s=0.0, unix_s=1_000_300.0)).write([a_span(1.0, 2.0, note="third")])
    found.append((1_000_301.0, 1_000_302.0, "third"))
    assert [(span.begun_s, span.ended_s, span.note) for span in read_spans(tmp_path)] == found


def test_the_file_is_bounded_and_the_newest_are_kept(tmp_path):
    file = SpanFile(tmp_path, HEADER, limit_bytes=4_000)
    for number in range(200):
        file.write([a_span(100.0 + number, 101.0 + number)])
    sizes = [(tmp_path / name).stat().st_size for name in (FILE, PREVIOUS_FILE)]
    assert max(sizes) < 4_400
    begun = [span.begun_s for span in read_spans(tmp_path)]
    assert begun == [1_000_100.0 + number for number in range(200 - len(begun), 200)]
    assert len(begun) > 20


def test_what_begins_ends_once_or_is_never_shown():
    spans = Spans()
    spans.begin("a", "north", "groups", "group 1", 1.0)
    spans.begin("b", "north", "groups", "group 2", 2.0)
    spans.end("a", 3.0, "40 tokens")
    spans.end("a", 4.0)
    assert [(span.name, span.begun_s, span.ended_s, span.note) for span in spans.take()] == [
        ("group 1", 1.0, 3.0, "40 tokens")
    ]
    assert spans.take() == []


def test_waits_that_end_are_spans_and_ordinary_ones_are_not():
    clock, spans = FakeClock(), Spans()
    waits = Waits(clock)

    async def waited(name: str) -> None:
        async def a_while() -> None:
            clock.now_s += 2.0

        await waits.wait(a_while(), name=name, owner="publisher", deadline_s=None)

    asyncio.run(waited("change"))
    asyncio.run(waited("publish"))
    (span,) = collect(spans, waits)
    assert (span.lane, span.name, span.begun_s, span.ended_s) == ("waits: publish", "for publisher", 102.0, 104.0)
    assert not waits.spans


def test_the_loop_writes_what_there_is_and_the_rest_when_it_ends(tmp_path):
    async def main() -> None:
        spans, waits = Spans(), Waits()
        loop = asyncio.ensure_future(spans_loop(spans, waits, tmp_path, 1, time.monotonic))
        await asyncio.sleep(0)
        spans.add("learner", "steps", "first", 1.0, 2.0)
        await asyncio.sleep(2.5)
        assert [span.name for span in read_spans(tmp_path)] == ["first"]
        spans.add("learner", "steps", "last", 3.0, 4.0)
        loop.cancel()
        await asyncio.wait([loop])
        assert [span.name for span in read_spans(tmp_path)] == ["first", "last"]

    run_virtual(main())


def test_a_disk_that_refuses_ends_the_recording_and_not_the_run(tmp_path, caplog):
    (tmp_path / FILE).mkdir()

    async def main() -> None:
        await spans_loop(Spans(), Waits(), tmp_path, 1, time.monotonic)

    run_virtual(main())
    assert "spans_not_kept" in caplog.text


def test_overlapping_spans_of_a_lane_get_rows_of_their_own():
    events = chrome_events(
        [
            a_span(0.0, 4.0, process="north", lane="groups", name="a"),
            a_span(1.0, 2.0, process="north", lane="groups", name="b"),
            a_span(2.0, 3.0, process="north", lane="groups", name="c"),
            a_span(2.5, 6.0, process="north", lane="groups", name="f"),
            a_span(1.0, 2.0, process="south", lane="groups", name="d"),
            a_span(1.5, 2.5, process="north", lane="swaps", name="e"),
        ]
    )
    rows = rows_of(events)
    assert rows["b"] == rows["c"] != rows["a"]
    assert len({rows[name] for name in "abdef"}) == 5
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert (names[rows["a"]], names[rows["b"]], names[rows["e"]]) == ("groups", "groups 2", "swaps")
    processes = {event["args"]["name"]: event["pid"] for event in events if event["name"] == "process_name"}
    assert processes.keys() == {"learner", "north", "south"}
    assert {event["pid"] for event in events if event["name"] == "d"} == {processes["south"]}


def test_times_are_microseconds_since_the_first_span():
    first, second = (event for event in chrome_events([a_span(7.0, 7.5), a_span(8.25, 9.0)]) if event["ph"] == "X")
    assert (first["ts"], first["dur"], second["ts"], second["dur"]) == (0.0, 5e5, 1.25e6, 7.5e5)


def test_the_command_writes_a_file_that_viewers_read(tmp_path, capsys):
    SpanFile(tmp_path, HEADER).write([a_span(), a_span(process="north", lane="groups", name="group 3")])
    output = tmp_path / "out.json"
    assert trace([str(tmp_path), "--output", str(output)], prog="headway-learner trace") == 0
    written = msgspec.json.decode(output.read_bytes())
    assert {event["name"] for event in written["traceEvents"] if event["ph"] == "X"} == {"optimizer", "group 3"}
    assert "2 spans" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "no run directory: headway-learner trace RUN_DIR"),
        (["{tmp}"], "holds no spans.jsonl: name the directory of a run that has trained"),
        (["{tmp}/good", "--output", "{tmp}/none/trace.json"], "output .*none/trace.json: No such file or directory"),
        (["{tmp}/bad"], "spans.jsonl is damaged"),
        (["{tmp}/bad in the middle"], "spans.jsonl is damaged"),
    ],
)
def test_bad_input_is_refused(argv, words, tmp_path):
    for name in ("good", "bad", "bad in the middle"):
        (tmp_path / name).mkdir()
        SpanFile(tmp_path / name, HEADER).write([a_span()])
    (tmp_path / "bad" / FILE).write_bytes(b'{"type":"nothing"}\n')
    middle = tmp_path / "bad in the middle" / FILE
    middle.write_bytes(middle.read_bytes() + b'{"type":"span","proc\n' + msgspec.json.encode(a_span()) + b"\n")
    SpanFile(middle.parent, HEADER).write([a_span()])
    with pytest.raises(ConfigError, match=words):
        trace([part.replace("{tmp}", str(tmp_path)) for part in argv], prog="headway-learner trace")
