"""`train` under torchrun: find the others, agree, then lead or follow."""

from __future__ import annotations

import contextlib
import logging
from importlib.metadata import version
from pathlib import Path

import blake3
import torch

import learner
import protocol
from learner.app import run
from learner.config import LearnerConfig
from learner.model.load import resolve_device
from learner.ranks.commands import Stay, Stop, to_bytes
from learner.ranks.follower import follow
from learner.ranks.place import Place, check_ranks
from learner.ranks.trainer import LeadingTrainer
from learner.ranks.world import RankLost, RankSilent, World
from protocol.errors import ConfigError
from protocol.logs import configure_logging, event

log = logging.getLogger(__name__)


def train_on_ranks(config: LearnerConfig, place: Place) -> int:
    """Run one rank of a training run to its end; return the exit code. Only rank 0 says what went wrong.

    Raises:
        ConfigError: rank 0 cannot work with this configuration, or the ranks disagree.
        RankLost: on rank 0: another rank ended, or does not answer. On the others: rank 0 was never heard of.
        RunStopped: on rank 0.
    """
    if not place.leads:
        configure_logging("learner", stderr=False)  # until rank 0 has begun the run
    world = World.join(place, rank_device(config, place), config.collective_timeout_s)
    try:
        if place.leads:
            return lead(config, world)
        world.agree(statement(config))
        world.open()
        return follow(config, world)
    except (RankLost, ConfigError) as error:
        if place.leads or isinstance(error, RankSilent):
            raise
        # Rank 0 knows, or finds out, and ends with an error. It must have the time: torchrun ends all ranks as soon
        # as one has failed.
        event(log, "rank_ended", level=logging.ERROR, reason=error)
        return 0
    finally:
        world.close()


def report_error(place: Place, error: ConfigError) -> None:
    """Let rank 0 say what is wrong with this rank's configuration."""
    timeout_s = LearnerConfig.model_fields["collective_timeout_s"].default
    with contextlib.suppress(RankLost):  # rank 0 disagrees, of course
        World.join(place, torch.device("cpu"), timeout_s).agree({"error": str(error)})


def lead(config: LearnerConfig, world: World) -> int:
    """Run rank 0: the learner as it always is, with a trainer that tells the others."""
    check_ranks(config, world.place)
    world.agree(statement(config))
    world.open()

    def make_trainer(config: LearnerConfig, *, checkpoint: Path | None) -> LeadingTrainer:
        return LeadingTrainer(config, world, logs_dir=config.run_dir / "logs", checkpoint=checkpoint)

    def say(command: Stay | Stop) -> None:
        with world.watched(type(command).__name__):
            world.broadcast(to_bytes(command))

    def keep_alive() -> None:
        say(Stay())

    try:
        code = run(config, make_trainer, keep_alive=keep_alive)
        if world.failure is not None:  # a signal of torchrun's, for the rank that was lost, came before the error
            raise world.failure
        return code
    finally:
        if world.can_talk:  # else they wait in a collective that fails, and end with it
            say(Stop())


def rank_device(config: LearnerConfig, place: Place) -> torch.device:
    """Choose this rank's device: the GPU of its local rank, or the CPU.

    Raises:
        ConfigError: one numbered GPU cannot be every rank's.
    """
    device = resolve_device(config.device)
    if device.type != "cuda":
        return device
    if ":" in config.device:
        raise ConfigError(f"device {config.device!r} on {place.world_size} ranks: use cuda, each rank takes its own")
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


def statement(config: LearnerConfig) -> dict[str, str]:
    """Return what all ranks must agree on before anything is loaded: every key, and the code."""
    keys = {key: str(value) for key, value in config.model_dump(mode="json").items()}
    return keys | {
        "code (blake3 of learner/ and protocol/)": code_digest(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def code_digest() -> str:
    """Hash the source files of the two packages, names and contents."""
    digest = blake3.blake3()
    for package in (learner, protocol):
        root = Path(package.__path__[0])
        for file in sorted(root.rglob("*.py")):
            digest.update(f"{package.__name__}/{file.relative_to(root).as_posix()}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
