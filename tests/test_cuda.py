"""The same numbers on a CUDA GPU, before anybody measures speed there; skipped without one.

A GPU adds in another order every time, so runs are compared to what that leaves, not bit for bit.
TEST_DEVICE=cpu runs what makes sense there on a CPU, to try the tests themselves."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

import staged
import train
from engine import processes
from engine.processes import Place
from photometric import Draw, Photometric

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
IS_CUDA = DEVICE == "cuda"
STEPS = 50

pytestmark = pytest.mark.skipif(
    IS_CUDA and not torch.cuda.is_available(), reason="needs a CUDA GPU"
)
only_cuda = pytest.mark.skipif(not IS_CUDA, reason="means something on a GPU only")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return staged.draw_photographs(tmp_path_factory.mktemp("data") / "photographs")


def arguments_of(folder, photographs, *arguments):
    """A small run on the device: 50 steps of a schedule of 60, a line of the log for each, without
    fp32 in TF32."""
    fixed = ("--device", DEVICE, "--epochs", "20", "--max-steps", str(STEPS), "--log-every", "1")
    rate = ("--base-lr", "1", "--warmup-epochs", "2", "--amp", "off")
    return staged.command_line(folder, *fixed, *rate, *arguments, photographs=photographs)


def losses_in(folder):
    """Loss by step."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def losses_of(folder, photographs, *arguments):
    """Loss by step of a whole run in this process."""
    assert train.main(arguments_of(folder, photographs, *arguments)) == 0
    return losses_in(folder)


@pytest.fixture(scope="module")
def plain(photographs, tmp_path_factory):
    """Loss by step of a run in float32."""
    return losses_of(tmp_path_factory.mktemp("plain") / "run", photographs)


def assert_near(found, expected, rel):
    """The same steps, and their losses within rel of each other."""
    assert found.keys() == expected.keys() and len(expected) == STEPS
    furthest = max(abs(found[step] / expected[step] - 1) for step in expected)
    assert furthest < rel, f"losses differ by {furthest:.2%}"


# ------------------------------------------------------------------------------------- whole runs


def test_a_run_that_is_repeated_has_the_same_losses(plain, photographs, tmp_path):
    assert_near(losses_of(tmp_path / "run", photographs), plain, rel=2e-3)


def losses_in_precision(folder, photographs, amp):
    """Loss by step of 50 good steps. A step that fp16 skips, because its scale is still too large,
    is taken again with the same batch: a run would go on to the next one, and the two would part.
    """
    arguments = arguments_of(folder, photographs, "--amp", amp)
    c, given = train.recipes.parse(arguments, "")
    run, found = train.set_up(c, given), {}
    change, generator = train.recipes.photometric_of(c), torch.Generator(run.place.device)
    while len(found) < STEPS:
        batch = run.batches.next()
        views = change(batch.views, generator.manual_seed(len(found)))
        for _ in range(20):
            verdict, _ = train.take_step(c, run, views, batch.boxes, batch.flipped)
            if verdict.good:
                break
        assert verdict.good and not run.trouble
        run.progress.advance(verdict)
        found[run.progress.step] = verdict.values[0]
    run.batches.close()
    return found


@pytest.fixture(scope="module")
def exact(photographs, tmp_path_factory):
    """Loss by step in float32."""
    return losses_in_precision(tmp_path_factory.mktemp("exact") / "run", photographs, "off")


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_and_float32_agree_over_50_steps_from_the_same_weights(
    amp, exact, photographs, tmp_path
):
    assert_near(losses_in_precision(tmp_path / "run", photographs, amp), exact, rel=0.02)


@only_cuda
def test_a_compiled_run_has_the_losses_of_an_eager_one(plain, photographs, tmp_path):
    assert_near(losses_of(tmp_path / "run", photographs, "--compile"), plain, rel=0.01)


@only_cuda
def test_channels_last_changes_the_order_in_memory_and_not_the_losses(plain, photographs, tmp_path):
    found = losses_of(tmp_path / "run", photographs, "--no-channels-last")
    assert_near(found, plain, rel=0.01)


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_run_that_is_killed_and_resumed_has_the_losses_of_one_that_is_not(
    amp, photographs, tmp_path
):
    """fp16: its scale is resumed too."""
    whole = losses_of(tmp_path / "whole", photographs, "--amp", amp)
    arguments = arguments_of(tmp_path / "run", photographs, "--amp", amp)
    died = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], cwd=staged.ROOT, capture_output=True, text=True
    )
    assert died.returncode == -9, died.stderr
    assert staged.last_of(tmp_path / "run")["position"] == 18  # fp16 skips some steps at first
    assert_near(losses_of(tmp_path / "run", photographs, "--amp", amp), whole, rel=0.01)
    scales = [staged.last_of(tmp_path / name)["scaler"].get("scale") for name in ("run", "whole")]
    assert scales[0] == scales[1]


KILLED = """
import os, signal, sys, train
def prepared(run):
    taken, next_batch = [], run.batches.next
    def counted():
        taken.append(1)
        if len(taken) == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return next_batch()
    run.batches.next = counted
sys.exit(train.main(sys.argv[1:], prepared))
"""


def test_one_process_under_torchrun_is_the_plain_process(plain, photographs, tmp_path):
    arguments = arguments_of(tmp_path / "run", photographs)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    done = subprocess.run(
        [*command, "train.py", *arguments], cwd=staged.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert_near(losses_in(tmp_path / "run"), plain, rel=2e-3)


# ---------------------------------------------------------------------- one step, many processes


def gather_of_one(run):
    """What a process among several makes of its model: synchronized batch norms, and DDP."""
    place = Place(run.place.device, 0, 2)  # processes.wrap leaves a process on its own alone
    if IS_CUDA:
        run.model = nn.SyncBatchNorm.convert_sync_batchnorm(run.model)
    run.gradient.model = processes.wrap(run.model, place)


def steps_of(folder, photographs, prepare=None, count=3):
    """Losses and weights of a few steps on fixed noise, by train.take_step."""
    c, given = train.recipes.parse(arguments_of(folder, photographs), "")
    run = train.set_up(c, given)
    run.batches.close()
    if prepare:
        prepare(run)
    generator, device = torch.Generator().manual_seed(0), run.place.device
    views = torch.randn(4, 2, 3, 32, 32, generator=generator).to(device)
    boxes = torch.tensor([[0.1, 0.2, 0.9, 0.8], [0.0, 0.3, 0.7, 1.0]], device=device)
    flipped = (torch.rand(4, 2, generator=generator) < 0.5).to(device)
    values = []
    for _ in range(count):
        verdict, _ = train.take_step(c, run, views, boxes.expand(4, 2, 4), flipped)
        assert verdict.good
        values.append(verdict.values)
        run.progress.advance(verdict)
    return torch.tensor(values), {k: v.cpu() for k, v in run.model.state_dict().items()}


def test_a_step_through_nccl_ddp_and_synchronized_norms_is_the_plain_step(photographs, tmp_path):
    values, state = steps_of(tmp_path / "plain", photographs)
    dist.init_process_group(
        "nccl" if IS_CUDA else "gloo", init_method=f"file://{tmp_path}/meeting", rank=0,
        world_size=1,
    )  # fmt: skip
    try:
        other_values, other_state = steps_of(tmp_path / "ddp", photographs, gather_of_one)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(other_values, values, rtol=1e-3, atol=1e-5)
    assert state.keys() == other_state.keys()
    for name in state:
        torch.testing.assert_close(
            other_state[name], state[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@only_cuda
def test_a_step_has_the_numbers_of_the_cpu(photographs, tmp_path):
    values, _ = steps_of(tmp_path / "gpu", photographs)
    c, given = train.recipes.parse(
        [*arguments_of(tmp_path / "cpu", photographs), "--device", "cpu"], ""
    )
    run = train.set_up(c, given)
    run.batches.close()
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(4, 2, 3, 32, 32, generator=generator)
    boxes = torch.tensor([[0.1, 0.2, 0.9, 0.8], [0.0, 0.3, 0.7, 1.0]])
    flipped = torch.rand(4, 2, generator=generator) < 0.5
    verdict, _ = train.take_step(c, run, views, boxes.expand(4, 2, 4), flipped)
    assert verdict.values == pytest.approx(values[0].tolist(), rel=0.01)  # TF32 convolutions


# -------------------------------------------------------------------------------------- the colors


@only_cuda
def test_on_a_gpu_the_colors_wait_for_nothing_and_are_those_of_the_cpu():
    change, generator = Photometric(), torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 2, 3, 64, 64), dtype=torch.uint8, generator=generator)
    draw = change.draw(5, generator)
    on_gpu, gpu_draw = images.cuda(), Draw(*(t.cuda() for t in draw))
    generator = torch.Generator("cuda").manual_seed(0)
    change(on_gpu, generator)  # constants are copied once
    torch.cuda.set_sync_debug_mode("error")
    try:
        changed = change.apply(on_gpu, gpu_draw)
        change(on_gpu, generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(changed.cpu(), change.apply(images, draw), rtol=0, atol=1e-4)
