"""engine/checkpoints.py: one reader for every file, without trust; one way back into a run."""

import argparse
import copy
import io
import pickle
import shutil
import zipfile

import pytest
import torch
from torch import nn

from engine import checkpoints
from engine.optimizers import make_optimizer
from slotcon import SlotCon
from staged import difference
from trained import released_name

K, D, HIDDEN = 5, 7, 9


def slotcon(seed=3):
    """A model whose student and teacher differ."""
    torch.manual_seed(seed)
    model = SlotCon("tiny", K, HIDDEN, D)
    for i, p in enumerate(model.parameters()):
        p.data += 0.01 * (i + 1)
    model.center.copy_(torch.arange(K))
    return model


MODEL = slotcon()
OURS = MODEL.state_dict()
TEACHER, STUDENT = (getattr(MODEL, which).state_dict() for which in ("teacher", "student"))
TINY, FEW = MODEL.teacher.backbone.state_dict(), MODEL.student.backbone.state_dict()


def named(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def released(state, prefix=""):
    """What the released code saves of this model."""
    named = {prefix + released_name(key): value for key, value in state.items()}
    return {**named, f"{prefix}center": state["center"][None]}


class Runs:
    """Unpickled without care, it writes a file."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return shutil.copyfile, (__file__, self.witness)


def file_with(contents, folder):
    path = folder / "file.pth"
    path.write_bytes(contents) if isinstance(contents, bytes) else torch.save(contents, path)
    return path


RELEASED = argparse.Namespace(arch="resnet50", epochs=800)
NETWORKS = {
    "ours": dict(model=OURS, config=dict(arch="tiny", epochs=800), step=7),
    "ours of many processes": dict(model=named("module.", OURS), config=dict(epochs=800)),
    "only its tensors": OURS,
    "released": dict(args=RELEASED, model=released(OURS, "module.")),
    "released, without a wrapper": released(OURS),
}
FC = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.ones(2)}
HEADED = {**TINY, **FC}
MOCO = named("module.encoder_q.", HEADED) | named("module.encoder_k.", FEW)
MOCO_V3 = named("module.momentum_encoder.", HEADED) | named("module.base_encoder.", FEW)
DINO = named("module.backbone.", TINY) | named("module.head.", FC)
BACKBONES = {  # kind of file -> its contents, and what stands before the names that are used
    "backbone.pth": (TINY, ""),
    "torchvision": (HEADED, ""),
    "DataParallel": (named("module.", HEADED), ""),
    "compiled": (named("_orig_mod.", TINY), ""),
    "MoCo": (dict(state_dict=MOCO), "encoder_q."),
    "MoCo v3": (dict(state_dict=MOCO_V3), "momentum_encoder."),
    "DenseCL": (dict(meta=dict(epoch=200), state_dict=named("backbone.", TINY)), "backbone."),
    "DINO": (dict(student=named("module.backbone.", FEW), teacher=DINO), "backbone."),
    "PixPro": (dict(model=named("module.encoder.", TINY)), "encoder."),
    "SwAV": (named("module.", {**TINY, "projection_head.weight": torch.ones(2)}), ""),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_whole_network_comes_in_under_our_names(kind, tmp_path):
    found = checkpoints.read(file_with(NETWORKS[kind], tmp_path))
    assert found.holds_network and not difference(found.state, dict(OURS))
    for which, state in (("teacher", TEACHER), ("student", STUDENT)):
        assert not difference(found.network(which), dict(state))
        assert not difference(found.backbone(which), checkpoints.part(state, "backbone."))
    assert found.network() == found.network("teacher")
    assert found.config.get("epochs") == (800 if "model" in NETWORKS[kind] else None)


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_backbone_comes_in_under_torchvisions_names_without_its_head(kind, tmp_path):
    contents, used = BACKBONES[kind]
    found = checkpoints.read(file_with(contents, tmp_path))
    assert not difference(found.backbone(), dict(TINY)) and not found.holds_network
    assert found.source() == str(found.path) + (f" ({used}*)" if used else "")
    for refused in (found.network, lambda: found.backbone("student")):
        with pytest.raises(ValueError) as error:
            refused()
        assert str(found.path) in str(error.value) and "\n" not in str(error.value)


def zip_of(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, "1")
    return buffer.getvalue()


NO = " is no checkpoint, or damaged: "
SPOILED = [{**OURS, "center": torch.full((K,), float(word))} for word in ("nan", "inf")]
BROKEN = {  # what is said -> of which files
    NO: (b"", b"\x80\x02}q\x00"),
    f"{NO}a web page": (b"\n<!DOCTYPE html><title>Drive - Virus scan",),
    f"{NO}a pointer of git-lfs": (b"version https://git-lfs.github.com\n",),
    f"{NO}a pickle, as *.pkl of": (pickle.dumps(dict(model=[1.5] * 9)),),
    f"{NO}a zip of other files": (zip_of("readme.txt"),),
    f"{NO}TorchScript": (zip_of("a/constants.pkl", "a/version"),),
    f"{NO}a part is missing": (b"PK\x03\x04 and", zip_of("a/data.pkl")[:-8]),
    f"{NO}its first bytes are": (b"\x9d" * 50, b"hello\nworld, this is text\n"),
    " holds a list, not a checkpoint's dictionary": ([1, 2],),
    " holds no backbone: found nothing": ({},),
    " holds no backbone: found epoch, loss": (dict(epoch=3, loss=1.0),),
    " holds no backbone: found head.weight": (dict(epoch=3, model={"head.weight": torch.ones(1)}),),
    " holds no backbone: found model": (dict(model="gone"),),
    ": center has numbers that are not finite": [dict(model=state) for state in SPOILED],
}


@pytest.mark.parametrize(
    "line, contents", [(line, one) for line, many in BROKEN.items() for one in many]
)
def test_a_file_that_holds_no_network_is_one_line(line, contents, tmp_path):
    path = file_with(contents, tmp_path)
    with pytest.raises(ValueError) as error:
        checkpoints.read(path).backbone()
    assert str(error.value).startswith(f"{path}{line}") and "\n" not in str(error.value)


@pytest.mark.parametrize("new", [True, False])
def test_code_in_a_file_is_refused_by_name_and_does_not_run(new, tmp_path):
    witness, path = tmp_path / "it_ran", tmp_path / "evil.pth"
    torch.save(dict(model=OURS, more=Runs(witness)), path, _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match=r"it asks to run shutil.copyfile, which .* nothing was"):
        checkpoints.read(path)
    assert not witness.exists()
    torch.load(path, weights_only=False)
    assert witness.exists()  # so the payload is a real one


def without(state, *names):
    return {key: value for key, value in state.items() if key not in names}


def test_files_of_old_torch_without_counts_of_batches_are_loaded():
    network, counts = slotcon(4).teacher, [key for key in TEACHER if key.endswith("tracked")]
    checkpoints.load_strictly(network, without(TEACHER, *counts), "a.pth")
    assert counts
    assert not difference(without(network.state_dict(), *counts), without(TEACHER, *counts))


@pytest.mark.parametrize("name", ["backbone.pth", "ours", "released", "other prototypes"])
def test_a_run_starts_from_a_backbone_or_from_all_that_fits(name, tmp_path):
    more = {**OURS, "teacher.prototypes.weight": torch.ones(K + 1, D)}
    files = {**NETWORKS, "backbone.pth": TINY, "other prototypes": more}
    path = file_with(files[name], tmp_path)
    model = slotcon(4)
    drawn = {key: value.clone() for key, value in model.state_dict().items()}
    line, used = checkpoints.start_from(model, str(path)), dict(OURS)
    if name == "backbone.pth":
        used = {**named("student.backbone.", TINY), **named("teacher.backbone.", TINY)}
    if name == "other prototypes":
        used = without(OURS, "teacher.prototypes.weight")
    assert line.startswith(f"{path}: {len(used)} of {len(OURS)} tensors used")
    assert not difference(dict(model.state_dict()), {**drawn, **used})


SMALL = dict(model=SlotCon("small", 5, 12, 6).state_dict(), config=dict(arch="small"))
UNFIT = {  # what --init says -> of which file
    "does not hold this backbone: .*; give --arch small$": SMALL,
    "does not hold this backbone: .*; give the file's --arch$": SMALL["model"],
    "holds no backbone: found ": FC,
}


@pytest.mark.parametrize("line", UNFIT)
def test_a_run_does_not_start_from_another_backbone(line, tmp_path):
    path = file_with(UNFIT[line], tmp_path)
    with pytest.raises(ValueError, match=f"{path} {line}"):
        checkpoints.start_from(slotcon(4), str(path))


def trained(memory_format, name):
    """A layer after two steps of its optimizer."""
    torch.manual_seed(1)
    module = nn.Conv2d(3, 2, 5).to(memory_format=memory_format)
    optimizer = make_optimizer(name, module.parameters(), 0.1, 0.01)
    for step in range(2):
        move(module, optimizer, step)
    return module, optimizer


def move(module, optimizer, seed):
    for p in module.parameters():
        gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        p.grad = torch.empty_like(p).copy_(gradient)
    optimizer.step()


@pytest.mark.parametrize("name", ["lars", "adamw"])
@pytest.mark.parametrize("first", [True, False])
def test_an_optimizer_goes_on_whatever_the_memory_format_was_and_is(name, first, tmp_path):
    formats = (torch.contiguous_format, torch.channels_last)[:: 1 if first else -1]
    (module, optimizer), (other, _) = (trained(form, name) for form in formats)
    again = make_optimizer(name, other.parameters(), 0.1, 0.01)
    checkpoints.restore_optimizer(again, copy.deepcopy(optimizer.state_dict()), tmp_path)
    for step in (2, 3):
        move(module, optimizer, step)
        move(other, again, step)
    for p, q in zip(module.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_file_holds_tensors_of_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor + 1)
    checkpoints.save(tmp_path / "x.pth", [torch.zeros(2)])
    assert torch.load(tmp_path / "x.pth", weights_only=True)[0].tolist() == [1, 1]
