"""A user's own loss or advantages, named in the configuration: found, and tried out, before a model is loaded.

Both are plain functions of tensors (learner/grpo/loss.py says what LossTokens holds):

    def my_loss(tokens: LossTokens) -> Tensor             # [T], to be minimized, differentiable in policy_logprobs_T
    def my_advantages(rewards_PG: Tensor, scored_PG: Tensor) -> Tensor      # [P, G]

The loss is called with some tokens of an update at a time, completions always whole.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learner.grpo.loss import LossTokens
from protocol.errors import ConfigError

Loss = Callable[[LossTokens], Tensor]
Advantages = Callable[[Tensor, Tensor], Tensor]


def load_loss(path: str) -> Loss:
    """Import a loss and try it on two completions.

    Returns:
        The function. It raises ConfigError, too, should what it returns have another shape in earnest.

    Raises:
        ConfigError: it cannot be imported, fails, or returns something else than a differentiable loss of each token.
    """
    function: Loss = _import("loss_function", path)
    policy_logprobs_T = torch.tensor([-1.0, -0.5, -2.0], requires_grad=True)
    other_T = torch.tensor([-1.1, -0.5, -1.5])
    tokens = LossTokens(
        policy_logprobs_T=policy_logprobs_T,
        entropy_T=torch.ones(3),
        anchor_logprobs_T=other_T,
        behavior_logprobs_T=other_T,
        advantages_T=torch.tensor([1.0, 1.0, -1.0]),
        weights_T=torch.full((3,), 1 / 3),
        completion_T=torch.tensor([0, 0, 1]),
    )
    loss_T = _try("loss_function", path, function, tokens)
    _require_shape("loss_function", path, loss_T, (3,), "tokens")
    _require_finite("loss_function", path, loss_T)
    if not loss_T.requires_grad:
        raise ConfigError(
            f"loss_function {path}: its loss does not depend on policy_logprobs_T, so nothing would be learned"
        )

    def loss(tokens: LossTokens) -> Tensor:
        loss_T = function(tokens)
        _require_shape("loss_function", path, loss_T, tuple(tokens.policy_logprobs_T.shape), "tokens")
        return loss_T

    return loss


def load_advantages(path: str) -> Advantages:
    """Import an advantage function and try it on two groups.

    Returns:
        The function, as `load_loss` does.

    Raises:
        ConfigError: it cannot be imported, fails, or returns something else than an advantage of each completion.
    """
    function: Advantages = _import("advantage_function", path)
    rewards_PG = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]])
    scored_PG = torch.tensor([[True, True, True], [True, True, False]])
    advantages_PG = _try("advantage_function", path, function, rewards_PG, scored_PG)
    _require_shape("advantage_function", path, advantages_PG, (2, 3), "rewards")
    _require_finite("advantage_function", path, advantages_PG)

    def advantages(rewards_PG: Tensor, scored_PG: Tensor) -> Tensor:
        advantages_PG = function(rewards_PG, scored_PG)
        _require_shape("advantage_function", path, advantages_PG, tuple(rewards_PG.shape), "rewards")
        return advantages_PG

    return advantages


def _import(key: str, path: str) -> Any:
    module, _, name = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last: modules of the working directory can be named, and shadow nothing
    try:
        found = vars(importlib.import_module(module))
    except (Exception, SystemExit) as error:  # whatever the user's module raises while it is imported
        raise ConfigError(f"{key} {path}: importing {module} raised {type(error).__name__}: {error}") from error
    if callable(function := found.get(name)):
        return function
    functions = [key for key, value in found.items() if callable(value) and not key.startswith("_")]
    problem = "is not callable" if name in found else "is not there"
    raise ConfigError(f"{key} {path}: {name} {problem}; {module} has {', '.join(functions) or 'no functions'}")


def _try(key: str, path: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:  # a user's code: whatever it raises, its user must read
        raise ConfigError(f"{key} {path}: fails on a small example: {type(error).__name__}: {error}") from error


def _require_shape(key: str, path: str, result: Any, shape: tuple[int, ...], of: str) -> None:
    if not isinstance(result, Tensor) or result.shape != shape:
        got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ConfigError(
            f"{key} {path}: must return a tensor of the shape of its {of}, {list(shape)}; it returned {got}"
        )


def _require_finite(key: str, path: str, result: Tensor) -> None:
    if not torch.isfinite(result).all():
        raise ConfigError(f"{key} {path}: returns {result.tolist()} for a small example: not finite")
