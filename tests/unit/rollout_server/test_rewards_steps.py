"""From text to tokens, with decoders as tokenizers have them: bytes, pieces, skipped specials."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rollout_server.rewards.steps import step_tokens

STOP = 256
README = Path(__file__).parents[3] / "rollout_server" / "README.md"


def decode_bytes(ids):
    """As byte-level tokenizers do: a character that is not whole yet is a replacement, the stop token is nothing."""
    return bytes(token for token in ids if token != STOP).decode(errors="replace")


def test_lines_end_with_the_tokens_that_bring_their_last_character():
    pieces = ["2 + ", "3", "\n", "= 5", "\n\n", "so ", "5"]
    ends = [match.end() for match in re.finditer(r"\n+|$", "".join(pieces))]
    assert ends == [6, 11, 15]
    assert step_tokens("".join(pieces), ends, range(7), lambda ids: "".join(pieces[k] for k in ids)) == [2, 4, 6]


def test_the_end_of_the_text_is_the_stop_token():
    ids = [*b"ab", STOP]
    assert step_tokens("ab", [1, 2], ids, decode_bytes) == [0, 2]


def test_an_end_inside_of_a_token_is_that_tokens():
    assert step_tokens("one two", [2, 3, 5], [0, 1, 2], lambda ids: "".join(("one", " two", "")[k] for k in ids)) == [
        0,
        0,
        1,
    ]


@pytest.mark.parametrize(("end", "ids"), [(3, [97, 98]), (-1, [97, 98]), (0, [])])
def test_ends_outside_are_refused(end, ids):
    with pytest.raises(
        ValueError, match=f"a step ends at {end} in a text of {len(ids)} characters and {len(ids)} tokens"
    ):
        step_tokens("ab"[: len(ids)], [end], ids, decode_bytes)


@given(st.text(max_size=30), st.booleans(), st.data())
def test_bytes_are_found_one_by_one(text, stops, data):
    text = text.encode(errors="replace").decode()
    ids = [*text.encode(), *([STOP] if stops else [])]
    if not ids:
        return
    for end in data.draw(st.lists(st.integers(0, len(text)), max_size=5)):
        expected = max(len(text[:end].encode()) - 1, 0) if end < len(text) else len(ids) - 1
        assert step_tokens(text, [end], ids, decode_bytes) == [expected]


def test_a_tokenizer_of_the_shelf(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    ids = [*tokenizer("12 + 3 = 15", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    text = decode(ids)
    ends = range(1, len(text) + 1)
    for end, token in zip(ends, step_tokens(text, ends, ids, decode), strict=True):
        assert decode(ids[: token + 1]).startswith(text[:end])
        assert token == len(ids) - 1 or not decode(ids[:token]).startswith(text[:end])


def test_the_example_of_the_readme_judges_every_sum(tiny_model_dir):
    source = README.read_text().partition("    import re\n")[2].partition("\n\n- An answer")[0]
    names: dict[str, Any] = {"re": re}
    exec(textwrap.dedent("    import re\n" + source).replace("DIR", str(tiny_model_dir)), names)
    encode, eos = names["TOKENIZER"], names["TOKENIZER"].eos_token_id
    ids = [[*encode(text, add_special_tokens=False)["input_ids"], eos] for text in ("1+2=3 4+4=9", "no", "5+5=10 ")]
    texts = [names["decode"](of) for of in ids]
    first, second, third = names["sums"](texts, ids)
    assert [reward for _, reward in first] == [1.0, 0.0]
    assert names["decode"](ids[0][: first[0][0] + 1]).endswith("=3")
    assert first[1][0] == len(ids[0]) - 1, "the stop token"
    assert second is None
    assert [reward for _, reward in third] == [1.0]
    assert third[0][0] < len(ids[2]) - 1
