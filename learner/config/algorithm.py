"""The section of the objective: TRL's words, their defaults, and which of them do not go together.

README.md lists every objective with its equation's source and the names that others give it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from typing import Literal

from pydantic import Field, model_validator

from learner.config.section import Section
from protocol.settings import is_set, no_effect

CLIPPED = ("grpo", "bnpo", "dapo", "dr_grpo")
"""Loss types whose surrogate is the clipped one."""

CorrectionMode = Literal[
    "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_truncate",
    "geometric_mask", "second_moment",
]  # fmt: skip
RewardScale = Literal["group", "batch", "none"]

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_SCALES: dict[str, tuple[RewardScale, ...]] = {
    "grpo": ("group", "batch", "none"),
    "rloo": ("none",),
    "reinforce_plus_plus_baseline": ("batch",),
    "gae": ("batch",),
    "process": ("group", "none"),
}
"""What each estimator can be divided by; the first is its own."""


class AlgorithmOptions(Section):
    """GRPO and its kin."""

    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo"] = "dapo"
    """dapo: one global token count per step as denominator. bnpo: the update's token count. grpo: mean per completion,
    then over completions. dr_grpo: completions x max_completion_length. cispo: truncated weights instead of a clip,
    denominator of dapo. sapo: a smooth gate instead of a clip, denominator of grpo."""
    loss_function: str = ""
    """module:function in place of the clipped surrogate: LossTokens (learner/grpo/loss.py) -> loss of each token [T],
    to be minimized; loss_type says how it is averaged."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Whether the clipped ratio is each token's, or its completion's geometric mean (GSPO)."""
    epsilon: float = Field(0.2, gt=0, lt=1)
    """Lower clip range: ratios below 1 - epsilon are clipped."""
    epsilon_high: float | None = Field(None, gt=0)
    """Upper clip range; default is epsilon. DAPO: 0.28. With cispo the largest weight itself (ScaleRL: 5.0)."""
    delta: float | None = Field(None, gt=1)
    """Two-sided clipping: ratios count as at most delta, also where the advantage is negative. Above 1 + epsilon_high;
    default is no bound."""
    sapo_temperature_pos: float = Field(1.0, gt=0)
    """sapo, tokens of a positive advantage: the larger, the sooner the gradient fades off policy."""
    sapo_temperature_neg: float = Field(1.05, gt=0)
    """sapo, all other tokens."""
    advantage_estimator: Literal["grpo", "rloo", "reinforce_plus_plus_baseline", "gae", "process"] = "grpo"
    """Baseline of a reward: the mean of its group, that of the others in its group, or the group's mean and then
    whitened over all tokens of the step. gae is PPO: a critic, a second model of the size of the first with a value
    head, judges every token; groups are then only samples, and equal rewards train, too (filter_zero_std = false).
    process: each step's reward is compared with those of all steps of the group, and a token has the sum of the steps
    that end at or after it; for reward functions that return steps."""
    gamma: float = Field(1.0, gt=0, le=1)
    """gae: discount of the reward for every token between."""
    lam: float = Field(0.95, ge=0, le=1)
    """gae: 1 trusts rewards alone (unbiased), 0 the critic's next value (least variance)."""
    cliprange_value: float = Field(0.2, gt=0)
    """gae: a value moves at most so far in a step, in units of the reward."""
    value_learning_rate: float | None = Field(None, gt=0)
    """gae: of the critic's own AdamW, peak; schedule and everything else are the policy's. Default: learning_rate.
    (There is no vf_coef: AdamW's steps do not depend on the scale of a loss that has its parameters to itself.)"""
    advantage_function: str = ""
    """module:function in place of it: (rewards [P, G], scored [P, G]) -> advantages [P, G]."""
    scale_rewards: RewardScale | None = None
    """Advantages are divided by the deviation of the group's rewards, of the batch's, or not at all (mean-centered
    only). Default: group, with dr_grpo none; what the estimator defines for the others."""
    anchor: Literal["behavior", "proximal"] = "behavior"
    """What the clipped ratio is taken against: the policy that sampled, or the policy at the start of the step
    (decoupled PPO), then corrected by importance weights."""
    proximal_logprobs: Literal["recompute", "loglinear"] = "recompute"
    """Where a step has several updates: a forward pass at its start, or an estimate on the line between the policy that
    sampled and the policy as it is. With one update the policy itself is the proximal one, and neither is needed."""
    importance_sampling_mode: CorrectionMode | None = None
    """Weight tokens by proximal / behavior of the token, the completion (sequence) or its geometric mean: truncated, or
    masked where out of range; second_moment masks outliers alone. With the behavior anchor, which is weighted already,
    masks only. Default: truncate with the proximal anchor, none with the behavior anchor."""
    importance_sampling_clip_max: float = Field(2.0, gt=0)
    """Truncate to, or mask above. Geometric means are close to 1: verl masks above 1.001."""
    importance_sampling_clip_min: float | None = Field(None, ge=0)
    """Raise to, or mask below; default is no lower bound."""
    second_moment_threshold: float = Field(0.04, gt=0)
    """second_moment: bound of the mean squared log ratio of the tokens that stay."""
    beta: float = Field(0.0, ge=0)
    """Coefficient of the KL to the reference policy. 0 does without a reference model."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Penalty as a term of the loss, or taken off the reward (by the learner's logprobs at the step's start)."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """Default: k3 in the loss, k1 in the reward. k1 in the loss has a gradient of expectation 0: only together with
    use_bias_correction_kl."""
    use_bias_correction_kl: bool = False
    """Weight the KL in the loss by the ratio: unbiased off policy (DeepSeek-V3.2)."""
    kl_target: float | None = Field(None, gt=0)
    """Adapt beta, which is then its initial value, so that the KL per token nears this; default is a fixed beta."""
    kl_horizon: int = Field(10000, ge=1)
    """Completions over which an adapted beta changes by at most 20 percent."""
    sync_ref_model: bool = False
    """Move the reference towards the policy every ref_model_sync_steps; else it stays the initial model."""
    ref_model_sync_steps: int = Field(512, ge=1)
    """Steps between two moves. 1 with a small mixup is an exponential moving average."""
    ref_model_mixup_alpha: float = Field(0.6, gt=0, le=1)
    """reference = alpha x policy + (1 - alpha) x reference. 1 replaces it."""
    entropy_coef: float = Field(0.0, ge=0)
    """Coefficient of the entropy bonus: the mean entropy of a token's distribution, in nats."""
    num_iterations: int = Field(1, ge=1)
    """Passes over a step's groups; each makes num_mini_batches updates."""
    num_mini_batches: int = Field(1, ge=1)
    """Parts that a step's groups are cut into; each makes one update."""
    filter_zero_std: bool = True
    """Do not train groups whose rewards are all equal (they have no gradient); others are leased in their place."""
    max_refill_ratio: int = Field(4, ge=0)
    """Filtered groups per trained one that are replaced in a step; beyond it the step trains what it has, or is
    skipped."""
    mask_truncated_completions: bool = False
    """Leave completions that hit max_completion_length out, as if unscored: of the loss, and of what the others are
    compared with."""
    soft_punish_cache: int = Field(0, ge=0)
    """Soft overlong punishment: over the last so many tokens before max_completion_length the reward falls by up to 1.
    0 for none. DAPO: a fifth of max_completion_length."""
    max_skipped_steps: int = Field(5, ge=1)
    """Skipped steps in a row (non-finite loss, nothing left after filtering) that stop the run."""

    @model_validator(mode="after")
    def _check_objective(self) -> AlgorithmOptions:
        wrong = chain(
            self._wrong_surrogate(),
            self._wrong_advantages(),
            self._wrong_correction(),
            self._wrong_kl(),
            self._unread(),
        )
        if reason := next(wrong, ""):
            raise ValueError(reason)
        return self

    @property
    def clip_high(self) -> float:
        """epsilon_high, or epsilon."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def reward_scale(self) -> RewardScale:
        """scale_rewards, or what the loss and the estimator define."""
        by_group = self.advantage_estimator in ("grpo", "process")
        if self.scale_rewards is None and self.loss_type == "dr_grpo" and by_group:
            return "none"
        return self.scale_rewards or _SCALES[self.advantage_estimator][0]

    @property
    def correction(self) -> CorrectionMode:
        """importance_sampling_mode, or what goes with the anchor and the level."""
        if self.importance_sampling_mode is not None:
            return self.importance_sampling_mode
        if self.anchor == "behavior":
            return "none"
        return "token_truncate" if self.importance_sampling_level == "token" else "sequence_truncate"

    @property
    def kl_kind(self) -> Literal["k1", "k2", "k3"]:
        """kl_estimator, or what goes with kl_in."""
        return self.kl_estimator or ("k3" if self.kl_in == "loss" else "k1")

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates between two policy versions."""
        return self.num_iterations * self.num_mini_batches

    @property
    def has_critic(self) -> bool:
        """Whether a second model is trained beside the policy."""
        return self.advantage_estimator == "gae"

    @property
    def compares_steps(self) -> bool:
        """Whether the rewards of steps are compared, not those of completions."""
        return self.advantage_estimator == "process"

    @property
    def min_scored(self) -> int:
        """Completions of a group that must have a reward for any to train: one compares with nothing but a critic."""
        return 1 if self.has_critic else 2

    @property
    def uses_proximal(self) -> bool:
        """Whether the loss looks at the policy at the start of the step."""
        return self.anchor == "proximal" or self.correction != "none"

    @property
    def needs_proximal(self) -> bool:
        """Whether its logprobs are needed before the first update, in a forward pass of their own."""
        all_tokens_first = self.kl_in == "reward" or self.correction == "second_moment"
        moves_on = self.updates_per_step > 1 and self.proximal_logprobs == "recompute"
        return all_tokens_first or (self.uses_proximal and moves_on)

    @property
    def token_level(self) -> bool:
        """Whether the loss is a sum over tokens, each term of which depends on that token's logprob alone."""
        whole_weights = self.correction.startswith(("sequence_", "geometric_")) and not self.needs_proximal
        whole_ratio = self.importance_sampling_level == "sequence"
        return not (whole_ratio or whole_weights or self.loss_function or self.entropy_coef)

    def _wrong_surrogate(self) -> Iterator[str]:
        """Say what does not go together in S and rho."""
        if self.loss_type == "cispo" and self.epsilon_high is None:
            yield "loss_type cispo truncates the ratio at epsilon_high itself: set it, it has no default (ScaleRL: 5.0)"
        if self.delta is not None and self.loss_type not in CLIPPED:
            yield f"delta bounds a clipped loss ({', '.join(CLIPPED)}), and loss_type {self.loss_type} has no clip"
        if self.delta is not None and self.delta <= 1 + self.clip_high:
            yield f"delta {self.delta} must be above 1 + epsilon_high, {1 + self.clip_high:g}: else nothing is clipped"
        own_ratio = self.delta is not None or self.importance_sampling_level == "sequence"
        if self.loss_function and (self.loss_type not in CLIPPED or own_ratio):
            yield (
                "loss_function takes the place of the surrogate and its ratio: with it loss_type is only how tokens are"
                f" averaged ({', '.join(CLIPPED)}), and delta and importance_sampling_level have no meaning"
            )
        if self.proximal_logprobs == "loglinear" and (self.anchor == "behavior" or self.updates_per_step == 1):
            yield (
                "proximal_logprobs loglinear saves a forward pass that only anchor proximal with several updates per"
                " step (num_iterations, num_mini_batches) would make: leave it out"
            )

    def _wrong_advantages(self) -> Iterator[str]:
        """Say what does not go together in A."""
        allowed = _SCALES[self.advantage_estimator]
        if self.reward_scale not in allowed:
            yield (
                f"scale_rewards {self.scale_rewards} with advantage_estimator {self.advantage_estimator}: it is defined"
                f" with {' or '.join(allowed)}; leave scale_rewards out, or use advantage_estimator grpo"
            )
        if self.advantage_function and (self.advantage_estimator != "grpo" or self.scale_rewards is not None):
            yield "advantage_function takes the place of advantage_estimator and scale_rewards: leave those out"
        if (self.has_critic or self.compares_steps) and self.importance_sampling_level == "sequence":
            yield (
                f"importance_sampling_level sequence with advantage_estimator {self.advantage_estimator}: a"
                " completion's ratio goes with a completion's advantage, and there is one for each token; use"
                " importance_sampling_level token"
            )
        yield from self._wrong_critic()
        for key in ("loss_function", "advantage_function"):
            path = getattr(self, key)
            if path and not _IMPORT_PATH.fullmatch(path):
                yield f"{key} {path!r} must be module:function, such as my_package.objectives:my_function"

    def _wrong_critic(self) -> Iterator[str]:
        """Say what does not go together with a critic, or only with one."""
        if self.has_critic and self.filter_zero_std:
            yield (
                "advantage_estimator gae with filter_zero_std: against a critic, equal rewards have a gradient, too,"
                " and without them it would learn wrong values; set filter_zero_std false"
            )
        if not self.has_critic:
            for key in ("gamma", "lam", "cliprange_value", "value_learning_rate"):
                if is_set(self, key):
                    yield f"{key} without a critic has no meaning: use advantage_estimator gae, or leave it out"

    def _wrong_correction(self) -> Iterator[str]:
        """Say what does not go together in c."""
        mode = self.correction
        if self.anchor == "behavior" and mode.endswith("_truncate"):
            yield (
                f"importance_sampling_mode {mode} with anchor behavior: the ratio is taken against the policy that"
                " sampled, so there is nothing left to weigh; use anchor proximal, a mask (token_mask, sequence_mask,"
                " geometric_mask, second_moment) or none"
            )
        if self.importance_sampling_level == "sequence" and (mode.startswith("token_") or mode == "second_moment"):
            yield (
                f"importance_sampling_mode {mode} with importance_sampling_level sequence: a completion's ratio cannot"
                " be corrected token by token; use sequence_truncate, sequence_mask, geometric_truncate, geometric_mask"
                " or none"
            )
        if mode == "second_moment" and self.proximal_logprobs == "loglinear":
            yield "importance_sampling_mode second_moment needs all logprobs first: use proximal_logprobs recompute"
        lowest = self.importance_sampling_clip_min
        if lowest is not None and lowest >= self.importance_sampling_clip_max:
            yield (
                f"importance_sampling_clip_min {lowest} must be below importance_sampling_clip_max"
                f" {self.importance_sampling_clip_max}"
            )

    def _wrong_kl(self) -> Iterator[str]:
        """Say what does not go together in KL."""
        if self.beta and self.kl_in == "loss" and self.kl_kind == "k1" and not self.use_bias_correction_kl:
            yield (
                "kl_estimator k1 with kl_in loss: the expectation of its gradient is zero, so it would pull towards"
                " nothing; use k3, or k1 with kl_in reward, or add use_bias_correction_kl"
            )
        if self.kl_in == "reward" and self.kl_kind != "k1":
            yield f"kl_estimator {self.kl_estimator} with kl_in reward: only k1 sums over a completion; use k1"
        if self.kl_in == "reward" and self.compares_steps:
            yield (
                "kl_in reward with advantage_estimator process: a token's KL is no step to be compared with others; use"
                " kl_in loss, as DeepSeekMath does"
            )
        if self.kl_in == "reward" and self.use_bias_correction_kl:
            yield "use_bias_correction_kl is for the KL in the loss: leave it out, or use kl_in loss"
        if self.kl_in == "reward" and self.proximal_logprobs == "loglinear":
            yield "kl_in reward needs all logprobs first: use proximal_logprobs recompute"
        if self.beta == 0:
            for key in ("sync_ref_model", "kl_target", "use_bias_correction_kl"):
                if getattr(self, key):
                    yield f"{key} without a reference policy: set beta above 0, or leave it out"
            if self.kl_in == "reward":
                yield "kl_in reward with beta 0 takes nothing off: set beta above 0, or leave it out"

    def _unread(self) -> Iterator[str]:
        """Say which words are set that nothing reads."""
        clips = self.loss_type in CLIPPED and not self.loss_function
        ranges = self.correction not in ("none", "second_moment")
        bounds = ("importance_sampling_clip_max", "importance_sampling_clip_min")
        moves = ("ref_model_sync_steps", "ref_model_mixup_alpha")
        smooth = ("sapo_temperature_pos", "sapo_temperature_neg")
        for is_read, keys, needs in (
            (clips, ("epsilon",), f"a clipped loss_type ({', '.join(CLIPPED)}) without loss_function"),
            (clips or self.loss_type == "cispo", ("epsilon_high",), "a loss_type that clips, or cispo"),
            (self.loss_type == "sapo", smooth, "loss_type sapo"),
            (ranges, bounds, "an importance_sampling_mode that truncates or masks by a range"),
            (
                self.correction == "second_moment",
                ("second_moment_threshold",),
                "importance_sampling_mode second_moment",
            ),
            (self.beta > 0, ("kl_estimator",), "beta above 0"),
            (self.kl_target is not None, ("kl_horizon",), "kl_target"),
            (self.sync_ref_model, moves, "sync_ref_model"),
        ):
            if not is_read:
                yield from no_effect(self, keys, needs)
