import hashlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

import jetformer.data.builders  # noqa: F401 (registers the builder)
from jetformer.data.builders import digits


def load(data_dir):
    builder = tfds.builder("digits", data_dir=data_dir)
    builder.download_and_prepare()
    return {
        split: tfds.as_numpy(builder.as_dataset(split=split, batch_size=-1))
        for split in ("train", "validation", "test")
    }


@pytest.fixture(scope="module")
def splits(data_dir):
    return load(data_dir)


def test_sizes_and_strata(splits):
    assert {k: len(v["label"]) for k, v in splits.items()} == {
        "train": 1347,
        "validation": 225,
        "test": 225,
    }
    for v in splits.values():
        assert v["image"].shape[1:] == (8, 8, 1)
        assert v["image"].dtype == np.uint8
        counts = np.bincount(v["label"])
        assert counts.max() - counts.min() <= 0.04 * len(v["label"])


def test_levels_are_the_original_digits(splits):
    from sklearn.datasets import load_digits

    original = load_digits()
    want = sorted(
        (int(label), *pixels.astype(int)) for label, pixels in zip(original.target, original.data, strict=True)
    )
    have = sorted(
        (int(label), *digits.level(image).ravel().tolist())
        for v in splits.values()
        for image, label in zip(v["image"], v["label"], strict=True)
    )
    assert have == want


def test_levels_share_the_byte_evenly(splits):
    widths = digits.level_widths()
    assert widths.tolist() == [16] + 16 * [15]
    assert widths.sum() == 256
    images = splits["train"]["image"]
    for v, first in enumerate(np.cumsum(widths) - widths):
        values = images[digits.level(images) == v]
        counts = np.bincount(values - first, minlength=widths[v])
        expected = len(values) / widths[v]
        # Chi-square with 14 or 15 degrees of freedom: 45 is a one in ten thousand tail.
        assert ((counts - expected) ** 2 / expected).sum() < 45


def test_histogram_baseline(splits):
    train, test = splits["train"]["image"], splits["test"]["image"]
    bits = digits.histogram_bits_per_dim(train, test)
    floor = np.log2(digits.level_widths())[digits.level(test)].mean()
    assert floor < bits < 8
    assert bits == pytest.approx(6.3852, abs=5e-4)
    # It is a density over byte values: for every pixel, the probabilities of 0..255 sum to one.
    every = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None, None], (256, 8, 8, 1))
    pixel = slice(3, 4)
    p = [2 ** -digits.histogram_bits_per_dim(train[:, pixel, pixel], x[None]) for x in every[:, pixel, pixel]]
    assert sum(p) == pytest.approx(1)


def test_two_preparations_are_bit_identical(data_dir, splits, tmp_path):
    load(tmp_path)

    def records(root):
        files = sorted(root.glob("digits/*/*.tfrecord*"))
        return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

    assert len(records(tmp_path)) == 3
    assert records(tmp_path) == records(data_dir)
