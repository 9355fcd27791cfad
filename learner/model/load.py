"""Load a Hugging Face causal language model and its tokenizer, or say in one line why not.

Only this file and checkpoints know how a model lies on disk. Which attention runs is decided in sharing.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from protocol.errors import ConfigError

LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""What models call it in config.json; a cap may not show before the logits have grown."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_device(device: str) -> torch.device:
    """Turn the configured device into one that exists.

    Raises:
        ConfigError: cuda is asked for and there is none, or torch does not know the name.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is unknown to torch: use auto, cpu, cuda or cuda:<index>") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r}: torch {torch.__version__} sees no CUDA device; use cpu or auto")
    return resolved


def load_model(model: str | Path, *, dtype: Literal["float32", "bfloat16"], device: torch.device) -> PreTrainedModel:
    """Load the weights in `dtype`, in evaluation mode: dropout would be noise in every ratio of policies.

    Raises:
        ConfigError: there is no such model, or it is not a causal language model that transformers can load.
    """
    source = _find(model)
    transformers.utils.logging.disable_progress_bar()  # the terminal belongs to the dashboard
    try:
        loaded = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[dtype])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model {str(model)!r} cannot be loaded: {_first_line(error)}") from error
    _check_head(loaded, str(model))
    return loaded.eval().to(device)


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside the model.

    Raises:
        ConfigError: there is none.
    """
    source = _find(model)
    if isinstance(source, Path) and not any((source / name).is_file() for name in TOKENIZER_FILES):
        # transformers would make up an empty tokenizer from config.json.
        raise ConfigError(f"model {str(model)!r} has no tokenizer: none of {', '.join(TOKENIZER_FILES)} is there")
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"model {str(model)!r} has a tokenizer that cannot be loaded: {_first_line(error)}"
        ) from error


def directory_of(model: str | Path) -> Path:
    """Find the directory of a model that has been loaded; of a hub name that is in the hub's cache."""
    source = _find(model)
    if isinstance(source, Path):
        return source
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=["*.safetensors", "config.json"], local_files_only=True))


def head_of(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return weight [V, H] and bias [V] (or None) of the output head."""
    head = model.get_output_embeddings()
    return head.weight, head.bias


def _find(model: str | Path) -> str | Path:
    """Tell a mistyped path from a hub name before anything goes looking for it on the network."""
    text = str(model)
    path = Path(text).expanduser()
    if not text:
        raise ConfigError("model is not set: give the directory (or hub name) of a Hugging Face causal language model")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model {text!r}: the directory has no config.json; it must be a Hugging Face model")
        return path
    if path.is_absolute() or text.startswith(".") or text.count("/") > 1:
        raise ConfigError(f"model {text!r}: no such directory; give one with config.json, or a hub name")
    return text


def _check_head(model: PreTrainedModel, name: str) -> None:
    """Refuse models whose logits are more than a linear map of the last hidden state.

    Logprobs are computed from the hidden state in chunks, never from the model's own logits: a scale or a soft cap
    that the model applies to them would be lost without a word.
    """
    settings = model.config.get_text_config().to_dict()
    applied = [key for key in LOGIT_SETTINGS if settings.get(key) not in (None, 1.0)]
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise ConfigError(f"model {name!r} has no linear output head ({type(head).__name__}): not supported")
    tokens = torch.arange(4)[None] % model.config.vocab_size
    with torch.no_grad():
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        expected = model(input_ids=tokens, use_cache=False).logits
    if applied or not torch.allclose(head(hidden).float(), expected.float(), rtol=1e-2, atol=1e-2):
        raise ConfigError(
            f"model {name!r} ({model.config.model_type}) scales or caps its logits after the output head"
            f" ({', '.join(applied) or 'seen in its logits'}): not supported"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
