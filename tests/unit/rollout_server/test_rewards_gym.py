"""The traps of reasoning-gym's own scorers, each measured on the package, against ours."""

import json

import pytest

reasoning_gym = pytest.importorskip("reasoning_gym")
gym = pytest.importorskip("rollout_server.rewards.gym")


def score(completion, task, answer, metadata=None):
    return gym.reasoning_gym_score(completions=[completion], task=[task], answer=[answer], metadata=[metadata or {}])[0]


def item(task, index=0, **arguments):
    """One row as the wire carries it."""
    return json.loads(json.dumps(reasoning_gym.create_dataset(task, size=5, seed=3, **arguments)[index]))


def own_score(completion, task, row):
    return reasoning_gym.create_dataset(task, size=1, seed=0).score_answer(completion, row)


@pytest.mark.parametrize("answer", ["288 1", "The answer is 288", "288 288", "288.", "x288", "2880", "2 88"])
def test_a_number_must_stand_alone(answer):
    assert score(answer, "gsm_symbolic", "288") == 0.0
    assert score(f"<answer>{answer}</answer>", "gsm_symbolic", "288") == 0.0


@pytest.mark.parametrize("trap", ["{0} 1", "The answer is {0}", "{0}."])
def test_the_packages_scorer_falls_for_it_and_ours_does_not(trap):
    row = item("gsm_symbolic")
    text = trap.format(row["answer"])
    assert own_score(text, "gsm_symbolic", row) == 1.0, "the trap is real"
    assert score(text, "gsm_symbolic", row["answer"], row["metadata"]) == 0.0


def test_partial_marks_are_no_marks():
    row = item("chain_sum")
    text = f"The answer is {row['answer']}"
    assert 0.0 < own_score(text, "chain_sum", row) < 1.0
    assert score(text, "chain_sum", row["answer"], row["metadata"]) == 0.0


@pytest.mark.parametrize(
    "completion",
    ["288", " 288\n", "<answer>288</answer>", "so <answer> 288 </answer>.", "<answer>1</answer><answer>288</answer>"],
)
def test_the_last_tag_or_the_whole_completion_is_the_answer(completion):
    assert score(completion, "gsm_symbolic", "288") == 1.0


@pytest.mark.parametrize(
    "completion", ["<answer>288</answer><answer>1</answer>", "<answer>288", "", "<answer></answer>"]
)
def test_other_tags_do_not_count(completion):
    assert score(completion, "gsm_symbolic", "288") == 0.0


def test_chat_completions_are_read_by_their_last_message():
    assert score([{"role": "assistant", "content": "288"}], "gsm_symbolic", "288") == 1.0


TASKS = [
    "chain_sum", "gcd", "products", "gsm_symbolic", "leg_counting", "spell_backward", "countdown", "puzzle24",
    "sokoban", "knights_knaves", "game_of_life_halting", "kakurasu", "quantum_lock", "letter_jumble",
    "prime_factorization", "tower_of_hanoi", "n_queens", "jugs", "word_ladder", "mini_sudoku", "simple_integration",
    "fraction_simplification",
]  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_every_row_accepts_its_answer_and_nothing_around_it(task):
    row = item(task)
    answer = row["answer"]
    assert score(answer, task, answer, row["metadata"]) == 1.0
    assert score(f"thought <answer>{answer}</answer>", task, answer, row["metadata"]) == 1.0
    for around in ("The answer is {0}", "{0} 1", "1 {0}", "{0}\n{0}", "{0}.", "{0} or 7", "x{0}"):
        assert score(around.format(answer), task, answer, row["metadata"]) == 0.0, around


def test_another_right_answer_of_the_tasks_form_counts():
    numbers = {"numbers": [2, 3, 4], "target": 24}
    assert score("(4*3)*2", "countdown", "2*3*4", numbers) == 1.0
    assert score("4*2 * 3", "countdown", "2*3*4", numbers) == 1.0
    assert score("8/2 * (5+1)", "puzzle24", "whatever", {"numbers": [1, 2, 5, 8]}) == 1.0
    assert score("6 / (5/4 - 1)", "puzzle24", "whatever", {"numbers": [1, 4, 5, 6]}) == 1.0, "exact arithmetic"
    assert score("-3 + 27", "countdown", "27 - 3", {"numbers": [27, 3], "target": 24}) == 1.0


@pytest.mark.parametrize(
    "expression",
    [
        "24", "2*3*4*1", "2*3", "2+3+4", "2*3*4 = 24", "2*3*4\n2*3*4", "2**3*4", "23+4", "(2*3*4", "2*3*4)", "2//3*4",
        "2*3*4 if 1 else 0", "(" * 199, "2/(3-3)*4", "__import__('os')", "()", "2 3 4", "-" * 150 + "2*3*4x",
    ],
)  # fmt: skip
def test_puzzles_need_exactly_their_numbers_in_plain_arithmetic(expression):
    assert score(expression, "countdown", "4*3*2", {"numbers": [2, 3, 4], "target": 24}) == 0.0


def test_a_value_near_24_is_not_24():
    assert score("5*5 - 1/2", "puzzle24", "?", {"numbers": [1, 2, 5, 5]}) == 0.0


def test_an_alternative_solution_is_judged_by_the_task():
    row = next(row for row in (item("n_queens", i) for i in range(5)) if len(row["metadata"]["solutions"]) > 1)
    boards = ["\n".join(" ".join(rank) for rank in board) for board in row["metadata"]["solutions"]]
    others = [board for board in boards if board != row["answer"]]
    assert all(score(board, "n_queens", row["answer"], row["metadata"]) == 1.0 for board in others)
    wrong = others[0].replace("Q", "_", 1)
    assert score(wrong, "n_queens", row["answer"], row["metadata"]) == 0.0


EVALUATING = ["string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "simple_integration"]


@pytest.mark.parametrize("task", EVALUATING)
def test_scorers_that_evaluate_text_never_see_code(tmp_path, task):
    row = item(task)
    witness = tmp_path / "executed"
    code = f"__import__('os').mkdir('{witness}')"
    assert score(code, task, row["answer"], row["metadata"]) == 0.0
    assert not witness.exists()


def test_the_trap_above_is_real(tmp_path):
    row = item("string_insertion")
    witness = tmp_path / "executed"
    own_score(f"[__import__('os').mkdir('{witness}')]", "string_insertion", row)
    assert witness.exists(), "if this fails the package has mended it, and the rule may be relaxed"


def test_a_scorer_that_raises_on_nonsense_gives_nothing():
    row = item("jugs")
    assert score('["fly to the moon"]', "jugs", row["answer"], row["metadata"]) == 0.0


def test_a_task_without_reference_or_rule_is_the_rows_error():
    with pytest.raises(ValueError, match="reasoning_gym task boxnet has no reference answer and no strict rule"):
        score("x", "boxnet", None)


def test_tasks_without_reference_are_judged_by_their_form_and_scorer():
    row = item("propositional_logic")
    example = row["metadata"]["example_answer"]
    assert score(example, "propositional_logic", None, row["metadata"]) == 1.0
    assert score(f"It is {example}", "propositional_logic", None, row["metadata"]) == 0.0
