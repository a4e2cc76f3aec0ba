"""benchmarks/storm.py in short: one fault of each kind on one run."""

import pytest

from benchmarks import storm


@pytest.mark.slow
def test_a_run_that_meets_every_kind_of_fault_ends_with_the_weights_of_an_undisturbed_one(tmp_path):
    kinds = storm.KINDS
    # No save comes from the calendar: each is one that a fault has caused.
    struck = storm.storm(tmp_path, faults=len(kinds), seed=24, save_every=99)
    assert struck == dict.fromkeys(kinds, 1)
