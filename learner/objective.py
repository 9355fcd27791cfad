"""The objective: from the configuration's words to one loss.

Binds what learner/grpo/ writes as equations, and knows what of a step they need. Used by the trainer:

    tensors = objective.prepare(step, parts, ...)                       once per step
    objective.loss(policy_logprobs_T, entropy_T, index, tensors[i])     for some tokens of an update at a time
    objective.metrics(record, tensors[i])                               of an update

A loss is a sum over tokens whose gradients add up over micro-batches. Where the configuration is `token_level`, a
token's term depends on that token's logprob alone, so that any tokens may come together; else whole completions must,
which the rows of a micro-batch hold (model/packing.py cuts groups, never completions).

Shapes: P groups, G generations, N completions that train, T tokens that train.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from learner.config import LearnerConfig
from learner.grpo.advantages import group_advantages, leave_one_out_advantages, reinforce_plus_plus_advantages
from learner.grpo.aggregation import Aggregation, token_weights
from learner.grpo.anchors import loglinear_proximal_logprobs
from learner.grpo.corrections import Level, importance_ratio, inside, second_moment_inside, truncated
from learner.grpo.diagnostics import cispo_metrics, clip_metrics, effective_sample_size, policy_kl, ratio_metrics
from learner.grpo.kl import adapted_beta, kl_in_reward, kl_k1, kl_k2, kl_k3
from learner.grpo.loss import LossTokens, Surrogate, TokenLoss, grpo_loss
from learner.grpo.surrogates import cispo_surrogate, clipped_surrogate, sapo_surrogate
from learner.model.packing import StepTokens
from learner.token_rewards import judge_steps, judge_tokens, overlong_punishment
from learner.user_functions import Loss, load_advantages, load_loss

AGGREGATIONS: dict[str, Aggregation] = {
    "grpo": "grpo", "bnpo": "bnpo", "dapo": "dapo", "dr_grpo": "dr_grpo", "cispo": "dapo", "sapo": "grpo",
}  # fmt: skip
"""By loss_type: the clipped losses are named after their mean, the others take one."""
LEVELS: dict[str, Level] = {
    "token_truncate": "token", "token_mask": "token", "sequence_truncate": "sequence", "sequence_mask": "sequence",
    "geometric_truncate": "geometric", "geometric_mask": "geometric",
}  # fmt: skip
"""By importance_sampling_mode. second_moment looks at all tokens of the step at once, and has none."""
KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTensors:
    """What the loss needs of an update, [T] each where nothing else is said: every token that trains, in order."""

    targets_T: Tensor
    temperature_T: Tensor
    behavior_logprobs_T: Tensor
    completion_T: Tensor
    staleness_T: Tensor
    """Versions between the weights that sampled the token and those at the start of the step."""
    advantages_PG: Tensor
    """[P, G], not flat, of the whole step: for samples/. Where each token has its own, means over a completion's."""
    advantages_T: Tensor
    weights_T: Tensor
    reference_logprobs_T: Tensor | None = None
    proximal_logprobs_T: Tensor | None = None
    """Under the weights at the start of the step; None where they are the policy's own, or estimated."""
    behavior_weight_T: Tensor | None = None
    """The correction, where it was computed from proximal_logprobs_T."""
    kl_T: Tensor | None = None
    """The KL that was taken off the rewards."""
    values_T: Tensor | None = None
    """What the critic expected at the start of the step."""
    returns_T: Tensor | None = None
    """What it should have: for its loss."""
    progress: float = 0.0
    """Updates of the step that come before this one / updates per step."""


@dataclass(slots=True)
class UpdateRecord:
    """What diagnostics need of an update, gathered row by row (detached)."""

    loss: float = 0.0
    index: list[Tensor] = field(default_factory=list)
    policy_logprobs: list[Tensor] = field(default_factory=list)
    entropy: list[Tensor] = field(default_factory=list)
    ratio: list[Tensor] = field(default_factory=list)
    behavior_weight: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)

    def add(self, index: Tensor, policy_logprobs_T: Tensor, entropy_T: Tensor, loss: TokenLoss) -> None:
        """Take in one row's tokens."""
        self.loss += loss.loss.item()
        self.index.append(index)
        self.policy_logprobs.append(policy_logprobs_T.detach())
        self.entropy.append(entropy_T.detach())
        self.ratio.append(loss.ratio_T.detach())
        if loss.behavior_weight_T is not None:
            self.behavior_weight.append(loss.behavior_weight_T)
        if loss.kl_T is not None:
            self.kl.append(loss.kl_T.detach())


class Objective:
    """What is optimized. Holds no tensors, and one number that changes: beta, where it is adapted.

    Args:
        config: the learner's.
        device: of the tensors that the loss works on.

    Raises:
        ConfigError: the user's own loss or advantage function cannot be used.
    """

    def __init__(self, config: LearnerConfig, device: torch.device) -> None:
        self._config = config
        self._device = device
        self._user_advantages = load_advantages(config.advantage_function) if config.advantage_function else None
        self._surrogate = _surrogate(config, load_loss(config.loss_function) if config.loss_function else None)
        self._level = LEVELS.get(config.correction)
        self._truncates = config.correction.endswith("_truncate")
        self.beta = config.beta

    def prepare(
        self,
        step: StepTokens,
        parts: Sequence[StepTokens],
        *,
        policy_version: int,
        proximal_logprobs_T: Tensor | None = None,
        reference_logprobs_T: Tensor | None = None,
        values_T: Tensor | None = None,
    ) -> list[StepTensors]:
        """Compute everything that the loss needs and that does not depend on the weights being trained.

        Args:
            step: all of it; advantages and corrections look at all its groups.
            parts: `mini_batches` of it.
            policy_version: of the weights at the start of the step.
            proximal_logprobs_T: [T] where the configuration `needs_proximal`.
            reference_logprobs_T: [T] where beta > 0.
            values_T: [T] where the configuration `has_critic`.

        Returns:
            The tensors of each part.
        """
        completion_T = torch.from_numpy(step.completion_T)
        behavior_logprobs_T = torch.from_numpy(step.behavior_logprobs_T).to(self._device)
        kl_T = None
        if self._config.kl_in == "reward":
            assert proximal_logprobs_T is not None, "needs_proximal"
            assert reference_logprobs_T is not None, "beta is above 0"
            kl_T, reference_logprobs_T = kl_k1(proximal_logprobs_T, reference_logprobs_T), None
        returns_T = None
        if values_T is not None:
            judged = judge_tokens(step, values_T, self._config, beta=self.beta, kl_T=kl_T)
            advantages_T, returns_T, advantages_PG = judged
        elif self._config.compares_steps:
            advantages_T, advantages_PG = judge_steps(step, self._config)
        else:
            advantages_PG = self._advantages(step, kl_T)
            advantages_T = advantages_PG[torch.from_numpy(step.trains_PG)][completion_T]
        behavior_weight_T = None
        if proximal_logprobs_T is not None and self._config.correction != "none":
            behavior_weight_T = self._correction(
                proximal_logprobs_T, behavior_logprobs_T, completion_T.to(self._device)
            )
        tensors = {
            "targets_T": torch.from_numpy(step.targets_T),
            "temperature_T": torch.from_numpy(step.temperature_T),
            "behavior_logprobs_T": behavior_logprobs_T,
            "completion_T": completion_T,
            "staleness_T": policy_version - torch.from_numpy(step.policy_version_T),
            "advantages_T": advantages_T,
            "weights_T": torch.cat([self._weights(part, step.completion_T.size / len(parts)) for part in parts]),
            "reference_logprobs_T": reference_logprobs_T,
            "proximal_logprobs_T": proximal_logprobs_T,
            "behavior_weight_T": behavior_weight_T,
            "kl_T": kl_T,
            "values_T": values_T,
            "returns_T": returns_T,
        }
        sizes = [part.completion_T.size for part in parts]
        pieces = {name: t.to(self._device).split(sizes) for name, t in tensors.items() if t is not None}
        return [
            StepTensors(advantages_PG=advantages_PG, **{name: piece[i] for name, piece in pieces.items()})
            for i in range(len(parts))
        ]

    def loss(self, policy_logprobs_T: Tensor, entropy_T: Tensor, index: Tensor, tensors: StepTensors) -> TokenLoss:
        """Compute the loss of some tokens of an update; the losses of all of them add up to the update's.

        Args:
            policy_logprobs_T: [T'] with gradient.
            entropy_T: [T'] with gradient where entropy_coef is set.
            index: [T'] int64, which of the update's T tokens they are. Any where `token_level`, else those of whole
                completions.
            tensors: from `prepare`.
        """
        config = self._config
        behavior_logprobs_T, completion_T = tensors.behavior_logprobs_T[index], tensors.completion_T[index]
        anchor_logprobs_T = proximal_logprobs_T = behavior_logprobs_T
        if config.uses_proximal:
            proximal_logprobs_T = self._proximal(policy_logprobs_T, index, tensors)
            anchor_logprobs_T = proximal_logprobs_T if config.anchor == "proximal" else behavior_logprobs_T
        behavior_weight_T: Tensor | None = None
        if tensors.behavior_weight_T is not None:
            behavior_weight_T = tensors.behavior_weight_T[index]
        elif config.correction != "none":
            behavior_weight_T = self._correction(proximal_logprobs_T, behavior_logprobs_T, completion_T)
        reference_logprobs_T = tensors.reference_logprobs_T
        tokens = LossTokens(
            policy_logprobs_T=policy_logprobs_T,
            entropy_T=entropy_T,
            anchor_logprobs_T=anchor_logprobs_T,
            behavior_logprobs_T=behavior_logprobs_T,
            advantages_T=tensors.advantages_T[index],
            weights_T=tensors.weights_T[index],
            completion_T=completion_T,
            behavior_weight_T=behavior_weight_T,
            reference_logprobs_T=None if reference_logprobs_T is None else reference_logprobs_T[index],
        )
        return grpo_loss(
            tokens,
            self._surrogate,
            importance_sampling_level=config.importance_sampling_level,
            kl=KL_ESTIMATORS[config.kl_kind],
            beta=self.beta,
            use_bias_correction_kl=config.use_bias_correction_kl,
            entropy_weight=config.entropy_coef / tensors.weights_T.numel(),
        )

    def metrics(self, record: UpdateRecord, tensors: StepTensors) -> dict[str, float]:
        """Describe an update of which every token is in the record. TRL's names."""
        config = self._config
        index = torch.cat(record.index)
        ratio_T, advantages_T = torch.cat(record.ratio), tensors.advantages_T[index]
        policy_logprobs_T, behavior_logprobs_T = torch.cat(record.policy_logprobs), tensors.behavior_logprobs_T[index]
        metrics = {"loss": record.loss, "entropy": torch.cat(record.entropy).mean().item()}
        if config.loss_type == "cispo":
            metrics |= cispo_metrics(ratio_T, advantages_T, epsilon_high=config.clip_high)
        elif config.loss_type != "sapo" and not config.loss_function:
            metrics |= clip_metrics(ratio_T, advantages_T, epsilon=config.epsilon, epsilon_high=config.clip_high)
        metrics |= ratio_metrics(ratio_T)
        metrics["policy_kl"] = policy_kl(policy_logprobs_T, behavior_logprobs_T)
        metrics["effective_sample_size"] = effective_sample_size(policy_logprobs_T, behavior_logprobs_T)
        kl = [tensors.kl_T] if tensors.kl_T is not None else record.kl
        if kl:
            metrics["kl"] = torch.cat(kl).mean().item()
        if config.kl_target is not None:
            metrics["beta"] = self.beta
        if record.behavior_weight:
            weight_T = torch.cat(record.behavior_weight)
            metrics["importance_weight/mean"] = weight_T.mean().item()
            if not self._truncates:
                metrics["importance_weight/masked"] = (weight_T == 0).float().mean().item()
        return metrics

    def adapt(self, kl: float, num_completions: int) -> None:
        """After a step: move beta towards what keeps the KL at its target; does nothing for a fixed beta."""
        config = self._config
        if config.kl_target is not None:
            self.beta = adapted_beta(
                self.beta, kl, target=config.kl_target, horizon=config.kl_horizon, num_completions=num_completions
            )

    def _advantages(self, step: StepTokens, kl_T: Tensor | None) -> Tensor:
        """Shape the rewards and compare them, [P, G]."""
        config = self._config
        rewards_PG, trains_PG = torch.from_numpy(step.rewards_PG), torch.from_numpy(step.trains_PG)
        completion_T = torch.from_numpy(step.completion_T)
        num_completions = step.lengths_N.size
        shaping_N = overlong_punishment(step, self._config)
        if kl_T is not None:
            shaping_N -= self.beta * kl_in_reward(kl_T, completion_T, num_completions)
        if shaping_N.any():
            rewards_PG = rewards_PG.clone()
            rewards_PG[trains_PG] += shaping_N.to(rewards_PG.dtype)
        if self._user_advantages is not None:
            rewards_PG = torch.where(trains_PG, rewards_PG, 0.0)
            return torch.where(trains_PG, self._user_advantages(rewards_PG, trains_PG), 0.0)
        match config.advantage_estimator:
            case "grpo":
                return group_advantages(rewards_PG, trains_PG, scale_rewards=config.reward_scale)
            case "rloo":
                return leave_one_out_advantages(rewards_PG, trains_PG)
            case "reinforce_plus_plus_baseline":
                tokens_PG = torch.zeros(trains_PG.shape, dtype=torch.int64)
                tokens_PG[trains_PG] = torch.bincount(completion_T, minlength=num_completions)
                return reinforce_plus_plus_advantages(rewards_PG, trains_PG, tokens_PG)
            case "gae" | "process":
                raise AssertionError("judged token by token")

    def _weights(self, part: StepTokens, tokens_per_update: float) -> Tensor:
        return token_weights(
            AGGREGATIONS[self._config.loss_type],
            torch.from_numpy(part.completion_T),
            torch.from_numpy(part.group_N),
            tokens_per_update=tokens_per_update,
            max_completion_length=self._config.max_completion_length,
        )

    def _proximal(self, policy_logprobs_T: Tensor, index: Tensor, tensors: StepTensors) -> Tensor:
        """The logprobs at the start of the step: computed then, the policy's own, or estimated between."""
        if tensors.proximal_logprobs_T is not None:
            return tensors.proximal_logprobs_T[index]
        return loglinear_proximal_logprobs(
            policy_logprobs_T,
            tensors.behavior_logprobs_T[index],
            tensors.staleness_T[index],
            progress=tensors.progress,
        )

    def _correction(self, proximal_logprobs_T: Tensor, behavior_logprobs_T: Tensor, completion_T: Tensor) -> Tensor:
        """The weight of each token; with the behavior anchor, whose ratio is weighted already, only 1 or 0."""
        config = self._config
        level = self._level or "token"
        ratio_T = importance_ratio(proximal_logprobs_T, behavior_logprobs_T, completion_T, level=level)
        lowest, highest = config.importance_sampling_clip_min, config.importance_sampling_clip_max
        if self._truncates:
            return truncated(ratio_T, clip_min=lowest, clip_max=highest)
        if self._level is None:
            threshold = config.second_moment_threshold
            kept_T = second_moment_inside(proximal_logprobs_T, behavior_logprobs_T, threshold=threshold)
        else:
            kept_T = inside(ratio_T, clip_min=lowest, clip_max=highest)
        weight_T = ratio_T if config.anchor == "proximal" else torch.ones_like(ratio_T)
        return weight_T.where(kept_T, 0.0)


def _surrogate(config: LearnerConfig, user_loss: Loss | None) -> Surrogate:
    """Bind S to its numbers."""
    if user_loss is not None:
        return lambda ratio_T, tokens: -user_loss(tokens)
    match config.loss_type:
        case "cispo":
            return lambda ratio_T, tokens: cispo_surrogate(
                tokens.policy_logprobs_T, ratio_T, tokens.advantages_T, epsilon_high=config.clip_high
            )
        case "sapo":
            return lambda ratio_T, tokens: sapo_surrogate(
                ratio_T,
                tokens.advantages_T,
                temperature_positive=config.sapo_temperature_pos,
                temperature_negative=config.sapo_temperature_neg,
            )
        case _:
            return lambda ratio_T, tokens: clipped_surrogate(
                ratio_T,
                tokens.advantages_T,
                epsilon=config.epsilon,
                epsilon_high=config.clip_high,
                delta=config.delta,
            )
