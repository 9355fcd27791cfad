import json
import sys

import numpy as np
import pytest

from learner.config import LearnerConfig
from learner.prompts import EVAL_SEED_OFFSET, open_prompts, stop_token_ids
from protocol.errors import ConfigError


class CharTokenizer:
    """One token per character, plus a begin token as `special`; a template that marks roles."""

    def __init__(self, template=True):
        self._template = template

    def encode(self, text, *, add_special_tokens=True):
        return [1] * add_special_tokens + [ord(c) for c in text]

    def convert_ids_to_tokens(self, ids):
        return [chr(i) for i in ids]

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt, continue_final_message):
        assert not tokenize
        if not self._template:
            raise ValueError("Cannot use chat template functions")
        if conversation[0]["role"] == "narrator":
            raise RuntimeError("unknown role narrator")
        text = "".join(f"[{m['role']}]{m['content']}\n" for m in conversation)
        return text[:-1] if continue_final_message else text + "[assistant]" * add_generation_prompt


def text_of(row):
    return "".join(chr(token) for token in row.prompt_tokens if token != 1)


@pytest.fixture
def data(tmp_path):
    """Write rows (objects or raw lines) to a file and open it with the given options."""

    def write(*rows, tokenizer=None, evaluation=False, **options):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows))
        key = "eval_dataset" if evaluation else "dataset"
        config = LearnerConfig(**({key: str(path)} | options))
        return open_prompts(config, tokenizer or CharTokenizer(), evaluation=evaluation)

    return write


def numbered(count):
    return [{"prompt": f"row {i}", "answer": str(i)} for i in range(count)]


def test_a_row_has_its_prompt_its_tokens_and_all_other_columns(data):
    prompts = data({"prompt": "2+2=", "answer": "4", "meta": {"hard": [1, None]}}, shuffle=False)
    row = prompts.row(0)
    assert row.ordinal == 0
    assert row.prompt == "2+2="
    assert row.prompt_tokens.tolist() == [1, *map(ord, "2+2=")]
    assert row.prompt_tokens.dtype == np.int32
    assert json.loads(row.row_json) == {"prompt": "2+2=", "columns": {"answer": "4", "meta": {"hard": [1, None]}}}


def test_every_epoch_has_each_row_once_in_an_order_of_its_own(data):
    prompts = data(*numbered(20))
    epochs = [[prompts.row(epoch * 20 + i).prompt for i in range(20)] for epoch in range(3)]
    everything = {f"row {i}" for i in range(20)}
    assert [set(epoch) for epoch in epochs] == [everything] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len(prompts) == 20


def test_a_row_depends_on_nothing_but_seed_and_ordinal(data):
    first = data(*numbered(20), seed=7)
    forward = [first.row(i).prompt for i in range(45)]
    second = data(*numbered(20), seed=7)
    assert [second.row(i).prompt for i in reversed(range(45))] == forward[::-1]
    assert [data(*numbered(20), seed=8).row(i).prompt for i in range(45)] != forward


def test_without_shuffle_rows_keep_the_files_order(data):
    prompts = data(*numbered(3), shuffle=False)
    assert [prompts.row(i).prompt for i in range(7)] == [f"row {i % 3}" for i in range(7)]


def test_a_row_too_long_is_none_and_keeps_its_ordinal(data):
    prompts = data({"prompt": "a" * 10}, {"prompt": "b"}, max_prompt_length=5, shuffle=False)
    assert prompts.row(0) is None
    assert prompts.row(1).prompt == "b"
    assert prompts.row(2) is None
    assert prompts.row(3).ordinal == 3


CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("prompt", "prompt_format", "text", "seen"),
    [
        ("hi", "auto", "hi", "hi"),
        ("hi", "text", "hi", "hi"),
        ("hi", "chat", "[user]hi\n[assistant]", CHAT),
        (CHAT, "auto", "[user]hi\n[assistant]", CHAT),
        (CHAT, "chat", "[user]hi\n[assistant]", CHAT),
    ],
)
def test_prompt_format_decides_between_text_and_template(data, prompt, prompt_format, text, seen):
    row = data({"prompt": prompt}, prompt_format=prompt_format).row(0)
    assert text_of(row) == text
    assert row.prompt == seen
    assert (row.prompt_tokens[0] == 1) == isinstance(seen, str), "a template brings its own special tokens"


def test_a_chat_that_ends_with_the_assistant_is_continued(data):
    row = data({"prompt": [*CHAT, {"role": "assistant", "content": "2+2="}]}).row(0)
    assert text_of(row) == "[user]hi\n[assistant]2+2="


def test_evaluation_uses_its_own_data_in_order_and_its_first_rows(data):
    prompts = data(*numbered(5), evaluation=True, eval_size=3, seed=4)
    assert len(prompts) == 3
    assert [prompts.row(i).prompt for i in range(4)] == ["row 0", "row 1", "row 2", "row 0"]


def test_the_fingerprint_follows_all_that_decides_the_rows(data):
    rows = numbered(4)
    known = [
        data(*rows).fingerprint,
        data(*rows, seed=1).fingerprint,
        data(*rows, shuffle=False).fingerprint,
        data(*rows, prompt_format="chat").fingerprint,
        data(*rows, max_prompt_length=99).fingerprint,
        data(*rows, prompt_column="answer").fingerprint,
        data(*rows[:3]).fingerprint,
        data(*rows[::-1]).fingerprint,
    ]
    assert len(set(known)) == len(known)
    assert data(*rows).fingerprint == known[0]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, r"rows.jsonl: no rows; write one JSON object a line"),
        ([b"", b"  "], {}, r"rows.jsonl: no rows"),
        ([{"prompt": "a"}, b"", b'{"prompt": '], {}, "rows.jsonl line 3: not a JSON object: "),
        ([b"[1]"], {}, "line 1: not a JSON object: Expected `object`, got `array`"),
        ([b'{"prompt": NaN}'], {}, "line 1: not a JSON object"),
        ([b'{"prompt": "\xff"}'], {}, "line 1: not a JSON object"),
        ([b'{"prompt": "a", "x": ' + b"[" * 99_999], {}, "line 1: not a JSON object"),
        ([{"promt": "a", "answer": 1}], {}, "line 1: no column 'prompt'; found promt, answer; .*perhaps to 'promt'$"),
        ([{"prompt": "a"}, {"x": 1}], {}, "line 2: no column 'prompt'; found x; set prompt_column$"),
        ([{}], {}, "line 1: no column 'prompt'; found none"),
        ([{"prompt": "a"}], {"prompt_column": "question"}, "no column 'question'; found prompt"),
        ([{"prompt": ""}], {}, "line 1: column 'prompt' is empty"),
        ([{"prompt": 3}], {}, "line 1: column 'prompt' is a int; allowed is a string or a list of chat messages"),
        ([{"prompt": []}], {}, "line 1: column 'prompt' is a list; allowed"),
        ([{"prompt": ["hi"]}], {}, 'a chat message is {"role": "user", "content": "..."}, not a str'),
        ([{"prompt": [{"role": "user", "text": "hi"}]}], {}, "not an object with role, text"),
        ([{"prompt": [{"role": "user", "content": None}]}], {}, "not an object with role, content"),
        ([{"prompt": "a", "finish_reason": 1}], {}, "line 1: rename column 'finish_reason'"),
        ([{"prompt": "a"}, {"prompt": CHAT}], {"prompt_format": "text"}, "line 2: the prompt is a list of messages"),
        ([{"prompt": "a", "x": "y" * (1 << 20)}], {}, r"line 1: \d+ bytes; a row may have 1048576"),
        ([{"prompt": "abcdef"}, {"prompt": "abcd"}], {"max_prompt_length": 3}, "no prompt fits .* 3; .* 5 tokens"),
        ([{"prompt": [{"role": "narrator", "content": "a"}]}], {}, "line 1: .*: unknown role narrator; "),
        ([{"prompt": "a"}], {"dataset_config": {"size": 3}}, "dataset_config .* only reasoning_gym:<task> "),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_data_set_is_said_when_it_is_opened(data, rows, options, message):
    with pytest.raises(ConfigError, match=message) as error:
        data(*rows, **options)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_template_serves_text_only(data):
    assert data({"prompt": "a"}, tokenizer=CharTokenizer(template=False)).row(0).prompt == "a"
    with pytest.raises(ConfigError, match="Cannot use chat template functions; string prompts need no template"):
        data({"prompt": "a"}, tokenizer=CharTokenizer(template=False), prompt_format="chat")


def test_a_prompt_that_leaves_no_tokens_is_refused(data):
    class Stripping(CharTokenizer):
        def encode(self, text, *, add_special_tokens=True):
            return [ord(c) for c in text.strip()]

    with pytest.raises(ConfigError, match="line 2: the prompt has no tokens"):
        data({"prompt": "a"}, {"prompt": " "}, tokenizer=Stripping())


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("", "data set '': name a .jsonl file or reasoning_gym:<task>"),
        ("rows.csv", "data set 'rows.csv': name a .jsonl file"),
        ("absent.jsonl", "data set absent.jsonl: No such file or directory"),
        ("reasoning_gym:", "name a .jsonl file or reasoning_gym:<task>"),
    ],
)
def test_a_data_set_that_is_none(dataset, message):
    with pytest.raises(ConfigError, match=message):
        open_prompts(LearnerConfig(dataset=dataset), CharTokenizer())


def test_stop_texts_become_ids_beside_the_models_own():
    tokenizer = CharTokenizer()
    assert stop_token_ids(tokenizer, ["\n", "|"], eos=2) == (2, 10, 124)
    assert stop_token_ids(tokenizer, [], eos=[5, 2, 5]) == (2, 5)
    assert stop_token_ids(tokenizer, ["\n"], eos=10) == (10,)
    assert stop_token_ids(tokenizer, [], eos=None) == ()


@pytest.mark.parametrize(
    ("stop", "tokens"), [("\n\n", "2 tokens"), ("", "0 tokens"), ("END", r"3 tokens \['E', 'N', 'D'\]")]
)
def test_a_stop_text_must_be_one_token(stop, tokens):
    with pytest.raises(ConfigError, match=f"is {tokens}.*each stop text must be a single token"):
        stop_token_ids(CharTokenizer(), [stop], eos=2)


class TestReasoningGym:
    """The package's tasks as data sets."""

    @pytest.fixture(autouse=True)
    def package(self):
        pytest.importorskip("reasoning_gym")

    def open(self, task="chain_sum", *, evaluation=False, **options):
        key = "eval_dataset" if evaluation else "dataset"
        config = LearnerConfig(**({key: f"reasoning_gym:{task}"} | options))
        return open_prompts(config, CharTokenizer(), evaluation=evaluation)

    def test_training_rows_never_end_and_never_repeat_their_block(self):
        prompts = self.open()
        assert len(prompts) == sys.maxsize
        ordinals = [0, 1, 999, 1000, 12_345_678]
        rows = [self.open().row(i) for i in ordinals]
        assert [prompts.row(i).prompt for i in ordinals[::-1]] == [row.prompt for row in rows[::-1]]
        assert len({row.prompt for row in rows}) == len(rows)

    def test_a_row_has_what_the_scorer_needs(self):
        row = self.open().row(3)
        assert sorted(row.columns) == ["answer", "metadata", "task"]
        assert row.columns["task"] == "chain_sum"
        assert str(eval(row.prompt.split(":")[-1].strip(" =.").replace("=", ""))) == row.columns["answer"]
        assert json.loads(row.row_json)["columns"] == row.columns

    def test_a_task_that_lays_its_rows_out_beforehand_still_never_ends(self):
        prompts = self.open("gsm_symbolic")
        assert prompts.row(0).prompt != prompts.row(1000).prompt
        assert prompts.row(5_000_000).columns["answer"]

    def test_rows_are_plain_json_whatever_the_task_makes(self):
        json.loads(self.open("knights_knaves").row(0).row_json)

    def test_with_a_size_there_are_epochs(self):
        prompts = self.open(dataset_config={"size": 4, "min_terms": 2})
        epochs = [sorted(prompts.row(epoch * 4 + i).prompt for i in range(4)) for epoch in range(2)]
        assert len(prompts) == 4
        assert epochs[0] == epochs[1]

    def test_evaluation_is_finite_and_shares_nothing_with_training(self):
        training, evaluation = self.open(seed=3), self.open(evaluation=True, seed=3)
        assert len(evaluation) == 500
        assert len(self.open(evaluation=True, eval_size=7)) == 7
        trained = {training.row(i).prompt for i in range(500)}
        assert len(trained & {evaluation.row(i).prompt for i in range(500)}) < 5, "only by chance"
        assert EVAL_SEED_OFFSET < 2**32, "some tasks seed numpy, which takes no more"

    def test_the_fingerprint_follows_task_and_arguments(self):
        opened = [self.open(), self.open(seed=1), self.open("gcd"), self.open(dataset_config={"min_terms": 3})]
        assert len({prompts.fingerprint for prompts in opened}) == 4
        assert self.open().fingerprint == opened[0].fingerprint

    def test_a_task_that_is_none_names_the_nearest(self):
        with pytest.raises(ConfigError, match=r"reasoning_gym:chain_sums: no such task; nearest: .*chain_sum"):
            self.open("chain_sums")

    def test_arguments_it_does_not_take_are_refused(self):
        with pytest.raises(ConfigError, match=r"reasoning_gym:chain_sum refuses .*'min_turms'"):
            self.open(dataset_config={"min_turms": 3})

    def test_without_the_package_the_error_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "reasoning_gym", None)
        with pytest.raises(ConfigError, match=r"needs the package reasoning-gym: pip install '\.\[rewards\]'"):
            self.open()
