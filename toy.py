"""Toy scenes: small pictures drawn by rule, in which the class, the object and the part of every pixel are known.

Slide: "Slot Attention works well on toy data", and the question after it: what of real scenes? These sit between the
two: several textured, overlapping, truncated things on two kinds of stuff, in colours that say little about the class.
Differs: not in the paper [U]. What makes them hard is set by `Dials`; `audit` measures which shortcuts are open.
Read next: data.py, which takes two views of a picture, drawn or photographed.

A scene depends on (seed, index, dials) alone, on every machine and numpy version: the random numbers are integers, and
the pixels need only + - * / sqrt and comparisons, which IEEE 754 rounds the same everywhere. No sin, no exp, no sums of
arrays, no matrix product stands between the seed and the bytes; `wave` is our sine.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np

CLASS_NAMES = ("grain", "waves", "bricks", "ball", "crate", "fish", "star", "tree")
NUM_STUFF = 3  # the first three fill the background, two of them in every scene; the others are things
PART_NAMES = ("grain", "waves", "bricks", "ball", "crate", "fish body", "fish tail", "star", "tree crown", "tree trunk")
PART_CLASS = np.array((0, 1, 2, 3, 4, 5, 5, 6, 7, 7), np.uint8)
CLASS_HUES = (0.10, 0.58, 0.02, 0.92, 0.08, 0.50, 0.15, 0.33)  # what hue_bias ties a class to, in turns
CLASS_COLORS = np.array(  # for pictures of labels, never for scenes; readable with any kind of colour vision
    ((222, 203, 164), (86, 137, 196), (163, 82, 62), (240, 128, 176), (140, 110, 190), (72, 200, 204), (250, 200, 50),
     (62, 140, 70)), np.uint8)  # fmt: skip


@dataclass(frozen=True)
class Dials:
    """Everything that may be turned about a scene. Pairs are (least, most), drawn uniformly."""

    size: int = 64  # side of the picture, px; everything else scales with it
    things: tuple[int, int] = (3, 7)  # objects per scene; one that finds no free place is left out
    radius: tuple[float, float] = (0.15, 0.28)  # of an object, in sides of the picture
    crowding: float = 0.75  # least distance of two centres, in sums of their radii: below 1 they overlap
    hue_bias: float = 0.3  # probability that the class decides the hue; at 1 colour alone solves the scene
    texture: tuple[float, float] = (0.25, 0.45)  # amplitude of the texture, on a scale where white - black = 1
    light: float = 0.15  # strength of the illumination gradient across the picture
    noise: float = 0.04  # amplitude of the noise of every pixel
    rarity: float = 1.0  # a thing class is this often for each time the class before it is; below 1: a long tail
    layout: str = "anywhere"  # or "centred" (one object fills the picture), "road" (fixed stuff, sizes by depth)


PRESETS = {
    "scene": {},
    "object_centric": dict(layout="centred", things=(1, 1), radius=(0.32, 0.42)),
    "driving": dict(layout="road", things=(3, 8), radius=(0.09, 0.26), rarity=0.5),
    "flat": dict(texture=(0.0, 0.0), light=0.0, noise=0.0),
}


class Scene(NamedTuple):
    """One picture and its ground truth."""

    image: np.ndarray  # (y x 3) uint8, sRGB
    semantic: np.ndarray  # (y x) uint8, an index into CLASS_NAMES
    instance: np.ndarray  # (y x) uint8, 0 = stuff, i = the object of row i - 1 below
    parts: np.ndarray  # (y x) uint8, an index into PART_NAMES
    boxes: np.ndarray  # (objects 4) int64, x1 y1 x2 y2 of what is visible, px, x2 and y2 exclusive; zeros if hidden
    things: np.ndarray  # (objects) uint8, their classes


class FramePair(NamedTuple):
    """Two frames of a film. All motion is by whole pixels: second[y + flow_y, x + flow_x] is first[y, x] if visible."""

    first: Scene
    second: Scene  # row i of boxes and instance i + 1 are the same object as in the first
    flow: np.ndarray  # (y x 2) int64, (x, y) displacement of every pixel of the first frame, px
    visible: np.ndarray  # (y x) bool, whether that point is seen in the second frame, neither covered nor outside


# ------------------------------------------------------------------------------------------------- random numbers
class Stream:
    """A frozen stream of random numbers: splitmix64 (Steele, Lea, Flood 2014) of a counter that starts at the key.

    numpy's own generators promise the same numbers for a seed only within a version, so ours are spelled out.
    """

    def __init__(self, *key: int):
        self.start, self.drawn, self.buffer = np.uint64(0), 0, []
        for number in key:
            self.start = self._mix(np.array([number & (2**64 - 1)], np.uint64) + self.start)[0]

    @staticmethod
    def _mix(z: np.ndarray) -> np.ndarray:
        z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # arrays of uint64 wrap around in silence, as wanted
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    def field(self, *shape: int) -> np.ndarray:
        """Numbers in [0, 1), float64, multiples of 2^-53."""
        count = math.prod(shape)
        counter = np.arange(self.drawn, self.drawn + count, dtype=np.uint64) + self.start
        self.drawn += count
        return ((self._mix(counter) >> np.uint64(11)) * 2.0**-53).reshape(shape)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        if not self.buffer:
            self.buffer = self.field(64).tolist()  # one numpy call for 64 of them
        return low + (high - low) * self.buffer.pop()

    def integer(self, low: int, high: int) -> int:
        """A whole number, low and high included."""
        return low + int(self.uniform() * (high - low + 1))


# -------------------------------------------------------------------------------------------------------- textures
def wave(t):
    """sin(2 pi t) within 0.0011, from exactly rounded operations only: a parabola, bent once towards the sine."""
    u = 1.0 - 2.0 * (t - np.floor(t))
    s = 4.0 * u * (1.0 - abs(u))
    return s + 0.225 * (s * abs(s) - s)


def direction(turns: float) -> tuple[float, float]:
    """Cosine and sine of an angle in turns, scaled to length one."""
    c, s = float(wave(turns + 0.25)), float(wave(turns))
    length = math.sqrt(c * c + s * s)
    return c / length, s / length


def _fraction(t):
    return t - np.floor(t)


def _cell(p, q, table):
    """The random number of the unit square that (p, q) lies in."""
    return table[np.floor(q).astype(np.int64) & 31, np.floor(p).astype(np.int64) & 31]


def _blobs(p, q, table):
    """Value noise in [0, 1]: random numbers on a grid of pitch one, blended in between."""
    u, v = _fraction(p), _fraction(q)
    u, v = u * u * (3.0 - 2.0 * u), v * v * (3.0 - 2.0 * v)
    top = _cell(p, q, table) * (1.0 - u) + _cell(p + 1.0, q, table) * u
    bottom = _cell(p, q + 1.0, table) * (1.0 - u) + _cell(p + 1.0, q + 1.0, table) * u
    return top * (1.0 - v) + bottom * v


def grain(p, q, table):
    return np.clip(4.0 * _blobs(p, q, table) - 2.0, -1.0, 1.0)


def waves(p, q, table):
    return wave(q + 0.3 * wave(0.3 * p))


def bricks(p, q, table):
    p = 0.5 * (p + np.floor(q))  # twice as wide as high, every other course shifted by half a brick
    mortar = (_fraction(q) < 0.22) | (_fraction(p) < 0.11)
    return np.where(mortar, -1.0, 0.2 + 0.6 * _cell(p, q, table))


def rings(p, q, table):
    return wave(np.sqrt(p * p + q * q))


def checks(p, q, table):
    return np.where(_fraction(p) < 0.5, 1.0, -1.0) * np.where(_fraction(q) < 0.5, 1.0, -1.0)


def scales(p, q, table):
    u = _fraction(p + 0.5 * np.floor(q)) - 0.5
    return 2.0 * _fraction(q + 2.0 * u * u) - 1.0


def dots(p, q, table):
    u, v = _fraction(p + 0.5 * np.floor(q)) - 0.5, _fraction(q) - 0.5
    return np.where(u * u + v * v < 0.09, 1.0, -0.5)


def leaves(p, q, table):
    return np.where(_blobs(p, q, table) > 0.5, 1.0, -1.0)


def bark(p, q, table):
    return wave(p + 0.15 * wave(0.2 * q))


class Kind(NamedTuple):
    """How a part is filled: the texture, its period in 64ths of the side (least, most), how far it may turn (turns)."""

    texture: Callable
    period: tuple[float, float]
    tilt: float


KINDS = (
    Kind(grain, (1.5, 2.2), 0.5), Kind(waves, (8.0, 11.0), 0.06), Kind(bricks, (6.0, 8.0), 0.04),
    Kind(rings, (4.5, 6.5), 0.5), Kind(checks, (7.0, 10.0), 0.02), Kind(scales, (5.0, 7.0), 0.04), Kind(scales, (5.0, 7.0), 0.04),
    Kind(dots, (5.0, 7.0), 0.5), Kind(leaves, (3.5, 5.0), 0.5), Kind(bark, (2.5, 3.5), 0.02),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- shapes
def _disc(u, v, cu, cv, radius):
    return (u - cu) * (u - cu) + (v - cv) * (v - cv) <= radius * radius


def _ball(u, v):
    return _disc(u, v, 0.0, 0.0, 1.0), None


def _crate(u, v):
    return (abs(u) <= 0.84) & (abs(v) <= 0.84), None


def _fish(u, v):
    body = _disc(0.65 * u, v, 0.13, 0.0, 0.64)
    return body, ~body & (u > -1.2) & (u < -0.5) & (abs(v) < -0.6 * u)


def _star(u, v):
    inside = sum((c * u + s * v <= 0.38).astype(np.uint8) for c, s in POINTS)
    return (inside >= 4) | _disc(u, v, 0.0, 0.0, 0.62), None  # a pentagram lies within four of its five lines


def _tree(u, v):
    crown = _disc(u, v, 0.0, -0.45, 0.65) | _disc(u, v, -0.4, 0.0, 0.55) | _disc(u, v, 0.4, 0.0, 0.55)
    return crown, ~crown & (abs(u) < 0.2) & (v > 0.0) & (v < 1.1)


POINTS = tuple(direction(0.25 + i / 5) for i in range(5))
# Class -> (shape: (u, v) in radii, v down -> the first part and the second, how far it may lean in turns).
SHAPES = {3: (_ball, 0.5), 4: (_crate, 0.06), 5: (_fish, 0.08), 6: (_star, 0.5), 7: (_tree, 0.03)}
EXTENT = 1.4  # no shape reaches further from its centre, in radii


# ------------------------------------------------------------------------------------------------- planning a scene
class Look(NamedTuple):
    """The surface of one part."""

    part: int
    color: np.ndarray  # (3) in [0, 1]
    amplitude: float
    period: float  # 64ths of the side
    turn: tuple[float, float]  # cosine and sine
    phase: tuple[float, float]  # periods


class Thing(NamedTuple):
    kind: int  # its class
    center: tuple[float, float]  # x y, 64ths of the side
    radius: float  # 64ths of the side
    turn: tuple[float, float]
    mirrored: bool
    looks: tuple[Look, ...]  # one per part


class Plan(NamedTuple):
    """All that is random about a scene but the noise of its pixels. Drawn once, rendered once per frame."""

    stuff: tuple[Look, Look]
    border: tuple[tuple[float, float], float, float, float, float]  # direction, offset, height, length, phase
    things: tuple[Thing, ...]  # far to near
    light: tuple[float, float]  # gradient along x and y
    table: np.ndarray  # (32 32) random numbers behind the irregular textures


def _color(hue: float, saturation: float, value: float) -> np.ndarray:
    """HSV in [0, 1] to RGB (3)."""
    ramps = (abs((6.0 * (hue + shift)) % 6.0 - 3.0) - 1.0 for shift in (0.0, 2.0 / 3.0, 1.0 / 3.0))
    return np.array([value * (1.0 - saturation * (1.0 - min(max(ramp, 0.0), 1.0))) for ramp in ramps])


def _look(stream: Stream, dials: Dials, part: int, hue: float) -> Look:
    kind = KINDS[part]
    if stream.uniform() < dials.hue_bias:
        hue = CLASS_HUES[PART_CLASS[part]] + stream.uniform(-0.04, 0.04)
    color = _color(hue, stream.uniform(0.35, 0.8), stream.uniform(0.45, 0.8))
    turn = direction(stream.uniform(-kind.tilt, kind.tilt))
    phase = (stream.uniform(0.0, 32.0), stream.uniform(0.0, 32.0)) if kind.texture is not rings else (0.0, 0.0)
    return Look(part, color, stream.uniform(*dials.texture), stream.uniform(*kind.period), turn, phase)


def _place(stream: Stream, dials: Dials) -> tuple[float, float, float]:
    """Centre x, y and radius of one object, in sides."""
    if dials.layout == "centred":
        return stream.uniform(0.44, 0.56), stream.uniform(0.44, 0.56), stream.uniform(*dials.radius)
    if dials.layout == "road":  # the nearer, the lower and the larger
        near = stream.uniform()
        return stream.uniform(), 0.5 + 0.35 * near, dials.radius[0] + near * (dials.radius[1] - dials.radius[0])
    return stream.uniform(), stream.uniform(), stream.uniform(*dials.radius)


def _kind(stream: Stream, rarity: float) -> int:
    """The class of a thing; the i-th is rarity^i as likely as the first."""
    bounds, weight = [0.0], 1.0
    for _ in SHAPES:
        bounds.append(bounds[-1] + weight)
        weight *= rarity
    pick = stream.uniform(0.0, bounds[-1])
    return NUM_STUFF + sum(pick >= bound for bound in bounds[1:-1])


def _plan(stream: Stream, dials: Dials) -> Plan:
    hue = stream.uniform()
    next_hue = lambda i: hue + 0.618034 * i  # noqa: E731  the golden section spreads the hues of one scene evenly
    places: list[tuple[float, float, float]] = []
    for _ in range(stream.integer(*dials.things)):
        for _attempt in range(12):
            x, y, r = _place(stream, dials)
            gaps = (math.sqrt((x - a) * (x - a) + (y - b) * (y - b)) - dials.crowding * (r + s) for a, b, s in places)
            if all(gap >= 0.0 for gap in gaps):
                places.append((x, y, r))
                break
    if dials.layout == "road":
        places.sort(key=lambda place: place[1])
    things = []
    for i, (x, y, r) in enumerate(places):
        kind = _kind(stream, dials.rarity)
        lean, parts = SHAPES[kind][1], np.flatnonzero(PART_CLASS == kind).tolist()
        looks = tuple(_look(stream, dials, part, next_hue(i + 2) + 0.1 * j) for j, part in enumerate(parts))
        turn, mirrored = direction(stream.uniform(-lean, lean)), stream.uniform() < 0.5
        things.append(Thing(kind, (64.0 * x, 64.0 * y), 64.0 * r, turn, mirrored, looks))
    first = stream.integer(0, NUM_STUFF - 1)
    pair, tilt, offset = (first, (first + stream.integer(1, 2)) % NUM_STUFF), stream.uniform(-0.5, 0.5), 8.0
    if dials.layout == "road":
        pair, tilt, offset = (2, 1), stream.uniform(-0.01, 0.01), 2.0  # a wall of bricks above a road of waves
    stuff = (_look(stream, dials, pair[0], next_hue(0)), _look(stream, dials, pair[1], next_hue(1)))
    border = (direction(tilt), stream.uniform(-offset, offset), stream.uniform(1.0, 4.0),
              stream.uniform(24.0, 48.0), stream.uniform())  # fmt: skip
    c, s = direction(stream.uniform())
    return Plan(stuff, border, tuple(things), (dials.light * c, dials.light * s), stream.field(32, 32))


# --------------------------------------------------------------------------------------------------------- drawing
def _paint(look: Look, x, y, table) -> np.ndarray:
    """Colour (y x 3) of the part at coordinates x and y (y x), in 64ths of the side."""
    (c, s), (p, q) = look.turn, look.phase
    pattern = KINDS[look.part].texture((c * x + s * y) / look.period + p, (c * y - s * x) / look.period + q, table)
    return look.color + look.amplitude * pattern[..., None]


def _render(plan: Plan, dials: Dials, noise: np.ndarray, camera=(0, 0), moves=()) -> Scene:
    """Draw the stuff, then the things from far to near. `camera` shifts the stuff, moves[i] the i-th thing, px."""
    size, unit = dials.size, 64.0 / dials.size
    rows, columns = np.arange(size)[:, None] + np.zeros((size, size)), np.arange(size) + np.zeros((size, size))
    x, y = (columns - camera[0] + 0.5) * unit, (rows - camera[1] + 0.5) * unit  # whole numbers first: exact
    (c, s), offset, height, length, phase = plan.border
    along, across = c * (x - 32.0) + s * (y - 32.0), c * (y - 32.0) - s * (x - 32.0)
    below = across + height * wave(along / length + phase) > offset
    above_look, below_look = plan.stuff
    image = np.where(below[..., None], _paint(below_look, x, y, plan.table), _paint(above_look, x, y, plan.table))
    parts = np.where(below, below_look.part, above_look.part).astype(np.uint8)
    instance = np.zeros((size, size), np.uint8)

    for number, thing in enumerate(plan.things, start=1):
        move, reach = moves[number - 1] if moves else (0, 0), EXTENT * thing.radius
        (cx, cy), (c, s) = thing.center, thing.turn
        left, right = (min(max(math.floor((cx + d) / unit) + move[0], 0), size) for d in (-reach, reach + unit))
        top, bottom = (min(max(math.floor((cy + d) / unit) + move[1], 0), size) for d in (-reach, reach + unit))
        patch = np.s_[top:bottom, left:right]
        x, y = (columns[patch] - move[0] + 0.5) * unit - cx, (rows[patch] - move[1] + 0.5) * unit - cy
        x, y = (c * x + s * y) * (-1.0 if thing.mirrored else 1.0), c * y - s * x
        masks = SHAPES[thing.kind][0](x / thing.radius, y / thing.radius)
        for look, mask in zip(thing.looks, masks):
            image[patch][mask] = _paint(look, x[mask], y[mask], plan.table)
            parts[patch][mask] = look.part
            instance[patch][mask] = number

    gx, gy = plan.light
    light = 1.0 + gx * (2.0 * columns / size - 1.0) + gy * (2.0 * rows / size - 1.0)
    image = image * light[..., None] + dials.noise * (2.0 * noise - 1.0)
    image = np.floor(255.0 * np.clip(image, 0.0, 1.0) + 0.5).astype(np.uint8)
    boxes = np.array([_box(instance == i + 1) for i in range(len(plan.things))], np.int64).reshape(-1, 4)
    things = np.array([thing.kind for thing in plan.things], np.uint8)
    return Scene(image, PART_CLASS[parts], instance, parts, boxes, things)


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x1 y1 x2 y2 around a mask (y x), ends exclusive; zeros if it is empty."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))  # over y; over x
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if len(rows) else (0, 0, 0, 0)


def _dials(preset: str, dials: dict) -> Dials:
    if preset not in PRESETS:
        raise ValueError(f"no toy preset {preset!r}; there are {', '.join(PRESETS)}")
    unknown = set(dials) - {field.name for field in fields(Dials)}
    if unknown:
        known = ", ".join(field.name for field in fields(Dials))
        raise ValueError(f"no dial {', '.join(map(repr, sorted(unknown)))}; there are {known}")
    d = replace(Dials(), **{**PRESETS[preset], **dials})
    checks_of_dials = {
        "size": d.size >= 16,
        "things": 0 <= d.things[0] <= d.things[1] <= 254,
        "radius": 0.0 < d.radius[0] <= d.radius[1] <= 1.0,
        "crowding": d.crowding >= 0.0,
        "hue_bias": 0.0 <= d.hue_bias <= 1.0,
        "texture": 0.0 <= d.texture[0] <= d.texture[1] <= 1.0,
        "light": 0.0 <= d.light <= 1.0,
        "noise": 0.0 <= d.noise <= 1.0,
        "rarity": 0.0 < d.rarity <= 1.0,
        "layout": d.layout in ("anywhere", "centred", "road"),
    }
    for name, good in checks_of_dials.items():
        if not good:
            raise ValueError(f"{name} = {getattr(d, name)!r} is outside its range; see Dials in toy.py")
    return d


def scene(seed: int, index: int, preset: str = "scene", **dials) -> Scene:
    """Scene number `index` of the endless series `seed`; ValueError for an unknown preset or dial."""
    dials = _dials(preset, dials)
    stream = Stream(seed, index)
    plan = _plan(stream, dials)
    return _render(plan, dials, stream.field(dials.size, dials.size, 3))


def frame_pair(seed: int, index: int, preset: str = "scene", speed: int = 4, **dials) -> FramePair:
    """The scene of the same name and the next frame: the camera and every object move by up to `speed` px each way.

    Light and noise belong to the camera, so second = first moved along flow only with the dials light = noise = 0.
    """
    dials = _dials(preset, dials)
    stream = Stream(seed, index)
    plan = _plan(stream, dials)
    noise = [stream.field(dials.size, dials.size, 3) for _ in range(2)]
    motion = [(stream.integer(-speed, speed), stream.integer(-speed, speed)) for _ in range(1 + len(plan.things))]
    first, second = _render(plan, dials, noise[0]), _render(plan, dials, noise[1], motion[0], motion[1:])

    flow = np.array(motion)[first.instance]  # instance 0, the stuff, moves with the camera
    rows, columns = np.indices(first.instance.shape)
    to_x, to_y = columns + flow[..., 0], rows + flow[..., 1]
    inside = (to_x >= 0) & (to_x < dials.size) & (to_y >= 0) & (to_y < dials.size)
    landed = second.instance[to_y.clip(0, dials.size - 1), to_x.clip(0, dials.size - 1)]
    return FramePair(first, second, flow, inside & (landed == first.instance))


class ToyImages:
    """`count` scenes drawn once and kept: to the trainer a sequence of uint8 images (3 y x), with the truth beside.

    images (n 3 y x) uint8 tensor; semantic, instance, parts (n y x) uint8 tensors; n counts scenes.
    """

    def __init__(self, seed: int, count: int, preset: str = "scene", **dials):
        import torch  # here, so that the generator needs numpy only

        drawn = [scene(seed, index, preset, **dials) for index in range(count)]
        self.images = torch.from_numpy(np.stack([each.image for each in drawn])).permute(0, 3, 1, 2).contiguous()
        self.semantic, self.instance, self.parts = (
            torch.from_numpy(np.stack([getattr(each, name) for each in drawn]))
            for name in ("semantic", "instance", "parts"))  # fmt: skip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.images[index]

    def name(self, index: int) -> str:
        return f"toy scene {index}"


# ------------------------------------------------------------------------------------------- which shortcuts are open
def audit(seed: int = 0, count: int = 64, preset: str = "scene", **dials) -> dict[str, float]:
    """How far each shortcut gets: balanced accuracy (chance 1/8) over pixels of unseen scenes; for k-means the mIoU."""
    drawn = [scene(seed, index, preset, **dials) for index in range(2 * count)]
    images, labels = np.stack([s.image for s in drawn]), np.stack([s.semantic for s in drawn])
    rows, columns = np.indices(labels.shape[1:]) * 16 // labels.shape[1]
    r, g, b = np.moveaxis(images // 32, -1, 0).astype(np.int64)
    return {
        "color": lookup_accuracy(64 * r + 8 * g + b, labels),
        "position": lookup_accuracy(np.broadcast_to(16 * rows + columns, labels.shape), labels),
        "rgb_kmeans_miou": kmeans_miou(images, labels, seed),
        "random_convolutions": random_convolution_accuracy(images, labels, seed),
    }


def _balanced_accuracy(guess: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean([np.mean(guess[labels == c] == c) for c in np.unique(labels)]))


def lookup_accuracy(cells: np.ndarray, labels: np.ndarray) -> float:
    """Guess each pixel's class from a table over cells (n y x): per cell the likeliest class, learned on half the scenes."""
    half = len(cells) // 2
    table = np.zeros((cells.max() + 1, len(CLASS_NAMES)))
    np.add.at(table, (cells[:half], labels[:half]), 1.0)
    likeliest = (table / np.maximum(table.sum(axis=0), 1.0)).argmax(axis=1)  # sum over cells, argmax over classes
    return _balanced_accuracy(likeliest[cells[half:]], labels[half:])


def random_convolution_accuracy(images: np.ndarray, labels: np.ndarray, seed: int = 0, width: int = 128) -> float:
    """A linear classifier (ridge) on `width` rectified random 9x9 convolutions: what texture gives away untrained."""
    filters = (Stream(seed).field(9 * 9 * 3, width) - 0.5) / 4.0
    picked = (Stream(seed, 1).field(400, 2) * (np.array(labels.shape[1:]) - 8)).astype(np.int64)  # pixels per scene
    y, x = picked.T
    patches = np.lib.stride_tricks.sliding_window_view(images / 255.0 - 0.5, (9, 9), axis=(1, 2))[:, y, x]
    response = patches.reshape(len(images), len(picked), -1) @ filters
    features = np.concatenate([abs(response), response, np.ones_like(response[..., :1])], axis=-1)
    targets = labels[:, y + 4, x + 4]
    half, f = len(images) // 2, features.shape[-1]
    train, target = features[:half].reshape(-1, f), targets[:half].ravel()
    weight = 1.0 / np.bincount(target, minlength=len(CLASS_NAMES)).clip(1)[target][:, None]  # classes count alike
    gram = train.T @ (weight * train) + 1e-4 * np.eye(f)
    solution = np.linalg.solve(gram, train.T @ (weight * np.eye(len(CLASS_NAMES))[target]))
    return _balanced_accuracy((features[half:] @ solution).argmax(axis=-1), targets[half:])


def kmeans_miou(images: np.ndarray, labels: np.ndarray, seed: int = 0, k: int = 8) -> float:
    """mIoU of k-means on RGB, its clusters matched one to one with the classes so that most pixels agree."""
    from scipy.optimize import linear_sum_assignment

    pixels = images.reshape(-1, 3)[:: max(1, images.size // 600_000)].astype(np.float32)
    truth = labels.reshape(-1)[:: max(1, images.size // 600_000)]
    centers = pixels[(Stream(seed).field(k) * len(pixels)).astype(np.int64)]
    for _ in range(20):
        nearest = ((pixels[:, None] - centers) ** 2).sum(axis=-1).argmin(axis=1)
        centers = np.stack([pixels[nearest == i].mean(axis=0) if (nearest == i).any() else centers[i] for i in range(k)])
    confusion = np.zeros((k, len(CLASS_NAMES)))
    np.add.at(confusion, (nearest, truth), 1.0)
    matched = confusion[linear_sum_assignment(-confusion)]
    rows, columns = linear_sum_assignment(-confusion)
    union = confusion.sum(axis=1)[rows] + confusion.sum(axis=0)[columns] - matched
    return float(np.mean(matched / union))
