"""Mathematical equality, by math-verify. Imported and run in the workers only.

math-verify's own limits use signal.alarm, which raises off the main thread and does not stop C code; they are off, and
the pool kills instead. What the model wrote only ever reaches its LaTeX grammar, never sympy's `parse_expr`, which
evaluates Python. The rules are strict where lenient ones pay for guessing: of several boxed answers none counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from rollout_server.rewards.builtin import text_of

LONGEST_ANSWER = 500
"""Characters. No answer is longer, and the grammar's time grows fast."""
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_NUMBER = re.compile(r"(?<![\w.,])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?(?![\w]|[.,]\d)")
_LATEX = (LatexExtractionConfig(boxed_match_priority=0),)


def math_equal(completions: Sequence[str | list[dict[str, Any]]], answer: Sequence[Any]) -> list[float]:
    r"""1 where the completion's answer equals the row's `answer` (LaTeX or a number) mathematically.

    The completion's answer is the content of its one `\boxed{}`; without any box, the last number in the text. Text
    before `</think>` does not count.

    Raises:
        ValueError: a row's answer is not mathematics.
    """
    return [
        float(_equal(text_of(completion), str(expected)))
        for completion, expected in zip(completions, answer, strict=True)
    ]


def extract_answer(text: str) -> str | None:
    r"""Return what the completion gives as its answer, or None: no number, or more than one `\boxed{}`.

    Example:
        >>> extract_answer(r"so \boxed{\frac12}."), extract_answer("3 + 4 = 7"), extract_answer(r"\boxed{1} \boxed{2}")
        ('\\frac12', '7', None)
    """
    text = text.rpartition("</think>")[2]
    boxes = list(_BOX.finditer(text))
    if len(boxes) > 1:
        return None
    if boxes:
        return _braced(text, boxes[0].end())
    found = _NUMBER.findall(text)
    return found[-1] if found else None


def _equal(text: str, expected: str) -> bool:
    reference = _parsed_reference(expected)
    found = extract_answer(text)
    if not found or len(found) > LONGEST_ANSWER:
        return False
    parsed = _parsed(found)
    return bool(parsed) and bool(verify(reference, parsed, strict=True, timeout_seconds=None))


@lru_cache(maxsize=64)
def _parsed_reference(expected: str) -> list[Any]:
    """Parse a row's answer; every completion of the group shares it."""
    box = _BOX.search(expected)
    parsed = _parsed(_braced(expected, box.end()) or "" if box else expected.strip().strip("$"))
    if not parsed:
        raise ValueError("the row's answer is neither a number nor LaTeX")
    return parsed


def _parsed(latex: str) -> list[Any]:
    return list(
        parse(f"\\boxed{{{latex}}}", extraction_config=_LATEX, fallback_mode="no_fallback", parsing_timeout=None)
    )


def _braced(text: str, start: int) -> str | None:
    """Return the text from `start` to the brace that closes it; None when it is never closed."""
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None


_parsed_reference("1")  # the first parse builds grammars and patterns; a worker does that before its first call
