"""keygen: what it writes, what it says, and what it never overwrites."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from learner.__main__ import dispatch
from protocol.errors import ConfigError
from protocol.keygen import keygen
from protocol.keys import KeyPair, parse_public_keys
from rollout_server.__main__ import serve


def test_a_learners_pair_is_written_and_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["keygen", str(tmp_path / "new" / "keys")]) == 0
    secret, public = (tmp_path / "new" / "keys" / f"learner{ending}" for ending in (".key", ".pub"))
    pair = KeyPair.read(secret)
    assert secret.stat().st_mode & 0o777 == 0o600
    assert parse_public_keys(public.read_text(), "f") == {pair.public: "learner"}
    assert pair.public[0].isalnum()
    said = capsys.readouterr().out
    assert f"\n    {pair.public} learner\n" in said
    assert f"--key {secret} --allowed-keys FILE" in said
    assert "--learner-key learner.pub" in said
    assert pair.secret.decode() not in said
    assert pair.secret.decode() not in public.read_text()


def test_a_servers_pair_is_named_as_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    umask = os.umask(0o000)
    try:
        assert serve(["keygen", str(tmp_path), "--name", "gpu-7"]) == 0
    finally:
        os.umask(umask)
    assert (tmp_path / "gpu-7.key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "gpu-7.pub").read_text().endswith(" gpu-7\n")
    said = capsys.readouterr().out
    assert "append that line" in said
    assert f"--key {tmp_path / 'gpu-7.key'} --learner-key FILE" in said


@pytest.mark.parametrize("ending", [".key", ".pub"])
def test_nothing_is_overwritten(tmp_path: Path, ending: str) -> None:
    old = tmp_path / f"a{ending}"
    old.write_text("precious")
    with pytest.raises(ConfigError, match=rf"^keygen: {old} exists, and no key in use must be lost"):
        keygen([str(tmp_path), "--name", "a"], prog="try", side="server")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(old.name, "precious")]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="exists"):
        keygen([str(tmp_path), "--name", "a"], prog="try", side="server")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "keygen: the following arguments are required: DIR"),
        (["d", "--nam"], "keygen: argument --name: expected one argument"),
        (["d", "--name", "a/b"], r"keygen: --name 'a/b': must be of letters, digits and \. _ -"),
        (["/dev/null/x"], "keygen: /dev/null/x: Not a directory"),
    ],
)
def test_a_mistake_is_one_line(argv: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=f"^{complaint}$"):
        keygen(argv, prog="try", side="learner")
