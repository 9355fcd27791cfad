"""Two-digit addition as a language model can start on it: two worked examples, then the sum to complete.

The form decides whether there is any signal: asked in a chat, SmolLM2-135M gives no sum right; after two examples
it gives about three of ten right, and half of all groups of 16 have both right and wrong completions.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

SHOTS = "23 + 45 = 68\n58 + 67 = 125\n"
"""One example without a carry and one with: answers of two and of three digits."""
STOP = "\n"
SMALLEST, LARGEST = 10, 99

Row = dict[str, str]
Pair = tuple[int, int]


def split_pairs(*, num_train: int, num_eval: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Draw disjoint training and evaluation pairs; the examples' own sums are in neither.

    The evaluation pairs depend on nothing but their number: they are the same for every seed.
    """
    numbers = range(SMALLEST, LARGEST + 1)
    pairs = [(a, b) for a in numbers for b in numbers if f"{a} + {b} =" not in SHOTS]
    evaluation = random.Random("evaluation").sample(pairs, num_eval)
    held_out = set(evaluation)
    rest = [pair for pair in pairs if pair not in held_out]
    return random.Random(seed).sample(rest, num_train), evaluation


def rows(pairs: Iterable[Pair]) -> Iterator[Row]:
    """Yield data rows: the prompt, and the answer that must stand alone before the newline that stops."""
    for a, b in pairs:
        yield {"prompt": f"{SHOTS}{a} + {b} =", "answer": str(a + b)}
