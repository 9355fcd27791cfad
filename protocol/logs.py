r"""Structured logs of both processes: few lines, one event each, safe to read in a terminal and to grep.

    12:03:04 INFO learner event=group_refused group=5f1c attempt=1 reason="63 completions, expected 64"

A log line may quote text from the other process or from a model. Whatever it is, it stays one line of printable
ASCII: control characters, quotes and everything a terminal could obey are written as JSON escapes.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections import deque
from pathlib import Path
from typing import Any

from protocol.errors import ConfigError

OUR_PACKAGES = ("protocol", "rollout_server", "learner")
KEPT_LINES = 1000
"""While there is nowhere to log to."""
_BARE = re.compile(r"[A-Za-z0-9_.:/@+-]+")
"""Values that need no quotes."""
_UNSAFE = re.compile(r"[^\x20-\x7e]")
"""Everything but printable ASCII. Letters of other scripts go with it: bidirectional marks are among them."""


def configure_logging(process: str, path: Path | None = None, *, stderr: bool = True) -> None:
    """Send the process's log to a file, to stderr, or to both. Called again, it starts over.

    With neither, lines are kept until a later call says where: while nobody knows yet whether there will be a file.

    Our own packages log from INFO on, libraries from WARNING on.

    Args:
        process: Name in every line: learner, server, ...
        path: File to append to; its directory is made.
        stderr: Whether lines also go to stderr (not while a live screen owns the terminal).

    Raises:
        ConfigError: The file cannot be written.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)] if stderr else []
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(logging.FileHandler(path, encoding="ascii"))
        except OSError as error:
            raise ConfigError(f"log file {path}: {error.strerror}") from error
    root = logging.getLogger()
    kept: list[logging.LogRecord] = []
    for old in [handler for handler in root.handlers if isinstance(handler.formatter, LineFormatter)]:
        root.removeHandler(old)
        old.close()
        kept += old.records if isinstance(old, _Keeper) else ()
    for handler in handlers or [_Keeper()]:
        handler.setFormatter(LineFormatter(process))
        root.addHandler(handler)
        for record in kept:
            handler.handle(record)
    root.setLevel(logging.WARNING)
    for package in OUR_PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO)
    logging.captureWarnings(True)


def event(logger: logging.Logger, name: str, /, *, level: int = logging.INFO, **fields: object) -> None:
    """Log one event with its fields, in the order given.

    Example:
        >>> event(logging.getLogger("learner.loops"), "group_refused", group="5f1c", reason="63 completions")
    """
    if logger.isEnabledFor(level):
        words = (f"{key}={quoted(value)}" for key, value in fields.items())
        logger.log(level, "%s", " ".join([f"event={quoted(name)}", *words]))


def quoted(value: object) -> str:
    """Write a field's value: bare when harmless, else as a JSON string; floats with six digits.

    Example:
        >>> quoted("63 completions")
        '"63 completions"'
    """
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if _BARE.fullmatch(text) else json.dumps(text, ensure_ascii=True).replace("\x7f", "\\u007f")


class _Keeper(logging.Handler):
    """Keeps the newest lines for the handlers to come."""

    def __init__(self) -> None:
        super().__init__()
        self.records: deque[logging.LogRecord] = deque(maxlen=KEPT_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.records.append(record)


class LineFormatter(logging.Formatter):
    """`HH:MM:SS LEVEL process message`, in printable ASCII whatever the message holds."""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process} %(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """Escape what is no printable ASCII; only the line breaks of a traceback remain."""
        text = super().format(record)
        if record.exc_info or record.stack_info:
            return "\n".join(_escaped(line) for line in text.split("\n"))
        return _escaped(text)


def _escaped(text: str) -> str:
    def escape(match: re.Match[str]) -> Any:
        return match.group().encode("unicode_escape").decode("ascii")

    return _UNSAFE.sub(escape, text)
