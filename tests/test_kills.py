"""A short run of `kills.py`."""

import pytest

import kills

pytestmark = pytest.mark.slow


def test_killed_runs_and_jobs_leave_what_uninterrupted_ones_do(tmp_path, data_dir):
    assert kills.check(tmp_path, data_dir, kills=4, processes=1, seed=0) == 4
