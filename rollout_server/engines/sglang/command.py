"""The child's command line and environment. Pure.

Everything listens on loopback or on sockets in a private directory; keys go through a file that only this user reads,
not through the command line, which everybody on the host sees.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rollout_server.engines.sglang.sparse import LOADER

PRELUDE = (
    "import ctypes, os, signal, sys;"
    "ctypes.CDLL(None).prctl(1, signal.SIGKILL);"
    "os.getppid() == int(sys.argv[1]) or sys.exit('the rollout server has gone');"
    "os.execv(sys.executable, [sys.executable, '-m', 'sglang.launch_server', *sys.argv[2:]])"
)
"""Asks the kernel (PR_SET_PDEATHSIG = 1, kept over exec) to end SGLang with the rollout server, however that ends."""

Options = Mapping[str, Any]


def build_command(options: Options, *, parent: int) -> list[str]:
    """Write the command that starts SGLang as a child of process `parent`."""
    return [sys.executable, "-c", PRELUDE, str(parent), *to_flags(options)]


def build_options(
    *,
    model: Path,
    port: int,
    keys_file: Path,
    device: str,
    dtype: str,
    room: int,
    context_length: int,
    has_amx: bool,
    max_lora_rank: int,
    lora_target_modules: Sequence[str],
    chosen: Options,
) -> dict[str, Any]:
    """Put our options and the user's together; the user's win, as far as config.py lets them be set.

    Args:
        model: directory.
        port: on loopback.
        keys_file: see `keys_yaml`.
        device: cuda or cpu.
        dtype: of the served weights.
        room: samples decoded at once.
        context_length: tokens of prompt and completion.
        has_amx: whether this CPU has what SGLang's own CPU kernels need.
        max_lora_rank: of adapters; 0: there are none.
        lora_target_modules: layers that they may change.
        chosen: the user's.
    """
    seats = room + bool(max_lora_rank)  # canaries of an adapter must not wait until a sample of the one before ends
    options: dict[str, Any] = {
        "config": str(keys_file),
        "model-path": str(model),
        "host": "127.0.0.1",
        "port": port,
        "device": device,
        "dtype": dtype,
        "context-length": context_length,
        "max-running-requests": seats,
        "skip-tokenizer-init": True,
        "grammar-backend": "none",
        "sampling-defaults": "openai",
        "log-level": "warning",
    }
    if max_lora_rank:
        options |= {"enable-lora": True, "max-lora-rank": max_lora_rank, "lora-target-modules": lora_target_modules}
        if device == "cpu":
            options["lora-backend"] = "torch_native"  # all others are kernels for accelerators
    else:
        options["custom-weight-loader"] = [LOADER]
    if device == "cpu":
        options["sleep-on-idle"] = True  # its scheduler spins otherwise, and a CPU has other work
        options["max-total-tokens"] = seats * context_length  # what it measures to be free is half the machine
        if not has_amx:
            options["attention-backend"] = "torch_native"
    return options | {key.replace("_", "-"): value for key, value in chosen.items()}


def to_flags(options: Options) -> list[str]:
    """Write options as flags: true is a bare flag, false and none are left out, a list is several words."""
    words: list[str] = []
    for key, value in options.items():
        if value is None or value is False:
            continue
        words.append(f"--{key}")
        if isinstance(value, Sequence) and not isinstance(value, str):
            words += [_word(item) for item in value]
        elif value is not True:
            words.append(_word(value))
    return words


def keys_yaml(api_key: str, admin_key: str) -> str:
    """Write the file that SGLang reads its keys from."""
    return f"api-key: {json.dumps(api_key)}\nadmin-api-key: {json.dumps(admin_key)}\n"


def child_environment(inherited: Mapping[str, str], *, directory: Path, options: Options) -> dict[str, str]:
    """What the child's environment is: msgpack between SGLang's processes, sockets and rendezvous in `directory`.

    torch's rendezvous over TCP would listen on every interface; over a file it listens nowhere. An engine of several
    nodes needs the network, and keeps what its user set.
    """
    ours = {"SGLANG_USE_PICKLE_IPC": "0", "TMPDIR": str(directory)}
    if options.get("nnodes", 1) == 1:
        ours |= {
            "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{directory}/rendezvous",
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
        }
    return {**inherited, **ours}


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
