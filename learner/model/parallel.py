"""A model whose master weights, gradients and optimizer lie in shards, one per rank (FSDP2, `fully_shard`).

    gathered:  every rank holds all weights, in the dtype of the arithmetic, and runs whatever it likes: none is
               fetched inside a forward or backward pass, so ranks may run different numbers of unequal micro-batches,
               prompts may be forwarded apart, the head's weight may be read, and the weights may be published
    reduce:    one reduce-scatter per layer: summed over ranks, each gets the gradients of its shard
    update:    the shards change; then the weights are gathered anew, layer by layer, over the old ones

So gradients travel once a step and weights once, however many micro-batches there are (FSDP's default gathers every
layer twice per micro-batch, which with rollouts' unequal lengths would also have ranks wait for each other all the
time). What it costs: each rank holds all weights and all gradients besides its shards, in bytes per parameter

    one rank            4 master + 8 AdamW + 4 gradients                                     = 16
    R ranks, float32    4 gathered + 4 gradients + (4 master + 8 AdamW + 4 gradients) / R    =  8 + 16 / R
    R ranks, bfloat16   2 gathered + 4 gradients + the same shards                           =  6 + 16 / R  (+ 2 of one
                        backward pass: autograd's own gradients, which are added up in float32)

A model whose weights and gradients do not fit one device is out of reach.
"""

from __future__ import annotations

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from learner.model.attention import Packed
from learner.model.export import unique_tensors
from learner.model.packing import whole_sequences
from learner.model.policy import Policy
from learner.model.shares import TokenCost
from protocol.errors import ConfigError


class ShardedModel:
    """A policy's model, or a reference's, sharded in place; gathered from the start.

    Args:
        policy: probed and ready, its weights the same on every rank.
        mesh: the ranks.
        autocast: gather the weights in bfloat16; gradients are added up and reduced in float32 all the same.

    Raises:
        ConfigError: the model has no list of layers to shard.
    """

    def __init__(self, policy: Policy, mesh: DeviceMesh, *, autocast: bool) -> None:
        self._policy = policy
        model = policy.model
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if autocast else None,
            reduce_dtype=torch.float32 if autocast else None,
            cast_forward_inputs=False,  # autocast casts what it wants cast
        )
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
        self._root: FSDPModule = fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.parameters: dict[str, torch.nn.Parameter] = dict(model.named_parameters())
        """This rank's shards (DTensors) by name: master weights, and after `reduce_gradients` their gradients."""
        self._root.set_reshard_after_backward(False)
        for module in self._modules:
            module.set_gradient_divide_factor(1.0)  # a sum: the loss's denominators are those of the whole step
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled one
        self._reduce_in_backward(False)
        with torch.no_grad():
            self._one_token()  # FSDP takes for its root what runs first; gathers

    def reduce_gradients(self) -> None:
        """Sum the gradients over the ranks. Every rank must call it, with whatever it has accumulated, or nothing.

        FSDP reduces in a backward pass: one of zeros, through every layer, so that all ranks reduce the same.
        """
        self._reduce_in_backward(True)
        (self._one_token().sum() * 0.0).backward()
        self._reduce_in_backward(False)

    def gather(self) -> None:
        """Replace the gathered weights by the shards' new ones, layer by layer. Every rank must call it."""
        for module in self._modules:
            module.reshard()
            module.unshard()

    def release(self) -> None:
        """Keep nothing but the shards, until the next `gather`."""
        for module in self._modules:
            module.reshard()

    def _reduce_in_backward(self, reduce: bool) -> None:
        self._root.set_requires_gradient_sync(reduce)
        self._root.set_is_last_backward(reduce)

    def _one_token(self) -> Tensor:
        """Run everything on one token; logits."""
        (micro_batch,) = self._policy.pack(whole_sequences(np.zeros((1, 2), np.int32)), 2)
        rows = micro_batch.rows[0]
        tokens, positions = (torch.from_numpy(x).to(self._policy.device) for x in (rows.tokens_BL, rows.positions_BL))
        packed = {} if rows.layout is None else {"packed": Packed(rows.layout)}
        logits: Tensor = self._policy.model(input_ids=tokens, position_ids=positions, use_cache=False, **packed).logits
        return logits


def whole(tensor: Tensor) -> Tensor:
    """Return a shard's whole tensor (every rank must ask for it); any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def layers_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    """Find the decoder layers: the model's only list of config.num_hidden_layers modules.

    Raises:
        ConfigError: there is no such list.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers:
            return module
    raise ConfigError(f"{type(model).__name__} has no list of {num_layers} layers to shard: train it on one rank")


def token_cost(model: PreTrainedModel) -> TokenCost:
    """Count the operations of a forward pass per token: 2 per weight, 4 per head and head size and token seen."""
    config = model.config.get_text_config()
    weights = sum(p.numel() for layer in layers_of(model) for p in layer.parameters() if p.ndim == 2)
    head_dim = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    return TokenCost(
        layers=2.0 * weights,
        attention=4.0 * config.num_hidden_layers * config.num_attention_heads * head_dim,
        head=2.0 * model.get_output_embeddings().weight.numel(),
    )


def weights_digest(model: PreTrainedModel) -> str:
    """Hash every tensor: ranks that loaded different files would shard a mixture of two models."""
    digest = xxhash.xxh3_128()
    for name, tensor in unique_tensors(model).items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
