"""One thread, and the same seed before each test and the fixtures that it needs.

Tensors are tiny here: a second thread costs more than it brings.
"""

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
