"""The kernels of torch's SyncBatchNorm, which are for GPUs only, written out for any device."""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import sync_batch_norm


def over_channels(values, like):
    """values (c) -> to be used with maps (n c ...)."""
    return values.view(1, -1, *[1] * (like.ndim - 2))


def sums(x):
    return x.sum([0, *range(2, x.ndim)])


def batch_norm_stats(x, eps):
    var, mean = torch.var_mean(in_float(x), [0, *range(2, x.ndim)], correction=0)
    return mean, (var + eps).rsqrt()


def batch_norm_gather_stats_with_counts(
    x, mean, invstd, running_mean, running_var, momentum, eps, counts
):
    n, counts = counts.sum(), counts[:, None]
    whole = (counts * mean).sum(0) / n
    var = (counts * (invstd**-2 - eps + (mean - whole) ** 2)).sum(0) / n
    running_mean.lerp_(whole, momentum)
    running_var.lerp_(var * n / (n - 1), momentum)
    return whole, (var + eps).rsqrt()


def batch_norm_elemt(x, weight, bias, mean, invstd, eps):
    mean, scale, bias = (over_channels(t, x) for t in (mean, invstd * weight, bias))
    return ((x - mean) * scale + bias).to(x.dtype)


def batch_norm_backward_reduce(grad, x, mean, invstd, weight, *needed):
    grad = in_float(grad)
    products = sums(grad * (x - over_channels(mean, x)))
    return sums(grad), products, products * invstd, sums(grad)


def batch_norm_backward_elemt(grad, x, mean, invstd, weight, total, products, counts):
    n = counts.sum()
    mean, slope, shift, scale = (
        over_channels(t, x) for t in (mean, invstd**2 * products / n, total / n, invstd * weight)
    )
    return ((grad - shift - (x - mean) * slope) * scale).to(x.dtype)


def in_float(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


KERNELS = (
    batch_norm_stats, batch_norm_gather_stats_with_counts, batch_norm_elemt,
    batch_norm_backward_reduce, batch_norm_backward_elemt,
)  # fmt: skip


def forward(norm, x):
    """As torch's in training, without its question for a GPU."""
    norm.num_batches_tracked.add_(1)
    state = norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, norm.momentum
    return sync_batch_norm.apply(x, *state, dist.group.WORLD, dist.get_world_size())


@contextmanager
def written_out():
    """torch's SyncBatchNorm runs on a CPU and on fake tensors."""
    with ExitStack() as stack:
        for kernel in KERNELS:
            stack.enter_context(patch.object(torch, kernel.__name__, kernel))
        stack.enter_context(patch.object(nn.SyncBatchNorm, "forward", forward))
        yield
