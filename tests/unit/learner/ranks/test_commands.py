"""Commands and batches as bytes, and back."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.ranks.commands import Save, Start, Stay, Stop, Train, Update, batch_of, from_bytes, to_bytes, train_command
from tests.factories import make_batch, make_train_group

COMMANDS = [Start("/runs/x/step-000003", "/runs/x/logs"), Start(None, ""), Update(2e-6), Save("/tmp/é"), Stay(), Stop()]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_comes_back(command):
    assert from_bytes(to_bytes(command)) == (command, [])


@given(st.lists(st.binary(max_size=40), max_size=5))
def test_frames_come_back(frames):
    command, views = from_bytes(to_bytes(Update(2e-6), frames))
    assert command == Update(2e-6)
    assert [bytes(view) for view in views] == frames


def test_a_batch_comes_back_but_for_the_prompts_texts():
    mask = np.array([1, 0, 1, 1, 0], np.uint8)
    batch = make_batch(
        step=7,
        groups=[
            make_train_group(ordinal=3, sequence=9, lengths=[2, 3], rewards=[1.0, None], loss_mask=mask),
            make_train_group(ordinal=4, lengths=[5000, 1], prompt_tokens=[4] * 11),  # arrays with frames of their own
        ],
    )
    command, frames = from_bytes(train_command(batch))
    assert isinstance(command, Train)
    again = batch_of(command, frames)
    assert again.step == 7
    for entry, original in zip(again.groups, batch.groups, strict=True):
        assert (entry.ordinal, entry.sequence, entry.prompt) == (original.ordinal, original.sequence, "")
        assert np.array_equal(entry.prompt_tokens, original.prompt_tokens)
        for field in msgspec.structs.fields(original.group):
            left, right = getattr(entry.group, field.name), getattr(original.group, field.name)
            assert np.array_equal(left, right) if isinstance(right, np.ndarray) else left == right, field.name


def test_what_is_no_command_is_refused():
    payload = to_bytes(Stay()).replace(b"Stay", b"Exec")
    with pytest.raises(msgspec.ValidationError, match="Exec"):
        from_bytes(payload)
