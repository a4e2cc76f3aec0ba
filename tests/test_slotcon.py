"""slotcon.py: student, teacher, center and losses together, against slow loops."""

import math
import zlib

import pytest
import torch
import torch.nn.functional as F

from backbone import architecture_of, build_backbone
from data import TwoCrops
from grouping import assignment
from photometric import Photometric
from slotcon import SlotCon
from slots import attentive_pooling
from teacher import update_teacher
from trained import random

B, K, D, HIDDEN, H, W = 3, 5, 7, 9, 8, 12
ABLATIONS = [
    {}, dict(slot_loss="reg"), dict(align="proj"), dict(image_loss=True), dict(group_weight=1.0),
]  # fmt: skip
each_ablation = pytest.mark.parametrize("settings", ABLATIONS, ids=str)


def build(**settings):
    """A small SlotCon in float64 whose student, teacher and center all differ."""
    model = SlotCon("tiny", K, HIDDEN, D, **settings).double()
    for name, p in model.named_parameters():
        # + 1: numbers with which student and teacher share some prototypes, but not all
        noise = random(*p.shape, seed=zlib.crc32(name.encode()) + 1)
        small = noise / 9 + name.endswith("weight")
        p.data = noise * math.sqrt(3 / p[0].numel()) if p.ndim > 1 else small
    model.center.copy_(random(K, seed=99) / 9)
    return model


def two_views():
    """Images of all rows, two of whose crops overlap."""
    boxes = [
        [[0.1, 0.2, 0.9, 0.8], [0.0, 0.0, 1.0, 0.7]],
        [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]],
        [[0.5, 0.3, 1.0, 1.0], [0.2, 0.0, 0.7, 0.6]],
    ]
    flipped = torch.tensor([[False, True], [True, True], [True, False]])
    boxes = torch.tensor(boxes, dtype=torch.float64)
    return random(B, 2, 3, 4 * H, 4 * W, seed=7), boxes, flipped


def cosine(prototypes, embeddings):
    columns = [F.cosine_similarity(p[None, :, None, None], embeddings, dim=1) for p in prototypes]
    return torch.stack(columns, dim=1)


def cut(maps, boxes, flipped):
    """Inverse augmentation through torch's own sampler."""
    out = []
    for m, (x1, y1, x2, y2), flip in zip(maps, boxes, flipped):
        y = y1 + (torch.arange(H).double() + 0.5) / H * (y2 - y1)
        x = x1 + (torch.arange(W).double() + 0.5) / W * (x2 - x1)
        grid = torch.stack(torch.meshgrid(2 * x - 1, 2 * y - 1, indexing="xy"), dim=-1)[None]
        sampled = F.grid_sample(m[None], grid, padding_mode="border", align_corners=False)[0]
        out.append(sampled.flip(2) if flip else sampled)
    return torch.stack(out)


class Side:
    """One network on one view, described slowly."""

    def __init__(self, network, images, boxes, flipped, align="asgn"):
        p = network.prototypes.weight
        self.features = network.backbone(images)
        z = network.projector(self.features)
        maps = cosine(p, z)
        moved = cut(maps if align == "asgn" else z, boxes, flipped)
        self.aligned = moved if align == "asgn" else cosine(p, moved)
        a = (maps / 0.07).softmax(1)[:, :, None] + 1e-6
        self.slots = (a * z[:, None]).sum((3, 4)) / a.sum((3, 4))
        places = [(b, k) for b in range(B) for k in range(K)]
        self.occupied = [(b, k) for b, k in places if k in maps[b].argmax(0)]


def slot_loss_slowly(s, t, predictor, kind):
    keys = {place: F.normalize(t.slots[place], dim=0) for place in t.occupied}
    queries = [place for place in t.occupied if place in s.occupied]
    assert 3 < len(queries) < len(keys) < B * K
    terms = []
    for place in queries:
        query = F.normalize(predictor(s.slots[place][None])[0], dim=0)
        logits = torch.stack([query @ key / 0.2 for key in keys.values()])
        pull = query @ keys[place]
        terms.append(2 - 2 * pull if kind == "reg" else 0.4 * (logits.logsumexp(0) - pull / 0.2))
    return sum(terms) / len(terms)


def image_loss_slowly(s, t, model):
    prediction = model.image_predictor(model.image_projector(s.features.mean((2, 3))))
    query, key = F.normalize(prediction, dim=1), model.image_teacher(t.features.mean((2, 3)))
    logits = query @ F.normalize(key, dim=1).T / 0.2
    return 0.4 * -logits.log_softmax(1).diag().mean()


def losses_slowly(model, views, boxes, flipped, **settings):
    group, slot, image = torch.zeros(3, dtype=torch.float64)
    for v in (0, 1):
        inputs = [(views[:, i], boxes[:, i], flipped[:, i]) for i in (v, 1 - v)]
        align = settings.get("align", "asgn")
        s, t = Side(model.student, *inputs[0], align), Side(model.teacher, *inputs[1], align)
        target = ((t.aligned - model.center[:, None, None]) / 0.07).softmax(1)
        cross_entropy = -(target * (s.aligned / 0.1).log_softmax(1)).sum(1)
        group = group + cross_entropy[[0, 2]].mean()  # image 1 has no overlap
        if model.predictor is not None:
            slot = slot + slot_loss_slowly(s, t, model.predictor, settings.get("slot_loss"))
        if settings.get("image_loss"):
            image = image + image_loss_slowly(s, t, model)
    weight = settings.get("group_weight", 0.5)
    return [x.item() for x in (weight * group + (1 - weight) * slot + image, group, slot)]


@each_ablation
def test_the_loss_is_the_papers_also_in_its_ablations(settings):
    model = build(**settings).eval()  # batch norms that mix nothing, so that rows can go one by one
    loss, report = model(*two_views())
    expected = losses_slowly(model, *two_views(), **settings)
    assert report.losses.tolist() == pytest.approx(expected, rel=1e-9)
    assert loss.item() == pytest.approx(expected[0], rel=1e-9)


@each_ablation
def test_exchanging_views_or_images_changes_no_loss(settings):
    model, batch = build(**settings).eval(), two_views()
    before = model(*batch)[0].item()
    assert model(*(x.flip(1) for x in batch))[0].item() == pytest.approx(before, rel=1e-9)
    assert model(*(x[[2, 0, 1]] for x in batch))[0].item() == pytest.approx(before, rel=1e-9)


def test_a_model_starts_with_one_network_twice():
    model = SlotCon("tiny", K, HIDDEN, D)
    assert model.state_dict()["center"].equal(torch.zeros(K))
    assert all(p.equal(q) for p, q in zip(model.student.parameters(), model.teacher.parameters()))


MAPS, NETWORK = random(B, K, H, W), torch.nn.Linear(D, K)
TINY = build_backbone("tiny").state_dict()
REFUSED = [  # of all parts of the method: what is asked for, and the answer
    (lambda: build(slot_loss="none"), "slot_loss is ctr or reg and align is asgn or proj, found"),
    (lambda: build(align="slots"), "slot_loss is ctr or reg and align is asgn or proj, found"),
    (lambda: SlotCon("tiny", 0, HIDDEN, D), "num_prototypes must be at least 1, found 0"),
    (lambda: build_backbone("resnet19"), "unknown .* 'resnet19': choose one of tiny, .*resnet101"),
    (lambda: build_backbone("tiny", pretrained=True), "--pretrained is for --arch timm:NAME; "),
    *((lambda x=x: architecture_of(x), f"{len(x)} tensors .* are none of tiny, ") for x in (
        {}, {**TINY, "0.weight": torch.empty(1)}, {**TINY, "more": torch.empty(1)})),
    *((lambda t=t: assignment(MAPS, t), f"must be positive, found {t}") for t in (0, -0.1)),
    (lambda: attentive_pooling(random(B, D, H, W), MAPS[..., :5], 0.07),
     r"\(3, 7, 8, 12\) and similarity \(3, 5, 8, 5\) are maps of different sizes"),
    *((lambda m=m: update_teacher(NETWORK, NETWORK, m), rf"must lie in \[0, 1\], found {m}")
      for m in (-0.1, 1.1, math.nan)),
    *((lambda name=name, x=x: TwoCrops(**{name: x}), f"found .*{x}") for name, x in (
        ("image_size", 0), ("min_area", 0), ("min_area", 1.5))),
    *((lambda name=name, x=x: Photometric(**{name: x}), words) for name, x, words in (
        ("jitter", (0.4, 0.4, 0.2, 0.1, 1.2), "probabilities lie in 0..1, found .*1.2"),
        ("p_blur", (1.0,), "jitter, p_blur, solarize have 5 2 3 numbers"),
        ("jitter", (0.4, 0.4, 0.2, 0.6, 1), "of the hue <= 0.5, found .*0.6"),
        ("jitter", (-1, 0.4, 0.2, 0.1, 1), "found .-1"))),
]  # fmt: skip


@pytest.mark.parametrize("asked, words", REFUSED, ids=[words for _, words in REFUSED])
def test_what_cannot_be_is_refused_with_one_line(asked, words):
    with pytest.raises(ValueError, match=words) as error:
        asked()
    assert "\n" not in str(error.value)


def test_by_default_68_712_000_parameters_are_trained():
    with torch.device("meta"):
        model = SlotCon()
    count = lambda module: sum(p.numel() for p in module.parameters() if p.requires_grad)
    student, predictor = model.student, model.predictor
    parts = student.backbone, student.projector, student.prototypes, predictor, model.teacher
    assert [count(part) for part in parts] == [23_508_032, 26_239_232, 65_536, 18_899_200, 0]
    assert count(model) == 68_712_000


@each_ablation
def test_no_gradient_reaches_the_teacher_and_all_of_the_student_gets_one(settings):
    model = build(**settings).eval()
    model(*two_views())[0].backward()
    for name, p in model.named_parameters():
        if "teacher" in name:
            assert p.grad is None and not p.requires_grad, name
        else:
            assert p.grad.abs().sum() > 0, name


@each_ablation
def test_side_by_side_student_and_teacher_are_the_same_to_the_bit(settings):
    one, two = build(**settings), build(**settings)
    two.side_by_side = True
    outputs = [model(*two_views()) for model in (one, two)]
    for loss, _ in outputs:
        loss.backward()
    assert torch.equal(outputs[0][0], outputs[1][0])
    for a, b in zip(one.parameters(), two.parameters()):
        assert a.grad is b.grad is None or torch.equal(a.grad, b.grad)
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), two.buffers()))


def test_the_teachers_follow_the_students_parameters_and_no_buffers():
    model = build(image_loss=True)
    model(*two_views())  # statistics differ now
    before = {name: value.clone() for name, value in model.state_dict().items()}
    places = [p.data_ptr() for p in model.parameters()]
    model.update_teacher(0.75)
    assert [p.data_ptr() for p in model.parameters()] == places
    names = {name for name, _ in model.named_parameters()}
    for name, value in model.state_dict().items():
        student = name.replace("image_teacher.", "image_projector.").replace("teacher.", "student.")
        moves = name in names and student != name
        expected = 0.75 * before[name] + 0.25 * before[student] if moves else before[name]
        assert torch.allclose(value, expected, rtol=1e-12), name


def backward_is_finite(model, loss):
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    return all(p.grad is not None and p.grad.isfinite().all() for p in trained)


@each_ablation
def test_without_any_overlap_the_group_loss_is_zero_and_everything_has_a_gradient(settings):
    model, (views, boxes, flipped) = build(**settings), two_views()
    loss, report = model(views, torch.zeros_like(boxes), flipped)
    assert report.losses[1] == 0 and not report.valid.any() and loss.isfinite()
    assert backward_is_finite(model, loss)


@each_ablation
def test_with_fewer_than_two_queries_the_slot_loss_is_zero_and_everything_has_a_gradient(settings):
    """One flat image, one group; and it is another prototype of the teacher."""
    model, (views, boxes, flipped) = build(**settings), two_views()
    model.teacher.load_state_dict(model.student.state_dict())
    model.teacher.prototypes.weight.data = model.teacher.prototypes.weight.roll(1, 0)
    loss, report = model(torch.full_like(views, 0.5), boxes, flipped)
    assert report.losses[2] == 0 and report.losses[1] > 0
    assert backward_is_finite(model, loss)


def test_the_report_holds_what_each_network_made_of_each_view():
    model, (views, boxes, flipped) = build().eval(), two_views()
    _, report = model(views, boxes, flipped)
    assert report.valid.tolist() == [True, False, True]
    for network, records in ((model.student, report.student), (model.teacher, report.teacher)):
        for v, view in enumerate(records):
            side = Side(network, views[:, v], boxes[:, v], flipped[:, v])
            assert not any(x.requires_grad for x in view)  # it keeps no graph
            assert torch.allclose(view.features, side.features)
            assert torch.allclose(view.slots, side.slots)
            assert torch.allclose(view.aligned[[0, 2]], side.aligned[[0, 2]], rtol=1e-8)
            assert [tuple(place) for place in view.occupied.nonzero().tolist()] == side.occupied
    numbers = report.losses, report.group_losses, report.slot_losses, report.center_mean
    assert not any(x.requires_grad for x in numbers)
    assert report.losses[1].item() == pytest.approx(report.group_losses.sum().item())
    assert report.losses[2].item() == pytest.approx(report.slot_losses.sum().item())
