from __future__ import annotations

import pytest

from protocol.addresses import bulk_address, check_address, parse_address, resolve_address
from protocol.errors import ConfigError, MalformedMessage


@pytest.mark.parametrize(
    "address",
    [
        "tcp://127.0.0.1:5555", "tcp://127.9.9.9:1", "tcp://localhost:0", "tcp://[::1]:5555", "tcp://127.0.0.1:*",
        "ipc:///run/headway", "ipc://@abstract",
    ],
)  # fmt: skip
def test_loopback_and_ipc_need_no_permission(address):
    check_address(address, off_host=False)


@pytest.mark.parametrize(
    "address", ["tcp://0.0.0.0:5555", "tcp://*:5555", "tcp://10.0.0.1:5555", "tcp://[2001:db8::1]:1", "tcp://gpu-7:1"]
)
def test_anything_else_is_refused_unless_the_user_insists(address):
    with pytest.raises(
        ConfigError,
        match=r"is not loopback.*headway-server keygen DIR.*--allowed-keys.*--learner-key.*--insecure-plaintext",
    ):
        check_address(address, off_host=False)
    check_address(address, off_host=True)


@pytest.mark.parametrize(
    "address",
    [
        "", "5555", "127.0.0.1:5555", "http://127.0.0.1:5555", "tcp://127.0.0.1", "tcp://:5555", "tcp://127.0.0.1:",
        "tcp://127.0.0.1:65536", "tcp://127.0.0.1:-1", "tcp://127.0.0.1:5x", "tcp://127.0.0.1:٣", "ipc://",
    ],
)  # fmt: skip
def test_what_is_no_address_is_named(address):
    with pytest.raises(ConfigError, match=r"^address '.*': expected tcp://HOST:PORT or ipc://PATH$"):
        parse_address(address)


@pytest.mark.parametrize(
    ("control", "bulk"),
    [
        ("tcp://127.0.0.1:5555", "tcp://127.0.0.1:5556"),
        ("tcp://[::1]:5555", "tcp://[::1]:5556"),
        ("tcp://*:5555", "tcp://*:5556"),
        ("tcp://127.0.0.1:0", "tcp://127.0.0.1:*"),
        ("ipc:///run/headway", "ipc:///run/headway-weights"),
    ],
)
def test_weights_go_over_the_next_port(control, bulk):
    assert bulk_address(control) == bulk


def test_the_last_port_has_no_next_one():
    with pytest.raises(ConfigError, match="the highest is 65534"):
        bulk_address("tcp://127.0.0.1:65535")


@pytest.mark.parametrize(
    ("announced", "dialed", "resolved"),
    [
        ("tcp://*:5556", "tcp://10.0.0.3:5555", "tcp://10.0.0.3:5556"),
        ("tcp://0.0.0.0:5556", "tcp://learner:5555", "tcp://learner:5556"),
        ("tcp://[::]:5556", "tcp://[::1]:5555", "tcp://[::1]:5556"),
        ("tcp://10.0.0.9:7", "tcp://10.0.0.3:5555", "tcp://10.0.0.9:7"),
        ("ipc:///run/x-weights", "ipc:///run/x", "ipc:///run/x-weights"),
    ],
)
def test_an_announced_wildcard_is_the_host_that_was_dialed(announced, dialed, resolved):
    assert resolve_address(announced, dialed) == resolved


@pytest.mark.parametrize(
    ("announced", "dialed"),
    [("tcp://*:5556", "ipc:///run/x"), ("nonsense", "tcp://a:1"), ("tcp://a:99999", "tcp://a:1")],
)
def test_an_announcement_that_leads_nowhere_is_the_peers_mistake(announced, dialed):
    with pytest.raises(MalformedMessage, match=r"^announced address"):
        resolve_address(announced, dialed)
