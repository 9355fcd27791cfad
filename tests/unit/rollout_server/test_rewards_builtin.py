import subprocess
import sys

import pytest

from rollout_server.rewards.builtin import exact_match, text_of, think_answer_format


@pytest.mark.parametrize(
    ("completion", "answer", "finish_reason", "reward"),
    [
        ("46", "46", "stop", 1.0),
        (" 46", "46", "stop", 1.0),
        ("46", " 46\n", "stop", 1.0),
        ("46", 46, "stop", 1.0),
        ("46", "46", "length", 0.0),
        ("46", "46", "abort", 0.0),
        ("46 or 47", "46", "stop", 0.0),
        ("The answer is 46", "46", "stop", 0.0),
        ("46.0", "46", "stop", 0.0),
        ("4 6", "46", "stop", 0.0),
        ("", "46", "stop", 0.0),
        ([{"role": "assistant", "content": "46"}], "46", "stop", 1.0),
    ],
)
def test_exact_match_wants_the_answer_alone_and_a_stop(completion, answer, finish_reason, reward):
    assert exact_match(completions=[completion], answer=[answer], finish_reason=[finish_reason]) == [reward]


def test_exact_match_keeps_the_order_of_the_completions():
    rewards = exact_match(completions=["1", "2", "1"], answer=["1"] * 3, finish_reason=["stop"] * 3)
    assert rewards == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>a\nb</think><answer>c</answer>", 1.0),
        (" <think>1 < 2</think>\n\n<answer>c\n</answer>\n", 1.0),
        ("<think></think><answer>c</answer>", 0.0),
        ("<think>a</think><answer> </answer>", 0.0),
        ("<answer>c</answer><think>a</think>", 0.0),
        ("<think>a</think>text<answer>c</answer>", 0.0),
        ("text<think>a</think><answer>c</answer>", 0.0),
        ("<think>a</think><answer>c</answer>text", 0.0),
        ("<think>a</think><answer>c</answer><answer>d</answer>", 0.0),
        ("<think>a</think><think>b</think><answer>c</answer>", 0.0),
        ("<think>a<answer>b</answer></think><answer>c</answer>", 0.0),
        ("<think>a</think><answer>c", 0.0),
        ("c", 0.0),
    ],
)
def test_format_wants_both_tags_once_in_order_and_filled(completion, reward):
    assert think_answer_format(completions=[completion]) == [reward]


def test_text_of_a_chat_is_its_last_message():
    assert text_of([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]) == "b"


def test_the_server_process_never_imports_the_scorers_libraries():
    program = (
        "import sys, rollout_server.rewards.pool, rollout_server.groups\n"
        "assert not {'math_verify', 'sympy', 'reasoning_gym', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
