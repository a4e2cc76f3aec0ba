"""A storm of faults on one small run, each followed by the same command: are the weights the same?

    python benchmarks/storm.py --faults 50 --seed 0

A run of two processes on small images, on the CPU. At random moments it is signalled, one of its
processes or workers is killed, its disk is full, its output is closed, a second run starts in its
directory, or files that a crash leaves are put beside it. The same command then goes on. At the end
its weights must equal those of a run that nobody disturbed, bit for bit, and every attempt must
begin where the last checkpoint ended.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300  # seconds for one attempt on a busy machine
OPTIONS = (
    "--preset coco-r50 --dataset folder --arch tiny --image-size 32 --num-prototypes 5 "
    "--dim-hidden 12 --dim-out 7 --batch-size 4 --warmup-epochs 1 --base-lr 1 --workers 1 "
    "--device cpu --threads 1 --log-every 1 --save-every 4 --timeout 60"
).split()
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "SIGKILL")


class Attempt:
    """Two processes with the same command; what rank 0 says goes to a file."""

    def __init__(self, folder: Path, photographs: Path, epochs: int, disk: int = 0):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "train.py", *OPTIONS, "--epochs", str(epochs)]
        command += ["--data-dir", str(photographs), "--output-dir", str(folder)]
        self.said = folder.with_name(f"{folder.name}.txt")
        self.processes = []
        for rank in range(2):
            place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2)
            meeting = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo")
            environment = {**os.environ, **{k: str(v) for k, v in {**place, **meeting}.items()}}
            limit = (
                (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (disk, disk))) if disk else None
            )
            with self.said.with_suffix(f".{rank}.txt").open("w") as file:
                self.processes.append(subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=file, stderr=file,
                    preexec_fn=limit if rank == 0 else None))  # fmt: skip

    def output(self, rank: int = 0) -> str:
        """What a rank has said so far."""
        return self.said.with_suffix(f".{rank}.txt").read_text(errors="replace")

    def steps(self) -> list[int]:
        """The steps that rank 0 has reported."""
        return [int(step) for step in re.findall(r"^step (\d+)/", self.output(), re.MULTILINE)]

    def wait_for_a_step(self) -> bool:
        """Until the first step is reported, or the attempt is over."""
        deadline = time.monotonic() + PATIENCE
        while not self.steps() and time.monotonic() < deadline:
            if all(process.poll() is not None for process in self.processes):
                return False
            time.sleep(0.02)
        return bool(self.steps())

    def end(self) -> list[int]:
        """Exit statuses; a process that does not end is a failure of the run."""
        statuses = []
        for process in self.processes:
            try:
                statuses.append(process.wait(PATIENCE))
            except subprocess.TimeoutExpired:
                process.kill()
                raise AssertionError(f"a process does not end:\n{self.output()}") from None
        return statuses


def children(pid: int) -> list[int]:
    """Processes that a process has started, such as its workers."""
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in found.read_text().split()] if found.exists() else []


def strike(
    kind: str, attempt: Attempt, folder: Path, photographs: Path, rng: random.Random
) -> None:
    """One fault on a run that is under way."""
    victim = rng.choice(attempt.processes)
    if kind in SIGNALS:
        if victim.poll() is None:
            victim.send_signal(getattr(signal, kind))
    elif kind == "worker":
        for child in children(victim.pid)[:1]:
            os.kill(child, signal.SIGKILL)
    elif kind == "second run":
        name = folder.with_name("second")
        command = [sys.executable, "train.py", *OPTIONS, "--data-dir", str(photographs)]
        command += ["--output-dir", str(folder), "--epochs", "9999"]
        alone = {k: v for k, v in os.environ.items() if "RANK" not in k and "WORLD" not in k}
        done = subprocess.run(
            command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False
        )
        name.with_suffix(".txt").write_text(done.stdout + done.stderr)
        busy = "is in use by process" in done.stderr or "other options" in done.stderr
        assert done.returncode == 2 and busy, done.stderr
        victim.send_signal(signal.SIGTERM)
    elif kind == "leftovers":
        victim.send_signal(signal.SIGKILL)
        attempt.end()
        (folder / ".last.pth.4194399.tmp").write_bytes(b"half a checkpoint")
        with (folder / "log.jsonl").open("a") as log:
            log.write('{"step": 7, "lo')  # a line that was cut off


def saved_step(folder: Path) -> int:
    """The step of last.pth; 0 where there is none."""
    file = folder / "last.pth"
    return torch.load(file, weights_only=True)["step"] if file.exists() else 0


def storm(scratch: Path, faults: int, seed: int, epochs: int) -> Counter:
    """Run it; returns how often each fault struck. AssertionError where a promise is broken."""
    rng, struck = random.Random(seed), Counter()
    photographs = scratch / "photographs"
    photographs.mkdir()
    noise = np.random.default_rng(3)
    for i in range(14):
        coarse = Image.fromarray(noise.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((40 + i, 37), Image.Resampling.BICUBIC).save(photographs / f"{i:03d}.png")
    calm, folder = scratch / "calm", scratch / "run"
    quiet = Attempt(calm, photographs, epochs)
    assert quiet.end() == [0, 0], quiet.output()

    kinds = [*SIGNALS, "worker", "full disk", "closed output", "second run", "leftovers"]
    order = [kinds[i % len(kinds)] for i in range(faults)]
    rng.shuffle(order)
    for kind in order:
        before = saved_step(folder)
        attempt = Attempt(folder, photographs, epochs, disk=40_000 if kind == "full disk" else 0)
        if not attempt.wait_for_a_step():
            attempt.end()
            assert kind == "full disk" or "done" in attempt.output(), attempt.output()
            continue
        time.sleep(rng.uniform(0, 0.6))
        strike(
            kind if kind not in ("full disk", "closed output") else "SIGTERM",
            attempt,
            folder,
            photographs,
            rng,
        )
        attempt.end()
        struck[kind] += 1
        steps = attempt.steps()
        assert steps[0] == before + 1, f"{kind}: began at step {steps[0]}, {before} were saved"
        ours = [rank for rank in range(2) if "Traceback" in attempt.output(rank)]
        assert not ours or kind == "SIGKILL", attempt.output(ours[0])
        after = saved_step(folder)
        assert before <= after <= steps[-1] + 1, f"{kind}: {before}, {steps[-1]}, {after}"
        print(f"{kind:14} steps {steps[0]} to {steps[-1]}, {after} saved", flush=True)
    final = Attempt(folder, photographs, epochs)
    assert final.end() == [0, 0], final.output()
    expected = torch.load(calm / "last.pth", weights_only=True)
    found = torch.load(folder / "last.pth", weights_only=True)
    assert found["step"] == expected["step"]
    for name, value in expected["model"].items():
        assert value.equal(found["model"][name]), f"{name} is not the same"
    return struck


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=150, help="of 3 steps each")
    args = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        struck = storm(Path(scratch), args.faults, args.seed, args.epochs)
    print(
        f"{sum(struck.values())} faults in {time.perf_counter() - began:.0f} s, the same weights "
        f"bit for bit: {dict(struck)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
