"""Which engine serves, and what is said to those whose choice cannot run here."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from protocol.errors import ConfigError
from protocol.settings import load_settings
from protocol.waits import Waits
from rollout_server import engines
from rollout_server.config import SGLANG_OWN, ServerConfig
from rollout_server.engines import choice
from rollout_server.engines.choice import Choice, Machine, choose_engine, read_machine, version_numbers

URL = {"engine_url": "http://127.0.0.1:30000", "engine_admin_key": "secret"}
NEW = "0.5.23"


def machine(*, cuda: bool = False, cpu: bool = False, sglang: str | None = None) -> Machine:
    return Machine(has_cuda=cuda, allows_cpu_sglang=cpu, sglang_version=sglang)


@pytest.mark.parametrize(
    ("options", "here", "engine"),
    [
        ({}, machine(), "transformers"),
        ({}, machine(sglang=NEW), "transformers"),
        ({}, machine(sglang=NEW, cpu=True), "transformers"),
        ({}, machine(sglang="0.5.21", cuda=True), "sglang"),
        ({"device": "cpu"}, machine(sglang=NEW, cuda=True), "transformers"),
        ({"device": "cuda:1"}, machine(sglang=NEW), "sglang"),
        (URL, machine(), "sglang"),
        (URL, machine(sglang="0.5.6"), "sglang"),
        ({"engine": "sglang", **URL}, machine(), "sglang"),
        ({"engine": "sglang"}, machine(sglang=NEW, cuda=True), "sglang"),
        ({"engine": "sglang"}, machine(sglang="0.5.21.post1", cpu=True), "sglang"),
        ({"engine": "sglang"}, machine(sglang="1.0", cuda=True), "sglang"),
        ({"engine": "transformers"}, machine(sglang=NEW, cuda=True), "transformers"),
        ({"engine": "scripted"}, machine(cuda=True), "scripted"),
    ],
)
def test_the_choice(options: dict[str, Any], here: Machine, engine: str) -> None:
    assert choose_engine(ServerConfig(**options), here) == Choice(engine)  # type: ignore[arg-type]


def test_a_gpu_without_sglang_is_served_by_transformers_and_that_is_said() -> None:
    made = choose_engine(ServerConfig(), machine(cuda=True))
    assert made.engine == "transformers"
    assert made.notice.startswith("engine auto: there is a GPU, and SGLang, ")
    assert "pip install '.[server]'" in made.notice


@pytest.mark.parametrize(
    ("options", "here", "complaint"),
    [
        ({"engine": "sglang"}, machine(sglang=NEW),
         r"no CUDA device here: .* --engine transformers, .* --engine-url http://.* SGLANG_USE_CPU_ENGINE=1"),
        ({"engine": "sglang", "device": "cpu"}, machine(sglang=NEW, cuda=True), "no CUDA device here"),
        ({"engine": "sglang"}, machine(cuda=True),
         r"sglang is not installed here: pip install '\.\[server\]' in headway's directory, or take --engine"),
        ({"engine": "sglang"}, machine(cpu=True), "is not installed here"),
        ({"engine": "sglang"}, machine(cuda=True, sglang="0.5.20"),
         r"sglang 0\.5\.20 is installed, 0\.5\.21 or newer is needed .* kills itself .* 'sglang>=0\.5\.21'"),
        ({}, machine(cuda=True, sglang="0.5.9.post2"), r"sglang 0\.5\.9\.post2 is installed"),
        ({"engine": "sglang"}, machine(cpu=True, sglang="0.5.20"), "0.5.21 or newer"),
    ],
)  # fmt: skip
def test_what_cannot_run_here_is_refused_in_one_line(options: dict[str, Any], here: Machine, complaint: str) -> None:
    with pytest.raises(ConfigError, match=f"^engine sglang: .*{complaint}") as caught:
        choose_engine(ServerConfig(**options), here)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lora_target_modules": ["q_proj"]}, "lora_target_modules has .*: it needs engine sglang with max_lora_rank;"),
        ({"lora_target_modules": ["q_proj"], "engine": "transformers"}, "lora_target_modules has no effect here"),
        ({"weight_update_mode": "drain", "engine": "transformers"}, "weight_update_mode .* needs engine sglang; add"),
        ({"sglang": {"tp-size": 2}, "engine": "scripted"}, "sglang has no effect here: it needs engine sglang"),
        ({"engine_probe_s": 9.0, "engine": "transformers"}, "engine_probe_s has no effect here"),
        ({"engine_start_s": 9.0, "engine": "transformers"}, "engine_start_s has no effect here"),
        ({"engine_admin_key": "k"}, "engine_admin_key has no effect here: it needs engine_url"),
        ({"engine_api_key": "k", "engine": "sglang"}, "engine_api_key has no effect here: it needs engine_url"),
        ({"engine_log": "log", **URL}, "engine_log has .* an SGLang that this server starts, and engine_url names an"),
        ({"scripted": {"seed": 1}, "engine": "sglang"}, "scripted has no effect here: it needs engine scripted"),
    ],
)
def test_a_word_that_nothing_reads_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ServerConfig(**options)
    (key, *_) = options
    plain = {name: value for name, value in options.items() if name != key}
    resolved = {**plain, key: ServerConfig().model_dump()[key]}
    assert ServerConfig(**resolved) == ServerConfig(**plain), "a resolved configuration has every word"


def test_words_for_sglang_where_auto_takes_another_engine_are_named() -> None:
    made = choose_engine(ServerConfig(sglang={"tp-size": 2}, weight_update_mode="drain"), machine())
    assert made.engine == "transformers"
    assert made.notice.endswith("serving with transformers, where no effect is had by sglang, weight_update_mode")


def test_what_the_machine_has_is_read_without_torch(tmp_path: Path) -> None:
    assert read_machine({}, root=tmp_path, package="no-such-package") == machine()
    assert read_machine({"SGLANG_USE_CPU_ENGINE": "1"}, root=tmp_path, package="no-such") == machine(cpu=True)
    assert read_machine({"SGLANG_USE_CPU_ENGINE": "0"}, root=tmp_path, package="no-such") == machine()
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    installed = read_machine({}, root=tmp_path, package="numpy")
    assert installed.has_cuda
    assert installed.sglang_version is not None
    assert not read_machine({"CUDA_VISIBLE_DEVICES": ""}, root=tmp_path).has_cuda
    assert read_machine({"CUDA_VISIBLE_DEVICES": "1"}, root=tmp_path).has_cuda


def test_versions_are_compared_as_numbers() -> None:
    assert version_numbers("0.5.9") < version_numbers("0.5.21rc1") == (0, 5, 21) < version_numbers("0.5.100.dev1+g12ab")
    assert version_numbers("unknown") == ()


def test_the_notice_reaches_the_log_once(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choice, "read_machine", lambda: machine(cuda=True))
    with caplog.at_level(logging.INFO, logger="rollout_server.engines"):
        engines.create_engine(ServerConfig(model=str(tiny_model_dir), device="auto"), Waits())
    assert [record.getMessage().split(" ", 1)[0] for record in caplog.records] == ["event=engine"]
    assert "SGLang" in caplog.text


def test_sglang_gets_the_whole_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    from rollout_server.engines.sglang import SGLangEngine

    monkeypatch.setattr(choice, "read_machine", lambda: machine(cuda=True, sglang=NEW))
    assert isinstance(engines.create_engine(ServerConfig(model="m"), Waits()), SGLangEngine)
    with pytest.raises(ConfigError, match="model is empty: engine sglang needs"):
        engines.create_engine(ServerConfig(), Waits())


def refused(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(ServerConfig, argv, prog="try")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("127.0.0.1:30000", "must be http://HOST:PORT, for example http://127.0.0.1:30000"),
        ("https://127.0.0.1:30000", "must be http://HOST:PORT"),
        ("http://127.0.0.1", "must be http://HOST:PORT"),
        ("http://127.0.0.1:port", "must be http://HOST:PORT"),
        ("http://127.0.0.1:70000", "must be http://HOST:PORT"),
        ("http://[::1", "must be http://HOST:PORT"),
        ("http://127.0.0.1:30000/v1", "must be http://HOST:PORT"),
        ("http://10.0.0.1:30000", "10.0.0.1 is not loopback, and its keys and every prompt would travel in the clear"),
        ("http://gpu-host:30000", "gpu-host is not loopback"),
    ],
)
def test_an_address_that_is_none_or_leads_away_is_refused(url: str, complaint: str) -> None:
    assert refused("--engine-url", url, "--engine-admin-key", "k").startswith(f"engine_url {url}: {complaint}")


@pytest.mark.parametrize("url", ["http://127.0.0.1:30000", "http://localhost:1/", "http://[::1]:30000"])
def test_loopback_addresses_are_taken(url: str) -> None:
    assert load_settings(ServerConfig, ["--engine-url", url, "--engine-admin-key", "k"], prog="try").engine_url == url


def test_a_closed_lab_may_name_another_host() -> None:
    argv = ["--engine-url", "http://10.0.0.1:30000", "--engine-admin-key", "k", "--insecure-plaintext"]
    assert load_settings(ServerConfig, argv, prog="try").insecure_plaintext


def test_an_address_needs_the_admin_key() -> None:
    text = refused("--engine-url", URL["engine_url"], "--engine-api-key", "visible")
    assert text.startswith("engine_admin_key is empty: start the SGLang at engine_url with --admin-api-key KEY")
    assert "visible" not in text


def test_an_address_goes_with_no_other_engine_and_no_arguments() -> None:
    argv = ["--engine-url", URL["engine_url"], "--engine-admin-key", "k"]
    assert "engine_url is set and engine is transformers" in refused(*argv, "--engine", "transformers")
    assert "engine_url is set and engine is scripted" in refused(*argv, "--engine", "scripted")
    assert refused(*argv, "--sglang.tp-size", "2").startswith("sglang.tp-size is for an SGLang that this server starts")


@pytest.mark.parametrize("key", [*SGLANG_OWN, "api_key", "admin_api_key", "skip_tokenizer_init"])
def test_what_the_engine_sets_itself_is_nobody_elses(key: str) -> None:
    text = refused(f"--sglang.{key}", "visible")
    assert text.startswith(f"sglang.{key}: {key.replace('_', '-')} is ")
    assert "visible" not in text


@pytest.mark.parametrize(
    ("key", "complaint"),
    [
        ("admin-api", "sglang.admin-api: admin-api-key is made up for each start; leave it out"),
        ("model-pat", "sglang.model-pat: model-path is --model here; leave it out"),
        ("--tp-size", "sglang.--tp-size: no argument of sglang.launch_server; write --sglang.tp-size 2"),
    ],
)
def test_shortened_and_misspelled_keys(key: str, complaint: str) -> None:
    assert refused(f"--sglang.{key}", "2").startswith(complaint)


@pytest.mark.parametrize("port", ["http", "-1", "65536", "30000.5", "null", "[1]", "99999999999999999999"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    text = refused("--sglang.port", port)
    assert text.startswith(f"sglang.port = {port}: must be a whole number")
    assert text.endswith("from 0 to 65535 (0, or no port: a free one is found)")


@pytest.mark.parametrize("key", ["p", "po", "por"])
def test_a_shortened_port_would_be_sglangs_alone(key: str) -> None:
    assert refused(f"--sglang.{key}", "30000") == f"sglang.{key}: write sglang.port in full: this server calls it there"


def test_a_number_of_nodes_that_is_none_is_refused() -> None:
    text = refused("--sglang.nnodes", "many")
    assert text.startswith("sglang.nnodes = many: must be a whole number from 1")


@pytest.mark.parametrize("port", ["0", "1", "65535"])
def test_a_port_is_a_number_of_sixteen_bits(port: str) -> None:
    assert load_settings(ServerConfig, ["--sglang.port", port], prog="try").sglang == {"port": int(port)}


def test_all_other_arguments_are_taken_as_they_come() -> None:
    argv = ["--sglang.tp-size", "2", "--sglang.port", "30001", "--sglang.enable-metrics", "--sglang.log_level", "info"]
    config = load_settings(ServerConfig, argv, prog="try")
    assert config.sglang == {"tp-size": 2, "port": 30001, "enable-metrics": True, "log_level": "info"}
