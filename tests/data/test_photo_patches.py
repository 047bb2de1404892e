import collections

import pytest
import tensorflow_datasets as tfds

import jetformer.data.builders  # noqa: F401 (registers the builder)
from jetformer.data.builders.photo_patches import photo_patches


@pytest.fixture(scope="module")
def builder(data_dir):
    builder = tfds.builder("photo_patches", data_dir=data_dir)
    builder.download_and_prepare()
    return builder


@pytest.fixture(scope="module")
def splits(builder):
    return {split: list(tfds.as_numpy(builder.as_dataset(split=split))) for split in photo_patches.SPLITS}


def test_sizes(splits):
    sizes = {name: len(examples) for name, examples in splits.items()}
    assert sizes == {"train": 36163, "validation": 1965, "test": 2080}
    for examples in splits.values():
        assert {example["image"].shape for example in examples} == {(16, 16, 3)}
        assert {example["label"] for example in examples} == {0}


def test_each_photograph_is_in_one_split(builder, splits):
    names = builder.info.features["photo"].names
    shown = {split: collections.Counter(names[example["photo"]] for example in splits[split]) for split in splits}
    assert {split: set(counts) for split, counts in shown.items()} == {
        "train": {"astronaut", "cat", "hubble", "motorcycle"},
        "validation": {"coffee", "flower"},
        "test": {"china", "rocket"},
    }
    # No photograph of training dominates.
    counts = shown["train"].values()
    assert max(counts) < 1.4 * min(counts)


def test_patches_are_those_of_the_photographs(splits):
    photos = photo_patches.load_photos()
    for split, strides in photo_patches.SPLITS.items():
        wanted = {
            photo[y : y + 16, x : x + 16].tobytes()
            for name, stride in strides.items()
            for photo in [photos[name]]
            for y in range(0, len(photo) - 15, stride)
            for x in range(0, photo.shape[1] - 15, stride)
        }
        assert {example["image"].tobytes() for example in splits[split]} == wanted
