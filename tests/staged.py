"""Small runs of train.py, here or in processes, and the accidents that are staged in them.

A process is forked from one that has imported everything, so that a whole run takes about a second.
"""

import atexit
import contextlib
import functools
import io
import json
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils._pytree import keystr, tree_flatten_with_path

import train
from engine.program import run_program
from engine.run import Run

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 120  # seconds: for a busy machine; a healthy run takes a few
STEPS = 18  # of a small run, in epochs of 3
TIMES = ("images_per_second", "data_seconds", "memory_gb")
SMALL = (
    "--preset coco-r50 --dataset folder --arch tiny --image-size 32 --num-prototypes 5 "
    "--dim-hidden 12 --dim-out 7 --batch-size 4 --epochs 6 --warmup 1 --base-lr 4 --workers 0 "
    "--device cpu --log-every 2"
).split()


def draw_photographs(folder, count=14):
    """Small images with soft colors, each of a size of its own."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(3)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((40 + i, 37), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
    return folder


@functools.cache
def shared_photographs():
    """A folder of photographs that no test changes."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    return draw_photographs(Path(folder) / "photographs")


def command_line(folder, *arguments, photographs=None):
    """What stands behind `python train.py` for a run of 18 steps that writes to `folder`."""
    where = ["--data-dir", str(photographs or shared_photographs()), "--output-dir", str(folder)]
    return [*SMALL, *where, *map(str, arguments)]


@contextlib.contextmanager
def staged(accident):
    """Runs call accident(run) before every forward."""
    plain = Run.remember

    def remember(run):
        if accident:
            accident(run)
        plain(run)

    Run.remember = remember
    try:
        yield
    finally:
        Run.remember = plain


def train_here(folder, *arguments, photographs=None, accident=None, status=0):
    """A whole run in this process; returns what it printed."""
    argv, text = command_line(folder, *arguments, photographs=photographs), io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text), staged(accident):
        found = run_program("train.py", train.main, argv)
    assert found == status, text.getvalue()
    return text.getvalue()


def fork_server():
    """Processes that have imported everything when they start."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["train", "staged", "pytest", "comparisons.slot_matching"])
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), before])
    multiprocessing.forkserver.ensure_running()
    os.environ["PYTHONPATH"] = before
    return server


def of_each_rank(target, folder, world_size=2):
    """What target(rank) returns in each of several processes that know each other."""
    given = [(target, rank, world_size, str(folder)) for rank in range(world_size)]
    started = [fork_server().Process(target=_meet, args=each) for each in given]
    for process in started:
        process.start()
    assert join(started) == [0] * world_size
    files = [folder / f"{rank}.pth" for rank in range(world_size)]
    return [torch.load(file, weights_only=False) for file in files]


def _meet(target, rank, world_size, folder):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    group = dict(init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    dist.init_process_group("gloo", **group)
    torch.save(target(rank), f"{folder}/{rank}.pth")
    dist.destroy_process_group()


def join(started):
    """The exit statuses, minus the number of a signal; all processes must end."""
    for process in started:
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in started]


def play(folder, *arguments, **how):
    """A whole run of train.py in processes; how: as in `launch`."""
    return launch(train.main, folder, command_line(folder, *arguments), **how)


def torchrun(processes):
    """The variables of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = dict(WORLD_SIZE=processes, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    group |= dict(LOCAL_WORLD_SIZE=processes, GLOO_SOCKET_IFNAME="lo")
    return [dict(RANK=rank, LOCAL_RANK=rank, **group) for rank in range(processes)]


def tasks_of_srun(processes):
    """The variables of each process: SLURM's, none of torchrun's."""
    job = dict(JOB_ID=os.getpid(), STEP_ID=0, NTASKS=processes, JOB_NODELIST="127.0.0.[1-3,9]")
    tasks = [dict(job, PROCID=task, LOCALID=task) for task in range(processes)]
    names = ({f"SLURM_{name}": value for name, value in task.items()} for task in tasks)
    return [dict(each, GLOO_SOCKET_IFNAME="lo") for each in names]


def launch(main, folder, argv, processes=1, accident=None, elsewhere=(), srun=False):
    """main(argv) in processes -> their exit statuses, and what each printed. elsewhere: options of
    the last one alone.
    """
    places = (tasks_of_srun if srun else torchrun)(processes) if processes > 1 else [{}]
    files = [folder.with_name(f"{folder.name}.{rank}.txt") for rank in range(processes)]
    started = []
    for rank, (file, place) in enumerate(zip(files, places)):
        argv = [*argv, *elsewhere] if rank else argv
        process = fork_server().Process(target=_play, args=(main, argv, place, accident, file))
        process.start()
        started.append(process)
    return join(started), [file.read_text() for file in files]


def _play(main, argv, place, accident, output):
    file = open(output, "w", buffering=1)  # noqa: SIM115, open until the process ends
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    os.environ.update({name: str(value) for name, value in place.items()})
    # For the processes that read images, as in a run from a shell
    multiprocessing.set_start_method("fork", force=True)
    with staged(accident):
        sys.exit(run_program(f"{main.__module__}.py", main, argv))


def log_of(folder):
    """The lines of log.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def last_of(folder):
    return torch.load(folder / "last.pth", weights_only=True)


def state_of(folder):
    """All that a run learned and counted: last.pth without the clock, log.jsonl, backbone.pth."""
    saved, backbone = last_of(folder), folder / "backbone.pth"
    assert saved.pop("seconds") > 0
    del saved["config"]
    return saved, log_of(folder), torch.load(backbone) if backbone.exists() else None


def difference(a, b):
    """The first place at which two nests of dictionaries, lists, tensors and numbers are not equal
    bit for bit, or "".
    """
    a, b = (dict(tree_flatten_with_path(each)[0]) for each in (a, b))
    for where in [*a, *(b.keys() - a.keys())]:
        x, y = a.get(where, "nothing"), b.get(where, "nothing")
        tensors = isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
        if not (torch.equal(x, y) if tensors else type(x) is type(y) and x == y):
            return f"{keystr(where)}: {x} and {y}"
    return ""


class At:
    """An accident at a position of the run, on one rank or (None) on all; what(run)."""

    def __init__(self, position, what, rank=None):
        self.position, self.what, self.rank = position, what, rank

    def __call__(self, run):
        if run.position == self.position and self.rank in (None, run.place.rank):
            self.what(run)


class Signals:
    """Signals to oneself, one after the other."""

    def __init__(self, *names):
        self.names = names

    def __call__(self, run):
        for name in self.names:
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(0.01)  # or the system joins two into one


def die_in_the_next_save(run):
    """kill -9 once the file is written and before it has its name."""
    os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)


def spoil_the_gradient(run):
    """From here on, on this process."""
    run.model.student.prototypes.weight.register_hook(lambda gradient: gradient * float("inf"))


def kill_a_reader(run):
    multiprocessing.active_children()[0].kill()


def fill_the_disk(run):
    """Files may not grow beyond a few bytes: the system refuses, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


def interrupt_as_a_terminal_does(run):
    """Ctrl-C reaches every process in front of it."""
    readers = multiprocessing.active_children()
    for pid in (*(reader.pid for reader in readers), os.getpid()):
        os.kill(pid, signal.SIGINT)


def raise_a_mistake(run):
    raise ArithmeticError("a mistake of ours")


def raise_bad_input(run):
    raise ValueError("the answer to all questions is out of range")
