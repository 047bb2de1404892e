import itertools

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.datasets import load_sample_images

import jetformer.data.builders  # noqa: F401 (registers the builder)
from jetformer.data.builders.photo_patches import photo_patches


@pytest.fixture(scope="module")
def splits(data_dir):
    builder = tfds.builder("photo_patches", data_dir=data_dir)
    builder.download_and_prepare()
    return {split: list(tfds.as_numpy(builder.as_dataset(split=split))) for split in photo_patches.SPLITS}


def test_sizes(splits):
    sizes = {name: len(examples) for name, examples in splits.items()}
    assert sizes == {"train": 22454, "validation": 936, "test": 936}
    for examples in splits.values():
        assert {example["image"].shape for example in examples} == {(16, 16, 3)}
        assert np.bincount([example["label"] for example in examples]).tolist() == [len(examples) // 2] * 2


def test_each_split_is_its_part_of_the_photos(splits):
    photos = load_sample_images().images
    starts = {name: np.arange(left, right - 15, stride) for name, (left, right, stride) in photo_patches.SPLITS.items()}
    for name, examples in splits.items():
        wanted = {
            (label, photo[y : y + 16, x : x + 16].tobytes())
            for label, photo in enumerate(photos)
            for y in range(0, 427 - 15, photo_patches.SPLITS[name][2])
            for x in starts[name]
        }
        assert {(example["label"], example["image"].tobytes()) for example in examples} == wanted


def test_no_pixel_is_in_two_splits():
    columns = sorted((left, right) for left, right, _ in photo_patches.SPLITS.values())
    assert all(right + photo_patches.SIZE <= left for (_, right), (left, _) in itertools.pairwise(columns))
