"""headway-learner: which subcommand, and nothing else. No torch until a run really starts."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from protocol.command import run_command
from protocol.errors import ConfigError

PROG = "headway-learner"
USAGE = f"""\
usage: {PROG} COMMAND [--config FILE] [flags]

commands:
  train   train a model on the groups that rollout servers stream in (--dry-run only shows what would run)
  demo    train a small model on this machine: writes two configurations, starts a server and a learner
  knob    show the live knobs of a running learner, or turn one: knob RUN_DIR [NAME VALUE]
  simulate predict step time, idle time and staleness: simulate [RUN_DIR] [flags]
  tune    forecast every setting in question, name the knee and the side to grow: tune [RUN_DIR] [flags]
  replay  train again what a run has trained, and compare; or find where two runs part: replay RUN_DIR
  weights list the versions that a run has published, verify or restore them: weights RUN_DIR
  trace   draw where the time of a run went, for ui.perfetto.dev: trace RUN_DIR --output trace.json
  bench   compare objectives on this machine: bench ppo-vs-grpo
  keygen  make the key of a learner whose servers are on other hosts

{PROG} COMMAND --help lists a command's flags.
"""


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(run_command(PROG, lambda: dispatch(sys.argv[1:])))


def dispatch(argv: Sequence[str]) -> int:
    """Run one subcommand and return its exit code; without one, print the usage.

    Raises:
        ConfigError: There is no such command, or its configuration is wrong.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    command, *rest = argv
    if command == "train":
        from learner.commands import train

        return train(rest, prog=f"{PROG} train")
    if command == "demo":
        from learner.demo.run import demo

        return demo(rest, prog=f"{PROG} demo")
    if command == "simulate":
        from learner.tuning.command import simulate_command

        return simulate_command(rest, prog=f"{PROG} simulate")
    if command == "tune":
        from learner.tuning.tune_command import tune_command

        return tune_command(rest, prog=f"{PROG} tune")
    if command == "weights":
        from learner.weights_archive.command import weights

        return weights(rest, prog=f"{PROG} weights")
    if command == "knob":
        from learner.knobs.command import knob

        return knob(rest, prog=f"{PROG} knob")
    if command == "replay":
        from learner.replay.command import replay

        return replay(rest, prog=f"{PROG} replay")
    if command == "trace":
        from learner.trace import trace

        return trace(rest, prog=f"{PROG} trace")
    if command == "bench":
        return bench(rest)
    if command == "keygen":
        from protocol.keygen import keygen

        return keygen(rest, prog=f"{PROG} keygen", side="learner")
    raise ConfigError(
        f"unknown command {command!r}: allowed are train, demo, knob, simulate, tune, replay, weights, trace, bench"
        " and keygen"
    )


def bench(argv: Sequence[str]) -> int:
    """Run one comparison and return its exit code.

    Raises:
        ConfigError: There is no such comparison, or a flag of it is wrong.
    """
    name, *rest = argv or [""]
    if name in ("-h", "--help"):
        print(f"{PROG} bench ppo-vs-grpo [--quick]: the same task with PPO's critic and without; --help for its flags")
        return 0
    if name != "ppo-vs-grpo":
        raise ConfigError(f"unknown bench {name!r}: the one there is is {PROG} bench ppo-vs-grpo [--quick]")
    from learner.demo.ppo_vs_grpo import ppo_vs_grpo

    return ppo_vs_grpo(rest, prog=f"{PROG} bench {name}")


if __name__ == "__main__":
    main()
