"""Folders of images: their index, and batches of them."""

import dataclasses
import itertools
import os
import re
import time

import numpy as np
import pytest

import trees
from jetformer.data import folder, sources
from jetformer.data.dataset import Data
from jetformer.data.folder import Folder

PP = 'decode|resize(8)|flip_lr|label_as_text|keep("image", "text", "filename")'
PP_EVAL = PP.replace("|flip_lr", "")
COUNTS = {"train/cat": 13, "train/dog": 11, "train/emu": 9, "val/cat": 3, "val/dog": 4, "val/emu": 2}


@pytest.fixture
def root(tmp_path):
    return trees.plant(tmp_path / "animals", COUNTS)


@pytest.fixture
def data(root, tmp_path):
    return Data(
        f"folder:{root}", pp=PP, pp_eval=PP_EVAL, eval_split="val", data_dir=str(tmp_path / "data"), max_examples=None
    )


@pytest.fixture
def listed(monkeypatch):
    """The directories that have been listed, in order."""
    found = []
    original = folder._images

    def images(directory, *args):
        found.append("/".join(directory.split("/")[-2:]))
        return original(directory, *args)

    monkeypatch.setattr(folder, "_images", images)
    return found


def test_index(root, tmp_path, listed):
    found = Folder(str(root), str(tmp_path / "index"))
    assert found.classes == ("cat", "dog", "emu")
    assert found.splits == {"train": 33, "val": 9}
    assert np.bincount(found.labels("val")).tolist() == [3, 4, 2]
    assert sorted(listed) == sorted(COUNTS)
    names, (directory_of, starts, lengths) = found.names(), found.files("val")
    assert {
        f"{found.directories()[d]}/{names[s : s + n].decode()}"
        for d, s, n in zip(directory_of, starts, lengths, strict=True)
    } == {f"{d}/{i:03d}.png" for d, n in COUNTS.items() if d.startswith("val") for i in range(n)}
    # Slices have all classes.
    assert len(set(found.labels("train")[:12])) == 3


def test_only_changed_directories_are_listed_again(root, tmp_path, listed):
    index_dir = str(tmp_path / "index")
    first = Folder(str(root), index_dir)
    listed.clear()
    assert Folder(str(root), index_dir).fingerprint == first.fingerprint
    assert listed == []

    (root / "train/dog/new.jpg").write_bytes(trees.image(0))
    trees.age(root / "train/dog", 1800)
    second = Folder(str(root), index_dir)
    assert listed == ["train/dog"]
    assert second.splits == {"train": 34, "val": 9}
    assert second.fingerprint != first.fingerprint
    # Earlier files keep their order.
    labels = first.labels("train").tolist()
    assert any(labels == np.delete(second.labels("train"), i).tolist() for i in range(34))

    (root / "train/emu/000.png").unlink()
    (root / "val/fox").mkdir()
    (root / "val/fox/a.png").write_bytes(trees.image(1))
    third = Folder(str(root), index_dir)
    assert third.classes == ("cat", "dog", "emu", "fox")
    assert third.splits == {"train": 33, "val": 10}


def test_a_directory_that_has_just_changed_may_change_again(root, tmp_path, listed):
    """Without another modification time: file systems have coarse clocks."""
    (root / "val/cat/new.png").write_bytes(trees.image(0))
    Folder(str(root), str(tmp_path / "index"))
    listed.clear()
    Folder(str(root), str(tmp_path / "index"))
    assert listed == ["val/cat"]


def test_the_order_does_not_depend_on_the_root(root, tmp_path):
    other = trees.plant(tmp_path / "elsewhere", dict(reversed(COUNTS.items())))
    a, b = (Folder(str(path), str(tmp_path / "index")) for path in (root, other))
    assert a.labels("train").tolist() == b.labels("train").tolist()


def test_odd_names(tmp_path):
    root = trees.plant(tmp_path / "odd root", {"train/big cat": 1, "train/größe": 1, "train/a'b": 1})
    directory = os.fsencode(root / "train/big cat")
    for name in (b"\xff\xfe.png", "é x.JPG".encode(), b"new\nline.jpeg"):
        with open(os.path.join(directory, name), "wb") as file:
            file.write(trees.image(len(name)))
    (root / "train/big cat/.hidden.png").write_bytes(b"no image")
    data = Data(f"folder:{root}", pp=PP_EVAL, data_dir=str(tmp_path / "data"), eval_split="train")
    (batch,) = data.eval_batches(batch_size=6)
    names = {os.path.basename(path) for path in batch["filename"]}
    assert names == {b"000.png", b"\xff\xfe.png", "é x.JPG".encode(), b"new\nline.jpeg"}
    assert sorted(batch["text"].ravel()) == [0, 1, 1, 1, 1, 2]


def test_batches(data):
    run = list(itertools.islice(data.train_batches(batch_size=4, seed=1), 40))
    again = list(itertools.islice(data.train_batches(batch_size=4, seed=1, start_step=17), 23))
    for a, b in zip(run[17:], again, strict=True):
        assert all(np.array_equal(a[k], b[k]) for k in a)
    epoch = np.concatenate([batch["filename"] for batch in run[:8]])
    assert len(set(epoch)) > 28  # streams differ by one
    for batch in run:
        for path, label in zip(batch["filename"], batch["text"][:, 0], strict=True):
            assert path.split(b"/")[-2].decode() == data.class_names()[label]
    parts = [next(data.train_batches(batch_size=4, seed=1, process_index=i, process_count=2)) for i in range(2)]
    assert np.array_equal(np.concatenate([part["image"] for part in parts]), run[0]["image"])


def test_evaluation_and_slices(data, tmp_path):
    batches = list(data.eval_batches(batch_size=4))
    seen = [path for batch in batches for path in batch["filename"][batch["_mask"]]]
    assert len(seen) == len(set(seen)) == 9
    assert data.num_examples("train[:10]") == 10
    assert data.num_examples("train[50%:]+val") == 17 + 9
    sliced = [
        p for s in ("train[:10]", "train[10:]") for b in data.eval_batches(batch_size=1, split=s) for p in b["filename"]
    ]
    assert len(set(sliced)) == 33
    (example,) = data.examples("val", 1)
    assert example["image"].shape == (14, 12, 3)
    assert example["filename"] == seen[0]


def test_files_are_decoded_as_they_are(data):
    (batch,) = data.eval_batches(batch_size=9, pp="decode|keep('image', 'filename')")
    from PIL import Image

    for pixels, path in zip(batch["image"], batch["filename"], strict=True):
        assert np.array_equal(pixels, np.asarray(Image.open(path)))


def write(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (None, ["there is no folder", "root/train/class"]),
        ([], ["has no splits", "/train/<class>/"]),
        (["1.png"], ["has no splits"]),
        (["train/1.png", "val/2.png"], ["has no classes", "train, val", "/train/all/"]),
        (["train/cat/1.txt", "train/dog/notes"], ["2 classes, but no image", ".png"]),
    ],
)
def test_bad_folders(tmp_path, files, says):
    root = tmp_path / "root"
    if files is not None:
        root.mkdir()
        for name in files:
            write(root / name)
    with pytest.raises(ValueError, match=re.escape(says[0])) as error:
        sources.prepare(f"folder:{root}", str(tmp_path / "data"))
    assert "\n" not in str(error.value)
    assert str(root) in str(error.value)
    for part in says:
        assert part in str(error.value)


def test_ignored_files_are_logged(root, tmp_path, caplog):
    (root / "train/fox").mkdir()
    write(root / "train/cat/notes.txt")
    write(root / "train/cat/a.tiff")
    (root / "train/cat/more").mkdir()
    found = Folder(str(root), str(tmp_path / "index"))
    assert found.classes == ("cat", "dog", "emu", "fox")
    assert "1 classes have no images: train/fox" in caplog.text
    assert all(what in caplog.text for what in ("1 .txt", "1 .tiff", "1 directories"))
    # An empty class is allowed.
    data = Data(f"folder:{root}", pp=PP_EVAL, data_dir=str(tmp_path / "data"), eval_split="val")
    assert len(list(data.eval_batches(batch_size=9))) == 1


def test_a_split_that_does_not_exist(data):
    with pytest.raises(ValueError, match=r"no split 'validation', it has: train, val, and slices"):
        dataclasses.replace(data, eval_split="validation").prepare()


def test_a_damaged_index_is_created_again(root, tmp_path, caplog):
    fingerprint = Folder(str(root), str(tmp_path / "index")).fingerprint
    (file,) = (tmp_path / "index").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert Folder(str(root), str(tmp_path / "index")).fingerprint == fingerprint
    assert "is damaged" in caplog.text


def test_a_deleted_file(data, root):
    batches = data.train_batches(batch_size=4, seed=1)
    for path in root.glob("train/*/*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"animals/train/.*png of .* cannot be preprocessed .*No such file"):
        list(itertools.islice(batches, 40))


@pytest.mark.slow
def test_starting_on_many_files(tmp_path):
    """100,000 files: under 3 s the second time."""
    root = tmp_path / "many"
    for i in range(100):
        (root / f"train/{i:02d}").mkdir(parents=True)
        for j in range(1000):
            (root / f"train/{i:02d}/{j:03d}.png").touch()
    trees.age(root)
    name, data_dir = f"folder:{root}", str(tmp_path / "data")
    sources.prepare(name, data_dir)
    sources._sources.clear()
    start = time.process_time()
    sources.prepare(name, data_dir)
    assert Data(name, "", eval_split="train", data_dir=data_dir).num_examples() == 100_000
    assert time.process_time() - start < 1.5
