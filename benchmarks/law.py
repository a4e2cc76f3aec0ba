"""Does the law say beforehand which toy runs start? Ten short runs over temperatures and views.

    python benchmarks/law.py                    240 steps each, about ten minutes on one core

For each: rho, the correlation of the untrained network's features between the views of the run's
own first 256 images (measures/law.py), against temp_teacher / temp_student; what that predicts for
a run, whose trunk learns (and, in the JSON, for features that stay as they are); and what was seen:
the group loss left 2 ln k if its mean over the last quarter of the log lies below LEFT of it. The
NMI of the groups with the classes, of the trained and of the untrained network, stands beside it.
Ends with one line of JSON that holds every figure.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import recipes  # noqa: E402
from engine.loader import RunSampler, Samples  # noqa: E402
from engine.progress import seed_of  # noqa: E402
from measures import law  # noqa: E402

LEFT = 0.95  # of 2 ln k: a group loss below has left the uniform assignment by a clear margin
# All that the law depends on is written out, so that another preset does not change the table.
COMMON = (
    "--preset toy --arch tiny --toy-scenes 768 --image-size 48 --num-prototypes 16 "
    "--temp-student 0.1 --momentum-center 0.9 --momentum-teacher 0.99 "
    "--momentum-teacher-end 0.99 --batch-size 16 --base-lr 0.16 --epochs 36 "
    "--warmup-epochs 0.625 --toy-test-scenes 64 --device cpu --threads 1 --workers 0 "
    "--channels-last --log-every 20 --resume none --group-starts 1"
)
VIEWS = {
    "toy": "--min-area 0.2 --brightness 0.2 --contrast 0.2 --saturation 0.3 --hue 0.5 "
    "--p-jitter 1 --p-gray 0.2 --p-blur 0 0 --p-solarize 0.5 0.5 --solarize-threshold 0",
    "not inverted": "--p-solarize 0 0",
    "mild": "--p-solarize 0 0 --p-gray 0 --hue 0.05 --brightness 0.1 --contrast 0.1 "
    "--saturation 0.1",
    "strong": "--brightness 0.5 --contrast 0.5 --saturation 0.5",
    "published": "--min-area 0.08 --brightness 0.4 --contrast 0.4 --saturation 0.2 --hue 0.1 "
    "--p-jitter 0.8 --p-blur 1 0.1 --p-solarize 0 0.2 --solarize-threshold 128",
}
RUNS = (  # views, teacher temperature; the student's is 0.1
    ("toy", 0.02), ("toy", 0.03), ("toy", 0.05), ("toy", 0.07), ("not inverted", 0.05),
    ("mild", 0.05), ("mild", 0.09), ("strong", 0.03), ("published", 0.03), ("published", 0.07),
)  # fmt: skip
HEADER = (
    "| views | temp_teacher | rho | ratio | predicted | seen | group loss / 2 ln k | NMI | "
    "NMI untrained |\n|---|---|---|---|---|---|---|---|---|"
)


def arguments_of(views: str, temp_teacher: float, seed: int) -> list[str]:
    """The options of one run. Of an option that is given twice, the last counts."""
    options = f"{COMMON} {VIEWS['toy']} {VIEWS[views] if views != 'toy' else ''}"
    return [*options.split(), "--temp-teacher", str(temp_teacher), "--seed", str(seed)]


def first_batches(c: recipes.Config, images: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The batches that a run of this configuration begins with: views, boxes, flipped."""
    scenes, _ = recipes.images_of(c)
    samples = Samples(scenes, recipes.crops_of(c), c.seed)
    photometric, generator = recipes.photometric_of(c), torch.Generator()
    sampler = RunSampler(len(scenes), c.batch_size, seed=c.seed, stop=images // c.batch_size)
    for position, batch in enumerate(sampler):
        views, boxes, flipped = (
            torch.stack(parts) for parts in zip(*(samples[i][0] for i in batch))
        )
        generator.manual_seed(seed_of(c.seed, position, 0))
        yield photometric(views, generator), boxes, flipped


def one_run(views: str, temp_teacher: float, seed: int, steps: int) -> dict:
    """rho before the run, and what the run did."""
    arguments = arguments_of(views, temp_teacher, seed)
    c, _ = recipes.parse(arguments, "")
    rho = law.measure(recipes.model_of(c).teacher, first_batches(c, law.IMAGES))
    with tempfile.TemporaryDirectory() as folder:
        options = ["--max-steps", str(steps), "--output-dir", folder]
        subprocess.run(
            [sys.executable, "train.py", *arguments, *options], cwd=ROOT, check=True,
            capture_output=True,
        )  # fmt: skip
        lines = (Path(folder) / "log.jsonl").read_text().splitlines()
        result = json.loads((Path(folder) / "result.json").read_text())
    losses = [json.loads(line)["group_loss"] for line in lines]
    left = statistics.mean(losses[-math.ceil(len(losses) / 4) :])
    left /= 2 * math.log(c.num_prototypes)
    return dict(
        views=views, temp_teacher=temp_teacher, seed=seed, rho=rho,
        ratio=temp_teacher / c.temp_student,
        predicted=law.run_can_start(rho, c.temp_student, temp_teacher),
        predicted_fixed=law.can_start(rho, c.temp_student, temp_teacher), seen=left < LEFT,
        share_of_2_ln_k=left, nmi=result["nmi"], nmi_untrained=result["untrained"]["nmi"],
    )  # fmt: skip


def row(r: dict) -> str:
    """One row of the table."""
    word = {True: "starts", False: "uniform"}
    return (
        f"| {r['views']} | {r['temp_teacher']:g} | {r['rho']:.2f} | {r['ratio']:.2f} | "
        f"{word[r['predicted']]} | {word[r['seen']]} | {r['share_of_2_ln_k']:.3f} | "
        f"{r['nmi']:.3f} | {r['nmi_untrained']:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(HEADER, flush=True)
    found = []
    for views, temp_teacher in RUNS:
        found.append(one_run(views, temp_teacher, args.seed, args.steps))
        print(row(found[-1]), flush=True)
    agree, fixed = (
        sum(r[key] == r["seen"] for r in found) for key in ("predicted", "predicted_fixed")
    )
    print(
        f"\nThe law was right in {agree} of {len(found)} runs; in {fixed}, if the features were to "
        "stay as they are."
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
