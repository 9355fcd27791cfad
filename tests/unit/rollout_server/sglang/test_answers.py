"""What requests to SGLang say and what its answers mean."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.messages import FinishReason, Sampling
from protocol.versions import Version
from rollout_server.engines.base import EngineFailure
from rollout_server.engines.sglang.answers import (
    ForeignWeights,
    backdate,
    parse_version,
    prefill_body,
    sample_body,
    score_body,
    scores,
    to_completion,
    to_spans,
)
from rollout_server.engines.sglang.client import Answer, Finish, Meta, Span

PROMPT = np.array([3, 4, 5], np.int32)
STOPS = (1, 9)


def make_spans(lengths: list[int], first: int = 3) -> list[Span]:
    """Spans of consecutive versions; those of no token are left out, as SGLang does."""
    ends = list(itertools.accumulate(lengths))
    return [
        Span(version=f"1.{first + i}", start=end - length, end=end)
        for i, (length, end) in enumerate(zip(lengths, ends, strict=True))
        if length
    ]


def make_answer(finish: Finish, tokens: list[int], spans: list[Span] | None = None) -> Answer:
    meta = Meta(
        finish_reason=finish,
        prompt_tokens=3,
        weight_versions=make_spans([len(tokens)]) if spans is None else spans,
        output_token_logprobs=[(-0.5 * i, token, None) for i, token in enumerate(tokens)],
    )
    return Answer(output_ids=tokens, meta_info=meta)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=5))
def test_spans_that_are_not_late_are_taken_as_they_are(lengths: list[int]) -> None:
    found = to_spans(make_spans(lengths), sum(lengths))
    assert found == tuple((Version(1, 3 + i), length) for i, length in enumerate(lengths) if length)


@given(first=st.integers(1, 50), middle=st.lists(st.integers(1, 50), max_size=4), last=st.integers(1, 50))
def test_a_token_in_flight_is_given_to_the_version_before(first: int, middle: list[int], last: int) -> None:
    """The token that was sampled when the engine stood still is the old version's, and SGLang counts it to the new."""
    sampled = [first, *middle, last]
    counted = [first - 1, *middle, last + 1]
    found = backdate(to_spans(make_spans(counted), sum(sampled)), Version(1, 3))
    assert found == tuple((Version(1, 3 + i), length) for i, length in enumerate(sampled))


@given(counted=st.lists(st.integers(1, 9), max_size=6), missed=st.integers(0, 3))
def test_a_token_is_named_too_old_a_version_at_worst(counted: list[int], missed: int) -> None:
    """Whichever of the tokens after a change were in flight; and the first one, after `missed` changes."""
    spans = to_spans(make_spans(counted), sum(counted))
    found = backdate(spans, Version(1, 3 - missed))
    names = [version for version, count in found for _ in range(count)]
    counted_to = [version for version, count in spans for _ in range(count)]
    assert len(names) == sum(counted)
    assert all(count > 0 for _, count in found)
    assert names == sorted(names)
    for i, (name, counted_name) in enumerate(zip(names, counted_to, strict=True)):
        before = counted_to[i - 1] if i else Version(1, 3 - missed)
        assert name == before, "which sampled it if it was in flight"
        assert name <= counted_name


def test_a_foreign_version_is_found_out_though_its_tokens_are_given_to_another() -> None:
    with pytest.raises(ForeignWeights, match="weights called 'default'"):
        to_spans([Span(version="default", start=0, end=1)], 1)


def test_spans_that_leave_tokens_out_are_refused() -> None:
    with pytest.raises(EngineFailure, match="SGLang names the versions of 3 tokens of 5"):
        to_spans(make_spans([3]), 5)
    with pytest.raises(EngineFailure, match="SGLang names the versions of 0 tokens of 5"):
        to_spans([], 5)
    assert to_spans([], 0) == ()


@given(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_a_version_is_read_as_it_was_written(incarnation: int, policy_version: int) -> None:
    version = Version(incarnation, policy_version)
    assert parse_version(str(version)) == version


@pytest.mark.parametrize("label", ["default", "", "3", "1.", ".2", "1.-2", "1.2.3", "v1.2", "1.2 "])
def test_weights_that_somebody_else_named_are_foreign(label: str) -> None:
    with pytest.raises(ForeignWeights, match=f"weights called {label!r}, which this server never loaded"):
        parse_version(label)


def test_a_stopped_completion_keeps_its_stop_token() -> None:
    answer = make_answer(Finish(type="stop", matched=9), [5, 6, 9])
    completion = to_completion(answer, stops=STOPS, aborted=False, in_flight=None)
    assert completion.completion_tokens.tolist() == [5, 6, 9]
    assert completion.completion_tokens.dtype == np.int32
    assert completion.behavior_logprobs.tolist() == [0.0, -0.5, -1.0]
    assert completion.behavior_logprobs.dtype == np.float32
    assert completion.spans == ((Version(1, 3), 3),)
    assert completion.finish_reason is FinishReason.STOP


def test_length_and_abort_are_told_apart() -> None:
    cut = to_completion(make_answer(Finish(type="length"), [5]), stops=STOPS, aborted=True, in_flight=None)
    assert cut.finish_reason is FinishReason.LENGTH
    ended = to_completion(make_answer(Finish(type="abort"), []), stops=STOPS, aborted=True, in_flight=None)
    assert ended.finish_reason is FinishReason.ABORT
    assert ended.spans == ()


def test_an_abort_that_nobody_asked_for_is_a_failure() -> None:
    answer = make_answer(Finish(type="abort", message="out of memory"), [5])
    with pytest.raises(EngineFailure, match="SGLang gave a sample up: out of memory"):
        to_completion(answer, stops=STOPS, aborted=False, in_flight=None)
    with pytest.raises(EngineFailure, match="SGLang gave a sample up: without a reason"):
        to_completion(make_answer(Finish(type="abort"), [5]), stops=STOPS, aborted=False, in_flight=None)


@pytest.mark.parametrize("matched", [7, None, "text"])
def test_a_stop_at_a_token_that_the_lease_does_not_name_is_a_failure(matched: int | str | None) -> None:
    answer = make_answer(Finish(type="stop", matched=matched), [5, 7])
    with pytest.raises(EngineFailure, match=rf"with token {matched}, the lease has the stop tokens \[1, 9\]"):
        to_completion(answer, stops=STOPS, aborted=False, in_flight=None)


def test_logprobs_must_be_of_the_tokens() -> None:
    answer = make_answer(Finish(type="length"), [5, 6])
    answer.output_ids = [5, 7]
    with pytest.raises(EngineFailure, match="SGLang gave 2 logprobs for 2 tokens, or of other tokens"):
        to_completion(answer, stops=STOPS, aborted=False, in_flight=None)
    answer.meta_info.output_token_logprobs.pop()
    with pytest.raises(EngineFailure, match="SGLang gave 1 logprobs for 2 tokens"):
        to_completion(answer, stops=STOPS, aborted=False, in_flight=None)


def test_a_logprob_that_is_not_given_is_nan() -> None:
    answer = make_answer(Finish(type="length"), [5, 6])
    answer.meta_info.output_token_logprobs[1] = (None, 6, None)
    completion = to_completion(answer, stops=STOPS, aborted=False, in_flight=None)
    assert np.isnan(completion.behavior_logprobs).tolist() == [False, True]


def test_scores_are_of_every_token_but_the_first_or_nan() -> None:
    tokens = np.array([3, 4, 5], np.int32)
    answer = make_answer(Finish(type="length"), [])
    answer.meta_info.input_token_logprobs = [(None, 3, None), (-1.0, 4, None), (-2.0, 5, None)]
    assert scores(answer, tokens).tolist() == [-1.0, -2.0]
    answer.meta_info.input_token_logprobs[2] = (None, 5, None)
    assert np.isnan(scores(answer, tokens)).tolist() == [False, True]
    answer.meta_info.input_token_logprobs[2] = (-2.0, 6, None)
    assert np.isnan(scores(answer, tokens)).tolist() == [True, True]


@given(
    temperature=st.sampled_from([0.0, 0.7, 1.0]), top_p=st.sampled_from([0.5, 1.0]), top_k=st.integers(0, 3),
    min_p=st.sampled_from([0.0, 0.1]), stops=st.sampled_from([(), (1,), (1, 9)]),
)  # fmt: skip
def test_a_request_leaves_nothing_to_the_models_defaults(
    temperature: float, top_p: float, top_k: int, min_p: float, stops: tuple[int, ...]
) -> None:
    sampling = Sampling(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, max_completion_length=90, stop_token_ids=stops
    )
    body = sample_body(PROMPT, sampling, limit=17, rid="r", cache_key="w1.2", seed=None)
    assert body["sampling_params"] == {
        "max_new_tokens": 17, "temperature": temperature, "top_p": top_p, "top_k": top_k or -1,
        "min_p": min_p, "stop_token_ids": stops, "ignore_eos": stops == (), "min_new_tokens": 0,
        "frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0,
    }  # fmt: skip
    assert {key: value for key, value in body.items() if key != "sampling_params"} == {
        "input_ids": [3, 4, 5], "return_logprob": True, "logprob_start_len": -1, "rid": "r", "extra_key": "w1.2",
    }  # fmt: skip


@given(st.integers(0, 2**63 - 1))
def test_a_seed_fits_into_what_sglang_takes(seed: int) -> None:
    sampling = Sampling(max_completion_length=9, stop_token_ids=())
    body = sample_body(PROMPT, sampling, limit=9, rid="r", cache_key="", seed=seed)
    assert 0 <= body["sampling_params"]["sampling_seed"] < 2**31


def test_scoring_and_prefilling_sample_nothing() -> None:
    prefill = prefill_body(PROMPT, rid="r", cache_key="k")
    assert prefill["sampling_params"]["max_new_tokens"] == 0
    assert "return_logprob" not in prefill
    score = score_body(PROMPT, rid="r", cache_key="k")
    assert score == {**prefill, "return_logprob": True, "logprob_start_len": 0}
