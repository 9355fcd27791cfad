"""What a server is refused for: it takes other weights than the run publishes, or another's name."""

from __future__ import annotations

import dataclasses

import pytest

from learner.admission import NameOwners, why_refused
from tests.learners import make_hello, make_identity


@pytest.mark.parametrize(
    ("rank", "takes", "match"),
    [
        (0, {}, ""),
        (0, {"max_lora_rank": 8}, ""),
        (8, {"max_lora_rank": 8}, ""),
        (8, {"max_lora_rank": 8, "full_weights": False}, ""),
        (
            8,
            {"max_lora_rank": 4},
            "an adapter of rank 8, and its engine takes adapters of rank 4 at most: start it with",
        ),
        (8, {}, "rank 8, and its engine takes adapters of no rank: start it with --max-lora-rank 8"),
        (0, {"max_lora_rank": 8, "full_weights": False}, "publishes all weights, and its engine takes adapters alone"),
    ],
)
def test_a_server_takes_what_is_published(rank: int, takes: dict[str, object], match: str) -> None:
    identity = dataclasses.replace(make_identity(), lora_rank=rank)
    refused = why_refused(make_hello(**takes), identity, ())
    if not match:
        assert refused is None
        return
    assert refused is not None
    code, reason = refused
    assert code == "weights"
    assert match in reason


def test_another_model_is_named_before_what_it_takes() -> None:
    identity = dataclasses.replace(make_identity(), lora_rank=8)
    assert (why_refused(make_hello(model_digest="other"), identity, ()) or ("", ""))[0] == "model"


def test_a_name_belongs_to_who_used_it_first_until_it_leaves_the_list() -> None:
    names, listed = NameOwners(), {"gpu-7", "gpu-8"}
    assert names.why_refused("north", "gpu-7", listed.__contains__) is None
    assert names.why_refused("south", "gpu-8", listed.__contains__) is None
    assert names.why_refused("north", "gpu-7", listed.__contains__) is None
    code, reason = names.why_refused("north", "gpu-8", listed.__contains__) or ("", "")
    assert code == "name_in_use"
    assert reason.startswith("the name north belongs to the key of gpu-7, and this server came with that of gpu-8: ")
    listed.remove("gpu-7")
    assert names.why_refused("north", "gpu-8", listed.__contains__) is None
    listed.add("gpu-7")
    assert names.why_refused("north", "gpu-7", listed.__contains__) is not None


def test_without_keys_names_are_nobodys() -> None:
    names = NameOwners()
    assert names.why_refused("north", "gpu-7", lambda owner: True) is None
    assert names.why_refused("north", "", lambda owner: True) is None
