"""Backbones of timm by name: whatever gives a map learns, resumes, can be frozen and read again."""

import copy

import pytest
import torch

import export
from backbone import build_backbone
from downstream.backbones import open_pretrained
from downstream.settings import Segmentation
from engine import processes
from measures.networks import open_backbone, open_network
from photometric import IMAGENET_MEAN, IMAGENET_STD
from slotcon import SlotCon
from staged import difference, last_of, train_here

timm = pytest.importorskip("timm")
SMALLEST = "test_vit", "test_convnext", "test_resnet"  # timm's own, for tests
SIZES = ("--image-size", "64", "--log-every", "1")


@pytest.mark.parametrize("name", SMALLEST)
def test_a_backbone_of_timm_says_its_channels_and_stride_and_every_weight_learns(name):
    backbone = build_backbone(f"timm:{name}")
    maps = backbone(torch.randn(2, 3, 96, 64))
    stride = backbone.stride
    assert maps.shape == (2, backbone.out_channels, 96 // stride, 64 // stride)
    maps.square().sum().backward()
    learning = [p for p in backbone.parameters() if p.requires_grad]
    assert learning and all(p.grad is not None for p in learning)


def test_a_name_or_a_size_that_timm_does_not_take_is_one_line():
    with pytest.raises(ValueError, match="timm could not make test_vitt: Unknown model"):
        build_backbone("timm:test_vitt")
    with pytest.raises(ValueError, match="does not take views of 50 x 64 px"):
        build_backbone("timm:test_vit")(torch.zeros(1, 3, 50, 64))


def test_views_are_normalized_as_the_network_of_timm_expects_it():
    ours, plain = build_backbone("timm:test_vit"), build_backbone("timm:test_vit")
    plain.load_state_dict(ours.state_dict())
    ours.pretrained_cfg = {**ours.pretrained_cfg, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    plain.pretrained_cfg = {**ours.pretrained_cfg, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    pixels = torch.rand(2, 3, 64, 64)
    column = lambda values: torch.tensor(values)[:, None, None]
    usual = (pixels - column(IMAGENET_MEAN)) / column(IMAGENET_STD)
    assert torch.allclose(ours(usual), plain((pixels - 0.5) / 0.25), atol=1e-5)
    assert not torch.allclose(ours(usual), plain(usual), atol=1e-2)


@pytest.mark.parametrize("sync_norm", ["torch", "ours"])
def test_norms_of_timm_that_hold_an_activation_keep_it_on_several_gpus(sync_norm, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to", lambda model, *_, **__: model)  # here is no GPU
    plain = SlotCon("timm:test_efficientnet", 5, 12, 7, freeze_backbone=True).eval()
    place = processes.Place(torch.device("cuda"), world_size=2)
    found = processes.synchronized(copy.deepcopy(plain), place, sync_norm)
    assert not any(type(module).__name__ == "BatchNormAct2d" for module in found.modules())
    images = torch.randn(2, 3, 64, 64)
    assert all(map(torch.equal, found.teacher(images), plain.teacher(images)))


@pytest.mark.parametrize("name", SMALLEST)
def test_a_run_on_timm_resumes_to_the_same_bits_and_loads_back_strictly(name, tmp_path):
    for folder, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        more = ("--arch", f"timm:{name}", *SIZES, "--max-steps", steps)
        train_here(tmp_path / folder, *more)
    whole, parts = (last_of(tmp_path / folder)["model"] for folder in ("whole", "parts"))
    assert not difference(whole, parts)
    network, config = open_network(tmp_path / "whole", "teacher")
    assert config["arch"] == f"timm:{name}"
    assert network(torch.randn(1, 3, 64, 64))[1].isfinite().all()
    learned = network.backbone.state_dict()
    for file in (str(tmp_path / "f.safetensors"), str(tmp_path / "f.pth")):
        assert export.main([str(tmp_path / "whole"), "--output", file]) == 0
        model = timm.create_model(name, num_classes=0, checkpoint_path=file)  # strictly
        assert all(torch.equal(value, learned[key]) for key, value in model.state_dict().items())
    c = Segmentation(backbone=file, arch=f"timm:{name}")
    again, c, _ = open_pretrained(c, {"arch"})
    assert c.arch == f"timm:{name}" and not difference(again.state_dict(), learned)
    with pytest.raises(ValueError, match="of its run names a network of timm"):
        open_backbone(file)


@pytest.mark.parametrize("name", SMALLEST)
def test_a_run_starts_from_a_file_of_timm_and_a_frozen_backbone_stays_bit_for_bit(name, tmp_path):
    ending = "pth" if name == "test_vit" else "safetensors"
    weights, file = timm.create_model(name).state_dict(), tmp_path / f"weights.{ending}"
    save = torch.save if ending == "pth" else pytest.importorskip("safetensors.torch").save_file
    save(weights, file)
    more = ("--arch", f"timm:{name}", *SIZES, "--init", file, "--freeze-backbone")
    text = train_here(tmp_path / "run", *more, "--max-steps", "2")
    assert f"timm:{name}, frozen, 5 prototypes" in text
    found = last_of(tmp_path / "run")["model"]
    own = [key for key in weights if f"student.backbone.{key}" in found]
    assert len(own) >= len(weights) - 2  # the classifier is not there
    assert all(torch.equal(found[f"teacher.backbone.{key}"], weights[key]) for key in own)


def test_a_frozen_backbone_is_computed_once_per_view():
    model = SlotCon("timm:test_resnet", 5, 12, 7, freeze_backbone=True).train()
    seen = []
    model.student.backbone.register_forward_hook(lambda *_: seen.append(1))
    boxes = torch.tensor([0.0, 0, 1, 1]).expand(3, 2, 4)
    loss, _ = model(torch.randn(3, 2, 3, 64, 64), boxes, torch.zeros(3, 2, dtype=torch.bool))
    loss.backward()
    assert len(seen) == 2 and model.teacher.backbone is model.student.backbone
    assert model.student.projector.mlp[0].weight.grad.any()
