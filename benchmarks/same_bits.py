"""Are the weights of a run still the same, bit for bit? Asked before and after a change that should
move nothing.

    python benchmarks/same_bits.py record FOLDER      before the change: hashes, checkpoints
    python benchmarks/same_bits.py check FOLDER       after it, on the same machine

Five short runs on toy scenes, started from the command line: one process, two processes, and each
ablation. `check` also resumes them in the middle, from checkpoints that it writes and from those
that `record` left in FOLDER. Last bits depend on the machine and on torch, so FOLDER is never
committed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# The toy recipe in full, so that another preset does not look like other arithmetic.
RECIPE = (
    "--preset toy --arch tiny --subset 768 --image-size 48 --num-prototypes 16 --dim-hidden 64 "
    "--dim-out 32 --temp-student 0.1 --temp-teacher 0.03 --momentum-center 0.9 "
    "--momentum-teacher 0.99 0.99 --min-area 0.2 --jitter 0.2 0.2 0.3 0.5 1 --p-gray 0.2 "
    "--p-blur 0 0 --solarize 0.5 0.5 0 --optimizer adamw --batch-size 16 --base-lr 0.16 "
    "--weight-decay 0.01 --epochs 36 --warmup 0.625 --group-weight 0.5 --seed 0 --held-out 8 "
    "--device cpu --workers 0 --log-every 20 --save-minutes 1000 --keep-every 0"
).split()
RUNS = {
    "one": [],
    "two": [],
    "reg": ["--slot-loss", "reg"],
    "proj": ["--align", "proj"],
    "image": ["--image-loss"],
}
HALF, WHOLE = 30, 60


def train(name: str, folder: Path, steps: int) -> Path:
    """One run up to `steps`, started anew or continued; returns its checkpoint."""
    launcher = [sys.executable]
    if name == "two":
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = [*RECIPE, *RUNS[name], "--max-steps", str(steps), "--output-dir", str(folder)]
    options += ["--resume", "force"]  # although an option may have another name by now
    subprocess.run(
        [*launcher, "train.py", *options], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return folder / "last.pth"


def tensors(contents, name: str = ""):
    """All tensors of nested mappings and lists, each with the path that leads to it."""
    if isinstance(contents, torch.Tensor):
        yield name, contents
    elif isinstance(contents, dict):
        for key, value in contents.items():
            yield from tensors(value, f"{name}/{key}")
    elif isinstance(contents, (list, tuple)):
        for i, value in enumerate(contents):
            yield from tensors(value, f"{name}/{i}")


def hashes(checkpoint: Path) -> dict[str, str]:
    """A hash of every tensor of a checkpoint: model and optimizer."""
    contents = torch.load(checkpoint, map_location="cpu", weights_only=True)
    found = {}
    for part in ("model", "optimizer"):
        for name, tensor in tensors(contents[part], part):
            content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[name] = hashlib.sha256(content).hexdigest()
    return found


def record(folder: Path) -> None:
    found = {}
    for name in RUNS:
        kept = folder / name
        shutil.rmtree(kept, ignore_errors=True)
        train(name, kept, HALF)
        with tempfile.TemporaryDirectory() as scratch:
            found[name] = hashes(train(name, Path(scratch) / name, WHOLE))
        print(f"recorded {name}: {len(found[name])} tensors", flush=True)
    (folder / "hashes.json").write_text(json.dumps(found, indent=1))


def check(folder: Path, only: list[str]) -> int:
    """Returns how many runs differ."""
    expected, bad = json.loads((folder / "hashes.json").read_text()), 0
    with tempfile.TemporaryDirectory() as scratch:
        for name in only or RUNS:
            again, resumed, earlier = (
                Path(scratch) / f"{name}-{way}" for way in ("again", "resumed", "earlier")
            )
            shutil.copytree(folder / name, earlier)
            train(name, resumed, HALF)
            for way, target in (
                ("anew", again),
                ("resumed", resumed),
                ("resumed from FOLDER", earlier),
            ):
                found = hashes(train(name, target, WHOLE))
                names = expected[name].keys() | found.keys()
                other = sorted(key for key in names if expected[name].get(key) != found.get(key))
                bad += bool(other)
                line = f"{len(other)} tensors differ, first {other[0]}" if other else "same bits"
                print(f"{name}, {way}: {line}", flush=True)
    return bad


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=("record", "check"))
    parser.add_argument("folder", type=Path)
    text = "check: these runs only"
    parser.add_argument("--only", nargs="+", choices=RUNS, default=[], help=text)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.what == "record":
        record(args.folder)
        return 0
    return 1 if check(args.folder, args.only) else 0


if __name__ == "__main__":
    sys.exit(main())
