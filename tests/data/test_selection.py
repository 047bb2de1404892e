"""Selections: some classes, some examples, without broken ones; from TFRecord files, and from folders."""

import dataclasses
import io
import itertools
import json
import logging

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import trees
from jetformer.data import sources
from jetformer.data.dataset import Data

NAMES = ("ant", "bee", "cow", "dog", "eel")
NUM_TRAIN = 60
PP = "decode|resize(8)|flip_lr|label_as_text|keep('image', 'text', 'text_mask', 'id')"
PP_EVAL = PP.replace("|flip_lr", "")
CUT, EMPTY, LARGE = 17, 31, 44  # of train: a file cut off, an empty one, one of another size
GREY, CMYK = 5, 6


def encoded(i: int) -> bytes:
    if i == CUT:
        return trees.image(i, (64, 64), kind="JPEG")[:500]
    if i == EMPTY:
        return b""
    if i == LARGE:
        return trees.image(i, (15, 12))
    mode = {GREY: "L", CMYK: "CMYK"}.get(i, "RGB")
    return trees.image(i, mode=mode, kind="JPEG" if mode == "CMYK" or i % 2 else "PNG")


with tfds.core.registered.skip_registration():

    class Beasts(tfds.core.GeneratorBasedBuilder):
        """Images of all sorts, some of them broken, in several shards."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(),
                "id": np.int64,
                "label": tfds.features.ClassLabel(names=NAMES),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(0, NUM_TRAIN), "test": self._generate_examples(100, 120)}

        def _generate_examples(self, start, stop):
            for i in range(start, stop):
                yield i, {"image": io.BytesIO(encoded(i)), "id": i, "label": i % len(NAMES)}


@pytest.fixture(scope="module")
def beasts_dir(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("beasts"))
    config = tfds.download.DownloadConfig(num_shards=3)
    Beasts(data_dir=directory).download_and_prepare(download_config=config)
    return directory


@pytest.fixture
def data(beasts_dir):
    return Data(
        "beasts",
        pp=PP,
        pp_eval=PP_EVAL,
        eval_split="test",
        shuffle_buffer_size=16,
        data_dir=beasts_dir,
        skip_broken=True,
    )


def ids(batches):
    return np.concatenate([b["id"][b["_mask"]] if "_mask" in b else b["id"] for b in batches])


def labels(batches):
    return {int(i): int(t) for b in batches for i, t in zip(b["id"], b["text"][:, 0], strict=True)}


def take(data, count, **options):
    return list(itertools.islice(data.train_batches(**{"batch_size": 2, "seed": 3} | options), count))


GOOD = sorted(set(range(NUM_TRAIN)) - {CUT, EMPTY})


@pytest.mark.parametrize(
    ("classes", "numbers"),
    [
        (("bee", "dog"), [1, 3]),
        (("dog", 0), [3, 0]),
        ("1:3", [1, 2]),
        (["3:", "ant"], [3, 4, 0]),
        (4, [4]),
    ],
)
def test_classes(data, classes, numbers):
    data = dataclasses.replace(data, classes=classes)
    assert data.class_names() == tuple(NAMES[i] for i in numbers)
    wanted = {i: numbers.index(i % 5) for i in GOOD if i % 5 in numbers}
    assert data.num_train_examples() == len(wanted)
    assert labels(data.eval_batches(batch_size=1, split="train")) == wanted
    epoch = take(data, len(wanted), batch_size=1)
    assert sorted(ids(epoch)) == sorted(wanted)
    assert labels(epoch) == wanted
    assert {e["label"] for e in data.examples("test", 99)} == set(range(len(numbers)))


@pytest.mark.parametrize(
    "changes", [{}, {"classes": (2, "eel")}, {"max_examples": 30}, {"classes": "1:", "max_examples": 20}]
)
@pytest.mark.parametrize("process", [{}, {"process_index": 1, "process_count": 2}])
def test_resumed_batches(data, changes, process):
    """Batches are a function of (seed, step), whatever is skipped."""
    data = dataclasses.replace(data, **changes)
    run = take(data, 42, **process)
    for step in (1, 41):
        for a, b in zip(run[step:], take(data, 42 - step, start_step=step, **process), strict=True):
            assert all(np.array_equal(a[k], b[k]) for k in a)


def test_processes(data):
    data = dataclasses.replace(data, classes=(0, 2, 4))
    whole = take(data, 9, batch_size=4)
    parts = [take(data, 9, batch_size=4, process_index=i, process_count=4) for i in range(4)]
    for batch, *of_processes in zip(whole, *parts, strict=True):
        assert all(np.array_equal(batch[k], np.concatenate([b[k] for b in of_processes])) for k in batch)
    seen = [list(data.eval_batches(batch_size=3, split="train", process_index=i, process_count=3)) for i in range(3)]
    assert len({len(batches) for batches in seen}) == 1
    assert sorted(ids(itertools.chain(*seen))) == [i for i in GOOD if i % 5 in (0, 2, 4)]


def test_max_examples(data, beasts_dir):
    some = dataclasses.replace(data, max_examples=10)
    assert some.num_train_examples() == some.num_examples() == 10
    everything = ids(data.eval_batches(batch_size=1, split="train"))
    assert ids(some.eval_batches(batch_size=1, split="train")).tolist() == everything[:10].tolist()
    assert dataclasses.replace(data, max_examples=10_000).num_train_examples() == len(GOOD)
    assert sorted(set(ids(take(some, 10)))) == sorted(everything[:10])


def test_slices(data):
    data = dataclasses.replace(data, classes=(1,))
    everything = ids(data.eval_batches(batch_size=1, split="train+test")).tolist()
    parts = [ids(data.eval_batches(batch_size=1, split=s)) for s in ("train[:50%]", "train[50%:]", "test")]
    assert np.concatenate(parts).tolist() == everything


def test_broken_images_are_skipped_and_counted(data, beasts_dir, caplog):
    data = dataclasses.replace(data, pp=PP + "|drop('text')")  # not checked yet
    with caplog.at_level(logging.INFO):
        assert data.num_train_examples() == len(GOOD)
        assert data.train_reader().num_skipped == 2
        assert data.reader("test").num_skipped == 0
    assert caplog.text.count("Skipped: example ") == 2
    assert "empty" in caplog.text
    assert caplog.text.count("2 of 60 examples of split 'train' of beasts cannot be preprocessed and are skipped") == 1
    # The result is kept, and not computed again.
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert data.num_train_examples() == len(GOOD)
    assert "Checking" not in caplog.text
    directory = sources.open_source("beasts", beasts_dir).directory
    found = [json.loads(path.read_text()) for path in directory.glob("skipped-*.json")]
    assert any(f["examples"] == 60 and len(f["skipped"]) == 2 for f in found)
    assert set(ids(take(data, 58, batch_size=1))) == set(GOOD)


def test_another_size_among_many(data):
    plain = "decode|keep('image', 'id')"
    data = dataclasses.replace(data, pp=plain, pp_eval=plain)
    assert data.num_train_examples() == len(GOOD) - 1
    assert LARGE not in ids(take(data, 57, batch_size=1))
    # Flips and scaling make no difference.
    assert dataclasses.replace(data, pp=plain + "|flip_lr").num_train_examples() == len(GOOD) - 1


def test_grey_and_cmyk_become_rgb(data):
    (batch,) = data.eval_batches(batch_size=NUM_TRAIN, split="train", pp="decode|keep('image', 'id')")
    found = dict(zip(batch["id"][batch["_mask"]], batch["image"], strict=False))
    for i in (GREY, CMYK):
        wanted = np.asarray(Image.open(io.BytesIO(encoded(i))).convert("RGB"), np.int64)
        assert abs(found[i] - wanted).max() <= 6
    assert (found[GREY][..., 0] == found[GREY][..., 1]).all()


def test_max_examples_limits_how_many_are_checked(data, beasts_dir):
    data = dataclasses.replace(data, max_examples=3, pp=PP + "|copy('id', 'number')")
    assert data.num_train_examples() == 3
    directory = sources.open_source("beasts", beasts_dir).directory
    found = [json.loads(path.read_text()) for path in directory.glob("skipped-*.json")]
    (looked_at,) = (f["examples"] for f in found if f["pp"].endswith("copy('id', 'number')"))
    assert looked_at < 10


def test_a_dataset_in_a_read_only_directory(data, beasts_dir, tmp_path, monkeypatch):
    """Then they are kept in the user's home."""
    monkeypatch.setattr(sources, "CACHE_DIR", str(tmp_path / "cache"))
    directory = sources.open_source("beasts", beasts_dir).directory
    original = sources.write_beside_data

    def write(path, content):
        if path.parent == directory:
            raise ValueError(f"{path} cannot be written")
        original(path, content)

    monkeypatch.setattr(sources, "write_beside_data", write)
    assert dataclasses.replace(data, pp=PP + "|copy('id', 'n')").num_train_examples() == len(GOOD)
    assert len(list((tmp_path / "cache").glob("*/skipped-*.json"))) == 1


def test_a_broken_image_stops_a_run_with_its_name(data, tmp_path):
    data = dataclasses.replace(data, skip_broken=False)
    with pytest.raises(ValueError, match=r"an example \(id (17|31), label [12]\) of 'beasts' cannot be pre") as error:
        take(data, 60, batch_size=1)
    assert "Data.skip_broken = True" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(
        ValueError, match=r"\(id (17|31), label [12]\) of 'beasts' cannot be preprocessed \(.*(JPEG|empty)"
    ):
        list(data.eval_batches(batch_size=7, split="train[:40]"))
    root = trees.plant(tmp_path / "root", {"train/a": 20})
    (root / "train/a/007.png").write_bytes(trees.image(7, (15, 12)))
    one = Data(f"folder:{root}", pp="decode|keep('image')", eval_split="train", data_dir=str(tmp_path / "data"))
    with pytest.raises(ValueError, match=r"train/a/007.png of .* its shape is image 15×12×3, theirs image 14×12×3"):
        list(one.eval_batches(batch_size=8))
    # As many numbers, in another shape.
    (root / "train/a/007.png").write_bytes(trees.image(7, (12, 14)))
    with pytest.raises(ValueError, match=r"train/a/007.png of .* its shape is image 12×14×3, theirs image 14×12×3"):
        next(one.train_batches(batch_size=20, seed=0))
    (root / "train/a/007.png").write_bytes(trees.image(7, (15, 12)))
    assert dataclasses.replace(one, skip_broken=True).num_train_examples() == 19
    # Mended in its place, and others broken.
    (root / "train/a/007.png").write_bytes(trees.image(7, (14, 12)))
    assert dataclasses.replace(one, skip_broken=True).num_train_examples() == 20
    for name in ("003.png", "011.png"):
        (root / "train/a" / name).write_bytes(b"not an image")
    assert dataclasses.replace(one, skip_broken=True).num_train_examples() == 18


def test_preprocessing_that_fits_no_image(data):
    with pytest.raises(ValueError, match=r"60 of 60 examples .* cannot be preprocessed") as error:
        dataclasses.replace(data, pp="decode|central_crop(99)|keep('image')").prepare()
    for op in ("central_crop(99)", "random_crop(99)"):
        larger = dataclasses.replace(data, pp=f"decode|{op}|keep('image')", skip_broken=False)
        with pytest.raises(
            ValueError, match=r"\(\w+_crop\(99\) is larger than the image: .*resize_small\(99\)"
        ) as error:
            take(larger, 1)
        assert "change Data.pp" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"classes": ("cat",)}, "'beasts' has no class 'cat': .* 5, .* 0 to 4 .* ant"),
        ({"classes": (5,)}, "no class 5"),
        ({"classes": (-1,)}, "no class -1"),
        ({"classes": "3:9"}, "no classes '3:9', .* \"0:5\""),
        ({"classes": ("2:2",)}, "no classes '2:2'"),
        ({"classes": ()}, "Data.classes is empty"),
        ({"classes": (1, "0:2")}, "class 'bee' (label 1)"),
    ],
)
def test_classes_that_do_not_exist(data, changes, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(").replace(")", r"\)")) as error:
        dataclasses.replace(data, **changes).prepare()
    assert "\n" not in str(error.value)


def test_classes_of_data_without_labels(tmp_path):
    with tfds.core.registered.skip_registration():

        class Plain(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"id": np.int64}))

            def _split_generators(self, dl_manager):
                return {"train": (("a", {"id": 1}) for _ in range(1))}

            def _generate_examples(self):
                pass

    Plain(data_dir=tmp_path).download_and_prepare()
    with pytest.raises(ValueError, match=r"'plain' has no label.* Data.classes"):
        Data("plain", pp="", eval_split="train", classes=(1,), data_dir=str(tmp_path)).prepare()


def test_a_class_without_examples(data, caplog):
    some = dataclasses.replace(data, classes=("ant", "bee"), train_split="test[:1]", eval_split="test")
    some.prepare()
    assert "'test[:1]' of beasts has no example of" in caplog.text


def test_identity(data):
    same = dataclasses.replace(data, skip_broken=False)
    assert same.identity() == "beasts/1.0.0"
    assert len({dataclasses.replace(same, **c).identity() for c in ({}, {"classes": 1}, {"max_examples": 3})}) == 3
