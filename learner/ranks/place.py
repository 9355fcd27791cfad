"""Where torchrun has put this process, and what several ranks cannot do. No torch: asked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from learner.config import LearnerConfig
from protocol.errors import ConfigError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True, slots=True)
class Place:
    """One of several ranks."""

    rank: int
    world_size: int
    local_rank: int
    """Among those of this host: the number of its GPU."""

    @property
    def leads(self) -> bool:
        """Rank 0 owns the sockets, the journal and the run directory."""
        return self.rank == 0


def place_of(environment: Mapping[str, str]) -> Place | None:
    """Read what torchrun tells its processes. None: a learner of its own, as without torchrun.

    Raises:
        ConfigError: some of it is missing, or is no such number.
    """
    if environment.get("WORLD_SIZE", "1") == "1":
        return None
    try:
        rank, world_size, local_rank = (int(environment[name]) for name in VARIABLES)
    except (KeyError, ValueError) as error:
        given = ", ".join(f"{name}={environment.get(name, '(unset)')}" for name in VARIABLES)
        raise ConfigError(f"{given}: torchrun sets all three to numbers; start the ranks with it") from error
    if not 0 <= rank < world_size:
        raise ConfigError(f"RANK={rank} is not one of WORLD_SIZE={world_size} ranks: start them with torchrun")
    return Place(rank, world_size, local_rank)


def check_ranks(config: LearnerConfig, place: Place | None) -> None:
    """Refuse what several ranks cannot do, or one alone (None) cannot.

    Raises:
        ConfigError: says what would work.
    """
    size, world_size = config.context_parallel_size, 1 if place is None else place.world_size
    if world_size % size:
        raise ConfigError(
            f"context_parallel_size {size} with a world of {world_size}: so many ranks divide each row among them;"
            f" start a multiple of {size} ranks with torchrun, or use 1"
        )
    if size > 1 and not config.share_prefix:
        raise ConfigError(
            f"context_parallel_size {size} without share_prefix: only rows that share prompts are divided; leave"
            " share_prefix on, or use 1"
        )
    if place is None:
        return
    if config.use_peft:
        raise ConfigError("use_peft on several ranks: adapters train on one rank; leave torchrun out, or use_peft")
    if config.has_critic:
        raise ConfigError("advantage_estimator gae on several ranks: the critic trains on one rank; leave torchrun out")
    if config.optim != "adamw":
        raise ConfigError(f"optim {config.optim!r} on several ranks: its states cannot be sharded; use adamw")
    if config.cast_lm_head_to_fp32 and config.autocast == "bfloat16":
        raise ConfigError(
            "cast_lm_head_to_fp32 with autocast bfloat16 on several ranks: the head's weights are gathered in bfloat16;"
            " use autocast none, or leave cast_lm_head_to_fp32 out"
        )
    if config.autocast == "bfloat16" and config.published_dtype == "float32":
        raise ConfigError(
            "publish_dtype float32 with autocast bfloat16 on several ranks: the weights are gathered, and published,"
            " in bfloat16; use publish_dtype auto, or autocast none"
        )
