"""Toy scenes: small images drawn by rule, in which the class and object of every pixel is known.

Slide: "Slot Attention works well on toy data".
Paper: none.
Read next: data.py, which takes two views of an image.

Several textured, overlapping, truncated things lie on two kinds of stuff, in colors that say
little about the class. A scene depends on (seed, index, dials) alone, on every machine: its random
numbers are integers, its pixels need only + - * / sqrt and comparisons, which IEEE 754 rounds the
same everywhere. There is no sin, no power, and no sum of an array.
"""

from __future__ import annotations

import colorsys
import math
import operator
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

Values = np.ndarray  # float64 of any shape


@dataclass(frozen=True)
class Dials:
    """Everything about a scene that can be set. A pair is (least, most) of a uniform draw."""

    size: int = 64  # side of the image, px; all else scales with it
    things: tuple[int, int] = (3, 7)  # objects per scene; one that finds no free place is left out
    radius: tuple[float, float] = (0.15, 0.28)  # of an object, in sides of the image
    crowding: float = 0.75  # least distance of two centers, in sums of their radii; < 1: overlap
    hue_bias: float = 0.3  # probability that the class decides the hue; at 1 color gives it away
    texture: tuple[float, float] = (0.25, 0.45)  # amplitude of the texture, where white - black = 1
    light: float = 0.15  # strength of the illumination gradient across the image
    noise: float = 0.04  # amplitude of the noise of every pixel
    rarity: float = 1.0  # each thing class is this many times as frequent as the one before
    layout: str = "anywhere"  # or "centered": in the middle, or "road": fixed stuff, size by depth


SCENE_PRESETS = {
    "scene": {},
    "object_centric": dict(layout="centered", things=(1, 1), radius=(0.32, 0.42)),
    "driving": dict(layout="road", things=(3, 8), radius=(0.09, 0.26), rarity=0.5),
    "flat": dict(texture=(0.0, 0.0), light=0.0, noise=0.0),
}


class Scene(NamedTuple):
    """One image and its ground truth."""

    image: np.ndarray  # (y x 3) uint8, sRGB
    semantic: np.ndarray  # (y x) uint8, index into CLASS_NAMES
    instance: np.ndarray  # (y x) uint8, 0 = stuff, i = the object of things[i - 1]
    parts: np.ndarray  # (y x) uint8, index into PARTS
    things: np.ndarray  # (objects) uint8, their classes
    depth: np.ndarray  # (y x) uint8, order of drawing: 0 the stuff, 255 the nearest object


class FramePair(NamedTuple):
    """Two frames: second[y + flow_y, x + flow_x] is first[y, x], unless covered or outside."""

    first: Scene
    second: Scene  # instance i is the same object as in the first
    flow: np.ndarray  # (y x 2) int64, (x, y) displacement of each pixel of the first frame, px


class ToyImages:
    """`count` scenes: a sequence of uint8 images (3 y x), with the truth beside it.

    images (n 3 y x), semantic, instance, parts, depth (n y x): uint8 tensors, as in `Scene`.
    """

    def __init__(self, seed: int, count: int, preset: str = "scene", **dials: Any):
        import torch  # only here: drawing needs nothing but numpy

        scenes = [scene(seed, index, preset, **dials) for index in range(count)]
        names = "image", "semantic", "instance", "parts", "depth"
        images, self.semantic, self.instance, self.parts, self.depth = (
            torch.from_numpy(np.stack([getattr(each, name) for each in scenes])) for name in names
        )
        self.images = images.permute(0, 3, 1, 2).contiguous()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.images[index]


def scene(seed: int, index: int, preset: str = "scene", **dials: Any) -> Scene:
    """Scene number `index` of the series `seed`. ValueError for an unknown preset or dial."""
    chosen, stream = _dials(preset, dials), Stream(seed, index)
    return _render(_sketch(stream, chosen), chosen, stream)


def frame_pair(
    seed: int, index: int, preset: str = "scene", speed: int = 4, **dials: Any
) -> FramePair:
    """The scene and its next frame: camera and objects move by up to `speed` px, not the light."""
    chosen, stream = _dials(preset, dials), Stream(seed, index)
    sketch = _sketch(stream, chosen)
    first = _render(sketch, chosen, stream)
    # Of the stuff, which the camera moves, then of the things.
    moves = [[stream.integer(-speed, speed) for _ in "xy"] for _ in sketch.layers]
    second = _render(sketch, chosen, stream, moves)
    return FramePair(first, second, np.array(moves)[first.instance])


# ---------------------------------------------------------------------------------- random numbers
class Stream:
    """splitmix64 (Steele, Lea, Flood 2014): numpy's random numbers change with its version."""

    def __init__(self, *key: int):
        self.start, self.drawn, self.buffer = np.uint64(0), 0, []
        for number in key:
            self.start = self._mix(np.array([number & (2**64 - 1)], np.uint64) + self.start)[0]

    @staticmethod
    def _mix(z: np.ndarray) -> np.ndarray:
        # Arrays of uint64 wrap around, as they must.
        z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    def field(self, *shape: int) -> Values:
        """float64 in [0, 1), multiples of 2^-53."""
        count = math.prod(shape)
        counter = np.arange(self.drawn, self.drawn + count, dtype=np.uint64) + self.start
        self.drawn += count
        return ((self._mix(counter) >> np.uint64(11)) * 2.0**-53).reshape(shape)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """One number between low and high."""
        if not self.buffer:
            self.buffer = self.field(64).tolist()  # a call of numpy takes as long as one number
        return low + (high - low) * self.buffer.pop()

    def integer(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self.uniform() * (high - low + 1))


# -------------------------------- textures: (p, q) in periods, table (32 32) -> values in [-1, 1]
def wave(t: Values | float) -> Values | float:
    """sin(2 pi t) within 0.0011: a parabola, bent once towards the sine."""
    u = 1.0 - 2.0 * (t - np.floor(t))
    s = 4.0 * u * (1.0 - abs(u))
    return s + 0.225 * (s * abs(s) - s)


def direction(turns: float) -> tuple[float, float]:
    """Cosine and sine of an angle, made to have length one."""
    c, s = float(wave(turns + 0.25)), float(wave(turns))
    length = math.sqrt(c * c + s * s)
    return c / length, s / length


def _fraction(t: Values) -> Values:
    return t - np.floor(t)


def _cell(p: Values, q: Values, table: Values) -> Values:
    """The random number of the unit square in which (p, q) lies."""
    return table[np.floor(q).astype(np.int64) & 31, np.floor(p).astype(np.int64) & 31]


def _blobs(p: Values, q: Values, table: Values) -> Values:
    """Value noise in [0, 1]: random numbers at whole p and q, blended smoothly in between."""
    u, v = _fraction(p), _fraction(q)
    u, v = u * u * (3.0 - 2.0 * u), v * v * (3.0 - 2.0 * v)
    upper = _cell(p, q, table) * (1.0 - u) + _cell(p + 1.0, q, table) * u
    lower = _cell(p, q + 1.0, table) * (1.0 - u) + _cell(p + 1.0, q + 1.0, table) * u
    return upper * (1.0 - v) + lower * v


def bricks(p: Values, q: Values, table: Values) -> Values:
    """Bricks with mortar, twice as wide as high, every other row shifted by half a brick."""
    p = 0.5 * (p + np.floor(q))
    mortar = (_fraction(q) < 0.22) | (_fraction(p) < 0.11)
    return np.where(mortar, -1.0, 0.2 + 0.6 * _cell(p, q, table))


def dots(p: Values, q: Values, table: Values) -> Values:
    """Dots in rows, every other row shifted."""
    u, v = _fraction(p + 0.5 * np.floor(q)) - 0.5, _fraction(q) - 0.5
    return np.where(u * u + v * v < 0.09, 1.0, -0.5)


Texture = Callable[[Values, Values, Values], Values]
# Soft speckles, wavy lines along p, rings around a bright middle, slightly wavy stripes across p,
# hard-edged blobs, speckles drawn out along q, a chessboard.
grain: Texture = lambda p, q, table: np.clip(4.0 * _blobs(p, q, table) - 2.0, -1.0, 1.0)
waves: Texture = lambda p, q, table: wave(q + 0.3 * wave(0.3 * p))
gloss: Texture = lambda p, q, table: wave(np.sqrt(p * p + q * q) + 0.25)
stripes: Texture = lambda p, q, table: wave(p + 0.1 * wave(0.15 * q))
leaves: Texture = lambda p, q, table: np.where(_blobs(p, q, table) > 0.5, 1.0, -1.0)
bark: Texture = lambda p, q, table: grain(p, 0.3 * q, table)
checks: Texture = lambda p, q, table: 2.0 * ((_fraction(p) < 0.5) == (_fraction(q) < 0.5)) - 1.0


# ---------------------- shapes: (u, v) in radii from the center, v down -> one mask (y x) per part
Shape = Callable[[Values, Values], Sequence[np.ndarray]]
REACH = 1.4  # no shape goes further from its center, radii
STAR_NORMALS = tuple(direction(0.25 + i / 5) for i in range(5))


def _disc(u: Values, v: Values, cu: float, cv: float, radius: float) -> np.ndarray:
    return (u - cu) * (u - cu) + (v - cv) * (v - cv) <= radius * radius


def _fish(u: Values, v: Values) -> Sequence[np.ndarray]:
    body = _disc(0.65 * u, v, 0.13, 0.0, 0.64)
    return [body, ~body & (u > -1.2) & (u < -0.5) & (abs(v) < -0.6 * u)]


def _star(u: Values, v: Values) -> Sequence[np.ndarray]:
    # A pentagram: inside of at least four of its five lines.
    inside = sum((c * u + s * v <= 0.38).astype(np.uint8) for c, s in STAR_NORMALS)
    return [(inside >= 4) | _disc(u, v, 0.0, 0.0, 0.62)]


def _tree(u: Values, v: Values) -> Sequence[np.ndarray]:
    sides = _disc(u, v, -0.4, 0.0, 0.55) | _disc(u, v, 0.4, 0.0, 0.55)
    crown = _disc(u, v, 0.0, -0.45, 0.65) | sides
    return [crown, ~crown & (abs(u) < 0.2) & (v > 0.0) & (v < 1.1)]


# --------------------------------------------------------------------------- the table of classes
class Part(NamedTuple):
    """A part of a class and its texture, whose period is short beside 17 px, but for the ball's."""

    name: str
    texture: Texture
    period: tuple[float, float]  # 64ths of the side
    tilt: float  # how far it may turn, turns


class ToyClass(NamedTuple):
    """A class: stuff, which fills the background, or a thing, which has a shape."""

    name: str
    hue: float  # to which hue_bias ties it, turns
    parts: tuple[Part, ...]
    shape: Shape | None = None  # None: stuff
    lean: float = 0.0  # how far a thing may turn, turns


# fmt: off
CLASSES = (  # a new class is one row; stuff comes first
    ToyClass("grain", 0.10, (Part("grain", grain, (1.2, 1.6), 0.5),)),
    ToyClass("waves", 0.58, (Part("waves", waves, (6.0, 8.0), 0.04),)),
    ToyClass("bricks", 0.02, (Part("bricks", bricks, (5.0, 6.5), 0.02),)),
    ToyClass("ball", 0.92, (Part("ball", gloss, (24.0, 32.0), 0.5),),
             lambda u, v: [_disc(u, v, 0.0, 0.0, 1.0)], 0.5),
    ToyClass("crate", 0.08, (Part("crate", checks, (4.6, 5.6), 0.02),),
             lambda u, v: [(abs(u) <= 0.84) & (abs(v) <= 0.84)], 0.06),
    ToyClass("fish", 0.50, (Part("fish body", stripes, (3.0, 3.8), 0.03),
             Part("fish tail", stripes, (3.0, 3.8), 0.03)), _fish, 0.08),
    ToyClass("star", 0.15, (Part("star", dots, (6.0, 7.5), 0.5),), _star, 0.5),
    ToyClass("tree", 0.33, (Part("tree crown", leaves, (3.0, 4.0), 0.5),
             Part("tree trunk", bark, (1.5, 2.0), 0.02)), _tree, 0.03),
)
# fmt: on
CLASS_NAMES = tuple(each.name for each in CLASSES)
NUM_STUFF = sum(each.shape is None for each in CLASSES)
PARTS = tuple(part for each in CLASSES for part in each.parts)
PART_CLASS = np.array([i for i, each in enumerate(CLASSES) for _ in each.parts], np.uint8)


# -------------------------------------------------- a sketch: all that is random, but for the noise
# x and y (n) from the center of the layer, 64ths of the side, table (32 32) -> color (n 3) in 0..1
Paint = Callable[[Values, Values, Values], Values]
WHOLE = 4096.0  # radius of the stuff, 64ths of the side: no shift shows where it ends


class Layer(NamedTuple):
    """The stuff of a scene, as of two parts, or one of its objects."""

    kind: int  # its class, of the stuff one of both
    shape: Shape
    center: tuple[float, float]  # x y, 64ths of the side
    radius: float  # 64ths of the side
    turn: tuple[float, float]  # cosine, sine
    mirrored: bool
    looks: Sequence[tuple[int, Paint]]  # of its parts


class Sketch(NamedTuple):
    """Drawn once per scene, rendered per frame."""

    layers: Sequence[Layer]  # far to near, the stuff first
    light: tuple[float, float]  # gradient along x and y
    table: np.ndarray  # (32 32) random numbers behind the irregular textures


def _look(stream: Stream, dials: Dials, part: int, hue: float) -> tuple[int, Paint]:
    texture, periods, tilt = PARTS[part][1:]
    if stream.uniform() < dials.hue_bias:
        hue = CLASSES[PART_CLASS[part]].hue + stream.uniform(-0.1, 0.1)
    color = colorsys.hsv_to_rgb(hue % 1.0, stream.uniform(0.25, 0.65), stream.uniform(0.45, 0.7))
    c, s = direction(stream.uniform(-tilt, tilt))
    phase = (stream.uniform(0.0, 32.0), stream.uniform(0.0, 32.0))
    phase = (0.0, 0.0) if texture is gloss else phase  # gloss has a middle, the object's
    amplitude, period = stream.uniform(*dials.texture), stream.uniform(*periods)

    def paint(x: Values, y: Values, table: Values) -> Values:
        p, q = (c * x + s * y) / period + phase[0], (c * y - s * x) / period + phase[1]
        return color + amplitude * texture(p, q, table)[:, None]

    return part, paint


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
            sides = ((x - a, y - b, r + s) for a, b, s in places)
            if all(math.sqrt(u * u + v * v) / reach >= dials.crowding for u, v, reach in sides):
                places.append((x, y, r))
                break
    return sorted(places, key=lambda place: place[1]) if dials.layout == "road" else places


def _thing(stream: Stream, dials: Dials, hue: float, place: tuple[float, float, float]) -> Layer:
    # The i-th class of things is rarity^i as likely as the first.
    weights = accumulate([1.0] + [dials.rarity] * (len(CLASSES) - NUM_STUFF - 1), operator.mul)
    *bounds, whole = accumulate(weights)
    kind = NUM_STUFF + bisect(bounds, stream.uniform(0.0, whole))
    parts, lean = np.flatnonzero(kind == PART_CLASS).tolist(), CLASSES[kind].lean
    looks = [_look(stream, dials, part, hue + 0.1 * i) for i, part in enumerate(parts)]
    turn, mirrored = direction(stream.uniform(-lean, lean)), stream.uniform() < 0.5
    x, y, radius = (64.0 * each for each in place)
    return Layer(kind, CLASSES[kind].shape, (x, y), radius, turn, mirrored, looks)


def _stuff(stream: Stream, dials: Dials, hues: Sequence[float]) -> Layer:
    """Two kinds, and a wavy border between them."""
    first = stream.integer(0, NUM_STUFF - 1)
    pair, tilt, most = (first, (first + stream.integer(1, NUM_STUFF - 1)) % NUM_STUFF), 0.5, 8.0
    if dials.layout == "road":
        pair = CLASS_NAMES.index("bricks"), CLASS_NAMES.index("waves")  # a wall above a road
        tilt, most = 0.01, 2.0
    looks = [_look(stream, dials, *each) for each in zip(pair, hues)]
    c, s = direction(stream.uniform(-tilt, tilt))
    ranges = (-most, most), (1.0, 4.0), (24.0, 48.0), (0.0, 1.0)
    offset, height, length, phase = (stream.uniform(*each) for each in ranges)

    def halves(u: Values, v: Values) -> Sequence[np.ndarray]:
        x, y = WHOLE * u - 32.0, WHOLE * v - 32.0
        along, across = c * x + s * y, c * y - s * x
        below = across + height * wave(along / length + phase) > offset
        return ~below, below

    return Layer(first, halves, (0.0, 0.0), WHOLE, (1.0, 0.0), False, looks)


def _sketch(stream: Stream, dials: Dials) -> Sketch:
    # The golden section spreads the hues of a scene evenly.
    hues = list(accumulate([stream.uniform()] + [0.618034] * (dials.things[1] + 1)))
    places = _places(stream, dials)
    things = [_thing(stream, dials, *each) for each in zip(hues[2:], places)]
    layers = [_stuff(stream, dials, hues), *things]
    c, s = direction(stream.uniform())
    return Sketch(layers, (dials.light * c, dials.light * s), stream.field(32, 32))


# ----------------------------------------------------------------------------------------- drawing
def _render(sketch: Sketch, dials: Dials, stream: Stream, moves: Sequence = ()) -> Scene:
    """moves (x y), px: of each layer; stream: of the noise."""
    size, nearest = dials.size, len(sketch.layers) - 1
    image, (parts, instance) = np.zeros((size, size, 3)), np.zeros((2, size, size), np.uint8)
    middles = np.arange(size) + 0.5  # of the columns, and of the rows
    for number, layer in enumerate(sketch.layers):
        move = moves[number] if moves else (0, 0)
        # Shifted while exact: no rounding differs.
        x, y = ((middles - by) * (64.0 / size) - at for by, at in zip(move, layer.center))
        ends = -REACH * layer.radius, REACH * layer.radius  # nothing of the layer lies outside
        columns, rows = (slice(*np.searchsorted(along, ends)) for along in (x, y))
        x, y, (c, s) = x[columns], y[rows, None], layer.turn
        x, y = (c * x + s * y) * (-1.0 if layer.mirrored else 1.0), c * y - s * x
        masks = layer.shape(x / layer.radius, y / layer.radius)
        for (part, paint), mask in zip(layer.looks, masks):
            image[rows, columns][mask] = paint(x[mask], y[mask], sketch.table)
            parts[rows, columns][mask], instance[rows, columns][mask] = part, number
    across = 2.0 * middles / size - 1.0  # as y it goes down
    light = 1.0 + sketch.light[0] * across + sketch.light[1] * across[:, None]
    noise = dials.noise * (2.0 * stream.field(size, size, 3) - 1.0)
    image = image * light[..., None] + noise
    return Scene(
        image=np.floor(255.0 * np.clip(image, 0.0, 1.0) + 0.5).astype(np.uint8),
        semantic=PART_CLASS[parts],
        instance=instance,
        parts=parts,
        things=np.array([layer.kind for layer in sketch.layers[1:]], np.uint8),
        depth=(255 * instance.astype(np.int64) // max(nearest, 1)).astype(np.uint8),
    )


def _dials(preset: str, changes: dict) -> Dials:
    if preset not in SCENE_PRESETS:
        raise ValueError(f"no toy preset {preset!r}; there are {', '.join(SCENE_PRESETS)}")
    known = [field.name for field in fields(Dials)]
    if unknown := [name for name in changes if name not in known]:
        raise ValueError(f"no dial {unknown[0]!r}; there are {', '.join(known)}")
    dials = replace(Dials(), **{**SCENE_PRESETS[preset], **changes})
    ranges = dict(size=(16, 4096), things=(0, 254), radius=(0.01, 1), crowding=(0, 9))
    for name in known[:-1]:
        value, (low, high) = getattr(dials, name), ranges.get(name, (0, 1))
        pair = value if isinstance(value, (tuple, list)) else (value, value)
        if not low <= pair[0] <= pair[1] <= high:
            raise ValueError(f"the dial {name} goes from {low} to {high}, found {value}")
    if dials.layout not in ("anywhere", "centered", "road"):
        raise ValueError(f"the dial layout is anywhere, centered or road, found {dials.layout!r}")
    return dials
