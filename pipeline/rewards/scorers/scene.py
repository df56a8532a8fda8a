"""The scene checker: reads attributes off pixels and gives credit for each one the caption asks for.

No model is involved.  Objects are what stands out from the (plain) background; each is named by the palette
colour most of its pixels are nearest to and by the shape template its mask fits best.  A blob that is no clear
colour or fits no template gets no credit for that attribute, so smears are not rewarded by accident.

The functions work on any frame size; thresholds are fractions of the frame or of a 48-pixel frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from pipeline.core.errors import RewardError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer, register
from pipeline.rewards.models import scene_world

CONTRAST = 88.0  # RGB distance from the background at which a pixel is object: about half of an edge's blend
SPECK = 26 / scene_world.SIZE**2  # components smaller than this fraction of the frame are ignored
GRID = 24  # masks are compared with the templates at this resolution
MIN_FIT = 0.74  # least overlap (intersection over union) with a template to be called that shape
MIN_PURITY = 0.6  # least share of an object's pixels that agree on its colour
MAX_COLOUR_ERROR = 80.0  # RGB distance of an object's median colour from its palette entry
CENTRE = 3.0 / scene_world.SIZE  # an object nearer to the centre than this is on no side of the frame
SPEED_CUT = 1.65 / scene_world.SIZE  # fraction of the frame per frame step: between the slow and the quick range
STILL = 0.3 / scene_world.SIZE  # slower than this does not count as moving

_NAMES = tuple(scene_world.PALETTE)
_COLOURS = np.array([scene_world.PALETTE[name] for name in _NAMES], dtype=np.float32)
_LENGTHS = (_COLOURS**2).sum(1)
_WITHIN_A_FRAME = np.array([np.zeros((3, 3)), ndimage.generate_binary_structure(2, 1), np.zeros((3, 3))])
_AT_ONCE = 16  # frames: their pixels stay in a core's cache


@dataclass(frozen=True)
class SeenObject:
    """One object seen in a frame."""

    colour: str | None
    shape: str | None
    x: float  # centre of its bounding box, as a fraction of the frame
    y: float
    area: int  # pixels


@lru_cache(maxsize=1)
def _templates() -> np.ndarray:
    """Each shape's mask stretched to fill its bounding box, float32 [shapes, GRID * GRID] of 0 and 1."""
    result = []
    for shape in scene_world.SHAPES:
        side = 400
        image = Image.new("L", (side, side), 0)
        canvas = ImageDraw.Draw(image)
        corners = scene_world.shape_polygon(shape)
        if corners is None:
            canvas.ellipse((0, 0, side - 1, side - 1), fill=255)
        else:
            low, high = corners.min(0), corners.max(0)
            canvas.polygon([tuple(p) for p in (corners - low) / (high - low) * (side - 1)], fill=255)
        result.append(np.asarray(image.resize((GRID, GRID), Image.Resampling.BOX)).ravel() > 127)
    return np.array(result, np.float32)


def _name_shape(mask: np.ndarray) -> str | None:
    """Shape of one object's mask bool [h, w] cropped to its bounding box, or None."""
    height, width = mask.shape
    if not 0.66 < width / height < 1.5:
        return None
    image = Image.fromarray(mask.astype(np.uint8) * 255).resize((GRID, GRID), Image.Resampling.BILINEAR)
    seen = np.asarray(image).ravel() > 127
    templates = _templates()
    both = templates @ seen.astype(np.float32)  # exact: small whole numbers
    fits = both / (templates.sum(1) + np.count_nonzero(seen) - both)
    best = int(fits.argmax())
    return scene_world.SHAPES[best] if fits[best] >= MIN_FIT else None


def _median(rows: np.ndarray) -> np.ndarray:
    """As np.median over the last axis but one, which is several times slower on few rows; float32."""
    ordered, middle = np.sort(rows.swapaxes(-1, -2), axis=-1), rows.shape[-2] // 2
    if rows.shape[-2] % 2:
        return ordered[..., middle].astype(np.float32)
    return (ordered[..., middle - 1].astype(np.float32) + ordered[..., middle]) / 2


def _squared(offset: np.ndarray) -> np.ndarray:
    """Squared length of RGB offsets [..., 3]."""
    return np.einsum("...i,...i", offset, offset)


def find_objects(frame: np.ndarray, named: bool = True) -> list[SeenObject]:
    """Objects of a frame uint8 [H, W, 3], largest first. `named` False: without their colour and shape."""
    return find_in_frames(frame[None], named)[0]


def find_in_frames(frames: np.ndarray, named: bool = True) -> list[list[SeenObject]]:
    """`find_objects` of each of the frames uint8 [N, H, W, 3]; a call per frame costs twice the time."""
    objects: list[list[SeenObject]] = []
    for at in range(0, len(frames), _AT_ONCE):
        objects += _find(frames[at : at + _AT_ONCE], named)
    return objects


def _find(frames: np.ndarray, named: bool) -> list[list[SeenObject]]:
    count, height, width = frames.shape[:3]
    edges = (frames[:, :2], frames[:, -2:], frames[:, :, :1], frames[:, :, -1:])
    background = _median(np.concatenate([edge.reshape(count, -1, 3) for edge in edges], axis=1))
    far = _squared(frames - background[:, None, None]) > CONTRAST**2
    nearest = np.zeros(far.shape, np.int64)  # only set for pixels that are object
    nearest[far] = (_LENGTHS - 2 * (frames[far].astype(np.float32) @ _COLOURS.T)).argmin(-1)
    least = SPECK * height * width
    objects: list[list[SeenObject]] = [[] for _ in frames]
    labels, _ = ndimage.label(far, _WITHIN_A_FRAME)
    areas = np.bincount(labels.ravel())
    for label, (in_time, *box) in enumerate(ndimage.find_objects(labels), start=1):
        if areas[label] < least:
            continue
        place = (in_time.start, *box)
        mask = labels[place] == label
        for part in _split_colours(mask, nearest[place], least):
            (top, bottom), (left, right) = _extent(part.any(axis=1)), _extent(part.any(axis=0))
            objects[in_time.start].append(
                SeenObject(
                    colour=_name_colour(frames[place][part], nearest[place][part]) if named else None,
                    shape=_name_shape(part[top:bottom, left:right]) if named else None,
                    x=(box[1].start + (left + right) / 2) / width,
                    y=(box[0].start + (top + bottom) / 2) / height,
                    area=int(np.count_nonzero(part)),
                )
            )
    return [sorted(items, key=lambda item: -item.area) for items in objects]


def _extent(seen: Any) -> tuple[int, int]:
    """[first, last + 1) of the True places of an array bool [N]."""
    return int(seen.argmax()), len(seen) - int(seen[::-1].argmax())


def _split_colours(mask: np.ndarray, nearest: np.ndarray, least: float) -> list[np.ndarray]:
    """One mask per object: touching objects of different colours are one blob until parted here."""
    inside = nearest[mask]
    shares = np.bincount(inside, minlength=len(_NAMES)) / len(inside)
    strong = np.flatnonzero(shares > 0.25)
    if len(strong) < 2:
        return [mask]
    parts = []
    for colour in strong:
        labels, count = ndimage.label(mask & (nearest == colour))
        parts += [labels == i for i in range(1, count + 1) if (labels == i).sum() >= least]
    return parts or [mask]


def _name_colour(pixels: np.ndarray, nearest: np.ndarray) -> str | None:
    """Palette name of an object from its pixels uint8 [N, 3] and their nearest palette indices [N], or None."""
    votes = np.bincount(nearest, minlength=len(_NAMES))
    best = int(votes.argmax())
    off = _squared(_median(pixels) - _COLOURS[best])
    return _NAMES[best] if votes[best] >= MIN_PURITY * len(nearest) and off < MAX_COLOUR_ERROR**2 else None


def _dominant(dx: float, dy: float, least: float, names: dict[tuple[int, int], str]) -> str | None:
    """Name of the side a displacement points to: the larger component decides and must reach ``least``."""
    if max(abs(dx), abs(dy)) < least:
        return None
    step = (int(np.sign(dx)), 0) if abs(dx) > abs(dy) else (0, int(np.sign(dy)))
    return names[step]


_SIDES = {scene_world.STEPS[name]: name for name in scene_world.POSITIONS}
_RELATIONS = {scene_world.STEPS[name]: name for name in scene_world.RELATIONS}
_DIRECTIONS = {scene_world.STEPS[name]: name for name in scene_world.DIRECTIONS}


def check_image(frame: np.ndarray, caption: str) -> dict[str, float]:
    """Credit in [0, 1] for each attribute ``caption`` asks of one frame uint8 [H, W, 3].

    Keys: ``colour``, ``shape``, ``count`` always; ``position`` or ``relation`` where the caption has one.  Of a
    moving scene's caption a single frame is checked for the object only.  An empty frame has credit nowhere.
    """
    return _credits(find_objects(frame), caption)


def _credits(objects: list[SeenObject], caption: str) -> dict[str, float]:
    scene = scene_world.parse_caption(caption)
    if scene.relation is not None:
        return _check_relation(objects, scene)
    credits = {
        "colour": 0.0,
        "shape": 0.0,
        "count": max(0.0, 1 - abs(len(objects) - scene.count) / scene.count),
    }
    if scene.position is not None:
        credits["position"] = 0.0
    if objects:
        credits["colour"] = float(np.mean([item.colour == scene.colour for item in objects]))
        credits["shape"] = float(np.mean([item.shape == scene.shape for item in objects]))
        if scene.position is not None:
            side = _dominant(objects[0].x - 0.5, objects[0].y - 0.5, CENTRE, _SIDES)
            credits["position"] = float(side == scene.position)
    return credits


def _check_relation(objects: list[SeenObject], scene: scene_world.Scene) -> dict[str, float]:
    """Credits of a two-object caption: the objects seen are matched to the two named ones at their best."""
    named = scene.pairs
    best = {"colour": 0.0, "shape": 0.0, "relation": 0.0}
    seats: list[SeenObject | None] = [*objects[:4], None]
    for chosen in permutations(seats + [None], 2):
        colours = [item is not None and item.colour == pair[0] for item, pair in zip(chosen, named, strict=True)]
        shapes = [item is not None and item.shape == pair[1] for item, pair in zip(chosen, named, strict=True)]
        credits = {"colour": float(np.mean(colours)), "shape": float(np.mean(shapes)), "relation": 0.0}
        first, second = chosen
        # An object counts as the named one if its colour, or failing that its shape, says so.
        if first is not None and second is not None and all(c or s for c, s in zip(colours, shapes, strict=True)):
            seen = _dominant(first.x - second.x, first.y - second.y, CENTRE, _RELATIONS)
            credits["relation"] = float(seen == scene.relation)
        if sum(credits.values()) > sum(best.values()):
            best = credits
    return best | {"count": max(0.0, 1 - abs(len(objects) - 2) / 2)}


def check_motion(frames: np.ndarray, caption: str) -> dict[str, float]:
    """Credit for ``direction`` and ``speed`` of a clip uint8 [F, H, W, 3]; nothing where nothing moves.

    The largest object's centre is fitted with a straight line over the frames in which one is seen, which must be
    most of them.  The speed words are distinguished by the line's slope, in frame widths per frame step.
    """
    scene = scene_world.parse_caption(caption)
    if not scene.is_video:
        raise ValueError(f"caption {caption!r} names no motion")
    credits = {"direction": 0.0, "speed": 0.0}
    objects_by_frame = find_in_frames(frames, named=False)
    seen = [(t, objects[0]) for t, objects in enumerate(objects_by_frame) if objects]
    if len(seen) < max(2, 0.6 * len(frames)):
        return credits
    times = np.array([t for t, _ in seen], dtype=float)
    dx = float(np.polyfit(times, [item.x for _, item in seen], 1)[0])
    dy = float(np.polyfit(times, [item.y for _, item in seen], 1)[0])
    along, across = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if along < STILL:
        return credits
    straight = across < 0.6 * along
    credits["direction"] = float(straight and _dominant(dx, dy, STILL, _DIRECTIONS) == scene.direction)
    credits["speed"] = float(("quickly" if along > SPEED_CUT else "slowly") == scene.speed)
    return credits


def _columns(credits: Sequence[dict[str, float]]) -> dict[str, np.ndarray]:
    """Scores and parts, float32 [K] each, of K takes' credits; a part a caption does not ask for is NaN."""
    score = np.array([np.mean(list(row.values())) for row in credits], dtype=np.float32)
    names = sorted({name for row in credits for name in row})
    return {"score": score} | {
        name: np.array([row.get(name, np.nan) for row in credits], dtype=np.float32) for name in names
    }


def _in_grammar(prompt: PromptItem, video: bool = False) -> str:
    """The prompt's text, or a RewardError where the checker cannot judge it."""
    try:
        scene = scene_world.parse_caption(prompt.text)
    except ValueError as error:
        raise RewardError(f"the scene checker cannot judge this prompt: {error}") from error
    if video and not scene.is_video:
        raise RewardError(f"the motion checker needs a caption with a motion, not {prompt.text!r}")
    return prompt.text


@register("scene")
class SceneScorer(Scorer):
    """Does one frame show what the caption says?  Mean credit over the attributes it names."""

    reads = "frame"
    gradient_note = "it reads shapes by rules; use clip_score with a CLIP of the shapes, and this one for evaluation"

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> dict[str, np.ndarray]:
        """Scores and parts float32 [K] of ``media.frames`` uint8 [K, 1, H, W, 3]."""
        texts = [_in_grammar(prompt) for prompt in prompts]
        objects_by_take = find_in_frames(media.frames[:, 0])
        return _columns([_credits(objects, text) for objects, text in zip(objects_by_take, texts, strict=True)])


@register("motion")
class MotionScorer(Scorer):
    """Does the object move the way and at the pace the caption says?  Mean of the two credits."""

    reads = "video"
    needs_clip = True
    gradient_note = "it reads shapes by rules; use clip_score with a CLIP of the shapes, and this one for evaluation"

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> dict[str, np.ndarray]:
        """Scores and parts float32 [K] of ``media.frames`` uint8 [K, F, H, W, 3]."""
        texts = [_in_grammar(prompt, video=True) for prompt in prompts]
        return _columns([check_motion(take, text) for take, text in zip(media.frames, texts, strict=True)])
