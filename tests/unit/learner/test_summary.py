from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from learner.idle import LearnerWaits
from learner.stats import EvalPoint, Totals
from learner.summary import Summary, idle_verdict, print_summary, summarize, summary_lines, write_summary
from learner.token_ledger import TokenEnd, TokenLedger

PROMISED = {
    "task", "model", "steps", "reward_first", "reward_last", "eval_first", "eval_last", "staleness_max",
    "staleness_mean", "max_staleness", "groups_trained", "groups_filtered", "groups_quarantined",
    "groups_unaccounted", "tokens_trained", "weights_published", "learner_idle_ratio", "rollout_idle_ratio",
    "wall_s", "checkpoint", "learner_idle", "seats_empty", "tokens", "tokens_generated", "generated_per_trained",
    "learner_s_per_mtok", "server_s_per_mtok",
}  # fmt: skip
EVALS = (EvalPoint(step=0, reward=0.28, oldest=0, newest=0), EvalPoint(step=20, reward=0.56, oldest=20, newest=20))


def make_totals(**changes: Any) -> Totals:
    fields = {
        "steps": 20,
        "steps_skipped": 1,
        "reward_first": 0.31,
        "reward_last": 0.55,
        "staleness_max": 4,
        "staleness_mean": 2.25,
        "groups_trained": 160,
        "tokens_trained": 12_345,
        "learner_idle_ratio": 0.12,
        "rollout_idle_ratio": 0.05,
        "learner_idle_s": {LearnerWaits.ROLLOUTS: 9.0, LearnerWaits.PUBLISH: 3.0},
        "empty_s": {"rollout/lease_bound_s": 6.0, "rollout/empty_rewards_s": 4.0},
        "servers_s": 200.0,
        "wall_s": 101.5,
        **changes,
    }
    return Totals(**fields)


def make_tokens() -> TokenLedger:
    ledger = TokenLedger()
    ledger.resume({f"tokens/{end}": 0 for end in TokenEnd} | {"tokens/trained": 12_345, "tokens/filtered": 1_000})
    return ledger


def make_summary(totals: Totals | None = None, **changes: Any) -> Summary:
    arguments: dict[str, Any] = {
        "task": "addition.jsonl",
        "model": "smollm2",
        "max_staleness": 4,
        "counts": {"filtered": 7, "quarantined": 0, "unaccounted": 0, "trained": 160},
        "evals": EVALS,
        "weights_published": 21,
        "tokens": make_tokens(),
        "checkpoint": Path("runs/addition/checkpoints/step_20"),
        **changes,
    }
    return summarize(totals or make_totals(), **arguments)


EMPTY = Totals(
    steps=0,
    steps_skipped=0,
    reward_first=math.nan,
    reward_last=math.nan,
    staleness_max=0,
    staleness_mean=math.nan,
    groups_trained=0,
    tokens_trained=0,
    learner_idle_ratio=math.nan,
    rollout_idle_ratio=math.nan,
    learner_idle_s={},
    empty_s={},
    servers_s=0.0,
    wall_s=0.0,
)


def test_the_file_has_every_promised_field(tmp_path):
    write_summary(tmp_path / "summary.json", make_summary())
    written = msgspec.json.decode((tmp_path / "summary.json").read_bytes())
    assert written.keys() >= PROMISED
    assert written["steps"] == 20
    assert written["groups_filtered"] == 7
    assert (written["eval_first"], written["eval_last"]) == (0.28, 0.56)
    assert written["checkpoint"] == "runs/addition/checkpoints/step_20"
    assert written["evals"][1] == {"step": 20, "reward": 0.56, "oldest": 20, "newest": 20}


def test_the_file_is_for_people_too(tmp_path):
    write_summary(tmp_path / "summary.json", make_summary())
    text = (tmp_path / "summary.json").read_text()
    assert '\n  "steps": 20,\n' in text
    assert text.endswith("}\n")


def test_a_summary_replaces_the_one_before_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "summary.json"
    write_summary(path, make_summary(EMPTY))
    write_summary(path, make_summary())
    assert msgspec.json.decode(path.read_bytes())["steps"] == 20
    assert list(tmp_path.iterdir()) == [path]


def test_a_refused_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "summary.json"
    write_summary(path, make_summary())
    (tmp_path / "summary.json.tmp").mkdir()
    with pytest.raises(OSError):
        write_summary(path, make_summary(EMPTY))
    assert msgspec.json.decode(path.read_bytes())["steps"] == 20


def test_a_run_without_steps_or_evaluations_has_nulls(tmp_path):
    summary = make_summary(EMPTY, evals=())
    write_summary(tmp_path / "summary.json", summary)
    written = msgspec.json.decode((tmp_path / "summary.json").read_bytes())
    assert written["reward_first"] is None
    assert written["eval_last"] is None
    assert written["evals"] == []
    assert written["verdict"] == "no step has trained"
    assert "eval" not in summary_lines(summary)[0]


@pytest.mark.parametrize(
    ("learner", "rollout", "words"),
    [
        (0.38, 0.05, "the learner waited 38 % of the time; learner: rollouts too slow 30 %: add servers;"),
        (0.38, 0.05, "the bound 8 %: raise max_staleness (max_staleness is 2)"),
        (0.38, math.nan, "rollouts too slow"),
        (0.05, 0.45, "the rollout servers idled 45 % of the time; seats empty: every slot in use 50 %: the learner is"),
        (0.4, 0.5, "the learner waited 40 % and the rollout servers 50 % of the time, in turn: raise max_staleness"),
        (0.05, 0.1, "both sides were busy: the learner waited 5 % of the time, the rollout servers 10 %"),
        (0.05, math.nan, "both sides were busy: the learner waited 5 % of the time"),
        (math.nan, math.nan, "no step has trained"),
    ],
)
def test_the_verdict_names_the_side_that_was_waited_for_and_why(learner, rollout, words):
    totals = make_totals(
        learner_idle_ratio=learner,
        rollout_idle_ratio=rollout,
        learner_idle_s={LearnerWaits.ROLLOUTS: 30.0, LearnerWaits.BOUND: 8.0, LearnerWaits.DISK: 0.1},
        empty_s={"rollout/lease_bound_s": 100.0, "rollout/empty_rewards_s": 4.0},
        wall_s=100.0,
    )
    verdict = idle_verdict(totals, 2)
    assert words in verdict
    assert "nan" not in verdict
    assert "disk" not in verdict, "what does not matter is not said"
    if "in turn" in verdict:
        assert "(now 2)" in verdict


def test_the_last_words(capsys):
    print_summary(make_summary())
    assert capsys.readouterr().out.splitlines() == [
        "20 steps in 102 s: eval 0.280 (v0) -> 0.560 (v20), reward 0.310 -> 0.550",
        "160 groups trained, 7 filtered, 0 quarantined, 0 unaccounted; 12,345 tokens; skipped steps: 1",
        "staleness 2.25 mean, 4 max (bound 4); 21 versions published",
        "tokens: 13,345 generated, 12,345 trained (1,000 filtered); a million trained took 8,222 s of the learner,"
        " 16,201 s of servers",
        "both sides were busy: the learner waited 12 % of the time, the rollout servers 5 %",
        "model: runs/addition/checkpoints/step_20",
    ]
