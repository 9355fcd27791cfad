"""One micro-batch through the policy, the objective and back: where rows of tokens meet the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from learner.model.packing import MicroBatch, Rows
from learner.model.policy import ForwardedPrompt, Policy
from learner.objective import Objective, StepTensors, UpdateRecord


def accumulate(
    policy: Policy,
    objective: Objective,
    micro_batch: MicroBatch,
    tensors: StepTensors,
    record: UpdateRecord,
    *,
    fused_head: bool,
) -> None:
    """Add the gradients of a micro-batch to those that are there.

    Args:
        policy: what trains.
        objective: of the run.
        micro_batch: some of the update's tokens.
        tensors: the update's.
        record: takes in what was found.
        fused_head: compute the loss inside the output head; the configuration must be `token_level`.
    """
    prompt = policy.forward_prompt(micro_batch)
    for rows in micro_batch.rows:
        index = torch.from_numpy(rows.index_T).to(policy.device)
        if not index.numel():  # other ranks predict all that trains of this row, and wait for this part's backward pass
            policy.predictors(rows, prompt).sum().backward()
            continue
        if fused_head:
            policy_logprobs_T, entropy_T = _fused_backward(policy, objective, rows, index, tensors, prompt)
            loss = objective.loss(policy_logprobs_T, entropy_T, index, tensors)  # once more, for its parts
        else:
            targets_T, temperature_T = tensors.targets_T[index], tensors.temperature_T[index]
            policy_logprobs_T, entropy_T = policy.logprobs(rows, targets_T, temperature_T, prompt)
            loss = objective.loss(policy_logprobs_T, entropy_T, index, tensors)
            loss.loss.backward()
        record.add(index, policy_logprobs_T, entropy_T, loss)
    if prompt is not None:
        prompt.backward()


def _fused_backward(
    policy: Policy,
    objective: Objective,
    rows: Rows,
    index: Tensor,
    tensors: StepTensors,
    prompt: ForwardedPrompt | None,
) -> tuple[Tensor, Tensor]:
    """Backpropagate the loss of a row through head and model. Returns logprobs [T], entropies [T]."""

    def token_loss(logprobs_T: Tensor, part: slice) -> Tensor:
        unused = torch.zeros_like(logprobs_T)  # a loss that looks at the entropy is not token_level
        return objective.loss(logprobs_T, unused, index[part], tensors).loss

    targets_T, temperature_T = tensors.targets_T[index], tensors.temperature_T[index]
    loss, logprobs_T, entropy_T = policy.token_loss(rows, targets_T, temperature_T, token_loss, prompt)
    loss.backward()
    return logprobs_T, entropy_T
