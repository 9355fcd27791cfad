"""Which servers fit a run. Pure: what Hello says against what the run is."""

from __future__ import annotations

from collections.abc import Sequence

from learner.leases import RunIdentity
from protocol.messages import Hello


def why_refused(hello: Hello, run: RunIdentity, reward_functions: Sequence[str]) -> tuple[str, str] | None:
    """Return (code, reason) when a server does not fit, else None.

    Args:
        hello: its introduction.
        run: what it must fit.
        reward_functions: those of the run, in order; empty while none are known.
    """
    if hello.run_id == run.run_id and hello.incarnation > run.incarnation:
        return "incarnation", f"it has worked for incarnation {hello.incarnation}; this is {run.incarnation}"
    if hello.engine == "scripted":
        if hello.vocab_size > run.vocab_size:
            return "model", f"it invents {hello.vocab_size} tokens, the model has {run.vocab_size}"
    elif (hello.vocab_size, hello.model_digest) != (run.vocab_size, run.model_digest):
        return "model", (
            f"its model has another shape (vocabulary {hello.vocab_size}, weights {hello.model_digest[:12]}) than"
            f" the learner's ({run.vocab_size}, {run.model_digest[:12]}): give both the same --model"
        )
    elif run.lora_rank > hello.max_lora_rank:
        takes = f"of rank {hello.max_lora_rank} at most" if hello.max_lora_rank else "of no rank"
        return "weights", (
            f"this run publishes an adapter of rank {run.lora_rank}, and its engine takes adapters {takes}: start it"
            f" with --max-lora-rank {run.lora_rank}"
        )
    elif not run.lora_rank and not hello.full_weights:
        return "weights", (
            "this run publishes all weights, and its engine takes adapters alone: start it without --max-lora-rank, or"
            " the learner with --use-peft"
        )
    elif hello.tokenizer_digest != run.tokenizer_digest:
        return "tokenizer", "its tokenizer has another vocabulary than the learner's: give both the same --model"
    if reward_functions and hello.reward_functions != tuple(reward_functions):
        return "reward_functions", (
            f"it scores with {', '.join(hello.reward_functions) or 'nothing'}; this run expects"
            f" {', '.join(reward_functions)}"
        )
    return None
