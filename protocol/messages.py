"""What the two processes say to each other: frozen, typed, validated when built and when decoded.

    server -> learner   Hello, Group, Return
    learner -> server   Welcome, Refused, Lease, Ack, Cancel
    both ways           Ping, Pong, Drain, Goodbye, Fault
    of new weights      see weights_messages.py

A message is one small msgpack header (its scalar fields, by name), then its array fields as raw little-endian frames:
large ones one by one, small ones in one (see codec.py). Array fields of a decoded message are read-only views of the
received frames. Shapes: G generations of the group, N completions in this message (N = G unless the group travels in
parts), T their tokens in all, K version spans, F reward functions. Arrays that a field does not need are None and cost
nothing.
"""

from __future__ import annotations

import msgspec

from protocol.kinds import AckStatus as AckStatus
from protocol.kinds import FinishReason as FinishReason
from protocol.kinds import Float32 as Float32
from protocol.kinds import Int32 as Int32
from protocol.kinds import Purpose as Purpose
from protocol.kinds import RewardStatus as RewardStatus
from protocol.kinds import UInt8 as UInt8
from protocol.kinds import UInt16 as UInt16
from protocol.kinds import WeightsPath as WeightsPath
from protocol.versions import Version
from protocol.weights_messages import Message as Message
from protocol.weights_messages import WeightsChunk as WeightsChunk
from protocol.weights_messages import WeightsFailed as WeightsFailed
from protocol.weights_messages import WeightsLive as WeightsLive
from protocol.weights_messages import WeightsLost as WeightsLost
from protocol.weights_messages import WeightsReady as WeightsReady
from protocol.weights_messages import WeightsRequest as WeightsRequest
from protocol.weights_messages import WeightsStaged as WeightsStaged
from protocol.weights_messages import WeightsSwap as WeightsSwap


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every sampling parameter, always explicit: an engine has no defaults of its own."""

    temperature: float = 1.0
    """0 is greedy; the logprobs are then those of temperature 1."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    max_completion_length: int
    stop_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse ranges that no engine can sample from."""
        if not (self.temperature >= 0.0 and self.temperature < 1e3):
            raise ValueError(f"temperature {self.temperature}: allowed is 0 (greedy) up to 1000")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p {self.top_p}: allowed is 0 < top_p <= 1")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k}: allowed is 0 (off) or more")
        if not 0.0 <= self.min_p < 1.0:
            raise ValueError(f"min_p {self.min_p}: allowed is 0 <= min_p < 1")
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length {self.max_completion_length}: must be >= 1")

    @property
    def truncates(self) -> bool:
        """Whether the engine samples from less than the whole softmax (refused for training leases)."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


class Hello(Message, frozen=True, kw_only=True):
    """First message of a connection. A reconnecting server says Hello again, with a fresh session."""

    session: str
    """Names this connection in both logs: `identity.session_name` of the process and the number of the connection."""
    server: str
    """Stable name of the server process, unique within the run."""
    engine: str
    room: int
    """Samples that the engine decodes at once."""
    vocab_size: int
    model_digest: str
    """Digest of names, shapes of the weights the engine serves (`protocol.weights.manifest.schema_digest`)."""
    tokenizer_digest: str
    """Digest of the vocabulary (`tokenizer_digest`); empty for an engine without one."""
    canaries: bool = False
    """Whether its engine checks new weights against canaries: WeightsReady then brings them."""
    full_weights: bool = True
    """Whether its engine takes versions that are all weights of the model."""
    max_lora_rank: int = 0
    """Rank of the adapters that its engine takes, at most; 0: it takes none."""
    reward_functions: tuple[str, ...]
    run_id: str = ""
    """The run this server worked for before this connection; empty at its first Hello."""
    incarnation: int = 0
    """The highest learner incarnation it has seen in that run: a lower one is fenced off."""
    live: Version | None = None
    unacked: tuple[str, ...] = ()
    """Group ids finished but not acknowledged."""
    in_flight: tuple[str, ...] = ()
    """Group ids being generated or scored."""
    relay_address: str = ""
    """Where this server passes versions on to others (host `*`: the one its connection comes from); empty: nowhere."""


class Welcome(Message, frozen=True, kw_only=True):
    """Answer to Hello: the server belongs to the run."""

    session: str
    run_id: str
    incarnation: int
    keep: tuple[str, ...] = ()
    """Of the group ids in Hello, those still wanted. The server sends the finished ones again and drops the rest."""
    heartbeat_s: float = 1.0
    liveness_s: float = 5.0


class Refused(Message, frozen=True, kw_only=True):
    """Answer to Hello: the server does not fit this run. Final until someone changes a configuration."""

    code: str
    """protocol_version, model, weights, tokenizer, reward_functions, incarnation, name_in_use or hello_required."""
    reason: str


class Lease(Message, frozen=True, kw_only=True):
    """Permission and order to produce one group."""

    group_id: str
    ordinal: int
    sequence: int
    """Lease sequence number; for eval leases the row index."""
    attempt: int
    purpose: Purpose
    num_generations: int
    sampling: Sampling
    seed: int
    """Seed of the group, 63 bits; sample i draws from `sample_seed(seed, i)`."""
    min_version: Version
    """No token may be sampled by older weights. The learner only leases to servers live at or above it."""
    prompt_tokens: Int32
    """[P] token ids; the server never tokenizes a prompt."""
    row: UInt8
    """UTF-8 JSON {"prompt": str | messages, "columns": {...}}: what reward functions are given."""

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        if self.num_generations < 1:
            raise ValueError(f"num_generations {self.num_generations}: must be >= 1")
        if self.prompt_tokens.ndim != 1 or self.prompt_tokens.size == 0:
            raise ValueError(f"prompt_tokens has shape {self.prompt_tokens.shape}: expected [P] with P >= 1")


class Group(Message, frozen=True, kw_only=True):
    """The scored completions of one prompt, or a part of them.

    A large group travels in `num_parts` messages, each with some of the completions; `completion_index` says which.
    """

    group_id: str
    ordinal: int
    sequence: int
    attempt: int
    purpose: Purpose
    num_generations: int
    """G, also in a part."""
    temperature: float
    """The T of all logprobs: they are of softmax(logits / T)."""
    reward_names: tuple[str, ...]
    """[F]"""
    part: int = 0
    num_parts: int = 1
    generate_s: float = 0.0
    """From the first token wanted to the last one sampled, queueing in the engine included."""
    reward_s: float = 0.0
    notes: tuple[str, ...] = ()
    """At most a few short texts: the first error of each reward function."""

    completion_index: Int32
    """[N] which of the G generations each completion is."""
    completion_lengths: Int32
    """[N] tokens of each completion, stop token included; sums to T."""
    completion_tokens: Int32
    """[T]"""
    behavior_logprobs: Float32
    """[T] natural log, by the engine that sampled."""
    finish_reasons: UInt8
    """[N] FinishReason"""
    span_counts: Int32
    """[N] version spans of each completion; sums to K."""
    span_lengths: Int32
    """[K] tokens of each span, in order; those of a completion sum to its length."""
    span_versions: Int32
    """[K, 2] (incarnation, policy_version) that sampled the span."""
    rewards: Float32
    """[N] weighted sum over the functions with a value; 0 where `scored` is 0."""
    scored: UInt8
    """[N] 1 where at least one reward function gave a value."""
    reward_values: Float32
    """[N, F] 0 where the status is not OK (or a value was set by reward_on_timeout: status stays TIMEOUT)."""
    reward_statuses: UInt8
    """[N, F] RewardStatus"""
    reward_seconds: Float32
    """[N, F] wall-clock seconds of the call that scored it, divided by the completions in that call."""

    loss_mask: UInt8 | None = None
    """[T] 0 for tokens an environment or a tool wrote; None: every token was sampled by the policy."""
    step_rewards: Float32 | None = None
    """[T] process reward of the step that ends with that token, NaN where none does; None: rewards are outcomes."""
    sampling_mask: UInt8 | None = None
    """Reserved: the support of truncated sampling."""
    routed_experts: UInt16 | None = None
    """Reserved: MoE routing to replay."""


class Ack(Message, frozen=True, kw_only=True):
    """The learner has dealt with a group."""

    group_id: str
    attempt: int
    status: AckStatus
    reason: str = ""


class Return(Message, frozen=True, kw_only=True):
    """The server gives a lease back unanswered."""

    group_id: str
    attempt: int
    reason: str
    fault: bool = True
    """Whether it counts as one of the group's attempts (a drain does not)."""


class Cancel(Message, frozen=True, kw_only=True):
    """The learner no longer wants a group."""

    group_id: str
    attempt: int
    reason: str


class ServerStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a server says of itself with every Ping. Counters are since its start and only grow."""

    samples_running: int = 0
    samples_waiting: int = 0
    groups_in_flight: int = 0
    groups_unacked: int = 0
    groups_finished: int = 0
    tokens_generated: int = 0
    tokens_held: int = 0
    """Of those, the ones sampled for groups that are not finished yet (a gauge)."""
    prompt_tokens: int = 0
    """Of all samples begun, the shared ones counted for each."""
    cached_prompt_tokens: int = 0
    """Of those, the ones whose keys and values were there already."""
    kv_usage: float = 0.0
    """Share of the engine's KV cache in use; a gauge, 0 where it is not known."""
    engine_restarts: int = 0
    wall_s: float = 0.0
    busy_s: float = 0.0
    """The engine was decoding or prefilling."""
    paused_s: float = 0.0
    """The engine stood still for a weight swap."""
    occupancy_s: float = 0.0
    """Integral over time of samples_running / room."""
    idle_lease_s: float = 0.0
    """Integral of the share of seats that were empty because nothing more was leased. The four of these and
    occupancy_s sum to wall_s, within a step of the engine."""
    idle_engine_s: float = 0.0
    """Same, while samples waited that the engine had not begun: a swap, a prompt being computed, a full cache."""
    idle_rewards_s: float = 0.0
    """Same, while all that was left to do was to score what had been sampled."""
    idle_weights_s: float = 0.0
    """Same, while no weights were live."""
    reward_timeouts: int = 0
    reward_errors: int = 0
    malformed: int = 0
    loop_lag_ms: float = 0.0
    """p99 lateness of the event loop (I9) over the last interval."""
    waiting_for: str = ""


class Ping(Message, frozen=True, kw_only=True):
    """Heartbeat. Any traffic counts as life; a Ping makes sure there is some."""

    sent_s: float
    """Sender's monotonic clock."""
    status: ServerStatus | None = None


class Pong(Message, frozen=True, kw_only=True):
    """Answer to Ping, with its time."""

    sent_s: float


class Drain(Message, frozen=True, kw_only=True):
    """From a server: give me no more leases. From the learner: finish or return what you have; the run ends."""

    reason: str


class Goodbye(Message, frozen=True, kw_only=True):
    """The sender closes the connection on purpose."""

    reason: str


class Fault(Message, frozen=True, kw_only=True):
    """Something went wrong that the other side should know and show; the connection goes on."""

    code: str
    reason: str


AnyMessage = (
    Hello | Welcome | Refused | Lease | Group | Ack | Return | Cancel | WeightsReady | WeightsRequest | WeightsChunk
    | WeightsStaged | WeightsSwap | WeightsLive | WeightsFailed | WeightsLost | Ping | Pong | Drain | Goodbye | Fault
)  # fmt: skip
