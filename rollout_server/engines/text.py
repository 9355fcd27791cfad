"""Token ids to text, for reward functions: the only use the server has for a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from protocol.errors import ConfigError

TextDecoder = Callable[[Sequence[int]], str]
"""Completion token ids to text: special tokens skipped, spaces as they are."""


def load_tokenizer(model: Path) -> Any:
    """Load the tokenizer of a model directory, never from a hub.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {model}: no tokenizer can be loaded from it: {first_line(error)}") from error
    # Without tokenizer files transformers 5 makes one up from config.json that knows only its special tokens.
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ConfigError(f"model {model}: its tokenizer has no vocabulary; the directory needs tokenizer.json")
    return tokenizer


def load_decoder(model: Path | str) -> TextDecoder:
    """Return the function that turns completion tokens into text.

    Raises:
        ConfigError: the model directory holds no tokenizer.
    """
    tokenizer = load_tokenizer(Path(model))

    def decode(tokens: Sequence[int]) -> str:
        text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    return decode


def first_line(error: Exception) -> str:
    """What a log line has room for of a long error text."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
