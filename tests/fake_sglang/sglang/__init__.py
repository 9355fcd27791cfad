"""A fake SGLang: first on PYTHONPATH, `python -m sglang.launch_server` starts it in 0.1 s. Standard library only.

It answers the calls that rollout_server/engines/sglang/client.py makes as SGLang 0.5.23 does:

- weights.py     The weights are the digest of a safetensors file. Tokens and logprobs are functions of that digest, so
                 that tests can compute both and tell versions apart. A logprob also depends on the digest under which
                 the keys and values of its prompt were computed: a stale prefix shows.
- scheduler.py   One step samples a token for every running sample; a step takes token_s. At most
                 --max-running-requests run, at most --max-total-tokens are held: who does not fit waits, and when
                 running samples no longer fit the youngest is retracted. Prompts are cached by (extra_key, prompt).
                 pause retract puts the running ones back in the queue (a retraction); in_place keeps them, and the
                 token that was being sampled, perhaps the first, comes after the update, sampled by the old weights
                 but counted to the new ones. Without a pause an update waits for all to end. A cache that cannot be
                 flushed is a failed update whose weights are there all the same.
                 Adapters are loaded beside each other and stay what they are for whoever samples with them; to unload
                 one waits for its samples.
- few.py         The custom weight loader: map, compare and apply on the bytes of the file.
- launch_server.py  Flags (an unknown one: usage, exit code 2), keys from the --config file, HTTP, the worker process
                 `sglang::scheduler` without which nothing is sampled any more, a file of its own in /dev/shm.

Faults are fields of `Faults`, set at start by the environment variable FAKE_SGLANG (JSON) and later by POST /fake with
the same JSON; GET /fake tells how often every path was called, how many calls `hold` keeps, and the bodies of
/generate. No key is asked for /fake. Who hangs up is not noticed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Faults:
    """What goes wrong, and how fast the rest goes."""

    token_s: float = 0.001
    """Seconds that a step takes."""
    version: str = "0.5.23"
    max_tokens: int = 0
    """Held at once, instead of --max-total-tokens; 0 is off."""
    stop_at: int = 0
    """Samples get no more tokens than these; 0 is off."""
    says: dict[str, Any] = field(default_factory=dict)
    """Of itself in /server_info and /model_info, whatever is true."""
    slow_start_s: float = 0.0
    """Before the port is opened."""
    die: int | None = None
    """Exit with that code, after a line on stderr: at start, or when told."""
    hang: bool = False
    """Sample nothing, answer everything else."""
    fail_update: str = ""
    """What every update of the weights fails with."""
    wrong: str = ""
    """"stale": an update keeps the old weights; "other": it loads others than told; both say that all went well."""
    orders: dict[str, str] = field(default_factory=dict)
    """Order to the custom weight loader -> what it fails with; empty: it is not answered."""
    foreign: str = ""
    """A label that every token gets instead of its weights'."""
    refuse: dict[str, int] = field(default_factory=dict)
    """Path -> status of every call of it."""
    garbage: list[str] = field(default_factory=list)
    """Paths that answer with something else than what is asked for."""
    no_loads: bool = False
    """/v1/loads names no scheduler."""
    drop: str = ""
    """Hang up once on a call of /generate: "prefill" or "sample", as it comes."""
    lose: int = 0
    """So many running samples are forgotten; who asked for them waits for ever."""
    hold: list[str] = field(default_factory=list)
    """Paths whose calls are not begun until they are no longer in this list."""
