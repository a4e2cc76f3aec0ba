"""Runs of train.py in processes of their own, and the accidents that are staged in them.

A process is forked from one that has imported everything already, so that a whole run takes about a
second.
"""

import json
import multiprocessing
import os
import re
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 180  # seconds: for a busy machine; a healthy run takes a few
NUM_IMAGES, STEPS_PER_EPOCH = 14, 3
SMALL = dict(
    preset="coco-r50",
    dataset="folder",
    arch="tiny",
    image_size=32,
    num_prototypes=5,
    dim_hidden=12,
    dim_out=7,
    batch_size=4,
    epochs=6,
    warmup_epochs=1,
    base_lr=4,
    workers=0,
    device="cpu",
    log_every=2,
)
TIMES = ("images_per_second", "data_seconds", "memory_gb")


def draw_photographs(folder, count=NUM_IMAGES):
    """Small images with soft colors, each of a size of its own."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(3)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((40 + i, 37), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
    return folder


# --------------------------------------------------------------------------------------------- runs


def command_line(folder, *arguments, photographs):
    """What stands behind `python train.py` for a small run of 18 steps that writes to `folder`."""
    small = [
        text
        for name, value in SMALL.items()
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    data = ["--data-dir", str(photographs)] if photographs else []  # toy scenes need none
    return [*small, *data, "--output-dir", str(folder), *arguments]


class Played:
    """One process of a run."""

    def __init__(self, process, output, model):
        self.process, self.file, self.model_file = process, output, model

    def wait(self):
        """The exit status; minus the signal's number if one has ended it."""
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"the process does not end; it has said:\n{self.output}")
        return self.process.exitcode

    def wait_for(self, pattern):
        """Until the process has said this."""
        deadline = time.monotonic() + PATIENCE
        while not re.search(pattern, self.output):
            assert time.monotonic() < deadline and self.process.is_alive(), self.output
            time.sleep(0.02)

    @property
    def output(self):
        return self.file.read_text()

    @property
    def complaints(self):
        """The lines that a person would read as the reason."""
        return [line for line in self.output.splitlines() if line.startswith("train.py: ")]

    @property
    def model(self):
        """State of the model when the process ended by itself."""
        return torch.load(self.model_file)


def start(folder, *arguments, photographs, processes=1, accident=None, before=None):
    """Starts a small run that writes to `folder`; accident(rank, run) is called in each process
    before the first step, before(rank, argv) -> argv before everything else.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["train", "staged"])
    python_path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), python_path])
    multiprocessing.forkserver.ensure_running()
    os.environ["PYTHONPATH"] = python_path
    argv = command_line(folder, *arguments, photographs=photographs)
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    played = []
    for rank in range(processes):
        place = (
            dict(
                RANK=rank,
                LOCAL_RANK=rank,
                WORLD_SIZE=processes,
                LOCAL_WORLD_SIZE=processes,
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                GLOO_SOCKET_IFNAME="lo",
            )
            if processes > 1
            else {}
        )
        # Out of the run's folder, which some tests make unwritable or look through.
        output, model = (
            folder.with_name(f"{folder.name}.{rank}.{kind}") for kind in ("txt", "pth")
        )
        output.touch()
        process = server.Process(target=_play, args=(argv, place, accident, before, output, model))
        process.start()
        played.append(Played(process, output, model))
    return played


def play(folder, *arguments, **options):
    """A whole run; returns its processes when all have ended."""
    played = start(folder, *arguments, **options)
    for one in played:
        one.wait()
    return played


def _play(argv, place, accident, before, output, model_file):
    file = open(output, "w", buffering=1)  # noqa: SIM115, open until the process ends
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # for the processes that read images, as in a run from a shell
    import train

    made = []

    def prepared(run):
        made.append(run.model)
        if accident:
            accident(place.get("RANK", 0), run)

    if before:
        argv = before(place.get("RANK", 0), argv)
    status = train.main(argv, prepared)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    )  # if it was an accident
    if made:
        torch.save(made[0].state_dict(), model_file)
    sys.exit(status)


def log_of(folder):
    """The lines of log.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def last_of(folder):
    return torch.load(folder / "last.pth", weights_only=True)


def difference(a, b, where=""):
    """The first place at which two nests of dictionaries, lists, tensors and numbers are not equal
    bit for bit.
    """
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{where}: {sorted(map(str, a.keys() ^ b.keys()))}"
        return next(filter(None, (difference(a[k], b[k], f"{where}.{k}") for k in a)), "")
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return f"{where}: {len(a)} and {len(b)} long"
        return next(
            filter(None, (difference(x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b)))),
            "",
        )
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return "" if same else f"{where}: {a} and {b}"


# ---------------------------------------------------------------------------------------- accidents


class AtStep:
    """An accident at the nth batch that a process takes, on one rank or (None) on all."""

    def __init__(self, n, what, rank=None):
        self.n, self.what, self.rank = n, what, rank

    def __call__(self, rank, run):
        if self.rank not in (None, rank):
            return
        taken, next_batch = [], run.batches.next

        def counted():
            taken.append(1)
            if len(taken) == self.n:
                self.what()
            return next_batch()

        run.batches.next = counted


class Signal:
    """A signal to oneself."""

    def __init__(self, name):
        self.name = name

    def __call__(self):
        os.kill(os.getpid(), getattr(signal, self.name))


class BadNumbers:
    """From the nth batch on, for so many batches: NaN in the views, a gradient or the loss, on one
    rank or on all.
    """

    def __init__(self, n, count=1, rank=None, where="views", value=float("nan")):
        self.n, self.count, self.rank, self.where, self.value = n, count, rank, where, value

    def __call__(self, rank, run):
        if self.rank not in (None, rank):
            return
        taken, compute = [], run.gradient.compute

        def now():
            return self.n <= len(taken) < self.n + self.count

        def changed(views, boxes, flipped):
            taken.append(1)
            return compute(
                views * (self.value if self.where == "views" and now() else 1), boxes, flipped
            )

        run.gradient.compute = changed
        if self.where == "gradient":
            weight = run.model.student.prototypes.weight
            weight.register_hook(lambda gradient: gradient * self.value if now() else gradient)
        if self.where == "loss":
            run.model.register_forward_hook(
                lambda _, __, returned: spoilt(*returned) if now() else returned
            )

        def spoilt(loss, report):
            return loss, report._replace(losses=report.losses * self.value)


class Several:
    def __init__(self, *accidents):
        self.accidents = accidents

    def __call__(self, rank, run):
        for accident in self.accidents:
            accident(rank, run)
