"""The curve of staleness: its runs are exactly as stale as they say, and its report says what the runs were like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from learner.batch import Batch, StepResult
from learner.demo import sorting
from learner.trainer import Trainer
from protocol.completions import unpack_completions
from protocol.versions import Version
from tests.bench.staleness import exact
from tests.bench.staleness.__main__ import FIGURES
from tests.bench.staleness.exact import Outcome, Task, run
from tests.bench.staleness.report import before_training, draw, table, verdicts
from tests.bench.staleness.runs import (
    DEFAULT,
    METHODS,
    RECIPES,
    STALENESS,
    TASK,
    Results,
    Setting,
    run_missing,
    settings,
)

OPTIONS: dict[str, Any] = {"prompts_per_step": 2, "num_generations": 6, "learning_rate": 1e-2, "warmup_steps": 0}
TINY = Task(max_steps=4, options=OPTIONS, num_eval=2, eval_generations=2)
ONE, FOUR, _ = RECIPES
README = Path(__file__).parents[3] / "learner" / "README.md"
PNG_BYTES = 150_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sort task's model, untrained: the warm-up would take seconds."""
    directory = tmp_path_factory.mktemp("sort") / "model"
    sorting.make_model(0).save_pretrained(directory)
    sorting.make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Batch]]:
    """Every batch that is trained on, with the version of the weights that do; rewards that an untrained model gets."""
    seen: list[tuple[int, Batch]] = []

    class Watched(Trainer):
        def forward_backward(self, batch: Batch) -> StepResult:
            seen.append((self.policy_version, batch))
            return super().forward_backward(batch)

    def starts_early(completions: list[str], answer: list[str], finish_reason: list[str]) -> list[float]:
        return [float(text[:1] < "f") for text in completions]

    monkeypatch.setattr(exact, "Trainer", Watched)
    monkeypatch.setattr(exact, "exact_match", starts_early)
    return seen


def tokens_of(batch: Batch) -> list[list[int]]:
    return [one.group.completion_tokens.tolist() for one in batch.groups]


@pytest.mark.parametrize("staleness", [0, 1, 2, 16])
def test_every_token_is_exactly_as_stale_as_stated(model, trained, staleness):
    run(TINY, model=model, staleness=staleness, seed=0, options=METHODS[DEFAULT])
    assert [version for version, _ in trained] == list(range(TINY.max_steps))
    for version, batch in trained:
        spans = [c.spans for one in batch.groups for c in unpack_completions(one.group)]
        assert len(spans) == 12
        assert all(own == ((Version(1, max(0, version - staleness)), own[0][1]),) for own in spans)
        assert batch.staleness == [min(version, staleness)] * 2


def test_the_weights_behind_a_version_are_its_own(model, trained):
    """A run whose weights do not move samples everything from the initial ones: what version 0 samples is that."""
    still = {**OPTIONS, "learning_rate": 1e-30}
    run(Task(max_steps=4, options=still), model=model, staleness=0, seed=0, options=METHODS[DEFAULT])
    initial = [batch for _, batch in trained]
    trained.clear()
    run(TINY, model=model, staleness=2, seed=0, options=METHODS[DEFAULT])
    moved = [batch for _, batch in trained]
    for step in range(4):
        logprobs = [np.concatenate([g.group.behavior_logprobs for g in b[step].groups]) for b in (initial, moved)]
        same = tokens_of(initial[step]) == tokens_of(moved[step]) and np.array_equal(*logprobs)
        assert same == (step <= 2), f"step {step + 1}"


def test_all_settings_of_a_seed_train_on_the_same_prompts(model, trained):
    run(TINY, model=model, staleness=0, seed=3, options=METHODS[DEFAULT])
    run(TINY, model=model, staleness=4, seed=3, options={**METHODS["decoupled"], "num_mini_batches": 2})
    prompts = [[one.prompt_tokens.tolist() for one in batch.groups] for _, batch in trained]
    assert prompts[:4] == prompts[4:]
    assert len({tuple(tokens) for step in prompts[:4] for tokens in step}) == 8


def test_a_run_is_a_function_of_its_setting_and_its_seed(model, trained):
    outcomes = [run(TINY, model=model, staleness=1, seed=seed, options=METHODS[DEFAULT]) for seed in (0, 0, 1)]
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] != outcomes[2]


def test_fresh_samples_make_the_methods_one_objective_and_stale_ones_do_not(model, trained):
    two = Task(max_steps=2, options=OPTIONS, num_eval=1)
    for staleness, one_objective in ((0, True), (1, False)):
        norms = [
            run(two, model=model, staleness=staleness, seed=0, options=words).metrics["grad_norm"]
            for words in METHODS.values()
        ]
        assert (norms == pytest.approx([norms[0]] * 3, rel=1e-3)) == one_objective


# What is run, and what is kept.


def test_every_point_of_the_figure_is_run_and_none_twice():
    wanted = settings(num_seeds=5, curve_seeds=2)
    assert len(set(wanted)) == len(wanted) == 2 * 3 * (1 + 3 * 5) + 2 * 3
    for recipe in RECIPES:
        for method in METHODS:
            for staleness in STALENESS:
                setting = Setting(seed=1, recipe=recipe, staleness=staleness, method=method if staleness else DEFAULT)
                assert setting in wanted
    pair = [(each.seed, each.staleness) for each in wanted[:10]]
    assert pair == [(seed, staleness) for seed in range(5) for staleness in (0, 4)], "what the claim rests on, first"


def test_what_was_run_is_not_run_again(tmp_path, monkeypatch):
    made: list[tuple[int, int]] = []

    def fake(task: Task, *, model: Path, staleness: int, seed: int, options: dict[str, Any]) -> Outcome:
        made.append((seed, staleness))
        return outcome(0.123456)

    monkeypatch.setattr("tests.bench.staleness.runs.run", fake)
    wanted = settings(num_seeds=2, curve_seeds=0)
    run_missing(Results(tmp_path / "r.json", TASK), wanted[:1], TASK, model=tmp_path, say=lambda line: None)
    results = Results(tmp_path / "r.json", TASK)
    run_missing(results, wanted, TASK, model=tmp_path, say=lambda line: None)
    assert made == [(0, 0), (0, 4), (1, 0), (1, 4)]
    assert Results(tmp_path / "r.json", TASK).outcomes == results.outcomes


def test_results_of_another_task_are_not_mixed_in(tmp_path):
    Results(tmp_path / "r.json", TINY).add(Setting(seed=0, recipe=ONE, staleness=0, method=DEFAULT), outcome(0.5))
    with pytest.raises(SystemExit, match=r"r\.json has runs of another task, .*'max_steps': 4.*: move it away"):
        Results(tmp_path / "r.json", TASK)


# What is said of it.


def outcome(evaluation: float) -> Outcome:
    return Outcome(rewards=[0.25, 0.35, 0.9], evaluation=evaluation, metrics={})


def outcomes_of(*evaluations: tuple[int, str, int, str, float]) -> dict[Setting, Outcome]:
    return {
        Setting(seed=seed, recipe=recipe, staleness=staleness, method=method): outcome(value)
        for seed, recipe, staleness, method, value in evaluations
    }


def test_the_table_has_means_and_deviations_and_shares_the_synchronous_run():
    lines = table(
        outcomes_of((0, ONE, 0, DEFAULT, 0.4), (1, ONE, 0, DEFAULT, 0.5), (0, ONE, 4, "decoupled", 0.3))
    ).split("\n")
    assert lines[2] == "| 1 update | uncorrected | 0.45 ± 0.07 | - | - | - | - | - |"
    assert lines[4] == "| 1 update | decoupled | 0.45 ± 0.07 | - | - | 0.30 | - | - |"
    assert lines[5] == "| 4 updates | uncorrected | - | - | - | - | - | - |"


def test_the_pair_is_compared_seed_by_seed():
    fresh, stale = (0.40, 0.50), (0.38, 0.46)
    pair = [(seed, ONE, s, DEFAULT, of[seed]) for s, of in ((0, fresh), (4, stale)) for seed in (0, 1)]
    said = verdicts(outcomes_of(*pair))
    assert "(behavior anchor, 1 update, 2 seeds): -0.030, standard error 0.010; over seeds 0.071 and 0.057" in said


def test_before_training_is_what_version_0_sampled():
    fresh, stale = outcomes_of((0, ONE, 0, DEFAULT, 0.4)), outcomes_of((0, ONE, 1, DEFAULT, 0.4))
    assert before_training(fresh) == 0.25
    assert before_training(stale) == pytest.approx(0.30)


def test_the_figure_is_drawn_small(tmp_path):
    draw(outcomes_of((0, ONE, 0, DEFAULT, 0.4), (0, FOUR, 0, DEFAULT, 0.5)), tmp_path / "figures" / "s.png")
    content = (tmp_path / "figures" / "s.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) < PNG_BYTES


def test_what_the_readme_shows_is_what_was_measured():
    outcomes = Results(FIGURES / "staleness.json", TASK).outcomes
    shown = README.read_text("utf-8")
    assert all(line in shown for line in table(outcomes).split("\n")[2:])
    assert "figures/staleness.png" in shown
    assert (FIGURES / "staleness.png").stat().st_size < PNG_BYTES
