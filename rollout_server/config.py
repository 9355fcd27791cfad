"""The rollout server's configuration. Read through protocol/settings.py from TOML files and flags.

What is *not* here: prompts, sampling parameters, the optimizer. They come with each lease from the learner.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from protocol.addresses import is_local, tcp_address
from protocol.settings import is_set, no_effect

SGLANG_OWN = {
    "model-path": "is --model here",
    "model": "is --model here",
    "device": "is --device here",
    "dtype": "is --dtype here",
    "context-length": "is --max-model-length here",
    "host": "is always 127.0.0.1: nobody but this server needs it; run SGLang yourself and name it with --engine-url",
    "api-key": "is made up for each start",
    "admin-api-key": "is made up for each start",
    "config": "is a file with the keys made up for each start",
    "skip-tokenizer-init": "is always set: prompts and completions are token ids",
    "tokenizer-worker-num": "is always 1: pausing is not safe with more",
    "custom-weight-loader": "is always the one that brings in what a version changes",
    "weight-version": "is set with every version that the learner sends",
    "enable-lora": "is --max-lora-rank here",
    "max-lora-rank": "is --max-lora-rank here",
    "lora-target-modules": "is --lora-target-modules here",
    "lora-paths": "is nobody's to set: the learner sends the adapter",
}
"""Arguments of sglang.launch_server that the engine sets itself, and why nobody else may."""
LORA_TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SGLANG_WORDS = ("sglang", "weight_update_mode", "engine_start_s", "engine_probe_s", "engine_log", "max_lora_rank")
"""Keys that no other engine reads."""
DATA_PARALLEL = ("dp-size", "data-parallel-size", "dp")
SGLANG_NUMBERS = {
    "port": (range(65536), "from 0 to 65535 (0, or no port: a free one is found)"),
    "nnodes": (range(1, 1 << 16), "from 1 (1, or none given: SGLang runs on this host alone)"),
}
"""Those that the engine reads itself: what they may be."""
_NO_URL = "engine_url {url}: must be http://HOST:PORT, for example http://127.0.0.1:30000"


class Section(BaseModel):
    """Frozen, and every key must be known."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ScriptedOptions(Section):
    """The scripted engine: lengths, delays and failures drawn from a seed. For tests, benchmarks and dry runs."""

    seed: int = 0
    """Of everything the engine invents."""
    vocab_size: int = Field(1000, ge=4)
    """Tokens it pretends to know."""
    mean_length: float = Field(32.0, gt=0)
    """Median completion length, in tokens."""
    length_sigma: float = Field(0.5, ge=0)
    """Spread of the lognormal lengths; 0 makes all equal."""
    lengths: Path | None = None
    """Play the completion lengths of this file (protocol/length_trace.py) instead of drawing any: the learner needs
    the file's seed and num_generations, and its run may lease no more groups than the file has."""
    token_s: float = Field(0.0, ge=0)
    """Seconds per decode step of a single sample."""
    occupancy_cost: float = Field(0.0, ge=0)
    """A decode step takes token_s x (1 + occupancy_cost x running / room)."""
    swap_s: float = Field(0.0, ge=0)
    """Seconds that a weight swap pauses decoding."""
    fail_probability: float = Field(0.0, ge=0, le=1)
    """Of a group to fail with EngineFailure."""
    fail_load_probability: float = Field(0.0, ge=0, le=1)
    """Of a weight load to fail."""

    @model_validator(mode="after")
    def _check_lengths(self) -> ScriptedOptions:
        if self.lengths is not None and (
            given := [key for key in ("mean_length", "length_sigma") if is_set(self, key)]
        ):
            raise ValueError(
                f"{given[0]} {getattr(self, given[0])} with lengths {self.lengths}: the file says how long every"
                " completion is; leave one of them out"
            )
        return self


class ServerConfig(Section):
    """Serve rollouts: lease prompts, sample groups, score and return them. `headway-server keygen DIR` makes keys."""

    learner: str = "tcp://127.0.0.1:5555"
    """Address of the learner."""
    name: str = ""
    """Unique within the run; default is host name and process id."""
    model: str = ""
    """Directory of the Hugging Face model whose weights the learner sends. Required unless the engine is scripted."""
    engine: Literal["auto", "sglang", "transformers", "scripted"] = "auto"
    """sglang: a child process, or one that you run (engine_url). transformers: embedded, CPU or one GPU. scripted: no
    model at all. auto: sglang where there is CUDA (or an engine_url), else transformers."""
    room: int = Field(64, ge=1)
    """Samples decoded at once."""
    max_model_length: int = Field(2048, ge=2)
    """Tokens of prompt and completion together; bounds the KV cache."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the served weights. auto: bfloat16 where the hardware has it, else float32."""
    device: str = "auto"
    """auto is cuda where there is one, else cpu."""
    reward_funcs: list[str] = Field(default_factory=list)
    """What scores completions: built-in names (exact_match, math_equal, format, reasoning_gym),
    package.module.function, or path/to/file.py:function. Each has TRL's signature. Required."""
    reward_weights: list[float] = Field(default_factory=list)
    """One per function; default 1 each."""
    reward_workers: int = Field(2, ge=1)
    """Processes that run reward functions; one more is kept warm."""
    reward_timeout_s: float = Field(10.0, gt=0)
    """Wall-clock limit of one call; the worker is killed then."""
    reward_on_timeout: float | None = None
    """Value of a completion whose scoring timed out; default: no value. Policies learn to hang verifiers."""
    staging_dir: Path | None = None
    """Where incoming weights are assembled, and those of a learner beside this server are read where its staging_dir is
    the same; default a private directory on /dev/shm, else the temporary directory."""
    relay: str = ""
    """Pass new weights on to other servers from this address, for example tcp://*:5560 (any free port: tcp://*:0), so
    that the learner need not send them to every server. Others reach it at the host given here; `*`: at the one that
    this server's connection to the learner comes from. Empty: they do not."""
    log_file: Path | None = None
    """Also write the log there."""
    key: Path | None = None
    """Secret key of this server, made by `headway-server keygen DIR`: needed where the learner is on another host."""
    allowed_keys: Path | None = None
    """With relay: who may fetch from this server, one public key a line: the other servers' keys."""
    learner_key: Path | None = None
    """Public key of the learner, the .pub file that its keygen wrote; several lines while its key is being changed."""
    insecure_plaintext: bool = False
    """Allow a learner address, a relay address or an engine_url off loopback, unencrypted: for a closed lab only."""
    drain_s: float = Field(30.0, ge=0)
    """After SIGTERM or the learner's Drain: finish groups for so long, then return them."""
    weight_update_mode: Literal["retract", "in_place", "drain"] = "retract"
    """What an update of the weights does to samples under way in SGLang. retract: keys and values are computed again,
    later tokens are exactly the new version's. in_place: they are kept. drain: samples end before the swap."""
    engine_url: str = ""
    """Use the SGLang server at this address instead of starting one; it must see the staging directory. Started with
    --custom-weight-loader rollout_server.inside_sglang.load it can be given changed weights alone."""
    engine_api_key: str = ""
    """Of the server at engine_url. In a --config file it is not seen by others on the host, as a flag it is."""
    engine_admin_key: str = ""
    """Its --admin-api-key: without one anybody could load weights into it. Required with engine_url."""
    engine_start_s: float = Field(900.0, gt=0)
    """Within which SGLang must be up; it loads and compiles for minutes where the model is large."""
    engine_probe_s: float = Field(60.0, gt=0)
    """When SGLang stands still with work to do, it is asked for one token; without it in so long, it is restarted."""
    engine_log: Path | None = None
    """What SGLang prints; default a file in a private temporary directory, which is kept when SGLang fails."""
    max_lora_rank: int = Field(0, ge=0, le=1 << 16)
    """Serve LoRA adapters of up to this rank with SGLang (the learner's use_peft): each version is loaded beside those
    that samples under way still use, without a pause. 0: it takes all weights. Engine transformers takes both."""
    lora_target_modules: list[str] = Field(default_factory=lambda: list(LORA_TARGET_MODULES), min_length=1)
    """Layers that adapters may change in SGLang; those of dense Llama and Qwen models."""
    sglang: dict[str, Any] = Field(default_factory=dict)
    """Arguments of sglang.launch_server: --sglang.tp-size 2 is its --tp-size 2, --sglang.enable-metrics a bare flag."""
    scripted: ScriptedOptions = ScriptedOptions()
    """Behavior of the scripted engine."""

    @model_validator(mode="after")
    def _check_pairs(self) -> ServerConfig:
        if (self.key is None) != (self.learner_key is None):
            raise ValueError(
                f"key {self.key} and learner_key {self.learner_key}: give both or none; each side proves who it is"
            )
        if (self.allowed_keys is None) == bool(self.relay and self.key):
            raise ValueError(
                f"allowed_keys {self.allowed_keys}: it says who may fetch weights from the relay, so it goes with relay"
                " and key; give all three, or no allowed_keys"
            )
        if self.reward_weights and len(self.reward_weights) != len(self.reward_funcs):
            raise ValueError(
                f"reward_weights has {len(self.reward_weights)} entries for {len(self.reward_funcs)} reward_funcs:"
                " give one per function or none"
            )
        return self

    @model_validator(mode="after")
    def _check_sglang(self) -> ServerConfig:
        for key, value in self.sglang.items():
            _check_sglang_key(key)
            _check_sglang_number(key, value)
        self._check_adapters()
        if reason := next(self._unread(), ""):
            raise ValueError(reason)
        if not self.engine_url:
            return self
        if self.engine not in ("auto", "sglang"):
            raise ValueError(f"engine_url is set and engine is {self.engine}: leave one of them out")
        if self.sglang:
            raise ValueError(
                f"sglang.{next(iter(self.sglang))} is for an SGLang that this server starts, and engine_url names one"
                " that runs: give it the argument where it is started, or leave engine_url out"
            )
        if not self.engine_admin_key:
            raise ValueError(
                "engine_admin_key is empty: start the SGLang at engine_url with --admin-api-key KEY and give the same"
                " one here, --engine-admin-key KEY, for without it anybody could load weights into it"
            )
        _check_engine_url(self.engine_url, self.insecure_plaintext)
        return self

    def _check_adapters(self) -> None:
        if not self.max_lora_rank:
            return
        if self.engine not in ("auto", "sglang"):
            raise ValueError(
                f"max_lora_rank {self.max_lora_rank} is for engine sglang, and engine is {self.engine}, which takes"
                " adapters of any rank: leave it out"
            )
        for key, value in self.sglang.items():
            if key.replace("_", "-") in DATA_PARALLEL and value != 1:
                raise ValueError(
                    f"sglang.{key} {value} with max_lora_rank {self.max_lora_rank}: SGLang loads adapters while it runs"
                    " only without data parallelism; start several servers instead, one for each replica"
                )

    def _unread(self) -> Iterator[str]:
        """Say which words are set that nothing reads."""
        if self.engine in ("transformers", "scripted") and not self.engine_url:
            yield from no_effect(self, SGLANG_WORDS, "engine sglang")
        if not self.engine_url:
            yield from no_effect(self, ("engine_api_key", "engine_admin_key"), "engine_url")
        else:
            yield from no_effect(
                self, ("engine_log",), "an SGLang that this server starts, and engine_url names another"
            )
        if not self.max_lora_rank:
            yield from no_effect(self, ("lora_target_modules",), "engine sglang with max_lora_rank")
        if self.engine != "scripted":
            yield from no_effect(self, ("scripted",), "engine scripted")

    @property
    def sglang_words(self) -> list[str]:
        """Keys that are set and that only engine sglang reads."""
        return [key for key in SGLANG_WORDS if is_set(self, key)]

    @property
    def server_name(self) -> str:
        """The name, given or made up."""
        return self.name or f"{socket.gethostname()}-{os.getpid()}"

    @property
    def weights_of_rewards(self) -> tuple[float, ...]:
        """reward_weights with the default filled in."""
        return tuple(self.reward_weights) or (1.0,) * len(self.reward_funcs)


def _check_sglang_key(key: str) -> None:
    """Refuse a key that the engine sets itself, also shortened: SGLang takes --admin-api for --admin-api-key."""
    written = key.replace("_", "-")
    if not written.strip("-") or written.startswith("-"):
        raise ValueError(
            f"sglang.{key}: no argument of sglang.launch_server; write --sglang.tp-size 2 for its --tp-size 2"
        )
    name = written if written in SGLANG_OWN else next((name for name in SGLANG_OWN if name.startswith(written)), None)
    if name is not None:
        raise ValueError(f"sglang.{key}: {name} {SGLANG_OWN[name]}; leave it out")


def _check_sglang_number(key: str, value: Any) -> None:
    if key in SGLANG_NUMBERS:
        allowed, which = SGLANG_NUMBERS[key]
        if type(value) is not int or value not in allowed:  # True is an int, too
            raise ValueError(f"sglang.{key} = {value}: must be a whole number {which}")
    elif "port".startswith(key):
        raise ValueError(f"sglang.{key}: write sglang.port in full: this server calls it there")


def _check_engine_url(url: str, insecure_plaintext: bool) -> None:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # no host at all, or no number that a port can have
        raise ValueError(_NO_URL.format(url=url)) from None
    plain = parts.path in ("", "/") and not parts.query and not parts.fragment and parts.username is None
    if parts.scheme != "http" or not parts.hostname or not port or not plain:
        raise ValueError(_NO_URL.format(url=url))
    if not insecure_plaintext and not is_local(tcp_address(parts.hostname, port)):
        raise ValueError(
            f"engine_url {url}: {parts.hostname} is not loopback, and its keys and every prompt would travel in the"
            " clear: run SGLang on this host, http://127.0.0.1:PORT, or, in a closed lab only, add --insecure-plaintext"
        )
