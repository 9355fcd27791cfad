"""A user's own loss and advantages: what is refused before a model is loaded, and that the rest is what trains."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from learner.config import LearnerConfig
from learner.trainer import Trainer
from learner.user_functions import load_advantages, load_loss
from protocol.errors import ConfigError
from tests.factories import make_batch, make_train_group

MINE = """
import torch

def reinforce(tokens):
    return -tokens.advantages_T * tokens.policy_logprobs_T

def sequence(tokens):
    assert tokens.completion_T.numel() in (1, 3, 4, 6), "completions come whole"
    return -tokens.advantages_T * (tokens.policy_logprobs_T - tokens.anchor_logprobs_T)

def scalar(tokens):
    return tokens.policy_logprobs_T.sum()

def a_list(tokens):
    return [0.0]

def constant(tokens):
    return tokens.advantages_T

def not_a_number(tokens):
    return tokens.policy_logprobs_T / 0 - torch.inf

def raises(tokens):
    return tokens.old_logprobs

def short_in_earnest(tokens):
    loss_T = -tokens.advantages_T * tokens.policy_logprobs_T
    return loss_T if len(loss_T) == 3 else loss_T[1:]

def gives_up(tokens):
    raise SystemExit(3)

def best_of(rewards_PG, scored_PG):
    assert torch.isfinite(rewards_PG).all()
    return rewards_PG - torch.where(scored_PG, rewards_PG, -torch.inf).amax(-1, keepdim=True)

def flat(rewards_PG, scored_PG):
    return rewards_PG.flatten()

ratio = 3
"""


@pytest.fixture(autouse=True)
def my_module(tmp_path: Path, monkeypatch):
    """Importable as `my_objectives`, from the working directory."""
    (tmp_path / "my_objectives.py").write_text(MINE)
    (tmp_path / "my_broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield
    for name in ("my_objectives", "my_broken"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("my_missing:loss", "importing my_missing raised ModuleNotFoundError"),
        ("my_broken:loss", "importing my_broken raised ZeroDivisionError"),
        ("my_objectives:reinforced", "reinforced is not there; my_objectives has reinforce, sequence"),
        ("my_objectives:ratio", "ratio is not callable"),
        ("my_objectives:scalar", r"the shape of its tokens, \[3\]; it returned \[\]"),
        ("my_objectives:a_list", r"\[3\]; it returned list"),
        ("my_objectives:constant", "does not depend on policy_logprobs_T"),
        ("my_objectives:not_a_number", "not finite"),
        ("my_objectives:gives_up", "fails on a small example: SystemExit: 3"),
        ("my_objectives:raises", "fails on a small example: AttributeError: .*old_logprobs"),
    ],
)
def test_a_loss_that_cannot_work_is_refused(path, says):
    with pytest.raises(ConfigError, match=f"loss_function {path}: .*{says}"):
        load_loss(path)


def test_advantages_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"advantage_function my_objectives:flat: .* \[2, 3\]; it returned \[6\]"):
        load_advantages("my_objectives:flat")


def test_they_are_refused_before_a_model_is_loaded():
    with pytest.raises(ConfigError, match="my_missing"):
        Trainer(LearnerConfig(model="/no/such/model", loss_function="my_missing:loss"))


def test_a_loss_that_is_wrong_only_in_earnest_is_an_error_that_names_it(tiny_model_dir):
    trainer = Trainer(LearnerConfig(model=str(tiny_model_dir), loss_function="my_objectives:short_in_earnest"))
    says = r"loss_function my_objectives:short_in_earnest: must .* shape of its tokens, \[14\]; it returned \[13\]"
    with pytest.raises(ConfigError, match=says):
        trainer.forward_backward(make_batch(groups=[make_train_group(lengths=[3, 6, 1, 4])]))


def test_a_loss_is_what_trains(tiny_model_dir):
    """On policy the gradient of REINFORCE is that of the clipped surrogate."""
    batch = make_batch(groups=[make_train_group(rewards=(1.0, 0.0, None, 0.5), lengths=(3, 5, 2, 1))])
    proximal = {"anchor": "proximal", "importance_sampling_mode": "none", "model": str(tiny_model_dir)}
    gradients = []
    for options in ({}, {"loss_function": "my_objectives:reinforce"}):
        trainer = Trainer(LearnerConfig(**proximal, **options))
        metrics = trainer.forward_backward(batch).metrics
        gradients.append(torch.cat([p.grad.flatten() for p in trainer._parameters.values()]))
        assert ("clip_ratio/low_mean" in metrics) == (not options)
    torch.testing.assert_close(*gradients)


def test_a_loss_gets_whole_completions(tiny_model_dir):
    config = LearnerConfig(model=str(tiny_model_dir), token_budget=1, loss_function="my_objectives:sequence")
    trainer = Trainer(config)
    assert not trainer._config.token_level
    assert trainer.forward_backward(make_batch(groups=[make_train_group(lengths=[3, 6, 1, 4])])).finite


def test_advantages_are_what_trains(tiny_model_dir):
    trainer = Trainer(LearnerConfig(model=str(tiny_model_dir), advantage_function="my_objectives:best_of"))
    group = make_train_group(rewards=(1.0, 0.0, None, 0.5))
    group.group.rewards[2] = float("nan")
    result = trainer.forward_backward(make_batch(groups=[group]))
    assert result.advantages == ((0.0, -1.0, 0.0, -0.5),)
