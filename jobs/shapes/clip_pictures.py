"""Pictures that `shapes-clip` learns from: drawn scenes, clean and botched, and how far each caption is true of them.

The labels come from what was drawn, never from the scene checker. A botched object lies between two shapes or two
colours, is stretched, dented, two-toned or faded, as in the takes of an imperfect generator; its label then is a
share of each.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import permutations

import numpy as np
from PIL import Image, ImageDraw

from pipeline.rewards.models import scene_world
from pipeline.rewards.models.scene_world import PALETTE, POSITIONS, RELATIONS, SHAPES, SIZE, SUPERSAMPLE, Scene

SLOTS = 6  # most objects that a label has room for: three, each two-toned
ANGLES = np.arange(96) / 96 * 2 * np.pi  # directions of an outline's corners
CENTRE = 3.0  # pixels: an object nearer to the centre than this is on no side of the frame
VISIBLE = 88.0  # RGB distance from the background below which an object is not there
COLOURS = np.array(list(PALETTE.values()), dtype=np.float32)
SCENES = scene_world.all_image_scenes()
CAPTIONS = [scene_world.caption(scene) for scene in SCENES]
DRAWS = {"single": 160, "position": 50, "count": 80, "relation": 4}  # how often each scene is drawn


@dataclass(frozen=True)
class Pictures:
    """P pictures and what is in them. A slot without an object has area 0."""

    pixels: np.ndarray  # uint8 [P, 48, 48, 3]
    colours: np.ndarray  # float32 [P, SLOTS, 6], share of each palette colour
    shapes: np.ndarray  # float32 [P, SLOTS, 4], share of each shape
    places: np.ndarray  # float32 [P, SLOTS, 4]: x, y, radius and area in pixels
    scenes: np.ndarray  # int64 [P], the scene of SCENES that was to be drawn
    redrawn: np.ndarray  # bool [P], whether a generator made the pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, rows: np.ndarray) -> Pictures:
        """The given rows."""
        return Pictures(*(getattr(self, field.name)[rows] for field in fields(self)))


def joined(parts: list[Pictures]) -> Pictures:
    """All pictures of several sets, in order."""
    return Pictures(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Pictures)))


def kind_of(scene: Scene) -> str:
    """Key of DRAWS."""
    if scene.relation is not None:
        return "relation"
    return "count" if scene.count > 1 else "single" if scene.position is None else "position"


# -------------------------------------------------------------------------------------------------- drawing


def _outline(shape: str) -> np.ndarray:
    """Distance of the shape's edge from its centre in each direction, float [96]."""
    corners = scene_world.shape_polygon(shape)
    if corners is None:
        return np.ones(len(ANGLES))
    start, edge = corners, np.roll(corners, -1, axis=0) - corners
    ray = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)[:, None]  # a ray hits an edge where both factors fit
    with np.errstate(divide="ignore", invalid="ignore"):
        across = ray[..., 0] * edge[:, 1] - ray[..., 1] * edge[:, 0]
        distance = (start[:, 0] * edge[:, 1] - start[:, 1] * edge[:, 0]) / across
        along = (start[:, 0] * ray[..., 1] - start[:, 1] * ray[..., 0]) / across
    hit = (distance > 0) & (along > -1e-9) & (along < 1 + 1e-9)
    return np.where(hit, distance, 0.0).max(axis=1)


OUTLINES = np.stack([_outline(shape) for shape in SHAPES])


@dataclass
class _Object:
    """One object to draw, and its label."""

    corners: np.ndarray  # float [96, 2], pixels
    fill: np.ndarray  # RGB
    colours: np.ndarray
    shapes: np.ndarray
    place: tuple[float, float, float, float]


def _share(amount: float, low: float, high: float) -> float:
    """1 up to `low`, 0 from `high` on, a straight line between."""
    return float(np.clip((high - amount) / (high - low), 0, 1))


def _objects(
    what: tuple[str, str, float, float, float], background: np.ndarray, rng: np.random.Generator, botch: float
) -> list[_Object]:
    """One object, in which each property is off by a random amount with probability `botch`; two if two-toned."""
    colour, shape, x, y, r = what
    i, k = list(PALETTE).index(colour), SHAPES.index(shape)
    colours, shapes = np.zeros(len(PALETTE), np.float32), np.zeros(len(SHAPES), np.float32)
    outline, fill = OUTLINES[k], COLOURS[i]
    colours[i] = shapes[k] = 1.0
    other, mix = int(rng.integers(len(SHAPES))), rng.random()
    if rng.random() < botch and other != k:
        outline = (1 - mix) * outline + mix * OUTLINES[other]
        shapes[k], shapes[other] = _share(mix, 0.35, 0.65), _share(1 - mix, 0.35, 0.65)
    if rng.random() < botch:  # dented
        depth = rng.uniform(0, 0.3)
        waves = [np.sin(n * ANGLES + rng.uniform(0, 2 * np.pi)) * rng.uniform(0.3, 1) for n in (2, 3, 4)]
        outline, shapes = outline * (1 + depth / 2 * sum(waves)), shapes * _share(depth, 0.2, 0.4)
    stretch = float(np.exp(rng.normal() * 0.18)) if rng.random() < botch else 1.0
    shapes = shapes * _share(2 * abs(np.log(stretch)), 0.3, 0.5)
    other, mix = int(rng.integers(len(PALETTE))), rng.random()
    if rng.random() < botch and other != i:
        fill = (1 - mix) * fill + mix * COLOURS[other]
        colours[i], colours[other] = _share(mix, 0.3, 0.5), _share(1 - mix, 0.3, 0.5)
    if rng.random() < botch / 2:
        faded = rng.random()
        fill, colours = (1 - faded) * fill + faded * background, colours * _share(faded, 0.25, 0.5)
    offsets = r * outline[:, None] * np.stack([np.cos(ANGLES) * stretch, np.sin(ANGLES) / stretch], axis=1)
    following = np.roll(offsets, -1, axis=0)
    area = 0.5 * float(abs((offsets[:, 0] * following[:, 1] - offsets[:, 1] * following[:, 0]).sum()))
    area *= float(np.linalg.norm(fill - background) > VISIBLE)
    whole = _Object(offsets + (x, y), fill, colours, shapes, (x, y, r, area))
    return _two_toned(whole, rng) if rng.random() < botch / 3 else [whole]


def _two_toned(whole: _Object, rng: np.random.Generator) -> list[_Object]:
    """The object with another colour on one side of a line through its centre: two objects of no shape."""
    angle, (x, y, r, area) = rng.uniform(0, 2 * np.pi), whole.place
    normal, none = np.array([np.cos(angle), np.sin(angle)]), np.zeros_like(whole.shapes)
    behind = np.minimum((whole.corners - (x, y)) @ normal, 0.0)
    i = int(rng.integers(len(PALETTE)))
    dx, dy = normal * r / 2
    return [
        _Object(whole.corners, whole.fill, whole.colours, none, (x - dx, y - dy, r / 2, area / 2)),
        _Object(
            whole.corners - behind[:, None] * normal,
            COLOURS[i],
            np.eye(len(PALETTE), dtype=np.float32)[i],
            none,
            (x + dx, y + dy, r / 2, area / 2),
        ),
    ]


def _placed(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str, float, float, float]]:
    """As the generators' training data place it: single objects also wherever a clip's path may lead them."""
    if kind_of(scene) == "single" and rng.random() < 0.7:
        r = float(rng.uniform(8.0, 9.5))
        x, y = rng.uniform(r * 1.05, SIZE - r * 1.05, 2)
        return [(scene.colour, scene.shape, float(x), float(y), r)]
    return scene_world.place_objects(scene, rng)


def draw_pictures(scenes: list[int], rng: np.random.Generator, botch: float) -> Pictures:
    """A picture of each scene (index into SCENES). `botch`: how likely each property of an object is off."""
    count, side = len(scenes), SIZE * SUPERSAMPLE
    pixels = np.zeros((count, SIZE, SIZE, 3), np.uint8)
    colours, shapes = np.zeros((count, SLOTS, len(PALETTE)), np.float32), np.zeros((count, SLOTS, 4), np.float32)
    places = np.zeros((count, SLOTS, 4), np.float32)
    for row, scene in enumerate(scenes):
        background = np.array(scene_world.random_background(rng), np.float32)
        image = Image.new("RGB", (side, side), tuple(background.astype(int)))
        canvas = ImageDraw.Draw(image)
        slot = 0
        for what in _placed(SCENES[scene], rng):
            for item in _objects(what, background, rng, botch):
                fill = tuple(int(value) for value in item.fill)
                canvas.polygon([(px, py) for px, py in item.corners * SUPERSAMPLE], fill=fill)
                colours[row, slot], shapes[row, slot], places[row, slot] = item.colours, item.shapes, item.place
                slot += 1
        pixels[row] = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))
    return Pictures(pixels, colours, shapes, places, np.asarray(scenes), np.zeros(count, bool))


# -------------------------------------------------------------------------------------------------- captions


def _sides(dx: np.ndarray, dy: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """Whether displacements [...] point to the side that each name stands for, float32 [..., names]."""
    steps = np.array([scene_world.STEPS[name] for name in names])
    along = dx[..., None] * steps[:, 0] + dy[..., None] * steps[:, 1]
    longest = np.maximum(abs(dx), abs(dy))[..., None]
    return ((along >= longest) & (longest >= CENTRE)).astype(np.float32)


def caption_credits(pictures: Pictures, captions: np.ndarray) -> np.ndarray:
    """How far each of the captions (indices into CAPTIONS) is true of each picture, float32 [P, captions].

    The mean over the attributes that the caption states. Colour and shape: the share of the objects that have it (of a
    relation's two objects, matched at their best); count: 1 less the relative error; position: of the largest object;
    relation: between the two objects matched.
    """
    there = (pictures.places[..., 3] > 0).astype(np.float32)  # [P, SLOTS]
    seen = there.sum(1, keepdims=True)
    count = np.maximum(0, 1 - abs(seen - WANTED[captions]) / WANTED[captions])
    result = np.zeros((len(pictures), len(captions)), np.float32)

    plain = np.flatnonzero(RELATION[captions] < 0)
    chosen, share = captions[plain], (there / np.maximum(seen, 1))[..., None]
    total = (share * pictures.colours).sum(1)[:, COLOUR[chosen]] + (share * pictures.shapes).sum(1)[:, SHAPE[chosen]]
    largest = pictures.places[np.arange(len(pictures)), pictures.places[..., 3].argmax(1)]
    side = _sides(largest[:, 0] - SIZE / 2, largest[:, 1] - SIZE / 2, POSITIONS) * (seen > 0)
    placed = POSITION[chosen] >= 0
    total[:, placed] += side[:, POSITION[chosen][placed]]
    result[:, plain] = (total + count[:, plain]) / np.where(placed, 4, 3)

    pairs = np.flatnonzero(RELATION[captions] >= 0)
    chosen = captions[pairs]
    best = np.zeros((len(pictures), len(pairs)), np.float32)
    colours, shapes = there[..., None] * pictures.colours, there[..., None] * pictures.shapes
    slots = int(seen.max(initial=1))
    for first, second in permutations([*range(slots), None], 2):
        credit, likes = np.zeros_like(best), []
        for slot, colour, shape in ((first, COLOUR, SHAPE), (second, OTHER_COLOUR, OTHER_SHAPE)):
            if slot is not None:
                of_colour, of_shape = colours[:, slot][:, colour[chosen]], shapes[:, slot][:, shape[chosen]]
                credit += (of_colour + of_shape) / 2
                likes.append(np.maximum(of_colour, of_shape))
        if len(likes) == 2:
            apart = pictures.places[:, first] - pictures.places[:, second]
            held = _sides(apart[:, 0], apart[:, 1], RELATIONS)[:, RELATION[chosen]]
            credit += held * likes[0] * likes[1]
        np.maximum(best, credit, out=best)
    result[:, pairs] = (best + count[:, pairs]) / 4
    return result


def _index(names: tuple[str, ...], attribute: str) -> np.ndarray:
    """Place of each scene's attribute in `names`, -1 without one, int [SCENES]."""
    values = [getattr(scene, attribute) for scene in SCENES]
    return np.array([-1 if value is None else names.index(value) for value in values])


COLOUR, OTHER_COLOUR = _index(tuple(PALETTE), "colour"), _index(tuple(PALETTE), "other_colour")
SHAPE, OTHER_SHAPE = _index(SHAPES, "shape"), _index(SHAPES, "other_shape")
POSITION, RELATION = _index(POSITIONS, "position"), _index(RELATIONS, "relation")
WANTED = np.where(RELATION >= 0, 2, np.array([scene.count for scene in SCENES]))
