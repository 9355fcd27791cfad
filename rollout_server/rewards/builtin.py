"""The reward functions that need nothing but the standard library. Run in the workers.

Both look at the completion's text without the stop token, which is how the pool hands it over.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_LAYOUT = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")


def text_of(completion: str | list[dict[str, Any]]) -> str:
    """Return a completion's text: itself, or the content of its last message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def exact_match(
    completions: Sequence[str | list[dict[str, Any]]], answer: Sequence[Any], finish_reason: Sequence[str]
) -> list[float]:
    """1 where the model stopped by itself and wrote the answer and nothing else, up to white space at the ends."""
    return [
        float(reason == "stop" and text_of(completion).strip() == str(expected).strip())
        for completion, expected, reason in zip(completions, answer, finish_reason, strict=True)
    ]


def think_answer_format(completions: Sequence[str | list[dict[str, Any]]]) -> list[float]:
    """1 for `<think>...</think><answer>...</answer>`: both once, in this order, not empty, nothing around them."""
    return [float(_has_layout(text_of(completion))) for completion in completions]


def _has_layout(text: str) -> bool:
    match = _LAYOUT.fullmatch(text)
    return match is not None and len(_TAG.findall(text)) == 4 and all(part.strip() for part in match.groups())
