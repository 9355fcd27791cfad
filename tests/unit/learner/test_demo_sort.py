"""The sorting demonstration: its data, its tokenizer, its model of exactly 100,608 parameters, its warm-up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner.demo import sorting


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared model, after two supervised steps instead of fifty."""
    directory = tmp_path_factory.mktemp("sort") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorting, "WARMUP_LOSS", 10.0)
        sorting.prepare(directory)
    return directory


def test_rows_ask_for_letters_and_answer_with_them_in_order() -> None:
    (row,) = sorting.rows(["hgbaccdj"])
    assert row == {"prompt": "hgbaccdj>", "answer": "abccdghj"}


def test_other_shapes_keep_the_proportions() -> None:
    model = sorting.make_model(0, sorting.Shape(hidden_size=128, num_layers=4))
    assert sum(p.numel() for p in model.parameters()) == 791_552
    assert sum(p.numel() for p in sorting.make_model(0).parameters()) == sorting.NUM_PARAMETERS


def test_training_and_evaluation_prompts_are_disjoint_and_fixed() -> None:
    train, evaluation = sorting.split_prompts(num_train=500, num_eval=50, seed=1)
    other_train, same_evaluation = sorting.split_prompts(num_train=500, num_eval=50, seed=2)
    assert evaluation == same_evaluation
    assert train != other_train
    assert train == sorting.split_prompts(num_train=500, num_eval=50, seed=1)[0]
    assert not set(train) & set(evaluation)
    assert all(len(text) == sorting.LENGTH and set(text) <= set(sorting.LETTERS) for text in train + evaluation)


def test_an_evaluation_prompt_drawn_for_training_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {"evaluation": ["aaaaaaaa"], 0: ["aaaaaaaa", "abababab"]}
    monkeypatch.setattr(sorting, "draw_prompts", lambda count, seed: drawn[seed])
    assert sorting.split_prompts(num_train=2, num_eval=1, seed=0) == (["abababab"], ["aaaaaaaa"])


def test_the_model_has_exactly_the_stated_parameters() -> None:
    model = sorting.make_model(0)
    assert sum(parameter.numel() for parameter in model.parameters()) == sorting.NUM_PARAMETERS == 100_608


def test_the_same_seed_makes_the_same_model() -> None:
    first, second, other = (sorting.make_model(seed).lm_head.weight for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_one_letter_is_one_token_and_comes_back() -> None:
    tokenizer = sorting.make_tokenizer()
    ids = tokenizer("jihgfedcba>").input_ids
    assert ids == [14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4]
    assert tokenizer.decode(ids) == "jihgfedcba>"
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "jihgfedcba>"
    assert tokenizer("x").input_ids == [sorting.VOCABULARY.index(sorting.UNKNOWN)]


def test_only_the_answer_and_its_end_are_supervised() -> None:
    tokens, labels = sorting.supervised_batch(["bbaaaaaa", "jihgfedc"])
    assert tokens.shape == labels.shape == (2, 2 * sorting.LENGTH + 2)
    assert (labels[:, : sorting.LENGTH + 1] == sorting.IGNORED_LABEL).all()
    assert torch.equal(labels[:, sorting.LENGTH + 1 :], tokens[:, sorting.LENGTH + 1 :])
    assert (tokens[:, -1] == sorting.VOCABULARY.index(sorting.EOS)).all()
    decoded = sorting.make_tokenizer().decode(tokens[0])
    assert decoded == "bbaaaaaa>aaaaaabb<eos>"


def test_two_steps_of_warm_up_lower_the_loss() -> None:
    model = sorting.make_model(0)
    losses = sorting.warm_up(model, seed=0, max_steps=3)
    assert len(losses) == 3
    assert losses[0] == pytest.approx(2.7, abs=0.15), "an untrained model guesses among 15 tokens: ln 15"
    assert losses[2] < losses[0] - 0.1


def test_the_warm_up_ends_at_its_loss_without_a_further_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorting, "WARMUP_LOSS", 10.0)
    model = sorting.make_model(0)
    assert len(sorting.warm_up(model, seed=0)) == 1
    assert torch.equal(model.lm_head.weight, sorting.make_model(0).lm_head.weight)


def test_the_prepared_directory_is_a_plain_hugging_face_model(model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 1
    assert tokenizer.pad_token_id == 0
    assert model.config.vocab_size == len(tokenizer) == len(sorting.VOCABULARY)
    assert tokenizer("ab>").input_ids == [5, 6, 4]


def test_preparing_again_changes_nothing(model_dir: Path) -> None:
    before = (model_dir / "model.safetensors").stat().st_mtime_ns
    sorting.prepare(model_dir)
    assert (model_dir / "model.safetensors").stat().st_mtime_ns == before
    assert [file.name for file in model_dir.parent.iterdir()] == ["model"], "nothing half-built is left"


def test_a_failed_preparation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("full disk")

    monkeypatch.setattr(sorting, "warm_up", fail)
    with pytest.raises(RuntimeError, match="full disk"):
        sorting.prepare(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
