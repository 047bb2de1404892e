"""The program that inspects data."""

import dataclasses
import pathlib
import re
import sys

import numpy as np
import pytest
from PIL import Image

import trees
from jetformer import config
from jetformer.data import inspect
from jetformer.data.dataset import Data, MixtureData
from jetformer.experiment import Experiment
from runs import start

PP = "decode|resize(16)|label_as_text|keep('image', 'text')"


@pytest.fixture
def data(tmp_path):
    root = trees.plant(tmp_path / "animals", {"train/cat": 9, "train/dog": 11, "val/dog": 4})
    (root / "train/dog/003.png").write_bytes(b"no image")
    return Data(
        f"folder:{root}", pp=PP, eval_split="val", data_dir=str(tmp_path / "data"), skip_broken=True, max_examples=None
    )


def test_report(data):
    data.prepare()
    lines, picture = inspect.report(data, batch_size=4, seed=0, count=20)
    text = "\n".join(lines)
    assert "classes: 2 (cat, dog)" in lines
    assert f"train: 19 examples of {data.name}, train, 1 more skipped" in lines
    assert "labels: cat 9, dog 10 (from 9 to 10 each)" in text
    assert "height × width, of 19: 14×12 (19)" in text
    assert "1 classes without examples: cat" in text
    assert "  image uint8 [4, 16, 16, 3]" in lines
    assert re.search(r"^[\d,]+ examples per second$", lines[-1])
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    # Also of floating-point images.
    scaled = dataclasses.replace(data, pp="decode|resize(16)|value_range(-1, 1)|keep('image')")
    assert inspect.report(scaled, batch_size=4, seed=0, count=20)[1].dtype == np.uint8


def test_mixtures(data, data_dir):
    mixture = MixtureData((data, Data("digits", pp=PP, data_dir=str(data_dir))), (1, 1))
    mixture.prepare()
    text = "\n".join(inspect.report(mixture, batch_size=4, seed=0, count=20)[0])
    assert "train: 1,347 examples of digits, train" in text
    assert "classes: 12 (cat, dog, 0, 1" in text


def test_texts(shapes_dir):
    config.parse(["experiments/shapes.gin"], [f"Data.data_dir = '{shapes_dir}'"])
    data = config.call(Experiment).data
    lines, picture = inspect.report(data, batch_size=8, seed=0, count=16)
    text = "\n".join(lines)
    assert re.search(
        r"tokens of a text without its end: \d+ to \d+, median \d+, mean [\d.]+; 0.0% are truncated at 40", text
    )
    assert text.count("  text: '") == 4
    assert picture is not None


def test_captions(data):
    """As they are in the dataset, beside the tokens that the model sees."""
    root = pathlib.Path(data.name.removeprefix("folder:"))
    for image in root.rglob("*.png"):
        image.with_suffix(".txt").write_text(f"A Small {image.parent.name.upper()}\nanother")
    data.prepare()
    lines, _ = inspect.report(data, batch_size=4, seed=0, count=8)
    found = [line for line in lines if "captions in the dataset" in line]
    assert len(found) == 4 + 4  # of the first examples of both splits
    assert all(re.search(r": 'A Small (CAT|DOG)', 'another'$", line) for line in found)


@pytest.mark.slow
def test_program(data, tmp_path):
    gin = [
        f"Data.name = '{data.name}'",
        f"Data.data_dir = '{data.data_dir}'",
        "Data.eval_split = 'val'",
        f'Data.pp = "{PP}"',
    ]
    command = [sys.executable, "-m", "jetformer.data.inspect", "--gin_file=experiments/digits.gin"]
    command += [f"--gin_bindings={binding}" for binding in gin]
    process = start([*command, f"--out={tmp_path}/a.png"])
    _, log = process.communicate(timeout=300)
    assert process.returncode == 1  # an image is broken
    assert "train/dog/003.png" in log.splitlines()[-1]
    assert "Data.skip_broken = True" in log.splitlines()[-1]
    command += ["--gin_bindings=Data.skip_broken = True", f"--out={tmp_path}/a.png"]
    process = start(command)
    printed, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    assert "examples per second" in printed
    assert Image.open(tmp_path / "a.png").width > 100
