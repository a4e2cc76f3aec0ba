"""Exported backbones load elsewhere and give the same features there. export.py."""

import argparse
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import export
from backbone import RESNETS, build_backbone
from downstream import exported
from engine.program import run_program


def trained(arch, seed):
    """A backbone in which no norm is the identity or zero: every tensor shows in the features."""
    torch.manual_seed(seed)
    backbone = build_backbone(arch)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 1)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return backbone.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same teacher and student in every kind of file that a backbone may come in."""
    folder = tmp_path_factory.mktemp("kinds")
    teacher, student = (trained("resnet18", seed).state_dict() for seed in (1, 2))
    ours = {f"teacher.backbone.{k}": v for k, v in teacher.items()}
    ours |= {f"student.backbone.{k}": v for k, v in student.items()}
    released = {f"module.encoder_k.{k}": v for k, v in teacher.items()}
    released |= {f"module.encoder_q.{k}": v for k, v in student.items()}
    released["module.grouping_q.slot_embed.weight"] = torch.zeros(5, 3)
    for name, contents in {
        "last": dict(config=dict(arch="resnet18"), step=3, model=ours),
        "released": dict(args=argparse.Namespace(arch="resnet18"), model=released),
        "backbone": teacher,
        "classifier": teacher | {"fc.weight": torch.zeros(9, 4), "fc.bias": torch.zeros(9)},
    }.items():
        torch.save(contents, folder / f"{name}.pth")
    return folder, dict(teacher=teacher, student=student)


def run(*arguments):
    return run_program("export.py", export.main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("kind, network", [
    ("last.pth", "teacher"), ("last.pth", "student"), (".", "teacher"), ("released.pth", "student"),
    ("backbone.pth", "teacher"), ("classifier.pth", "teacher"),
])  # fmt: skip
def test_the_network_that_is_asked_for_is_found_in_every_kind_of_file(
    kind, network, files, tmp_path, capsys
):
    folder, states = files
    assert run(folder / kind, "--network", network, "--output", tmp_path / "new" / "out.pth") == 0
    found = torch.load(tmp_path / "new" / "out.pth")
    assert found.keys() == states[network].keys()
    assert all(torch.equal(found[k], v) for k, v in states[network].items())
    said = capsys.readouterr().out
    assert "features (1, 512, 4, 5) of a random image are identical" in said
    assert f"resnet18, 120 tensors of the {network}" in said


def test_resnet50_goes_into_torchvisions_networks(tmp_path):
    ours = trained("resnet50", 1)
    torch.save(ours.state_dict(), tmp_path / "backbone.pth")
    assert run(tmp_path / "backbone.pth", "--output", tmp_path / "out.pth") == 0
    state, network = torch.load(tmp_path / "out.pth"), torchvision.models.resnet50()
    keys = network.load_state_dict(state, strict=False)
    assert keys.missing_keys == ["fc.weight", "fc.bias"] and not keys.unexpected_keys
    image = torch.rand(1, 3, 65, 70)
    features = F.adaptive_avg_pool2d(ours(image), 1).flatten(1)
    torch.testing.assert_close(network.eval().fc(features), network(image))
    with torch.device("meta"):
        none = dict(weights=None, weights_backbone=None)
        fcn = torchvision.models.segmentation.fcn_resnet50(**none)
        detector = torchvision.models.detection.maskrcnn_resnet50_fpn(**none)
    fcn.backbone.load_state_dict(state, strict=True, assign=True)
    body = detector.backbone.body
    body.load_state_dict(state, strict=True, assign=True)
    assert torch.equal(body.eval()(image)["3"], ours(image))


class Conv(nn.Conv2d):
    """As detectron2 names things: a convolution that holds its norm."""

    def __init__(self, inside, outside, kernel, stride=1):
        super().__init__(inside, outside, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outside)

    def forward(self, x):
        return self.norm(super().forward(x))


class Block(nn.Module):
    """Kernels 3, 3, or a bottleneck 1, 3, 1; the stride is the 3x3's: STRIDE_IN_1X1 False."""

    def __init__(self, widths, kernels, stride):
        super().__init__()
        self.count = len(kernels)
        for i, kernel in enumerate(kernels):
            step = stride if i == kernels.index(3) else 1
            self.add_module(f"conv{i + 1}", Conv(widths[i], widths[i + 1], kernel, step))
        if widths[0] != widths[-1] or stride > 1:
            self.shortcut = Conv(widths[0], widths[-1], 1, stride)

    def forward(self, x):
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, f"conv{i}")(y)
            y = F.relu(y) if i < self.count else y
        return F.relu(y + (self.shortcut(x) if hasattr(self, "shortcut") else x))


def detectron2_resnet(arch):
    """detectron2's modeling/backbone/resnet.py up to res5, written from its documentation."""
    kind, counts = RESNETS[arch]
    stem = nn.Module()
    stem.conv1, inside, stages = Conv(3, 64, 7, 2), 64, []
    for stage, count in enumerate(counts):
        width, blocks = 64 * 2**stage, []
        for i in range(count):
            out, deep = width * kind.expansion, kind.expansion == 4
            widths = (inside, width, width, out) if deep else (inside, width, out)
            blocks.append(Block(widths, (1, 3, 1) if deep else (3, 3), 1 + (stage > 0 and i == 0)))
            inside = out
        stages.append((f"res{stage + 2}", nn.Sequential(*blocks)))
    network = nn.Module()
    network.stem = stem
    for name, stage in stages:
        network.add_module(name, stage)
    return network.eval()


@pytest.mark.parametrize("arch, suffix", [("resnet50", "pkl"), ("resnet18", "pth")])
def test_detectron2_gets_its_own_names_and_the_same_features(arch, suffix, tmp_path, capsys):
    ours, file = trained(arch, 1), tmp_path / f"out.{suffix}"
    torch.save(ours.state_dict(), tmp_path / "backbone.pth")
    assert run(tmp_path / "backbone.pth", "--format", "detectron2", "--output", file) == 0
    said = capsys.readouterr().out
    assert 'INPUT.FORMAT "RGB"' in said and "are identical" in said
    contents = pickle.loads(file.read_bytes()) if suffix == "pkl" else torch.load(file)
    assert contents["matching_heuristics"] is True and contents["__author__"] == "SlotCon"
    network = detectron2_resnet(arch)
    network.load_state_dict({k: torch.as_tensor(v) for k, v in contents["model"].items()})
    image = torch.rand(1, 3, 65, 70)
    x = F.max_pool2d(F.relu(network.stem.conv1(image)), 3, 2, 1)
    for name in ("res2", "res3", "res4", "res5"):
        x = getattr(network, name)(x)
    assert torch.equal(x, ours(image))


def test_a_file_that_gives_other_features_or_that_cannot_be_read_is_removed(
    files, tmp_path, monkeypatch, capsys
):
    write, other = exported.write, trained("resnet18", 3).state_dict()
    argument = files[0] / "last.pth", "--output", tmp_path / "out.pth"
    monkeypatch.setattr(exported, "write", lambda state, *more: write(other, *more))
    assert run(*argument) == 1
    assert "gave other features than the checkpoint, and was removed" in capsys.readouterr().err
    monkeypatch.setattr(exported, "write", lambda state, *more: write({"x": other["fc"]}, *more))
    with pytest.raises(KeyError):
        run(*argument)
    monkeypatch.setattr(exported, "write", lambda state, form, file: file.write_bytes(b"no file"))
    with pytest.raises(Exception, match=r"invalid|Weights only"):
        run(*argument)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_refused_before_anything_is_written(files, tmp_path, capsys):
    torch.save(build_backbone("tiny").state_dict(), tmp_path / "tiny.pth")
    source, out = files[0] / "last.pth", tmp_path / "out.pth"
    (tmp_path / "folder.pth").mkdir()
    for arguments, complaint in (
        ([tmp_path / "tiny.pth", "--output", out], "the backbone tiny, which no other library has"),
        ([source, "--output", tmp_path / "new" / "out.pkl"], "*.pkl is for --format detectron2"),
        ([source], "--output"),
        ([tmp_path / "absent.pth", "--output", out], "there is no checkpoint"),
        ([source, "--output", tmp_path / "folder.pth"], "give another place by --output"),
        ([source, "--output", tmp_path / "tiny.pth" / "x.pth"], "cannot write"),
    ):
        assert run(*arguments) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("export.py: ") and complaint in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.pth", "tiny.pth"]


@pytest.mark.parametrize("source", ["last.pth", ""])
@pytest.mark.parametrize("output", ["last.pth", "sub/../last.pth", "link.pth", "hard.pth"])
def test_the_checkpoint_itself_is_never_the_output(source, output, files, tmp_path, capsys):
    last, contents = tmp_path / "last.pth", (files[0] / "last.pth").read_bytes()
    last.write_bytes(contents)
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.pth").symlink_to(last)
    (tmp_path / "hard.pth").hardlink_to(last)
    assert run(tmp_path / source, "--output", tmp_path / output) == 2
    assert "is the checkpoint itself" in capsys.readouterr().err
    assert last.read_bytes() == contents and (tmp_path / "link.pth").is_symlink()


def test_the_last_checkpoint_of_a_run_is_never_the_output(files, tmp_path, capsys):
    last = tmp_path / "last.pth"
    last.write_bytes(b"the state of a training")
    assert run(files[0] / "last.pth", "--output", last) == 2
    assert "is the last.pth of a run" in capsys.readouterr().err
    assert last.read_bytes() == b"the state of a training"
