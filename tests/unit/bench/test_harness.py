from __future__ import annotations

import json
import os

import pytest

from tests.bench import harness
from tests.bench.__main__ import discover, main
from tests.bench.harness import Result, Row, Skip, run_contest, run_row, to_json


def two(quick: bool) -> float:
    return 2.0


def three(quick: bool) -> float:
    return 3.0


def own_process(quick: bool) -> float:
    return float(os.getpid())


def this_round(quick: bool) -> float:
    return float(harness.round_number() + 1)


def figures(quick: bool) -> dict[str, float]:
    return {"pid": float(os.getpid()), "two": 2.0, "cpu_s": 7.0}


def skipped(quick: bool) -> float:
    raise Skip("no such hardware")


def broken(quick: bool) -> float:
    assert not quick, "decoded arrays must be views"
    return 1.0


def row(**changes: object) -> Row:
    fields = {
        "name": "r", "control": "c", "ours": three, "baseline": two, "ratio": "ours/baseline", "target": 1.5, **changes
    }  # fmt: skip
    return Row(**fields)


ROWS = [
    row(name="rate"),
    row(name="cost", ratio="baseline/ours", target=0.7),
    row(name="lower", sense="lower", target=1.4),
    row(name="pid", ours=own_process, baseline=own_process, target=0.0),
    row(name="once", rounds=1),
    row(name="near", ours=this_round, baseline=this_round, sense="near", target=0.0),
    row(name="above", sense="near", target=0.4),
    row(name="below", ratio="baseline/ours", sense="near", target=0.3),
    row(name="off", ratio="baseline/ours", sense="near", target=0.34),
    row(name="drawn", ours=this_round, baseline=three, target=0.0),
    row(name="skipped", baseline=skipped),
    row(name="broken", ours=broken),
    row(name="named", ours=figures, baseline=figures, figure="two", target=0.9, contest="shared"),
    row(name="pid of named", ours=figures, baseline=figures, figure="pid", contest="shared"),
    row(name="broken beside named", ours=figures, baseline=broken, figure="two", contest="shared"),
]


def result_of(name: str):
    return run_row(next(row for row in ROWS if row.name == name), quick=True)


@pytest.mark.parametrize(
    ("name", "ratio", "verdict"), [("rate", 1.5, "pass"), ("cost", 2 / 3, "miss"), ("lower", 1.5, "miss")]
)
def test_a_row_is_judged_by_its_ratio_and_sense(name, ratio, verdict):
    result = result_of(name)
    assert result.ratio == result.worst == pytest.approx(ratio)
    assert (result.verdict, result.ours, result.baseline, result.rounds) == (verdict, 3.0, 2.0, 3)


def test_each_side_of_each_round_is_a_process_of_its_own():
    result = result_of("pid")
    assert os.getpid() not in (result.ours, result.baseline)
    assert result.worst != 1.0


def test_a_row_may_ask_for_fewer_rounds():
    assert result_of("once").rounds == 1


def test_a_side_that_cannot_run_skips_the_row_with_its_reason():
    result = result_of("skipped")
    assert (result.verdict, result.reason, result.ratio) == ("skip", "no such hardware", None)


def test_a_side_that_fails_is_a_miss_with_its_reason():
    result = result_of("broken")
    assert (result.verdict, result.reason) == ("miss", "ours: AssertionError: decoded arrays must be views")


def contest() -> list[Result]:
    return run_contest([row for row in ROWS if row.contest], quick=True)


def test_a_side_may_name_several_figures_and_count_its_own_cpu_seconds():
    named, *_ = contest()
    assert (named.ratio, named.verdict, named.cpu_ratio) == (1.0, "pass", 1.0)
    assert named.ours_cpu_s == named.baseline_cpu_s == 7.0


def test_rows_of_a_contest_share_their_runs(monkeypatch):
    ran = []
    monkeypatch.setattr(harness, "_run_side", lambda row, side, *, quick, number: ran.append(side) or {"failed": side})
    results = contest()
    assert ran == ["ours"]
    assert [result.reason for result in results] == ["ours"] * 3


def test_a_side_that_fails_ends_its_own_rows_only():
    named, of_pid, broken = contest()
    assert (broken.verdict, broken.rounds, broken.reason[:9]) == ("miss", 0, "baseline:")
    assert named.rounds == of_pid.rounds == 3


def test_the_json_has_what_was_promised():
    (written,) = json.loads(to_json([result_of("skipped")]))
    assert {"name", "control", "ratio", "worst", "target", "sense", "verdict", "reason"} <= set(written)


def test_rows_are_found_and_have_unique_names():
    names = [row.name for row in discover()]
    assert {"codec_vs_lists", "codec_vs_blob", "channel_stream"} <= set(names)
    assert len(names) == len(set(names))


def test_an_unknown_row_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["--only", "nonsense"])
    assert "no row named nonsense; there are " in capsys.readouterr().err


@pytest.mark.parametrize(("name", "verdict"), [("near", "pass"), ("above", "miss"), ("below", "miss"), ("off", "pass")])
def test_a_ratio_that_should_be_near_1_may_miss_on_either_side(name: str, verdict: str):
    assert result_of(name).verdict == verdict


def test_a_side_knows_which_round_it_is_of():
    result = result_of("drawn")
    assert (result.ours, result.worst) == (2.0, 1 / 3)
