import asyncio
import time

import pytest

from protocol.messages import RewardStatus
from rollout_server.rewards.base import RewardCall
from rollout_server.rewards.pool import RewardPool

math_equal = pytest.importorskip("rollout_server.rewards.math_equal", reason="needs math-verify")


def score(completion, answer):
    return math_equal.math_equal(completions=[completion], answer=[answer])[0]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("7", "7"),
        ("so it is 7.", "7"),
        (r"\boxed{7}", "7"),
        (r"3 + 5 = 9, no: \boxed{\frac{1}{2}}", "0.5"),
        (r"\boxed{\frac{14}{2}}", "7"),
        ("1/2", r"\frac{1}{2}"),
        ("1,000", "1000"),
        (r"\boxed{x + 1}", "$1 + x$"),
        (r"\boxed{(1, 2)}", "(1,2)"),
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}"),
        ("7", r"the answer is \boxed{7}"),
        (r"<think>\boxed{8} \boxed{9}</think> \boxed{7}", "7"),
        ("-7", "-7"),
        ([{"role": "assistant", "content": "7"}], 7),
    ],
)
def test_equal(completion, answer):
    assert score(completion, answer) == 1.0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("8", "7"),
        ("", "7"),
        ("no number", "7"),
        (r"\boxed{7} \boxed{7}", "7"),
        (r"\boxed{8} \boxed{7}", "7"),
        (r"\boxed{7", "7"),
        (r"\boxed{}", "7"),
        (r"\boxed{7, 8}", "7"),
        (r"\boxed{7 \text{ or } 8}", "7"),
        ("it is 7 or 8", "7"),
        ("it is 8 or 17", "7"),
        ("x7", "7"),
        ("7.5", "7"),
        ("7.0.1", "7"),
        ("<think>7</think>", "7"),
        (r"\boxed{" + "1+" * 300 + "1}", "301"),
        (r"\boxed{x}", "7"),
        (r"\boxed{\text{seven}}", "7"),
    ],
)
def test_not_equal(completion, answer):
    assert score(completion, answer) == 0.0


@pytest.mark.parametrize(
    "payload",
    [
        "__import__('os').mkdir('{}')",
        "().__class__.__base__.__subclasses__()",
        "exec(\"import os; os.mkdir('{}')\")",
        "open('{}', 'w')",
        r"\text{{__import__('os').mkdir('{}')}}",
    ],
)
def test_text_is_never_run_as_code(tmp_path, payload):
    witness = tmp_path / "executed"
    assert score(rf"\boxed{{{payload.format(witness)}}}", "7") == 0.0
    assert score(payload.format(witness), "7") in (0.0, 1.0)
    assert not witness.exists()


def test_a_row_whose_answer_is_no_mathematics_is_the_rows_error():
    with pytest.raises(ValueError, match="the row's answer is neither a number nor LaTeX"):
        score("7", "")


BOMBS = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{((((2^{99})!)!)!)!}"]
"""math-verify's own limit does not end these: they hang in C code."""


def test_expressions_that_explode_are_killed_and_the_others_scored():
    completions = [r"\boxed{7}", *BOMBS, "8"]
    call = RewardCall(
        prompts=["?"] * 4,
        completions=completions,
        completion_ids=[[1]] * 4,
        finish_reasons=["stop"] * 4,
        columns={"answer": "7"},
    )

    async def run():
        async with RewardPool(["math_equal"], workers=2, timeout_s=1.0, on_timeout=0.0) as pool:
            started = time.monotonic()
            return await pool.score(call), time.monotonic() - started

    scores, seconds = asyncio.run(run())
    ok, timeout, *_ = RewardStatus
    assert scores.statuses[:, 0].tolist() == [ok, timeout, timeout, ok]
    assert scores.values[:, 0].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert scores.notes == ("math_equal: killed after 1 s, scoring a completion",)
    assert seconds < 20.0
