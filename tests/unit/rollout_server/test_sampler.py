"""The sampler: the distribution it draws from, greedy, truncation, and what its logprobs are of."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from protocol.messages import Sampling
from rollout_server.engines.counters import hash_counters, uniforms
from rollout_server.engines.sampler import SamplingRows, sample, truncate

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -30.0])


def rows_of(count: int, **sampling: float) -> SamplingRows:
    rows = SamplingRows.empty(count)
    rows.put(slice(0, count), Sampling(max_completion_length=1, stop_token_ids=(), **sampling))  # type: ignore[arg-type]
    return rows


def draw(count: int, **sampling: float) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = uniforms(np.array([1234], np.uint64), np.arange(count))
    return sample(LOGITS.expand(count, -1), numbers, rows_of(count, **sampling))


def test_hash_is_splitmix64() -> None:
    # The first outputs of the published generator for seed 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert hash_counters(np.array([1234567], np.uint64), np.arange(4, dtype=np.uint64)).tolist() == expected


def test_uniforms_are_below_one_and_exact_in_float32() -> None:
    numbers = uniforms(np.arange(1000, dtype=np.uint64)[:, None], np.arange(100))
    assert numbers.dtype == np.float32
    assert numbers.min() >= 0
    assert numbers.max() <= 1 - 2**-24
    assert abs(numbers.mean() - 0.5) < 0.005
    assert (numbers * 2**24 == np.round(numbers.astype(np.float64) * 2**24)).all()


def test_neighboring_seeds_and_positions_are_uncorrelated() -> None:
    numbers = uniforms(np.arange(200, dtype=np.uint64)[:, None], np.arange(200)).astype(np.float64)
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_samples_follow_the_softmax(temperature: float) -> None:
    count = 20_000
    tokens, _ = draw(count, temperature=temperature)
    expected = torch.softmax(LOGITS / temperature, -1).double() * count
    seen = torch.bincount(tokens, minlength=len(LOGITS)).double()
    likely = expected > 5
    chi_square = float(((seen - expected)[likely] ** 2 / expected[likely]).sum())
    assert chi_square < 20.5  # 99.9 % quantile at 5 degrees of freedom
    assert seen[~likely].sum() <= 2


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_are_of_the_tempered_softmax(temperature: float) -> None:
    tokens, logprobs = draw(50, temperature=temperature)
    expected = torch.log_softmax(LOGITS / temperature, -1)[tokens]
    torch.testing.assert_close(logprobs, expected)
    assert logprobs.dtype == torch.float32


def test_greedy_takes_the_largest_with_logprobs_of_temperature_one() -> None:
    tokens, logprobs = draw(10, temperature=0.0)
    assert tokens.tolist() == [0] * 10
    torch.testing.assert_close(logprobs, torch.log_softmax(LOGITS, -1)[tokens])


def test_greedy_and_sampled_rows_share_a_batch() -> None:
    rows = rows_of(400, temperature=1.0)
    rows.put(slice(0, 200), Sampling(temperature=0.0, max_completion_length=1, stop_token_ids=()))
    tokens, _ = sample(LOGITS.expand(400, -1), uniforms(np.array([5], np.uint64), np.arange(400)), rows)
    assert set(tokens[:200].tolist()) == {0}
    assert {1, 2, 4} <= set(tokens[200:].tolist())


def test_top_k_draws_from_the_k_largest_and_keeps_the_whole_softmax_as_logprob() -> None:
    tokens, logprobs = draw(3000, top_k=2)
    assert set(tokens.tolist()) == {0, 1}
    share = (tokens == 0).float().mean().item()
    assert share == pytest.approx(1 / (1 + math.exp(-1)), abs=0.03)
    torch.testing.assert_close(logprobs, torch.log_softmax(LOGITS, -1)[tokens])


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    probabilities = torch.softmax(LOGITS, -1)
    assert probabilities[:2].sum() < 0.85 < probabilities[[0, 1, 4]].sum()
    assert set(draw(3000, top_p=0.85)[0].tolist()) == {0, 1, 4}
    assert set(draw(300, top_p=1e-6)[0].tolist()) == {0}


def test_min_p_keeps_what_is_near_the_largest() -> None:
    assert set(draw(3000, min_p=0.3)[0].tolist()) == {0, 1}


def test_truncated_and_whole_rows_share_a_batch() -> None:
    probabilities = torch.tensor([[0.1, 0.6, 0.3], [0.1, 0.6, 0.3], [0.1, 0.6, 0.3]])
    off_k, off_p = np.iinfo(np.int64).max, np.inf
    kept = truncate(
        probabilities,
        top_k=torch.tensor([off_k, 1, 2]),
        top_p=torch.tensor([off_p, off_p, 0.5]),
        min_p=torch.tensor([0.0, 0.0, 0.0]),
    )
    torch.testing.assert_close(kept, torch.tensor([[0.1, 0.6, 0.3], [0.0, 0.6, 0.0], [0.0, 0.6, 0.0]]))


def test_the_largest_number_never_leaves_the_vocabulary_nor_draws_the_impossible() -> None:
    torch.manual_seed(0)
    logits = torch.randn(500, 300) * 5
    logits[:, -20:] = -torch.inf
    tokens, logprobs = sample(logits, np.full(500, 1 - 2**-24, np.float32), rows_of(500))
    assert tokens.max() < 280
    assert torch.isfinite(logprobs).all()
    first, _ = sample(logits.flip(-1), np.zeros(500, np.float32), rows_of(500))
    assert first.min() >= 20


def test_nan_logits_give_nan_logprobs_instead_of_an_invalid_token() -> None:
    tokens, logprobs = sample(torch.full((2, 5), torch.nan), np.array([0.3, 0.9], np.float32), rows_of(2))
    assert (tokens < 5).all()
    assert torch.isnan(logprobs).all()


def test_moving_rows_moves_their_parameters() -> None:
    rows = rows_of(4, temperature=1.0)
    rows.put(slice(3, 4), Sampling(temperature=0.5, top_k=3, max_completion_length=1, stop_token_ids=()))
    rows.move(np.array([3]), np.array([1]))
    assert rows.temperature.tolist() == [1.0, 0.5, 1.0, 0.5]
    assert rows.top_k[1] == 3
    assert rows.head(2).truncates.tolist() == [False, True]
