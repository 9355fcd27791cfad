"""The child's command line, keys and environment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.engines.sglang.command import (
    build_command,
    build_options,
    child_environment,
    keys_yaml,
    to_flags,
)


def make_options(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "model": Path("/models/m"), "port": 31000, "keys_file": Path("/private/keys.yaml"), "device": "cuda",
        "dtype": "bfloat16", "room": 64, "context_length": 2056, "has_amx": False, "chosen": {},
        "max_lora_rank": 0, "lora_target_modules": ["q_proj"],
    }  # fmt: skip
    return build_options(**{**fields, **changes})


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"a-b": True}, ["--a-b"]),
        ({"a": False, "b": None}, []),
        ({"a": 3, "b": 0.5, "c": "x y"}, ["--a", "3", "--b", "0.5", "--c", "x y"]),
        ({"a": [1, 2], "b": ["x", "y"]}, ["--a", "1", "2", "--b", "x", "y"]),
        ({"a": {"x": True}}, ["--a", '{"x": true}']),
        ({"a": ""}, ["--a", ""]),
        ({"a": 0}, ["--a", "0"]),
    ],
)
def test_options_become_flags(options: dict[str, Any], flags: list[str]) -> None:
    assert to_flags(options) == flags


def test_adapters_are_made_room_for() -> None:
    assert not [key for key in make_options() if "lora" in key]
    options = make_options(max_lora_rank=8, lora_target_modules=["q_proj", "v_proj"])
    assert {key: value for key, value in options.items() if "lora" in key} == {
        "enable-lora": True, "max-lora-rank": 8, "lora-target-modules": ["q_proj", "v_proj"],
    }  # fmt: skip
    assert options["max-running-requests"] == 65, "a seat for canaries"
    assert make_options(max_lora_rank=8, device="cpu")["lora-backend"] == "torch_native"


def test_whole_weights_can_come_as_few_changes_and_adapters_cannot() -> None:
    flags = to_flags(make_options())
    assert flags[flags.index("--custom-weight-loader") + 1] == "rollout_server.inside_sglang.load"
    assert "custom-weight-loader" not in make_options(max_lora_rank=8)


def test_only_loopback_is_listened_on_and_no_key_is_on_the_command_line() -> None:
    command = build_command(make_options(), parent=17)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--config") + 1] == "/private/keys.yaml"
    assert not any("key" in word for word in command if word.startswith("--"))


def test_the_users_options_win_whichever_way_they_are_written() -> None:
    options = make_options(chosen={"max_running_requests": 7, "log-level": "info", "tp-size": 2})
    assert options["max-running-requests"] == 7
    assert options["log-level"] == "info"
    assert options["tp-size"] == 2
    assert not any("_" in key for key in options)


def test_a_cpu_gets_what_it_needs_and_a_gpu_does_not() -> None:
    cpu = make_options(device="cpu")
    assert (cpu["attention-backend"], cpu["max-total-tokens"], cpu["sleep-on-idle"]) == (
        "torch_native",
        64 * 2056,
        True,
    )
    assert "attention-backend" not in make_options(device="cpu", has_amx=True)
    assert {"attention-backend", "max-total-tokens", "sleep-on-idle"} & set(make_options()) == set()


@given(st.text(st.characters(codec="ascii")), st.text(st.characters(codec="ascii")))
def test_keys_survive_the_file(api_key: str, admin_key: str) -> None:
    lines = dict(line.split(": ", 1) for line in keys_yaml(api_key, admin_key).splitlines())
    assert {name: json.loads(value) for name, value in lines.items()} == {
        "api-key": api_key,
        "admin-api-key": admin_key,
    }


def test_the_environment_keeps_sockets_private_and_the_rest_as_it_is() -> None:
    inherited = {"PATH": "/bin", "TMPDIR": "/tmp", "NCCL_SOCKET_IFNAME": "eth0"}
    one_node = child_environment(inherited, directory=Path("/private"), options={})
    assert one_node["PATH"] == "/bin"
    assert one_node["TMPDIR"] == "/private"
    assert one_node["SGLANG_USE_PICKLE_IPC"] == "0"
    assert one_node["NCCL_SOCKET_IFNAME"] == one_node["GLOO_SOCKET_IFNAME"] == "lo"
    assert one_node["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] == "file:///private/rendezvous"
    two_nodes = child_environment(inherited, directory=Path("/private"), options={"nnodes": 2})
    assert two_nodes["NCCL_SOCKET_IFNAME"] == "eth0"
    assert "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE" not in two_nodes


def test_a_child_whose_parent_has_gone_does_not_begin() -> None:
    command = build_command({"never-read": True}, parent=1 if Path("/proc/1").exists() else 0)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "the rollout server has gone"
    assert command[0] == sys.executable
