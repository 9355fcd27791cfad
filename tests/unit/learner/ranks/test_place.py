"""What torchrun tells a process of its place."""

from __future__ import annotations

import pytest

from learner.ranks.place import Place, place_of
from protocol.errors import ConfigError


def test_without_torchrun_there_is_one_rank():
    assert place_of({}) is None


def test_torchrun_with_one_process_is_one_rank():
    assert place_of({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}) is None


def test_one_of_several():
    place = place_of({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"})
    assert place == Place(rank=9, world_size=16, local_rank=1)
    assert not place.leads
    assert Place(0, 2, 0).leads


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"WORLD_SIZE": "2"}, r"RANK=\(unset\), WORLD_SIZE=2, LOCAL_RANK=\(unset\): torchrun sets all three"),
        ({"WORLD_SIZE": "two", "RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE=two.*torchrun sets all three"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "RANK=2 is not one of WORLD_SIZE=2 ranks"),
    ],
)
def test_half_an_environment_is_refused(environment, text):
    with pytest.raises(ConfigError, match=text):
        place_of(environment)
