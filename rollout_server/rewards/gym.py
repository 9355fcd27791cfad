r"""reasoning-gym's tasks, scored strictly. Imported and run in the workers only.

The package's own scorers are lenient: '288 1' and 'The answer is 70' get full marks from gsm_symbolic, any sentence
with 'False' in it from game_of_life_halting, 24.5 passes for 24 in puzzle24; others pass the model's text to `eval`.
So the answer must be the whole completion, or the content of its last <answer> tag, and then

- equal the row's answer, white space apart; or,
- where the answer is a number, be nothing but a number, and satisfy the task's scorer fully (its rounding rules); or,
- where many answers are right, have that task's shape to the last character, and satisfy its scorer fully; or,
- for arithmetic puzzles, use exactly the given numbers and come to the target, by our own exact arithmetic.

Anything less than full marks is 0.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import reasoning_gym

from rollout_server.rewards.builtin import text_of

LONGEST_ANSWER = 4000
"""Characters that a scorer gets to see."""
_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?", re.ASCII)
_JSON = re.compile(r"[\[{][\w\s\"'>,:\[\]{}-]*[\]}]", re.ASCII)
SHAPES = {
    "graph_color": _JSON,
    "jugs": _JSON,
    "knight_swap": _JSON,
    "n_queens": re.compile(r"[Q_](?:[ \n][Q_])+"),
    "propositional_logic": re.compile(r"[A-Z∧∨→↔¬() ]{1,200}"),  # noqa: RUF001 - a logical or, not a v
    "rubiks_cube": re.compile(r"[UDLRFB]['2]?(?: [UDLRFB]['2]?)*"),
    "rush_hour": re.compile(r"[A-Z][+-]\d+(?: [A-Z][+-]\d+)*", re.ASCII),
    "sokoban": re.compile(r"[UDLR]+"),
    "tower_of_hanoi": re.compile(r"(?:(?:^|\n)Move disk \d+ from Peg \d+ to Peg \d+)+", re.ASCII),
    "word_ladder": re.compile(r"[A-Z]+(?:,[A-Z]+)+"),
}  # fmt: skip
"""Tasks with many right answers -> the only form in which their scorer gets to see the model's text. None of these
scorers can evaluate text of that form as code."""
_PUZZLE = re.compile(r"[\d+\-*/() ]{1,200}", re.ASCII)
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def reasoning_gym_score(
    completions: Sequence[str | list[dict[str, Any]]],
    task: Sequence[str],
    answer: Sequence[str | None],
    metadata: Sequence[Mapping[str, Any]],
) -> list[float]:
    """1 where the completion answers its reasoning-gym row fully and in the right form, else 0.

    Raises:
        ValueError: the task has no reference answer, and no strict rule here.
    """
    rows = zip(completions, task, answer, metadata, strict=True)
    return [float(_is_right(extract_answer(text_of(c)), name, expected, facts)) for c, name, expected, facts in rows]


def extract_answer(text: str) -> str:
    """Return the content of the last <answer>...</answer>, or the whole text; white space at the ends removed."""
    tagged = _ANSWER.findall(text)
    return (tagged[-1] if tagged else text).strip()


def _is_right(found: str, task: str, expected: str | None, metadata: Mapping[str, Any]) -> bool:
    if expected is None and task not in SHAPES:
        raise ValueError(f"reasoning_gym task {task} has no reference answer and no strict rule: use your own scorer")
    if expected is not None and found.split() == expected.split():
        return True
    if not found or len(found) > LONGEST_ANSWER:
        return False
    if task in ("countdown", "puzzle24"):
        return _solves_puzzle(found, metadata["numbers"], metadata.get("target", 24))
    number = expected is not None and _NUMBER.fullmatch(expected) is not None
    shape = _NUMBER if number else SHAPES.get(task)
    if shape is None or not shape.fullmatch(found):
        return False
    return _full_marks(found, task, {"answer": expected, "metadata": metadata})


def _full_marks(found: str, task: str, entry: Mapping[str, Any]) -> bool:
    try:
        score: float = _dataset(task).score_answer(found, entry)
    except Exception:  # noqa: BLE001 - scorers raise all sorts of errors on answers of the right form but no sense
        return False
    return score >= 1.0


@lru_cache(maxsize=128)
def _dataset(task: str) -> Any:
    """Return the task's scorer; it needs a data set, of which no row is ever made."""
    return reasoning_gym.create_dataset(task, size=1, seed=0)


def _solves_puzzle(expression: str, numbers: Sequence[int], target: int) -> bool:
    """Whether + - * / over exactly these numbers, each once, come to the target."""
    if not _PUZZLE.fullmatch(expression) or sorted(map(int, re.findall(r"\d+", expression))) != sorted(numbers):
        return False
    try:
        return _value(ast.parse(expression, mode="eval").body) == target
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):  # MemoryError: too deeply nested
        return False


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int(number)):
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left), _value(right))
    raise ValueError(f"{type(node).__name__} is no arithmetic")
