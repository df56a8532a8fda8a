"""Procedurally drawn, captioned scenes: the training data of both shipped generators, and what the scene scorer checks.

`Scene` holds the attributes of one picture or clip. `caption` and `parse_caption` are inverses of each other over a
small grammar, `draw_image` and `draw_video` render a scene with random position, size and background tint, and
`is_held_out` defines the split into training and held-out scenes.

Grammar (words only, no punctuation):

    a COLOUR SHAPE
    a COLOUR SHAPE at the left|right|top|bottom
    two|three COLOUR SHAPEs
    a COLOUR SHAPE left of|right of|above|below a COLOUR SHAPE      (the two colours differ)
    a COLOUR SHAPE moving left|right|up|down slowly|quickly         (video)

Coordinates are pixels with the origin at the top left; every drawing is 48 x 48.
Only numpy and PIL are imported, so that reward servers need not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

SIZE = 48  # pixels, both axes
FRAMES = 9  # 1 + 2 * 4: a causal video VAE with 4x temporal compression makes 3 latent frames of it
FPS = 8.0
SUPERSAMPLE = 8  # drawn this much larger, then box-filtered down for smooth edges

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (222, 44, 40),
    "green": (38, 166, 72),
    "blue": (44, 82, 222),
    "yellow": (246, 200, 18),
    "purple": (150, 56, 190),
    "cyan": (24, 186, 206),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
COUNTS = {1: "a", 2: "two", 3: "three"}
POSITIONS = ("left", "right", "top", "bottom")
RELATIONS = ("left of", "right of", "above", "below")
DIRECTIONS = ("left", "right", "up", "down")
SPEEDS = ("slowly", "quickly")

# Colour and shape combinations in no generator's training data and no training prompt: about a fifth of the 24. Every
# colour and every shape occurs in training with others, so they test composition, not vocabulary.
HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {("red", "triangle"), ("green", "square"), ("blue", "cross"), ("yellow", "circle"), ("purple", "square")}
)

# Unit steps (dx, dy) of all words for a side or a direction.
STEPS = {
    "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "up": (0, -1), "down": (0, 1),
    "left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1),
}  # fmt: skip
# Pixels per frame for each speed word; the checker's threshold is between the two ranges.
SPEED_RANGES = {"slowly": (0.85, 1.15), "quickly": (2.2, 2.7)}


@dataclass(frozen=True)
class Scene:
    """Attributes of one scene; None: the caption does not mention it."""

    colour: str
    shape: str
    count: int = 1
    position: str | None = None
    relation: str | None = None
    other_colour: str | None = None
    other_shape: str | None = None
    direction: str | None = None
    speed: str | None = None

    @property
    def is_video(self) -> bool:
        """Whether the scene moves."""
        return self.direction is not None

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The one or two (colour, shape) pairs of the scene."""
        first = (self.colour, self.shape)
        return (first,) if self.relation is None else (first, (self.other_colour or "", self.other_shape or ""))


# ------------------------------------------------------------------------------------------------- language


def caption(scene: Scene) -> str:
    """The caption of `scene`; every scene has exactly one."""
    noun = scene.shape if scene.count == 1 else PLURALS[scene.shape]
    text = f"{COUNTS[scene.count]} {scene.colour} {noun}"
    if scene.position is not None:
        text += f" at the {scene.position}"
    if scene.relation is not None:
        text += f" {scene.relation} a {scene.other_colour} {scene.other_shape}"
    if scene.direction is not None:
        text += f" moving {scene.direction} {scene.speed}"
    return text


def parse_caption(text: str) -> Scene:
    """The scene that a caption describes. Raises ValueError naming the first word that does not fit."""
    words = text.strip().lower().split()
    where = f"caption {text!r}"
    if len(words) < 3:
        raise ValueError(f"{where}: expected at least 'a COLOUR SHAPE'")
    count = next((n for n, word in COUNTS.items() if word == words[0]), None)
    if count is None:
        raise ValueError(f"{where}: must begin with one of {', '.join(COUNTS.values())}, not {words[0]!r}")
    if count > 1:
        singular = {plural: shape for shape, plural in PLURALS.items()}
        colour, shape = _pair(words[1], singular.get(words[2], words[2] + " (not a plural)"), where)
        if words[3:]:
            raise ValueError(f"{where}: nothing may follow {words[2]!r}, found {' '.join(words[3:])!r}")
        return Scene(colour, shape, count)
    colour, shape = _pair(words[1], words[2], where)
    scene, rest = Scene(colour, shape), words[3:]
    if not rest:
        return scene
    if rest[:2] == ["at", "the"] and len(rest) == 3 and rest[2] in POSITIONS:
        return replace(scene, position=rest[2])
    if rest[0] == "moving" and len(rest) == 3 and rest[1] in DIRECTIONS and rest[2] in SPEEDS:
        return replace(scene, direction=rest[1], speed=rest[2])
    for relation in RELATIONS:
        head = relation.split()
        if rest[: len(head)] == head:
            tail = rest[len(head) :]
            if len(tail) != 3 or tail[0] != "a":
                raise ValueError(f"{where}: 'a COLOUR SHAPE' must follow {relation!r}")
            other_colour, other_shape = _pair(tail[1], tail[2], where)
            if other_colour == colour:
                raise ValueError(f"{where}: the two objects of a relation must differ in colour")
            return replace(scene, relation=relation, other_colour=other_colour, other_shape=other_shape)
    raise ValueError(f"{where}: {' '.join(rest)!r} is not a position, a relation or a motion")


def _pair(colour: str, shape: str, where: str) -> tuple[str, str]:
    """(colour, shape) if both are words of the grammar. Raises ValueError."""
    if colour not in PALETTE:
        raise ValueError(f"{where}: {colour!r} is not a colour; one of {', '.join(PALETTE)}")
    if shape not in SHAPES:
        raise ValueError(f"{where}: {shape!r} is not a shape; one of {', '.join(SHAPES)}")
    return colour, shape


def vocabulary() -> list[str]:
    """All words of the grammar, sorted; the word-level tokenizers are built from them."""
    words = {"at", "the", "moving", *PALETTE, *SHAPES, *PLURALS.values(), *COUNTS.values(), *POSITIONS}
    words |= {*DIRECTIONS, *SPEEDS}
    for relation in RELATIONS:
        words |= set(relation.split())
    return sorted(words)


# ---------------------------------------------------------------------------------------------------- split


def is_held_out(scene: Scene) -> bool:
    """Whether the scene contains a held-out (colour, shape) pair."""
    return any(pair in HELD_OUT for pair in scene.pairs)


def all_image_scenes() -> list[Scene]:
    """All image scenes of the grammar in a fixed order: single objects, positions, counts, relations."""
    pairs = [(colour, shape) for colour in PALETTE for shape in SHAPES]
    scenes = [Scene(c, s) for c, s in pairs]
    scenes += [Scene(c, s, position=p) for c, s in pairs for p in POSITIONS]
    scenes += [Scene(c, s, count=n) for c, s in pairs for n in (2, 3)]
    scenes += [
        Scene(c, s, relation=r, other_colour=c2, other_shape=s2)
        for c, s in pairs
        for r in RELATIONS
        for c2, s2 in pairs
        if c2 != c
    ]
    return scenes


def all_video_scenes() -> list[Scene]:
    """All video scenes of the grammar in a fixed order."""
    return [Scene(c, s, direction=d, speed=v) for c in PALETTE for s in SHAPES for d in DIRECTIONS for v in SPEEDS]


def image_prompts(held_out: bool, count: int | None = None) -> list[str]:
    """Distinct image prompts of one side of the split, the same at every call.

    Relations outnumber all other scenes, so only as many are drawn as fill up `count` prompts (default 256 for
    training, 128 held out); all other scenes are kept.
    """
    count = (128 if held_out else 256) if count is None else count
    scenes = [scene for scene in all_image_scenes() if is_held_out(scene) == held_out]
    others = [scene for scene in scenes if scene.relation is None]
    related = [scene for scene in scenes if scene.relation is not None]
    order = np.random.default_rng(20).permutation(len(related))
    chosen = others + [related[i] for i in order[: max(0, count - len(others))]]
    mixed = np.random.default_rng(21).permutation(len(chosen))  # so that the first lines of a file show every kind
    return [caption(chosen[i]) for i in mixed][:count]


def video_prompts(held_out: bool) -> list[str]:
    """Video prompts of one side of the split (152 for training, 40 held out), in a fixed shuffled order."""
    scenes = [scene for scene in all_video_scenes() if is_held_out(scene) == held_out]
    return [caption(scenes[i]) for i in np.random.default_rng(22).permutation(len(scenes))]


def prompt_files() -> dict[str, list[str]]:
    """File name -> lines of the four prompt files in configs/prompts, one caption per line."""
    return {
        "image-train.txt": image_prompts(held_out=False),
        "image-heldout.txt": image_prompts(held_out=True),
        "video-train.txt": video_prompts(held_out=False),
        "video-heldout.txt": video_prompts(held_out=True),
    }


# ------------------------------------------------------------------------------------------------- sampling


def sample_scene(rng: np.random.Generator, video: bool = False, held_out: bool = False) -> Scene:
    """A random scene of one side of the split; the kinds of image scenes have fixed probabilities."""
    while True:
        colour, shape = str(rng.choice(list(PALETTE))), str(rng.choice(SHAPES))
        scene = Scene(colour, shape)
        if video:
            scene = replace(scene, direction=str(rng.choice(DIRECTIONS)), speed=str(rng.choice(SPEEDS)))
        else:
            kind = rng.choice(4, p=(0.12, 0.26, 0.24, 0.38))
            if kind == 1:
                scene = replace(scene, position=str(rng.choice(POSITIONS)))
            elif kind == 2:
                scene = replace(scene, count=int(rng.integers(2, 4)))
            elif kind == 3:
                other = str(rng.choice([c for c in PALETTE if c != colour]))
                scene = replace(
                    scene,
                    relation=str(rng.choice(RELATIONS)),
                    other_colour=other,
                    other_shape=str(rng.choice(SHAPES)),
                )
        if is_held_out(scene) == held_out:
            return scene


def changed(scene: Scene, attribute: str, rng: np.random.Generator) -> Scene:
    """`scene` with `attribute` set to a random different value, such that its caption stays in the grammar."""
    options: dict[str, list] = {
        "colour": [c for c in PALETTE if c != scene.other_colour],
        "other_colour": [c for c in PALETTE if c != scene.colour],
        "shape": list(SHAPES),
        "other_shape": list(SHAPES),
        "count": list(COUNTS),
        "position": list(POSITIONS),
        "relation": list(RELATIONS),
        "direction": list(DIRECTIONS),
        "speed": list(SPEEDS),
    }
    others = [value for value in options[attribute] if value != getattr(scene, attribute)]
    return replace(scene, **{attribute: others[int(rng.integers(len(others)))]})


def stated_attributes(scene: Scene) -> list[str]:
    """Names of the attributes that the caption states and that can be changed independently."""
    names = ["colour", "shape"]
    if scene.position is None and scene.relation is None and scene.direction is None:
        names.append("count")  # the grammar has no 'two circles at the left'
    return names + [
        name
        for name in ("position", "relation", "other_colour", "other_shape", "direction", "speed")
        if getattr(scene, name) is not None
    ]


def wrong_caption(scene: Scene, rng: np.random.Generator, p: float = 0.35, further: float = 0.45) -> str:
    """A training caption: correct with probability 1 - p, else with attributes replaced at random.

    One attribute is replaced, and each further one with probability `further`. Wrong captions make the shipped models
    imperfect on purpose: pictures are clean but follow the prompt only partly, which leaves reinforcement learning
    something to improve. No caption contains a held-out pair.
    """
    if rng.random() >= p:
        return caption(scene)
    names = stated_attributes(scene)
    first = int(rng.integers(len(names)))
    while True:
        altered = scene
        for index, name in enumerate(names):
            if index == first or rng.random() < further:
                altered = changed(altered, name, rng)
        if not is_held_out(altered):
            return caption(altered)


# -------------------------------------------------------------------------------------------------- drawing


def shape_polygon(shape: str) -> np.ndarray | None:
    """Corners float [N, 2] of a polygonal shape, in the box [-1, 1]^2; None for the circle."""
    if shape == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=float) * 0.9
    if shape == "triangle":
        return np.array([(0, -0.95), (1.05, 0.9), (-1.05, 0.9)], dtype=float)
    if shape == "cross":
        a = 0.34
        corners = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a)]
        return np.array([*corners, (-1, -a), (-a, -a)], dtype=float)
    return None


def paint(canvas: ImageDraw.ImageDraw, shape: str, colour: tuple[int, int, int], x: float, y: float, r: float):
    """Draws a filled shape of "radius" `r` centred at (x, y), all in canvas pixels."""
    corners = shape_polygon(shape)
    if corners is None:
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    else:
        canvas.polygon([(x + r * px, y + r * py) for px, py in corners], fill=colour)


def render(objects: list[tuple[str, str, float, float, float]], background: tuple[int, int, int]) -> np.ndarray:
    """Frame uint8 [48, 48, 3] of `objects` (colour, shape, x, y, radius) on a plain background."""
    side = SIZE * SUPERSAMPLE
    image = Image.new("RGB", (side, side), background)
    canvas = ImageDraw.Draw(image)
    for colour, shape, x, y, r in objects:
        paint(canvas, shape, PALETTE[colour], x * SUPERSAMPLE, y * SUPERSAMPLE, r * SUPERSAMPLE)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.uint8)


def random_background(rng: np.random.Generator) -> tuple[int, int, int]:
    """A pale, almost neutral colour."""
    level = rng.uniform(222, 244)
    return tuple(int(v) for v in np.clip(level + rng.uniform(-6, 6, 3), 0, 255))  # type: ignore[return-value]


def place_objects(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str, float, float, float]]:
    """Random positions and sizes, in pixels, that satisfy an image scene with a margin."""
    mid = SIZE / 2
    if scene.relation is not None:
        dx, dy = STEPS[scene.relation]
        r1, r2 = rng.uniform(6.8, 8.2, 2)
        gap = (r1 + r2) * 1.05 + rng.uniform(2.5, 6.0)  # centre to centre along the named axis
        drift = rng.uniform(-4.5, 4.5)
        reach = SIZE - 2 * 9.2
        along = rng.uniform(-1, 1) * max(0.0, reach - gap) / 2
        across = rng.uniform(-1, 1) * (reach - abs(drift)) / 2 * 0.6
        cx, cy = (mid + along, mid + across) if dx else (mid + across, mid + along)
        hx, hy = (dx * gap / 2, drift / 2) if dx else (drift / 2, dy * gap / 2)
        return [
            (scene.colour, scene.shape, cx + hx, cy + hy, r1),
            (scene.other_colour or "", scene.other_shape or "", cx - hx, cy - hy, r2),
        ]
    if scene.count > 1:
        r = rng.uniform(6.2, 7.4)
        centres: list[np.ndarray] = []
        while len(centres) < scene.count:
            centre = rng.uniform(r * 1.05 + 1.5, SIZE - r * 1.05 - 1.5, 2)
            # Bounding boxes are disjoint, so that no two shapes touch.
            if all(np.abs(centre - c).max() > 2.1 * r + 2.5 for c in centres):
                centres.append(centre)
            elif rng.random() < 0.02:
                centres.clear()  # no room may be left for another object: start over
        return [(scene.colour, scene.shape, float(x), float(y), float(r)) for x, y in centres]
    r = float(rng.uniform(7.5, 10.0))
    if scene.position is None:
        x, y = mid + rng.uniform(-5, 5, 2)
    else:
        dx, dy = STEPS[scene.position]
        off, drift = rng.uniform(9.0, SIZE / 2 - 1.5 - r * 1.05), rng.uniform(-4.0, 4.0)
        x, y = (mid + dx * off, mid + drift) if dx else (mid + drift, mid + dy * off)
    return [(scene.colour, scene.shape, float(x), float(y), r)]


def draw_image(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Picture uint8 [48, 48, 3] of an image scene (of a moving scene: its object at rest)."""
    return render(place_objects(scene, rng), random_background(rng))


def draw_video(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Clip uint8 [9, 48, 48, 3] of a moving scene: constant velocity, inside the frame throughout."""
    dx, dy = STEPS[scene.direction or "left"]
    r = float(rng.uniform(8.0, 9.5))
    travel = rng.uniform(*SPEED_RANGES[scene.speed or "slowly"]) * (FRAMES - 1)
    margin = r * 1.05 + 0.5
    reach = SIZE - 2 * margin
    along = rng.uniform(-1, 1) * (reach - travel) / 2  # where the middle of the path lies
    across = rng.uniform(-1, 1) * reach / 2
    background = random_background(rng)
    frames = []
    for t in np.linspace(-0.5, 0.5, FRAMES):
        a = along + t * travel * (dx + dy)
        x, y = (a, across) if dx else (across, a)
        frames.append(render([(scene.colour, scene.shape, SIZE / 2 + x, SIZE / 2 + y, r)], background))
    return np.stack(frames)
