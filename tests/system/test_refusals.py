"""Who does not fit is refused, both sides saying why; who sends nonsense is counted; the run goes on to its end.

One learner and one slow, honest server live through all of it. Then a fast server finishes the run.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from protocol.codec import MAX_FRAMES, MAX_HEADER_BYTES
from protocol.messages import Ack, AckStatus, Ping, Refused, Return, Welcome
from protocol.versions import PROTOCOL_VERSION
from tests.factories import make_group, make_lease
from tests.models import build_tiny_model
from tests.system.harness import END_S, RUN_S, START_S, Lab, Process, reward
from tests.system.lineage import check_whole_lineage, read_lineage
from tests.system.raw_peer import RawPeer

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]
STEPS = 50
SLOW = {"token_s": 0.25, "mean_length": 8.0, "length_sigma": 0.0}
"""Two seconds a group, four groups at a time."""
HELD = 8
"""An ordinal that the honest server has been leased when step 1 has trained, and decodes only after step 2."""


@dataclass
class Refusals:
    """The run, when it is over."""

    lab: Lab
    learner: Process
    misfits: dict[str, Process]
    answers: dict[str, Any]
    second_learner: Process


@pytest.fixture(scope="module")
def refusals(module_lab: Lab) -> Refusals:
    """Misfits say Hello, a raw peer sends nonsense, a second learner wants the run; then the run is finished."""
    lab = module_lab
    learner = lab.learner(max_steps=STEPS, reward_funcs=["scripted"])
    honest = lab.server("honest", scripted=SLOW, drain_s=0.0)
    other_shape = build_tiny_model(lab.directory / "other-shape", hidden_size=16)
    other_words = build_tiny_model(lab.directory / "other-words")
    rename_a_token(other_words)
    embedded = {"engine": "transformers", "max_model_length": 64, "reward_funcs": [reward("parity")]}
    misfits = {
        "shape": lab.server("other-shape", model=str(other_shape), **embedded),
        "words": lab.server("other-words", model=str(other_words), **embedded),
        "rewards": lab.server("other-rewards", reward_funcs=[reward("parity")]),
        "version": lab.server("other-version", module="tests.system.other_version_server"),
    }
    lab.wait_step(1, alive=[learner, honest])
    with RawPeer(lab.address) as peer:
        answers = send_nonsense(peer)
    second_learner = lab.learner(name="second-learner", max_steps=STEPS, reward_funcs=["scripted"])
    for misfit in [*misfits.values(), second_learner]:
        misfit.wait_exit(START_S)
    honest.signal(signal.SIGTERM)
    fast = lab.server("fast")
    assert honest.wait_exit(END_S) == 0
    assert learner.wait_exit(RUN_S) == 0, learner.tail()
    assert fast.wait_exit(END_S) == 0
    return Refusals(lab, learner, misfits, answers, second_learner)


def rename_a_token(model: Path) -> None:
    """Give one token of a tokenizer another text."""
    file = model / "tokenizer.json"
    text = file.read_text("utf-8")
    assert text.count('"|"') == 1
    file.write_text(text.replace('"|"', '"~"'), "utf-8")


def send_nonsense(peer: RawPeer) -> dict[str, Any]:
    """Send everything that a learner must refuse, and return what it answered."""
    answers: dict[str, Any] = {}
    peer.send(Ping(sent_s=0.0))
    answers["stranger"] = peer.expect(Refused)
    peer.send(Ping(sent_s=0.0), protocol_version=PROTOCOL_VERSION + 1)
    answers["version"] = peer.expect(Refused)
    for frames in (
        [b""],
        [b"\x00garbage\xff" * 20],
        [msgspec.msgpack.encode({"type": "nonsense", "protocol_version": PROTOCOL_VERSION})],
        [b"x"] * (MAX_FRAMES + 1),
        [b"x" * (MAX_HEADER_BYTES + 1)],
    ):
        peer.send_frames(frames)
    peer.send(Ping(sent_s=0.0), surprise="an unknown field")

    welcome = peer.say_hello()
    assert isinstance(welcome, Welcome)
    peer.send(make_lease())  # of a kind that only a learner sends
    terms = {"run_id": welcome.run_id, "functions": {"scripted": (1.0, 0.0, 1.0, 0.0)}}
    good = make_group(ordinal=HELD, **terms)
    wrong = {
        "nan": msgspec.structs.replace(good, behavior_logprobs=np.full_like(good.behavior_logprobs, np.nan)),
        "token": msgspec.structs.replace(good, completion_tokens=good.completion_tokens + 1_000_000),
        "larger": make_group(ordinal=HELD, rewards=(1.0, 0.0) * 8, run_id=welcome.run_id),
        "foreign": make_group(ordinal=HELD, **terms | {"run_id": "another-run"}),
        "never leased": make_group(ordinal=10**6, **terms),
    }
    for name, group in wrong.items():
        peer.send(group)
        answers[name] = peer.expect(Ack)
    peer.send(Return(group_id=good.group_id, attempt=1, reason="not mine to return"))
    return answers


def test_the_run_goes_on_to_its_end_and_loses_nothing(refusals: Refusals) -> None:
    summary = refusals.lab.run.summary()
    assert (summary["steps"], summary["groups_unaccounted"], summary["groups_quarantined"]) == (STEPS, 0, 0)
    check_whole_lineage(read_lineage(refusals.lab.run.path), refusals.lab.run.ledger(f"step-{STEPS:06d}"), steps=STEPS)
    assert "Traceback" not in refusals.learner.text()


@pytest.mark.parametrize(
    ("who", "code", "reason"),
    [
        ("shape", "model", "its model has another shape (vocabulary 45, weights "),
        ("words", "tokenizer", "its tokenizer has another vocabulary than the learner's: give both the same --model"),
        ("rewards", "reward_functions", "it scores with parity; this run expects scripted"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_and_both_say_why(
    refusals: Refusals, who: str, code: str, reason: str
) -> None:
    misfit = refusals.misfits[who]
    assert misfit.exit_code == 1
    last = misfit.text().splitlines()[-1]
    assert last.startswith("headway-server: error: the learner at ipc://")
    assert f"refused this server ({code}): {reason}" in last
    assert "Traceback" not in misfit.text()
    (event,) = [e for e in refusals.lab.run.events("server_refused") if e["server"] == misfit.name]
    assert event["code"] == code
    assert f"refused server {misfit.name}: {reason}" in event["text"]


def test_another_protocol_version_is_refused_naming_both(refusals: Refusals) -> None:
    ours, theirs = PROTOCOL_VERSION, PROTOCOL_VERSION + 1
    misfit = refusals.misfits["version"]
    assert misfit.exit_code == 1
    last = misfit.text().splitlines()[-1]
    assert f"message of protocol version {ours}, this process speaks {theirs}" in last
    answer = refusals.answers["version"]
    assert answer.code == "protocol_version"
    assert f"message of protocol version {theirs}" in answer.reason
    assert f"the learner speaks {ours}" in answer.reason
    said = [e["text"] for e in refusals.lab.run.events("malformed") if f"protocol version {theirs}" in e["text"]]
    assert len(said) >= 2, "the raw peer and the server"


def test_nonsense_is_counted_and_shown(refusals: Refusals) -> None:
    events = refusals.lab.run.events("malformed")
    texts = " ".join(event["text"] for event in events)
    assert f"{MAX_FRAMES + 1} frames, allowed are 1 to {MAX_FRAMES}" in texts
    assert f"allowed are {MAX_HEADER_BYTES}" in texts
    assert "Lease is not for a learner" in texts
    assert "surprise" not in texts
    assert refusals.lab.run.rows()[-1]["groups/malformed"] == len(events) >= 9
    assert "refused a message of " in refusals.learner.text()
    assert "refused server other-rewards: it scores with parity" in refusals.learner.text()
    assert refusals.answers["stranger"].code == "hello_required"


def test_groups_that_break_i6_or_were_never_asked_for_are_refused(refusals: Refusals) -> None:
    reasons = {name: answer.reason for name, answer in refusals.answers.items() if isinstance(answer, Ack)}
    assert "behavior_logprobs has a NaN or an infinity" in reasons["nan"]
    assert "tokens from 1000001 to 10000" in reasons["token"]
    assert "allowed are 0 to 44" in reasons["token"]
    assert "num_generations=16, the lease asked for 4" in reasons["larger"]
    assert "is not that of its lease" in reasons["foreign"]
    assert {refusals.answers[name].status for name in ("nan", "token", "larger", "foreign")} == {AckStatus.REFUSED}
    assert refusals.answers["never leased"].status is AckStatus.DUPLICATE
    assert reasons["never leased"] == "not leased by this run"
    assert refusals.lab.run.rows()[-1]["groups/groups_refused"] == 4


def test_nobody_can_spoil_or_return_the_lease_of_another(refusals: Refusals) -> None:
    lost = [e for e in refusals.lab.run.events("lease_lost") if e["reason"] != "draining"]
    assert lost == [], "only its holder gave leases back, when it left"
    again = [e for e in refusals.lab.run.events("lease_lost") if int(e["ordinal"]) == HELD]
    assert read_lineage(refusals.lab.run.path).groups[HELD][-1].group.attempt == 1 + len(again)


def test_a_second_learner_on_the_run_is_refused(refusals: Refusals) -> None:
    second = refusals.second_learner
    assert second.exit_code == 2
    (line,) = second.text().splitlines()
    assert f"is in use by another learner (pid {refusals.learner.pid} on " in line
    assert "stop it, or choose another run_name" in line


def test_leases_are_given_back_by_a_server_that_does_not_drain(refusals: Refusals) -> None:
    returned = [e for e in refusals.lab.run.events("lease_lost") if e["reason"] == "draining"]
    assert returned, "the slow server held groups when it was asked to leave"
    trained = read_lineage(refusals.lab.run.path).trained
    assert {int(event["ordinal"]) for event in returned} <= set(trained)
