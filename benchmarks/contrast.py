"""The slot contrast at full scale: bytes on the wire and memory, against gathering every slot.

    python benchmarks/contrast.py                    k = 2048, batch 512 over 8 ranks, 7 x 7 maps
    python benchmarks/contrast.py --occupied 8       occupied slots per image as after convergence

One rank's loss and gradient are computed, each variant in a fresh process; the other ranks' rows
are made up from this rank's by rotating their components, so memory is taken and freed exactly as
by a real gather. The naive way is the released code's: gather every slot of every image, then keep
the occupied ones. The predictor is the same in both ways and left out unless asked for
(--dim-hidden 4096).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import losses
from slots import SlotPredictor

VARIANTS = ("ours", "naive")


def pretend(world_size: int, wire: list[int]) -> None:
    """Let this process take itself for rank 0 of `world_size`; wire collects the bytes it sends to
    the others.
    """

    def all_gather(pieces: list[torch.Tensor], x: torch.Tensor) -> None:
        wire.append(x.numel() * x.element_size() * (world_size - 1))
        for rank, piece in enumerate(pieces):
            piece.copy_(
                x.roll(rank, dims=-1) if x.is_floating_point() else x
            )  # counts are alike on all ranks

    # A process group of torch that talks to nobody; only its gather is given an answer.
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    dist.all_gather = all_gather


def make_inputs(a: argparse.Namespace):
    """Slots (b k d) of student and teacher, and which of them are occupied (b k): the same
    `--occupied` per image.
    """
    torch.manual_seed(0)
    b = a.batch // a.ranks
    student, teacher = torch.randn(2, b, a.k, a.d).unbind()
    mask = torch.rand(b, a.k).argsort(dim=1) < a.occupied
    other = mask.clone()
    other[:, : a.k // 2] = False  # about half of them are seen in the student's view too
    return student.requires_grad_(), teacher, other, mask


def naive(
    student, teacher, predictor, student_occupied, teacher_occupied, world_size: int
) -> torch.Tensor:
    """Gather all (b k) rows of all ranks, index afterwards, all logits at once."""
    b, k, d = teacher.shape

    def gather(x: torch.Tensor) -> torch.Tensor:
        pieces = [torch.ones_like(x) for _ in range(world_size)]
        dist.all_gather(pieces, x)
        return torch.cat(pieces)

    queries = (student_occupied & teacher_occupied).flatten().nonzero().squeeze(-1)
    everywhere = gather(teacher_occupied.flatten().long())
    positives = (everywhere.cumsum(0) - 1)[queries]
    keys = gather(F.normalize(teacher.reshape(b * k, d), dim=1))[everywhere.nonzero().squeeze(-1)]
    logits = F.normalize(predictor(student.reshape(b * k, d)[queries]), dim=1) @ keys.T / 0.2
    return F.cross_entropy(logits, positives) * 0.4


def measure(variant: str, a: argparse.Namespace) -> dict:
    """One loss and its gradient: value, bytes on the wire per rank, peak memory above the inputs,
    seconds.
    """
    wire: list[int] = []
    pretend(a.ranks, wire)
    warm_up()
    wire.clear()
    student, teacher, student_occupied, teacher_occupied = make_inputs(a)
    torch.manual_seed(1)
    predictor = SlotPredictor(a.d, a.d, a.dim_hidden) if a.dim_hidden else torch.nn.Identity()
    student.grad = torch.zeros_like(student)  # the gradient of the slots is the same in both ways
    before, clock = peak(), time.perf_counter()
    if variant == "ours":
        (pairs,) = losses.pair_slots([student_occupied], [teacher_occupied])
        loss = losses.slot_contrast(student, teacher, predictor, pairs, 0.2)
    else:
        loss = naive(student, teacher, predictor, student_occupied, teacher_occupied, a.ranks)
    loss.backward()
    return dict(
        loss=loss.item(),
        gradient=student.grad.norm().item(),
        wire_bytes=sum(wire),
        peak_bytes=peak() - before,
        seconds=time.perf_counter() - clock,
    )


def warm_up() -> None:
    """What torch imports at the first use of checkpointing is memory too, but not the loss's."""
    rows = torch.randn(3, 4, requires_grad=True)
    arguments = rows, torch.arange(3), torch.randn(5, 4), 0.2
    losses.checkpoint(losses.contrast, *arguments, use_reentrant=False).backward()


def peak() -> int:
    """Most bytes this process ever held; the inputs have been touched before the first call."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value, text in (
        ("k", 2048, "prototypes"),
        ("d", 256, "width of a slot"),
        ("batch", 512, "total batch"),
        ("ranks", 8, "processes"),
        ("occupied", 49, "occupied slots per image, at most 7 x 7"),
        ("dim-hidden", 0, "width of the predictor, 0: none"),
        ("repeats", 3, "runs of each, in turn"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} ({value})")
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        print(json.dumps(measure(a.one, a)))
        return
    runs: dict[str, list[dict]] = {v: [] for v in VARIANTS}
    for _ in range(a.repeats):
        for variant in VARIANTS:
            command = [sys.executable, *sys.argv, "--one", variant]
            # With a fixed threshold freed memory goes back to the system at once, so that peaks are
            # those of tensors.
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
            out = subprocess.run(
                command, capture_output=True, text=True, check=True, env=environment
            )
            runs[variant].append(json.loads(out.stdout))
    median = {
        v: {key: statistics.median(run[key] for run in runs[v]) for key in runs[v][0]}
        for v in VARIANTS
    }
    print(
        f"{'':8}{'on the wire':>14}{'peak memory':>14}{'seconds':>10}{'(spread)':>16}{'loss':>14}"
    )
    for v, m in median.items():
        spread = (
            f"{min(r['seconds'] for r in runs[v]):.2f}-{max(r['seconds'] for r in runs[v]):.2f}"
        )
        print(
            f"{v:8}{m['wire_bytes'] / 1e6:11.1f} MB{m['peak_bytes'] / 1e6:11.0f} "
            f"MB{m['seconds']:10.2f}{spread:>16}"
            f"{m['loss']:14.8f}"
        )
    ratio = {
        key: median["naive"][key] / median["ours"][key]
        for key in ("wire_bytes", "peak_bytes", "seconds")
    }
    print("naive / ours: " + ", ".join(f"{key} {value:.1f}" for key, value in ratio.items()))
    print(json.dumps(dict(settings=vars(a), runs=runs, ratio=ratio)))


if __name__ == "__main__":
    main()
