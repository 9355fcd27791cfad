"""headway-server: read the configuration, refuse what is incomplete, hand over to app.run. No torch until then."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from protocol.command import run_command
from protocol.errors import ConfigError

if TYPE_CHECKING:
    from rollout_server.config import ServerConfig

PROG = "headway-server"


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(run_command(PROG, lambda: serve(sys.argv[1:])))


def serve(argv: Sequence[str]) -> int:
    """Serve rollouts until the learner says goodbye, or make keys; return the exit code.

    Raises:
        ConfigError: The configuration is wrong or incomplete.
    """
    if argv[:1] == ["keygen"]:
        from protocol.keygen import keygen

        return keygen(argv[1:], prog=f"{PROG} keygen", side="server")
    from protocol.settings import load_settings
    from rollout_server.config import ServerConfig

    config = load_settings(ServerConfig, argv, prog=PROG)
    check_complete(config)
    from rollout_server.app import run

    return run(config)


def check_complete(config: ServerConfig) -> None:
    """Refuse a configuration that lacks what the chosen engine needs, or whose engine cannot run here.

    Raises:
        ConfigError: Names the key and what to write.
    """
    from rollout_server.engines.choice import choose_engine

    engine = choose_engine(config).engine
    if engine == "scripted":
        return
    if not config.model:
        raise ConfigError(f"model is empty: engine {engine} needs the directory of a Hugging Face model, --model DIR")
    if not config.reward_funcs:
        raise ConfigError(
            "reward_funcs is empty: name what scores completions, for example --reward-funcs exact_match"
            " or --reward-funcs path/to/file.py:function"
        )


if __name__ == "__main__":
    main()
