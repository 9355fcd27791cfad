"""The learner's configuration: TRL's words, flat, one docstring per knob (they are the --help).

Read through protocol/settings.py from TOML files and flags. Sections are classes, so that a part of the learner can
ask for the section it needs; keys are flat for the user. Checks that need two fields are at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from learner.config.algorithm import AlgorithmOptions
from learner.config.section import Section
from learner.staleness import Bounds, derive_bounds
from protocol.settings import is_set, no_effect


class ModelOptions(Section):
    """What is trained."""

    model: str = ""
    """Directory (or hub name) of a Hugging Face causal language model with its tokenizer. Required."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Master weights and optimizer states. bfloat16 loses small updates at RL learning rates."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Arithmetic of the forward and backward pass."""
    publish_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the weights the servers get. auto: bfloat16 when dtype or autocast is, else float32; an adapter's is
    float32."""
    device: str = "auto"
    """auto is cuda where there is one, else cpu."""
    share_prefix: bool = True
    """Forward the prompt once per group. False (or a model that cannot) pads every completion with its prompt."""
    attn_implementation: Literal["auto", "flex_attention"] = "auto"
    """How completions attend to a shared prompt. auto: torch's flash kernels on CPU, its masked attention elsewhere.
    flex_attention: one compiled call, for CUDA devices (tested for equality on CPU; no GPU has run it yet)."""
    loss_head: Literal["auto", "fused", "recompute"] = "auto"
    """fused computes the loss inside the output head, which then runs once: for losses that are sums over tokens.
    recompute runs it again in the backward pass: for any loss. auto: fused where it can be."""
    cast_lm_head_to_fp32: bool = False
    """Run the output head in float32 whatever dtype and autocast are, in policy and reference (ScaleRL)."""


class AdapterOptions(Section):
    """A LoRA adapter in place of all weights (arXiv 2106.09685)."""

    use_peft: bool = False
    """Train a LoRA adapter (float32) on the frozen model, and publish nothing else. Needs the package peft."""
    lora_r: int = Field(16, ge=1, le=1 << 16)
    """Rank."""
    lora_alpha: int = Field(32, ge=1, le=1 << 20)
    """The adapter counts lora_alpha / lora_r."""
    lora_target_modules: list[str] = Field(default_factory=list)
    """Names of the linear layers that get one, such as q_proj; empty is all of them but the output head."""
    publish: Literal["auto", "full", "adapter"] = "auto"
    """What servers are sent: all weights of the model, or the adapter. auto is what trains."""

    @model_validator(mode="after")
    def _check_adapter(self) -> AdapterOptions:
        if self.use_peft:
            if self.publish == "full":
                raise ValueError(
                    "publish full with use_peft: servers have the base model, and only the adapter is sent to them:"
                    " publish adapter (or auto), or train all weights, without use_peft"
                )
            return self
        given = [key for key in AdapterOptions.model_fields if key.startswith("lora_") and is_set(self, key)]
        if given or self.publish == "adapter":
            what = f"{given[0]} {getattr(self, given[0])!r}" if given else "publish adapter"
            raise ValueError(f"{what} without use_peft: there is no adapter; add use_peft, or leave it out")
        return self


class DataOptions(Section):
    """Where prompts come from."""

    dataset: str = ""
    """A .jsonl file, or reasoning_gym:<task>. Required. Rows need the prompt column; all other columns go to the
    reward functions."""
    dataset_config: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the reasoning_gym task (for example size, seed, min_value)."""
    eval_dataset: str = ""
    """Like dataset; empty for no evaluation."""
    eval_dataset_config: dict[str, Any] = Field(default_factory=dict)
    """Like dataset_config, for eval_dataset."""
    prompt_column: str = "prompt"
    """Column with the prompt: a string, or a list of chat messages (then the chat template is applied)."""
    prompt_format: Literal["auto", "text", "chat"] = "auto"
    """auto: strings are plain text, lists are chats. chat: a string becomes one user message."""
    max_prompt_length: int = Field(1024, ge=1)
    """Tokens. Longer rows are filtered and counted, never cut."""
    shuffle: bool = True
    """Permute the rows in every epoch, by seed. False: file order."""


class GenerationOptions(Section):
    """What a lease asks for."""

    num_generations: int = Field(64, ge=1)
    """G: completions sampled per prompt. At least 2, except with advantage_estimator gae."""
    max_completion_length: int = Field(4096, ge=1)
    """Tokens, stop token included."""
    temperature: float = Field(1.0, gt=0)
    """Logprobs everywhere are those of softmax(logits / temperature)."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Below 1 is refused for training: the logprobs would not be those of the whole softmax."""
    top_k: int = Field(0, ge=0)
    """Above 0 is refused for training, as top_p."""
    min_p: float = Field(0.0, ge=0, lt=1)
    """Above 0 is refused for training, as top_p."""
    stop: list[str] = Field(default_factory=list)
    """Texts that end a completion, each a single token of the vocabulary. The model's end-of-sequence always does."""


class AsynchronyOptions(Section):
    """The staleness dial."""

    prompts_per_step: int = Field(8, ge=1)
    """P: groups per training step; samples per step = prompts_per_step x num_generations."""
    max_staleness: int = Field(4, ge=0)
    """Hard bound, in steps, between the weights that sampled a group's oldest token and the weights trained with it.
    Higher: both sides wait less, data is older. 0 is synchronous."""
    reorder_window: int | None = Field(None, ge=1)
    """W: how far a finished group may overtake. Useful: j x prompts_per_step + 1. Default: derived."""
    staleness_policy: Literal["wait", "drop"] = "wait"
    """wait: a step waits for the groups whose turn it is; nothing is dropped, so long completions train as often as
    they were leased. drop: a step takes whatever has finished, and what has become older than max_staleness ends
    `stale`, counted: fewer long completions train (tuning/README.md has figures). max_staleness is hard with both."""
    staleness_control: Literal["off", "auto"] = "off"
    """auto: move how many steps rollouts run ahead, inside the bound, by what both sides wait for and how good the data
    is (learner/tuning/README.md). off: as far as max_staleness allows."""
    weight_sync_steps: int = Field(1, ge=1)
    """Publish every k-th version."""
    max_attempts: int = Field(3, ge=1)
    """Leases per group before it is quarantined."""
    buffer_bytes: int = Field(4 << 30, ge=1 << 20)
    """Reserved for worst-case groups when they are leased; too little lowers how far rollouts run ahead."""

    @property
    def bounds(self) -> Bounds:
        """What follows from the dial, before the byte budget."""
        return derive_bounds(
            max_staleness=self.max_staleness,
            prompts_per_step=self.prompts_per_step,
            reorder_window=1 if self.staleness_policy == "drop" else self.reorder_window,
            weight_sync_steps=self.weight_sync_steps,
        )

    @model_validator(mode="after")
    def _check_policies(self) -> AsynchronyOptions:
        if self.staleness_policy == "drop" and self.reorder_window is not None:
            raise ValueError(
                f"reorder_window {self.reorder_window} with staleness_policy drop: nothing waits for its turn there, so"
                " there is no window; leave reorder_window out, or use staleness_policy wait"
            )
        if self.staleness_control == "auto" and self.bounds.steps_ahead == self.bounds.lowest_depth:
            raise ValueError(
                f"staleness_control auto with max_staleness {self.max_staleness}: rollouts run exactly"
                f" {self.bounds.steps_ahead} steps ahead, nothing can be moved; raise max_staleness, or leave it out"
            )
        return self


class OptimizerOptions(Section):
    """The training recipe."""

    max_steps: int = Field(100, ge=1)
    """Training steps of the run."""
    learning_rate: float = Field(1e-6, gt=0)
    """Peak, after warm-up."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: stay, or fall towards 0, which comes right after the last step."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    optim: Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = "adamw"
    """AdamW with states in the weights' dtype, in 8 bits (a quarter of the memory), or in memory that a CUDA device
    pages out to the host when it is short. All but adamw need bitsandbytes."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """AdamW."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW, on matrices only."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    token_budget: int = Field(8192, ge=1)
    """Tokens per micro-batch, on each rank: memory against speed, never the result."""
    gradient_checkpointing: bool = False
    """Run every layer again in the backward pass instead of keeping its activations: a third more time for a fraction
    of the memory, never the result."""
    activation_offloading: bool = False
    """Keep activations in the host's memory until the backward pass, for CUDA devices; with gradient_checkpointing only
    the layers' inputs. Never the result (tested for equality on CPU; no GPU has run it yet)."""


class EvaluationOptions(Section):
    """Evaluation during training; its leases hold no slots."""

    eval_steps: int = Field(0, ge=0)
    """Evaluate every so many steps; 0 only before the first step and after the last (each pinned to one version)."""
    eval_size: int = Field(0, ge=0)
    """Use the first so many rows of eval_dataset; 0 is all of them."""
    eval_num_generations: int = Field(1, ge=1)
    """Completions per prompt."""
    eval_temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    eval_max_completion_length: int | None = Field(None, ge=1)
    """Default: max_completion_length."""


class RunOptions(Section):
    """The run directory and its contents."""

    output_dir: Path = Path("runs")
    """The run directory is output_dir/run_name."""
    run_name: str = ""
    """Default: made of the model's and the data set's names. An existing run of that name is continued."""
    seed: int = Field(0, ge=0)
    """Of prompt order, of sampling, of the trainer."""
    keep_versions: int = Field(0, ge=0)
    """Newest published versions whose deltas are kept on disk: `headway-learner weights` restores any of them as long
    as a checkpoint is left that they lead to. 0: checkpoints only."""
    save_steps: int = Field(50, ge=1)
    """Checkpoint every so many steps, and at the end."""
    save_total_limit: int = Field(2, ge=1)
    """Checkpoints kept."""
    num_completions_logged: int = Field(8, ge=0)
    """Completions per step written to samples/."""
    resume: Literal["requeue", "replay"] = "requeue"
    """What becomes of the steps after the checkpoint when a learner was killed. requeue: they are left, and what is in
    the journal trains again in whatever order it comes. replay: they are trained again as they were, before anything
    else, and no group is sampled twice; the same bits on a CPU."""
    allow_changed: list[str] = Field(default_factory=list)
    """Keys that may differ from the run being continued."""


class NetworkOptions(Section):
    """Where the learner listens."""

    bind: str = "tcp://127.0.0.1:5555"
    """tcp://HOST:PORT or ipc:///PATH; weights go over the next port (or PATH-weights)."""
    key: Path | None = None
    """Secret key of this learner, which `headway-learner keygen DIR` makes: needed where servers are on other hosts."""
    allowed_keys: Path | None = None
    """File with the public keys of the servers that may connect, one a line: the lines of their .pub files. Read again
    when it changes; a key that is removed loses its connections."""
    staging_dir: Path | None = None
    """Where published versions lie; default a private directory on /dev/shm, else the temporary directory. Servers of
    this user on this host whose staging_dir is the same read them there."""
    insecure_plaintext: bool = False
    """Allow an address off loopback without keys. Anyone who can reach the port can then read the weights and feed
    you data: for a closed lab only."""
    delta_weights: Literal["auto", "always", "never"] = "auto"
    """Send what changed of the weights instead of all of them. auto: where measured density and link speed say that it
    is sooner there."""
    reward_funcs: list[str] = Field(default_factory=list)
    """Names of the reward functions that every server must have, in order; empty accepts what the first one has."""
    heartbeat_s: float = Field(1.0, gt=0)
    """Interval of heartbeats."""
    liveness_s: float = Field(5.0, gt=0)
    """Silence after which a server is dead and its leases go to others."""
    server_wait_s: float = Field(0.0, ge=0)
    """Stop when no server has been connected for so long; 0 waits for ever, saying so."""


class RankOptions(Section):
    """Several learner processes under torchrun."""

    collective_timeout_s: float = Field(600.0, gt=0)
    """A rank that is not heard of for so long while others wait for it ends the run; longer than rank 0 takes to hash a
    checkpoint. One that dies is noticed at once. transformers calls it ddp_timeout."""
    context_parallel_size: int = Field(1, ge=1)
    """Ranks that divide the tokens of every row among them, and the model's heads: memory for long sequences, never
    the result."""


class LearnerConfig(
    ModelOptions, AdapterOptions, DataOptions, GenerationOptions, AlgorithmOptions, AsynchronyOptions, OptimizerOptions,
    EvaluationOptions, RunOptions, NetworkOptions, RankOptions,
):  # fmt: skip
    """Train a language model with GRPO on groups that rollout servers stream in."""

    @model_validator(mode="after")
    def _check_pairs(self) -> LearnerConfig:
        if self.top_p < 1 or self.top_k > 0 or self.min_p > 0:
            raise ValueError(
                f"top_p {self.top_p}, top_k {self.top_k}, min_p {self.min_p}: training needs the whole softmax"
                " (top_p 1, top_k 0, min_p 0), else behavior logprobs are not those of the policy"
            )
        if (self.key is None) != (self.allowed_keys is None):
            raise ValueError(
                f"key {self.key} and allowed_keys {self.allowed_keys}: give both or none; each side proves who it is"
            )
        if self.liveness_s < 2 * self.heartbeat_s:
            raise ValueError(f"liveness_s {self.liveness_s} must be at least twice heartbeat_s {self.heartbeat_s}")
        if self.use_peft and self.sync_ref_model:
            raise ValueError(
                "sync_ref_model with use_peft: the reference is the base model under the adapter, which does not move;"
                " leave sync_ref_model out, or train all weights, without use_peft"
            )
        if self.use_peft and self.keep_versions:
            raise ValueError(
                "keep_versions with use_peft: adapters are small, and every checkpoint has one: lower save_steps"
            )
        if self.use_peft and self.has_critic:
            raise ValueError(
                "advantage_estimator gae with use_peft: the critic trains all its weights; use another"
                " advantage_estimator, or train all weights, without use_peft"
            )
        if self.num_generations < self.min_scored:
            raise ValueError(
                f"num_generations {self.num_generations}: one completion compares with nothing; use at least"
                f" {self.min_scored}, or advantage_estimator gae, whose critic takes the place of a group"
            )
        if self.num_mini_batches > self.prompts_per_step:
            raise ValueError(
                f"num_mini_batches {self.num_mini_batches} of prompts_per_step {self.prompts_per_step} groups: a"
                " mini-batch holds at least one group"
            )
        if self.soft_punish_cache > self.max_completion_length:
            raise ValueError(
                f"soft_punish_cache {self.soft_punish_cache} must be at most max_completion_length"
                f" {self.max_completion_length}"
            )
        if self.loss_head == "fused" and not self.token_level:
            raise ValueError(
                "loss_head fused computes the loss token by token, and this one looks at whole completions or at the"
                " entropy (importance_sampling_level sequence, a sequence_ or geometric_ importance_sampling_mode,"
                " loss_function, entropy_coef): use loss_head auto or recompute"
            )
        if reason := next(self._unread_words(), ""):
            raise ValueError(reason)
        _ = self.granted_bounds  # refuses what cannot progress
        return self

    def _unread_words(self) -> Iterator[str]:
        """Say which words are set that nothing reads; AlgorithmOptions has more."""
        if not self.eval_dataset:
            yield from no_effect(self, ("eval_dataset_config", *EvaluationOptions.model_fields), "eval_dataset")
        if not self.share_prefix:
            yield from no_effect(self, ("attn_implementation",), "share_prefix")
        if self.device == "cpu":
            yield from no_effect(self, ("activation_offloading",), "a CUDA device")

    @property
    def name(self) -> str:
        """The run's name, given or made up."""
        made_up = f"{Path(self.model).name or 'model'}-{Path(self.dataset).stem.replace(':', '-') or 'data'}"
        return self.run_name or made_up

    @property
    def run_dir(self) -> Path:
        """Where everything the run writes is."""
        return self.output_dir / self.name

    @property
    def published_dtype(self) -> str:
        """publish_dtype, resolved."""
        if self.publish_dtype != "auto":
            return self.publish_dtype
        if self.use_peft:
            return "float32"
        return "bfloat16" if "bfloat16" in (self.dtype, self.autocast) else "float32"

    @property
    def group_bytes(self) -> int:
        """Upper bound of one group in memory: token, logprob, mask, step reward, a span per token, and its prompt."""
        per_token = 4 + 4 + 1 + 4 + 12
        return self.num_generations * (self.max_completion_length * per_token + 64) + 4 * self.max_prompt_length

    @property
    def granted_bounds(self) -> Bounds:
        """The bounds after the byte budget: S lowered until slots_total worst-case groups fit."""
        bounds = self.bounds
        affordable = math.floor(self.buffer_bytes / (self.group_bytes * self.prompts_per_step)) - 1
        if affordable >= bounds.steps_ahead:
            return bounds
        if affordable < max(0, bounds.weight_sync_steps - 1):
            groups = bounds.weight_sync_steps * self.prompts_per_step
            raise ValueError(
                f"buffer_bytes {self.buffer_bytes} does not hold {groups} worst-case groups, with fewer of which no"
                f" step can train: it must be at least {groups * self.group_bytes}, or num_generations or"
                " max_completion_length smaller"
            )
        return Bounds(
            prompts_per_step=bounds.prompts_per_step,
            max_staleness=bounds.max_staleness,
            reorder_window=bounds.reorder_window if affordable >= bounds.weight_sync_steps else 1,
            steps_ahead=affordable,
            weight_sync_steps=bounds.weight_sync_steps,
        )
