"""Where the time of one training step goes, against the plain form of the same step.

    python benchmarks/step.py --arch resnet18 --image-size 112 --batch 16              on a CPU
    python benchmarks/step.py --batch 64 --amp bf16 --variants plain ours compile      on a GPU
    python benchmarks/step.py --updates          teacher update and LARS alone

Variants: `plain` is the step as one writes it first (one tensor at a time in teacher and LARS, a
loop over images in the inverse augmentation, prototypes repeated for every image, all slots
gathered, NCHW, fp16 on a GPU); `ours` is what train.py runs, with its guard against bad numbers;
`compile` adds torch.compile; `nchw`, `channels_last` force the memory format. They take turns
within one run. The stages are timed in separate steps, since timing them makes the device wait.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import losses
import slotcon
import teacher
from engine import processes
from engine.lars import LARS

# ----------------------------------------------------------------------------------- the plain form


def plain_similarity(embeddings, prototypes):
    table = prototypes[None].repeat(len(embeddings), 1, 1)
    return torch.einsum(
        "bkd,bdhw->bkhw", F.normalize(table.float(), dim=2), F.normalize(embeddings.float(), dim=1)
    )


def plain_inverse_augmentation(maps, boxes, flipped):
    b, _, h, w = maps.shape
    regions = torch.cat(
        [torch.arange(b, device=maps.device)[:, None], boxes * boxes.new_tensor([w, h, w, h])],
        dim=1,
    )
    aligned = torchvision.ops.roi_align(maps, regions, (h, w), aligned=True)
    return torch.stack([m.flip(-1) if flip else m for m, flip in zip(aligned, flipped)])


def plain_slot_contrast(student_slots, teacher_slots, predictor, pairs, temp_slot):
    keys = F.normalize(teacher_slots.flatten(0, 1), dim=1).clone()[
        pairs.keys
    ]  # the clone stands for the gather
    queries = F.normalize(predictor(student_slots.flatten(0, 1)[pairs.queries]).float(), dim=1)
    return F.cross_entropy(queries @ keys.T / temp_slot, pairs.positives) * 2 * temp_slot


def plain_update_teacher(network, student, momentum):
    with torch.no_grad():
        for t, s in zip(network.parameters(), student.parameters()):
            t.data = t.data * momentum + s.data * (1 - momentum)


class PlainLARS(torch.optim.Optimizer):
    """One tensor after the other, with a temporary for every operation."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=1e-5, coefficient=0.001):
        super().__init__(
            params,
            dict(lr=lr, momentum=momentum, weight_decay=weight_decay, coefficient=coefficient),
        )

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad
                if p.ndim != 1:
                    update = update + group["weight_decay"] * p
                    norms = p.norm(), update.norm()
                    usable = (norms[0] > 0) & (norms[1] > 0)
                    update = update * torch.where(
                        usable, group["coefficient"] * norms[0] / norms[1], 1.0
                    )
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.mul_(group["momentum"]).add_(update)
                p.add_(velocity, alpha=-group["lr"])


PLAIN = [
    (slotcon, "similarity", plain_similarity),
    (slotcon, "inverse_augmentation", plain_inverse_augmentation),
    (slotcon, "update_teacher", plain_update_teacher),
    (losses, "slot_contrast", plain_slot_contrast),
]

# ---------------------------------------------------------------------------------- one step, timed


class Step:
    """A model of its own, and one whole training step on the same two views of noise again and
    again.
    """

    def __init__(self, variant: str, a: argparse.Namespace, device: torch.device):
        torch.manual_seed(0)
        self.variant, self.device, self.plain = variant, device, variant == "plain"
        cuda = device.type == "cuda"
        self.dtype = processes.precision("fp16" if self.plain and cuda else a.amp, device)
        self.model = slotcon.SlotCon(a.arch, a.k, a.dim_hidden, 256).to(device).train()
        if variant == "channels_last" or (cuda and variant in ("ours", "compile")):
            self.model = self.model.to(memory_format=torch.channels_last)
        if variant == "compile":
            for network in (self.model.student, self.model.teacher):
                network.backbone.compile()
                network.projector.compile()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = (PlainLARS if self.plain else LARS)(trained, 0.1)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        buffers = [b for b in self.model.buffers() if b is not self.model.center]
        self.buffers = [
            [b for b in buffers if b.is_floating_point() == floating] for floating in (True, False)
        ]
        self.before = [[b.clone() for b in group] for group in self.buffers]
        self.trained = trained
        self.views = torch.randn(a.batch, 2, 3, a.image_size, a.image_size, device=device)
        self.boxes = torch.tensor(
            [[0.1, 0.2, 0.9, 0.8], [0.0, 0.3, 0.7, 1.0]], device=device
        ).expand(a.batch, 2, 4)
        self.flipped = torch.rand(a.batch, 2, device=device) < 0.5

    def patches(self) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        for module, name, function in PLAIN if self.plain else ():
            stack.enter_context(mock.patch.object(module, name, function))
        return stack

    def __call__(self, watch: Stopwatch | None = None) -> torch.Tensor:
        time_of = watch.stage if watch else lambda _: contextlib.nullcontext()
        with self.patches(), watch.spying(self) if watch else contextlib.nullcontext():
            for then, now in zip(self.before, self.buffers) if not self.plain else ():
                torch._foreach_copy_(then, now)
            with time_of("teacher update"):
                self.model.update_teacher(0.99)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                loss, report = self.model(self.views, self.boxes, self.flipped)
            with time_of("backward"):
                self.scaler.scale(loss).backward()
            with time_of("optimiser"):
                if self.plain:
                    self.scaler.unscale_(self.optimizer)
                    self.scaler.step(self.optimizer)
                    loss.item()
                else:
                    self.scaler.unscale_(self.optimizer)
                    norm = torch.nn.utils.get_total_norm([p.grad for p in self.trained])
                    torch.cat(
                        [report.losses, norm[None]]
                    ).tolist()  # the host looks before anything moves
                    self.optimizer.step()
                    losses.update_center(self.model.center, report.center_mean, 0.9)
                self.scaler.update()
                self.optimizer.zero_grad()
        return loss.detach()


class Stopwatch:
    """Seconds per stage of one step; what no stage covers is `rest`."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}

    @contextlib.contextmanager
    def stage(self, name: str):
        synchronize(self.device)
        clock = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - clock

    @contextlib.contextmanager
    def spying(self, step: Step):
        """Stages inside the forward, told apart by the function that runs."""
        stages = {
            (slotcon, "look"): None,
            (slotcon, "inverse_augmentation"): "alignment",
            (slotcon, "attentive_pooling"): "pooling",
            (slotcon, "occupied"): "pooling",
            (losses, "group_consistency"): "group loss",
            (losses, "mean_over_pixels"): "group loss",
            (losses, "pair_slots"): "slot loss",
            (losses, "slot_contrast"): "slot loss",
        }
        with contextlib.ExitStack() as stack:
            for (module, name), stage in stages.items():
                stack.enter_context(
                    mock.patch.object(module, name, self.timed(getattr(module, name), stage, step))
                )
            yield

    def timed(self, function, stage: str | None, step: Step):
        def call(*args, **kwargs):
            name = stage or (
                "teacher forward" if args[0] is step.model.teacher else "student forward"
            )
            with self.stage(name):
                return function(*args, **kwargs)

        return call


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work, device: torch.device) -> float:
    synchronize(device)
    clock = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - clock


def matrix_rate(device: torch.device, dtype: torch.dtype | None) -> float:
    """FLOP/s of a large matrix product in this precision: what the device could do at best."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype or torch.float32).unbind()
    times = [seconds_of(lambda: a @ b, device) for _ in range(7)]
    return 2 * n**3 / statistics.median(times[2:])


def flops_of(step: Step) -> int:
    """Of convolutions and matrix products, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


# ------------------------------------------------------------------------------------------ tables


def spread(values: list[float]) -> str:
    return (
        f"{statistics.median(values) * 1e3:.1f} ({min(values) * 1e3:.1f}-{max(values) * 1e3:.1f})"
    )


def steps(a: argparse.Namespace, device: torch.device) -> dict:
    made = {variant: Step(variant, a, device) for variant in a.variants}
    flops = flops_of(made.get("plain") or next(iter(made.values())))
    made = {variant: Step(variant, a, device) for variant in a.variants}
    first, whole, stages, memory = {}, {v: [] for v in made}, {v: [] for v in made}, {}
    for variant, step in made.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            rest = torch.cuda.memory_allocated(device)
        first[variant] = step().item()
        for _ in range(a.warmup - 1):
            step()
        if (
            device.type == "cuda"
        ):  # the others' models are there too: count what this one's step adds to its own
            own = sum(t.numel() * t.element_size() for t in (*step.model.parameters(), step.views))
            memory[variant] = (torch.cuda.max_memory_allocated(device) - rest + own) / 1e9
    for _ in range(a.repeats):
        for variant, step in made.items():
            whole[variant].append(seconds_of(step, device))
        for variant, step in made.items():
            watch = Stopwatch(device)
            seconds = seconds_of(lambda step=step, watch=watch: step(watch), device)
            stages[variant].append(watch.seconds | {"rest": seconds - sum(watch.seconds.values())})
    names = list(stages[a.variants[0]][0])
    print(f"{'ms, median (least-most)':24}" + "".join(f"{v:>28}" for v in made))
    for name in names:
        print(f"{name:24}" + "".join(f"{spread([s[name] for s in stages[v]]):>28}" for v in made))
    print(f"{'whole step':24}" + "".join(f"{spread(whole[v]):>28}" for v in made))
    result = dict(
        stages={v: {n: statistics.median(s[n] for s in stages[v]) for n in names} for v in made}
    )
    result["seconds"] = {v: statistics.median(times) for v, times in whole.items()}
    result["images_per_second"] = {v: a.batch / s for v, s in result["seconds"].items()}
    result["matrix_rate"] = {v: matrix_rate(device, step.dtype) for v, step in made.items()}
    result["share_of_matrix_rate"] = {
        v: flops / s / result["matrix_rate"][v] for v, s in result["seconds"].items()
    }
    result |= dict(flops=flops, first_loss=first, peak_memory_gb=memory)
    for name, label in (
        ("images_per_second", "images/s"),
        ("share_of_matrix_rate", "share of matrix rate"),
        ("peak_memory_gb", "peak memory, GB"),
        ("first_loss", "first loss"),
    ):
        print(f"{label:24}" + "".join(f"{result[name].get(v, float('nan')):28.4f}" for v in made))
    if "plain" in made:
        result["plain_over"] = {
            v: statistics.median(p / o for p, o in zip(whole["plain"], whole[v]))
            for v in made
            if v != "plain"
        }
        print(
            "plain / other, pair by pair: "
            + ", ".join(f"{v} {x:.2f}" for v, x in result["plain_over"].items())
        )
    return result


def updates(a: argparse.Namespace, device: torch.device) -> dict:
    """Teacher update and LARS of the whole model, all tensors at once against one at a time, on
    equal values.
    """
    torch.manual_seed(0)
    ours = slotcon.SlotCon(a.arch, a.k, a.dim_hidden, 256).to(device)
    torch.manual_seed(0)
    plain = slotcon.SlotCon(a.arch, a.k, a.dim_hidden, 256).to(device)
    optimizers = [
        kind([p for p in model.parameters() if p.requires_grad], 0.1)
        for kind, model in ((LARS, ours), (PlainLARS, plain))
    ]
    seconds = {name: [] for name in ("LARS ours", "LARS plain", "teacher ours", "teacher plain")}
    for _ in range(a.repeats + 1):
        for p, q in zip(ours.parameters(), plain.parameters()):
            if p.requires_grad:
                p.grad = torch.randn_like(p) / 100
                q.grad = p.grad.clone()
        seconds["LARS ours"].append(seconds_of(optimizers[0].step, device))
        seconds["LARS plain"].append(seconds_of(optimizers[1].step, device))
        seconds["teacher ours"].append(
            seconds_of(lambda: teacher.update_teacher(ours.teacher, ours.student, 0.99), device)
        )
        seconds["teacher plain"].append(
            seconds_of(lambda: plain_update_teacher(plain.teacher, plain.student, 0.99), device)
        )
    difference = max(
        ((p - q).norm() / q.norm()).item()
        for p, q in zip(ours.parameters(), plain.parameters())
        if q.norm() > 0
    )
    seconds = {name: times[1:] for name, times in seconds.items()}  # the first allocates
    for name, times in seconds.items():
        print(f"{name:24}{spread(times):>28} ms")
    ratio = {
        what: statistics.median(
            p / o for p, o in zip(seconds[f"{what} plain"], seconds[f"{what} ours"])
        )
        for what in ("LARS", "teacher")
    }
    ratio["both"] = statistics.median(
        sum(p) / sum(o)
        for p, o in zip(
            zip(seconds["LARS plain"], seconds["teacher plain"]),
            zip(seconds["LARS ours"], seconds["teacher ours"]),
        )
    )
    print(
        "plain / ours, pair by pair: "
        + ", ".join(f"{k} {v:.2f}" for k, v in ratio.items())
        + f"; largest relative difference of a tensor {difference:.1e}"
    )
    return dict(seconds=seconds, ratio=ratio, difference=difference)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="resnet50")
    for name, value, text in (
        ("image-size", 224, "px"),
        ("batch", 64, "images"),
        ("k", 256, "prototypes"),
        ("dim-hidden", 4096, "width"),
        ("repeats", 7, "counted steps of each variant"),
        ("warmup", 3, "steps before"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} ({value})")
    parser.add_argument("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["plain", "ours"],
        choices=("plain", "ours", "compile", "nchw", "channels_last"),
    )
    parser.add_argument("--updates", action="store_true", help="only the teacher update and LARS")
    a = parser.parse_args()
    place = processes.start(a.device, 600)
    print(processes.describe(place))
    result = (updates if a.updates else steps)(a, place.device)
    print(
        json.dumps(
            dict(
                settings=vars(a),
                device=processes.describe(place),
                torch=torch.__version__,
                **result,
            )
        )
    )


if __name__ == "__main__":
    main()
