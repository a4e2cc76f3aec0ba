"""Toy scenes: small images drawn by rule, in which the class, the object and the part of every
pixel are known.

Slide: "Slot Attention works well on toy data".
Paper: none.
Differs: ours [U]. These scenes lie between the slide's toy data and photographs: several textured,
overlapping, truncated things on two kinds of stuff, in colors that say little about the class.
`Dials` sets what makes a scene hard, measures/audit.py measures which shortcuts are open.
Read next: data.py, which takes two views of an image, drawn or photographed.

A scene depends on (seed, index, dials) alone, on every machine and numpy version: its random
numbers are integers, its pixels need only + - * / sqrt and comparisons, which IEEE 754 rounds the
same everywhere. Between the seed and the bytes there is no sin, no exp, no power, no sum of an
array and no matrix product; `wave` is our sine.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

CLASS_NAMES = ("grain", "waves", "bricks", "ball", "crate", "fish", "star", "tree")
NUM_STUFF = (
    3  # the first three fill the background, two of them in every scene; the others are things
)
PART_NAMES = (*CLASS_NAMES[:5], "fish body", "fish tail", "star", "tree crown", "tree trunk")
PART_CLASS = np.array((0, 1, 2, 3, 4, 5, 5, 6, 7, 7), np.uint8)
# What hue_bias ties a class to, turns
CLASS_HUES = (0.10, 0.58, 0.02, 0.92, 0.08, 0.50, 0.15, 0.33)
# Of labels, never of scenes
CLASS_COLORS = np.array(
    (
        (222, 203, 164),
        (86, 137, 196),
        (163, 82, 62),
        (240, 128, 176),
        (140, 110, 190),
        (72, 200, 204),
        (250, 200, 50),
        (62, 140, 70),
    ),
    np.uint8,
)


@dataclass(frozen=True)
class Dials:
    """Everything about a scene that can be turned. A pair is (least, most) of a uniform draw."""

    size: int = 64  # side of the image, px; all else scales with it
    things: tuple[int, int] = (3, 7)  # objects per scene; one that finds no free place is left out
    radius: tuple[float, float] = (0.15, 0.28)  # of an object, in sides of the image
    crowding: float = (
        0.75  # least distance of two centers, in sums of their radii; below 1 things overlap
    )
    hue_bias: float = (
        0.3  # probability that the class decides the hue; at 1 color gives the class away
    )
    texture: tuple[float, float] = (0.25, 0.45)  # amplitude of the texture, where white - black = 1
    light: float = 0.15  # strength of the illumination gradient across the image
    noise: float = 0.04  # amplitude of the noise of every pixel
    # each thing class is this many times as frequent as the one before; below 1: a long tail
    rarity: float = 1.0
    layout: str = (
        "anywhere"  # or "centered" (things in the middle), "road" (fixed stuff, size by depth)
    )


PRESETS = {
    "scene": {},
    "object_centric": dict(layout="centered", things=(1, 1), radius=(0.32, 0.42)),
    "driving": dict(layout="road", things=(3, 8), radius=(0.09, 0.26), rarity=0.5),
    "flat": dict(texture=(0.0, 0.0), light=0.0, noise=0.0),
}


class Scene(NamedTuple):
    """One image and its ground truth."""

    image: np.ndarray  # (y x 3) uint8, sRGB
    semantic: np.ndarray  # (y x) uint8, index into CLASS_NAMES
    instance: np.ndarray  # (y x) uint8, 0 = stuff, i = the object of row i - 1 below
    parts: np.ndarray  # (y x) uint8, index into PART_NAMES
    # (objects 4) int64, x1 y1 x2 y2 of the visible pixels, ends exclusive; zeros if hidden
    boxes: np.ndarray
    things: np.ndarray  # (objects) uint8, their classes
    depth: np.ndarray  # (y x) uint8, order of drawing: 0 the stuff, 255 the nearest object


class FramePair(NamedTuple):
    """Two frames of a film, moved by whole pixels: where visible, second[y + flow_y, x + flow_x] is
    first[y, x].
    """

    first: Scene
    second: Scene  # row i of boxes and instance i + 1 are the same object as in the first
    flow: np.ndarray  # (y x 2) int64, (x, y) displacement of each pixel of the first frame, px
    # (y x) bool, whether it is in the second frame too: neither covered nor outside
    visible: np.ndarray


# ----------------------------------------------------------------------------------- random numbers
class Stream:
    """A frozen stream of random numbers: splitmix64 (Steele, Lea, Flood 2014) of a counter, started
    by a key.

    numpy's generators promise the same numbers for the same seed only within a version; hence our
    own.
    """

    def __init__(self, *key: int):
        self.start, self.drawn, self.buffer = np.uint64(0), 0, []
        for number in key:
            self.start = self._mix(np.array([number & (2**64 - 1)], np.uint64) + self.start)[0]

    @staticmethod
    def _mix(z: np.ndarray) -> np.ndarray:
        # Arrays of uint64 wrap around silently: wanted
        z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    def field(self, *shape: int) -> np.ndarray:
        """float64 in [0, 1), multiples of 2^-53."""
        count = math.prod(shape)
        counter = np.arange(self.drawn, self.drawn + count, dtype=np.uint64) + self.start
        self.drawn += count
        return ((self._mix(counter) >> np.uint64(11)) * 2.0**-53).reshape(shape)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """One number between low and high."""
        if not self.buffer:
            self.buffer = self.field(
                64
            ).tolist()  # 64 at a time: one call of numpy costs as much as one number
        return low + (high - low) * self.buffer.pop()

    def integer(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self.uniform() * (high - low + 1))


# ------------------------------------ textures: (p, q) in periods, random table -> value in [-1, 1]
def wave(t: np.ndarray | float) -> np.ndarray | float:
    """sin(2 pi t) within 0.0011 from exactly rounded operations: a parabola, bent once towards the
    sine.
    """
    u = 1.0 - 2.0 * (t - np.floor(t))
    s = 4.0 * u * (1.0 - abs(u))
    return s + 0.225 * (s * abs(s) - s)


def direction(turns: float) -> tuple[float, float]:
    """Cosine and sine of an angle, made to have length one."""
    c, s = float(wave(turns + 0.25)), float(wave(turns))
    length = math.sqrt(c * c + s * s)
    return c / length, s / length


def _fraction(t):
    return t - np.floor(t)


def _cell(p, q, table):
    """The random number of the unit square in which (p, q) lies."""
    return table[np.floor(q).astype(np.int64) & 31, np.floor(p).astype(np.int64) & 31]


def _blobs(p, q, table):
    """Value noise in [0, 1]: random numbers at whole p and q, blended smoothly in between."""
    u, v = _fraction(p), _fraction(q)
    u, v = u * u * (3.0 - 2.0 * u), v * v * (3.0 - 2.0 * v)
    upper = _cell(p, q, table) * (1.0 - u) + _cell(p + 1.0, q, table) * u
    lower = _cell(p, q + 1.0, table) * (1.0 - u) + _cell(p + 1.0, q + 1.0, table) * u
    return upper * (1.0 - v) + lower * v


def grain(p: np.ndarray, q: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Soft speckles."""
    return np.clip(4.0 * _blobs(p, q, table) - 2.0, -1.0, 1.0)


def waves(p: np.ndarray, q: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Wavy lines along p."""
    return wave(q + 0.3 * wave(0.3 * p))


def bricks(p: np.ndarray, q: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Bricks with mortar between them."""
    p = 0.5 * (p + np.floor(q))  # twice as wide as high, every other course shifted by half a brick
    mortar = (_fraction(q) < 0.22) | (_fraction(p) < 0.11)
    return np.where(mortar, -1.0, 0.2 + 0.6 * _cell(p, q, table))


def gloss(p: np.ndarray, q: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Bright in the middle, in rings."""
    return wave(np.sqrt(p * p + q * q) + 0.25)  # bright in the middle


def checks(p: np.ndarray, q: np.ndarray, table: np.ndarray) -> np.ndarray:
    """A chessboard."""
    return np.where((_fraction(p) < 0.5) == (_fraction(q) < 0.5), 1.0, -1.0)


def stripes(p: np.ndarray, q: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Stripes across p, slightly wavy."""
    return wave(p + 0.1 * wave(0.15 * q))


def dots(p: np.ndarray, q: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Dots in rows, every other row shifted."""
    u, v = _fraction(p + 0.5 * np.floor(q)) - 0.5, _fraction(q) - 0.5
    return np.where(u * u + v * v < 0.09, 1.0, -0.5)


def leaves(p: np.ndarray, q: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Hard-edged blobs."""
    return np.where(_blobs(p, q, table) > 0.5, 1.0, -1.0)


def bark(p: np.ndarray, q: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Speckles drawn out along q."""
    return grain(p, 0.3 * q, table)


class Fill(NamedTuple):
    """What a part is filled with. All periods but the ball's are short beside the 17 px that a
    pixel of the tiny trunk sees.
    """

    texture: Callable
    period: tuple[float, float]  # 64ths of the side
    tilt: float  # how far it may turn, turns


FISH = Fill(stripes, (3.0, 3.8), 0.03)
FILLS = (  # in the order of PART_NAMES
    Fill(grain, (1.2, 1.6), 0.5),
    Fill(waves, (6.0, 8.0), 0.04),
    Fill(bricks, (5.0, 6.5), 0.02),
    Fill(gloss, (24.0, 32.0), 0.5),
    Fill(checks, (4.6, 5.6), 0.02),
    FISH,
    FISH,
    Fill(dots, (6.0, 7.5), 0.5),
    Fill(leaves, (3.0, 4.0), 0.5),
    Fill(bark, (1.5, 2.0), 0.02),
)


# ----------------------- shapes: (u, v) in radii from the center, v down -> one mask (y x) per part
def _disc(u, v, cu, cv, radius):
    return (u - cu) * (u - cu) + (v - cv) * (v - cv) <= radius * radius


def _ball(u, v):
    return (_disc(u, v, 0.0, 0.0, 1.0),)


def _crate(u, v):
    return ((abs(u) <= 0.84) & (abs(v) <= 0.84),)


def _fish(u, v):
    body = _disc(0.65 * u, v, 0.13, 0.0, 0.64)
    return body, ~body & (u > -1.2) & (u < -0.5) & (abs(v) < -0.6 * u)


def _star(u, v):
    inside = sum((c * u + s * v <= 0.38).astype(np.uint8) for c, s in STAR_NORMALS)
    # A pentagram: inside at least four of its five lines
    return ((inside >= 4) | _disc(u, v, 0.0, 0.0, 0.62),)


def _tree(u, v):
    crown = (
        _disc(u, v, 0.0, -0.45, 0.65) | _disc(u, v, -0.4, 0.0, 0.55) | _disc(u, v, 0.4, 0.0, 0.55)
    )
    return crown, ~crown & (abs(u) < 0.2) & (v > 0.0) & (v < 1.1)


STAR_NORMALS = tuple(direction(0.25 + i / 5) for i in range(5))
# And their lean, turns
SHAPES = ((_ball, 0.5), (_crate, 0.06), (_fish, 0.08), (_star, 0.5), (_tree, 0.03))
REACH = 1.4  # no shape goes further from its center, radii


# ---------------------------------------------------- a plan: all that is random, but for the noise
class Look(NamedTuple):
    """The surface of one part."""

    part: int
    color: np.ndarray  # (3) in [0, 1]
    amplitude: float
    period: float  # 64ths of the side
    turn: tuple[float, float]  # cosine, sine
    phase: tuple[float, float]  # periods


class Thing(NamedTuple):
    """One object of a scene."""

    kind: int  # its class
    center: tuple[float, float]  # x y, 64ths of the side
    radius: float  # 64ths of the side
    turn: tuple[float, float]  # cosine, sine
    mirrored: bool
    looks: tuple[Look, ...]  # one per part


class Plan(NamedTuple):
    """Drawn once per scene, rendered once per frame."""

    stuff: tuple[Look, Look]
    # Direction, offset, height, length, phase
    border: tuple[tuple[float, float], float, float, float, float]
    things: tuple[Thing, ...]  # far to near
    light: tuple[float, float]  # gradient along x and y
    table: np.ndarray  # (32 32) random numbers behind the irregular textures


def _color(hue: float, saturation: float, value: float) -> np.ndarray:
    """HSV in [0, 1] -> RGB (3) in [0, 1]."""
    ramps = (abs((6.0 * (hue + shift)) % 6.0 - 3.0) - 1.0 for shift in (0.0, 2.0 / 3.0, 1.0 / 3.0))
    return np.array(
        [value * (1.0 - saturation * (1.0 - min(max(ramp, 0.0), 1.0))) for ramp in ramps]
    )


def _look(stream: Stream, dials: Dials, part: int, hue: float) -> Look:
    fill = FILLS[part]
    if stream.uniform() < dials.hue_bias:
        hue = CLASS_HUES[PART_CLASS[part]] + stream.uniform(-0.1, 0.1)
    color = _color(hue, stream.uniform(0.25, 0.65), stream.uniform(0.45, 0.7))
    turn = direction(stream.uniform(-fill.tilt, fill.tilt))
    phase = (stream.uniform(0.0, 32.0), stream.uniform(0.0, 32.0))
    phase = (0.0, 0.0) if fill.texture is gloss else phase  # gloss has a center, the object's
    return Look(
        part, color, stream.uniform(*dials.texture), stream.uniform(*fill.period), turn, phase
    )


def _places(stream: Stream, dials: Dials) -> list[tuple[float, float, float]]:
    """Center x, y and radius of each object, in sides, far to near, none too close to another."""
    places: list[tuple[float, float, float]] = []
    for _ in range(stream.integer(*dials.things)):
        for _attempt in range(12):
            x, y, share = stream.uniform(), stream.uniform(), stream.uniform()
            if dials.layout == "centered":
                x, y = 0.44 + 0.12 * x, 0.44 + 0.12 * y
            if dials.layout == "road":  # the nearer, the lower and the larger
                y = 0.5 + 0.35 * share
            r = dials.radius[0] + share * (dials.radius[1] - dials.radius[0])
            gaps = (
                math.sqrt((x - a) * (x - a) + (y - b) * (y - b)) / (r + s) for a, b, s in places
            )
            if all(gap >= dials.crowding for gap in gaps):
                places.append((x, y, r))
                break
    return sorted(places, key=lambda place: place[1]) if dials.layout == "road" else places


def _kind(stream: Stream, rarity: float) -> int:
    """The class of a thing; the i-th is rarity^i as likely as the first."""
    bounds, weight = [1.0], 1.0
    for _ in SHAPES[1:]:
        weight *= rarity
        bounds.append(bounds[-1] + weight)
    pick = stream.uniform(0.0, bounds[-1])
    return NUM_STUFF + sum(pick >= bound for bound in bounds[:-1])


def _plan(stream: Stream, dials: Dials) -> Plan:
    hues = [stream.uniform()]
    for _ in range(dials.things[1] + 1):
        hues.append(hues[-1] + 0.618034)  # the golden section spreads the hues of a scene evenly
    things = []
    for hue, (x, y, r) in zip(hues[2:], _places(stream, dials)):
        kind = _kind(stream, dials.rarity)
        lean = SHAPES[kind - NUM_STUFF][1]
        parts = np.flatnonzero(kind == PART_CLASS).tolist()
        looks = tuple(_look(stream, dials, part, hue + 0.1 * i) for i, part in enumerate(parts))
        turn, mirrored = direction(stream.uniform(-lean, lean)), stream.uniform() < 0.5
        things.append(Thing(kind, (64.0 * x, 64.0 * y), 64.0 * r, turn, mirrored, looks))
    first = stream.integer(0, NUM_STUFF - 1)
    pair, tilt, offset = (first, (first + stream.integer(1, 2)) % NUM_STUFF), 0.5, 8.0
    if dials.layout == "road":
        pair, tilt, offset = (2, 1), 0.01, 2.0  # always a wall of bricks above a road of waves
    stuff = (_look(stream, dials, pair[0], hues[0]), _look(stream, dials, pair[1], hues[1]))
    border = (
        direction(stream.uniform(-tilt, tilt)),
        stream.uniform(-offset, offset),
        stream.uniform(1.0, 4.0),
        stream.uniform(24.0, 48.0),
        stream.uniform(),
    )
    c, s = direction(stream.uniform())
    return Plan(
        stuff, border, tuple(things), (dials.light * c, dials.light * s), stream.field(32, 32)
    )


# ------------------------------------------------------------------------------------------ drawing
def _paint(look: Look, x, y, table) -> np.ndarray:
    """Color (... 3) of a part at coordinates x and y (...), in 64ths of the side."""
    (c, s), (p, q) = look.turn, look.phase
    p, q = (c * x + s * y) / look.period + p, (c * y - s * x) / look.period + q
    return look.color + look.amplitude * FILLS[look.part].texture(p, q, table)[..., None]


def _render(plan: Plan, dials: Dials, noise: np.ndarray, camera=(0, 0), moves=()) -> Scene:
    """Draw the stuff, then the things from far to near; camera shifts the stuff, moves[i] the i-th
    thing, px.
    """
    size, unit = dials.size, 64.0 / dials.size
    rows, columns = np.indices((size, size)) + 0.5
    # Shifted while exact: no rounding differs
    x, y = ((columns - camera[0]) * unit, (rows - camera[1]) * unit)
    (c, s), offset, height, length, phase = plan.border
    along, across = c * (x - 32.0) + s * (y - 32.0), c * (y - 32.0) - s * (x - 32.0)
    below = across + height * wave(along / length + phase) > offset
    image = np.where(
        below[..., None], *(_paint(look, x, y, plan.table) for look in plan.stuff[::-1])
    )
    parts = np.where(below, plan.stuff[1].part, plan.stuff[0].part).astype(np.uint8)
    instance = np.zeros((size, size), np.uint8)

    for i, (kind, center, radius, (c, s), mirrored, looks) in enumerate(plan.things):
        shift, reach = (moves[i] if moves else (0, 0)), REACH * radius
        (left, right), (top, bottom) = (
            [
                min(max(math.floor(edge / unit) + d, 0), size)
                for edge in (middle - reach, middle + reach + unit)
            ]
            for middle, d in zip(center, shift)
        )
        patch = np.s_[top:bottom, left:right]  # nothing of the object lies outside
        x, y = (
            (columns[patch] - shift[0]) * unit - center[0],
            (rows[patch] - shift[1]) * unit - center[1],
        )
        x, y = (c * x + s * y) * (-1.0 if mirrored else 1.0), c * y - s * x
        for look, mask in zip(looks, SHAPES[kind - NUM_STUFF][0](x / radius, y / radius)):
            image[patch][mask] = _paint(look, x[mask], y[mask], plan.table)
            parts[patch][mask] = look.part
            instance[patch][mask] = i + 1

    light = (
        1.0
        + plan.light[0] * (2.0 * columns / size - 1.0)
        + plan.light[1] * (2.0 * rows / size - 1.0)
    )
    image = image * light[..., None] + dials.noise * (2.0 * noise - 1.0)
    image = np.floor(255.0 * np.clip(image, 0.0, 1.0) + 0.5).astype(np.uint8)
    boxes = np.array([_box(instance == i + 1) for i in range(len(plan.things))], np.int64).reshape(
        -1, 4
    )
    depth = (255 * instance.astype(np.int64) // max(len(plan.things), 1)).astype(np.uint8)
    return Scene(
        image,
        PART_CLASS[parts],
        instance,
        parts,
        boxes,
        np.array([t.kind for t in plan.things], np.uint8),
        depth,
    )


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x1 y1 x2 y2 around a mask (y x), ends exclusive; zeros if it is empty."""
    columns, rows = (
        np.flatnonzero(mask.any(axis=0)),
        np.flatnonzero(mask.any(axis=1)),
    )  # over y; over x
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if len(rows) else (0, 0, 0, 0)


def _dials(preset: str, changes: dict) -> Dials:
    if preset not in PRESETS:
        raise ValueError(f"no toy preset {preset!r}; there are {', '.join(PRESETS)}")
    known = [field.name for field in fields(Dials)]
    for name in changes:
        if name not in known:
            raise ValueError(f"no dial {name!r}; there are {', '.join(known)}")
    dials = replace(Dials(), **{**PRESETS[preset], **changes})
    ranges = dict(size=(16, 4096), things=(0, 254), radius=(0.01, 1), crowding=(0, 9))
    for name in known[:-1]:
        value, (low, high) = getattr(dials, name), ranges.get(name, (0, 1))
        pair = value if isinstance(value, (tuple, list)) else (value, value)
        if not low <= pair[0] <= pair[1] <= high:
            raise ValueError(f"the dial {name} goes from {low} to {high}, found {value}")
    if dials.layout not in ("anywhere", "centered", "road"):
        raise ValueError(f"the dial layout is anywhere, centered or road, found {dials.layout!r}")
    return dials


def scene(seed: int, index: int, preset: str = "scene", **dials: Any) -> Scene:
    """Scene number `index` of the series `seed`. ValueError for an unknown preset or dial."""
    dials = _dials(preset, dials)
    stream = Stream(seed, index)
    plan = _plan(stream, dials)
    return _render(plan, dials, stream.field(dials.size, dials.size, 3))


def frame_pair(
    seed: int, index: int, preset: str = "scene", speed: int = 4, **dials: Any
) -> FramePair:
    """The scene of that number and its next frame: camera and objects move by up to `speed` px
    along each axis.

    Light and noise belong to the camera: only with the dials light=0, noise=0 is second exactly
    first, moved.
    """
    dials = _dials(preset, dials)
    stream = Stream(seed, index)
    plan = _plan(stream, dials)
    first = _render(plan, dials, stream.field(dials.size, dials.size, 3))
    motion = [
        [stream.integer(-speed, speed) for _axis in "xy"] for _ in range(1 + len(plan.things))
    ]
    second = _render(plan, dials, stream.field(dials.size, dials.size, 3), motion[0], motion[1:])

    flow = np.array(motion)[first.instance]  # instance 0, the stuff, moves with the camera
    rows, columns = np.indices(first.instance.shape)
    x, y = columns + flow[..., 0], rows + flow[..., 1]
    there = (x >= 0) & (x < dials.size) & (y >= 0) & (y < dials.size)
    there &= second.instance[y.clip(0, dials.size - 1), x.clip(0, dials.size - 1)] == first.instance
    return FramePair(first, second, flow, there)


class ToyImages:
    """`count` scenes, drawn once: for the trainer a sequence of uint8 images (3 y x), with the
    truth beside it.

    images (n 3 y x) uint8 tensor; semantic, instance, parts, depth (n y x) uint8 tensors; n counts
    scenes.
    """

    def __init__(self, seed: int, count: int, preset: str = "scene", **dials: Any):
        import torch  # only here: the generator itself needs nothing but numpy

        images, *labels, _boxes, _things, depth = zip(
            *(scene(seed, index, preset, **dials) for index in range(count))
        )
        self.images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        self.semantic, self.instance, self.parts, self.depth = (
            torch.from_numpy(np.stack(each)) for each in (*labels, depth)
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.images[index]
