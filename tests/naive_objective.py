"""Every objective by the book, for comparison: padded [N, L] tensors, one row per completion, float64, no packing.

Nothing of learner/ is used in it: it reads the configuration's words and the groups as they came over the wire. N
completions that train, L the longest of them; `mask` says which places hold a token that trains.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from protocol.messages import FinishReason, Group

DEFAULTS: dict[str, Any] = {
    "loss_type": "dapo", "importance_sampling_level": "token", "epsilon": 0.2, "epsilon_high": None, "delta": None,
    "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "advantage_estimator": "grpo", "scale_rewards": None,
    "anchor": "behavior", "proximal_logprobs": "recompute", "importance_sampling_mode": None,
    "importance_sampling_clip_max": 2.0, "importance_sampling_clip_min": None, "second_moment_threshold": 0.04,
    "beta": 0.0, "kl_in": "loss", "kl_estimator": None, "use_bias_correction_kl": False, "entropy_coef": 0.0,
    "num_iterations": 1, "num_mini_batches": 1, "mask_truncated_completions": False, "soft_punish_cache": 0,
    "max_completion_length": 4096,
}  # fmt: skip

PerCompletion = Sequence[Sequence[Tensor]]
"""[group][completion] -> [length], all tokens of it."""


class NaiveStep:
    """A step's completions that train, padded.

    Args:
        groups: as received.
        options: the configuration's words that differ from their defaults.
        policy_version: of the weights at the start of the step.
        values: policy, start, reference, entropy: what the models say of each token. `start` are the logprobs at the
            start of the step.
    """

    def __init__(
        self, groups: Sequence[Group], options: dict[str, Any], policy_version: int, **values: PerCompletion
    ) -> None:
        self.o = DEFAULTS | options
        self.policy_version = policy_version
        self.rows: list[tuple[int, int, slice]] = []
        self.groups = groups
        for p, group in enumerate(groups):
            start, found = 0, []
            for i, length in enumerate(group.completion_lengths.tolist()):
                reason = group.finish_reasons[i]
                cut = self.o["mask_truncated_completions"] and reason == FinishReason.LENGTH
                if group.scored[i] and length and reason != FinishReason.ABORT and not cut:
                    found.append((p, i, slice(start, start + length)))
                start += length
            self.rows += found if len(found) >= 2 else []
        self.values = values
        self.mask = self.pad([self._loss_mask(p, where) for p, _, where in self.rows])
        self.behavior = self.pad([torch.from_numpy(groups[p].behavior_logprobs[w]) for p, _, w in self.rows])
        self.staleness = policy_version - self.pad([self._versions(p, w) for p, _, w in self.rows])

    def _loss_mask(self, p: int, where: slice) -> Tensor:
        mask = self.groups[p].loss_mask
        return torch.ones(where.stop - where.start) if mask is None else torch.from_numpy(mask[where])

    def _versions(self, p: int, where: slice) -> Tensor:
        group = self.groups[p]
        versions = [
            int(version[1])
            for version, length in zip(group.span_versions, group.span_lengths, strict=True)
            for _ in range(int(length))
        ]
        return torch.tensor(versions[where])

    @staticmethod
    def pad(rows: Sequence[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([row.double() for row in rows], batch_first=True)

    def given(self, name: str) -> Tensor:
        """[N, L] of what a model says."""
        return self.pad([self.values[name][p][i] for p, i, _ in self.rows])

    def advantages(self) -> list[float]:
        """[N]."""
        o = self.o
        k1 = ((self.given("start") - self.given("reference")) * self.mask).sum(1).detach() if o["beta"] else None
        rewards = []
        for n, (p, i, where) in enumerate(self.rows):
            reward, length = float(self.groups[p].rewards[i]), where.stop - where.start
            if o["soft_punish_cache"]:
                over = length - (o["max_completion_length"] - o["soft_punish_cache"])
                reward -= min(1.0, max(0.0, over / o["soft_punish_cache"]))
            if o["kl_in"] == "reward":
                reward -= o["beta"] * k1[n].item()
            rewards.append(reward)
        by_group = [[n for n, row in enumerate(self.rows) if row[0] == p] for p in range(len(self.groups))]
        advantages = [0.0] * len(rewards)
        estimator = o["advantage_estimator"]
        own = "none" if o["loss_type"] == "dr_grpo" else "group"
        scale = o["scale_rewards"] or {"grpo": own, "rloo": "none"}.get(estimator, "tokens")
        for members in filter(None, by_group):
            of_group = [rewards[n] for n in members]
            for n in members:
                if estimator == "rloo":
                    baseline = (sum(of_group) - rewards[n]) / (len(of_group) - 1)
                else:
                    baseline = sum(of_group) / len(of_group)
                divisor = {"group": statistics.stdev(of_group), "batch": statistics.stdev(rewards)}.get(scale)
                advantages[n] = (rewards[n] - baseline) / (1.0 if divisor is None else divisor + 1e-4)
        if estimator == "reinforce_plus_plus_baseline":
            centered = [rewards[n] - statistics.fmean(rewards[m] for m in g) for g in by_group for n in g]
            tokens = [
                a for a, count in zip(centered, self.mask.sum(1).tolist(), strict=True) for _ in range(int(count))
            ]
            mean, std = statistics.fmean(tokens), statistics.pstdev(tokens)
            advantages = [(a - mean) / (std + 1e-4) for a in centered]
        return advantages

    def token_advantages(self) -> Tensor:
        """[N, L]."""
        if self.o["advantage_estimator"] != "process":
            return torch.tensor(self.advantages(), dtype=torch.float64)[:, None].expand_as(self.mask)
        steps = [self._steps(p, i, where) for p, i, where in self.rows]
        scale = self.o["scale_rewards"] or ("none" if self.o["loss_type"] == "dr_grpo" else "group")
        found = torch.zeros_like(self.mask)
        for p in range(len(self.groups)):
            members = [n for n, row in enumerate(self.rows) if row[0] == p]
            of_group = [reward for n in members for _, reward in steps[n]]
            for n in members:
                for end, reward in steps[n]:
                    divisor = statistics.stdev(of_group) + 1e-4 if scale == "group" else 1.0
                    for t in range(end + 1):
                        found[n, t] += (reward - statistics.fmean(of_group)) / divisor
        return found

    def _steps(self, p: int, i: int, where: slice) -> list[tuple[int, float]]:
        """(last token, reward) of every step of a completion."""
        given, length = self.groups[p].step_rewards, where.stop - where.start
        steps = [(length - 1, float(self.groups[p].rewards[i]))]
        if given is not None:
            steps = [(t, reward) for t, reward in enumerate(given[where].tolist()) if reward == reward]
        if self.o["soft_punish_cache"]:
            over = length - (self.o["max_completion_length"] - self.o["soft_punish_cache"])
            steps[-1] = steps[-1][0], steps[-1][1] - min(1.0, max(0.0, over / self.o["soft_punish_cache"]))
        return steps

    def parts(self) -> list[list[int]]:
        """Rows of each mini-batch: consecutive groups that train, the first ones taking what does not divide."""
        trained = sorted({self.rows[n][0] for n in range(len(self.rows)) if self.mask[n].any()})
        size, rest = divmod(len(trained), min(self.o["num_mini_batches"], len(trained)))
        parts = []
        while trained:
            take = size + (rest > 0)
            rest -= rest > 0
            parts.append([n for n, row in enumerate(self.rows) if row[0] in trained[:take]])
            trained = trained[take:]
        return parts

    def losses(self) -> list[Tensor]:
        """The loss of every update of the step, as if the policy were the given one at each."""
        parts = self.parts()
        updates = parts * self.o["num_iterations"]
        return [self.loss(part, done / len(updates), len(parts)) for done, part in enumerate(updates)]

    def proximal(self, progress: float) -> Tensor:
        """The policy at the start of the step, or what stands for it."""
        o, policy = self.o, self.given("policy").detach()
        early = o["kl_in"] == "reward" or o["importance_sampling_mode"] == "second_moment"
        if early or (o["num_iterations"] * o["num_mini_batches"] > 1 and o["proximal_logprobs"] == "recompute"):
            return self.given("start")
        if progress == 0:
            return policy
        alpha = self.staleness / (self.staleness + progress)
        return (1 - alpha) * self.behavior + alpha * policy

    def weight(self, proximal: Tensor) -> Tensor | None:
        """[N, L]: the correction."""
        o = self.o
        mode = o["importance_sampling_mode"]
        if mode is None and o["anchor"] == "proximal":
            mode = "sequence_truncate" if o["importance_sampling_level"] == "sequence" else "token_truncate"
        if mode in (None, "none"):
            return None
        difference = (proximal - self.behavior) * self.mask
        if mode.startswith("sequence"):
            difference = difference.sum(1, keepdim=True).expand_as(difference)
        elif mode.startswith("geometric"):
            difference = (difference.sum(1, keepdim=True) / self.mask.sum(1, keepdim=True).clamp(min=1)).expand_as(
                difference
            )
        w = difference.exp()
        low, high = o["importance_sampling_clip_min"] or 0.0, o["importance_sampling_clip_max"]
        if mode.endswith("truncate"):
            return w.clamp(low, high)
        kept = (w >= low) & (w <= high)
        if mode == "second_moment":
            kept = self.mask > 0
            while kept.any() and difference[kept].square().mean() > o["second_moment_threshold"]:
                kept &= ~(kept & (difference.square() == difference[kept].square().max()))
        return kept.double() * (w if o["anchor"] == "proximal" else 1.0)

    def loss(self, part: list[int], progress: float, num_parts: int) -> Tensor:
        """The loss of an update."""
        o, mask = self.o, self.mask[part]
        policy = self.given("policy")[part]
        proximal = self.proximal(progress)
        weight = self.weight(proximal)
        weight = torch.ones_like(mask) if weight is None else weight[part]
        anchor = (proximal if o["anchor"] == "proximal" else self.behavior)[part]
        log_ratio = torch.where((mask > 0) & (weight > 0), policy - anchor, 0.0)
        tokens = mask.sum(1, keepdim=True)
        if o["importance_sampling_level"] == "sequence":
            log_ratio = (log_ratio.sum(1, keepdim=True) / tokens.clamp(min=1)).expand_as(log_ratio)
        rho = log_ratio.exp()
        a = self.token_advantages()[part]
        high = o["epsilon"] if o["epsilon_high"] is None else o["epsilon_high"]
        if o["loss_type"] == "cispo":
            gain = rho.clamp(max=high).detach() * a * policy
        elif o["loss_type"] == "sapo":
            tau = torch.where(a > 0, o["sapo_temperature_pos"], o["sapo_temperature_neg"]).double()
            gain = 4 / tau / (1 + torch.exp(-tau * (rho - 1))) * a
        else:
            unclipped = rho if o["delta"] is None else rho.clamp(max=o["delta"])
            clipped = rho.clamp(1 - o["epsilon"], 1 + high)
            gain = torch.where(unclipped * a < clipped * a, unclipped * a, clipped * a)
        gain = weight * gain
        if o["beta"] and o["kl_in"] == "loss":
            d = policy - self.given("reference")[part]
            kl = {"k1": d, "k2": d**2 / 2}.get(o["kl_estimator"], torch.exp(-d) - 1 + d)
            off_policy = torch.exp(policy - self.behavior[part]) if o["use_bias_correction_kl"] else 1.0
            gain = gain - o["beta"] * kl * off_policy
        gain = gain * mask
        if o["loss_type"] in ("grpo", "sapo"):
            of_group = [
                [n for n in range(len(part)) if self.rows[part[n]][0] == p and tokens[n] > 0] for p in range(99)
            ]
            means = [(gain[g].sum(1) / mask[g].sum(1)).mean() for g in of_group if g]
            value = torch.stack(means).mean()
        elif o["loss_type"] == "dr_grpo":
            value = gain.sum() / ((tokens > 0).sum() * o["max_completion_length"])
        elif o["loss_type"] == "bnpo":
            value = gain.sum() / mask.sum()
        else:
            value = gain.sum() / (self.mask.sum() / num_parts)
        return -value - o["entropy_coef"] * (self.given("entropy")[part] * mask).sum() / mask.sum()
