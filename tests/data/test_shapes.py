import dataclasses
import functools
import hashlib
import itertools
import re
from collections import Counter

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw
from scipy import ndimage

from jetformer.data.builders.shapes import Object, Scene, checker, shapes
from jetformer.data.dataset import Data

FRESH = 100_000  # indices from here on are not in the dataset
NUM_SMALL = 24


@functools.cache
def fresh(held_out, n=500):
    return [shapes.example(FRESH + i, held_out) for i in range(n)]


def pairs(scene):
    return {(o.shape, o.colour) for o in scene.objects}


def as_sets(scene):
    """Returns a scene without the order of its objects."""
    return sorted(map(str, scene.objects)), scene.background


def without(scene, sizes, positions, background):
    """Returns the scene as a caption names it that omits some of it."""
    omitted = ({} if sizes else {"size": None}) | ({} if positions else {"position": None})
    objects = tuple(dataclasses.replace(o, **omitted) for o in scene.objects)
    return Scene(objects, scene.background if background else None)


# ---- The dataset. --------------------------------------------------------------------------------


def prepare_small(data_dir):
    builder = tfds.builder("shapes", data_dir=data_dir)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(max_examples_per_split=NUM_SMALL))
    return builder


# Not in the session's directory, where tests expect the whole dataset.
@pytest.fixture(scope="module")
def small_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("small_shapes")


@pytest.fixture(scope="module")
def small(small_dir):
    return prepare_small(small_dir)


@pytest.mark.parametrize(("split", "first"), [("train", 0), ("validation", 20_000), ("test", 21_000)])
def test_records_are_the_examples(small, split, first):
    names = {k: f.int2str for k, f in small.info.features["objects"].feature.items()}
    have = {}
    for e in tfds.as_numpy(small.as_dataset(split=split)):
        assert e["image"].dtype == np.uint8
        assert e["image"].shape == (32, 32, 3)
        words = {k: [names[k](i) for i in v] for k, v in e["objects"].items()}
        objects = tuple(Object(*o) for o in zip(*(words[f.name] for f in dataclasses.fields(Object)), strict=True))
        scene = Scene(objects, small.info.features["background"].int2str(e["background"]))
        have[e["image"].tobytes()] = [c.decode() for c in e["captions"]], scene
    want = (shapes.example(first + i, held_out=split == "test") for i in range(NUM_SMALL))
    assert have == {image.tobytes(): (captions, scene) for image, captions, scene in want}


def test_two_preparations_are_bit_identical(small, tmp_path):
    def records(builder):
        files = sorted(builder.data_path.glob("*.tfrecord*"))
        return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

    assert len(records(small)) == 3
    assert records(prepare_small(tmp_path)) == records(small)


@pytest.mark.usefixtures("small")
def test_pipeline_reads_it(small_dir):
    data = Data("shapes", 'decode|keep("image", "captions")', data_dir=str(small_dir))
    batch = next(data.train_batches(batch_size=8, seed=0))
    assert batch["image"].shape == (8, 32, 32, 3)
    assert batch["captions"].shape == (8, 5)
    for image, captions in zip(batch["image"], batch["captions"], strict=True):
        score = checker.score_image(image, captions[0].decode())
        assert all(right == named > 0 for right, named in score.values())
    batch = next(data.eval_batches(batch_size=8, split="test", pp='decode|drop("objects")'))
    assert batch["image"].shape == (8, 32, 32, 3)


def test_examples_are_pinned():
    # Another digest means another dataset, which needs another version.
    digest = hashlib.sha256()
    for index, held_out in itertools.product([0, 1, 2, 21_999], [False, True]):
        image, captions, _ = shapes.example(index, held_out)
        digest.update(image.tobytes() + "\n".join(captions).encode())
    assert digest.hexdigest() == "14a8dfcd2428fd67f8743cefa8b886863642e88edd8bd3207c04cd2b783c4235"


def test_splits_and_held_out_pairs(monkeypatch, tmp_path):
    # Scenes are drawn before images and captions, so they are the same without these.
    monkeypatch.setattr(shapes, "draw", lambda scene, bits: None)
    monkeypatch.setattr(shapes, "random_captions", lambda scene, bits: [])
    held_out = set(shapes.HELD_OUT)
    assert len({shape for shape, _ in held_out}) == len({colour for _, colour in held_out}) == len(held_out) == 3

    seen = {}
    for split, examples in tfds.builder("shapes", data_dir=tmp_path)._split_generators(None).items():
        keys, counts = set(), {k: Counter() for k in ("pairs", "count", "size", "position", "background")}
        for key, e in examples:
            keys.add(key)
            found = {(o["shape"], o["colour"]) for o in e["objects"]}
            assert bool(found & held_out) == (split == "test")
            assert len(found) == len(e["objects"]) == len({o["position"] for o in e["objects"]})
            counts["pairs"].update(found)
            counts["count"][len(found)] += 1
            for k in ("size", "position"):
                counts[k].update(o[k] for o in e["objects"])
            counts["background"][e["background"]] += 1
        seen[split] = keys, counts
    assert {split: len(keys) for split, (keys, _) in seen.items()} == {
        "train": 20_000,
        "validation": 1_000,
        "test": 1_000,
    }
    assert len(set.union(*(keys for keys, _ in seen.values()))) == 22_000
    assert [len(seen[split][1]["pairs"]) for split in seen] == [21, 21, 24]
    counts = seen["train"][1]
    for k, n in {"pairs": 21, "count": 3, "size": 2, "position": 9, "background": 3}.items():
        assert len(counts[k]) == n
        # Large objects are never adjacent, so they are slightly rarer in the centre.
        assert max(counts[k].values()) < (1.25 if k == "position" else 1.1) * min(counts[k].values())


# ---- Images. -------------------------------------------------------------------------------------


def test_noise_is_gaussian_and_nothing_clips_it():
    images = np.stack([image for image, *_ in fresh(False)]).astype(np.int64)
    assert images.min() > 0
    assert images.max() < 255
    # Neighbouring pixels of the background differ only by noise.
    corners = images[:, 30:32, 30:32].reshape(len(images), 12)
    is_flat = np.ptp(corners, axis=1) < 40
    assert is_flat.sum() > 300
    assert corners[is_flat].std(axis=1, ddof=1).mean() == pytest.approx(4, abs=0.15)
    backgrounds = np.array([scene.background for *_, scene in fresh(False)])
    for name, level in shapes.BACKGROUNDS.items():
        assert corners[is_flat & (backgrounds == name)].mean() == pytest.approx(level, abs=1.5)


@pytest.mark.parametrize("shape", shapes.SHAPES)
@pytest.mark.parametrize(("size", "low", "high"), [("small", 6.6, 8.0), ("large", 10.1, 11.5)])
def test_objects_have_their_size(shape, size, low, high):
    for i in range(20):
        cover = shapes._place(Object(shape, "red", size, "centre"), np.random.PCG64(i)) / 64
        # Its width and height, except for a triangle's corners, which cover little of a pixel.
        low_here = 0.9 * low - 0.2 if shape == "square" else low - 0.8 * (shape == "triangle")
        assert low_here <= cover.max(0).sum() <= high
        assert low_here <= cover.max(1).sum() <= high


def test_coverage_is_area():
    radius = 80  # 5 pixels
    # Samples on the outline count as inside.
    areas = {"circle": np.pi * 25, "square": 9**2, "triangle": 50, "cross": 2 * 10 * 3 - 3**2}
    for shape, area in areas.items():
        assert shapes.coverage(shape, 250, 261, radius).sum() / 64 == pytest.approx(area, rel=0.03)
    with pytest.raises(ValueError, match="no shape 'star'"):
        shapes.coverage("star", 250, 261, radius)


@pytest.mark.parametrize(
    ("size", "position", "other_size", "other_position"),
    [("small", "left", "small", "left"), ("large", "left", "large", "centre"), ("large", "top", "large", "centre")],
)
def test_crowded_scenes_are_not_drawn(size, position, other_size, other_position):
    objects = Object("circle", "red", size, position), Object("square", "blue", other_size, other_position)
    with pytest.raises(ValueError, match="do not fit"):
        shapes.draw(Scene(objects, "grey"), np.random.PCG64(0))


def test_the_tightest_scene_is_drawn():
    row = [("large", "left"), ("small", "centre"), ("large", "right")]
    scene = Scene(tuple(Object("circle", "red", *where) for where in row), "black")
    assert checker.read_scene(shapes.draw(scene, np.random.PCG64(0))) == scene


# ---- Captions. -----------------------------------------------------------------------------------


def random_captions(n):
    for i in range(n):
        bits = np.random.PCG64(i)
        scene = shapes.random_scene(bits, held_out=i % 2 == 1)
        yield scene, shapes.random_captions(scene, bits)


def test_captions_name_what_is_true():
    templates = Counter()
    for scene, captions in random_captions(1000):
        assert len(set(captions)) == len(captions) == shapes.NUM_CAPTIONS
        named = []
        for caption in captions:
            words = set(re.findall(r"\w+", caption))
            named.append(
                (
                    bool(words & set(shapes.SIZES)),
                    bool(words & {"top", "bottom", "left", "right", "centre"}),
                    bool(words & set(shapes.BACKGROUNDS)),
                )
            )
            said = checker.parse_caption(caption)
            assert as_sets(said) == as_sets(without(scene, *named[-1]))
            assert checker.parse_caption(caption, strict=False) == said
            templates[re.sub("|".join([*shapes.SHAPES, *shapes.COLOURS]), "_", caption)] += 1
        assert named[:2] == [(True, True, True)] * 2
        assert len(set(named)) == 4
    assert len(templates) > 2000


def test_captions_are_of_few_words():
    captions = [caption for _, captions in random_captions(1000) for caption in captions]
    assert all(re.fullmatch("[a-z]+(,? [a-z]+)*", caption) for caption in captions)
    assert len({word for caption in captions for word in re.findall(r"\w+", caption)}) == 33
    assert max(len(caption.split()) for caption in captions) <= 36


def test_parse_reads_captions_as_people_do():
    full = Scene(
        (Object("circle", "red", "small", "top left"), Object("square", "blue", "large", "centre")), background="grey"
    )
    assert checker.parse_caption(
        "a small red circle at the top left and a large blue square in the centre on a grey background"
    ) == (full)
    assert checker.parse_caption(
        "on a grey background, at the top left a small circle in red and in the centre a large square in blue"
    ) == (full)
    assert checker.parse_caption("there is a yellow cross") == Scene((Object("cross", "yellow"),))


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a circle",
        "a red circle at the",
        "a red circle a blue square",
        "a red circle, a blue square",
        "a red circle and a blue square and a green cross and a red cross",
        "at the top a red circle at the left",
        "a red circle on a blue background",
        "A red circle",
        "a red circle ",
        "a red star",
    ],
)
def test_strict_parse_refuses_other_texts(caption):
    with pytest.raises(ValueError, match="not a caption"):
        checker.parse_caption(caption)
    checker.parse_caption(caption, strict=False)


@pytest.mark.parametrize(
    ("text", "scene"),
    [
        ("", Scene(())),
        ("hello, the top of a small world", Scene(())),
        ("a red", Scene((Object(None, "red"),))),
        (
            "a red circle blue Square at top right",
            Scene((Object("circle", "red"), Object("square", "blue", None, "top right"))),
        ),
        ("at the left a cross and , large on white on black", Scene((Object("cross", None, None, "left"),), "white")),
        ("a redcircle triangle in a grey", Scene((Object("triangle", None),), "grey")),
    ],
)
def test_lenient_parse_reads_what_it_can(text, scene):
    assert checker.parse_caption(text, strict=False) == scene


# ---- The checker. --------------------------------------------------------------------------------


def accuracies(examples, change=lambda image, rng: image):
    """Returns the share of right attributes that the first captions name, for each attribute and for all."""
    right, named = Counter(), Counter()
    for i, (image, captions, _) in enumerate(examples):
        for attribute, (r, n) in checker.score_image(change(image, np.random.default_rng(i)), captions[0]).items():
            right.update({attribute: r, "all": r})
            named.update({attribute: n, "all": n})
    assert named["count"] == named["background"] == len(examples)
    assert named["shape"] == named["position"] == sum(len(scene.objects) for *_, scene in examples)
    return {attribute: right[attribute] / named[attribute] for attribute in named}


@pytest.mark.parametrize("held_out", [False, True])
def test_checker_reads_real_scenes(held_out):
    for attribute, accuracy in accuracies(fresh(held_out)).items():
        assert accuracy >= 0.99, attribute


def as_uint8(image):
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def blurred(image, rng):
    return as_uint8(ndimage.gaussian_filter(image.astype(float), (1.0, 1.0, 0)) + rng.normal(0, 8, image.shape))


def noisy(image, rng):
    return as_uint8(image + rng.normal(0, 20, image.shape))


def pale_and_shaded(image, rng):
    shade = np.linspace(-15, 15, 32)[:, None, None]
    return as_uint8(0.8 * image + 25 + shade + rng.normal(0, 5, image.shape))


def specked(image, rng):
    image = image.copy()
    for y, x in rng.integers(0, 30, (4, 2)):
        image[y : y + 2, x : x + 2] = rng.integers(0, 256, 3)
    return image


@pytest.mark.parametrize("change", [blurred, noisy, pale_and_shaded, specked])
def test_checker_reads_imperfect_scenes(change):
    for attribute, accuracy in accuracies(fresh(False)[:150] + fresh(True)[:150], change).items():
        assert accuracy >= 0.95, attribute


def test_checker_reads_drawings_of_other_code():
    # By other code than the dataset's, to test which way is up.
    image = Image.new("RGB", (320, 320), "white")
    pen = ImageDraw.Draw(image)
    pen.ellipse((10, 10, 115, 115), fill="red")
    pen.polygon([(265, 25), (230, 95), (300, 95)], fill="blue")
    pen.rectangle((110, 210, 210, 310), fill=(0, 150, 0))
    image = np.asarray(image.resize((32, 32), Image.Resampling.BOX))
    objects = (
        Object("circle", "red", "large", "top left"),
        Object("triangle", "blue", "small", "top right"),
        Object("square", "green", "large", "bottom"),
    )
    assert checker.read_scene(image) == Scene(objects, "white")


@pytest.mark.parametrize(("level", "background"), [(0, "black"), (128, "grey"), (255, "white")])
def test_blank_image_has_no_objects(level, background):
    assert checker.read_scene(np.full((32, 32, 3), level, np.uint8)) == Scene((), background)


def test_coloured_image_is_no_scene():
    for colour in shapes.COLOURS.values():
        assert checker.read_scene(np.full((32, 32, 3), colour, np.uint8)) == Scene(())


def test_read_scene_takes_images_only():
    for image in (np.zeros((32, 32), np.uint8), np.zeros((32, 32, 3)), np.zeros((64, 64, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"uint8 \[32, 32, 3\]"):
            checker.read_scene(image)


# ---- Scores. -------------------------------------------------------------------------------------


def share(scores):
    totals = np.sum([list(score.values()) for score in scores], axis=(0, 1))
    return totals[0] / totals[1]


def test_scores_of_own_and_other_scenes():
    examples = fresh(False)[:100]
    captions = [examples[i][1][i % 5] for i in range(100)]
    own = [checker.score_caption(caption, scene) for (*_, scene), caption in zip(examples, captions, strict=True)]
    assert share(own) == 1
    others = examples[1:] + examples[:1]
    other = [checker.score_caption(caption, scene) for (*_, scene), caption in zip(others, captions, strict=True)]
    assert share(other) < 0.5
    by_image = [checker.score_image(image, caption) for (image, *_), caption in zip(others, captions, strict=True)]
    assert share(by_image) < 0.5


def test_an_image_full_of_objects_scores_badly():
    """It has any named object somewhere. (A quarter of shapes and half of sizes are right by chance.)"""
    rng, scores = np.random.default_rng(0), []
    for _, captions, _ in fresh(False)[:100]:
        colours = np.array(list(shapes.COLOURS.values()))[rng.integers(0, len(shapes.COLOURS), (8, 8))]
        blocks = np.where(rng.random((8, 8, 1)) < 0.35, colours, 120)
        image = blocks.repeat(4, 0).repeat(4, 1).astype(np.uint8)
        assert len(checker.read_scene(image).objects) > 5
        scores.append(checker.score_image(image, captions[0]))
    assert share(scores) < 0.4


def test_score_image_counts():
    objects = Object("circle", "red", "small", "top"), Object("cross", "blue", "large", "bottom")
    image = shapes.draw(Scene(objects, "grey"), np.random.PCG64(0))

    def score(caption):
        return tuple(checker.score_image(image, caption).values())

    both = "a small red circle at the top and a large blue cross at the bottom on a grey background"
    assert score(both) == ((1, 1), (2, 2), (2, 2), (2, 2), (2, 2), (1, 1))
    # Objects are matched to agree most, in any order.
    assert score("a blue cross and a red circle") == ((1, 1), (2, 2), (2, 2), (0, 0), (0, 0), (0, 0))
    swapped = "a red circle at the bottom and a blue cross at the top on a black background"
    assert score(swapped) == ((1, 1), (2, 2), (2, 2), (0, 0), (0, 2), (0, 1))
    # One object is missing; one too many, then the largest counts.
    assert score("a blue cross") == ((0, 1), (1, 1), (1, 1), (0, 0), (0, 0), (0, 0))
    assert score("a red circle") == ((0, 1), (0, 1), (0, 1), (0, 0), (0, 0), (0, 0))
    three = "a red circle at the top, a blue cross at the left and a green square at the right"
    assert score(three) == ((0, 1), (2, 3), (2, 3), (0, 0), (1, 3), (0, 0))
    # No objects.
    blank = np.full((32, 32, 3), 225, np.uint8)
    assert tuple(checker.score_image(blank, both).values()) == ((0, 1), (0, 2), (0, 2), (0, 2), (0, 2), (0, 1))
    assert tuple(checker.score_image(blank, both)) == checker.ATTRIBUTES


def test_score_caption_counts():
    scene = Scene((Object("circle", "red", "small", "top"), Object("cross", "blue", "large", "bottom")), "grey")

    def score(caption):
        return tuple(checker.score_caption(caption, scene).values())

    assert score("there is a blue cross and a red circle") == ((1, 1), (2, 2), (2, 2), (0, 0), (0, 0), (0, 0))
    assert score("a large red circle at the top on a black background") == (
        ((0, 1), (1, 2), (1, 2), (0, 1), (1, 1), (0, 1))
    )
    for nothing in ("", "there is the and a"):
        assert score(nothing) == ((0, 1), (0, 2), (0, 2), (0, 0), (0, 0), (0, 0))
    too_much = "a red circle and a blue cross and a red circle"
    assert score(too_much) == ((0, 1), (2, 3), (2, 3), (0, 0), (0, 0), (0, 0))
