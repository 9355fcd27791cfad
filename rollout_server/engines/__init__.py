"""Engines: what samples completions. Importing this package loads neither torch nor transformers."""

from __future__ import annotations

from pathlib import Path

from protocol.errors import ConfigError
from rollout_server.config import ServerConfig
from rollout_server.engines.base import Engine


def create_engine(config: ServerConfig) -> Engine:
    """Make the engine that the configuration names; entering it loads the model.

    Raises:
        ConfigError: a model is needed and none is given.
    """
    if config.engine == "scripted":
        from rollout_server.engines.scripted import ScriptedEngine

        return ScriptedEngine(config.scripted, room=config.room)
    if not config.model:
        raise ConfigError(
            "model is empty: engine transformers needs the directory of a Hugging Face model (--model DIR)"
        )
    from rollout_server.engines.transformers import TransformersEngine

    return TransformersEngine(
        Path(config.model),
        room=config.room,
        max_model_length=config.max_model_length,
        dtype=config.dtype,
        device=config.device,
    )
