"""The row cache: what is written where, what the model sees, compaction and growth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from protocol.messages import Sampling
from protocol.versions import Version
from rollout_server.engines.base import GenerationRequest
from rollout_server.engines.kv_cache import GROWTH, PromptCache, RowCache
from rollout_server.engines.rows import Job, Rows

HEADS, DIM = (2, 3), 4
"""Two layers with different heads."""


def prompt_of(value: float, length: int) -> PromptCache:
    return PromptCache(
        keys=[torch.full((heads, length, DIM), value) for heads in HEADS],
        values=[torch.full((heads, length, DIM + 1), -value) for heads in HEADS],
        logits=torch.zeros(5),
    )


def write(cache: RowCache, positions: list[int], values: list[float]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One decode step: row r writes values[r] at positions[r]."""
    cache.begin_step(torch.tensor(positions), max(positions) + 1)
    new = torch.tensor(values)[:, None, None, None]
    return [
        cache.update(new.expand(-1, heads, 1, DIM), -new.expand(-1, heads, 1, DIM + 1), layer)
        for layer, heads in enumerate(HEADS)
    ]


def test_each_row_is_written_at_its_own_position() -> None:
    cache = RowCache(room=4, max_length=100)
    cache.admit(prompt_of(1.0, 3), first=0, count=2)
    cache.admit(prompt_of(2.0, 5), first=2, count=1)
    for (keys, values), heads in zip(write(cache, [3, 3, 5], [7.0, 8.0, 9.0]), HEADS, strict=True):
        assert keys.shape == (3, heads, 6, DIM)
        assert values.shape == (3, heads, 6, DIM + 1)
        assert keys[0, 0, :4, 0].tolist() == [1, 1, 1, 7]
        assert keys[1, -1, :4, 0].tolist() == [1, 1, 1, 8]
        assert keys[2, 0, :, 0].tolist() == [2, 2, 2, 2, 2, 9]
        assert values[2, 0, :, 0].tolist() == [-2, -2, -2, -2, -2, -9]


def test_the_mask_hides_what_lies_after_a_rows_position() -> None:
    cache = RowCache(room=4, max_length=100)
    cache.admit(prompt_of(1.0, 1), first=0, count=2)
    mask = cache.begin_step(torch.tensor([0, 2]), 3)
    assert mask.shape == (2, 1, 1, 3)
    assert mask[:, 0, 0].tolist() == [[0, -np.inf, -np.inf], [0, 0, 0]]
    assert cache.get_mask_sizes(1) == (3, 0)
    assert cache.get_seq_length() == 2


def test_move_fills_holes_from_other_rows() -> None:
    cache = RowCache(room=4, max_length=100)
    for row, value in enumerate([1.0, 2.0, 3.0, 4.0]):
        cache.admit(prompt_of(value, 2 + row), first=row, count=1)
    cache.move(torch.tensor([2, 3]), torch.tensor([1, 0]), length=5)
    (keys, values), _ = write(cache, [5, 4], [9.0, 9.0])
    assert keys[0, 0, :, 0].tolist() == [4, 4, 4, 4, 4, 9]
    assert keys[1, 0, :5, 0].tolist() == [3, 3, 3, 3, 9]
    assert values[1, 0, :5, 0].tolist() == [-3, -3, -3, -3, -9]


def test_buffers_grow_with_the_longest_row_and_keep_their_content() -> None:
    cache = RowCache(room=2, max_length=150)
    cache.admit(prompt_of(1.0, 3), first=0, count=1)
    assert cache.capacity == GROWTH
    write(cache, [3], [5.0])
    (keys, _), _ = write(cache, [GROWTH], [6.0])
    assert cache.capacity == 2 * GROWTH
    assert keys[0, 0, [0, 2, 3, GROWTH], 0].tolist() == [1, 1, 5, 6]
    cache.admit(prompt_of(2.0, 149), first=1, count=1)
    assert cache.capacity == 150


def job_of(group: str, generations: int, *, stops: tuple[int, ...] = (9,), length: int = 8, prompt: int = 3) -> Job:
    sampling = Sampling(max_completion_length=length, stop_token_ids=stops)
    request = GenerationRequest(
        group_id=group, prompt_tokens=np.ones(prompt, np.int32), num_generations=generations, sampling=sampling, seed=3
    )
    return Job(request=request, reply=lambda _: None)


def append(rows: Rows, tokens: list[int]) -> tuple[list[int], list[bool]]:
    ended, stopped = rows.append(np.array(tokens), -np.array(tokens, np.float32))
    return ended.tolist(), stopped.tolist()


def test_rows_end_by_stop_token_or_limit() -> None:
    rows = Rows(room=5, max_length=10)
    rows.admit(job_of("a", 2, stops=(9, 4)), 2, limit=8, version=Version(1, 0))
    rows.admit(job_of("b", 2, stops=()), 2, limit=1, version=Version(1, 0))
    rows.admit(job_of("c", 1), 1, limit=8, version=Version(1, 0))
    assert append(rows, [4, 5, 9, 1, 4]) == ([0, 2, 3], [True, False, False])


@pytest.mark.parametrize("ended", [[0], [4], [1, 3], [0, 1, 2, 3, 4], [0, 2, 4], [3, 4]])
def test_removing_rows_keeps_every_other_sample_whole(ended: list[int]) -> None:
    rows = Rows(room=5, max_length=10)
    rows.admit(job_of("a", 5), 5, limit=8, version=Version(1, 0))
    append(rows, [10, 11, 12, 13, 14])
    append(rows, [20, 21, 22, 23, 24])
    rows.lengths[:5] = [30, 31, 32, 33, 34]
    seeds = rows.seeds.copy()
    sources, targets = rows.remove(np.array(ended))
    survivors = [row for row in range(5) if row not in ended]
    assert rows.count == len(survivors) == len(rows.samples)
    assert len(sources) == len(targets) == sum(row < len(survivors) for row in ended)
    assert set(sources.tolist()) <= set(survivors)
    for row in range(rows.count):
        index = rows.samples[row].index
        assert rows.completion_tokens[row, :2].tolist() == [10 + index, 20 + index]
        assert rows.logprobs[row, :2].tolist() == [-10 - index, -20 - index]
        assert rows.lengths[row] == 30 + index
        assert rows.seeds[row] == seeds[index]
    assert {sample.index for sample in rows.samples} == set(survivors)


def test_spans_follow_version_switches() -> None:
    rows = Rows(room=3, max_length=10)
    rows.admit(job_of("a", 2), 2, limit=8, version=Version(1, 0))
    append(rows, [1, 2])
    rows.switch(Version(1, 1))
    rows.switch(Version(1, 2))  # twice without a token between: 1.1 sampled nothing
    append(rows, [1, 2])
    append(rows, [1, 2])
    rows.switch(Version(1, 2))  # the same again is no new span
    rows.switch(Version(1, 3))
    assert rows.samples[0].marks.spans(3) == ((Version(1, 0), 1), (Version(1, 2), 2))
    append(rows, [1, 2])
    assert rows.samples[1].marks.spans(4) == ((Version(1, 0), 1), (Version(1, 2), 2), (Version(1, 3), 1))


def test_wider_stop_sets_do_not_touch_the_rows_before() -> None:
    rows = Rows(room=3, max_length=10)
    rows.admit(job_of("a", 1, stops=(7,)), 1, limit=8, version=Version(1, 0))
    rows.admit(job_of("b", 1, stops=(1, 2, 3)), 1, limit=8, version=Version(1, 0))
    assert append(rows, [7, 3]) == ([0, 1], [True, True])
