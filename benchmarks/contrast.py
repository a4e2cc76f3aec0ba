"""The slot contrast at full scale: bytes on the wire and memory, against gathering every slot.

    python benchmarks/contrast.py                    k = 2048, batch 512 over 8 ranks, 7 x 7 maps
    python benchmarks/contrast.py --occupied 8       occupied slots per image as after convergence

One rank's loss and gradient are computed, each way in a fresh process; the other ranks' rows are
made up from this rank's, so memory is taken and freed exactly as by a real gather. The naive way
is the released code's: gather every slot of every image, then keep the occupied ones. The predictor
is the same in both ways and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import losses


def pretend(world_size: int, wire: list[int]) -> None:
    """Let this process take itself for rank 0 of many; wire collects the bytes it sends."""

    def all_gather(pieces: list[Tensor], x: Tensor) -> None:
        wire.append(x.numel() * x.element_size() * (world_size - 1))
        for rank, piece in enumerate(pieces):
            # counts are alike on all ranks; rows are turned, so that no two ranks are alike
            piece.copy_(x.roll(rank, dims=-1) if x.is_floating_point() else x)

    # A process group of torch that talks to nobody; only its gather is given an answer.
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    dist.all_gather = all_gather


def naive(student: Tensor, teacher: Tensor, queries: Tensor, keys: Tensor, ranks: int) -> Tensor:
    """Gather all (b k) rows of all ranks, index afterwards, all logits at once."""

    def gather(x: Tensor) -> Tensor:
        pieces = [torch.ones_like(x) for _ in range(ranks)]
        dist.all_gather(pieces, x)
        return torch.cat(pieces)

    everywhere = gather(keys.flatten().long())
    chosen = (queries & keys).flatten()
    positives = (everywhere.cumsum(0) - 1)[: len(chosen)][chosen]
    rows = gather(F.normalize(teacher.flatten(0, 1), dim=1))[everywhere.bool()]
    logits = F.normalize(student.flatten(0, 1)[chosen], dim=1) @ rows.T / 0.2
    return F.cross_entropy(logits, positives) * 0.4


def measure(way: str, a: argparse.Namespace) -> dict[str, float]:
    """One loss and its gradient: value, bytes on the wire, peak memory, seconds."""
    wire: list[int] = []
    pretend(a.ranks, wire)
    torch.manual_seed(0)
    student, teacher = torch.randn(2, a.batch // a.ranks, a.k, a.d).unbind()
    keys = torch.rand(a.batch // a.ranks, a.k).argsort(dim=1) < a.occupied
    queries = keys.clone()
    queries[:, : a.k // 2] = False  # about half of them are seen in the student's view too
    student.requires_grad_().grad = torch.zeros_like(student)  # the same in both ways
    before, began = peak(), time.perf_counter()
    if way == "ours":
        (pairs,) = losses.pair_slots([queries], [keys])
        loss = losses.slot_contrast(student, teacher, torch.nn.Identity(), pairs, 0.2)
    else:
        loss = naive(student, teacher, queries, keys, a.ranks)
    loss.backward()
    return dict(
        loss=loss.item(),
        wire_mb=sum(wire) / 1e6,
        peak_mb=(peak() - before) / 1e6,
        seconds=time.perf_counter() - began,
    )


def peak() -> int:
    """Most bytes this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measure both ways in processes of their own, and print the table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    for name, value, text in (
        ("k", 2048, "prototypes"),
        ("d", 256, "width of a slot"),
        ("batch", 512, "total batch"),
        ("ranks", 8, "processes"),
        ("occupied", 49, "occupied slots per image, at most 7 x 7"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} ({value})")
    parser.add_argument("--one", choices=("ours", "naive"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        print(json.dumps(measure(a.one, a)))
        return
    # With a fixed threshold freed memory goes back to the system at once: peaks are of tensors.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    for way in ("naive", "ours"):
        command = [sys.executable, *sys.argv, "--one", way]
        out = subprocess.run(command, capture_output=True, check=True, env=environment, text=True)
        m = json.loads(out.stdout)
        print(
            f"{way:8}{m['wire_mb']:9.1f} MB on the wire  {m['peak_mb']:7.0f} MB  "
            f"{m['seconds']:6.2f} s  loss {m['loss']:.8f}"
        )


if __name__ == "__main__":
    main()
