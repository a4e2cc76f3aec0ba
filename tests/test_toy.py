"""Toy scenes: the same everywhere, true to their labels, and not solved by a shortcut."""

import hashlib

import numpy as np
import pytest

import toy
from measures import audit

PRESETS = tuple(toy.PRESETS)


def digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(
        b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    ).hexdigest()[:16]


# Computed once; equal on every machine and numpy version, or the generator is broken.
FROZEN = {
    "scene": "ed8e394d5a1c0cb3",
    "object_centric": "0ce4dc50f7e5cb23",
    "driving": "465a6255acf8e6b0",
    "flat": "2c4480c614577f7a",
}


@pytest.mark.parametrize("preset", PRESETS)
def test_scenes_are_the_same_on_every_machine(preset):
    scenes = [toy.scene(5, index, preset, size=48) for index in range(20)]
    found = digest(*(array for scene in scenes for array in scene[:-1]))  # depth came later
    assert found == FROZEN[preset]


@pytest.mark.parametrize("preset", PRESETS)
def test_depth_is_the_order_of_drawing(preset):
    for index in range(6):
        scene = toy.scene(2, index, preset, size=40)
        assert scene.depth.dtype == np.uint8 and scene.depth.shape == (40, 40)
        assert not scene.depth[scene.instance == 0].any()
        seen = [scene.depth[scene.instance == i + 1] for i in range(len(scene.things))]
        orders = [int(depth[0]) for depth in seen if depth.size]
        assert all((depth == depth[0]).all() for depth in seen if depth.size)
        assert orders == sorted(set(orders)) and orders[0] > 0
        assert not seen[-1].size or orders[-1] == 255  # the nearest object


def test_of_two_objects_the_one_in_front_has_depth_255_and_the_other_127():
    scene = toy.scene(4, 1, things=(2, 2), radius=(0.4, 0.4), crowding=0.2)
    assert len(scene.things) == 2
    assert set(scene.depth[scene.instance == 1]) == {127}
    assert set(scene.depth[scene.instance == 2]) == {255}


def test_frame_pairs_are_the_same_on_every_machine():
    pair = toy.frame_pair(5, 3)
    drawn = (*pair.first[:-1], *pair.second[:-1], pair.flow, pair.visible)
    assert digest(*drawn) == "838348dd684b3166"


def test_the_stream_is_splitmix64():
    # First outputs of the reference implementation for the state 0, as 53-bit fractions.
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert toy.Stream().field(3).tolist() == [(z >> 11) / 2**53 for z in expected]


def test_the_stream_does_not_depend_on_how_it_is_cut():
    whole, cut = toy.Stream(3, 1), toy.Stream(3, 1)
    np.testing.assert_array_equal(
        whole.field(2, 5).ravel(), np.concatenate([cut.field(3), cut.field(7)])
    )


def test_seed_and_index_do_not_stand_for_each_other():
    images = {
        toy.scene(seed, index, size=16).image.tobytes() for seed in range(5) for index in range(5)
    }
    assert len(images) == 25


def test_a_scene_does_not_depend_on_the_scenes_drawn_before():
    late = [toy.scene(1, index).image for index in range(3)][2]
    np.testing.assert_array_equal(late, toy.scene(1, 2).image)


def test_wave_is_a_sine():
    t = np.linspace(-2, 3, 1001)
    np.testing.assert_allclose(toy.wave(t), np.sin(2 * np.pi * t), atol=1.2e-3)
    c, s = toy.direction(1 / 6)
    assert abs(c * c + s * s - 1) < 1e-15 and abs(c - 0.5) < 1e-3


@pytest.mark.parametrize("preset", PRESETS)
def test_the_truth_is_consistent(preset):
    for index in range(12):
        scene = toy.scene(2, index, preset, size=40)
        assert scene.image.shape == (40, 40, 3) and scene.image.dtype == np.uint8
        np.testing.assert_array_equal(toy.PART_CLASS[scene.parts], scene.semantic)
        np.testing.assert_array_equal(scene.instance == 0, scene.semantic < toy.NUM_STUFF)
        low, high = toy.replace(toy.Dials(), **toy.PRESETS[preset]).things
        assert scene.instance.max() <= len(scene.things) == len(scene.boxes) <= high
        assert preset != "object_centric" or len(scene.things) == low == 1
        for number, (kind, (x1, y1, x2, y2)) in enumerate(zip(scene.things, scene.boxes), start=1):
            mask = scene.instance == number
            assert set(scene.semantic[mask]) <= {kind}
            inside = np.zeros_like(mask)
            inside[y1:y2, x1:x2] = True
            assert not (mask & ~inside).any() and mask.sum() <= (x2 - x1) * (y2 - y1)
            if mask.any():
                assert (
                    mask[y1].any()
                    and mask[y2 - 1].any()
                    and mask[:, x1].any()
                    and mask[:, x2 - 1].any()
                )
            else:
                assert (x1, y1, x2, y2) == (0, 0, 0, 0)


def test_a_scene_has_two_kinds_of_stuff_and_every_class_occurs():
    scenes = [toy.scene(0, index) for index in range(60)]
    assert set(np.concatenate([scene.things for scene in scenes])) == set(range(3, 8))
    assert set(np.unique([scene.parts for scene in scenes])) == set(range(len(toy.PART_NAMES)))
    kinds = [
        len({kind for kind in scene.semantic.ravel() if kind < toy.NUM_STUFF}) for scene in scenes
    ]
    assert max(kinds) == 2 and np.mean(kinds) > 1.9  # now and then things cover one of them


def test_things_overlap_and_leave_the_image():
    scenes = [toy.scene(0, index) for index in range(30)]
    assert any((scene.boxes[:, 0] == 0).any() for scene in scenes)
    touching = sum(((scene.instance[:, :-1] != scene.instance[:, 1:]) & (scene.instance[:, :-1] > 0)
                    & (scene.instance[:, 1:] > 0)).any() for scene in scenes)
    assert touching > 10


def test_driving_has_its_layout_and_its_long_tail():
    scenes = [toy.scene(0, index, "driving") for index in range(80)]
    assert all((scene.semantic[:10] == 2).mean() > 0.9 for scene in scenes)  # bricks above
    counts = np.bincount(np.concatenate([scene.things for scene in scenes]), minlength=8)[3:]
    assert counts[0] > counts[1] > counts[2] > counts[3:].max() and counts[4] < counts[0] / 6
    middles, heights = zip(
        *[((y1 + y2) / 2, y2 - y1) for scene in scenes for _, y1, _, y2 in scene.boxes]
    )
    assert np.corrcoef(middles, heights)[0, 1] > 0.6  # the nearer, the lower and the larger


def test_flat_objects_have_one_color_per_part():
    scene = toy.scene(0, 4, "flat")
    for number in range(1, scene.instance.max() + 1):
        for part in np.unique(scene.parts[scene.instance == number]):
            assert (
                len(
                    np.unique(
                        scene.image[(scene.instance == number) & (scene.parts == part)], axis=0
                    )
                )
                == 1
            )


def test_size_changes_the_resolution_and_not_the_scene():
    small, large = toy.scene(9, 2, size=32), toy.scene(9, 2, size=96)
    agreement = (large.semantic[1::3, 1::3] == small.semantic).mean()
    assert agreement > 0.99 and len(small.things) == len(large.things)


def turned(dial, *values, preset="scene"):
    return [
        [toy.scene(4, index, preset, **{dial: value}) for index in range(24)] for value in values
    ]


def test_dial_things_counts_objects():
    none, many = turned("things", (0, 0), (9, 9))
    assert all(len(scene.things) == 0 and not scene.instance.any() for scene in none)
    assert np.mean([len(scene.things) for scene in many]) > 6


def test_dial_radius_sets_the_area_of_things():
    small, large = turned("radius", (0.05, 0.08), (0.2, 0.25))
    covered = [
        np.mean([(scene.instance > 0).mean() for scene in scenes]) for scenes in (small, large)
    ]
    assert covered[1] > 3 * covered[0]


def test_dial_crowding_keeps_things_apart():
    def touching(scene):
        left, right = scene.instance[:, :-1], scene.instance[:, 1:]
        return ((left != right) & (left > 0) & (right > 0)).any()

    near, far = turned("crowding", 0.2, 1.45)  # no shape reaches further than 1.4 radii
    assert sum(map(touching, near)) > 15 and not any(map(touching, far))
    assert sum(len(scene.things) for scene in near) > sum(
        len(scene.things) for scene in far
    )  # no place was free


def test_dial_hue_bias_lets_color_give_the_class_away():
    results = []
    for bias in (0.0, 1.0):
        scenes = [toy.scene(3, index, hue_bias=bias) for index in range(120)]
        cells = np.stack([scene.image // 32 @ np.array((64, 8, 1)) for scene in scenes])
        results.append(audit.lookup_accuracy(cells, np.stack([scene.semantic for scene in scenes])))
    assert results[0] < 0.25 and results[1] > 0.45


def test_dials_texture_and_noise_roughen_the_image():
    def roughness(**dials):
        images = [toy.scene(4, index, **dials).image.astype(float) for index in range(12)]
        return np.mean([abs(np.diff(image, axis=1)).mean() for image in images])

    flat, noisy, textured = (
        roughness(texture=(0, 0), noise=0),
        roughness(texture=(0, 0), noise=0.2),
        roughness(noise=0),
    )
    assert 3 * flat < noisy and 3 * flat < textured


def test_dial_light_tilts_the_brightness():
    dark, lit = turned("light", 0.0, 0.6, preset="flat")
    ratio = np.stack([s.image for s in lit]).astype(float) / np.maximum(
        np.stack([s.image for s in dark]), 1
    )
    corners = ratio[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(axis=-1)  # over colors
    assert np.mean(corners.max(axis=1) - corners.min(axis=1)) > 0.4


@pytest.mark.parametrize("preset, dials, message", [
    ("seaside", {}, "no toy preset 'seaside'; there are scene, object_centric, driving, flat"),
    ("scene", {"hue": 1}, "no dial 'hue'; there are size, things"),
    ("scene", {"hue_bias": 1.5}, "the dial hue_bias goes from 0 to 1, found 1.5"),
    ("scene", {"size": 8}, "the dial size goes from 16 to 4096, found 8"),
    ("scene", {"things": (5, 2)}, "the dial things goes from 0 to 254, found"),
    ("scene", {"layout": "heap"}, "the dial layout is anywhere, centered or road, found 'heap'"),
])
def test_a_wrong_dial_is_named(preset, dials, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as error:
        toy.scene(0, 0, preset, **dials)
    assert "\n" not in str(error.value)


def test_mirrored_scenes_belong_to_the_same_classes():
    """Flips keep labels, since gx * gy, which is odd under mirroring, is 0 on average."""
    totals, sizes = np.zeros(8), np.zeros(8)
    for index in range(250):
        scene = toy.scene(6, index, light=0, noise=0)
        gray = scene.image.mean(axis=-1)  # over colors
        gy, gx = np.gradient(gray)
        for kind in np.unique(scene.semantic):
            mask = scene.semantic == kind
            totals[kind] += (gx * gy)[mask].sum()
            sizes[kind] += (gx * gx + gy * gy)[mask].sum()
    assert (abs(totals / sizes) < 0.05).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_flow_moves_the_first_frame_onto_the_second(preset):
    for index in range(6):
        pair = toy.frame_pair(8, index, preset, size=56, light=0, noise=0)
        rows, columns = np.nonzero(pair.visible)
        dx, dy = pair.flow[rows, columns].T
        for first, second in zip(
            pair.first[:4], pair.second[:4]
        ):  # image, semantic, instance, parts
            np.testing.assert_array_equal(second[rows + dy, columns + dx], first[rows, columns])


def test_visible_says_what_the_second_frame_still_shows():
    pair = toy.frame_pair(8, 0, speed=6, size=56)
    assert 0.5 < pair.visible.mean() < 1 and abs(pair.flow).max() <= 6
    rows, columns = np.nonzero(~pair.visible)
    dx, dy = pair.flow[rows, columns].T
    for y, x, before in zip(rows + dy, columns + dx, pair.first.instance[rows, columns]):
        assert not (0 <= y < 56 and 0 <= x < 56) or pair.second.instance[y, x] != before
    assert toy.frame_pair(8, 0, speed=0).visible.all()


def test_the_first_frame_is_the_scene_of_that_number():
    for first, scene in zip(toy.frame_pair(8, 5).first, toy.scene(8, 5)):
        np.testing.assert_array_equal(first, scene)


def test_toy_images_are_a_sequence_of_tensors_with_the_truth_beside():
    images = toy.ToyImages(2, 3, size=20)
    assert len(images) == 3 and images[1].shape == (3, 20, 20)
    scene = toy.scene(2, 1, size=20)
    np.testing.assert_array_equal(images[1].permute(1, 2, 0).numpy(), scene.image)
    for name in ("semantic", "instance", "parts"):
        np.testing.assert_array_equal(getattr(images, name)[1].numpy(), getattr(scene, name))
