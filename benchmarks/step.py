"""Images per second of the training step as train.py runs it, beside another version of the code.

    python benchmarks/step.py -- --preset toy                              this checkout alone
    python benchmarks/step.py --against ../before -- --preset toy          two checkouts in turn
    python benchmarks/step.py --steps 6 -- --preset coco-r50 --dataset toy --subset 64 \\
        --batch-size 8 --arch resnet18 --image-size 112 --num-prototypes 2048

What stands behind `--` goes to train.py; `--there` has the options of the other checkout where
they have other names. Both take turns; a round is one run each, whose speed is that of the log
from its second line on. Prints the median and the spread, and the ratio pair by pair. On a GPU
add `--workers` and `--compile` as wanted; the first line of a run says the device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent


def measure(checkout: Path, options: list[str], steps: int) -> dict[str, float]:
    """One short run of a checkout -> images per second and peak memory, GB."""
    with tempfile.TemporaryDirectory() as folder:
        length = ["--max-steps", str(2 * steps), "--log-every", str(steps)]
        command = [sys.executable, "train.py", *options, *length, "--output-dir", folder]
        subprocess.run(command, cwd=checkout, check=True, capture_output=True)
        lines = (Path(folder) / "log.jsonl").read_text().splitlines()
        record = json.loads(lines[-1])
        return dict(speed=record["images_per_second"], memory=record["memory_gb"])


def main() -> None:
    """Run the rounds and print the table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--there", default="", help="its options, in one string, if they differ")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="counted steps of a run (40)")
    parser.add_argument("options", nargs="*", help="of train.py")
    args = parser.parse_args()
    checkouts = {"here": (HERE, args.options)}
    if args.against:
        checkouts["there"] = (args.against, args.there.split() or args.options)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for _ in range(args.rounds):
        for name, (folder, options) in checkouts.items():
            found[name].append(measure(folder, options, args.steps))
    for name, runs in found.items():
        speeds = [run["speed"] for run in runs]
        print(
            f"{name:6}{statistics.median(speeds):9.2f} images/s  ({min(speeds):.2f} .. "
            f"{max(speeds):.2f})  {runs[0]['memory']:.2f} GB"
        )
    if args.against:
        pairs = zip(found["here"], found["there"])
        ratios = [here["speed"] / there["speed"] for here, there in pairs]
        print(f"here / there, pair by pair: {statistics.median(ratios):.3f} (times as fast)")
    print(json.dumps(dict(options=args.options, **found)))


if __name__ == "__main__":
    main()
