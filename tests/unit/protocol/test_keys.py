"""Key files: what is in them, who may read them, and what changes while a process runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ConfigError
from protocol.keys import KeyPair, PublicKeys, TrustedKeys, is_key, parse_public_keys
from protocol.security import MOST_SAID, PLAIN, SAY_AGAIN_S, Said, load_security
from tests.keyrings import Keyring

GOLDEN = Path(__file__).parents[2] / "golden" / "keys"
LEARNER = "p].#rG6aiMhe^U8oa6d(KtSG0W>x0xqe5:2gNv#x"


@pytest.fixture
def ring(tmp_path: Path) -> Keyring:
    return Keyring(tmp_path)


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """The golden files with the modes that a checkout does not keep."""
    for file in GOLDEN.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "learner.key").chmod(0o600)
    return tmp_path


def replace(path: Path, text: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, path)


def test_the_golden_files_are_read_as_ever(golden: Path) -> None:
    pair = KeyPair.read(golden / "learner.key")
    assert pair.public == LEARNER
    assert TrustedKeys(golden / "learner.pub", "learner_key").names == {LEARNER: "learner"}
    assert PublicKeys(golden / "allowed_keys", "allowed_keys").names == {
        "ajK)f/EM2<n]M1z>&T?.1hR8gF#DEq29u:/kJhXA": "gpu-7",
        "p%y>:.TEe6xp(XTo^<DPFYFT(kUKdm+(TDlPsI#E": "",
    }


def test_a_secret_key_is_not_shown(golden: Path) -> None:
    pair = KeyPair.read(golden / "learner.key")
    security = load_security(key=golden / "learner.key", allowed_keys=golden / "allowed_keys")
    secret = pair.secret.decode()
    assert LEARNER in repr(pair)
    assert secret not in repr(pair) + str(pair) + repr(security) + f"{security}"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610])
def test_a_secret_that_others_may_read_is_refused(golden: Path, mode: int) -> None:
    file = golden / "learner.key"
    file.chmod(mode)
    with pytest.raises(ConfigError, match=rf"^key {file}: others than its owner may read it \(mode 0\d+\): chmod 600 "):
        KeyPair.read(file)
    file.chmod(0o400)
    assert KeyPair.read(file).public == LEARNER


@pytest.mark.parametrize(
    "text",
    ["", "# nothing\n", LEARNER, "secret-key\n", "secret-key short\n", "secret-key {0}\nsecret-key {0}\n", "{0}\n"],
)
def test_what_is_no_secret_key_is_refused_and_not_repeated(tmp_path: Path, text: str) -> None:
    secret = zmq.curve_keypair()[1].decode()
    file = tmp_path / "a.key"
    file.write_text(text.replace("{0}", secret))
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="holds no secret key, which is one line `secret-key KEY`") as refused:
        KeyPair.read(file)
    assert secret not in str(refused.value)
    assert "Traceback" not in str(refused.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^key .*none: No such file or directory; .*headway-server keygen DIR"):
        KeyPair.read(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"^allowed_keys .*none: No such file or directory; it lists public keys"):
        PublicKeys(tmp_path / "none", "allowed_keys")


def test_a_wrong_line_of_a_list_is_named_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match=r"^allowed_keys f line 3: must begin with a public key, 40 characters"):
        parse_public_keys(f"# a\n{LEARNER} a\nnonsense b\n", "allowed_keys f")
    secret = zmq.curve_keypair()[1].decode()
    with pytest.raises(ConfigError, match=r"line 1: a secret key does not belong here: take .* \.pub") as refused:
        parse_public_keys(f"secret-key {secret}\n", "allowed_keys f")
    assert secret not in str(refused.value)


@given(st.binary(min_size=32, max_size=32), st.text(st.characters(categories=["L", "N"]), max_size=20))
def test_every_key_can_be_listed(key: bytes, name: str) -> None:
    text = zmq.utils.z85.encode(key).decode()
    assert is_key(text)
    assert parse_public_keys(f"# above\n{text} {name}\n", "f") == {text: name}
    assert parse_public_keys(f"#{text} {name}\n", "f") == {}, "put a # in front, and it is out"


@given(st.text(max_size=60))
def test_any_text_is_a_key_or_is_not(text: str) -> None:
    if is_key(text):
        assert zmq.utils.z85.encode(zmq.utils.z85.decode(text.encode())).decode() == text


def test_a_list_that_anybody_may_write_is_refused(ring: Keyring) -> None:
    ring.allowed.chmod(0o666)
    with pytest.raises(ConfigError, match=r"anybody may write it \(mode 0666\): chmod o-w"):
        ring.listening()


def test_an_empty_allow_list_lets_nobody_in_and_an_empty_trust_is_refused(ring: Keyring) -> None:
    security = ring.listening()
    assert security.allowed is not None
    assert security.allowed.names == {}
    with pytest.raises(ConfigError, match=r"learner_key .*: has no key; it is the \.pub file"):
        load_security(key=ring.directory / "learner.key", learner_key=ring.allowed)


def test_a_list_is_read_again_when_it_changes(ring: Keyring) -> None:
    first, second = ring.make("a"), ring.make("b")
    allowed = PublicKeys(ring.allowed, "allowed_keys")
    for names in (["a"], ["a", "b"], ["b"], []):
        ring.allow(*names)
        allowed.refresh()
        assert list(allowed.names) == [key for key, name in ((first, "a"), (second, "b")) if name in names]


def test_a_list_appended_to_in_place_is_read_again(ring: Keyring) -> None:
    key = ring.make("a")
    allowed = PublicKeys(ring.allowed, "allowed_keys")
    with ring.allowed.open("a") as file:
        file.write((ring.directory / "a.pub").read_text())
    allowed.refresh()
    assert list(allowed.names) == [key]


def test_what_cannot_be_read_leaves_the_list_and_is_said_once(ring: Keyring, caplog: pytest.LogCaptureFixture) -> None:
    key = ring.make("a")
    ring.allow("a")
    allowed = PublicKeys(ring.allowed, "allowed_keys")
    replace(ring.allowed, "half a line")
    for _ in range(3):
        allowed.refresh()
    assert list(allowed.names) == [key]
    assert caplog.text.count("line 1: must begin with a public key") == 1
    assert "the keys read before stay in force" in caplog.text
    ring.allowed.unlink()
    for _ in range(3):
        allowed.refresh()
    assert list(allowed.names) == [key]
    assert caplog.text.count("No such file") == 1
    ring.allow()
    allowed.refresh()
    assert list(allowed.names) == []


def test_two_keys_of_one_name_have_one_owner(ring: Keyring) -> None:
    old, new = ring.make("old"), ring.make("new")
    replace(ring.allowed, f"{old} gpu-7\n{new} gpu-7\n")
    allowed = PublicKeys(ring.allowed, "allowed_keys")
    assert allowed.owner(old) == allowed.owner(new) == "gpu-7"
    replace(ring.allowed, f"{new}\n")
    allowed.refresh()
    assert (allowed.owner(new), allowed.owner(old)) == (new, old)
    assert (allowed.knows(new), allowed.knows("gpu-7"), allowed.knows(old)) == (True, False, False)


def test_a_learner_whose_key_changes_has_each_of_its_keys_tried(ring: Keyring) -> None:
    old, new = ring.public["learner"], ring.make("next")
    trusted = TrustedKeys(ring.trust("learner"), "learner_key")
    assert (trusted.current, trusted.turn(), trusted.current) == (old, False, old)
    ring.trust("learner", "next")  # while it runs
    assert (trusted.turn(), trusted.current) == (True, new)
    assert (trusted.turn(), trusted.current) == (False, old), "all have had their turn"
    assert (trusted.turn(), trusted.current) == (True, new)
    ring.trust("next")
    assert (trusted.turn(), trusted.current) == (False, new)
    ring.trust("learner")
    trusted.refresh()
    assert trusted.current == old, "the one before is no longer listed"


def test_one_half_of_the_keys_is_refused(ring: Keyring) -> None:
    assert load_security(key=None) == PLAIN
    with pytest.raises(ConfigError, match=r"^allowed_keys .* without key: name this process's own secret key"):
        load_security(key=None, allowed_keys=ring.allowed)
    with pytest.raises(ConfigError, match=r"^learner_key .* without key"):
        load_security(key=None, learner_key=ring.directory / "learner.pub")


def test_traffic_may_leave_the_host_with_keys_or_when_the_user_insists(ring: Keyring) -> None:
    assert not PLAIN.off_host
    assert ring.listening().off_host
    assert load_security(key=None, insecure_plaintext=True).off_host


def test_a_flood_of_lines_is_held_back() -> None:
    now = [100.0]
    said = Said(lambda: now[0])
    assert said.is_new("a")
    assert not said.is_new("a")
    assert sum(said.is_new(str(number)) for number in range(1000)) == MOST_SAID - 1
    now[0] += SAY_AGAIN_S
    assert said.is_new("a")
