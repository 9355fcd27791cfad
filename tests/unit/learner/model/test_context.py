"""Rows divided among ranks: the parts are the row, whole completions stay whole. (With ranks: system/test_ranks.py.)"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from learner.model.context import check_context, cut
from learner.model.packing import MicroBatch, Rows, StepTokens, collect, pack_shared
from protocol.errors import ConfigError
from tests.factories import make_train_group

LENGTHS = st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=4), min_size=1, max_size=3)


def step_of(lengths: list[list[int]]) -> StepTokens:
    size = max(map(len, lengths))
    groups = [
        make_train_group(
            ordinal=p, lengths=(of * size)[:size], rewards=[0.0] * size, seed=p, prompt_tokens=list(range(3, 5 + p))
        )
        for p, of in enumerate(lengths)
    ]
    return collect(groups, mask_truncated_completions=False)


def all_rows(micro_batch: MicroBatch) -> list[Rows]:
    return [*([micro_batch.prompt] if micro_batch.prompt else []), *micro_batch.rows]


@given(lengths=LENGTHS, budget=st.integers(4, 60), num_parts=st.integers(2, 5), whole=st.booleans())
def test_the_parts_of_a_row_are_the_row(lengths: list[list[int]], budget: int, num_parts: int, whole: bool) -> None:
    step = step_of(lengths)
    completion_T = step.completion_T if whole else None
    for micro_batch in pack_shared(step, budget):
        parts = [all_rows(cut(micro_batch, part, num_parts, completion_T)) for part in range(num_parts)]
        for row, *of_row in zip(all_rows(micro_batch), *parts, strict=True):
            size = row.tokens_BL.size
            for name in ("tokens_BL", "positions_BL"):
                pieces = np.concatenate([getattr(part, name)[0] for part in of_row])
                assert (pieces[:size] == getattr(row, name)[0]).all()
                assert not pieces[size:].any(), "padding"
                assert pieces.size < size + num_parts
            assert (np.concatenate([part.predictor_T for part in of_row]) == row.predictor_T).all()
            assert (np.concatenate([part.index_T for part in of_row]) == row.index_T).all()
            assert {part.num_parts for part in of_row} == {num_parts}
            counts = [part.index_T.size for part in of_row]
            if not whole:
                assert max(counts) - min(counts) <= 1
            else:
                of = [set(step.completion_T[part.index_T].tolist()) for part in of_row]
                assert sum(map(len, of)) == len(set().union(*of)), "no completion is in two parts"


def test_whole_completions_are_spread() -> None:
    step = step_of([[5, 5, 5, 5]])
    (micro_batch,) = pack_shared(step, 64)
    counts = [cut(micro_batch, part, 2, step.completion_T).rows[0].index_T.size for part in range(2)]
    assert counts == [10, 10]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_heads_are_shared_out(tiny_model_dir: Path, size: int) -> None:
    check_context(AutoModelForCausalLM.from_pretrained(tiny_model_dir), size, shares_prefix=True)


@pytest.mark.parametrize(
    ("size", "shares", "says"),
    [(3, True, "its share of 4 query and 2 key heads; use one of 1, 2, 4"), (2, False, "cannot share prompts")],
)
def test_what_cannot_be_divided_is_refused(tiny_model_dir: Path, size: int, shares: bool, says: str) -> None:
    with pytest.raises(ConfigError, match=f"context_parallel_size {size}: .*{says}"):
        check_context(AutoModelForCausalLM.from_pretrained(tiny_model_dir), size, shares_prefix=shares)


@pytest.mark.parametrize("per_layer_type", [False, True])
@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rotary_positions_that_look_at_the_whole_row_are_refused(
    tiny_model_dir: Path, rope_type: str, per_layer_type: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    parameters = {"rope_type": rope_type, "rope_theta": 10_000.0, "factor": 2.0}
    model.config.rope_parameters = {"full_attention": parameters} if per_layer_type else parameters
    with pytest.raises(ConfigError, match=f"rotary positions of type {rope_type} depend on the longest position"):
        check_context(model, 2, shares_prefix=True)
