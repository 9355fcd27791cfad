from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from learner.batch import StepResult
from learner.idle import EMPTY_SEATS, LearnerWaits, NotLeased
from learner.idle_watch import IdleSeconds
from learner.stats import EvalPoint, RunStats, ServerMeter, ServerView
from protocol.messages import ServerStatus
from protocol.versions import Version
from tests.factories import make_batch, make_group, make_train_group

TIMINGS = {
    "wait_s": 0.5,
    "forward_backward_s": 1.0,
    "wait_publish_s": 0.25,
    "optimizer_s": 0.1,
    "canaries_s": 0.05,
    "journal_s": 0.01,
}


IDLE = IdleSeconds(learner={LearnerWaits.ROLLOUTS: 0.5, LearnerWaits.PUBLISH: 0.25}, leasing={NotLeased.BOUND: 1.0})


def server(name: str = "a", *, status: ServerStatus | None = None, **changes: Any) -> ServerView:
    fields = {
        "state": "healthy",
        "policy_version": 1,
        "samples_running": 4,
        "room": 8,
        "connected_s": 10.0,
        **changes,
    }
    return ServerView(name=name, status=status, **fields)


def status(wall_s: float, *, busy_s: float = 0.0, paused_s: float = 0.0, tokens: int = 0, occupancy_s: float = 0.0):
    return ServerStatus(
        wall_s=wall_s, busy_s=busy_s, paused_s=paused_s, tokens_generated=tokens, occupancy_s=occupancy_s
    )


def record(stats: RunStats, step: int, *, wall_s: float, finite: bool = True, **changes: Any):
    """Record a step of two groups with reward 0.1 x step, 20 loss tokens."""
    groups = [make_train_group(ordinal=i, rewards=[0.1 * step] * 2, version=Version(1, step - 1)) for i in range(2)]
    arguments: dict[str, Any] = {
        "batch": make_batch(step=step, groups=groups),
        "result": StepResult(finite=finite, loss_tokens=20, metrics={"loss": 0.5, "entropy": 1.5}),
        "policy_version": step,
        "learning_rate": 1e-5,
        "timings": TIMINGS,
        "idle": IDLE,
        "step_time_s": 2.0,
        "servers": (),
        "counts": {},
        "wall_s": wall_s,
        **changes,
    }
    batch, result = arguments.pop("batch"), arguments.pop("result")
    return stats.record_step(batch, result, **arguments)


def test_a_row_has_trl_names_and_what_the_trainer_found():
    row = record(
        RunStats(),
        3,
        wall_s=2.0,
        counts={
            "trained": 6,
            "filtered": 1,
            "buffered": 4,
            "unaccounted": 0,
            "slots_in_use": 9,
            "slots_total": 10,
        },
    )
    assert row["step"] == 3
    assert row["policy_version"] == 3
    assert row["loss"] == 0.5
    assert row["entropy"] == 1.5
    assert row["reward"] == pytest.approx(0.3)
    assert row["learning_rate"] == 1e-5
    assert row["step_time"] == 2.0
    assert row["perf/rollout_wait_s"] == 0.5
    assert row["perf/fwd_bwd_s"] == 1.0
    assert row["perf/weight_sync_s"] == 0.25
    assert row["num_tokens"] == 20
    assert row["groups/trained"] == 6
    assert row["groups/buffered"] == 4
    assert row["groups_unaccounted"] == 0
    assert row["slots_in_use"] == 9
    assert row["slots_total"] == 10
    assert {"completions/mean_length", "sample/staleness_max", "frac_reward_zero_std"} <= row.keys()


def test_learner_idle_is_the_waiting_share_of_the_interval():
    stats = RunStats()
    assert record(stats, 1, wall_s=2.0)["learner/idle_ratio"] == pytest.approx(0.375)
    row = record(stats, 2, wall_s=3.0)
    assert row["learner/idle_ratio"] == pytest.approx(0.75)
    assert row["learner/tokens_per_second"] == pytest.approx(20)
    assert stats.totals().learner_idle_ratio == pytest.approx(0.5)


def test_causes_sum_to_what_they_split():
    stats = RunStats()
    stats.begin([server(status=ServerStatus(wall_s=1.0, idle_weights_s=1.0))])
    now = ServerStatus(
        wall_s=11.0, occupancy_s=4.0, idle_lease_s=4.0, idle_engine_s=1.0, idle_rewards_s=0.5, idle_weights_s=1.5
    )
    idle = IdleSeconds(
        learner={LearnerWaits.BOUND: 1.5, LearnerWaits.DISK: 0.5}, leasing={NotLeased.BOUND: 7.5, NotLeased.DATA: 2.5}
    )
    row = record(stats, 1, wall_s=10.0, servers=[server(status=now)], idle=idle)
    assert sum(row[f"learner/idle_{cause}_s"] for cause in LearnerWaits) / 10.0 == row["learner/idle_ratio"] == 0.2
    assert (row["rollout/lease_bound_s"], row["rollout/lease_data_s"]) == (3.0, 1.0)
    empty_s = sum(row[f"rollout/empty_{cause}_s"] for cause in ("lease", "engine", "rewards", "no_weights"))
    assert empty_s == sum(row[column] for column in EMPTY_SEATS) == 10.0 * (1 - row["rollout/occupancy"]) == 6.0
    assert stats.totals().learner_idle_s[LearnerWaits.BOUND] == 1.5
    assert sum(stats.totals().empty_s.values()) == 6.0


def test_num_tokens_and_groups_accumulate():
    stats = RunStats()
    for step in (1, 2, 3):
        row = record(stats, step, wall_s=2.0 * step)
    assert row["num_tokens"] == 60
    totals = stats.totals()
    assert (totals.steps, totals.groups_trained, totals.tokens_trained, totals.wall_s) == (3, 6, 60, 6.0)


def test_reward_first_and_last_are_means_over_a_quarter_of_the_steps_at_most_five():
    stats = RunStats()
    for step in range(1, 9):
        record(stats, step, wall_s=float(step))
    assert stats.totals().reward_first == pytest.approx(0.15)
    assert stats.totals().reward_last == pytest.approx(0.75)
    for step in range(9, 41):
        record(stats, step, wall_s=float(step))
    assert stats.totals().reward_first == pytest.approx(0.3)
    assert stats.totals().reward_last == pytest.approx(3.8)
    assert stats.rewards == pytest.approx([0.1 * step for step in range(1, 41)])


def test_one_step_is_first_and_last():
    stats = RunStats()
    record(stats, 2, wall_s=1.0)
    assert stats.totals().reward_first == stats.totals().reward_last == pytest.approx(0.2)


def test_totals_before_any_step_have_no_values():
    totals = RunStats().totals()
    assert (totals.steps, totals.staleness_max, totals.wall_s) == (0, 0, 0.0)
    assert math.isnan(totals.reward_first)
    assert math.isnan(totals.staleness_mean)
    assert math.isnan(totals.learner_idle_ratio)
    assert math.isnan(RunStats().eta_s(10))


def test_a_skipped_step_counts_as_skipped_and_nothing_else():
    stats = RunStats()
    record(stats, 1, wall_s=2.0)
    old = [make_train_group(rewards=[1, 0], version=Version(1, 0))]
    row = record(stats, 5, wall_s=4.0, finite=False, batch=make_batch(step=5, groups=old), policy_version=4)
    assert row["skipped"] == 1
    assert row["num_tokens"] == 20
    assert row["step_groups"] == 0
    totals = stats.totals()
    assert (totals.steps, totals.steps_skipped, totals.groups_trained, totals.tokens_trained) == (1, 1, 2, 20)
    assert totals.staleness_max == 0
    assert totals.wall_s == 4.0


def test_a_skipped_step_without_groups_is_recorded():
    row = record(RunStats(), 1, wall_s=1.0, finite=False, batch=make_batch(groups=[]))
    assert math.isnan(row["reward"])


def test_staleness_totals_weigh_every_token_the_same():
    stats = RunStats()
    first = make_train_group(rewards=[1, 0], lengths=[1, 1], version=Version(1, 0))
    second = make_train_group(rewards=[1, 0], spans=[[(Version(1, 2), 6)], [(Version(1, 4), 2)]])
    record(stats, 1, wall_s=1.0, batch=make_batch(step=1, groups=[first]))
    record(stats, 5, wall_s=2.0, batch=make_batch(step=5, groups=[second]))
    totals = stats.totals()
    assert totals.staleness_max == 2
    assert totals.staleness_mean == pytest.approx((2 * 0 + 6 * 2 + 2 * 0) / 10)


def test_filtered_groups_count_in_the_next_row_only():
    """A filter that hides what is solved must not hide that it is solved."""
    stats = RunStats()
    stats.record_filtered(make_group(ordinal=7, rewards=[1.0, 1.0, 1.0, 1.0]))
    row = record(stats, 1, wall_s=1.0, filtered=stats.take_filtered())
    assert row["reward"] == pytest.approx((4 * 0.1 + 4 * 1.0) / 8)
    assert row["step_groups"] == 2
    assert record(stats, 2, wall_s=2.0, filtered=stats.take_filtered())["reward"] == pytest.approx(0.2)


def test_eta_is_the_median_interval_times_the_remaining_steps():
    stats = RunStats()
    for step, wall_s in enumerate((1.0, 2.0, 52.0, 53.0), start=1):
        record(stats, step, wall_s=wall_s)
    assert stats.eta_s(14) == pytest.approx(10.0)
    assert stats.eta_s(4) == 0.0
    assert stats.eta_s(2) == 0.0


def test_a_continued_run_has_the_totals_of_the_whole_run():
    """Rows read back from metrics.jsonl, nulls and all, count like new ones; the clock starts again at 0."""
    whole, first, continued = RunStats(), RunStats(), RunStats()
    rows = []
    for step in range(1, 9):
        use = [server(status=status(float(step), busy_s=0.75 * step, tokens=10 * step))]
        record(whole, step, wall_s=2.0 * step, servers=use)
        if step <= 5:
            rows.append(record(first, step, wall_s=2.0 * step, servers=use))
    lines = [msgspec.json.encode(row) for row in rows]
    read = [{k: math.nan if x is None else x for k, x in msgspec.json.decode(line).items()} for line in lines]
    continued.resume(read)
    continued.begin([server(status=status(5.0, busy_s=3.75, tokens=50))])
    for step in range(6, 9):
        use = [server(status=status(float(step), busy_s=0.75 * step, tokens=10 * step))]
        row = record(continued, step, wall_s=2.0 * (step - 5), servers=use)
    assert row["wall_s"] == 16.0
    assert row["num_tokens"] == 160
    expected, got = whole.totals(), continued.totals()
    for name in expected.__slots__:
        assert getattr(got, name) == pytest.approx(getattr(expected, name)), name


def test_rollout_idle_is_neither_busy_nor_paused():
    meter = ServerMeter()
    meter.read([server(status=status(10.0, busy_s=5.0))], math.inf)
    row = meter.read([server(status=status(14.0, busy_s=7.0, paused_s=1.0, tokens=80, occupancy_s=1.5))], 4.0)
    assert row["rollout/idle_ratio"] == pytest.approx(0.25)
    assert row["rollout/paused_ratio"] == pytest.approx(0.25)
    assert row["rollout/occupancy"] == pytest.approx(1.5 / 4)
    assert row["rollout/generation_tok_s"] == pytest.approx(20.0)


def test_servers_are_averaged_and_their_speed_is_added():
    meter = ServerMeter()
    meter.read([server("a", status=status(0.5)), server("b", status=status(0.5))], 1.0)
    row = meter.read(
        [
            server("a", status=status(2.5, busy_s=2.0, tokens=100)),
            server("b", status=status(2.5, busy_s=0.0)),
        ],
        2.0,
    )
    assert row["rollout/servers"] == 2
    assert row["rollout/room"] == server("a").room + server("b").room > 0
    assert row["rollout/idle_ratio"] == pytest.approx(0.5)
    assert row["rollout/generation_tok_s"] == pytest.approx(50.0)


def test_a_server_that_waited_for_the_run_only_sets_its_baseline():
    meter = ServerMeter()
    row = meter.read([server(status=status(500.0, busy_s=1.0))], 5.0)
    assert row["rollout/observed_s"] == 0
    assert math.isnan(row["rollout/idle_ratio"])


def test_a_server_that_joined_in_the_interval_counts_from_its_start():
    row = ServerMeter().read([server(status=status(4.0, busy_s=3.0))], 5.0)
    assert row["rollout/idle_ratio"] == pytest.approx(0.25)


def test_a_restarted_server_counts_from_its_start():
    meter = ServerMeter()
    meter.read([server(status=status(100.0, busy_s=90.0, tokens=900))], math.inf)
    row = meter.read([server(status=status(2.0, busy_s=1.0, tokens=30))], 5.0)
    assert row["rollout/idle_ratio"] == pytest.approx(0.5)
    assert row["rollout/generation_tok_s"] == pytest.approx(15.0)


def test_no_news_from_servers_is_no_value():
    meter = ServerMeter()
    views = [server("a", status=status(1.0)), server("silent")]
    meter.read(views, math.inf)
    row = meter.read(views, 1.0)
    assert math.isnan(row["rollout/idle_ratio"])
    assert math.isnan(row["rollout/generation_tok_s"])
    assert row["rollout/servers"] == 2


def test_counters_that_overlap_never_make_idle_negative():
    meter = ServerMeter()
    meter.read([server(status=status(1.0))], math.inf)
    row = meter.read([server(status=status(2.0, busy_s=1.0, paused_s=0.3))], 1.0)
    assert row["rollout/idle_ratio"] == 0.0


def test_eval_points_are_labelled_with_their_versions():
    assert EvalPoint(step=10, reward=0.5, oldest=10, newest=10).label == "v10"
    assert EvalPoint(step=10, reward=0.5, oldest=9, newest=11).label == "v9-11"


# --- prompts, cache, restarts


def caching(wall_s: float, prompt: int, cached: int, *, kv_usage: float = 0.0, restarts: int = 0) -> ServerStatus:
    return ServerStatus(
        wall_s=wall_s, prompt_tokens=prompt, cached_prompt_tokens=cached, kv_usage=kv_usage, engine_restarts=restarts
    )


def test_the_cached_share_of_prompts_is_of_the_time_since_the_last_row():
    meter = ServerMeter()
    meter.read([server("a", status=caching(1.0, 100, 0)), server("b", status=caching(1.0, 50, 50))], 1.0)
    row = meter.read([server("a", status=caching(2.0, 200, 75)), server("b", status=caching(2.0, 150, 125))], 1.0)
    assert row["rollout/cached_prompt_ratio"] == pytest.approx((75 + 75) / 200)
    row = meter.read([server("a", status=caching(3.0, 200, 75))], 1.0)
    assert math.isnan(row["rollout/cached_prompt_ratio"]), "no prompt was begun"


def test_restarts_are_counted_since_the_last_row():
    meter = ServerMeter()
    meter.read([server(status=caching(1.0, 0, 0, restarts=1))], 1.0)
    assert meter.read([server(status=caching(2.0, 0, 0, restarts=3))], 1.0)["rollout/engine_restarts"] == 2
    assert meter.read([server(status=caching(3.0, 0, 0, restarts=3))], 1.0)["rollout/engine_restarts"] == 0


def test_kv_usage_is_that_of_the_fullest_cache_of_those_that_know():
    meter = ServerMeter()
    servers = [server(name, status=caching(1.0, 0, 0, kv_usage=u)) for name, u in (("a", 0.25), ("b", 0.75), ("c", 0))]
    assert meter.read([*servers, server("d")], 1.0)["rollout/kv_usage"] == 0.75
    assert math.isnan(meter.read([servers[2]], 1.0)["rollout/kv_usage"])
