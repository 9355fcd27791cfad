"""Steps of several updates, references that move, coefficients that adapt: what the trainer makes of an objective."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from learner.batch import Batch
from learner.config import LearnerConfig
from learner.model.export import unique_tensors
from learner.trainer import Trainer
from protocol.errors import ConfigError
from protocol.messages import FinishReason
from tests.factories import make_batch, make_train_group
from tests.naive_objective import NaiveStep

NO = math.nan
FAR = {"learning_rate": 3e-3, "max_grad_norm": 1e9}
"""Steps large enough to tell one policy from the next."""


@pytest.fixture
def make(tiny_model_dir: Path):
    def make_trainer(*, checkpoint: Path | None = None, **options: Any) -> Trainer:
        return Trainer(LearnerConfig(**{"model": str(tiny_model_dir), **FAR, **options}), checkpoint=checkpoint)

    return make_trainer


def batch_of(step: int = 1, seed: int = 0, num_groups: int = 4) -> Batch:
    """Groups that have step rewards, too: what does not compare them trains on the rewards."""
    steps = np.array([NO, 0.5, 1.0, NO, 0.0, NO, 0.25, -0.5, NO, 1.0, NO, NO, 0.0, NO], np.float32)
    groups = [
        make_train_group(
            ordinal=i, lengths=[3, 6, 1, 4], seed=seed, prompt_tokens=[5, 6 + i], temperature=0.8,
            step_rewards=steps * (i + 1),
        )
        for i in range(num_groups)
    ]  # fmt: skip
    return make_batch(step=step, groups=groups)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in unique_tensors(trainer._model).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train(trainer: Trainer, steps: int, seed: int = 0) -> None:
    for step in range(steps):
        assert trainer.forward_backward(batch_of(step + 1, seed + step)).finite
        trainer.optimizer_step()


# --- against a trainer written out


def completion_values(model: Any, batch: Batch) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]:
    """Logprobs and entropies of every token, one whole forward pass per completion: [group][completion] -> [length]."""
    logprobs: list[list[torch.Tensor]] = []
    entropies: list[list[torch.Tensor]] = []
    for entry in batch.groups:
        group, start = entry.group, 0
        logprobs.append([])
        entropies.append([])
        for length in group.completion_lengths.tolist():
            tokens = torch.from_numpy(group.completion_tokens[start : start + length]).long()
            text = torch.cat([torch.from_numpy(entry.prompt_tokens).long(), tokens])
            logits = model(input_ids=text[None]).logits[0, len(entry.prompt_tokens) - 1 : -1].double()
            distribution = (logits / group.temperature).log_softmax(-1)
            logprobs[-1].append(distribution.gather(1, tokens[:, None])[:, 0])
            entropies[-1].append(-(distribution.exp() * distribution).sum(-1))
            start += length
    return logprobs, entropies


def disturb(model: Any) -> None:
    """Move the weights away from those of the reference."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def naive_training(model_dir: Path, batch: Batch, options: dict[str, Any], policy_version: int) -> Any:
    """One step: AdamW as torch has it, whole forward passes, the naive objective."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    with torch.no_grad():
        reference, _ = completion_values(model, batch)
    disturb(model)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=FAR["learning_rate"], weight_decay=0.0)
    with torch.no_grad():
        start, _ = completion_values(model, batch)
    groups = [entry.group for entry in batch.groups]
    losses = []
    for u in range(options.get("num_iterations", 1) * options.get("num_mini_batches", 1)):
        policy, entropy = completion_values(model, batch)
        values = {"policy": policy, "entropy": entropy, "start": start, "reference": reference}
        loss = NaiveStep(groups, options, policy_version, **values).losses()[u]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


OBJECTIVES: dict[str, dict[str, Any]] = {
    "dapo": {},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.01, "epsilon_high": 0.02},
    "gspo, proximal, sequence truncated": {
        "importance_sampling_level": "sequence", "anchor": "proximal", "importance_sampling_mode": "sequence_truncate",
    },
    "cispo with entropy": {"loss_type": "cispo", "epsilon_high": 5.0, "entropy_coef": 0.01},
    "process, soft overlong, mini-batches": {
        "advantage_estimator": "process", "soft_punish_cache": 4, "num_mini_batches": 2,
    },
    "sapo, rloo": {"loss_type": "sapo", "advantage_estimator": "rloo"},
    "dr_grpo, kl k2": {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.2, "kl_estimator": "k2"},
    "bnpo, batch, iterated, geometric mask": {
        "loss_type": "bnpo", "scale_rewards": "batch", "num_iterations": 2, "num_mini_batches": 2, "anchor": "proximal",
        "importance_sampling_mode": "geometric_mask", "importance_sampling_clip_max": 1.5,
    },
    "dual clip, mini-batches, MIS": {
        "delta": 2.0, "num_mini_batches": 3, "importance_sampling_mode": "sequence_mask",
        "importance_sampling_clip_max": 9.0,
    },
    "decoupled, iterated": {"anchor": "proximal", "num_iterations": 3, "epsilon": 0.05},
    "decoupled, loglinear": {
        "anchor": "proximal", "num_iterations": 2, "num_mini_batches": 2, "proximal_logprobs": "loglinear",
    },
    "kl in reward, M2PO": {
        "beta": 0.2, "kl_in": "reward", "importance_sampling_mode": "second_moment", "second_moment_threshold": 2.0,
        "advantage_estimator": "reinforce_plus_plus_baseline",
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "share_prefix"), [*((name, True) for name in OBJECTIVES), ("gspo", False)])
def test_a_step_equals_the_naive_one(make, tiny_model_dir, name, share_prefix):
    """The whole way: packed rows that cut groups, one backward pass per row, the optimizer, all updates."""
    options = OBJECTIVES[name]
    trainer = make(share_prefix=share_prefix, token_budget=12, max_completion_length=8, **options)
    trainer.policy_version = 3
    disturb(trainer._model)
    before = weights(trainer)
    result = trainer.forward_backward(batch_of(4))
    assert result.finite
    assert trainer.optimizer_step() == 4
    model, losses = naive_training(tiny_model_dir, batch_of(4), options | {"max_completion_length": 8}, 3)
    assert trainer.step_metrics["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4, abs=1e-5)
    assert trainer.step_metrics.get("num_updates", 1.0) == len(losses)
    moved = {key: (tensor - before[key]).norm() for key, tensor in unique_tensors(model).items()}
    assert max(moved.values()) > 1e-2
    for key, tensor in unique_tensors(model).items():
        # Adam divides by the root of the square: where a gradient is nearly 0, rounding decides its sign.
        assert (weights(trainer)[key] - tensor).norm() <= 0.02 * moved[key] + 1e-6, key


# --- several updates


def test_a_step_of_several_updates_is_one_version(make):
    trainer = make(num_iterations=2, num_mini_batches=2)
    rates = []
    step = trainer._optimizer.step
    trainer._optimizer.step = lambda: (rates.append(trainer._optimizer.param_groups[0]["lr"]), step())
    result = trainer.forward_backward(batch_of())
    before = weights(trainer)
    assert not rates, "forward_backward changes no parameter"
    assert result.metrics["num_updates"] == 1.0
    assert trainer.optimizer_step() == trainer.policy_version == 1
    assert rates == [FAR["learning_rate"]] * 4
    assert not same(weights(trainer), before)
    metrics = trainer.step_metrics
    assert metrics["num_updates"] == 4.0
    assert metrics["completion_tokens"] == 4 * 14
    assert metrics["ratio/max"] >= result.metrics["ratio/max"]
    assert all(math.isfinite(value) for value in metrics.values())


def test_fewer_groups_than_mini_batches_make_fewer_updates(make):
    trainer = make(num_mini_batches=4)
    trainer.forward_backward(batch_of(num_groups=2))
    trainer.optimizer_step()
    assert trainer.step_metrics["num_updates"] == 2.0


def test_the_proximal_policy_is_that_of_the_steps_start(make):
    trainer = make(anchor="proximal", num_iterations=2)
    assert trainer.forward_backward(batch_of()).metrics["ratio/max"] == pytest.approx(1.0, abs=1e-5)
    trainer.optimizer_step()
    assert trainer.step_metrics["ratio/max"] > 1.01, "by the second update the policy has left it"


def test_an_update_that_is_not_finite_is_left_out_and_the_others_made(make, caplog):
    trainer = make(num_mini_batches=4)
    control = make(num_mini_batches=4)
    batch = batch_of()
    batch.groups[2].group.behavior_logprobs[4] = float("nan")
    assert trainer.forward_backward(batch).finite, "the first mini-batch is"
    assert control.forward_backward(batch_of()).finite
    control._updates.pop(1)
    with caplog.at_level("WARNING", logger="learner.trainer"):
        assert trainer.optimizer_step() == control.optimizer_step() == 1
    assert "update_left_out" in caplog.text
    assert "loss is nan" in caplog.text
    assert trainer.step_metrics["num_updates"] == 3.0
    assert same(weights(trainer), weights(control))
    assert all(math.isfinite(value) for value in trainer.step_metrics.values())


def test_a_later_gradient_that_is_not_finite_never_reaches_the_weights(make):
    trainer = make(num_iterations=2)
    trainer.forward_backward(batch_of())
    hook = trainer._model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    trainer.optimizer_step()
    hook.remove()
    assert all(torch.isfinite(tensor).all() for tensor in weights(trainer).values())
    assert trainer.step_metrics["num_updates"] == 1.0
    assert all(parameter.grad is None for parameter in trainer._parameters.values())


def test_a_step_that_was_not_applied_leaves_no_update_behind(make):
    trainer, control = make(num_mini_batches=2), make(num_mini_batches=2)
    trainer.forward_backward(batch_of(seed=9))
    bad = batch_of()
    bad.groups[0].group.behavior_logprobs[:] = float("nan")
    assert not trainer.forward_backward(bad).finite
    for each in (trainer, control):
        each.forward_backward(batch_of())
        each.optimizer_step()
    assert same(weights(trainer), weights(control))


@pytest.mark.parametrize("options", [{"num_mini_batches": 2}, {"importance_sampling_level": "sequence"}], ids=str)
def test_the_token_budget_never_changes_the_result(make, options):
    norms = []
    for token_budget in (1, 9, 8192):
        trainer = make(token_budget=token_budget, **options)
        trainer.forward_backward(batch_of())
        trainer.optimizer_step()
        norms.append(trainer.step_metrics["grad_norm"])
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)


# --- metrics of objectives


def test_metrics_follow_the_objective(make):
    assert "cispo_clip_ratio" in make(loss_type="cispo", epsilon_high=5.0).forward_backward(batch_of()).metrics
    sapo = make(loss_type="sapo").forward_backward(batch_of()).metrics
    assert not [key for key in sapo if "clip" in key]
    mask = {"importance_sampling_mode": "token_mask", "importance_sampling_clip_max": 0.5}
    masked = make(**mask).forward_backward(batch_of()).metrics
    assert 0 < masked["importance_weight/masked"] < 1
    assert masked["importance_weight/mean"] == pytest.approx(1 - masked["importance_weight/masked"])


def test_truncated_completions_lose_reward_by_degrees(make):
    groups = [
        make_train_group(
            rewards=(1.0, 1.0, 0.0), lengths=(8, 4, 4), finish_reasons=[FinishReason.LENGTH] + [FinishReason.STOP] * 2
        )
    ]
    plain = make(scale_rewards="none").forward_backward(make_batch(groups=groups)).advantages[0]
    shaped = make(scale_rewards="none", max_completion_length=8, soft_punish_cache=2)
    punished = shaped.forward_backward(make_batch(groups=groups)).advantages[0]
    assert plain == pytest.approx((1 / 3, 1 / 3, -2 / 3))
    assert punished == pytest.approx((-1 / 3, 2 / 3, -1 / 3))


# --- the reference


def reference_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    assert trainer._reference is not None
    return {name: tensor.clone() for name, tensor in unique_tensors(trainer._reference._model).items()}


def test_a_frozen_reference_stays(make):
    trainer = make(beta=0.1)
    before = reference_of(trainer)
    train(trainer, 2)
    assert same(reference_of(trainer), before)


def test_a_reference_is_replaced_every_so_many_steps(make):
    trainer = make(beta=0.1, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=1.0)
    initial = reference_of(trainer)
    train(trainer, 1)
    assert same(reference_of(trainer), initial)
    train(trainer, 1)
    assert same(reference_of(trainer), weights(trainer))
    assert trainer.forward_backward(batch_of()).metrics["kl"] == pytest.approx(0.0, abs=1e-9)


def test_a_reference_may_be_a_moving_average(make):
    trainer = make(beta=0.1, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.25)
    expected = reference_of(trainer)
    for step in range(3):
        train(trainer, 1, seed=step)
        for name, tensor in weights(trainer).items():
            expected[name] = 0.75 * expected[name] + 0.25 * tensor
    for name, tensor in reference_of(trainer).items():
        torch.testing.assert_close(tensor, expected[name])


@pytest.mark.parametrize(
    "options",
    [
        {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.3},
        {"sync_ref_model": True, "ref_model_sync_steps": 2, "kl_in": "reward", "kl_target": 0.05, "kl_horizon": 16},
        {"num_iterations": 2, "anchor": "proximal", "kl_target": 0.05, "kl_horizon": 16},
    ],
    ids=str,
)
def test_a_resumed_run_goes_on_bit_by_bit(make, tmp_path, options):
    options = {"beta": 0.2, **options}
    straight = make(**options)
    train(straight, 3)
    straight.save(tmp_path / "checkpoint")
    resumed = make(checkpoint=tmp_path / "checkpoint", **options)
    assert same(reference_of(resumed), reference_of(straight))
    assert resumed._objective.beta == straight._objective.beta
    for trainer in (straight, resumed):
        train(trainer, 2, seed=7)
    assert straight.step_metrics == resumed.step_metrics
    assert same(weights(resumed), weights(straight))
    assert same(reference_of(resumed), reference_of(straight))


def test_what_a_moving_reference_adds_to_a_checkpoint(make, tmp_path):
    frozen, moving = make(beta=0.1), make(beta=0.1, sync_ref_model=True)
    frozen.save(tmp_path / "frozen")
    moving.save(tmp_path / "moving")
    assert not (tmp_path / "frozen" / "reference.safetensors").exists()
    saved = load_file(tmp_path / "moving" / "reference.safetensors")
    assert same(saved, reference_of(moving))
    size = (tmp_path / "moving" / "reference.safetensors").stat().st_size
    assert moving.checkpoint_bytes - frozen.checkpoint_bytes == pytest.approx(size, rel=0.1)


@pytest.mark.parametrize("damage", ["cut", "of another model"])
def test_a_damaged_reference_is_refused(make, tmp_path, damage):
    make(beta=0.1, sync_ref_model=True).save(tmp_path)
    path = tmp_path / "reference.safetensors"
    path.write_bytes(path.read_bytes()[:100] if damage == "cut" else (tmp_path / "optimizer.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"reference\.safetensors is no reference of this model"):
        make(beta=0.1, sync_ref_model=True, checkpoint=tmp_path)


def test_an_adapted_coefficient_rises_with_the_divergence(make, tmp_path):
    trainer = make(beta=0.1, kl_target=1e-4, kl_horizon=16)
    train(trainer, 1)
    assert trainer._objective.beta == pytest.approx(0.1 * 0.8), "no divergence before the first update"
    train(trainer, 1)
    assert trainer.step_metrics["beta"] == pytest.approx(0.08)
    assert trainer._objective.beta == pytest.approx(0.08 * 1.2)
    trainer.save(tmp_path)
    assert json.loads((tmp_path / "trainer.json").read_text())["beta"] == trainer._objective.beta
    adapting = {"kl_target": 1e-4, "kl_horizon": 16, "checkpoint": tmp_path}
    assert make(beta=0.1, **adapting)._objective.beta == trainer._objective.beta
    assert make(beta=0.5, **adapting)._objective.beta == 0.5, "a value that the user has changed wins"
    assert make(beta=0.1, checkpoint=tmp_path)._objective.beta == 0.1, "a fixed one is what it says"
