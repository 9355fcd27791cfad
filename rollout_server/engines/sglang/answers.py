"""What a request to SGLang says, and what its answer means. Pure.

Logprobs of sampled tokens are log softmax(logits / T), before top-p, top-k and min-p; those of prompt tokens are always
at temperature 1 (both measured against a Hugging Face forward; tests/system/sglang holds it).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from protocol.completions import Completion
from protocol.messages import FinishReason, Float32, Int32, Sampling
from protocol.versions import Version
from rollout_server.engines.base import EngineFailure
from rollout_server.engines.marks import Spans
from rollout_server.engines.sglang.client import Answer, Finish, Span

PROBE = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True}}
"""The smallest sign of life: one token."""


class ForeignWeights(EngineFailure):
    """SGLang samples with weights that this server never loaded: somebody has restarted or changed it."""


def sample_body(
    prompt: Int32, sampling: Sampling, *, limit: int, rid: str, cache_key: str, seed: int | None
) -> dict[str, Any]:
    """Ask for one completion of at most `limit` tokens. Every field is explicit: SGLang's defaults are the model's.

    Args:
        prompt: [P]
        sampling: of the lease.
        limit: tokens to sample at most.
        rid: its id; no id may begin with another one, since an abort takes all that begin alike.
        cache_key: requests share cached prompts within a key only.
        seed: for engines that sample by seed.
    """
    body: dict[str, Any] = {
        "input_ids": prompt.tolist(),
        "sampling_params": {
            "max_new_tokens": limit,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "stop_token_ids": sampling.stop_token_ids,
            "ignore_eos": not sampling.stop_token_ids,  # it switches stop_token_ids off, too
            "min_new_tokens": 0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
        },
        "return_logprob": True,
        "logprob_start_len": -1,
        "rid": rid,
        "extra_key": cache_key,
    }
    if seed is not None:
        body["sampling_params"]["sampling_seed"] = seed & 0x7FFFFFFF
    return body


def prefill_body(prompt: Int32, *, rid: str, cache_key: str) -> dict[str, Any]:
    """Compute the prompt's keys and values and keep them; sample nothing."""
    return {
        "input_ids": prompt.tolist(),
        "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
        "rid": rid,
        "extra_key": cache_key,
    }


def score_body(tokens: Int32, *, rid: str, cache_key: str) -> dict[str, Any]:
    """Ask for the logprobs of `tokens`[1:], each given those before it."""
    return prefill_body(tokens, rid=rid, cache_key=cache_key) | {"return_logprob": True, "logprob_start_len": 0}


def scores(answer: Answer, tokens: Int32) -> Float32:
    """[L - 1] logprobs of tokens[1:]; what SGLang does not give, or gives of other tokens, is NaN."""
    given = answer.meta_info.input_token_logprobs
    # SGLang writes 0 for the last id of the vocabulary (it takes it for a placeholder); the logprob is the token's own.
    if len(given) != len(tokens) or any(
        shown not in (token, 0) for (_, shown, _), token in zip(given, tokens, strict=True)
    ):
        return np.full(len(tokens) - 1, np.nan, np.float32)
    return np.array([np.nan if value is None else value for value, _, _ in given[1:]], np.float32)


def to_completion(
    answer: Answer,
    *,
    stops: Sequence[int],
    aborted: bool,
    in_flight: Version | None,
    adapter: Version | None = None,
) -> Completion:
    """Turn SGLang's answer into a completion.

    Args:
        answer: of one sample.
        stops: the lease's stop tokens.
        aborted: whether we asked for its end.
        in_flight: see `backdate`; None where no token is under way while weights are exchanged.
        adapter: the version whose adapter sampled all of it; None where versions are SGLang's weights, which it names.

    Raises:
        EngineFailure: it ended for a reason that nobody asked for, or what it says does not fit together.
    """
    meta = answer.meta_info
    logprobs = meta.output_token_logprobs
    if [token for _, token, _ in logprobs] != answer.output_ids:
        raise EngineFailure(
            f"SGLang gave {len(logprobs)} logprobs for {len(answer.output_ids)} tokens, or of other tokens"
        )
    length = len(answer.output_ids)
    if adapter is not None:
        spans: Spans = ((adapter, length),) if length else ()
    else:
        spans = to_spans(meta.weight_versions, length)
    return Completion(
        completion_tokens=np.array(answer.output_ids, np.int32),
        behavior_logprobs=np.array([np.nan if value is None else value for value, _, _ in logprobs], np.float32),
        spans=spans if in_flight is None else backdate(spans, in_flight),
        finish_reason=_finish_reason(meta.finish_reason, stops, aborted),
    )


def to_spans(spans: Sequence[Span], length: int) -> Spans:
    """Which version sampled how many tokens, as SGLang counts them.

    Raises:
        ForeignWeights: a version is not one of ours.
        EngineFailure: they do not cover the tokens.
    """
    counts: dict[Version, int] = {}
    begun = 0
    for span in spans:
        version, end = parse_version(span.version), min(span.end, length)
        if end > begun:
            counts[version] = counts.get(version, 0) + end - begun
            begun = end
    if begun != length:
        raise EngineFailure(f"SGLang names the versions of {begun} tokens of {length}")
    return tuple(counts.items())


def backdate(spans: Spans, asked: Version) -> Spans:
    """Give the first token after each change of version to the version before.

    SGLang's overlap scheduler pauses in place with a step under way: the token of that step is sampled by the old
    weights, comes after the exchange, and is counted to the new ones. Of a sample that had no token yet SGLang does not
    say whether its first one was in that step or came later; it is given to the version that sampled when it was asked
    for. So a token may be named too old a version, never too new a one: staleness is not understated.

    Args:
        spans: as SGLang counts.
        asked: the version that sampled when the request was made.
    """
    ends = itertools.accumulate(count for _, count in spans)
    length = sum(count for _, count in spans)
    counts: dict[Version, int] = {}
    begun = 0
    for version, end in [(asked, 0), *zip((version for version, _ in spans), ends, strict=True)]:
        end = min(end + 1, length)
        if end > begun:
            counts[version] = counts.get(version, 0) + end - begun
            begun = end
    return tuple(counts.items())


def parse_version(label: str) -> Version:
    """Read what `str(Version)` wrote.

    Raises:
        ForeignWeights: somebody else has named them.
    """
    incarnation, _, policy_version = label.partition(".")
    if not (incarnation.isdecimal() and policy_version.isdecimal()):
        raise ForeignWeights(f"SGLang sampled with weights called {label!r}, which this server never loaded")
    return Version(int(incarnation), int(policy_version))


def _finish_reason(finish: Finish, stops: Sequence[int], aborted: bool) -> FinishReason:
    if finish.type == "length":
        return FinishReason.LENGTH
    if finish.type == "abort":
        if not aborted:
            raise EngineFailure(f"SGLang gave a sample up: {finish.message or 'without a reason'}")
        return FinishReason.ABORT
    if finish.matched not in stops:
        raise EngineFailure(
            f"SGLang ended a completion with token {finish.matched}, the lease has the stop tokens {list(stops)}: the"
            " model directories of server and learner name different end-of-sequence tokens"
        )
    return FinishReason.STOP
