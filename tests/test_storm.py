"""A short storm: faults of several kinds on one run, which then has the weights of a calm one.

The long one, with fifty faults, is benchmarks/storm.py.
"""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "storm.py"


@pytest.mark.slow
def test_ten_faults_one_of_each_kind_leave_the_weights_of_a_run_that_nobody_disturbed(tmp_path):
    spec = importlib.util.spec_from_file_location("storm", FILE)
    storm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(storm)
    struck = storm.storm(tmp_path, faults=10, seed=1, epochs=40)
    assert sum(struck.values()) >= 6, struck
