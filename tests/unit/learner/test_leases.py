"""A lease says everything: tokens, sampling, seed, row, and the oldest weights allowed."""

from __future__ import annotations

import json

import numpy as np

from learner.config import LearnerConfig
from learner.leases import RunIdentity, eval_lease, prompt_text, train_lease
from learner.ledger import Entry
from learner.prompts import PromptRow
from protocol.identity import group_id, group_seed
from protocol.messages import Purpose, Sampling
from protocol.versions import Version

IDENTITY = RunIdentity(
    run_id="run", incarnation=2, vocab_size=100, model_digest="m", tokenizer_digest="t", stop_token_ids=(1, 7)
)
CHAT = [{"role": "user", "content": "2 + 3?"}]


def make_config(**options) -> LearnerConfig:
    return LearnerConfig(
        model="m", dataset="d", num_generations=6, max_completion_length=20, temperature=0.7, seed=11, **options
    )


def make_row(ordinal: int = 4, prompt="2 + 3 =", columns=None) -> PromptRow:
    tokens = np.array([5, 6, 7], np.int32)
    return PromptRow(ordinal=ordinal, prompt_tokens=tokens, prompt=prompt, columns=columns or {"answer": "5"})


def test_a_training_lease_answers_every_question_of_the_server():
    entry = Entry(ordinal=4, sequence=3, attempt=2)
    lease = train_lease(make_config(), IDENTITY, make_row(), entry, min_version=Version(2, 9))
    assert lease.group_id == group_id("run", 4)
    assert (lease.ordinal, lease.sequence, lease.attempt, lease.purpose) == (4, 3, 2, Purpose.TRAIN)
    assert (lease.num_generations, lease.min_version) == (6, Version(2, 9))
    assert lease.sampling == Sampling(temperature=0.7, max_completion_length=20, stop_token_ids=(1, 7))
    assert not lease.sampling.truncates, "the whole softmax, or the logprobs are not the policy's"
    assert lease.prompt_tokens.tolist() == [5, 6, 7]
    assert json.loads(lease.row.tobytes()) == {"prompt": "2 + 3 =", "columns": {"answer": "5"}}


def test_a_retry_draws_the_same_numbers_and_another_prompt_others():
    config, row = make_config(), make_row()
    first, retry = (
        train_lease(config, IDENTITY, row, Entry(ordinal=4, sequence=3, attempt=attempt), min_version=Version(2, 0))
        for attempt in (1, 2)
    )
    other = train_lease(config, IDENTITY, row, Entry(ordinal=5, sequence=4), min_version=Version(2, 0))
    assert first.seed == retry.seed == group_seed(11, 4)
    assert first.group_id == retry.group_id
    assert other.seed != first.seed


def test_an_evaluation_lease_has_its_own_sampling():
    config = make_config(eval_dataset="e", eval_num_generations=2, eval_temperature=0.0, eval_max_completion_length=50)
    lease = eval_lease(config, IDENTITY, make_row(), "f" * 32, attempt=3, min_version=Version(2, 5))
    assert (lease.group_id, lease.purpose, lease.attempt) == ("f" * 32, Purpose.EVAL, 3)
    assert (lease.ordinal, lease.sequence) == (4, 4), "the row's index: it has no ordinal of the training prompts"
    assert (lease.num_generations, lease.min_version) == (2, Version(2, 5))
    assert lease.sampling == Sampling(temperature=0.0, max_completion_length=50, stop_token_ids=(1, 7))


def test_evaluation_is_as_long_as_training_unless_told():
    lease = eval_lease(make_config(), IDENTITY, make_row(), "f" * 32, attempt=1, min_version=Version(2, 5))
    assert lease.sampling.max_completion_length == 20


def test_evaluation_shares_no_seed_with_training():
    config = make_config()
    evaluation = {
        eval_lease(config, IDENTITY, make_row(o), "f" * 32, attempt=1, min_version=Version(2, 0)).seed
        for o in range(50)
    }
    training = {
        train_lease(config, IDENTITY, make_row(o), Entry(ordinal=o, sequence=o), min_version=Version(2, 0)).seed
        for o in range(50)
    }
    assert len(evaluation) == 50
    assert not evaluation & training


def test_a_prompt_as_text():
    assert prompt_text(make_row()) == "2 + 3 ="
    assert json.loads(prompt_text(make_row(prompt=CHAT))) == CHAT


def test_a_chat_travels_as_messages():
    lease = train_lease(
        make_config(), IDENTITY, make_row(prompt=CHAT), Entry(ordinal=4, sequence=4), min_version=Version(2, 0)
    )
    assert json.loads(lease.row.tobytes())["prompt"] == CHAT
