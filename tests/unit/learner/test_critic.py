"""Training with a critic: whole steps against a trainer written out, restarts, and what must not happen."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from learner.batch import Batch
from learner.config import LearnerConfig
from learner.model.export import unique_tensors
from learner.model.packing import StepTokens, collect
from learner.trainer import Trainer
from protocol.errors import ConfigError
from tests.factories import make_batch, make_train_group

PPO: dict[str, Any] = {"advantage_estimator": "gae", "filter_zero_std": False, "max_grad_norm": 1e9}
GAMMA, LAM, CLIP, RATE, VALUE_RATE = 0.9, 0.8, 0.05, 3e-3, 1e-2
LENGTHS = [3, 6, 1, 4]


@pytest.fixture
def make(tiny_model_dir: Path):
    def make_trainer(*, checkpoint: Path | None = None, **options: Any) -> Trainer:
        rates = {"learning_rate": RATE, "value_learning_rate": VALUE_RATE}
        config = LearnerConfig(**{"model": str(tiny_model_dir), **PPO, **rates, **options})
        return Trainer(config, checkpoint=checkpoint)

    return make_trainer


def batch_of(step: int = 1, **fields: Any) -> Batch:
    groups = [
        make_train_group(
            ordinal=i, seed=step, prompt_tokens=[5, 6 + i], **{"lengths": LENGTHS, "temperature": 0.8, **fields}
        )
        for i in range(3)
    ]
    return make_batch(step=step, groups=groups)


def train(trainer: Trainer, steps: range) -> None:
    for step in steps:
        assert trainer.forward_backward(batch_of(step)).finite
        assert trainer.optimizer_step() == step


def all_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    models = {"policy": trainer._model, "critic": trainer._critic._model}
    return {f"{k}.{name}": t.clone() for k, model in models.items() for name, t in unique_tensors(model).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- against a trainer written out


def naive_tokens(model: Any, batch: Batch, *, head: Any = None) -> list[torch.Tensor]:
    """Per completion [length]: values where a head is given, else logprobs; float64."""
    found = []
    for entry in batch.groups:
        start = 0
        for length in entry.group.completion_lengths.tolist():
            tokens = torch.from_numpy(entry.group.completion_tokens[start : start + length]).long()
            start += length
            text = torch.cat([torch.from_numpy(entry.prompt_tokens).long(), tokens])[None, :]
            if head is not None:
                hidden = model.base_model(input_ids=text).last_hidden_state[0, len(entry.prompt_tokens) - 1 : -1]
                found.append((hidden @ head.weight[0] + head.bias[0]).double())
            else:
                logits = model(input_ids=text).logits[0, len(entry.prompt_tokens) - 1 : -1].double()
                found.append((logits / entry.group.temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0])
    return found


def naive_advantages(rewards: list[float], values: list[torch.Tensor]) -> list[torch.Tensor]:
    """GAE as it is usually written: backwards, one token after the other."""
    advantages = []
    for reward, of in zip(rewards, values, strict=True):
        last, next_value, found = 0.0, 0.0, []
        for t in reversed(range(len(of))):
            delta = (reward if t == len(of) - 1 else 0.0) + GAMMA * next_value - of[t].item()
            last = delta + GAMMA * LAM * last
            next_value = of[t].item()
            found.insert(0, last)
        advantages.append(torch.tensor(found, dtype=torch.float64))
    return advantages


def naive_step(policy: Any, critic: Any, batch: Batch, num_updates: int) -> list[tuple[float, float]]:
    """Train both for a step; return the losses (policy, value) of each update."""
    head = critic.get_output_embeddings()
    optimizers = [
        torch.optim.AdamW(policy.parameters(), lr=RATE, weight_decay=0.0),
        torch.optim.AdamW(critic.parameters(), lr=VALUE_RATE, weight_decay=0.0),
    ]
    rewards = [float(reward) for entry in batch.groups for reward in entry.group.rewards]
    behavior = torch.cat([torch.from_numpy(entry.group.behavior_logprobs) for entry in batch.groups]).double()
    with torch.no_grad():
        old_values = naive_tokens(critic, batch, head=head)
    raw = torch.cat(naive_advantages(rewards, old_values))
    old = torch.cat(old_values)
    returns, advantages = raw + old, (raw - raw.mean()) / raw.std(correction=0)
    losses = []
    for _ in range(num_updates):
        ratio = (torch.cat(naive_tokens(policy, batch)) - behavior).exp()
        loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
        values = torch.cat(naive_tokens(critic, batch, head=head))
        near = torch.minimum(torch.maximum(values, old - CLIP), old + CLIP)
        value_loss = torch.maximum((values - returns) ** 2, (near - returns) ** 2).mean() / 2
        for optimizer, of in zip(optimizers, (loss, value_loss), strict=True):
            optimizer.zero_grad()
            of.backward()
            optimizer.step()
        losses.append((loss.item(), value_loss.item()))
    return losses


@pytest.mark.parametrize(
    ("num_updates", "options"),
    [(1, {}), (3, {}), (1, {"loss_head": "recompute", "gradient_checkpointing": True}), (1, {"share_prefix": False})],
)
def test_a_step_equals_the_naive_one(make, num_updates, options):
    trainer = make(num_iterations=num_updates, gamma=GAMMA, lam=LAM, cliprange_value=CLIP, token_budget=12, **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (*trainer._parameters.values(), *trainer._critic._parameters.values()):
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    plain = make(num_iterations=num_updates, share_prefix=False)  # models that run as transformers made them
    for model, other in ((plain._model, trainer._model), (plain._critic._model, trainer._critic._model)):
        model.load_state_dict(other.state_dict())
    policy, critic = plain._model, plain._critic._model
    before = all_weights(trainer)
    result = trainer.forward_backward(batch_of())
    assert result.finite
    assert same(all_weights(trainer), before), "forward_backward changes no parameter"
    trainer.optimizer_step()

    losses = naive_step(policy, critic, batch_of(), num_updates)
    metrics = trainer.step_metrics
    assert metrics["loss"] == pytest.approx(sum(a for a, _ in losses) / num_updates, rel=1e-3, abs=1e-5)
    assert metrics["value_loss"] == pytest.approx(sum(b for _, b in losses) / num_updates, rel=1e-3)
    assert (metrics["value_clip_ratio"] > 0) == (num_updates > 1)
    for name, tensor in all_weights(trainer).items():
        kind, _, key = name.partition(".")
        expected = unique_tensors(policy if kind == "policy" else critic)[key]
        moved = (expected - before[name]).norm()
        # Adam divides by the root of the square: where a gradient is nearly 0, rounding decides its sign.
        assert (tensor - expected).norm() <= 0.02 * moved + 1e-6, name


def test_the_first_values_are_zero_and_the_first_returns_the_discounted_rewards(make):
    trainer = make(gamma=0.5, lam=0.3)
    result = trainer.forward_backward(batch_of(rewards=[1.0, 0.0, 1.0, 0.0]))
    assert result.metrics["value/mean"] == 0.0
    assert result.metrics["value/explained_variance"] == 0.0
    # V is 0, so A_t = (gamma lam)^(T - t) r: the mean of its square over the 14 tokens of a group, halved
    squares = sum(0.15 ** (2 * k) for length in (3, 1) for k in range(length)) / 14
    assert result.metrics["value_loss"] == pytest.approx(squares / 2, rel=1e-5)


def test_samples_show_a_completions_mean_advantage(make):
    """Whitened over the step: with the number of tokens as weights they sum to zero."""
    advantages = make().forward_backward(batch_of()).advantages
    assert sum(a * n for of_group in advantages for a, n in zip(of_group, LENGTHS, strict=True)) == pytest.approx(
        0.0, abs=1e-5
    )
    assert advantages[0][0] > 0 > advantages[0][1]


def test_a_penalty_in_the_reward_is_taken_off_where_it_arises(make):
    """One token of each completion is as unlikely as can be under the policy, not under the reference."""
    options = {"beta": 0.5, "kl_in": "reward", "lam": 1.0}
    trainer, free = make(**options), make(lam=1.0)
    with torch.no_grad():
        trainer._model.get_output_embeddings().weight.mul_(0.5)
        free._model.get_output_embeddings().weight.mul_(0.5)
    trainer.forward_backward(batch_of())
    free.forward_backward(batch_of())
    (update,) = trainer._plan(_step(batch_of()))
    (plain,) = free._plan(_step(batch_of()))
    kl, found, completion = update.tensors.kl_T, update.tensors.returns_T, update.tensors.completion_T
    assert kl.abs().max() > 0.1
    for n in completion.unique():
        here = completion == n
        after = kl[here].flip(0).cumsum(0).flip(0)  # V is 0 and lam 1: a return is what is still to come
        torch.testing.assert_close(found[here], plain.tensors.returns_T[here] - 0.5 * after)


def test_a_steps_reward_comes_with_its_last_token_or_the_one_before_that_trains(make):
    steps = np.array([1.0, np.nan, 2.0, np.nan, 4.0, 9.0, 1.0], np.float32)
    mask = np.array([1, 1, 0, 1, 1, 0, 1], np.uint8)  # nobody has earned the 9
    group = make_train_group(rewards=[3.0, 4.0, 10.0], lengths=[3, 2, 2], step_rewards=steps, loss_mask=mask)
    trainer = make(gamma=0.5, lam=1.0)
    batch = make_batch(groups=[group])
    trainer.forward_backward(batch)
    (update,) = trainer._plan(_step(batch))
    # V is 0 and lam 1: returns are the discounted rewards to come
    assert update.tensors.returns_T.tolist() == [1 + 0.5 * 2, 2, 0.5 * 4, 4, 1]


def test_one_completion_per_prompt_is_enough(make):
    batch = make_batch(groups=[make_train_group(ordinal=i, rewards=[float(i)], lengths=[4]) for i in range(3)])
    trainer = make(num_generations=1)
    assert trainer.forward_backward(batch).loss_tokens == 12
    trainer.optimizer_step()


def test_a_row_without_a_token_that_trains_has_no_values(make):
    """Once they had one, of the wrong shape."""
    trainer = make(token_budget=6)
    groups = [
        make_train_group(ordinal=i, lengths=[3, 3], rewards=[1.0, 0.0], loss_mask=np.full(6, i, np.uint8))
        for i in range(2)
    ]
    assert trainer.forward_backward(make_batch(groups=groups)).loss_tokens == 6


def test_equal_rewards_train(make):
    trainer = make()
    assert trainer.forward_backward(batch_of(rewards=[1.0] * 4)).finite
    before = all_weights(trainer)
    trainer.optimizer_step()
    after = all_weights(trainer)
    assert not torch.equal(before["critic.lm_head.weight"], after["critic.lm_head.weight"])


def test_both_learning_rates_follow_one_schedule(make):
    trainer = make(warmup_steps=4)
    rates = []
    for optimizer in (trainer._optimizer, trainer._critic._optimizer):
        step = optimizer.step
        optimizer.step = lambda o=optimizer, s=step: (rates.append(o.param_groups[0]["lr"]), s())
    train(trainer, range(1, 3))
    assert rates == pytest.approx([RATE / 4, VALUE_RATE / 4, RATE / 2, VALUE_RATE / 2])


# --- what is held, and what is not


def test_models_held(make, tiny_model_dir):
    trainer = make(beta=0.1)
    held = trainer.num_parameters
    hidden = trainer._model.config.hidden_size
    assert list(held) == ["policy", "critic", "reference"]
    assert held["policy"] == held["reference"]
    assert held["critic"] == held["policy"] + hidden + 1, "tied: the embedding stays, and a value head comes"
    without = Trainer(LearnerConfig(model=str(tiny_model_dir)))
    assert list(without.num_parameters) == ["policy"]
    assert without._critic is None
    assert "value_loss" not in without.forward_backward(batch_of()).metrics
    assert trainer.checkpoint_bytes == pytest.approx(2 * without.checkpoint_bytes, rel=0.01)


def test_published_weights_are_the_policys_alone(make, tiny_model_dir):
    assert make().specs() == Trainer(LearnerConfig(model=str(tiny_model_dir))).specs()


def test_a_value_loss_that_is_not_finite_skips_the_step_and_leaves_no_gradient(make):
    trainer = make()
    before = all_weights(trainer)
    with torch.no_grad():
        trainer._critic._model.get_output_embeddings().bias.fill_(math.nan)
    result = trainer.forward_backward(batch_of())
    assert not result.finite
    assert all(p.grad is None for p in (*trainer._parameters.values(), *trainer._critic._parameters.values()))
    with torch.no_grad():
        trainer._critic._model.get_output_embeddings().bias.zero_()
    assert same(all_weights(trainer), before)
    train(trainer, range(1, 2))


def test_a_critics_gradient_alone_that_is_not_finite_says_whose_it_is(make):
    trainer = make()
    next(iter(trainer._critic._parameters.values())).register_hook(lambda grad: grad * math.inf)
    result = trainer.forward_backward(batch_of())
    assert not result.finite
    assert result.reason.startswith("gradient norm of the value loss is ")
    assert all(p.grad is None for p in trainer._parameters.values())


# --- restarts


def test_a_resumed_run_goes_on_bit_by_bit(make, tmp_path):
    through = make(num_iterations=2)
    train(through, range(1, 3))
    through.save(tmp_path / "c")
    resumed = make(num_iterations=2, checkpoint=tmp_path / "c")
    assert same(all_weights(resumed), all_weights(through))
    for trainer in (through, resumed):
        train(trainer, range(3, 5))
    assert same(all_weights(resumed), all_weights(through))
    assert {path.suffix for path in (tmp_path / "c" / "critic").iterdir()} == {".safetensors"}


def test_a_checkpoint_without_a_critic_starts_one_of_its_policy(make, tmp_path, tiny_model_dir):
    grpo = Trainer(LearnerConfig(model=str(tiny_model_dir), learning_rate=RATE))
    train(grpo, range(1, 3))
    grpo.save(tmp_path)
    assert not (tmp_path / "critic").exists()
    critic = unique_tensors(make(checkpoint=tmp_path)._critic._model)
    policy = unique_tensors(grpo._model)
    assert all(torch.equal(critic[name], policy[name]) for name in policy if name in critic)
    assert not critic["lm_head.weight"].any()


@pytest.mark.parametrize("damage", ["other", "missing", "garbage"])
def test_a_critic_that_cannot_be_read_is_refused(make, tmp_path, damage):
    trainer = make()
    train(trainer, range(1, 2))
    trainer.save(tmp_path)
    path = tmp_path / "critic" / "critic.safetensors"
    if damage == "other":
        tensors = load_file(path)
        tensors["lm_head.weight"] = torch.zeros(1, 3)
        save_file(tensors, path)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"no safetensors")
    with pytest.raises(ConfigError, match=r"critic\.safetensors is no critic of this model"):
        make(checkpoint=tmp_path)


def _step(batch: Batch) -> StepTokens:
    return collect(batch.groups, mask_truncated_completions=False, min_scored=1)
