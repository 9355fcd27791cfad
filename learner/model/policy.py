"""A language model as a policy: rows in, logprobs of the tokens that train out.

The one place that calls the model. It decides between the shared prefix and the padded path, once, when it is made;
everything else (which rows there are, what a loss is) is decided by others. Used for the policy and the reference.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from learner.model.attention import ATTENTION, FLEX_ATTENTION, Packed, Prefix
from learner.model.context import Context
from learner.model.fused_head import TokenLossFunction, fused_token_loss
from learner.model.load import head_of
from learner.model.logprobs import token_logprobs
from learner.model.offloading import HostActivations
from learner.model.packing import MicroBatch, Rows, StepTokens, pack_padded, pack_shared

log = logging.getLogger(__name__)

PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""In logprobs, by dtype. A model that cannot share is off by far more: its completions would not see their prompt."""


class ForwardedPrompt:
    """A prompt forwarded once for completions in several rows, with one backward pass through it at the end."""

    def __init__(self, hidden_SH: Tensor, prefix: Prefix) -> None:
        self.prefix = prefix
        self._hidden_SH = hidden_SH
        self.hidden_leaf_SH = hidden_SH.detach().requires_grad_(hidden_SH.requires_grad)

    def backward(self) -> None:
        """Send the gradients that all completions left at keys, values and hidden states through the prompt."""
        tensors, gradients = self.prefix.gradients()
        if self.hidden_leaf_SH.grad is not None:
            tensors, gradients = [*tensors, self._hidden_SH], [*gradients, self.hidden_leaf_SH.grad]
        torch.autograd.backward(tensors, gradients)


class Policy:
    """A model and how it is run. Single-threaded: the compute thread's.

    Args:
        model: loaded, on its device.
        share_prefix: forward a group's prompt once, where the model can; a notice is logged where it cannot.
        autocast: compute in bfloat16.
        fp32_head: run the output head in float32 all the same.
        flex_attention: completions attend to shared prompts by FlexAttention.
        activation_offloading: keep in the host's memory what a backward pass will need.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        share_prefix: bool,
        autocast: bool,
        fp32_head: bool = False,
        flex_attention: bool = False,
        activation_offloading: bool = False,
    ) -> None:
        self.model = model
        self._attention = FLEX_ATTENTION if flex_attention else ATTENTION
        self._fp32_head = fp32_head
        self._activation_offloading = activation_offloading
        self.device = model.device
        self.context: Context | None = None
        """Who has the other parts of rows that are divided."""
        self.shares_prefix = False
        self._autocast = False  # while probing: what differs then is the method, not the rounding
        if share_prefix:
            obstacle = self._try_sharing()
            self.shares_prefix = not obstacle
            if obstacle:
                log.warning(
                    "%s cannot share prompts: %s. Every completion is padded and forwarded with its own copy.",
                    type(model).__name__,
                    obstacle,
                )
        self._autocast = autocast

    def pack(self, step: StepTokens, token_budget: int) -> list[MicroBatch]:
        """Lay the step out in rows that this policy can run."""
        return (pack_shared if self.shares_prefix else pack_padded)(step, token_budget)

    def forward_prompt(self, micro_batch: MicroBatch) -> ForwardedPrompt | None:
        """Forward the prompt of a group that is spread over several rows; None where it is in the row itself."""
        if micro_batch.prompt is None:
            return None
        prefix = Prefix()
        with self._precision():
            return ForwardedPrompt(self._hidden(micro_batch.prompt, prefix), prefix)

    def predictors(self, rows: Rows, prompt: ForwardedPrompt | None = None) -> Tensor:
        """Run the model without its head: [T, H], the last hidden state before each token of `rows` that trains."""
        with self._precision():
            hidden = self._hidden(rows, prompt.prefix if prompt else None)
        if prompt is not None:
            hidden = torch.cat([prompt.hidden_leaf_SH, hidden])
        return hidden.index_select(0, self._tensor(rows.predictor_T))

    def logprobs(
        self, rows: Rows, targets_T: Tensor, temperature_T: Tensor, prompt: ForwardedPrompt | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute log softmax(logits / temperature) of the tokens of `rows` that train.

        Args:
            rows: what to run the model on.
            targets_T: [T] int64, in the order of rows.index_T.
            temperature_T: [T] float32.
            prompt: from `forward_prompt`.

        Returns:
            logprobs [T] and entropies [T], with a graph behind them (outside no_grad).
        """
        with self._precision():
            predictors = self.predictors(rows, prompt)
            return token_logprobs(predictors, *head_of(self.model), targets_T, temperature_T, fp32=self._fp32_head)

    def token_loss(
        self,
        rows: Rows,
        targets_T: Tensor,
        temperature_T: Tensor,
        token_loss: TokenLossFunction,
        prompt: ForwardedPrompt | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute a loss that is a sum over the tokens of `rows` that train, without running the head twice.

        Args:
            rows: what to run the model on.
            targets_T: [T] int64, in the order of rows.index_T.
            temperature_T: [T] float32.
            token_loss: the loss of some of these tokens, from their logprobs.
            prompt: from `forward_prompt`.

        Returns:
            The loss [], for one plain backward() (no factor, no torch.autograd.grad); logprobs [T] and entropies [T]
            without a graph.
        """
        with self._precision():
            predictors = self.predictors(rows, prompt)
            arguments = (*head_of(self.model), targets_T, temperature_T, token_loss)
            return fused_token_loss(predictors, *arguments, fp32=self._fp32_head, accumulates=True)

    def step_logprobs(self, step: StepTokens, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Compute the logprobs of all tokens of the step that train, [T], without gradient.

        Tokens that none of the micro-batches has (they are another rank's) get 0.
        """
        targets_T, temperature_T = self._tensor(step.targets_T), self._tensor(step.temperature_T)
        logprobs_T = torch.zeros_like(temperature_T)
        with torch.no_grad():
            for micro_batch in micro_batches:
                prompt = self.forward_prompt(micro_batch)
                for rows in micro_batch.rows:
                    index = self._tensor(rows.index_T)
                    logprobs_T[index], _ = self.logprobs(rows, targets_T[index], temperature_T[index], prompt)
        return logprobs_T

    def _try_sharing(self) -> str:
        """Switch to shared prefixes if the model then still computes the same. Returns the obstacle, or nothing."""
        obstacle = _known_obstacle(self.model)
        if obstacle:
            return obstacle
        own_attention = self.model.config._attn_implementation
        step = _probe(self.model.config.get_text_config().vocab_size)
        expected = self.step_logprobs(step, pack_padded(step, 64))
        try:
            self.model.set_attn_implementation(self._attention)
            difference = (self.step_logprobs(step, pack_shared(step, 64)) - expected).abs().max().item()
            if difference <= PROBE_TOLERANCE[self.model.dtype]:
                return ""
            obstacle = f"its logprobs would be off by {difference:.3g}"
        except Exception as error:  # noqa: BLE001  foreign model code: whatever it raises means that it cannot
            obstacle = f"{type(error).__name__}: {error}"
        self.model.set_attn_implementation(own_attention)
        return obstacle

    def _hidden(self, rows: Rows, prefix: Prefix | None) -> Tensor:
        """Run the model without its head: last hidden states, flat [B x L, H]."""
        tokens, positions = self._tensor(rows.tokens_BL), self._tensor(rows.positions_BL)
        if rows.layout is None:
            return self._run(input_ids=tokens)
        if not tokens.numel():  # every completion in the row is one token, predicted by the prompt
            weight, _ = head_of(self.model)
            return torch.empty(0, weight.shape[1], dtype=weight.dtype, device=self.device)
        context = self.context if rows.num_parts > 1 else None
        hidden = self._run(input_ids=tokens, position_ids=positions, packed=Packed(rows.layout, prefix, context))
        return hidden if context is None else context.gather(hidden, rows.layout.num_tokens)

    def _run(self, **inputs: Any) -> Tensor:
        """Call the model without its head: [B x L, H]."""
        with HostActivations(self.model) if self._activation_offloading else contextlib.nullcontext():
            output = self.model.base_model(use_cache=False, **inputs)
        return torch.flatten(output.last_hidden_state, 0, 1)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._autocast)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def _known_obstacle(model: PreTrainedModel) -> str:
    """Name what a short probe cannot see: layers that only differ once a sequence is long."""
    settings = model.config.get_text_config().to_dict()
    layer_types = settings.get("layer_types")
    other = sorted(set(layer_types or ()) - {"full_attention"})
    if other:
        return f"it has layers of type {', '.join(other)}"
    if settings.get("sliding_window") and layer_types is None:
        return f"its attention slides over a window of {settings['sliding_window']} tokens"
    return ""


def _probe(vocabulary: int) -> StepTokens:
    """Two small groups of unequal prompts and completions (one of a single token), of arbitrary tokens."""
    lengths_N = np.array([3, 1, 2, 4])
    tokens = (np.arange(18) * 7 + 3) % vocabulary
    return StepTokens(
        prompts=(tokens[:5], tokens[5:8]),
        rewards_PG=np.zeros((2, 2), np.float32),
        trains_PG=np.ones((2, 2), np.bool_),
        group_N=np.array([0, 0, 1, 1]),
        lengths_N=lengths_N,
        tokens_C=tokens[8:],
        trained_C=np.ones(10, np.bool_),
        step_rewards_C=np.full(10, np.nan, np.float32),
        completion_T=np.repeat(np.arange(4), lengths_N),
        targets_T=tokens[8:],
        behavior_logprobs_T=np.zeros(10, np.float32),
        temperature_T=np.ones(10, np.float32),
        policy_version_T=np.zeros(10, np.int64),
    )
