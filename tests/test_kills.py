"""The short form of `kills.py`."""

import pytest

import kills

pytestmark = pytest.mark.slow


def test_a_run_and_a_job_that_are_killed_are_as_if_nothing_had_been(tmp_path, data_dir):
    assert kills.check(tmp_path, data_dir, kills=4, processes=1, seed=0) == 4
