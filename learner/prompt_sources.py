"""Where rows come from: a .jsonl file, or a task of reasoning-gym. Each gives (prompt, columns) by index.

Rows are checked here, all of them, when the source is opened: what a reward function is given later is well-formed
JSON and small enough for a frame. Order, epochs and tokens are prompts.py's business.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import msgspec

from protocol.errors import ConfigError

Row = tuple[str | list[dict[str, Any]], dict[str, Any]]
"""The prompt and the other columns."""
MAX_ROW_BYTES = 1 << 20
"""Of one row as JSON: every lease carries its row."""
RESERVED_COLUMNS = ("prompts", "completions", "completion_ids", "finish_reason")
"""Arguments that reward functions get anyway."""
GYM_BLOCK = 1000
"""Rows of an endless reasoning_gym task that are made from one data set; some tasks lay out all rows beforehand."""


class Rows(Protocol):
    """A data set in its own order."""

    name: str
    """For errors."""
    fingerprint: str
    """Changes when a row does."""
    endless: bool

    def __len__(self) -> int:
        """Return how many rows there are; sys.maxsize when endless."""

    def __getitem__(self, index: int) -> Row:
        """Return a row, always the same."""

    def place(self, index: int) -> str:
        """Say where a row is, for errors."""


class JsonlRows:
    """A file with one JSON object a line; blank lines are skipped. Kept in memory as it is on disk.

    Raises:
        ConfigError: no such file, no rows, or a line that is no row. Names the line.
    """

    endless = False

    def __init__(self, path: str, *, prompt_column: str, prompt_format: str) -> None:
        self.name = path
        self._prompt_column = prompt_column
        self._prompt_format = prompt_format
        text = _read(path)
        self.fingerprint = f"{prompt_column} {hashlib.blake2b(text, digest_size=16).hexdigest()}"
        numbered = [(number, line) for number, line in enumerate(text.split(b"\n"), 1) if line.strip()]
        self._numbers = [number for number, _ in numbered]
        self._lines = [line for _, line in numbered]
        if not self._lines:
            raise ConfigError(f"{path}: no rows; write one JSON object a line")
        for index in range(len(self._lines)):
            self._check(index)

    def __len__(self) -> int:
        """Return how many rows there are."""
        return len(self._lines)

    def __getitem__(self, index: int) -> Row:
        """Decode a row, always the same."""
        columns = msgspec.json.decode(self._lines[index], type=dict[str, Any])
        return columns.pop(self._prompt_column), columns

    def place(self, index: int) -> str:
        """Name the row's line."""
        return f"{self.name} line {self._numbers[index]}"

    def _check(self, index: int) -> None:
        place = self.place(index)
        if len(self._lines[index]) > MAX_ROW_BYTES:
            raise ConfigError(f"{place}: {len(self._lines[index])} bytes; a row may have {MAX_ROW_BYTES}")
        try:
            columns = msgspec.json.decode(self._lines[index], type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{place}: not a JSON object: {error}") from error
        column = self._prompt_column
        if column not in columns:
            near = difflib.get_close_matches(column, columns, n=1)
            hint = f"; set prompt_column, perhaps to {near[0]!r}" if near else "; set prompt_column"
            raise ConfigError(f"{place}: no column {column!r}; found {', '.join(columns) or 'none'}{hint}")
        prompt = columns.pop(column)
        _check_prompt(prompt, f"{place}: column {column!r}")
        if self._prompt_format == "text" and not isinstance(prompt, str):
            raise ConfigError(f"{place}: the prompt is a list of messages, but prompt_format is text; use auto or chat")
        taken = [name for name in RESERVED_COLUMNS if name in columns]
        if taken:
            raise ConfigError(f"{place}: rename column {taken[0]!r}: reward functions are given their own {taken[0]}")


class GymRows:
    """A task of reasoning-gym: question as prompt; columns answer, metadata and task, as its scorer needs them.

    Args:
        task: its name.
        arguments: of the task; `seed` is among them.
        endless: rows without end (item i is made from seed + i), or the task's `size` of them.

    Raises:
        ConfigError: the package is missing, no such task, or arguments it does not take.
    """

    def __init__(self, task: str, arguments: Mapping[str, Any], *, endless: bool) -> None:
        self.name = f"reasoning_gym:{task}"
        self.endless = endless
        self._task = task
        self._arguments = dict(arguments)
        self._block = lru_cache(maxsize=2)(self._make_block)
        self._size = GYM_BLOCK if endless else len(self._make({}))
        self._check()
        version = importlib.metadata.version("reasoning_gym")
        described = msgspec.json.encode([task, self._arguments, endless, version], order="deterministic")
        self.fingerprint = hashlib.blake2b(described, digest_size=16).hexdigest()

    def __len__(self) -> int:
        """Return the task's size, or sys.maxsize."""
        return sys.maxsize if self.endless else self._size

    def __getitem__(self, index: int) -> Row:
        """Make an item, always the same."""
        block, offset = divmod(index, self._size)
        # Through JSON, which is how reward functions will see it: tasks have tuples, numpy strings, fractions.
        item = json.loads(json.dumps(self._block(block)[offset], default=str))
        return item["question"], {"answer": item["answer"], "metadata": item["metadata"], "task": self._task}

    def place(self, index: int) -> str:
        """Name the item."""
        return f"{self.name} item {index}"

    def _make_block(self, block: int) -> Any:
        if not self.endless:
            return self._make({})
        return self._make({"seed": self._arguments["seed"] + block * GYM_BLOCK, "size": GYM_BLOCK})

    def _make(self, changes: Mapping[str, Any]) -> Any:
        try:
            import reasoning_gym
        except ImportError as error:
            raise ConfigError(
                f"{self.name} needs the package reasoning-gym: pip install '.[rewards]' in headway's directory"
            ) from error
        tasks = reasoning_gym.factory.DATASETS
        if self._task not in tasks:
            near = ", ".join(difflib.get_close_matches(self._task, tasks, n=3)) or "see the package's documentation"
            raise ConfigError(f"{self.name}: no such task; nearest: {near}")
        try:
            return reasoning_gym.create_dataset(self._task, **(self._arguments | dict(changes)))
        except (TypeError, ValueError, AssertionError) as error:  # how its configurations refuse arguments
            raise ConfigError(f"{self.name} refuses {self._arguments}: {error}") from error

    def _check(self) -> None:
        """Encode the first item: a task's items all have one form."""
        prompt, columns = self[0]
        _check_prompt(prompt, self.place(0))
        size = len(msgspec.json.encode([prompt, columns]))
        if size > MAX_ROW_BYTES:
            raise ConfigError(f"{self.place(0)}: {size} bytes; a row may have {MAX_ROW_BYTES}")


def _read(path: str) -> bytes:
    file = Path(path).expanduser()
    if file.suffix != ".jsonl":
        raise ConfigError(f"data set {path!r}: name a .jsonl file or reasoning_gym:<task>")
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"data set {path}: {error.strerror}") from error


def _check_prompt(prompt: Any, place: str) -> None:
    if isinstance(prompt, str):
        if not prompt:
            raise ConfigError(f"{place} is empty")
        return
    if not isinstance(prompt, list) or not prompt:
        raise ConfigError(f"{place} is {_kind(prompt)}; allowed is a string or a list of chat messages")
    for message in prompt:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ConfigError(f'{place}: a chat message is {{"role": "user", "content": "..."}}, not {_kind(message)}')


def _kind(value: Any) -> str:
    return f"an object with {', '.join(value) or 'nothing'}" if isinstance(value, dict) else f"a {type(value).__name__}"
