"""Steps on a GPU that is not there: fake tensors have a device, a type, strides, and no numbers."""

import dataclasses
import functools
import os
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import photometric
import train
import transfer
from backbone import build_backbone
from data import Batch
from downstream import settings
from downstream.backbones import groups_of
from downstream.segmentation import Segmenter
from engine import processes
from engine.norms import SummedNorm, converted
from engine.optimizers import make_optimizer, schedule_for
from engine.options import chosen_for
from engine.processes import Place
from engine.run import Options, Run
from measures import groups
from recipes import PRESETS
from slotcon import SlotCon

TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TESTS)
CUDA = torch.device("cuda", 0)
HALF = (torch.float16, torch.bfloat16)
FLOAT32 = torch.float32


def place_in_code():
    """file.function of the innermost call in our code, without the tests."""
    frame = sys._getframe(2)
    while frame:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith(ROOT) and not file.startswith(TESTS) and name[0] != "<":
            return f"{os.path.basename(file)[:-3]}.{name}"
        frame = frame.f_back
    return "tests"


class Gpu(TorchDispatchMode):
    """Notes what a step does on a fake GPU; the host reads 0.0 where it asks for a number, or 3."""

    def __init__(self):
        super().__init__()
        self.waits, self.sent, self.half = Counter(), Counter(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        if name == "_local_scalar_dense":
            return self.read(args[0])
        if name == "_fused_sgd_":
            return as_fused_sgd_demands(*args[:3])
        if name == "native_batch_norm_backward":  # its kernel asserts that both are defined
            assert all(isinstance(saved, torch.Tensor) for saved in args[5:7])
        if name == "bincount":
            return args[0].new_zeros(args[2])
        if name == "nonzero" or (name == "index" and is_mask(args[1])):
            self.wait(args[0])
            return args[0].new_empty(2, *args[0].shape[1:])
        if name.startswith("c10d"):
            self.sent[name.removeprefix("c10d::").strip("_")] += 1
        out = func(*args, **kwargs)
        if name in ("_to_copy", "copy_", "to") and not kwargs.get("non_blocking"):
            source = args[name == "copy_"]
            if source.device != out.device:
                self.wait(source if out.device.type == "cpu" else out)
        if isinstance(out, torch.Tensor) and out.dtype in HALF and name != "detach":
            self.half.add(place_in_code())
        return out

    def wait(self, x):
        """The host waits until x is there."""
        if x.device.type == "cuda":
            self.waits[place_in_code()] += 1

    def read(self, x):
        """x.item()"""
        self.wait(x)
        if x.device.type == "cpu" and x.dtype != torch.bool:
            return 1.0  # the optimizer counts its steps there
        return False if x.dtype == torch.bool else 0.0 if x.is_floating_point() else 3

    def tolist(self, x):
        """One wait for all of them."""
        self.wait(x)
        return np.full(x.shape, 0.0 if x.is_floating_point() else 3).tolist()


def is_mask(indices):
    return any(index is not None and index.dtype == torch.bool for index in indices)


def as_fused_sgd_demands(weights, gradients, velocities):
    """As the kernel for CUDA asks of its three lists."""
    for group in zip(weights, gradients, velocities or weights):
        assert {(t.device, t.dtype) for t in group} == {(CUDA, FLOAT32)}
        strides = {tuple(s for s, n in zip(t.stride(), t.shape) if n > 1) for t in group}
        assert len(strides) == 1, f"{group[0].shape} lie in memory as {strides}"


@torch.no_grad()
def backward(loss):
    """loss.backward(), which asks the driver for a device: the same nodes in the same order."""
    found, waiting, ready = {loss.grad_fn: [torch.ones_like(loss)]}, Counter(), [loss.grad_fn]
    known = [loss.grad_fn]
    for node in known:
        followers = {follower for follower, _ in node.next_functions if follower}
        waiting.update(follower for follower, _ in node.next_functions)
        known += [follower for follower in followers if follower not in known]
    while ready:
        node = ready.pop()
        python = isinstance(node, torch.autograd.function.BackwardCFunction)
        gradients = (node.apply if python else node)(*found.pop(node))
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        for (follower, i), gradient in zip(node.next_functions, gradients):
            if follower is None:
                continue
            inputs = follower._input_metadata
            sums = found.setdefault(follower, [None] * len(inputs))
            if gradient is not None:
                gradient = gradient.to(inputs[i].dtype).sum_to_size(tuple(inputs[i].shape))
                sums[i] = gradient if sums[i] is None else sums[i] + gradient
            waiting[follower] -= 1
            ready += [follower] * (not waiting[follower])


class Generator(torch.Generator):
    """Random numbers on a GPU."""

    device = CUDA

    def __new__(cls, device=None):
        return super().__new__(cls, "cpu")


@contextmanager
def fake_gpu(world_size=1):
    """A process on a GPU, one of several that all do the same."""
    gpu, constant = Gpu(), vars(photometric)["_constant"]
    with ExitStack() as stack:
        for change in (
            patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            patch("torch.cuda.is_bf16_supported", lambda *_: True),
            patch("torch.cuda.max_memory_allocated", lambda _: 0),
            patch("torch.Generator", Generator),
            patch("torch.Tensor.backward", backward),
            patch.object(FakeTensor, "tolist", lambda x: gpu.tolist(x)),
            # Or the fake constants would stay
            patch("photometric._constant", functools.lru_cache(constant.__wrapped__)),
            patch("engine.run.gather_objects", lambda own: [own] * world_size),
            patch("engine.processes.wrap", lambda model, place: model),
        ):
            stack.enter_context(change)
        if world_size > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
            stack.callback(dist.destroy_process_group)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(gpu)
        yield gpu


def configured(preset, **options):
    """A preset with narrow heads and small views, and a ResNet-18 for a ResNet-50."""
    c = dataclasses.replace(PRESETS[preset], dim_hidden=24, batch_size=4, image_size=64, workers=0)
    return dataclasses.replace(c, arch=c.arch.replace("50", "18"), **options)


def make_run(c, place, model, optimizer, samples, steps, names, collate=None):
    options = Options("", 4, steps, accumulate=c.accumulate, workers=0, log_every=1000)
    more = dict(collate=collate) if collate else {}
    given = place, model, optimizer, samples, lambda sample, rng: sample, {}
    return Run(options, *given, names=names, **more)


def steps_of(c, dtype=None, steps=1, world_size=1):
    """Steps of train.py on the fake GPU -> what was noted, the reports, the model."""
    model, place, reports = SlotCon(**chosen_for(SlotCon, c)).train(), None, []
    with fake_gpu(world_size) as gpu, pytest.warns(UserWarning, match="pin_memory"):
        place = Place(CUDA, 0, world_size, dtype)
        model = processes.synchronized(model, place, "ours")
        model.register_forward_hook(lambda *given: reports.append(given[2][1]))
        boxes, flipped = torch.tensor([[0.0, 0, 1, 1]] * 2), torch.tensor([True, False])
        views = torch.zeros(2, 3, c.image_size, c.image_size, dtype=torch.uint8)
        schedule = schedule_for(num_images=8, **chosen_for(schedule_for, c))
        optimizer = make_optimizer(c.optimizer, model.parameters(), 0.1, c.weight_decay)
        names = ("loss", "group_loss", "slot_loss")
        samples = [Batch(views, boxes, flipped)] * 8
        gpu.waits.clear()
        with make_run(c, place, model, optimizer, samples, steps, names) as run:
            train.train(c, run, model, schedule)
        assert run.steps == steps
    return gpu, reports, model


PRECISIONS = {None: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# In half precision, and only under mixed precision: networks, and what follows them backwards
IN_HALF = {
    "grouping.embed", "backbone.forward", "slots.forward", "slotcon.image_term", "run.backward"
}  # fmt: skip
# Of one step: numbers of queries and keys; whether all is well
STEP = Counter({"losses.pair_slots": 1, "run.agree": 1})
LOGGED = Counter({"learning.statistics": 5})
LAW = Counter({"learning.add": 4})  # in the first 256 images of a run
OPTIONS = (
    dict(slot_loss="reg", optimizer="lars"),
    dict(align="proj", image_loss=True, accumulate=2),
    dict(group_weight=1.0, jitter=(0.4, 0.4, 0.2, 0.1, 0.8), p_gray=0.2, p_blur=(1.0, 0.1)),
    dict(jitter=(0.0,) * 5, p_gray=0.0, solarize=(0.0, 0.0, 128.0), geometric=False),
)
CASES = [
    *(("toy", {}, dtype) for dtype in PRECISIONS),
    ("coco-r50", {}, torch.bfloat16),
    ("photos", {}, torch.bfloat16),
    *(("toy", options, torch.bfloat16) for options in OPTIONS),
]
NAMES = [f"{preset} {PRECISIONS[dtype]} {options}" for preset, options, dtype in CASES]


@pytest.mark.parametrize("preset, options, dtype", CASES, ids=NAMES)
def test_a_step_stays_on_the_device_and_waits_and_halves_where_it_says(preset, options, dtype):
    c = configured(preset, **options)
    gpu, reports, model = steps_of(c, dtype)
    expected = STEP + LOGGED + LAW
    expected["losses.pair_slots"] = c.accumulate * (c.group_weight < 1)
    del gpu.waits["photometric._constant"]  # copied once
    assert +gpu.waits == +expected
    for view in (*reports[-1].student, *reports[-1].teacher):
        numbers = [view.similarity, view.aligned, *([] if view.slots is None else [view.slots])]
        assert {(x.dtype, x.device) for x in numbers} == {(FLOAT32, CUDA)}
    assert {x.dtype for x in reports[-1][:3]} == {FLOAT32} and len(reports) == c.accumulate
    assert gpu.half <= IN_HALF and bool(gpu.half) == (dtype is not None)
    assert {x.device for x in model.state_dict().values()} == {CUDA}


def test_later_steps_copy_no_constants_and_wait_no_more():
    gpu, *_ = steps_of(configured("toy"), steps=3)
    first, last = LAW + LAW + LAW, LOGGED + LOGGED  # the first and the last are logged
    constants = gpu.waits.pop("photometric._constant")
    assert gpu.waits == first + last + STEP + STEP + STEP and constants == 6


def test_a_batch_norm_of_ours_costs_one_sum_over_ranks_each_way_and_no_wait():
    gpu, _, model = steps_of(configured("toy"), torch.bfloat16, world_size=4)
    student, teacher, predictor = (
        2 * sum(isinstance(module, _BatchNorm) for module in network.modules())
        for network in (model.student, model.teacher, model.predictor)
    )
    assert (student, teacher, predictor) == (12, 12, 4)
    # Overlapping images, center and agreement; of the log; numbers and keys of both directions
    sums, gathers = 4 + 3 + 2 * student + teacher + 2 * predictor, 3
    assert gpu.sent == dict(allreduce=sums, allgather=gathers)
    assert gpu.waits.keys() <= {*STEP, *LOGGED, *LAW, "photometric._constant"}


@pytest.mark.slow  # the compiler's first use
def test_a_compiled_network_with_norms_of_ours_is_one_graph():
    torch._dynamo.reset()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        backbone = converted(build_backbone("tiny").train(), SummedNorm)
        found = torch._dynamo.explain(backbone)(torch.rand(2, 3, 32, 32))
    finally:
        dist.destroy_process_group()
        torch._dynamo.reset()
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def test_an_evaluation_stays_on_the_device_until_its_result_is_read():
    network = SlotCon("tiny", 5, 12, 7).teacher.eval()
    with fake_gpu() as gpu:
        network = network.to(CUDA)
        gpu.waits.clear()
        segments, owned = groups.segment(network, torch.zeros(2, 3, 48, 40, dtype=torch.uint8))
    assert segments.shape == (2, 48, 40) and owned.shape == (2, 5)
    assert {segments.device.type, owned.device.type} == {"cpu"}
    assert gpu.waits == {"groups.segment": 3, "photometric._constant": 2}  # there, twice back


class Scenes(list):
    class_names = ("a", "b", "c")


@pytest.mark.parametrize("dtype", PRECISIONS, ids=PRECISIONS.get)
def test_fine_tuning_for_segmentation_stays_on_the_device_and_waits_once_a_step(dtype):
    small = dict(base_steps=1, workers=0, head_width=8, frame=(0, 0))
    c = dataclasses.replace(settings.PRESETS["segmentation"]["ade20k"], **small)
    model = Segmenter(build_backbone("resnet18"), 3, c)
    with fake_gpu() as gpu, pytest.warns(UserWarning, match="pin_memory"):
        place = Place(CUDA, 0, 1, dtype)
        model = processes.synchronized(model, place).train()
        optimizer = torch.optim.SGD(groups_of(model, c), 0.1, 0.9)
        image = torch.zeros(3, 64, 64, dtype=torch.uint8)
        scenes = Scenes([(image, torch.zeros(64, 64, dtype=torch.long))] * 4)
        gpu.waits.clear()
        with make_run(c, place, model, optimizer, scenes, 1, model.losses) as run:
            transfer.train(c, run, scenes[:1] and Scenes(scenes[:1]))
    del gpu.waits["photometric._constant"]
    assert gpu.waits == {"run.agree": 1, "segmentation.scores": 4}  # of the test at the end
    assert bool(gpu.half) == (dtype is not None)
