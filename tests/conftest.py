"""Tensors are tiny here: a second thread costs more than it brings, and on a busy machine twenty
times more.
"""

import torch

torch.set_num_threads(1)
