"""slotcon.py: student, teacher, center and the two losses, put together.

Promised: the loss of the paper and of each of its ablations; the same loss whatever the order of
prototypes, views or images; a teacher that no gradient reaches and a forward that moves neither
teacher nor center; batch statistics of one view at a time; no exception where nothing overlaps or
nothing is found; float32 at least where it matters. The default method against the released code's
numbers: test_reference_numbers.py.
"""

import math
import zlib

import pytest
import torch
import torch.nn.functional as F

from measures.course import statistics
from slotcon import SlotCon

B, K, D, HIDDEN, H, W = 3, 5, 7, 9, 8, 12
ABLATIONS = [
    {},
    dict(slot_loss="reg"),
    dict(align="proj"),
    dict(image_loss=True),
    dict(group_weight=1.0),
]
NAMES = ["method", "reg", "proj", "image", "group only"]
ORDER = torch.tensor([3, 0, 4, 1, 2])


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def build(**settings):
    """A small SlotCon in float64 whose student, teacher and center all differ."""
    model = SlotCon("tiny", K, HIDDEN, D, **settings).double()
    for name, p in model.named_parameters():
        # + 1: a draw in which student and teacher share some prototypes, but not all
        noise = random(*p.shape, seed=zlib.crc32(name.encode()) + 1)
        p.data = (
            noise * math.sqrt(3 / p[0].numel())
            if p.ndim > 1
            else noise / 9 + name.endswith("weight")
        )
    model.center.copy_(random(K, seed=99) / 9)
    return model


def two_views():
    """Images of all rows, two of whose crops overlap."""
    boxes = torch.tensor(
        [
            [[0.1, 0.2, 0.9, 0.8], [0.0, 0.0, 1.0, 0.7]],
            [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]],
            [[0.5, 0.3, 1.0, 1.0], [0.2, 0.0, 0.7, 0.6]],
        ],
        dtype=torch.float64,
    )
    flipped = torch.tensor([[False, True], [True, True], [True, False]])
    return random(B, 2, 3, 4 * H, 4 * W, seed=7), boxes, flipped


# ----------------------------------------------------------------------------------------- the loss


def cosine(prototypes, embeddings):
    return torch.stack(
        [F.cosine_similarity(p[None, :, None, None], embeddings, dim=1) for p in prototypes], dim=1
    )


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


def loss_slowly(
    model, views, boxes, flipped, group_weight=0.5, slot_loss="ctr", align="asgn", image_loss=False
):
    total = torch.zeros(3, dtype=torch.float64)  # group, slot, image
    for one, other in ((0, 1), (1, 0)):
        s_features, t_features = (
            model.student.backbone(views[:, one]),
            model.teacher.backbone(views[:, other]),
        )
        s_z, t_z = model.student.projector(s_features), model.teacher.projector(t_features)
        s_p, t_p = model.student.prototypes.weight, model.teacher.prototypes.weight
        s, t = cosine(s_p, s_z), cosine(t_p, t_z)
        box_s, box_t, flip_s, flip_t = (
            boxes[:, one],
            boxes[:, other],
            flipped[:, one],
            flipped[:, other],
        )
        if align == "asgn":
            s_cut, t_cut = cut(s, box_s, flip_s), cut(t, box_t, flip_t)
        else:
            s_cut, t_cut = (
                cosine(s_p, cut(s_z, box_s, flip_s)),
                cosine(t_p, cut(t_z, box_t, flip_t)),
            )
        target = ((t_cut - model.center[:, None, None]) / 0.07).softmax(1)
        total[0] += (
            -(target * (s_cut / 0.1).log_softmax(1)).sum(1)[[0, 2]].mean()
        )  # image 1 has no overlap

        def pool(z, maps):
            a = (maps / 0.07).softmax(1)[:, :, None] + 1e-6
            return (a * z[:, None]).sum((3, 4)) / a.sum((3, 4))

        s_slots, t_slots = pool(s_z, s), pool(t_z, t)
        s_there = [[k in s[b].argmax(0) for k in range(K)] for b in range(B)]
        t_there = [[k in t[b].argmax(0) for k in range(K)] for b in range(B)]
        keys = {
            (b, k): F.normalize(t_slots[b, k], dim=0)
            for b in range(B)
            for k in range(K)
            if t_there[b][k]
        }
        places = [(b, k) for b, k in keys if s_there[b][k]]
        assert 3 < len(places) < len(keys) < B * K
        if model.predictor is not None:
            queries = [
                F.normalize(model.predictor(s_slots[b, k][None])[0], dim=0) for b, k in places
            ]
            if slot_loss == "reg":
                terms = [2 - 2 * q @ keys[place] for q, place in zip(queries, places)]
            else:
                terms = [
                    0.4
                    * (
                        torch.stack([q @ key / 0.2 for key in keys.values()]).logsumexp(0)
                        - q @ keys[p] / 0.2
                    )
                    for q, p in zip(queries, places)
                ]
            total[1] += sum(terms) / len(terms)
        if image_loss:
            q = F.normalize(
                model.image_predictor(model.image_projector(s_features.mean((2, 3)))), dim=1
            )
            key = F.normalize(model.image_teacher(t_features.mean((2, 3))), dim=1)
            total[2] += 0.4 * -(q @ key.T / 0.2).log_softmax(1).diag().mean()
    return group_weight * total[0] + (1 - group_weight) * total[1] + total[2], total


@pytest.mark.parametrize("settings", ABLATIONS, ids=NAMES)
def test_the_loss_is_the_papers_also_in_its_ablations(settings):
    model = build(**settings).eval()  # batch norms that mix nothing, so that rows can go one by one
    loss, report = model(*two_views())
    expected, (group, slot, _) = loss_slowly(model, *two_views(), **settings)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert report.losses.tolist() == pytest.approx(
        [expected.item(), group.item(), slot.item()], rel=1e-9
    )


def test_every_ablation_is_another_loss_and_reaches_the_student():
    found = []
    for settings in ABLATIONS:
        model = build(**settings)
        loss, _ = model(*two_views())
        loss.backward()
        assert loss.isfinite() and model.student.prototypes.weight.grad.abs().sum() > 0
        found.append(round(loss.item(), 9))
    assert len(set(found)) == len(ABLATIONS)


@pytest.mark.parametrize("settings", ABLATIONS, ids=NAMES)
def test_permuting_the_prototypes_changes_no_loss(settings):
    model = build(**settings)
    before, report = model(*two_views())
    for table in (model.student.prototypes, model.teacher.prototypes):
        table.weight.data = table.weight.data[ORDER]
    model.center.copy_(model.center[ORDER])
    after, moved = model(*two_views())
    assert after.item() == pytest.approx(before.item(), rel=1e-9)
    assert torch.allclose(moved.losses, report.losses) and torch.allclose(
        moved.center_mean, report.center_mean[ORDER]
    )


@pytest.mark.parametrize("settings", ABLATIONS, ids=NAMES)
def test_exchanging_views_or_images_changes_no_loss(settings):
    model, (views, boxes, flipped) = build(**settings).eval(), two_views()
    before, _ = model(views, boxes, flipped)
    exchanged, _ = model(views.flip(1), boxes.flip(1), flipped.flip(1))
    reordered, _ = model(views[[2, 0, 1]], boxes[[2, 0, 1]], flipped[[2, 0, 1]])
    assert exchanged.item() == pytest.approx(before.item(), rel=1e-9)
    assert reordered.item() == pytest.approx(before.item(), rel=1e-9)


def test_identical_views_with_equal_temperatures_and_no_center_give_twice_the_entropy():
    model = SlotCon(
        "tiny", K, HIDDEN, D, group_weight=1.0, temp_student=0.1, temp_teacher=0.1
    ).double()
    views, boxes, flipped = two_views()
    views, boxes, flipped = (x[:, :1].expand_as(x) for x in (views, boxes, flipped))
    loss, report = model(views, boxes, flipped)
    p = (report.teacher[0].aligned[report.valid] / 0.1).softmax(1)
    assert loss.item() == pytest.approx(-2 * (p * p.log()).sum(1).mean().item(), rel=1e-9)


def test_lambda_weighs_the_two_losses_and_at_one_there_is_no_slot_loss():
    found = {}
    for weight in (0.0, 0.3, 1.0):
        loss, report = build(group_weight=weight).eval()(*two_views())
        _, group, slot = report.losses.tolist()
        found[weight] = loss.item()
        assert loss.item() == pytest.approx(weight * group + (1 - weight) * slot)
    assert found[0.3] == pytest.approx(0.3 * found[1.0] + 0.7 * found[0.0])
    assert build(group_weight=1.0).predictor is None


def test_slots_pool_at_the_teachers_temperature_unless_told_otherwise():
    losses = [
        build(temp_pool=temperature).eval()(*two_views())[0].item()
        for temperature in (0.0, 0.07, 0.2)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_what_does_not_exist_is_refused():
    for settings in (dict(slot_loss="none"), dict(align="slots")):
        with pytest.raises(
            ValueError, match="slot_loss is ctr or reg and align is asgn or proj, found"
        ):
            build(**settings)
    with pytest.raises(ValueError, match="num_prototypes must be at least 1, found 0"):
        SlotCon("tiny", 0, HIDDEN, D)


def test_with_a_resnet_50_and_256_prototypes_68_712_000_parameters_are_trained():
    with torch.device("meta"):
        model = SlotCon()
    count = lambda module: sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert count(model) == 68_712_000
    assert [
        count(part)
        for part in (
            model.student.backbone,
            model.student.projector,
            model.student.prototypes,
            model.predictor,
            model.teacher,
        )
    ] == [23_508_032, 26_239_232, 65_536, 18_899_200, 0]


# ------------------------------------------------------------------------ what moves, what does not


@pytest.mark.parametrize("settings", ABLATIONS, ids=NAMES)
def test_no_gradient_reaches_the_teacher_and_all_of_the_student_gets_one(settings):
    model = build(**settings).eval()
    model(*two_views())[0].backward()
    for name, p in model.named_parameters():
        if "teacher" in name:
            assert p.grad is None and not p.requires_grad, name
        else:
            assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_either_loss_alone_reaches_prototypes_projector_and_backbone(weight):
    model = build(group_weight=weight)
    model(*two_views())[0].backward()
    for part in (model.student.prototypes, model.student.projector, model.student.backbone):
        assert all(p.grad is not None for p in part.parameters())
        assert next(part.parameters()).grad.abs().sum() > 0


def test_a_forward_moves_neither_the_center_nor_a_parameter():
    model = build(image_loss=True)
    before = {name: p.clone() for name, p in [*model.named_parameters(), ("center", model.center)]}
    model(*two_views())
    assert all(
        p.equal(before[name]) for name, p in [*model.named_parameters(), ("center", model.center)]
    )


def test_the_teachers_follow_the_students_parameters_and_nobodys_buffers():
    model = build(image_loss=True)
    model(*two_views())  # statistics differ now
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.update_teacher(0.75)
    names = {name for name, _ in model.named_parameters()}
    for name, value in model.state_dict().items():
        student = name.replace("image_teacher.", "image_projector.").replace("teacher.", "student.")
        moves = name in names and student != name
        expected = 0.75 * before[name] + 0.25 * before[student] if moves else before[name]
        assert torch.allclose(value, expected, rtol=1e-12), name


def test_student_and_teacher_start_alike_and_the_center_at_zero_and_it_is_saved():
    model = SlotCon("tiny", K, HIDDEN, D)
    assert model.center.equal(torch.zeros(K)) and "center" in model.state_dict()
    for p, q in zip(model.student.parameters(), model.teacher.parameters()):
        assert p.equal(q)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_batch_statistics_are_of_one_view_at_a_time_view_1_first(which):
    model, (views, boxes, flipped) = build().train(), two_views()
    views[:, 1] *= 3  # of another spread
    convolution, norm = (getattr(model, which).backbone[i] for i in (0, 1))
    m1, m2 = (convolution(view).mean((0, 2, 3)) for view in views.unbind(1))
    model(views, boxes, flipped)
    assert torch.allclose(norm.running_mean, 0.9 * 0.1 * m1 + 0.1 * m2, rtol=1e-9)
    assert norm.num_batches_tracked == 2


def test_the_predictor_normalizes_one_direction_at_a_time():
    model = build()
    model(*two_views())
    assert model.predictor.mlp[1].num_batches_tracked == 2


# --------------------------------------------------------------------------- where nothing is found


@pytest.mark.parametrize("settings", ABLATIONS, ids=NAMES)
def test_without_any_overlap_the_group_loss_is_zero_and_everything_has_a_gradient(settings):
    model, (views, boxes, flipped) = build(**settings), two_views()
    loss, report = model(views, torch.zeros_like(boxes), flipped)
    loss.backward()
    assert report.losses[1] == 0 and not report.valid.any() and loss.isfinite()
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for p in model.parameters()
        if p.requires_grad
    )


@pytest.mark.parametrize("settings", ABLATIONS, ids=NAMES)
def test_with_fewer_than_two_queries_the_slot_loss_is_zero_and_everything_has_a_gradient(settings):
    """One flat image, one group; and the teacher calls it by another name."""
    model, (_, boxes, flipped) = build(**settings), two_views()
    model.teacher.load_state_dict(model.student.state_dict())
    model.teacher.prototypes.weight.data = model.teacher.prototypes.weight.roll(1, 0)
    views = torch.full((B, 2, 3, 4 * H, 4 * W), 0.5, dtype=torch.float64)
    loss, report = model(views, boxes, flipped)
    loss.backward()
    assert report.losses[2] == 0 and report.losses[1] > 0
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for p in model.parameters()
        if p.requires_grad
    )


# ---------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("settings", ABLATIONS, ids=NAMES)
def test_under_autocast_networks_run_in_half_precision_and_losses_in_single(settings):
    model, views = (
        build(**settings).float().eval(),
        [x.float() if x.is_floating_point() else x for x in two_views()],
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss, report = model(*views)
        assert model.student.embed(views[0][:, 0])[1].dtype == torch.bfloat16
    loss.backward()
    assert loss.dtype == torch.float32
    computed = [
        x for view in (*report.student, *report.teacher) for x in (view.similarity, view.aligned)
    ]
    computed += [report.losses, report.group_losses, report.slot_losses, report.center_mean]
    assert {x.dtype for x in computed} == {torch.float32}
    assert loss.item() == pytest.approx(model(*views)[0].item(), rel=0.03)
    assert all(p.grad.dtype == torch.float32 for p in model.student.parameters())


def test_double_precision_stays_double():
    loss, report = build(image_loss=True)(*two_views())
    assert {x.dtype for x in (loss, *tensors_of(report)) if x.is_floating_point()} == {
        torch.float64
    }


# --------------------------------------------------------------------------------------- the report


def tensors_of(report):
    """All tensors in it, those of the views too."""
    found = []
    for part in report:
        parts = part if isinstance(part, (tuple, list)) else (part,)
        for one in parts:
            found += [
                x
                for x in (one if isinstance(one, tuple) else (one,))
                if isinstance(x, torch.Tensor)
            ]
    return found


def teacher_maps(report):
    """(v b k h w)"""
    return torch.stack([view.similarity for view in report.teacher])


def teacher_occupied(report):
    """(v b k)"""
    return torch.stack([view.occupied for view in report.teacher])


def test_the_report_holds_maps_before_and_after_alignment_and_no_graph():
    model, (views, boxes, flipped) = build().eval(), two_views()
    _, report = model(views, boxes, flipped)
    assert not any(x.requires_grad for x in tensors_of(report))
    assert report.valid.tolist() == [True, False, True]
    for v in (0, 1):
        maps = model.teacher(views[:, v])[1]
        assert torch.allclose(report.teacher[v].similarity, maps)
        overlapping = [0, 2]  # the others' values mean nothing
        aligned = cut(maps, boxes[:, v], flipped[:, v])
        assert torch.allclose(
            report.teacher[v].aligned[overlapping], aligned[overlapping], rtol=1e-8
        )
        aligned = cut(model.student(views[:, v])[1], boxes[:, v], flipped[:, v])
        assert torch.allclose(
            report.student[v].aligned[overlapping], aligned[overlapping], rtol=1e-8
        )
        assert report.teacher[v].occupied.tolist() == [
            [k in m.argmax(0) for k in range(K)] for m in maps
        ]
    assert torch.allclose(report.center_mean, teacher_maps(report).mean((0, 1, 3, 4)))


def test_the_statistics_of_the_log_are_counted_over_pixels():
    model = build().eval()
    model.teacher.load_state_dict(model.student.state_dict())  # or they would never agree
    _, report = model(*two_views())
    found = statistics(report, model.center, 0.07)
    p = ((teacher_maps(report) - model.center[:, None, None]) / 0.07).softmax(2)  # (v b k h w)
    entropies = [
        -sum(x * math.log(x) for x in p[v, b, :, h, w].tolist())
        for v in range(2)
        for b in range(B)
        for h in range(H)
        for w in range(W)
    ]
    mean = p.mean((0, 1, 3, 4)).tolist()
    agreements = [
        (report.student[v].aligned[b].argmax(0) == report.teacher[1 - v].aligned[b].argmax(0))
        .double()
        .mean()
        for v in range(2)
        for b in (0, 2)
    ]
    assert found == dict(
        occupied_per_image=pytest.approx(teacher_occupied(report).sum().item() / (2 * B)),
        prototypes_used=teacher_occupied(report).any(0).any(0).sum().item(),
        entropy_teacher=pytest.approx(sum(entropies) / len(entropies)),
        entropy_mean=pytest.approx(-sum(x * math.log(x) for x in mean)),
        agreement=pytest.approx(sum(agreements).item() / 4),
    )
    assert all(type(value) in (int, float) for value in found.values())
    same_view = [
        (s.argmax(0) == t.argmax(0)).double().mean()
        for s, t in zip(
            torch.stack([view.aligned for view in report.student])[:, [0, 2]].flatten(0, 1),
            torch.stack([view.aligned for view in report.teacher])[:, [0, 2]].flatten(0, 1),
        )
    ]
    assert 0 < found["agreement"] < 1 and found["agreement"] != pytest.approx(
        sum(same_view).item() / 4
    )


def test_without_overlap_there_is_no_agreement_and_no_division_by_zero():
    model, (views, boxes, flipped) = build(), two_views()
    _, report = model(views, torch.zeros_like(boxes), flipped)
    assert statistics(report, model.center, 0.07)["agreement"] == 0
