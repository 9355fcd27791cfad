"""Names: of connections here; those of groups and their seeds are tested where they are used."""

from __future__ import annotations

import pytest

from protocol.identity import is_overtaken, session_name


def test_a_session_names_its_process_and_counts_its_connections():
    assert session_name("3f2a90c1", 12) == "3f2a90c1-12"


@pytest.mark.parametrize(
    ("session", "newer", "overtaken"),
    [
        (session_name("p", 1), session_name("p", 2), True),
        (session_name("p", 9), session_name("p", 10), True),
        (session_name("p", 2), session_name("p", 2), False),
        (session_name("p", 3), session_name("p", 2), False),
        (session_name("p", 1), session_name("q", 2), False),
        ("p-q-1", "p-q-2", True),
        ("p-x", "p-2", False),
        ("p-", "p-2", False),
        ("no number", "no number at all", False),
        ("", "", False),
        ("p-1", "p-" + "9" * 10_000, True),
    ],
)
def test_only_an_earlier_connection_of_the_same_process_is_overtaken(session: str, newer: str, overtaken: bool) -> None:
    assert is_overtaken(session, newer) is overtaken
