"""Activations that wait in the host's memory: on a CPU that is a copy, and the same gradients to the bit."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import save_on_cpu
from transformers import AutoModelForCausalLM

from learner.config import LearnerConfig
from learner.model import offloading
from learner.model.offloading import HostActivations, check_device
from learner.trainer import Trainer
from protocol.errors import ConfigError
from tests.factories import make_batch, make_train_group


def batch():
    groups = [make_train_group(ordinal=i, lengths=[3, 6, 1, 14], prompt_tokens=[5, 6 + i, 7, 8, 9]) for i in range(2)]
    return make_batch(groups=groups)


class Moves(save_on_cpu):
    """Notes what is moved to the host and fetched back."""

    def __init__(self, pin_memory: bool) -> None:
        super().__init__(pin_memory)
        pack, unpack = self.pack_hook, self.unpack_hook

        def note_pack(tensor):
            moved.append(tensor)
            return pack(tensor)

        def note_unpack(packed):
            fetched.append(packed)
            return unpack(packed)

        self.pack_hook, self.unpack_hook = note_pack, note_unpack


moved: list[torch.Tensor] = []
fetched: list[tuple[torch.device, torch.Tensor]] = []


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    """Have every device accepted, and moves noted."""
    monkeypatch.setattr(offloading, "check_device", lambda device: None)
    monkeypatch.setattr(offloading, "save_on_cpu", Moves)
    moved.clear()
    fetched.clear()


def gradients(model_dir, **options):
    trainer = Trainer(LearnerConfig(model=str(model_dir), **options))
    assert trainer.forward_backward(batch()).finite
    return {name: p.grad for name, p in trainer._parameters.items()}


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["all kept", "inputs kept"])
@pytest.mark.parametrize("token_budget", [9, 8192], ids=["prompt apart", "prompt in the row"])
@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_the_gradients_are_those_without_it(
    tiny_model_dir, autocast, share_prefix, token_budget, gradient_checkpointing
):
    options = {"autocast": autocast, "share_prefix": share_prefix, "token_budget": token_budget}
    options["gradient_checkpointing"] = gradient_checkpointing
    plain = gradients(tiny_model_dir, **options)
    assert not moved
    offloaded = gradients(tiny_model_dir, **options, activation_offloading=True)
    assert len(fetched) >= len(moved) > 0, "what was moved was needed, by a layer or by one that ran again"
    assert all(torch.equal(plain[name], offloaded[name]) for name in plain)


def test_the_critic_offloads_too(tiny_model_dir):
    options = {"advantage_estimator": "gae", "filter_zero_std": False}
    gradients(tiny_model_dir, **options, activation_offloading=True)
    of_policy_and_critic = len(moved)
    moved.clear()
    gradients(tiny_model_dir, activation_offloading=True)
    assert of_policy_and_critic == 2 * len(moved) > 0


def test_checkpointed_layers_move_their_inputs_alone(tiny_model_dir):
    gradients(tiny_model_dir, activation_offloading=True, token_budget=8192)
    everything = sum(tensor.numel() for tensor in moved)
    moved.clear()
    gradients(tiny_model_dir, activation_offloading=True, token_budget=8192, gradient_checkpointing=True)
    assert sum(tensor.numel() for tensor in moved) < 0.2 * everything, "and what the last norm saves"


def test_weights_stay_and_activations_are_copied(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    context = HostActivations(model)
    weight, activation = model.model.layers[0].mlp.up_proj.weight, torch.arange(6.0)
    for view in (weight, weight.T, weight[3:]):
        assert context.pack_hook(view) is view
    _, copy = packed = context.pack_hook(activation)
    assert copy.data_ptr() != activation.data_ptr()
    activation.zero_()
    assert context.unpack_hook(packed).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert context.unpack_hook(weight) is weight


def test_only_cuda_devices_have_somewhere_to_move_from():
    check_device(torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"moves activations from a CUDA device .* 'cpu': leave it out; gradient_che"):
        check_device(torch.device("cpu"))


def test_a_trainer_on_a_cpu_refuses_it_before_it_loads(monkeypatch):
    monkeypatch.setattr(offloading, "check_device", check_device)
    with pytest.raises(ConfigError, match="activation_offloading"):
        Trainer(LearnerConfig(model="/nowhere", activation_offloading=True))
