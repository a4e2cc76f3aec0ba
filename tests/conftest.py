"""What holds for every test: one thread, the same seed before each, and any order on request.

Tensors are tiny here: a second thread costs more than it brings, and on a busy machine twenty times
more.
"""

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before a test and before the fixtures it needs, so that what is drawn does not depend on what
    ran earlier.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_addoption(parser):
    """pytest --shuffle 3: all tests in an order drawn from this seed."""
    parser.addoption("--shuffle", type=int, default=None, help="run the tests in a random order")


def pytest_collection_modifyitems(config, items):
    """Files stay together, or fixtures of a file would be made anew for every test."""
    seed = config.getoption("--shuffle")
    if seed is None:
        return
    by_file, rng = {}, random.Random(seed)
    for item in items:
        by_file.setdefault(item.path, []).append(item)
    files = list(by_file.values())
    rng.shuffle(files)
    for tests in files:
        rng.shuffle(tests)
    items[:] = [item for tests in files for item in tests]
