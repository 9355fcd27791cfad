"""LoRA adapters on a frozen base model, by peft: what trains, what is published, what a checkpoint keeps.

    W + (lora_alpha / r) B A,   A [r, in] random, B [out, r] zero at first       (arXiv 2106.09685, section 4.1)

peft's layers are put into the loaded model, which stays what it is for everybody else: the packed path, the chunked
head and the probe for shared prefixes run through it unchanged. A and B are float32 whatever the base model's dtype is,
so that small updates are not lost; the base model has no gradients and no optimizer state, and is never written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from learner.config import LearnerConfig
from learner.model.load import directory_of
from protocol.errors import ConfigError
from protocol.weights.adapters import ADAPTER_WEIGHTS, AdapterSpec
from protocol.weights.base_model import base_digest

if TYPE_CHECKING:
    from peft import LoraConfig

ALL_LINEAR = "all-linear"
"""peft's word for every linear layer but the output head."""


class Adapter:
    """A LoRA adapter in `model`, which it freezes.

    Args:
        model: loaded, on its device; its linear layers are replaced by peft's.
        config: lora_r, lora_alpha, lora_target_modules; model names the base model's directory.

    Raises:
        ConfigError: peft is missing, lora_target_modules does not fit the model, or the model's files cannot be hashed.
    """

    def __init__(self, model: PreTrainedModel, config: LearnerConfig) -> None:
        directory = directory_of(config.model)
        self._model = model
        self._lora = _lora_config(model, config, directory)
        self.spec = AdapterSpec(r=config.lora_r, lora_alpha=config.lora_alpha, base_digest=base_digest(directory))
        """What servers must know of it."""
        from peft import inject_adapter_in_model

        model.requires_grad_(False)
        inject_adapter_in_model(self._lora, model)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        for parameter in trained.values():
            parameter.data = parameter.data.float()
        self.tensors: dict[str, Tensor] = {_published_name(name): p.detach() for name, p in trained.items()}
        """A and B of every layer, by peft's names, sharing the memory of the parameters."""

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the base model alone: B A counts nothing inside."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [module for module in self._model.modules() if isinstance(module, BaseTunerLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def save(self, directory: Path) -> None:
        """Write the two files that plain `PeftModel.from_pretrained(base, directory)` loads."""
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        self._lora.save_pretrained(directory)

    def load(self, directory: Path) -> None:
        """Read back what `save` wrote.

        Raises:
            ConfigError: there is none, or it has other layers or another rank.
        """
        path = directory / ADAPTER_WEIGHTS
        try:
            saved = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"checkpoint {directory} has no usable {ADAPTER_WEIGHTS}: {error}") from error
        expected = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        found = {name: tuple(tensor.shape) for name, tensor in saved.items()}
        if found != expected:
            name = min(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise ConfigError(
                f"{path}: {name} is {found.get(name, 'not there')}, this configuration makes it"
                f" {expected.get(name, 'absent')}: lora_r and lora_target_modules must be those of the checkpoint"
            )
        for name, tensor in self.tensors.items():
            tensor.copy_(saved[name])


def _lora_config(model: PreTrainedModel, config: LearnerConfig, directory: Path) -> LoraConfig:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError(
            "use_peft: the package peft is not installed here: pip install '.[peft]' in headway's directory, or"
            " train all weights, without use_peft"
        ) from error
    head = model.get_output_embeddings()
    linear = {name.rpartition(".")[2] for name, module in model.named_modules()
              if isinstance(module, torch.nn.Linear) and module is not head}  # fmt: skip
    unknown = sorted(set(config.lora_target_modules) - linear)
    if unknown:
        raise ConfigError(
            f"lora_target_modules: {', '.join(unknown)}: adapters go to linear layers other than the output head; those"
            f" of {config.model} are {', '.join(sorted(linear))}"
        )
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(directory.resolve()),
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules=config.lora_target_modules or ALL_LINEAR,
        inference_mode=False,
    )


def _published_name(parameter: str) -> str:
    """model.x.lora_A.default.weight is base_model.model.model.x.lora_A.weight in peft's files."""
    return f"base_model.model.{parameter.removesuffix('.default.weight')}.weight"
