"""Canaries: which sequences engines try new weights on."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from learner.canaries import MAX_LENGTH, PREDICTED_TOKENS, choose_canaries
from protocol.errors import ConfigError


class Rows:
    """Row i has `lengths[i]` tokens, all of them i; None is too long."""

    def __init__(self, *lengths: int | None) -> None:
        self.lengths = lengths
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, ordinal: int) -> SimpleNamespace | None:
        self.asked.append(ordinal)
        length = self.lengths[ordinal]
        return None if length is None else SimpleNamespace(prompt_tokens=np.full(length, ordinal, np.int32))


@pytest.mark.parametrize(
    ("max_length", "shape"),
    [(5000, (5, 64)), (64, (5, 64)), (63, (5, 63)), (17, (16, 17)), (3, (128, 3)), (2, (256, 2)), (1, (256, 2))],
)
def test_enough_tokens_are_predicted_and_not_many_more(max_length, shape):
    tokens = choose_canaries(Rows(7, 100), max_length=max_length)  # type: ignore[arg-type]
    assert (tokens.shape, tokens.dtype) == (shape, np.int32)
    count, length = shape
    assert length <= MAX_LENGTH
    assert (count - 1) * (length - 1) < PREDICTED_TOKENS <= count * (length - 1)


def test_they_are_the_prompts_end_to_end():
    tokens = choose_canaries(Rows(3, 2, 400), max_length=4)  # type: ignore[arg-type]
    assert tokens[:3].tolist() == [[0, 0, 0, 1], [1, 2, 2, 2], [2, 2, 2, 2]]


def test_after_the_last_row_comes_the_first_and_rows_that_are_too_long_are_passed_over():
    rows = Rows(2, None, 1)
    tokens = choose_canaries(rows, max_length=4)  # type: ignore[arg-type]
    assert tokens.reshape(-1)[:9].tolist() == [0, 0, 2, 0, 0, 2, 0, 0, 2]
    assert set(rows.asked) == {0, 1, 2}


def test_no_more_rows_are_made_than_are_needed():
    """Some data sets take seconds a row."""
    rows = Rows(*[100] * 50)
    choose_canaries(rows, max_length=64)  # type: ignore[arg-type]
    assert rows.asked == [0, 1, 2, 3]


def test_a_data_set_of_which_nothing_fits_is_said():
    with pytest.raises(ConfigError, match="none of the 2 prompts fits max_prompt_length: raise it"):
        choose_canaries(Rows(None, None), max_length=64)  # type: ignore[arg-type]
