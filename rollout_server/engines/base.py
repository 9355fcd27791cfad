"""What an engine is: prompts in, completions out, weights swapped in flight.

Every engine passes tests/contract/test_engines.py. An engine is driven from the event loop and does its work
elsewhere (a thread, a child process): no method here blocks the loop. An engine whose `info.reproducible` is true
samples every completion with the request's own seed: the same weights give the same tokens whatever else runs beside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from protocol.completions import Completion
from protocol.messages import FinishReason, Float32, Int32, Sampling
from protocol.signals import Signal
from protocol.versions import Version
from protocol.weights.adapters import AdapterSpec
from protocol.weights.layout import MappedWeights

Positions: TypeAlias = NDArray[np.int64]
"""[n] of elements in a flat tensor, ascending."""


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
    reproducible: bool = True
    """Whether the request's seed alone decides what is sampled."""
    canaries: bool = False
    """Whether `load_weights` checks new weights against canaries."""
    full_weights: bool = True
    """Whether `load_weights` takes all weights of the model."""
    max_lora_rank: int = 0
    """Rank of the adapters that it takes, at most; 0: none."""
    max_length: int = 0
    """Tokens of a prompt and its completion together, at most; 0: any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """Counters since start (only grow) and four gauges."""

    samples_running: int = 0
    samples_waiting: int = 0
    tokens_generated: int = 0
    tokens_held: int = 0
    """Of those, sampled for requests that are not answered yet (a gauge)."""
    prompt_tokens: int = 0
    """Of all samples begun, the shared ones counted for each."""
    cached_prompt_tokens: int = 0
    """Of those, the ones whose keys and values were there already."""
    kv_usage: float = 0.0
    """Share of the KV cache in use (a gauge); 0 where it is not known."""
    restarts: int = 0
    busy_s: float = 0.0
    paused_s: float = 0.0
    occupancy_s: float = 0.0
    """Integral over time of samples_running / room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Canaries:
    """What the learner's model says of sequences to try new weights on (messages.WeightsReady)."""

    tokens: Int32
    """[N, L]"""
    logprobs: Float32
    """[N, L - 1] of tokens[:, 1:], temperature 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedWeights:
    """A complete, verified version on local disk or tmpfs: a safetensors file in the manifest's layout.

    All weights of the model, or an adapter to those that the engine was entered with.
    """

    version: Version
    path: Path
    mapped: MappedWeights | None = None
    """The file as this process has mapped it already: its pages are there."""
    digest: str = ""
    """Of the content: equal for equal tensors, whatever the version (manifest.content_digest)."""
    adapter: AdapterSpec | None = None
    canaries: Canaries | None = None
    checksums: tuple[str, ...] = ()
    """What other engines hold of this version (`LoadReport.checksum`)."""
    base: Version | None = None
    """The version that `changes` are relative to."""
    changes: Mapping[str, Positions] | None = None
    """Which elements differ from `base`: by tensor name, ascending positions in the flat tensor (C order); tensors that
    are not named are equal. Their new values are in the file. None: not known, everything is to be loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a swap took, and what the check of the new weights found."""

    pause_s: float
    """Nothing was sampled for so long."""
    check_s: float = 0.0
    checksum: str = ""
    """`kind:digest` of the weights as held; empty for an engine that copies them itself."""
    mismatch_kl: float | None = None
    """Mean of exp(d) - 1 - d over the canary tokens, d = learner's - engine's logprob."""
    mismatch: float | None = None
    """Mean of |d|."""


class EngineFailure(Exception):
    """The engine could not finish a request or a load. Its groups are returned; the engine restarts or stays as is."""


class SamplesWithheld(EngineFailure):
    """What was sampled must not leave the server, through no fault of the group: its weights failed their check."""


def empty_completion() -> Completion:
    """What an abort leaves of a sample that had not begun."""
    return Completion(
        completion_tokens=np.zeros(0, np.int32),
        behavior_logprobs=np.zeros(0, np.float32),
        spans=(),
        finish_reason=FinishReason.ABORT,
    )


class Engine(Protocol):
    """The contract. Entered once (loads the model), left once (stops everything it started)."""

    @property
    def info(self) -> EngineInfo:
        """Constant after entering."""

    @property
    def live(self) -> Version | None:
        """The version that samples the next token; None before the first `load_weights`, and after a loss."""

    @property
    def lost(self) -> Signal:
        """Notified when `live` became None: the engine restarts, and needs the newest weights loaded again."""

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

    async def load_weights(self, weights: StagedWeights) -> LoadReport:
        """Swap `weights` in without ending any request, and check them where the engine can.

        On return every later token is of `weights.version`, and `live` says so; an engine that keeps several adapters
        samples what it has begun to its end with the one it has, and says so in its spans. Where exactly `weights.base`
        is live, an engine may set the elements of `weights.changes` alone, to what the file has; what it then holds is
        bit for bit what the whole file would have given. On failure either the old version still serves, whole, or none
        is live (and `lost` is notified): never a part of one. While an engine restarts this waits for it.

        Raises:
            EngineFailure: names, shapes, dtypes or positions do not fit, the file cannot be read, or a check failed.
            ConfigError: it is an adapter to another base model: the server ends.
        """

    async def __aenter__(self) -> Self:
        """Load the model."""

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop; outstanding `generate` calls end with EngineFailure."""
