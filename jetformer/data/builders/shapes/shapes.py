"""`shapes`: drawings of one to three objects with captions, whose every statement can be checked.

A scene is a background, and objects in different cells of a 3×3 grid, each with a shape, colour, size and position; its
five captions name all or some of that. Three pairs of shape and colour occur only in the test split, in each of its
scenes: a model that draws them as described combines what it never saw combined. `checker` reads images and captions
back.

Drawing is integer arithmetic on raw PCG64 output, so that all machines round alike. Lengths are in sixteenths of a
pixel, y points down, and (0, 0) is the image's corner.

The noise of a pixel is the number of ones among 64 random bits, minus 32: nearly a rounded Gaussian of standard
deviation 4, 4.05 bits per dim that no model can predict. All levels are far enough from 0 and 255 that clipping is
negligible.
"""

import dataclasses

import numpy as np
import tensorflow_datasets as tfds

IMAGE_SIZE = 32
UNIT = 16  # per pixel
SEED = 0
NUM_CAPTIONS = 5

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (215, 45, 45),
    "green": (40, 165, 50),
    "blue": (45, 75, 220),
    "yellow": (225, 205, 45),
    "purple": (155, 50, 190),
    "cyan": (45, 200, 215),
}
# Smallest and largest radius: half an object's width.
SIZES = {"small": (54, 62), "large": (82, 90)}
# Row by row.
POSITIONS = (
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
# Centres of the three columns, and of the three rows.
CELL_CENTRES = (92, 256, 420)
BACKGROUNDS = {"black": 30, "grey": 120, "white": 225}
HELD_OUT = (("circle", "green"), ("square", "purple"), ("triangle", "yellow"))

_POSITION_JITTER = UNIT
_COLOUR_JITTER = 10
_BACKGROUND_JITTER = 6
_SAMPLES = 8  # per pixel and axis
_ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


@dataclasses.dataclass(frozen=True)
class Object:
    """An object, in words of `SHAPES`, `COLOURS`, `SIZES` and `POSITIONS`; None is unnamed."""

    shape: str | None
    colour: str | None
    size: str | None = None
    position: str | None = None


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects in any order, and a word of `BACKGROUNDS`; None is unnamed."""

    objects: tuple[Object, ...]
    background: str | None = None


# ---- Scenes. -------------------------------------------------------------------------------------


def random_scene(bits: np.random.PCG64, held_out: bool) -> Scene:
    """Draws a random scene with everything named, its objects in the order of `POSITIONS`.

    Objects differ in shape or colour. Two large ones are never in adjacent cells, where they would not fit.

    Args:
      bits: the source of randomness.
      held_out: whether one or more objects have a pair of `HELD_OUT`; otherwise none has.
    """
    pairs = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    if not held_out:
        pairs = [pair for pair in pairs if pair not in HELD_OUT]
    num_objects = 1 + _below(bits, 3)
    chosen = [_choice(bits, HELD_OUT)] if held_out else []
    while len(chosen) < num_objects:
        chosen.append(_choice(bits, [pair for pair in pairs if pair not in chosen]))
    sizes = [_choice(bits, tuple(SIZES)) for _ in chosen]
    while True:
        positions = _shuffled(bits, POSITIONS)[:num_objects]
        objects = [Object(*pair, size, position) for pair, size, position in zip(chosen, sizes, positions, strict=True)]
        if not _crowded(objects):
            break
    objects.sort(key=lambda o: POSITIONS.index(o.position))
    return Scene(tuple(objects), _choice(bits, tuple(BACKGROUNDS)))


def _crowded(objects: list[Object]) -> bool:
    """Returns whether objects do not fit: two in one cell, or two large ones in adjacent cells."""
    for i, a in enumerate(objects):
        for b in objects[:i]:
            (row, column), (other_row, other_column) = (divmod(POSITIONS.index(o.position), 3) for o in (a, b))
            distance = abs(row - other_row) + abs(column - other_column)
            if distance < (2 if a.size == b.size == "large" else 1):
                return True
    return False


# ---- Images. -------------------------------------------------------------------------------------


def coverage(shape: str, x: int, y: int, radius: int, image_size: int = IMAGE_SIZE) -> np.ndarray:
    """Returns the coverage of each pixel by an object: int64 [image_size, image_size], 0..64.

    Args:
      shape: of `SHAPES`.
      x, y: the object's centre, in sixteenths of a pixel; a triangle's is at half its height.
      radius: half its width, in sixteenths of a pixel.
      image_size: height and width in pixels.
    """
    samples = (2 * np.arange(image_size * _SAMPLES) + 1) * UNIT // (2 * _SAMPLES)
    dx, dy = (samples - x)[None, :], (samples - y)[:, None]
    across, down = abs(dx), abs(dy)
    if shape == "circle":
        inside = dx**2 + dy**2 <= radius**2
    elif shape == "square":  # a little smaller than the circle's box: about the same area
        inside = (10 * across <= 9 * radius) & (10 * down <= 9 * radius)
    elif shape == "triangle":
        inside = (2 * across <= dy + radius) & (dy <= radius)
    elif shape == "cross":
        long, wide = radius, 3 * radius
        inside = ((across <= long) & (10 * down <= wide)) | ((down <= long) & (10 * across <= wide))
    else:
        raise ValueError(f"no shape {shape!r}, there are: {', '.join(SHAPES)}")
    # One axis, then the other: several times faster than both.
    rows = inside.reshape(image_size, _SAMPLES, -1).sum(1, dtype=np.uint8)
    return rows.reshape(image_size, image_size, _SAMPLES).sum(2, dtype=np.int64)


def draw(scene: Scene, bits: np.random.PCG64) -> np.ndarray:
    """Draws a scene's image: uint8 [32, 32, 3].

    Args:
      scene: with everything named.
      bits: the source of randomness, for exact positions, sizes and colours, and noise.

    Raises:
      ValueError: two objects are in one cell, or two large ones in adjacent cells.
    """
    if _crowded(scene.objects):
        raise ValueError(f"objects do not fit next to each other: {scene}")
    # At least a pixel of background between any two objects.
    while True:
        covers = [_place(o, bits) for o in scene.objects]
        if sum(_grown(cover > 0) for cover in covers).max(initial=0) <= 1:
            break
    background = BACKGROUNDS[scene.background] + _jitter(bits, _BACKGROUND_JITTER)
    image = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), background, np.int64)
    whole = _SAMPLES**2
    for o, cover in zip(scene.objects, covers, strict=True):
        colour = np.array([level + _jitter(bits, _COLOUR_JITTER) for level in COLOURS[o.colour]])
        cover = cover[..., None]
        image = (cover * colour + (whole - cover) * image + whole // 2) // whole
    words = bits.random_raw(image.size)
    ones = _ONES[words.view(np.uint8)].reshape(*image.shape, 8).sum(-1, dtype=np.int64)
    return np.clip(image + ones - 32, 0, 255).astype(np.uint8)


def _place(o: Object, bits: np.random.PCG64) -> np.ndarray:
    """Returns the coverage of an object near the centre of its cell, wholly within the image."""
    smallest, largest = SIZES[o.size]
    radius = smallest + _below(bits, largest - smallest + 1)
    row, column = divmod(POSITIONS.index(o.position), 3)
    x, y = (
        min(max(CELL_CENTRES[i] + _jitter(bits, _POSITION_JITTER), radius), IMAGE_SIZE * UNIT - radius)
        for i in (column, row)
    )
    return coverage(o.shape, x, y, radius)


def _grown(mask: np.ndarray) -> np.ndarray:
    """Returns int64 [H, W]: 1 at True pixels, and to their right, below, and diagonally below."""
    padded = np.pad(mask, ((1, 0), (1, 0)))
    return (padded[1:, 1:] | padded[:-1, 1:] | padded[1:, :-1] | padded[:-1, :-1]).astype(np.int64)


# ---- Captions. -----------------------------------------------------------------------------------

# What a caption names besides shapes and colours: (sizes, positions, background).
_DETAILS = tuple((s, p, b) for s in (True, False) for p in (True, False) for b in (True, False))

# The grammar: {objects} is one to three objects, separated by commas and "and".
TEMPLATES = {
    True: (  # with background
        "{objects} on a {background} background",
        "on a {background} background, {objects}",
        "on a {background} background there is {objects}",
        "a {background} scene with {objects}",
        "a picture of {objects} on a {background} background",
    ),
    False: (
        "{objects}",
        "there is {objects}",
        "a scene with {objects}",
        "a picture of {objects}",
    ),
}
# Templates in which positions may precede objects.
POSITION_FIRST = {True: TEMPLATES[True][:2], False: TEMPLATES[False][:1]}


def random_captions(scene: Scene, bits: np.random.PCG64) -> list[str]:
    """Returns five different captions of a scene, which name every object with its shape and colour.

    The first two name everything; each of the others omits different ones of sizes, positions and background.
    """
    captions = []
    for details in [_DETAILS[0], _DETAILS[0], *_shuffled(bits, _DETAILS[1:])[: NUM_CAPTIONS - 2]]:
        caption = _random_caption(scene, details, bits)
        while caption in captions:
            caption = _random_caption(scene, details, bits)
        captions.append(caption)
    return captions


def position_phrase(position: str) -> str:
    """Returns a word of `POSITIONS` with its preposition, as in captions."""
    return "in the centre" if position == "centre" else f"at the {position}"


def _random_caption(scene: Scene, details: tuple[bool, bool, bool], bits: np.random.PCG64) -> str:
    with_sizes, with_positions, with_background = details
    position_first = with_positions and _below(bits, 3) == 0
    colour_last = _below(bits, 4) == 0
    phrases = []
    for o in _shuffled(bits, scene.objects):
        words = [o.shape, "in", o.colour] if colour_last else [o.colour, o.shape]
        words = ["a", *([o.size] if with_sizes else []), *words]
        if with_positions:
            place = position_phrase(o.position)
            words = [place, *words] if position_first else [*words, place]
        phrases.append(" ".join(words))
    comma = _choice(bits, (", ", " and "))
    objects = " and ".join([comma.join(phrases[:-1]), phrases[-1]] if phrases[1:] else phrases)
    template = _choice(bits, (POSITION_FIRST if position_first else TEMPLATES)[with_background])
    return template.format(objects=objects, background=scene.background)


# ---- Randomness. ---------------------------------------------------------------------------------


def _below(bits: np.random.PCG64, n: int) -> int:
    """Draws from 0..n-1, uniformly up to n / 2^64."""
    return int(bits.random_raw()) % n


def _jitter(bits: np.random.PCG64, n: int) -> int:
    return _below(bits, 2 * n + 1) - n


def _choice(bits: np.random.PCG64, items):
    return items[_below(bits, len(items))]


def _shuffled(bits: np.random.PCG64, items) -> list:
    rest = list(items)
    return [rest.pop(_below(bits, len(rest))) for _ in items]


# ---- Dataset. ------------------------------------------------------------------------------------


def example(index: int, held_out: bool) -> tuple[np.ndarray, list[str], Scene]:
    """Returns an example: its image uint8 [32, 32, 3], its five captions and its scene.

    Args:
      index: of the example, from 0. The dataset has 22,000; larger ones are new examples.
      held_out: as for `random_scene`.
    """
    bits = np.random.PCG64([SEED, index])
    scene = random_scene(bits, held_out)
    return draw(scene, bits), random_captions(scene, bits), scene


class Shapes(tfds.core.GeneratorBasedBuilder):
    """`shapes`: image uint8 [32, 32, 3] (PNG), captions string [5], and the scene.

    `objects` has `shape`, `colour`, `size` and `position` int64 [1..3], an entry for each object, in the order of
    `POSITIONS`; `background` is int64. Nothing is downloaded, and the bytes are the same on every machine: all
    randomness is raw PCG64 output, which NumPy promises not to change.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}  # noqa: RUF012 (TFDS requires it)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=(
                "Drawn 32x32 scenes of one to three objects, each with a shape, a colour, a size and a "
                "position on a 3x3 grid, before a black, grey or white background, with Gaussian noise. "
                "Five captions each, of a small grammar: the first two name everything, the others "
                "leave out sizes, positions or the background. Splits of 20,000 / 1,000 / 1,000 "
                "scenes; green circles, purple squares and yellow triangles are in test only, one "
                "or more in each of its scenes."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(IMAGE_SIZE, IMAGE_SIZE, 3), encoding_format="png"),
                    "captions": tfds.features.Sequence(tfds.features.Text(), length=NUM_CAPTIONS),
                    "objects": tfds.features.Sequence(
                        {
                            "shape": tfds.features.ClassLabel(names=list(SHAPES)),
                            "colour": tfds.features.ClassLabel(names=list(COLOURS)),
                            "size": tfds.features.ClassLabel(names=list(SIZES)),
                            "position": tfds.features.ClassLabel(names=list(POSITIONS)),
                        }
                    ),
                    "background": tfds.features.ClassLabel(names=list(BACKGROUNDS)),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(range(20_000), held_out=False),
            "validation": self._generate_examples(range(20_000, 21_000), held_out=False),
            "test": self._generate_examples(range(21_000, 22_000), held_out=True),
        }

    def _generate_examples(self, indices, held_out):
        for i in indices:
            image, captions, scene = example(i, held_out)
            yield (
                i,
                {
                    "image": image,
                    "captions": captions,
                    "objects": [dataclasses.asdict(o) for o in scene.objects],
                    "background": scene.background,
                },
            )
