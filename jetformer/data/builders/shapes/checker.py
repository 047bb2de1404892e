"""Reads images and captions of `shapes` back and scores them. Nothing is learned.

An image is read by fitting: its foreground is segmented into pieces of one colour, and a piece has the shape and size
of the drawing that covers it best. It also reads generated images, which are slightly blurred and have specks, which it
ignores.
"""

import functools
import itertools
import re

import numpy as np
from scipy import ndimage, optimize

from jetformer.data.builders.shapes.shapes import (
    BACKGROUNDS,
    CELL_CENTRES,
    COLOURS,
    IMAGE_SIZE,
    POSITION_FIRST,
    POSITIONS,
    SHAPES,
    SIZES,
    TEMPLATES,
    UNIT,
    Object,
    Scene,
    coverage,
    position_phrase,
)

ATTRIBUTES = ("count", "shape", "colour", "size", "position", "background")
Score = dict[str, tuple[int, int]]

_OBJECT_ATTRIBUTES = ("shape", "colour", "size", "position")

# ---- Images. -------------------------------------------------------------------------------------

# Smaller pieces are specks: the smallest object, a cross, covers 23 pixels.
_MIN_PIXELS = 8
_TEMPLATE_SIZE = 17  # pixels: the largest object, and two on each side
_RADII = range(44, 101, 4)  # in sixteenths of a pixel, slightly beyond both sizes
_LARGE = (SIZES["small"][1] + SIZES["large"][0]) / 2
# Standard deviation in pixels. Blurred templates read sharp objects equally well, blurred ones better.
_BLUR = 0.7
_STEPS = 4  # of template centres per pixel
# Maximum deviation of a background's channel, in levels: includes any grey, excludes colours.
_BACKGROUND_TOLERANCE = 60


def read_scene(image: np.ndarray) -> Scene:
    """Reads the scene of an image, with everything named, objects in the order of `POSITIONS`.

    If most of the image is coloured, the scene has no objects, and its background is None.

    Args:
      image: uint8 [32, 32, 3].

    Raises:
      ValueError: the image has another shape or type.
    """
    pieces, background = _read(image)
    return Scene(tuple(sorted((o for _, o in pieces), key=lambda o: POSITIONS.index(o.position))), background)


def _read(image: np.ndarray) -> tuple[list[tuple[int, Object]], str | None]:
    """Returns objects with their numbers of pixels, and the background; see `read_scene`."""
    if image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(f"an image is uint8 [{IMAGE_SIZE}, {IMAGE_SIZE}, 3], not {image.dtype} {list(image.shape)}")
    pixels = image.astype(np.float64)
    # Objects cover less than half of it.
    background = np.median(pixels, axis=(0, 1))
    name = min(BACKGROUNDS, key=lambda b: abs(background.mean() - BACKGROUNDS[b]))
    if abs(background - BACKGROUNDS[name]).max() > _BACKGROUND_TOLERANCE:
        return [], None

    # A pixel of an object's edge is on the line from the background to the object's colour: `alpha`
    # is how far along, and the pixel's colour is the one whose line is nearest. [6, 32, 32]
    lines = np.array(list(COLOURS.values())) - background
    offsets = pixels - background
    alphas = np.einsum("hwc,kc->khw", offsets, lines) / (lines**2).sum(-1)[:, None, None]
    nearest = np.clip(alphas, 0, 1)[..., None] * lines[:, None, None]
    colour_of = ((offsets - nearest) ** 2).sum(-1).argmin(0)
    covered = np.take_along_axis(alphas, colour_of[None], 0)[0] > 0.5

    objects = []
    for k, colour in enumerate(COLOURS):
        pieces, num_pieces = ndimage.label(covered & (colour_of == k))
        for i in range(1, num_pieces + 1):
            piece = pieces == i
            if piece.sum() < _MIN_PIXELS:
                continue
            # With its edge, but without other pieces.
            around = ndimage.binary_dilation(piece, np.ones((3, 3))) & ~(covered & ~piece)
            objects.append((int(piece.sum()), _read_object(colour, np.clip(alphas[k], 0, 1) * around)))
    return objects, name


def _read_object(colour: str, cover: np.ndarray) -> Object:
    """Fits drawings to the coverage of a piece, [32, 32] in [0, 1]."""
    y, x = (np.average(i, weights=cover) for i in np.indices(cover.shape))
    # A window around the centroid, which is between the window's central pixel and the next.
    half = _TEMPLATE_SIZE // 2
    top, left = int(y), int(x)
    window = np.pad(cover, half)[top : top + _TEMPLATE_SIZE, left : left + _TEMPLATE_SIZE]
    names, centres, templates = _templates(round((y - top) * _STEPS), round((x - left) * _STEPS))
    # Intersection over union of partial coverage.
    fit = np.minimum(window, templates).sum((1, 2)) / np.maximum(window, templates).sum((1, 2))
    best = fit.argmax()
    shape, radius = names[best]
    row, column = (
        np.abs(np.array(CELL_CENTRES) / UNIT - (corner - half + centre)).argmin()
        for corner, centre in zip((top, left), centres[best], strict=True)
    )
    return Object(shape, colour, "large" if radius > _LARGE else "small", POSITIONS[3 * row + column])


@functools.cache
def _templates(dy: int, dx: int):
    """Returns blurred drawings of every shape and radius with the same centroid.

    Args:
      dy, dx: the centroid's offset down and right of the central pixel's centre, in 1 / `_STEPS` pixels.

    Returns:
      N pairs of shape and radius; float64 [N, 2], the drawings' centres in the window (y, x in pixels); float64
      [N, 17, 17], their coverage in [0, 1].
    """
    names, centres, templates = [], [], []
    for shape, radius in itertools.product(SHAPES, _RADII):
        middle = UNIT * _TEMPLATE_SIZE // 2
        x, y = middle + dx * UNIT // _STEPS, middle + dy * UNIT // _STEPS
        if shape == "triangle":  # its centroid is at two thirds of its height
            y -= radius // 3
        template = coverage(shape, x, y, radius, _TEMPLATE_SIZE) / 64
        names.append((shape, radius))
        centres.append((y / UNIT, x / UNIT))
        templates.append(ndimage.gaussian_filter(template, _BLUR, mode="constant"))
    return names, np.array(centres), np.array(templates)


# ---- Captions. -----------------------------------------------------------------------------------


def parse_caption(caption: str, strict: bool = True) -> Scene:
    """Reads the scene of a caption, with None for what it does not name, objects in its order.

    Args:
      caption: a text.
      strict: whether it must be a caption that `shapes` can have. Otherwise any text is parsed: an object ends at a
        comma, at `and`, `with`, `of` or `is`, and where an attribute would occur twice; one with neither shape nor
        colour is ignored.

    Raises:
      ValueError: `strict`, and the text is not such a caption.
    """
    if strict and not _grammar().fullmatch(caption):
        raise ValueError(f"not a caption of shapes: {caption!r}")
    backgrounds, objects = [], []
    for part in re.split(r",|\b(?:and|with|of|is)\b", caption.lower()):
        found = {}
        for attribute, word in _named(part):
            if attribute == "background":
                backgrounds.append(word)
                continue
            if attribute in found:
                objects.append(found)
                found = {}
            found[attribute] = word
        objects.append(found)
    return Scene(
        tuple(
            Object(*(found.get(attribute) for attribute in _OBJECT_ATTRIBUTES))
            for found in objects
            if "shape" in found or "colour" in found
        ),
        backgrounds[0] if backgrounds else None,
    )


def _named(text: str) -> list[tuple[str, str]]:
    """Returns pairs of attribute and word, in the order of the text."""
    return [(match.lastgroup, match.group()) for match in _words().finditer(text)]


@functools.cache
def _words() -> re.Pattern:
    # Longer positions first, so that "top left" is not read as "top".
    groups = dict(zip(_OBJECT_ATTRIBUTES, (SHAPES, COLOURS, SIZES, sorted(POSITIONS, key=len)[::-1]), strict=True))
    groups["background"] = BACKGROUNDS
    return re.compile("|".join(rf"(?P<{name}>\b(?:{'|'.join(words)})\b)" for name, words in groups.items()))


@functools.cache
def _grammar() -> re.Pattern:
    def one_of(options):
        return f"(?:{'|'.join(options)})"

    shape, colour, size, background = map(one_of, (SHAPES, COLOURS, SIZES, BACKGROUNDS))
    position = one_of(map(position_phrase, POSITIONS))
    thing = f"a (?:{size} )?(?:{colour} {shape}|{shape} in {colour})"

    def sentences(templates, a):
        objects = f"{a}(?:(?:(?:, | and ){a})? and {a})?"
        return [t.format(objects=objects, background=background) for named in (True, False) for t in templates[named]]

    return re.compile(
        one_of(sentences(TEMPLATES, f"{thing}(?: {position})?") + sentences(POSITION_FIRST, f"{position} {thing}"))
    )


# ---- Scores. -------------------------------------------------------------------------------------


def score_image(image: np.ndarray, caption: str) -> Score:
    """Scores an image by its caption.

    The objects that the caption names are matched with as many of the image, the largest, such that most attributes
    agree (among all of them, an image full of objects would match any caption). A missing object has no attribute
    right, an additional one makes the count wrong.

    Args:
      image: uint8 [32, 32, 3].
      caption: of the grammar.

    Returns:
      For each of `ATTRIBUTES`: how many are right, and how many the caption names. It always names the count.

    Raises:
      ValueError: as `read_scene` and `parse_caption`.
    """
    said = parse_caption(caption)
    pieces, background = _read(image)
    largest = sorted(pieces, key=lambda piece: piece[0], reverse=True)[: len(said.objects)]
    score = _score(said, Scene(tuple(o for _, o in largest), background))
    return score | {"count": (int(len(said.objects) == len(pieces)), 1)}


def score_caption(caption: str, scene: Scene) -> Score:
    """Scores a caption by its scene, see `score_image`.

    For each object of the scene that the caption does not mention, a shape and a colour count as named and wrong, so
    that saying nothing does not pay.

    Args:
      caption: any text.
      scene: with everything named.
    """
    said = parse_caption(caption, strict=False)
    score = _score(said, scene)
    num_missing = max(len(scene.objects) - len(said.objects), 0)
    for attribute in ("shape", "colour"):
        right, named = score[attribute]
        score[attribute] = (right, named + num_missing)
    return score


def _score(said: Scene, true: Scene) -> Score:
    rights = np.zeros((len(said.objects), len(true.objects), len(_OBJECT_ATTRIBUTES)), np.int64)
    for i, a in enumerate(said.objects):
        for j, b in enumerate(true.objects):
            rights[i, j] = [getattr(a, k) is not None and getattr(a, k) == getattr(b, k) for k in _OBJECT_ATTRIBUTES]
    pairs = optimize.linear_sum_assignment(rights.sum(-1), maximize=True)
    right = rights[pairs].sum(0)
    score = {"count": (int(len(said.objects) == len(true.objects)), 1)}
    for k, attribute in enumerate(_OBJECT_ATTRIBUTES):
        score[attribute] = (int(right[k]), sum(getattr(o, attribute) is not None for o in said.objects))
    score["background"] = (int(said.background == true.background), 1) if said.background else (0, 0)
    return score


def scene_of(example: dict) -> Scene:
    """Returns the scene of an example of `shapes` as TFDS returns it."""
    words = {"shape": SHAPES, "colour": list(COLOURS), "size": list(SIZES), "position": POSITIONS}
    columns = {key: [names[i] for i in example["objects"][key]] for key, names in words.items()}
    objects = zip(*(columns[key] for key in _OBJECT_ATTRIBUTES), strict=True)
    return Scene(tuple(Object(*values) for values in objects), list(BACKGROUNDS)[example["background"]])
