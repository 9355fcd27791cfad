"""Where torchrun has put this process. No torch: asked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
