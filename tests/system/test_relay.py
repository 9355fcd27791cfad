"""Three servers that pass weights on, in real processes: the learner sends each version about once."""

from __future__ import annotations

import signal

import pytest

from learner.demo.pair import free_port_pair
from tests.keyrings import Keyring
from tests.system.harness import END_S, RUN_S, START_S, Lab

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]
NAMES = ("north", "south", "east")


def test_the_learner_sends_one_copy_to_three_servers(lab: Lab) -> None:
    servers = [lab.server(name, relay="tcp://127.0.0.1:*", scripted={"vocab_size": 40}) for name in NAMES]
    for server in servers:
        lab.wait_until(lambda server=server: server.events("ready"), START_S, "a server", alive=servers)
    learner = lab.learner(max_steps=12)
    assert learner.wait_exit(START_S + RUN_S) == 0, learner.tail()
    for server in servers:
        assert server.wait_exit(END_S) == 0, server.tail()

    (served,) = lab.run.events("served")
    sent = int(served["bytes"])
    fetched = [sum(int(live["bytes"]) for live in server.events("weights_live")) for server in servers]
    passed_on = [int(server.events("passed_on")[-1]["bytes"]) for server in servers]
    version = max(int(live["bytes"]) for live in servers[0].events("weights_live"))
    assert all(count >= 3 * version for count in fetched), "each has fetched several versions"
    assert sent + sum(passed_on) >= sum(fetched)
    # A version may be superseded while the learner sends it: that, too, is sent once.
    assert sent <= int(served["versions"]) * 1.2 * version
    assert sent <= 0.6 * sum(fetched)


def test_a_server_whose_parent_is_killed_goes_on(lab: Lab) -> None:
    servers = {name: lab.server(name, relay="tcp://127.0.0.1:*") for name in NAMES[:2]}
    learner = lab.learner(max_steps=200, liveness_s=2.0)
    lab.wait_step(2, alive=[learner, *servers.values()])
    first = lab.run.events("server_joined")[0]["server"]
    killed = servers.pop(first)
    killed.kill()
    (left,) = servers.values()
    step = lab.run.step()
    lab.wait_step(step + 6, alive=[learner, left])
    assert killed.exit_code == -signal.SIGKILL
    assert int(left.events("weights_live")[-1]["version"].split(".")[1]) > step


def test_servers_with_keys_pass_weights_on_and_know_each_other_by_the_learners_word(lab: Lab) -> None:
    """Each knows the learner's key alone: whose it is at the other address, WeightsReady says."""
    ring = Keyring(lab.directory)
    for name in NAMES[:2]:
        ring.make(name)
    ring.allow(*NAMES[:2])
    address = f"tcp://127.0.0.1:{free_port_pair()}"
    servers = [
        lab.server(
            name,
            learner=address,
            relay="tcp://127.0.0.1:*",
            key=str(ring.directory / f"{name}.key"),
            learner_key=str(ring.trust("learner")),
            allowed_keys=str(ring.allowed),
        )
        for name in NAMES[:2]
    ]
    for server in servers:
        lab.wait_until(lambda server=server: server.events("ready"), START_S, "a server", alive=servers)
    learner = lab.learner(
        bind=address, key=str(ring.directory / "learner.key"), allowed_keys=str(ring.allowed), max_steps=12
    )
    assert learner.wait_exit(START_S + RUN_S) == 0, learner.tail()
    for server in servers:
        assert server.wait_exit(END_S) == 0, server.tail()
    passed_on = [int(server.events("passed_on")[-1]["bytes"]) for server in servers]
    version = max(int(live["bytes"]) for live in servers[0].events("weights_live"))
    assert max(passed_on) >= 3 * version, "the second server had its versions from the first"
