"""What one process must know of the others, and what one on its own may ask just as well."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world_size() -> tuple[int, int]:
    """(0, 1) for a process on its own."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@torch.no_grad()  # all_reduce has no gradient; the losses are built so that none is needed
def sum_over_ranks(x: Tensor) -> Tensor:
    """x summed over all ranks, a new tensor; x itself in a process on its own."""
    if rank_and_world_size()[1] > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


@torch.no_grad()  # keys carry no gradient, so the gather needs none
def gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """The rows of all ranks, in the order of the ranks; alone: rows itself.

    rows (n ...): this rank's; counts: n of every rank, known to all -> (sum of counts ...). Each
    sends max(counts) rows, since a gather moves equal pieces.
    """
    if len(counts) == 1:
        return rows
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    pieces = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(pieces, padded)
    return torch.cat([piece[:count] for piece, count in zip(pieces, counts)])


def gather_objects(own: Any) -> list[Any]:
    """What every rank holds, in the order of the ranks, on all of them. For plain values."""
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return [own]
    pieces = [None] * world_size
    dist.all_gather_object(pieces, own)
    return pieces


@torch.no_grad()
def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """The main process's values into these tensors of every rank, such as batch statistics."""
    if rank_and_world_size()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)
