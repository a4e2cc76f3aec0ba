"""Runs on a GPU. `TEST_DEVICE=cpu pytest tests/test_cuda.py` shows that these tests work."""

import copy
import os

import pytest
import torch
import torch.distributed as dist

from engine import processes
from engine.norms import SummedNorm, converted
from engine.optimizers import LARS
from engine.processes import Place
from photometric import Draw, Photometric
from slotcon import SlotCon
from staged import At, Signals, last_of, log_of, train_here

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
IS_CUDA = DEVICE == "cuda"
STEPS = 50

pytestmark = pytest.mark.skipif(
    IS_CUDA and not torch.cuda.is_available(), reason="needs a CUDA GPU"
)
only_cuda = pytest.mark.skipif(not IS_CUDA, reason="means something on a GPU only")
GIVEN = ("--device", DEVICE, "--epochs", 20, "--max-steps", STEPS, "--log-every", 1)
SLOWLY = ("--base-lr", 0.5, "--warmup", 4)  # or rounding grows to other losses


def losses_of(folder, *arguments, accident=lambda run: None):
    """Losses of a run of 50 steps, or up to where the accident stops it."""

    def both(run):
        if run.position == 0:  # fp16 shall skip no step: the next batch would have other losses
            fp16 = run.scaler.is_enabled()
            run.scaler = torch.amp.GradScaler(DEVICE, init_scale=256.0, enabled=fp16)
        accident(run)

    train_here(folder, *GIVEN, *SLOWLY, "--amp", "off", *arguments, accident=both)
    return [line["loss"] for line in log_of(folder)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The losses in float32."""
    return losses_of(tmp_path_factory.mktemp("plain") / "run")


def assert_near(found, expected, rel):
    assert len(found) == len(expected) == STEPS
    furthest = max(abs(a / b - 1) for a, b in zip(found, expected))
    assert furthest < rel, f"losses differ by {furthest:.2%}"


@pytest.mark.parametrize("arguments, rel", [
    ("", 2e-3), ("--workers 2", 2e-3), ("--amp bf16", 0.02), ("--amp fp16", 0.02),
    pytest.param("--compile", 0.01, marks=only_cuda),
])  # fmt: skip
def test_losses_are_the_same(arguments, rel, plain, tmp_path):
    assert_near(losses_of(tmp_path / "run", *arguments.split()), plain, rel)


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_run_that_is_paused_and_goes_on_has_the_same_losses(amp, tmp_path):
    whole = losses_of(tmp_path / "whole", "--amp", amp)
    pause = At(18, Signals("SIGTERM"))
    assert len(losses_of(tmp_path / "run", "--amp", amp, accident=pause)) == 19
    assert_near(losses_of(tmp_path / "run", "--amp", amp), whole, rel=0.01)
    scales = [last_of(tmp_path / name)["scaler"].get("scale") for name in ("run", "whole")]
    assert scales[0] == scales[1] and (scales[0] is None) == (amp == "off")


def three_steps(device, world_size=1, sync_norm="torch"):
    """Losses and weights of steps on fixed noise, as a process among so many makes its model."""
    torch.manual_seed(0)
    place = Place(torch.device(f"{device}:0"), 0, world_size)
    model = processes.synchronized(SlotCon("tiny", 5, 12, 7).train(), place, sync_norm)
    network = processes.wrap(model, place)
    optimizer = LARS([p for p in model.parameters() if p.requires_grad], 0.1)
    views, flipped = torch.randn(4, 2, 3, 32, 32), torch.rand(4, 2) < 0.5
    boxes = torch.tensor([[0.1, 0.2, 0.9, 0.8], [0.0, 0.3, 0.7, 1.0]]).expand(4, 2, 4)
    found = []
    for _ in range(3):
        loss, report = network(*(x.to(place.device) for x in (views, boxes, flipped)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_center(report.center_mean, 0.9)
        model.update_teacher(0.9)
        found.append(report.losses.cpu())
    return torch.stack(found), {name: value.cpu() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("sync_norm", ["torch", "ours"])
def test_a_step_through_nccl_ddp_and_synchronized_norms_is_the_plain_step(sync_norm, tmp_path):
    values, state = three_steps(DEVICE)
    group = dict(init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    dist.init_process_group("nccl" if IS_CUDA else "gloo", **group)
    others, other_state = three_steps(DEVICE, 2, sync_norm)  # or nothing is wrapped
    dist.destroy_process_group()
    torch.testing.assert_close(others, values, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(other_state, state, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype, limit", [("float32", 1e-5), ("float16", 1e-2), ("bfloat16", 5e-2)])
def test_norms_of_ours_have_the_numbers_of_a_batch_norm_and_take_no_rows(dtype, limit):
    norm, generator = torch.nn.BatchNorm2d(7), torch.Generator().manual_seed(0)
    maps = (2 * torch.randn(6, 7, 5, 4, generator=generator) + 3).to(getattr(torch, dtype))
    gradient, found = torch.randn(maps.shape, generator=generator), []
    ours = converted(copy.deepcopy(norm), SummedNorm).to(DEVICE)
    for each, device in ((norm, "cpu"), (ours, DEVICE)):
        given = maps.to(device, memory_format=torch.channels_last).detach().requires_grad_()
        out = each(given if device == DEVICE else given.float())
        out.backward(gradient.to(device, out.dtype))
        found.append([x.float().cpu() for x in (out, given.grad, *each.state_dict().values())])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=limit, atol=limit)
    none = maps[:0].to(DEVICE).requires_grad_()
    each(none).sum().backward()
    assert none.grad.shape == none.shape


@only_cuda
def test_a_step_has_the_numbers_of_the_cpu_and_so_have_the_colors():
    torch.testing.assert_close(three_steps("cuda")[0], three_steps("cpu")[0], rtol=0.01, atol=0.01)
    change, generator = Photometric(), torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 2, 3, 64, 64), dtype=torch.uint8, generator=generator)
    draw = change.draw(5, generator)
    changed = change.apply(images.cuda(), Draw(*(t.cuda() for t in draw)))
    torch.testing.assert_close(changed.cpu(), change.apply(images, draw), rtol=0, atol=1e-4)
