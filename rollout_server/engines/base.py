"""What an engine is: prompts in, completions out, weights swapped in flight.

Every engine passes tests/contract/test_engines.py. An engine is driven from the event loop and does its work
elsewhere (a thread, a child process): no method here blocks the loop. It samples every completion of a request with
the request's own seed, so the same weights give the same tokens whatever else runs beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from protocol.completions import Completion
from protocol.messages import Int32, Sampling
from protocol.versions import Version


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One group to sample: `num_generations` completions of one prompt."""

    group_id: str
    prompt_tokens: Int32
    """[P]"""
    num_generations: int
    sampling: Sampling
    seed: int
    """Group seed; sample i draws from `protocol.identity.sample_seed(seed, i)`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What the learner checks at Hello."""

    engine: str
    room: int
    """Samples decoded at once."""
    vocab_size: int
    model_digest: str
    tokenizer_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """Counters since start (only grow) and two gauges."""

    samples_running: int = 0
    samples_waiting: int = 0
    tokens_generated: int = 0
    busy_s: float = 0.0
    paused_s: float = 0.0
    occupancy_s: float = 0.0
    """Integral over time of samples_running / room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedWeights:
    """A complete, verified version on local disk or tmpfs: a safetensors file in the manifest's layout."""

    version: Version
    path: Path


class EngineFailure(Exception):
    """The engine could not finish a request or a load. Its groups are returned; the engine restarts or stays as is."""


class Engine(Protocol):
    """The contract. Entered once (loads the model), left once (stops everything it started)."""

    @property
    def info(self) -> EngineInfo:
        """Constant after entering."""

    @property
    def live(self) -> Version | None:
        """The version that samples the next token; None before the first `load_weights`."""

    def status(self) -> EngineStatus:
        """Return counters and gauges; cheap, called every heartbeat."""

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        """Sample the whole group; index i of the result is generation i.

        Aborted completions come back with what they had and FinishReason.ABORT.

        Raises:
            EngineFailure: nothing usable can be returned.
        """

    def abort(self, group_id: str) -> None:
        """End the group's samples now; an unknown id is no error. `generate` then returns soon."""

    async def load_weights(self, weights: StagedWeights) -> float:
        """Swap `weights` in without ending any request, and return the pause in seconds.

        On return every later token is of `weights.version`, and `live` says so. On failure the old version still
        serves, whole.

        Raises:
            EngineFailure: names, shapes or dtypes do not fit, or the file cannot be read.
        """

    async def __aenter__(self) -> Self:
        """Load the model."""

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop; outstanding `generate` calls end with EngineFailure."""
