"""How long SGLang is left alone before it is started again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rollout_server.engines.sglang.restarts import PAUSES_S, Restarts


@given(st.lists(st.booleans(), max_size=40))
def test_pauses_grow_with_lives_in_vain_and_not_for_ever(lives: list[bool]) -> None:
    restarts = Restarts()
    in_vain = 0
    for served in lives:
        in_vain = 0 if served else in_vain + 1
        pause_s = restarts.ended(served=served)
        assert restarts.in_vain == in_vain
        assert pause_s == (0.0 if in_vain <= 1 else PAUSES_S[min(in_vain, len(PAUSES_S)) - 1])
        assert 0.0 <= pause_s <= PAUSES_S[-1]


def test_a_tight_loop_is_a_start_each_half_minute() -> None:
    restarts = Restarts()
    assert [restarts.ended(served=False) for _ in range(7)] == [0.0, 1.0, 5.0, 15.0, 30.0, 30.0, 30.0]
    assert restarts.ended(served=True) == 0.0
