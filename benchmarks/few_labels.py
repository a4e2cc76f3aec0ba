"""Backbones side by side, fine-tuned on few labeled images: mean IoU over seeds.

    python benchmarks/few_labels.py --backbones random=random slotcon=runs/toy/last.pth \
        --labeled 4 8 16 --seeds 0 1 2 --output-dir runs/few-toy -- --dataset toy --batch-size 4

What stands behind `--` goes to `transfer.py segmentation`. A seed decides the heads' weights, the
order of the images, and which of them are labeled: the same ones for every backbone. Runs that are
done are not done again; best.pth and last.pth are removed, since only the scores count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = Path(__file__).resolve().parent.parent / "transfer.py"


def score(folder: Path, command: list[str]) -> float:
    """The mIoU of a run in percent; the run is made if it has not been."""
    file = folder / "few_labels.json"
    if not file.exists():
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, str(PROGRAM), "segmentation", *command, "--output-dir", str(folder)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        result = json.loads((folder / "result.json").read_text())
        result["seconds"] = round(time.perf_counter() - began)
        file.write_text(json.dumps(result))
        for name in ("last.pth", "best.pth"):
            (folder / name).unlink()
    return 100 * json.loads(file.read_text())["miou"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbones", nargs="+", required=True, help="NAME=FILE, or NAME=random")
    labeled = dict(nargs="+", type=int, required=True, help="numbers of images, 0: all")
    parser.add_argument("--labeled", **labeled)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("options", nargs="*", help="of transfer.py segmentation")
    args = parser.parse_args()
    print("| labeled | " + " | ".join(each.partition("=")[0] for each in args.backbones) + " |")
    print("|---" * (1 + len(args.backbones)) + "|")
    for labeled in args.labeled:
        cells = []
        for each in args.backbones:
            name, _, file = each.partition("=")
            scores = []
            for seed in args.seeds:
                command = [*args.options, "--backbone", file, "--labeled", str(labeled)]
                folder = args.output_dir / f"{name}-{labeled}-{seed}"
                scores.append(score(folder, [*command, "--seed", str(seed)]))
            each_one = " ".join(f"{value:.1f}" for value in scores)
            cells.append(f"{statistics.mean(scores):.1f} ({each_one})")
        print(f"| {labeled or 'all'} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
