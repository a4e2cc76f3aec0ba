"""A storm of faults on one small run, each followed by the same command: are the weights the same?

    python benchmarks/storm.py --faults 50 --seed 0

A run of two processes on small images, on the CPU. At a random step it is signalled, one of its
processes or workers is killed, its disk is full, its output is closed, a second run starts in its
directory, or files that a crash or a broken disk leaves are put there. The same command then goes
on. At the end its weights must equal those of a run that nobody disturbed, bit for bit; every
attempt must begin at the step of the last checkpoint; and what docs/training.md says about lines
and exit statuses must hold each time.

Faults are counted in steps and every step has a fixed pace, so that the storm is the same on a slow
and on a fast machine. Processes are forked from one that has imported everything already.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import re
import resource
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300  # seconds for one attempt on a busy machine
STEPS_PER_EPOCH = 3
EPOCHS_PER_FAULT = 3  # so that the run is not done before the last fault
OPTIONS = (
    "--preset coco-r50 --dataset folder --arch tiny --image-size 32 --num-prototypes 5 "
    "--dim-hidden 12 --dim-out 7 --batch-size 4 --warmup-epochs 1 --base-lr 1 --workers 1 "
    "--device cpu --threads 1 --log-every 1 --timeout 60"
).split()

# Fault -> exit statuses of (the process that is struck, the other one); None: 0 or 1
KINDS: dict[str, tuple[int | None, int | None]] = {
    "SIGTERM": (0, 0),
    "SIGUSR1": (0, 0),
    "SIGINT": (130, 0),
    "SIGHUP": (129, 0),
    "SIGKILL": (-signal.SIGKILL, 1),
    "worker": (1, 1),
    "full disk": (1, None),
    "closed output": (0, 0),
    "second run": (0, 0),
    "leftovers": (-signal.SIGKILL, 1),
    "cut checkpoint": (0, 0),
}
FULL = 500_000  # bytes of a file where the disk is full: less than a checkpoint, more than a log
DEAD = 4194399  # no process has this number: more than Linux gives


# ------------------------------------------------------------------------------- inside a process


def _attempt(
    argv: list[str], place: dict[str, int | str], output: Path, pace: float, fault: str, at: int
) -> None:
    """One process of the run; its fault, if it is one of its own, comes with the batch `at`."""
    file = open(output, "w", buffering=1)  # noqa: SIM115, open until the process ends
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    os.environ.update({name: str(value) for name, value in place.items()})
    # For the processes that read images, as in a run from a shell
    multiprocessing.set_start_method("fork", force=True)

    def prepared(run: train.Run) -> None:
        plain, taken = run.batches.next, output.with_suffix(".steps")
        count = 0

        def paced() -> object:
            nonlocal count
            with taken.open("a") as steps:
                steps.write(f"{run.progress.step}\n")
            if count == at and fault == "full disk":
                resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, resource.RLIM_INFINITY))
            if count == at and fault == "closed output":
                close_output()
            count += 1
            time.sleep(pace)
            return plain()

        run.batches.next = paced

    sys.exit(train.main(argv, prepared))


def close_output() -> None:
    """stdout and stderr become pipes whose reader has gone, as behind `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    os.close(writer)


# ------------------------------------------------------------------------------ from the outside


def fork_server() -> multiprocessing.context.ForkServerContext:
    """Processes that have imported everything when they start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    python_path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), python_path]))
    multiprocessing.forkserver.ensure_running()
    if python_path is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = python_path
    return context


class Attempt:
    """All processes of one command; what each says, and each step it begins, goes to files."""

    def __init__(
        self, folder: Path, argv: Sequence[str], size: int = 2, pace: float = 0.0, fault: str = "",
        at: int = 0, name: str = "",
    ):  # fmt: skip
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context, self.processes, self.files = fork_server(), [], []
        for rank in range(size):
            place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
            meeting = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo")
            output = folder.with_name(f"{name or folder.name}.{rank}.txt")
            for file in (output, output.with_suffix(".steps")):
                file.write_text("")
            place = {**place, **meeting} if size > 1 else {}
            own = fault if rank == 0 else ""
            arguments = [*argv, "--output-dir", str(folder)], place, output, pace, own, at
            process = context.Process(target=_attempt, args=arguments)
            process.start()
            self.processes.append(process)
            self.files.append(output)

    def output(self, rank: int = 0) -> str:
        """What a rank has said so far."""
        return self.files[rank].read_text(errors="replace")

    def steps(self, rank: int = 0) -> list[int]:
        """How many steps of the run were done whenever a rank began another one."""
        text = self.files[rank].with_suffix(".steps").read_text()
        return [int(line) for line in text.splitlines()]

    def wait_for(self, is_there: Callable[[], object], what: str) -> None:
        """Until something holds; AssertionError where the attempt ends before that."""
        deadline = time.monotonic() + PATIENCE
        while not is_there():
            alive = all(process.is_alive() for process in self.processes)
            if not alive and is_there():
                return
            assert alive and time.monotonic() < deadline, f"no {what}:\n{self.outputs()}"
            time.sleep(0.01)

    def wait_for_steps(self, count: int) -> None:
        """Until so many steps are done by this attempt and the next one has begun."""
        self.wait_for(lambda: len(self.steps()) > count, f"{count} steps")

    def outputs(self) -> str:
        """What all ranks have said."""
        return "\n".join(f"--- {rank}\n{self.output(rank)}" for rank in range(len(self.files)))

    def end(self) -> list[int]:
        """Exit statuses, minus the number of a signal; all processes must end."""
        for process in self.processes:
            process.join(PATIENCE)
            if process.is_alive():
                said = self.outputs()
                for other in self.processes:
                    other.kill()
                raise AssertionError(f"a process does not end:\n{said}")
        return [process.exitcode for process in self.processes]


def children(pid: int) -> list[int]:
    """Processes that a process has started, such as its workers."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            if re.search(rf"^PPid:\t{pid}$", status.read_text(), re.MULTILINE):
                found.append(int(status.parent.name))
    return found


def complaints(text: str) -> list[str]:
    """The lines that give a reason."""
    return [line for line in text.splitlines() if line.startswith("train.py: ")]


def step_of(file: Path) -> int:
    """The step of a checkpoint; 0 where there is none."""
    return torch.load(file, weights_only=True)["step"] if file.exists() else 0


def logged(folder: Path) -> dict[int, dict]:
    """The log by steps, without what depends on the clock. Each step stands there once."""
    clock = ("images_per_second", "data_seconds", "memory_gb")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)), f"{folder / 'log.jsonl'}: a step is missing or repeated"
    return {
        line["step"]: {name: value for name, value in line.items() if name not in clock}
        for line in lines
    }


class Storm:
    """A run in `folder` and the faults that strike it; AssertionError where a promise is broken."""

    def __init__(self, scratch: Path, seed: int, epochs: int, save_every: int, pace: float):
        self.folder, self.rng, self.pace = scratch / "run", random.Random(seed), pace
        self.last = self.folder / "last.pth"
        self.repeated = 0  # steps that were done again, as the last checkpoint did not hold them
        self.unlogged: set[int] = set()  # saved steps whose line of the log could not be written
        photographs = draw_photographs(scratch / "photographs")
        self.argv = [*OPTIONS, "--data-dir", str(photographs), "--epochs", str(epochs)]
        self.argv += ["--save-every", str(save_every)]

    def strike(self, kind: str) -> str:
        """One attempt of the run and its fault; returns a line about it."""
        start = step_of(self.last)
        at, victim = self.rng.randrange(5), self.rng.randrange(2)
        if kind in ("full disk", "closed output"):
            victim = 0
        attempt = Attempt(self.folder, self.argv, 2, self.pace, kind, at)
        attempt.wait_for_steps(at)
        # The pause of the step, its work, the agreement of the processes, perhaps a save
        time.sleep(self.rng.uniform(0, 1.6 * self.pace))
        process = attempt.processes[victim]
        if kind == "worker":
            attempt.wait_for(lambda: children(process.pid), "worker")
            os.kill(children(process.pid)[0], signal.SIGKILL)
        elif kind in ("SIGKILL", "leftovers"):
            process.kill()
        elif kind == "second run":
            self.start_second_run(attempt)
            os.kill(process.pid, signal.SIGTERM)
        else:
            name = kind if kind.startswith("SIG") else "SIGTERM"
            os.kill(process.pid, getattr(signal, name))
        statuses = attempt.end()
        end = self.check(kind, attempt, statuses, victim, start)
        if kind == "leftovers":
            (self.folder / f".last.pth.{DEAD}.tmp").write_bytes(b"half a checkpoint")
            with (self.folder / "log.jsonl").open("a") as log:
                log.write('{"step": 7, "lo')  # a line that was cut off
        if kind == "cut checkpoint":
            self.cut_checkpoint()
        return (
            f"{kind:14} at process {victim}: from step {start}, struck after "
            f"{start + at}, ended in {end}, {step_of(self.last)} saved, statuses {statuses}"
        )

    def check(
        self, kind: str, attempt: Attempt, statuses: list[int], victim: int, start: int
    ) -> int:
        """What must hold after an attempt; returns how many steps of the run it has begun."""
        said = f"{kind}, statuses {statuses}:\n{attempt.outputs()}"
        assert "Traceback" not in said, said
        wanted = KINDS[kind]
        for rank, status in enumerate(statuses):
            expected = wanted[rank != victim]
            assert status == expected or (expected is None and status in (0, 1)), said
            if status == 1:
                assert len(complaints(attempt.output(rank))) == 1, said
        for rank in range(2):
            steps = attempt.steps(rank)
            assert not steps or steps[0] == start, f"begins at {steps[0]}, not {start}. {said}"
        end, after = attempt.steps()[-1] + 1, step_of(self.last)
        assert start <= after <= end, f"{start}, {end}, {after} saved. {said}"
        self.repeated += end - after
        killed = kind in ("SIGKILL", "leftovers") and victim == 0
        if kind == "full disk":
            line = complaints(attempt.output())[0]
            left = f"holds step {after}," if after else "there is no checkpoint"
            assert "could not write" in line and left in line, said
        elif not killed:  # the main process lived: at most the step that was struck is lost
            assert after >= end - 1, f"{end}, {after} saved. {said}"
        if kind in ("SIGKILL", "leftovers") and after and after not in logged(self.folder):
            # A line of the log needs both processes: one died between the step and its line, and
            # the next line averages both steps.
            self.unlogged.add(after)
        assert not list(self.folder.glob(f".*.{DEAD}.tmp")), "a leftover was not removed"
        return end

    def start_second_run(self, first: Attempt) -> None:
        """The same command once more: refused, and the first run does not notice."""
        second = Attempt(self.folder, self.argv, 1, name="second")
        assert second.end() == [2], second.outputs()
        holder = f"is in use by process {first.processes[0].pid} on "
        lines = complaints(second.output())
        assert len(lines) == 1 and holder in lines[0], second.outputs()
        done = len(first.steps())
        first.wait_for_steps(done + 1)

    def cut_checkpoint(self) -> None:
        """A broken disk: last.pth is cut. One line names it; then it comes back from a copy."""
        whole = self.last.read_bytes()
        self.last.write_bytes(whole[: self.rng.randrange(len(whole))])
        attempt = Attempt(self.folder, self.argv)
        assert attempt.end() == [2, 2], attempt.outputs()
        lines = complaints(attempt.output())
        assert len(lines) == 1 and f"{self.last} is " in lines[0], attempt.outputs()
        assert "Traceback" not in attempt.outputs() and not attempt.steps()
        self.last.write_bytes(whole)


def draw_photographs(folder: Path, count: int = 14) -> Path:
    """Small images with soft colors, each of a size of its own."""
    folder.mkdir()
    generator = np.random.default_rng(3)
    for i in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((40 + i, 37), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
    return folder


def storm(
    scratch: Path, faults: int, seed: int, save_every: int = 5, pace: float = 0.1
) -> Counter[str]:
    """Faults of all kinds in random order on one run; returns how often each struck.

    scratch: an empty folder; save_every: epochs; pace: seconds of a step. AssertionError
    where a promise is broken.
    """
    one = Storm(scratch, seed, EPOCHS_PER_FAULT * faults, save_every, pace)
    calm = scratch / "calm"
    quiet = Attempt(calm, one.argv)
    kinds = list(KINDS)
    order = [kinds[i % len(kinds)] for i in range(faults)]
    one.rng.shuffle(order)
    assert quiet.end() == [0, 0], quiet.outputs()
    for number, kind in enumerate(order, start=1):
        print(f"{number:3} {one.strike(kind)}", flush=True)
    start = step_of(one.last)
    final = Attempt(one.folder, one.argv)
    assert final.end() == [0, 0], final.outputs()
    assert final.steps()[0] == start and "Traceback" not in final.outputs(), final.outputs()
    expected, found = (
        torch.load(folder / "last.pth", weights_only=True) for folder in (calm, one.folder)
    )
    assert found["step"] == expected["step"] == STEPS_PER_EPOCH * EPOCHS_PER_FAULT * faults
    for name, value in expected["model"].items():
        assert value.equal(found["model"][name]), f"{name} is not the same"
    whole, pieces = logged(calm), logged(one.folder)
    for step, line in whole.items():
        averaged = step - 1 in one.unlogged
        assert step in one.unlogged or averaged or pieces[step] == line, f"log, step {step}"
    print(
        f"{one.repeated} of {found['step']} steps were done twice, {len(one.unlogged)} left no "
        "line in the log"
    )
    return Counter(order)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pace", type=float, default=0.1, help="seconds of a step")
    args = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        struck = storm(Path(scratch), args.faults, args.seed, pace=args.pace)
    print(
        f"{sum(struck.values())} faults in {(time.perf_counter() - began) / 60:.1f} minutes, the "
        f"same weights bit for bit: {json.dumps(dict(struck))}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
