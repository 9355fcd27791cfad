"""SGLang (the fake one) that does not come up, is not ours, or lets the wrong people in."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import ConfigError
from protocol.waits import Waits
from rollout_server.engines.base import StagedWeights
from rollout_server.engines.choice import version_numbers
from rollout_server.engines.sglang import SGLangEngine
from rollout_server.engines.sglang.host import free_port
from tests.fake_sglang.driving import (
    ADMIN_KEY,
    API_KEY,
    V0,
    Fake,
    child_engine,
    make_config,
    request,
    run,
    running_fake,
)

pytestmark = pytest.mark.usefixtures("fake_path")
MakeWeights = Callable[..., StagedWeights]


async def fail(config: Any) -> str:
    with pytest.raises(ConfigError) as error:
        async with SGLangEngine(config, Waits()):
            raise AssertionError("it came up")
    return str(error.value)


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{next(Path('/proc/self/task').iterdir()).name}/children").read_text().split())


def test_a_flag_that_sglang_does_not_know_is_shown_as_it_says_so(tiny_model_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "engine" / "sglang.log"
    text = ""

    async def case() -> None:
        nonlocal text
        text = await fail(make_config(tiny_model_dir, sglang={"no-such-flag": 3}, engine_log=log))

    run(case())
    first, *_, last = text.splitlines()
    assert first == f"SGLang ended while starting (exit code 2). The end of its log, {log}:"
    assert last == "launch_server.py: error: unrecognized arguments: --no-such-flag 3"
    assert last in log.read_text()


def test_a_child_that_dies_at_start_is_shown_with_its_last_words(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SGLANG", '{"die": 7}')
    text = ""

    async def case() -> None:
        nonlocal text
        text = await fail(make_config(tiny_model_dir))

    run(case())
    found = re.match(r"SGLang ended while starting \(exit code 7\)\. The end of its log, (\S+):\n", text)
    assert found, text
    assert text.endswith("RuntimeError: the fake was told to die")
    assert "told to die" in Path(found[1]).read_text(), "the log of an engine that failed is kept"


def test_a_child_that_is_not_up_in_time_is_ended(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SGLANG", '{"slow_start_s": 60}')

    async def case() -> None:
        text = await fail(make_config(tiny_model_dir, engine_start_s=0.5))
        assert text.startswith("SGLang was not up within engine_start_s = 0.5 s. The end of its log, ")
        assert re.search(r"\nfake SGLang on port \d+$", text)

    before = children()
    run(case())
    assert children() == before


def test_a_child_that_answers_but_does_not_sample_is_not_up(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SGLANG", '{"hang": true}')

    async def case() -> None:
        text = await fail(make_config(tiny_model_dir, engine_start_s=1.0))
        assert text.startswith("SGLang was not up within engine_start_s = 1 s. ")

    run(case())


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ('{"refuse": {"/generate": 500}}', r"SGLang did not come up: SGLang at \S+/generate says 500: .*refused"),
        ('{"refuse": {"/server_info": 503}}', r"SGLang did not come up: SGLang at \S+/server_info says 503"),
        ('{"garbage": ["/server_info"]}', r"SGLang did not come up: SGLang at \S+/server_info: an answer that is none"),
        ('{"refuse": {"/server_info": 401}}', r"SGLang did not come up: SGLang at \S+/server_info says 401"),
        ('{"garbage": ["/generate"]}', r"SGLang did not come up: SGLang at \S+/generate: an answer that is none"),
        ('{"refuse": {"/v1/loads": 404}}', r"SGLang at \S+/v1/loads says 404"),
        ('{"version": "0.5.20.post1"}', r"SGLang 0\.5\.20\.post1 is too old: .*; 0\.5\.21 is the oldest that works"),
    ],
)
def test_a_child_that_cannot_be_used_is_one_clear_error(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, faults: str, message: str
) -> None:
    monkeypatch.setenv("FAKE_SGLANG", faults)

    async def case() -> None:
        assert re.match(message, await fail(make_config(tiny_model_dir)))

    before = children()
    run(case())
    assert children() == before


def test_a_port_in_use_is_the_users_to_change(tiny_model_dir: Path) -> None:
    async def case() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            text = await fail(make_config(tiny_model_dir, sglang={"port": port}))
            assert (
                text
                == f"sglang.port = {port}: Address already in use; choose another one, or none: a free one is found"
            )

    run(case())


def test_a_log_that_cannot_be_written_is_one_clear_error(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    async def case() -> None:
        text = await fail(make_config(tiny_model_dir, engine_log=tmp_path / "file" / "sglang.log"))
        assert re.match(r"SGLang cannot be started: .*(exists|Not a directory)", text)

    run(case())


def test_a_start_that_is_called_off_leaves_no_child(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SGLANG", '{"slow_start_s": 60}')

    async def case() -> None:
        waits = Waits()

        async def enter() -> None:
            async with SGLangEngine(make_config(tiny_model_dir), waits):
                raise AssertionError("it came up")

        before = children()
        entering = asyncio.create_task(enter())
        while not children() - before:
            await asyncio.sleep(0.001)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        assert children() == before

    run(case())


def test_keys_are_not_left_where_they_could_be_read(tiny_model_dir: Path) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir) as (_, fake):
            told = await fake.tell()
            words = Path(f"/proc/{told['pid']}/cmdline").read_text().split("\0")
            keys_file = Path(words[words.index("--config") + 1])
            assert keys_file.parent.stat().st_mode & 0o777 == 0o700
            assert not keys_file.exists(), "read once, needed no more"
            assert not any("key" in word for word in words if word.startswith("--"))

    run(case())


def test_nothing_is_left_on_disk(tiny_model_dir: Path, fake_path: Path) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir):
            assert [entry.name.startswith("headway-sglang-") for entry in fake_path.iterdir()] == [True]
        assert list(fake_path.iterdir()) == []

    run(case())


def test_every_start_has_keys_and_a_port_of_its_own(tiny_model_dir: Path) -> None:
    async def case() -> None:
        config = make_config(tiny_model_dir)
        async with SGLangEngine(config, Waits()) as one, SGLangEngine(config, Waits()) as two:
            assert one._life is not None
            assert two._life is not None
            assert one._life.client.url != two._life.client.url
            assert one._life.client._admin != two._life.client._admin

    run(case())


def test_an_engine_that_is_left_with_an_error_raises_just_that(tiny_model_dir: Path) -> None:
    async def case() -> None:
        with pytest.raises(KeyError, match="mine"):
            async with child_engine(tiny_model_dir):
                raise KeyError("mine")

    run(case())


def make_url_config(model: Path, port: int, **changes: Any) -> Any:
    fields = {
        "engine_url": f"http://127.0.0.1:{port}",
        "engine_api_key": API_KEY,
        "engine_admin_key": ADMIN_KEY,
        "engine_start_s": 10.0,
    }
    return make_config(model, **{**fields, **changes})


def test_an_engine_of_somebody_else_is_used_and_left_running(tiny_model_dir: Path, weights: MakeWeights) -> None:
    async def case() -> None:
        port = free_port(0)
        with running_fake(tiny_model_dir, port) as process:
            async with SGLangEngine(make_url_config(tiny_model_dir, port), Waits()) as engine:
                await engine.load_weights(weights(V0))
                assert len(await engine.generate(request())) == 4
            assert process.poll() is None
            assert (await Fake(port).tell())["calls"]["/update_weights_from_disk"] == 1

    run(case())


def test_an_engine_left_in_the_middle_of_a_swap_is_resumed(tiny_model_dir: Path, weights: MakeWeights) -> None:
    """Its last user has gone: it stands still, with samples that nobody waits for."""

    async def case() -> None:
        port = free_port(0)
        with running_fake(tiny_model_dir, port):
            async with SGLangEngine(make_url_config(tiny_model_dir, port), Waits()) as first:
                await first.load_weights(weights(V0))
                assert first._life is not None
                orphan = asyncio.create_task(first.generate(request("orphan", length=200)))
                await Fake(port).until(lambda told: len(told["bodies"]) >= 7)
                await first._life.client.pause("in_place")
                async with SGLangEngine(make_url_config(tiny_model_dir, port), Waits()) as second:
                    await second.load_weights(weights(V0))
                    assert len(await second.generate(request())) == 4
                    orphan.cancel()
                    await asyncio.wait([orphan])

    run(case())


@pytest.mark.parametrize(
    ("server", "ours", "message"),
    [
        ({"admin_key": ""}, {}, "takes new weights from anybody: start SGLang with --admin-api-key KEY"),
        ({"admin_key": "", "api_key": ""}, {}, "takes new weights from anybody"),
        ({}, {"engine_admin_key": "wrong"}, "refuses engine_admin_key: it must be its --admin-api-key"),
        ({}, {"engine_api_key": ""}, "refuses engine_api_key: it must be its --api-key"),
        ({}, {"engine_api_key": "wrong"}, "refuses engine_api_key: it must be its --api-key"),
    ],
)
def test_keys_that_do_not_fit_or_are_not_asked_for_are_refused(
    tiny_model_dir: Path, server: dict[str, str], ours: dict[str, str], message: str
) -> None:
    async def case() -> None:
        port = free_port(0)
        with running_fake(tiny_model_dir, port, **server):
            text = await fail(make_url_config(tiny_model_dir, port, **ours))
            assert text.startswith(f"engine_url = http://127.0.0.1:{port}")
            assert message in text

    run(case())


def other_model(model: Path, directory: Path, **changes: Any) -> Path:
    """The model with other words in its config.json."""
    directory.mkdir()
    for file in model.iterdir():
        (directory / file.name).symlink_to(file)
    words = json.loads((model / "config.json").read_text())
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps({**words, **changes}))
    return directory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vocab_size": 46},
            r"it serves \S+, a qwen3 with a vocabulary of 46; ours is a qwen3 with a vocabulary of 45:",
        ),
        (
            {"num_hidden_layers": 3, "layer_types": None},
            r"it serves \S+, a qwen3 .*; ours is a qwen3 .*, of other shapes: start SGLang",
        ),
        ({"model_type": "no such kind"}, r"what it serves cannot be compared: model \S+: cannot be loaded: "),
    ],
)
def test_an_engine_that_serves_another_model_is_refused_by_its_files(
    tiny_model_dir: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    async def case() -> None:
        port = free_port(0)
        with running_fake(other_model(tiny_model_dir, tmp_path / "other", **changes), port):
            text = await fail(make_url_config(tiny_model_dir, port))
            assert re.match(rf"engine_url = http://127\.0\.0\.1:{port}: {message}", text)
            assert text.endswith("or give what it has")
            calls = (await Fake(port).tell())["calls"]
            assert "/abort_request" not in calls, "what others do there is left alone"

    run(case())


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ({"model_path": "org/name", "model_type": "llama"}, "it serves org/name, a llama; ours is a qwen3"),
        ({"model_path": "/no/such/place", "model_type": None}, "it serves /no/such/place, a None; ours is a qwen3"),
        ({"context_length": 255}, r"it takes 255 tokens \(its --context-length\), and 256 are to fit"),
    ],
)
def test_an_engine_that_serves_another_model_is_refused_by_what_it_says(
    tiny_model_dir: Path, says: dict[str, Any], message: str
) -> None:
    async def case() -> None:
        port = free_port(0)
        with running_fake(tiny_model_dir, port, says=says):
            text = await fail(make_url_config(tiny_model_dir, port))
            assert re.match(rf"engine_url = http://127\.0\.0\.1:{port}: {message}", text)

    run(case())


@pytest.mark.parametrize("says", [{"model_path": "org/name"}, {"context_length": None}, {"context_length": 4096}])
def test_an_engine_that_may_serve_our_model_is_taken(tiny_model_dir: Path, says: dict[str, Any]) -> None:
    async def case() -> None:
        port = free_port(0)
        with running_fake(tiny_model_dir, port, says=says):
            async with SGLangEngine(make_url_config(tiny_model_dir, port), Waits()) as engine:
                assert engine.info.vocab_size == 45

    run(case())


def test_a_copy_of_our_model_is_ours(tiny_model_dir: Path, tmp_path: Path) -> None:
    async def case() -> None:
        port = free_port(0)
        with running_fake(other_model(tiny_model_dir, tmp_path / "copy"), port):
            async with SGLangEngine(make_url_config(tiny_model_dir, port), Waits()):
                pass

    run(case())


def test_an_engine_that_is_open_is_refused_while_it_works_too(tiny_model_dir: Path) -> None:
    """A cache that is in use is not flushed: that is no sign of a lock."""

    async def case() -> None:
        port = free_port(0)
        with running_fake(tiny_model_dir, port, admin_key="", refuse={"/flush_cache": 400}):
            assert "takes new weights from anybody" in await fail(make_url_config(tiny_model_dir, port))

    run(case())


def test_an_engine_that_does_not_sample_is_one_clear_error(tiny_model_dir: Path) -> None:
    async def case() -> None:
        port = free_port(0)
        with running_fake(tiny_model_dir, port, refuse={"/generate": 500}):
            text = await fail(make_url_config(tiny_model_dir, port))
            assert text.startswith(f"SGLang at engine_url = http://127.0.0.1:{port} did not come up: SGLang at ")

    run(case())


def test_nobody_at_the_address_is_one_clear_error(tiny_model_dir: Path) -> None:
    async def case() -> None:
        port = free_port(0)
        text = await fail(make_url_config(tiny_model_dir, port, engine_start_s=0.2))
        assert text == f"no SGLang answered at engine_url = http://127.0.0.1:{port} within engine_start_s = 0.2 s"

    run(case())


@pytest.mark.parametrize(
    ("text", "release"), [("0.5.23", (0, 5, 23)), ("0.5.21.post1", (0, 5, 21)), ("0.6.0rc1", (0, 6, 0)), ("dev", ())]
)
def test_a_release_is_read_without_what_follows_it(text: str, release: tuple[int, ...]) -> None:
    assert version_numbers(text) == release
