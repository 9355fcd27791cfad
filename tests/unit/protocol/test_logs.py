"""One event, one line, printable whatever it quotes."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.errors import ConfigError
from protocol.logs import LineFormatter, configure_logging, event, quoted

LOGGER = logging.getLogger("learner.test_logs")


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    yield
    for handler in [handler for handler in root.handlers if handler not in before[1]]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(before[0])
    logging.captureWarnings(False)


def log_lines(file: Path) -> list[str]:
    return file.read_text("ascii").splitlines()


def test_a_line_has_time_level_process_and_fields_in_order(tmp_path: Path) -> None:
    configure_logging("learner", tmp_path / "logs" / "learner.log", stderr=False)
    event(LOGGER, "group_refused", group="5f1c", version=(1, 7), wait_s=0.123456789, reason="63 of 64")
    (line,) = log_lines(tmp_path / "logs" / "learner.log")
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d INFO learner"
        r' event=group_refused group=5f1c version="\(1, 7\)" wait_s=0\.123457 reason="63 of 64"',
        line,
    )


def test_stderr_gets_the_same_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("server", stderr=True)
    event(LOGGER, "joined", level=logging.WARNING, server="a")
    assert " WARNING server event=joined server=a\n" in capsys.readouterr().err


def test_without_file_and_stderr_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("server", stderr=False)
    event(LOGGER, "joined", level=logging.ERROR)
    assert capsys.readouterr() == ("", "")


def test_what_had_nowhere_to_go_goes_where_the_next_call_says(tmp_path: Path) -> None:
    configure_logging("learner", stderr=False)
    event(LOGGER, "early")
    configure_logging("learner", stderr=False)
    event(LOGGER, "later")
    for name in ("a.log", "b.log"):
        configure_logging("learner", tmp_path / name, stderr=False)
    event(LOGGER, "at_last")
    assert [line.split("event=")[1] for line in log_lines(tmp_path / "a.log")] == ["early", "later"]
    assert [line.split("event=")[1] for line in log_lines(tmp_path / "b.log")] == ["at_last"]


def test_configuring_again_starts_over(tmp_path: Path) -> None:
    first, second = tmp_path / "1.log", tmp_path / "2.log"
    configure_logging("learner", first, stderr=False)
    configure_logging("learner", second, stderr=False)
    event(LOGGER, "once")
    assert log_lines(first) == []
    assert len(log_lines(second)) == 1


def test_a_file_is_appended_to(tmp_path: Path) -> None:
    for name in ("before", "after"):
        configure_logging("learner", tmp_path / "a.log", stderr=False)
        event(LOGGER, name)
    assert [line.split("event=")[1] for line in log_lines(tmp_path / "a.log")] == ["before", "after"]


def test_our_packages_log_from_info_on_and_libraries_from_warning_on(tmp_path: Path) -> None:
    configure_logging("learner", tmp_path / "a.log", stderr=False)
    logging.getLogger("protocol.channel").info("ours")
    logging.getLogger("protocol.channel").debug("too fine")
    logging.getLogger("somebody.else").info("theirs")
    logging.getLogger("somebody.else").warning("worth it")
    assert [line.split(" learner ")[1] for line in log_lines(tmp_path / "a.log")] == ["ours", "worth it"]


def test_warnings_are_logged(tmp_path: Path) -> None:
    configure_logging("learner", tmp_path / "a.log", stderr=False)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("take care", UserWarning, stacklevel=1)
    assert "take care" in log_lines(tmp_path / "a.log")[0]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("plain-1.2:3/4@x+y", "plain-1.2:3/4@x+y"),
        ("", '""'),
        ("two words", '"two words"'),
        ('say "x"', r'"say \"x\""'),
        ("a=b", '"a=b"'),
        ("line\nbreak\r\ttab", r'"line\nbreak\r\ttab"'),
        ("\x1b[31mred\x07", r'"\u001b[31mred\u0007"'),
        ("\x7f", r'"\u007f"'),
        ("\u202ereversed", r'"\u202ereversed"'),
        ("\ud800", r'"\ud800"'),
        (7, "7"),
        (0.1 + 0.2, "0.3"),
        (float("nan"), "nan"),
        (None, "None"),
        (True, "True"),
    ],
)
def test_quoting(value: object, expected: str) -> None:
    assert quoted(value) == expected


def test_text_that_is_no_event_is_made_safe_too(tmp_path: Path) -> None:
    configure_logging("learner", tmp_path / "a.log", stderr=False)
    LOGGER.info("evil \x1b]0;title\x07 \n12:00:00 INFO learner event=forged é")
    (line,) = log_lines(tmp_path / "a.log")
    assert r"evil \x1b]0;title\x07 \n12:00:00 INFO learner event=forged \xe9" in line


def test_a_traceback_keeps_its_lines_and_nothing_else() -> None:
    try:
        raise ValueError("bad \x1b[0m text")
    except ValueError:
        record = LOGGER.makeRecord(LOGGER.name, logging.ERROR, "f", 1, "failed", (), None)
        record.exc_info = sys.exc_info()
    lines = LineFormatter("learner").format(record).split("\n")
    assert lines[0].endswith(" ERROR learner failed")
    assert lines[-1] == r"ValueError: bad \x1b[0m text"


def test_fields_of_a_silent_level_are_not_even_formatted() -> None:
    class Untouchable:
        def __str__(self) -> str:
            raise AssertionError("formatted for nothing")

    configure_logging("learner", stderr=False)
    event(LOGGER, "detail", level=logging.DEBUG, value=Untouchable())


def test_a_file_that_cannot_be_written_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match=r"log file .*taken/a\.log: "):
        configure_logging("learner", tmp_path / "taken" / "a.log")
