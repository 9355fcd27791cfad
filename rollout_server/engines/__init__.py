"""Engines: what samples completions. Importing this package loads neither torch nor transformers nor SGLang."""

from __future__ import annotations

import logging
from pathlib import Path

from protocol.errors import ConfigError
from protocol.logs import event
from protocol.waits import Waits
from rollout_server.config import ServerConfig
from rollout_server.engines.base import Engine
from rollout_server.engines.choice import choose_engine

log = logging.getLogger(__name__)


def create_engine(config: ServerConfig, waits: Waits) -> Engine:
    """Make the engine that the configuration names; entering it loads the model.

    Args:
        config: of the server.
        waits: where an engine shows what it waits for.

    Raises:
        ConfigError: a model is needed and none is given, or the engine cannot run here.
    """
    choice = choose_engine(config)
    if choice.notice:
        event(log, "engine", notice=choice.notice)
    if choice.engine == "scripted":
        from rollout_server.engines.scripted import ScriptedEngine

        return ScriptedEngine(config.scripted, room=config.room)
    if not config.model:
        raise ConfigError(
            f"model is empty: engine {choice.engine} needs the directory of a Hugging Face model (--model DIR)"
        )
    if choice.engine == "sglang":
        from rollout_server.engines.sglang import SGLangEngine

        return SGLangEngine(config, waits)
    from rollout_server.engines.transformers import TransformersEngine

    return TransformersEngine(
        Path(config.model),
        room=config.room,
        max_model_length=config.max_model_length,
        dtype=config.dtype,
        device=config.device,
    )
