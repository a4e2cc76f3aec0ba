"""Where the time of one training step goes, against the plain form of the same step.

    python benchmarks/step.py --arch resnet18 --image-size 112 --batch 16              on a CPU
    python benchmarks/step.py --batch 64 --amp bf16 --variants plain ours compile      on a GPU
    python benchmarks/step.py --updates          teacher update and LARS alone

Every variant is train.take_step on a run that train.set_up has made. `plain` gives it a model, a
gradient and an optimizer as one writes them first: one tensor at a time in teacher and LARS, a loop
over images in the inverse augmentation, prototypes repeated for every image, keys copied where they
would be gathered, NCHW, fp16 on a GPU, no norm and nothing to undo. `ours` is what train.py runs;
`compile` adds torch.compile; `nchw`, `channels_last` force the memory format. They take turns
within one run. The stages are timed in separate steps, since timing them makes the device wait.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import recipes
import teacher
import train
from engine import processes
from engine.gradient import Gradient
from engine.lars import LARS
from engine.run import Run
from engine.undo import Undo
from slotcon import SlotCon, View
from slots import attentive_pooling, occupied

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


class PlainSlotCon(SlotCon):
    """The same numbers in the plain form."""

    def look(self, network, views, boxes, flipped):
        """As SlotCon.look."""
        looked = []
        for i, images in enumerate(views.unbind(1)):  # over v
            features, embeddings = network.embed(images)
            maps = plain_similarity(embeddings, network.prototypes.weight)
            looked.append(
                self.describe(network, features, embeddings, maps, boxes[:, i], flipped[:, i])
            )
        return looked

    def describe(self, network, features, embeddings, maps, boxes, flipped):
        """As SlotCon.describe."""
        aligned = plain_inverse_augmentation(maps, boxes, flipped)
        slots = attentive_pooling(embeddings, maps, self.temp_pool)
        return View(features, embeddings, maps, aligned, slots, occupied(maps))

    def contrast(self, student, teacher, pairs):
        """As SlotCon.contrast."""
        return plain_slot_contrast(
            student.slots, teacher.slots, self.predictor, pairs, self.temp_slot
        )

    def update_teacher(self, momentum):
        """As SlotCon.update_teacher."""
        plain_update_teacher(self.teacher, self.student, momentum)


class PlainGradient(Gradient):
    """Loss and backward; in place of the gradient's norm the loss is looked at."""

    def compute(self, *batch):
        """As Gradient.compute."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            loss, report = self.model(*batch)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        return [report], loss.detach()


# ---------------------------------------------------------------------------------- one step, timed


def config_of(variant: str, a: argparse.Namespace, folder: str) -> recipes.Config:
    """The published recipe at the sizes asked for. Toy scenes stand for the data set, which no step
    reads."""
    formats = {"plain": False, "nchw": False, "channels_last": True}
    return dataclasses.replace(
        recipes.PRESETS["coco-r50"],
        dataset="toy",
        toy_scenes=a.batch,
        arch=a.arch,
        image_size=a.image_size,
        num_prototypes=a.k,
        dim_hidden=a.dim_hidden,
        batch_size=a.batch,
        device=a.device,
        amp=a.amp,
        channels_last=formats.get(variant),
        compile=variant == "compile",
        workers=0,
        output_dir=folder,
        resume="none",
    )


def make_plain(run: Run) -> None:
    """Give a run the plain model with the same weights, the plain gradient and optimizer."""
    ours, device = run.model, run.place.device
    model = PlainSlotCon(
        run.settings["arch"], run.settings["num_prototypes"], run.settings["dim_hidden"]
    )
    model.load_state_dict(ours.state_dict())
    run.model = model.to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    dtype = torch.float16 if device.type == "cuda" else run.gradient.dtype
    run.gradient = PlainGradient(model, PlainLARS(trained, run.schedule.peak), device, dtype)
    run.undo = Undo([])


class Step:
    """A run of its own, and train.take_step on the same two views of noise again and again."""

    def __init__(self, variant: str, a: argparse.Namespace):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            self.config = config_of(variant, a, folder)
            self.run = train.set_up(self.config, set())
        self.run.batches.close()
        if variant == "plain":
            make_plain(self.run)
        device, self.dtype = self.run.place.device, self.run.gradient.dtype
        generator = torch.Generator(device).manual_seed(0)
        size = (a.batch, 2, 3, a.image_size, a.image_size)
        boxes = torch.tensor([[0.1, 0.2, 0.9, 0.8], [0.0, 0.3, 0.7, 1.0]], device=device)
        self.batch = (
            torch.randn(size, device=device, generator=generator),
            boxes.expand(a.batch, 2, 4),
            torch.rand(a.batch, 2, device=device, generator=generator) < 0.5,
        )

    def __call__(self) -> float:
        """One step; returns the loss."""
        verdict, _ = train.take_step(self.config, self.run, *self.batch)
        return verdict.values[0]


class Stopwatch:
    """Seconds per stage of one step, each without the stages inside of it; `rest` is what no stage
    covers. The parts of one run are wrapped, and unwrapped again."""

    def __init__(self, step: Step):
        self.step, self.seconds, self.open = step, {}, []

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        device = self.step.run.place.device
        inside = [0.0]
        synchronize(device)
        clock = time.perf_counter()
        self.open.append(inside)
        yield
        synchronize(device)
        self.open.pop()
        spent = time.perf_counter() - clock
        self.seconds[name] = self.seconds.get(name, 0.0) + spent - inside[0]
        if self.open:
            self.open[-1][0] += spent

    def wrapped(self, function: Callable, name: str) -> Callable:
        """The same function, timed."""

        def call(*args, **kwargs):
            with self.stage(name):
                return function(*args, **kwargs)

        return call

    def __call__(self) -> dict[str, float]:
        """One step with all stages timed."""
        run, model = self.step.run, self.step.run.model
        parts = [
            (run.undo, "remember", "undo"),
            (run.gradient, "compute", "backward"),
            (model, "forward", "other forward"),
            (model.student, "embed", "student forward"),
            (model.teacher, "embed", "teacher forward"),
            (model, "describe", "alignment and pooling"),
            (model, "consistency", "group loss"),
            (model, "contrast", "slot loss"),
            (run.gradient, "step", "optimizer"),
            (model, "update_teacher", "teacher update"),
        ]
        for owner, name, stage in parts:
            setattr(owner, name, self.wrapped(getattr(owner, name), stage))
        with self.stage("rest"):
            self.step()
        for owner, name, _ in parts:
            delattr(owner, name)
        return self.seconds


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
    """The table of all variants."""
    made = {variant: Step(variant, a) for variant in a.variants}
    flops = flops_of(made.get("plain") or next(iter(made.values())))
    made = {variant: Step(variant, a) for variant in a.variants}
    first, whole, stages, memory = {}, {v: [] for v in made}, {v: [] for v in made}, {}
    for variant, step in made.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            rest = torch.cuda.memory_allocated(device)
        first[variant] = step()
        for _ in range(a.warmup - 1):
            step()
        if (
            device.type == "cuda"
        ):  # the others' models are there too: count what this one's step adds to its own
            own = sum(
                t.numel() * t.element_size() for t in (*step.run.model.parameters(), step.batch[0])
            )
            memory[variant] = (torch.cuda.max_memory_allocated(device) - rest + own) / 1e9
    for _ in range(a.repeats):
        for variant, step in made.items():
            whole[variant].append(seconds_of(step, device))
        for variant, step in made.items():
            stages[variant].append(Stopwatch(step)())
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
    ours = SlotCon(a.arch, a.k, a.dim_hidden, 256).to(device)
    torch.manual_seed(0)
    plain = SlotCon(a.arch, a.k, a.dim_hidden, 256).to(device)
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
    described = processes.describe(place, processes.precision(a.amp, place.device))
    print(described)
    result = (updates if a.updates else steps)(a, place.device)
    print(json.dumps(dict(settings=vars(a), device=described, torch=torch.__version__, **result)))


if __name__ == "__main__":
    main()
