"""The rows that prompts come from, in an order that is a pure function of seed, epoch and index.

`Prompts.row(ordinal)` keeps no state: the run's cursor is the next ordinal and nothing else, so a resumed or retried
row is the same row. A row too long keeps its ordinal and is None. Columns go to the reward functions as they are; this
file does not know what those need. Everything a user can get wrong in a data set is refused when it is opened.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np

from learner.config import LearnerConfig
from learner.prompt_sources import GymRows, JsonlRows, Rows
from protocol.errors import ConfigError
from protocol.messages import Int32

Message = dict[str, Any]
ROWS_RENDERED, ROWS_SEARCHED = 100, 10_000
"""Of a data set, when it is opened: tokenizing takes long, so only these many, and so many for one that fits."""
EVAL_SEED_OFFSET = 1 << 31
"""reasoning_gym makes item i of a data set from `seed + i`: far apart, training and evaluation share no item."""
FEISTEL_ROUNDS = 6


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return token ids."""

    def apply_chat_template(
        self,
        conversation: list[Message],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
        continue_final_message: bool,
    ) -> str:
        """Return the chat as text."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Return the tokens' names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRow:
    """One row, tokenized."""

    ordinal: int
    prompt_tokens: Int32
    """[P]"""
    prompt: str | list[Message]
    """As reward functions see it: a text, or the messages of a chat."""
    columns: dict[str, Any]

    @property
    def row_json(self) -> bytes:
        """What travels as Lease.row."""
        return msgspec.json.encode({"prompt": self.prompt, "columns": self.columns})


class Prompts:
    """Rows by ordinal.

    Args:
        rows: the data set.
        tokenizer: of the model that is trained.
        seed: of the order.
        shuffle: permute the rows anew in every epoch; otherwise they come in their own order.
        prompt_format: auto, text or chat (see DataOptions).
        max_prompt_length: in tokens; longer rows are None.
        limit: use only the first so many rows; 0 is all.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: Tokenizer,
        *,
        seed: int,
        shuffle: bool,
        prompt_format: str,
        max_prompt_length: int,
        limit: int = 0,
    ) -> None:
        self._rows = rows
        self._tokenizer = tokenizer
        self._seed = seed
        self._shuffle = shuffle and not rows.endless
        self._prompt_format = prompt_format
        self._max_prompt_length = max_prompt_length
        self._length = min(limit, len(rows)) if limit else len(rows)
        arguments = [rows.fingerprint, self._length, seed, self._shuffle, prompt_format, max_prompt_length]
        self.fingerprint = hashlib.blake2b(msgspec.json.encode(arguments), digest_size=16).hexdigest()
        """Digest of the rows and of all that decides their order and form: a resumed run must have the same."""

    def __len__(self) -> int:
        """Rows in an epoch; `sys.maxsize` when they never end."""
        return self._length

    def row(self, ordinal: int) -> PromptRow | None:
        """Return the row of an ordinal (0, 1, ...), or None when its prompt is longer than max_prompt_length.

        Computes: a millisecond for most rows, seconds for the items of a few reasoning_gym tasks (knight_swap). Call
        it where that does not matter, never on an event loop (I9). Safe to call from several threads.
        """
        tokens, prompt, columns = self._render(self._index(ordinal))
        if len(tokens) > self._max_prompt_length:
            return None
        return PromptRow(ordinal=ordinal, prompt_tokens=np.array(tokens, np.int32), prompt=prompt, columns=columns)

    def check(self) -> None:
        """Render the first rows, and go on until one fits.

        Raises:
            ConfigError: the chat template refuses a row, a prompt has no tokens, or none is short enough.
        """
        shortest = sys.maxsize
        for index in range(min(len(self), ROWS_SEARCHED)):
            if index >= ROWS_RENDERED and shortest <= self._max_prompt_length:
                break
            tokens, _, _ = self._render(index)
            if not tokens:
                raise ConfigError(f"{self._rows.place(index)}: the prompt has no tokens")
            shortest = min(shortest, len(tokens))
        if shortest > self._max_prompt_length:
            raise ConfigError(
                f"{self._rows.name}: no prompt fits max_prompt_length {self._max_prompt_length}; the shortest has"
                f" {shortest} tokens"
            )

    def _index(self, ordinal: int) -> int:
        epoch, position = divmod(ordinal, self._length)
        return permuted(position, self._length, f"{self._seed}/{epoch}") if self._shuffle else position

    def _render(self, index: int) -> tuple[list[int], str | list[Message], dict[str, Any]]:
        """Return the row's token ids, its prompt as reward functions see it, and its columns."""
        prompt, columns = self._rows[index]
        if isinstance(prompt, str) and self._prompt_format == "chat":
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, str):
            return self._tokenizer.encode(prompt), prompt, columns
        return self._tokenizer.encode(self._chat_text(prompt, index), add_special_tokens=False), prompt, columns

    def _chat_text(self, messages: list[Message], index: int) -> str:
        """Apply the chat template; a last message of the assistant's is continued (a prefilled answer)."""
        prefilled = messages[-1]["role"] == "assistant"
        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=not prefilled, continue_final_message=prefilled
            )
        except Exception as error:  # a template is the model's own program: it may raise anything
            raise ConfigError(
                f"{self._rows.place(index)}: the tokenizer's chat template refuses the prompt: {error}; string prompts"
                " need no template, with prompt_format text"
            ) from error


def open_prompts(config: LearnerConfig, tokenizer: Tokenizer, *, evaluation: bool = False) -> Prompts:
    """Open the data set that the configuration names, and check it.

    Args:
        config: of the run.
        tokenizer: of the model that is trained.
        evaluation: open eval_dataset, in its own order, cut to eval_size rows.

    Raises:
        ConfigError: no such data set, a row that cannot be used, no row that fits. Names file, line and column.
    """
    name = config.eval_dataset if evaluation else config.dataset
    arguments = config.eval_dataset_config if evaluation else config.dataset_config
    source, _, task = name.partition(":")
    rows: Rows
    if source == "reasoning_gym" and task:
        seed = config.seed + (EVAL_SEED_OFFSET if evaluation else 0)
        rows = GymRows(task, {"seed": seed} | arguments, endless=not evaluation and "size" not in arguments)
    elif arguments:
        key = "eval_dataset_config" if evaluation else "dataset_config"
        raise ConfigError(f"{key} {arguments}: only reasoning_gym:<task> takes arguments, not {name!r}")
    else:
        rows = JsonlRows(name, prompt_column=config.prompt_column, prompt_format=config.prompt_format)
    prompts = Prompts(
        rows,
        tokenizer,
        seed=config.seed,
        shuffle=config.shuffle and not evaluation,
        prompt_format=config.prompt_format,
        max_prompt_length=config.max_prompt_length,
        limit=config.eval_size if evaluation else 0,
    )
    prompts.check()
    return prompts


def stop_token_ids(tokenizer: Tokenizer, stop: Sequence[str], eos: int | Sequence[int] | None) -> tuple[int, ...]:
    """Return the ids that end a completion, ascending: the model's end-of-sequence and each of the stop texts.

    Raises:
        ConfigError: a stop text is not a single token; the error names its tokens.
    """
    ids = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
    for text in stop:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) != 1:
            raise ConfigError(
                f"stop {text!r} is {len(tokens)} tokens {tokenizer.convert_ids_to_tokens(tokens)}: each stop text must"
                " be a single token of the model's vocabulary"
            )
        ids.add(tokens[0])
    return tuple(sorted(ids))


def permuted(position: int, length: int, key: str) -> int:
    """Return where `position` goes in the permutation of range(length) that `key` chooses.

    A Feistel network over the next power of four, walked until it lands below `length` (cycle walking: Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002). It needs no memory and, unlike a library's shuffle, will
    give the same order in ten years.
    """
    half_bits = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = position >> half_bits, position & mask
        for round_number in range(FEISTEL_ROUNDS):
            digest = hashlib.blake2b(f"{key}/{round_number}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        position = left << half_bits | right
        if position < length:
            return position
