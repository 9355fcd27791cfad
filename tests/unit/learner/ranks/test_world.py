"""Ranks agree, or rank 0 says on what they do not. Both ranks in this process, on a store in memory."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from learner import commands
from learner.config import LearnerConfig
from learner.ranks import launch
from learner.ranks.keep_alive import keep_alive_loop
from learner.ranks.place import Place, check_ranks
from learner.ranks.world import RankLost, RankSilent, World, disagreement
from protocol.errors import ConfigError
from tests.learners import FakeCompute


def make_worlds(timeout_s: float = 30.0) -> tuple[World, World]:
    store = dist.HashStore()
    leader, follower = (World(Place(rank, 2, rank), torch.device("cpu"), store, timeout_s) for rank in range(2))
    return leader, follower


def beside(function: Callable[[], None]) -> tuple[threading.Thread, list[Exception]]:
    """Run in a thread; what it raises is kept."""
    raised: list[Exception] = []

    def body() -> None:
        try:
            function()
        except Exception as error:  # noqa: BLE001  the test looks at it
            raised.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    return thread, raised


def test_ranks_that_say_the_same_go_on():
    leader, follower = make_worlds()
    for statement in ({"model": "a"}, {"model": "b"}):
        thread, raised = beside(lambda said=statement: follower.agree(said))
        leader.agree(statement)
        thread.join()
        assert raised == []


def test_rank_0_hears_at_once_why_another_has_ended_instead_of_agreeing():
    leader, follower = make_worlds()
    with pytest.raises(ValueError, match="no such directory"), follower.watched("loading"):
        raise ValueError("no such directory")
    started_s = time.monotonic()
    with pytest.raises(RankLost, match="rank 1 ended: ValueError: no such directory"):
        leader.agree({})
    assert time.monotonic() - started_s < 5.0, "it does not wait for the deadline"


def test_rank_0_says_on_what_they_disagree_and_the_other_ends_quietly():
    leader, follower = make_worlds()
    thread, raised = beside(lambda: follower.agree({"model": "b", "seed": "0"}))
    with pytest.raises(ConfigError, match="ranks disagree on model: a on rank 0, b on rank 1; all ranks need the same"):
        leader.agree({"model": "a", "seed": "0"})
    thread.join()
    (error,) = raised
    assert isinstance(error, RankLost)
    assert str(error) == "rank 0 says why"


def test_a_rank_that_waits_long_for_another_says_so_and_until_when(monkeypatch, capsys):
    monkeypatch.setattr("learner.ranks.world.PATIENCE_S", 0.0)
    _, follower = make_worlds(timeout_s=0.05)
    follower._store.set_timeout(torch.distributed.distributed_c10d.timedelta(seconds=0.05))
    with pytest.raises(RankSilent, match=r"rank 0 was not heard of within 0\.05 s \(collective_timeout_s\): start it"):
        follower.agree({})
    said = capsys.readouterr().err
    assert said.startswith("headway-learner: rank 1 waits for rank 0, at most 0.05 s (collective_timeout_s); one that")
    assert said.count("waits for") == 1
    assert "--dry-run takes no part" in said
    leader, _ = make_worlds(timeout_s=0.05)
    leader._store.set_timeout(torch.distributed.distributed_c10d.timedelta(seconds=0.05))
    with pytest.raises(RankSilent, match="rank 1 was not heard of"):
        leader.agree({})
    assert "rank 0 waits for rank 1, at most" in capsys.readouterr().err


def test_a_rank_that_finds_nobody_says_whom_it_waits_for(monkeypatch, capsys):
    monkeypatch.setattr("learner.ranks.world.PATIENCE_S", 0.01)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for name, value in address.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankLost, match="rank 1 cannot join the others: "):
        World.join(Place(1, 2, 1), torch.device("cpu"), 0.5)
    assert "rank 1 waits for the process that starts the ranks, at most 0.5 s" in capsys.readouterr().err


def test_a_follower_that_never_hears_of_rank_0_does_not_end_in_silence(monkeypatch):
    _, follower = make_worlds(timeout_s=0.05)
    follower._store.set_timeout(torch.distributed.distributed_c10d.timedelta(seconds=0.05))
    monkeypatch.setattr(launch.World, "join", lambda *arguments: follower)
    with pytest.raises(RankSilent, match="rank 0 was not heard of"):
        launch.train_on_ranks(LearnerConfig(model="m", dataset="d", device="cpu"), Place(1, 2, 1))


def test_a_rank_that_says_nothing_is_lost_in_time():
    leader, _ = make_worlds(timeout_s=0.05)
    leader._store.set_timeout(torch.distributed.distributed_c10d.timedelta(seconds=0.05))
    with pytest.raises(RankLost, match=r"rank 1 was not heard of within 0\.05 s"):
        leader.agree({})


@pytest.mark.parametrize(
    ("theirs", "text"),
    [
        ({"a": "1", "b": "2"}, ""),
        ({"a": "1", "b": "3"}, "ranks disagree on b: 2 on rank 0, 3 on rank 5; all ranks need the same"),
        ({"a": "1"}, "ranks disagree on b: 2 on rank 0, nothing on rank 5"),
        ({"a": "0", "b": "3", "c": ""}, r"ranks disagree on a (and on b, c): 1 on rank 0"),
        ({"error": "model is empty"}, "rank 5: model is empty"),
    ],
)
def test_what_is_said_of_a_disagreement(theirs, text):
    assert disagreement({"a": "1", "b": "2"}, theirs, 5).startswith(text)
    assert bool(text) == bool(disagreement({"a": "1", "b": "2"}, theirs, 5))


def test_a_wrong_configuration_is_told_to_rank_0_and_not_printed(monkeypatch, capsys):
    leader, follower = make_worlds()
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch.World, "join", lambda *arguments: follower)
    thread, raised = beside(lambda: leader.agree({"seed": "0"}))
    assert commands.train(["--model", ""], prog="headway-learner train") == 0
    thread.join()
    (error,) = raised
    assert isinstance(error, ConfigError)
    assert str(error).startswith("rank 1: model is empty: name the directory")
    assert capsys.readouterr().err == ""


def test_all_keys_and_the_code_are_agreed_on(tmp_path: Path):
    said = launch.statement(LearnerConfig(model="m", dataset="d", learning_rate=3e-5))
    assert said["learning_rate"] == "3e-05"
    assert LearnerConfig.model_fields.keys() < said.keys()
    assert len(said["code (blake3 of learner/ and protocol/)"]) == 16


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"autocast": "bfloat16", "publish_dtype": "float32"},
            "publish_dtype float32 with autocast bfloat16 on several",
        ),
        (
            {"autocast": "bfloat16", "cast_lm_head_to_fp32": True},
            "cast_lm_head_to_fp32 with autocast bfloat16 on several",
        ),
        ({"optim": "adamw_8bit"}, "optim 'adamw_8bit' on several ranks: .* use adamw"),
        ({"use_peft": True}, "use_peft on several ranks: adapters train on one rank"),
        ({"context_parallel_size": 3}, "context_parallel_size 3 with a world of 4: .* a multiple of 3"),
        (
            {"context_parallel_size": 2, "share_prefix": False},
            "context_parallel_size 2 without share_prefix: only rows that share prompts are divided",
        ),
        ({"advantage_estimator": "gae", "filter_zero_std": False}, "gae on several ranks: the critic trains on one"),
    ],
)
def test_what_several_ranks_cannot_do_is_refused(options, says):
    with pytest.raises(ConfigError, match=says):
        check_ranks(LearnerConfig(**options), Place(0, 4, 0))


def test_several_ranks_may_compute_in_bfloat16():
    check_ranks(LearnerConfig(autocast="bfloat16"), Place(0, 4, 0))


def test_rows_are_divided_among_a_multiple_of_ranks():
    check_ranks(LearnerConfig(context_parallel_size=2), Place(0, 4, 0))
    check_ranks(LearnerConfig(), None)
    with pytest.raises(ConfigError, match=r"context_parallel_size 2 with a world of 1: .* a multiple of 2"):
        check_ranks(LearnerConfig(context_parallel_size=2), None)


def test_an_error_of_ours_is_left_for_rank_0_and_no_collective_follows():
    leader, follower = make_worlds()
    with pytest.raises(ValueError, match="our own"), follower.watched("forward_backward"):
        raise ValueError("our own\nand its details")
    assert not follower.can_talk
    with pytest.raises(RankLost, match=r"rank 1 ended: ValueError: our own; during save: Connection closed by peer"):
        with leader.watched("save"):
            raise RuntimeError("Connection closed by peer [127.0.0.1]:5")
    assert not leader.can_talk
    with pytest.raises(RankLost, match="during save"), leader.watched("the next command"):
        pytest.fail("began a collective on a broken world")


def test_a_sign_of_life_that_fails_ends_the_run(monkeypatch):
    monkeypatch.setattr("learner.ranks.keep_alive.KEEP_ALIVE_S", 0.0)
    sent = []

    def send() -> None:
        sent.append(None)
        if len(sent) == 3:
            raise RankLost("rank 1 ended")

    with pytest.raises(RankLost, match="rank 1 ended"):
        asyncio.run(keep_alive_loop(send, FakeCompute()))  # type: ignore[arg-type]
    assert len(sent) == 3
