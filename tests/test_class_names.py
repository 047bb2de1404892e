"""Names of classes, from the dataset to the workdir, to samples, pages and cards."""

import json
import shutil
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from upath import UPath

import jetformer
import runs
import trees
from jetformer import class_names, config
from jetformer.evaluators.samples import Samples
from jetformer.experiment import Experiment
from jetformer.report import page, read

NAMES = st.lists(st.text("ab12", min_size=1, max_size=3), min_size=1, max_size=8)


@given(NAMES)
def test_classes_are_shown_differently(names):
    """Also those of one name, and those whose name is the number of another."""
    shown = [class_names.shown(label, names) for label in range(len(names) + 1)]
    assert len(set(shown)) == len(shown)


@given(st.data())
def test_classes_by_name_and_by_number(data):
    names = data.draw(NAMES.map(lambda names: list(dict.fromkeys(names))))
    labels = data.draw(st.lists(st.integers(0, len(names) - 1)))
    assert class_names.resolve([names[label] for label in labels], names) == labels
    assert class_names.resolve([f" {names[label]} " for label in labels], names) == labels
    assert class_names.resolve(labels, names) == labels
    assert class_names.resolve(labels, None) == labels
    by_number = [str(label) for label in labels if str(label) not in names]
    assert class_names.resolve(by_number, names) == [int(number) for number in by_number]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("cat", "dog", "emu", "kit"), r"'kat'.* 4, such as (cat|kit), (cat|kit)$"),
        (("moose", "newt", "owl", "pony"), r"'kat'.* 4, such as moose, newt, owl$"),
        (None, r"'kat'.*numbers"),
    ],
)
def test_unknown_names(names, message):
    with pytest.raises(ValueError, match=message):
        class_names.resolve(["kat"], names)


@given(st.lists(st.text()))
def test_names_survive_in_a_workdir(tmp_path_factory, names):
    workdir = UPath(tmp_path_factory.mktemp("workdir"))
    assert class_names.saved(workdir) is None
    class_names.save(workdir, names)
    assert class_names.saved(workdir) == tuple(names)


@pytest.mark.parametrize("content", ["[", "{}", "[1]", '"cat"'])
def test_damaged_files(tmp_path, content):
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(ValueError, match=r"classes\.json is damaged"):
        class_names.saved(UPath(tmp_path))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A short run on two of three classes of a folder, in another order."""
    root = trees.plant(tmp_path_factory.mktemp("data") / "animals", {"train/cat": 9, "train/dog": 9, "train/emu": 9})
    workdir = tmp_path_factory.mktemp("workdir")
    pp = "decode(channels=1) | resize(8) | label_as_text | keep('image', 'text', 'text_mask', 'text_loss')"
    runs.run(
        workdir,
        root.parent / "index",
        Data__name=f'"folder:{root}"',
        Data__eval_split='"train"',
        Data__pp=f'"{pp}"',
        Data__pp_eval="None",
        Data__classes='("emu", "cat")',
        Samples__num_classes="None",
        train__total_steps=2,
        train__expected="{}",
    )
    return workdir


def test_training_saves_them(workdir):
    assert json.loads((workdir / "classes.json").read_text()) == ["emu", "cat"]
    assert page.known_facts(read.read_run(UPath(workdir)))["Classes"] == "2: emu, cat"


def test_samples_of_all_classes(workdir):
    with Image.open(workdir / "eval_samples" / "grid" / "000000002.png") as grid:
        height = grid.height
    config.parse([str(workdir / "config.gin")], [])
    run = config.call(Experiment)
    samples = next(e for e in run.evaluators.values() if isinstance(e, Samples))
    assert samples.classes(class_names.saved(UPath(workdir))) == [0, 1]
    side = 512 // (2 * 9 + 1)  # two images a row, enlarged
    assert height == 2 * (14 + 10 * side)


def test_the_python_api_takes_names(workdir):
    model = jetformer.load(workdir, device="cpu")
    assert model.class_names == ("emu", "cat")
    by_name, by_number = model.sample(["cat", "emu"]), model.sample([1, 0])
    np.testing.assert_array_equal(by_name, by_number)
    np.testing.assert_array_equal(model.sample(["cat", 0]), by_number)
    np.testing.assert_array_equal(model.sample(np.array(["cat", "emu"])), by_number)
    np.testing.assert_array_equal(model.sample("cat"), by_number[:1])
    bits = model.bits_per_dim(by_name, ["cat", "emu"])
    np.testing.assert_array_equal(bits, model.bits_per_dim(by_name, [1, 0]))
    with pytest.raises(ValueError, match=r"'dog'.* 2, such as emu, cat"):
        model.sample(["dog"])


def program(name, *flags):
    process = runs.start([sys.executable, "-m", f"jetformer.{name}", *flags])
    _, log = process.communicate(timeout=300)
    return process.returncode, log


@pytest.mark.slow
def test_the_programs(workdir, tmp_path):
    """Sampling by name, also after the run was shared and converted back."""
    shared, again = tmp_path / "shared", tmp_path / "again"
    code, log = program("convert", "--to=safetensors", f"--workdir={workdir}", f"--out={shared}")
    assert code == 0, log
    assert "0 emu, 1 cat" in (shared / "README.md").read_text()
    code, log = program("convert", "--from=safetensors", f"--path={shared}", f"--out={again}")
    assert code == 0, log
    for place in (workdir, again):
        out = tmp_path / f"samples_{place.name}"
        flags = [f"--workdir={place}", f"--out={out}", "--num_images=1", "--device=cpu"]
        code, log = program("sample", *flags, "--classes=cat,0")
        assert code == 0, log
        records = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        assert [(r["prompt"], r["file"]) for r in records] == [
            ("cat", "images/cat_0000.png"),
            ("emu", "images/emu_0000.png"),
        ]
        assert 'alt="cat, seed 0"' in (out / "index.html").read_text()
        code, log = program("sample", *flags, "--classes=bat")
        assert code == 1
        assert "error: there is no class 'bat': the model has 2, such as cat" in log


def test_a_workdir_without_names(workdir, tmp_path):
    """As those of older runs: numbers, as ever."""
    older = tmp_path / "older"
    shutil.copytree(workdir, older)
    (older / "classes.json").unlink()
    model = jetformer.load(older, device="cpu")
    assert model.class_names is None
    assert model.sample([1]).shape == (1, 8, 8, 1)
    with pytest.raises(ValueError, match=r"'cat'.*numbers"):
        model.sample(["cat"])
    assert "Classes" not in page.known_facts(read.read_run(UPath(older)))
