"""Batch norm over the rows of all ranks: one sum over them each way, and no wait of the host."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.ranks import sum_over_ranks


class SummedNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm whose ranks may hold unlike numbers of rows, or none."""

    def forward(self, x: Tensor) -> Tensor:
        """x (n c ...) -> the same shape and type."""
        given = self.weight, self.bias
        if self.training:
            x, mean, var, n = Normalize.apply(x, *given, self.eps)
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * n / (n - 1), self.momentum)
        else:
            x = F.batch_norm(x, self.running_mean, self.running_var, *given, eps=self.eps)
        return finished(self, x)


class SyncedNorm(nn.SyncBatchNorm):
    """PyTorch's, of GPUs alone."""

    process_group = None  # all ranks

    def forward(self, x: Tensor) -> Tensor:
        """x (n c ...) -> the same shape and type."""
        return finished(self, super().forward(x))


def finished(norm: nn.Module, x: Tensor) -> Tensor:
    """What a norm of timm does after it: its dropout, then its activation."""
    for after in norm.children():
        x = after(x)
    return x


class Normalize(torch.autograd.Function):
    """y = weight (x - mean) / sqrt(var + eps) + bias, with mean and var over all rows.

    mean = sum x / n, var = sum x^2 / n - mean^2

    Sums are in the type of the weight; in float32 var is right to about 1e-7 (1 + mean^2 / var).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> y, and mean (c), var (c), n (1) over the ranks."""
        rows, sums = x.numel() // len(weight), weight.new_zeros(2, len(weight))
        if len(x):  # from the mean and the variance, since sums of many squares lose digits
            over = [0, *range(2, x.ndim)]
            var, mean = torch.var_mean(x.to(weight.dtype), over, correction=0)
            sums = rows * torch.stack([mean, var + mean.square()])
        sums = sum_over_ranks(torch.cat([sums.flatten(), weight.new_full((1,), rows)]))
        n = sums[-1:]
        mean, squares = (sums[:-1] / n).view(2, -1)
        var = (squares - mean.square()).clamp(min=0)
        ctx.save_for_backward(x, weight, mean, var, n)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var, n)
        return F.batch_norm(x, mean, var, weight, bias, eps=eps), mean, var, n

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """With x' = (x - mean) / sqrt(var + eps), of all rows:

        grad_x = weight / sqrt(var + eps) (grad - mean(grad x') x' - mean(grad))
        """
        x, weight, mean, var, n = ctx.saved_tensors
        grads = grad, torch.zeros_like(weight), torch.zeros_like(weight)
        if len(x):  # as with mean and var that are constant
            unsaved = mean.new_empty(0)  # the kernels of CUDA do not take None
            constant = grad, x, weight, mean, var, unsaved, unsaved, False, ctx.eps, [True] * 3
            grads = torch.ops.aten.native_batch_norm_backward(*constant)
        means = sum_over_ranks(torch.stack(grads[1:])) / n
        means *= weight * (var + ctx.eps).rsqrt()
        return grads[0] - F.batch_norm(x, mean, var, *means, eps=ctx.eps), *grads[1:], None


def converted(model: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """The model, whose batch norms become SummedNorm or SyncedNorm, with the same tensors."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.__class__ = kind
    return model
