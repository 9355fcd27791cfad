"""Which servers fit a run. Pure: what Hello says against what the run is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from learner.leases import RunIdentity
from protocol.messages import Hello


class NameOwners:
    """Whose key a server's name belongs to: the first that used it, for as long as the allow-list has that owner."""

    def __init__(self) -> None:
        self._owners: dict[str, str] = {}

    def why_refused(self, name: str, owner: str, known: Callable[[str], bool]) -> tuple[str, str] | None:
        """Return (code, reason) when the name is somebody else's, else None, and bind it.

        Args:
            name: what the server calls itself.
            owner: who its key says it is; empty where there are no keys.
            known: whether the allow-list still has an owner.
        """
        if not owner:
            return None
        bound = self._owners.setdefault(name, owner)
        if bound == owner or not known(bound):
            self._owners[name] = owner
            return None
        return "name_in_use", (
            f"the name {name} belongs to the key of {bound}, and this server came with that of {owner}: give it another"
            " --name, or both keys the same name in the allow-list"
        )


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
