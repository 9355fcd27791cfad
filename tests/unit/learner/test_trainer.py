"""The trainer: what reaches the weights, what never does, and what a checkpoint brings back."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner.batch import Batch
from learner.config import LearnerConfig
from learner.model.export import unique_tensors
from learner.model.packing import collect
from learner.trainer import Trainer
from protocol.errors import ConfigError
from protocol.identity import tokenizer_digest
from protocol.weights.layout import Layout, MappedWeights
from protocol.weights.manifest import schema_digest
from tests.factories import make_batch, make_train_group
from tests.models import VOCAB_SIZE, build_tiny_model

ALWAYS = {
    "loss", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "ratio/mean",
    "ratio/max", "policy_kl", "effective_sample_size", "grad_norm", "num_micro_batches",
    "tokens_forwarded", "completion_tokens",
}  # fmt: skip


@pytest.fixture
def make(tiny_model_dir: Path):
    def make_trainer(*, checkpoint: Path | None = None, **options: Any) -> Trainer:
        return Trainer(LearnerConfig(**{"model": str(tiny_model_dir), **options}), checkpoint=checkpoint)

    return make_trainer


def batch_of(step: int = 1, seed: int = 0) -> Batch:
    groups = [make_train_group(ordinal=i, lengths=[3, 6, 1, 4], seed=seed, prompt_tokens=[5, 6 + i]) for i in range(2)]
    return make_batch(step=step, groups=groups)


def on_policy(trainer: Trainer, batch: Batch) -> Batch:
    """The same batch as if the trainer's weights had sampled it: every ratio is 1."""
    step = collect(batch.groups, mask_truncated_completions=False)
    logprobs = trainer._policy.step_logprobs(step, trainer._policy.pack(step, 8192)).numpy()
    start = 0
    for entry in batch.groups:
        size = entry.group.behavior_logprobs.size
        entry.group.behavior_logprobs[:] = logprobs[start : start + size]
        start += size
    return batch


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in unique_tensors(trainer._model).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train(trainer: Trainer, steps: int, seed: int = 0) -> None:
    for step in range(steps):
        assert trainer.forward_backward(batch_of(step + 1, seed + step)).finite
        trainer.optimizer_step()


# --- a step


def test_what_it_says_of_itself(make, tiny_model_dir):
    trainer = make(learning_rate=3e-4, warmup_steps=3)
    assert trainer.policy_version == 0
    assert trainer.vocab_size == VOCAB_SIZE
    assert trainer.learning_rate == pytest.approx(1e-4)
    assert trainer.tokenizer_digest == tokenizer_digest(AutoTokenizer.from_pretrained(tiny_model_dir).get_vocab())
    assert trainer.model_digest == schema_digest(trainer.specs())


def test_forward_backward_changes_no_weight(make):
    trainer = make()
    before = weights(trainer)
    result = trainer.forward_backward(batch_of())
    assert result.finite
    assert result.loss_tokens == 28
    assert result.metrics.keys() == ALWAYS
    assert all(isinstance(value, float) and math.isfinite(value) for value in result.metrics.values())
    assert same(weights(trainer), before)
    assert trainer.policy_version == 0


def test_metrics_count_tokens(make):
    metrics = make().forward_backward(batch_of()).metrics
    assert metrics["completion_tokens"] == 28
    assert metrics["tokens_forwarded"] == 2 * (2 + 2 + 5 + 0 + 3)
    assert metrics["num_micro_batches"] == 1
    metrics = make(share_prefix=False, token_budget=1).forward_backward(batch_of()).metrics
    assert metrics["tokens_forwarded"] == 2 * (2 * 4 + 2 + 5 + 0 + 3)
    assert metrics["num_micro_batches"] == 8


def test_further_metrics_come_with_their_options(make):
    metrics = make(beta=0.1, anchor="proximal").forward_backward(batch_of()).metrics
    assert metrics.keys() == ALWAYS | {"kl", "importance_weight/mean"}
    assert metrics["kl"] == 0.0  # the policy is still the reference
    assert metrics["ratio/mean"] == metrics["ratio/max"] == 1.0
    metrics = make(anchor="proximal", importance_sampling_mode="none").forward_backward(batch_of()).metrics
    assert metrics.keys() == ALWAYS


def test_on_policy_nothing_is_clipped(make):
    trainer = make()
    metrics = trainer.forward_backward(on_policy(trainer, batch_of())).metrics
    assert metrics["ratio/max"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["clip_ratio/region_mean"] == 0.0
    assert metrics["policy_kl"] == pytest.approx(0.0, abs=1e-9)


def test_a_step_makes_good_completions_likelier(make):
    trainer = make(learning_rate=1e-3)
    batch = on_policy(trainer, batch_of())
    before = trainer.forward_backward(batch).metrics["loss"]
    assert trainer.optimizer_step() == trainer.policy_version == 1
    assert trainer.forward_backward(batch).metrics["loss"] < before


def test_a_mean_of_tokens_is_not_a_mean_of_completions(make):
    losses = {kind: make(loss_type=kind).forward_backward(batch_of()).metrics["loss"] for kind in ("dapo", "grpo")}
    assert losses["dapo"] != pytest.approx(losses["grpo"], rel=1e-3)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_the_token_budget_never_changes_the_result(make, share_prefix):
    norms, gradients = [], []
    for token_budget in (1, 9, 8192):
        trainer = make(share_prefix=share_prefix, token_budget=token_budget, beta=0.1)
        norms.append(trainer.forward_backward(batch_of()).metrics["grad_norm"])
        gradients.append(torch.cat([p.grad.flatten() for p in trainer._parameters.values()]))
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_the_same_batch_gives_the_same_bits(make, autocast):
    first, second = make(autocast=autocast, beta=0.1), make(autocast=autocast, beta=0.1)
    train(first, 2)
    train(second, 2)
    assert same(weights(first), weights(second))


def test_gradients_do_not_pile_up_over_calls(make):
    trainer = make()
    norms = [trainer.forward_backward(batch_of()).metrics["grad_norm"] for _ in range(2)]
    assert norms[0] == norms[1]


def test_a_batch_with_nothing_to_train_is_skipped(make):
    trainer = make()
    result = trainer.forward_backward(make_batch(groups=[make_train_group(rewards=(None, None, 1.0))]))
    assert (result.finite, result.reason, result.loss_tokens) == (False, "no completion of the batch trains", 0)
    with pytest.raises(AssertionError, match="follows a finite forward_backward"):
        trainer.optimizer_step()


def test_equal_rewards_leave_the_weights_where_they_are(make):
    trainer = make(learning_rate=1e-2)
    before = weights(trainer)
    result = trainer.forward_backward(make_batch(groups=[make_train_group(rewards=(1.0, 1.0, 1.0))]))
    assert result.finite
    assert result.metrics["grad_norm"] == 0.0
    trainer.optimizer_step()
    assert same(weights(trainer), before)


# --- the optimizer


def test_gradients_are_clipped_to_the_norm(make, monkeypatch):
    trainer = make(max_grad_norm=0.01)
    before = trainer.forward_backward(batch_of()).metrics["grad_norm"]
    assert before > 0.1
    seen = []

    def step() -> None:
        seen.append(torch.nn.utils.get_total_norm([p.grad for p in trainer._parameters.values()]).item())

    monkeypatch.setattr(trainer._optimizer, "step", step)
    trainer.optimizer_step()
    assert seen == pytest.approx([0.01], rel=1e-4)


def test_small_gradients_are_left_alone(make, monkeypatch):
    trainer = make(max_grad_norm=1e6)
    norm = trainer.forward_backward(batch_of()).metrics["grad_norm"]
    monkeypatch.setattr(trainer._optimizer, "step", lambda: None)
    gradients = [p.grad for p in trainer._parameters.values()]
    trainer.optimizer_step()
    assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(norm)


def test_the_schedule_is_applied(make, monkeypatch):
    trainer = make(learning_rate=1e-3, warmup_steps=2, max_steps=4, lr_scheduler_type="linear")
    used = []
    for _ in range(4):
        announced = trainer.learning_rate
        trainer.forward_backward(batch_of())
        trainer.optimizer_step()
        used.append({group["lr"] for group in trainer._optimizer.param_groups})
        assert used[-1] == {announced}
    assert [rate for (rate,) in used] == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])


# --- what is not finite


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("behavior_logprobs", float("nan"), "loss is nan"),
        ("behavior_logprobs", -1e4, "loss is inf"),  # an infinite ratio against a negative advantage
        ("rewards", float("inf"), "loss is nan"),
    ],
)
def test_a_loss_that_is_not_finite_never_reaches_the_weights(make, field, value, reason):
    trainer = make(learning_rate=1.0)
    train(trainer, 1)
    before = weights(trainer)
    batch = batch_of(2)
    array = getattr(batch.groups[1].group, field)
    array[4 if field == "behavior_logprobs" else 1] = np.float32(value)
    result = trainer.forward_backward(batch)
    assert (result.finite, result.reason, result.metrics) == (False, reason, {})
    assert all(parameter.grad is None for parameter in trainer._parameters.values())
    with pytest.raises(AssertionError):
        trainer.optimizer_step()
    assert same(weights(trainer), before)
    assert trainer.policy_version == 1
    assert trainer.forward_backward(batch_of(2)).finite  # and the run goes on


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(make, value):
    trainer = make(learning_rate=1.0)
    before = weights(trainer)
    hook = trainer._model.model.norm.weight.register_hook(lambda gradient: gradient * value)
    result = trainer.forward_backward(batch_of())
    hook.remove()
    assert not result.finite
    assert result.reason == "gradient norm is nan" or result.reason == "gradient norm is inf"
    assert all(parameter.grad is None for parameter in trainer._parameters.values())
    assert same(weights(trainer), before)


def test_tokens_that_do_not_train_may_be_anything(make):
    """A tool wrote them: their logprobs are not the policy's, and may be infinitely unlikely."""
    mask = np.ones(14, np.uint8)
    mask[4] = 0
    group = make_train_group(lengths=[3, 6, 1, 4], loss_mask=mask)
    group.group.behavior_logprobs[4] = -np.inf
    assert make().forward_backward(make_batch(groups=[group])).finite


# --- publishing and saving


@pytest.mark.parametrize(
    ("options", "dtype"), [({}, "F32"), ({"autocast": "bfloat16"}, "BF16"), ({"publish_dtype": "bfloat16"}, "BF16")]
)
def test_published_in_the_published_dtype(make, options, dtype):
    assert {spec.dtype for spec in make(**options).specs()} == {dtype}


def test_weights_may_be_written_while_the_next_step_runs(make, tmp_path):
    trainer = make(learning_rate=1e-2)
    train(trainer, 1)
    expected = weights(trainer)
    with MappedWeights.create(tmp_path / "v1.safetensors", Layout(trainer.specs())) as mapped:
        writer = threading.Thread(target=trainer.write_weights, args=(mapped,))
        writer.start()
        result = trainer.forward_backward(batch_of(2))
        writer.join()
        written = {
            spec.name: torch.frombuffer(mapped.view(spec.name), dtype=torch.float32).view(spec.shape).clone()
            for spec in trainer.specs()
        }
    assert result.finite
    assert same(written, expected)
    alone = make(learning_rate=1e-2)
    train(alone, 1)
    assert alone.forward_backward(batch_of(2)).metrics == result.metrics


def test_a_checkpoint_is_a_plain_model_directory(make, tmp_path):
    trainer = make(learning_rate=1e-2, autocast="bfloat16")
    train(trainer, 2)
    trainer.save(tmp_path / "checkpoint")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert same({name: t.clone() for name, t in unique_tensors(model).items()}, weights(trainer))
    assert AutoTokenizer.from_pretrained(tmp_path / "checkpoint").get_vocab() == trainer.tokenizer.get_vocab()
    assert "headway" not in (tmp_path / "checkpoint" / "config.json").read_text()
    files = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} < files
    assert not any(name.endswith((".bin", ".pt", ".pkl", ".pth")) for name in files)


@pytest.mark.parametrize("options", [{}, {"autocast": "bfloat16"}, {"dtype": "bfloat16"}, {"beta": 0.2}])
def test_a_resumed_run_goes_on_bit_by_bit(make, tmp_path, options):
    options = {"learning_rate": 1e-2, "warmup_steps": 3, "weight_decay": 0.1, **options}
    straight = make(**options)
    train(straight, 2)
    torch.rand(5)  # nothing in a step draws numbers today; a checkpoint must not depend on that
    straight.save(tmp_path / "checkpoint")
    random_state = torch.get_rng_state()
    torch.manual_seed(99)
    resumed = make(checkpoint=tmp_path / "checkpoint", **options)
    assert resumed.policy_version == 2
    assert torch.equal(torch.get_rng_state(), random_state)
    assert same(weights(resumed), weights(straight))
    results = []
    for trainer in (straight, resumed):
        results.append(trainer.forward_backward(batch_of(3, seed=5)))
        trainer.optimizer_step()
    assert results[0] == results[1]
    assert same(weights(resumed), weights(straight))
    assert resumed.learning_rate == straight.learning_rate


def test_the_reference_stays_the_configured_model(make, tmp_path):
    trainer = make(beta=0.2, learning_rate=1e-2)
    train(trainer, 2)
    trainer.save(tmp_path)
    resumed = make(beta=0.2, learning_rate=1e-2, checkpoint=tmp_path)
    assert resumed.forward_backward(batch_of()).metrics["kl"] > 1e-4


@pytest.mark.parametrize("content", [None, "{", "{}", '{"policy_version": 3, "torch_rng_state": "?"}'])
def test_a_broken_checkpoint_is_refused(make, tmp_path, content):
    trainer = make()
    trainer.save(tmp_path)
    (tmp_path / "trainer.json").unlink()
    if content is not None:
        (tmp_path / "trainer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"has no usable trainer\.json"):
        make(checkpoint=tmp_path)


def test_the_state_file_is_small_json(make, tmp_path):
    make().save(tmp_path)
    state = json.loads((tmp_path / "trainer.json").read_text())
    assert state.keys() == {"policy_version", "torch_rng_state"}


def test_untied_models_train_and_publish_their_head(make, tmp_path):
    trainer = make(model=str(build_tiny_model(tmp_path / "m", tie_word_embeddings=False)), learning_rate=1e-2)
    before = weights(trainer)
    train(trainer, 1)
    assert not torch.equal(weights(trainer)["lm_head.weight"], before["lm_head.weight"])


def test_the_size_of_a_checkpoint_is_known_before_the_first(make, tmp_path):
    trainer = make()
    train(trainer, 1)
    trainer.save(tmp_path / "checkpoint")
    written = sum(
        (tmp_path / "checkpoint" / name).stat().st_size for name in ("model.safetensors", "optimizer.safetensors")
    )
    assert 0.8 * written < trainer.checkpoint_bytes < 1.2 * written


# --- canaries


def plain_logprobs(trainer: Trainer, tokens: np.ndarray) -> np.ndarray:
    """What the model itself says, without packing and chunks."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        logits = trainer._model(input_ids=ids).logits.float()
    return logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1).numpy()


@pytest.mark.parametrize("options", [{}, {"share_prefix": False}, {"token_budget": 5}], ids=str)
def test_canary_logprobs_are_those_of_the_model(make, options):
    trainer = make(**options)
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (7, 9)).astype(np.int32)
    logprobs = trainer.canary_logprobs(tokens)
    assert (logprobs.shape, logprobs.dtype) == ((7, 8), np.float32)
    plain = make(share_prefix=False)
    np.testing.assert_allclose(logprobs, plain_logprobs(plain, tokens), atol=1e-4)


def test_canaries_leave_gradients_and_weights_alone_and_follow_the_weights(make):
    trainer = make(learning_rate=1e-2)
    tokens = np.array([[5, 6, 7], [8, 9, 10]], np.int32)
    before = trainer.canary_logprobs(tokens)
    assert trainer.forward_backward(batch_of()).finite
    gradients = {name: p.grad.clone() for name, p in trainer._parameters.items() if p.grad is not None}
    assert np.array_equal(trainer.canary_logprobs(tokens), before)
    assert all(torch.equal(trainer._parameters[name].grad, gradient) for name, gradient in gradients.items())
    trainer.optimizer_step()
    assert np.abs(trainer.canary_logprobs(tokens) - before).max() > 1e-4


def test_canaries_of_two_tokens_are_the_shortest(make):
    logprobs = make().canary_logprobs(np.array([[5, 6]] * 3, np.int32))
    assert logprobs.shape == (3, 1)
    assert (logprobs < 0).all()


def test_canaries_are_computed_as_the_run_computes(make):
    tokens = np.arange(40, dtype=np.int32).reshape(2, 20) % VOCAB_SIZE
    exact, rounded = make().canary_logprobs(tokens), make(autocast="bfloat16").canary_logprobs(tokens)
    assert rounded.dtype == np.float32
    difference = np.abs(exact - rounded).max()
    assert 0 < difference < 0.25
