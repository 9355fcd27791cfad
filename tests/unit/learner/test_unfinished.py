"""A run is over with its summary, not with its last step: a learner that dies in the last evaluation goes on there."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.rundir import RunDirectory
from protocol.errors import ConfigError
from tests.learners import make_config


@pytest.fixture
def directory(tmp_path: Path):
    directory = RunDirectory.open(make_config(output_dir=tmp_path, run_name="run"))
    yield directory
    directory.close()


def test_a_run_that_died_in_its_last_evaluation_goes_on(directory):
    directory.require_unfinished(policy_version=10, max_steps=10)


def test_a_run_with_its_summary_is_over(directory):
    directory.summary_path.write_text("{}")
    with pytest.raises(ConfigError, match=r"has trained its 10 steps: raise max_steps to go on, or choose another"):
        directory.require_unfinished(policy_version=10, max_steps=10)


def test_raising_max_steps_makes_it_unfinished_again_whatever_happens_next(directory):
    directory.summary_path.write_text("{}")
    directory.require_unfinished(policy_version=10, max_steps=20)
    directory.begin_incarnation()
    directory.require_unfinished(policy_version=20, max_steps=20)
