"""Captions of a folder's images: in text files and in metadata.jsonl, cached in the folder's index."""

import itertools
import json
import os
import pathlib
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trees
from jetformer.data import sources
from jetformer.data.dataset import Data
from jetformer.data.folder import Folder
from jetformer.data.train_tokenizer import read_texts

PP = "decode|resize(8)|choice(inkey='captions', outkey='text')|keep('image', 'text', 'filename')"
COUNTS = {"train/cat": 5, "train/dog": 6, "val/cat": 3}


def texts_of(path: pathlib.Path) -> list[str]:
    """The captions of an image: one or several, which tell it apart from all others."""
    name = "/".join(path.parts[-3:])
    return [f"{name}, caption {i}" for i in range(1 + len(name.encode()) % 3 + int(path.stem) % 2)]


def images(root: pathlib.Path) -> list[pathlib.Path]:
    return sorted(root.rglob("*.png"))


def write_text_files(root: pathlib.Path) -> None:
    for image in images(root):
        image.with_suffix(".txt").write_text("\n".join(texts_of(image)) + "\n", encoding="utf-8")
    age_files(root)


def write_metadata(root: pathlib.Path) -> None:
    for split in root.iterdir():
        lines = []
        for image in images(split):
            texts = texts_of(image)
            row = {"file_name": str(image.relative_to(split)), "text": texts if len(texts) > 1 else texts[0]}
            lines.append(json.dumps(row | {"source": "a test"}) + "\n")
        (split / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    age_files(root)


def age_files(root: pathlib.Path) -> None:
    """Makes all look as if it had been written a while ago, each time earlier than before."""
    for path in [root, *root.rglob("*")]:
        os.utime(path, (path.stat().st_mtime - 3600,) * 2)


@pytest.fixture
def root(tmp_path):
    return trees.plant(tmp_path / "animals", COUNTS)


def opened(root, pp=PP) -> Data:
    where = str(root.parent / "data")
    return Data(f"folder:{root}", pp=pp, pp_eval=pp.replace("choice", "first"), eval_split="val", data_dir=where)


def found_captions(root, split) -> dict[str, list[str]]:
    """The captions of each image of a split, as the dataset has them."""
    examples = opened(root).examples(split, 1000)
    return {os.fsdecode(e["filename"]): [text.decode() for text in e["captions"]] for e in examples}


def expected(root, split) -> dict[str, list[str]]:
    return {str(image): texts_of(image) for image in images(root / split)}


@pytest.mark.parametrize("write", [write_text_files, write_metadata])
def test_each_image_has_its_captions(root, write):
    write(root)
    for split in ("train", "val"):
        assert found_captions(root, split) == expected(root, split)
    data = opened(root)
    assert data.class_names() == ("cat", "dog")
    assert {example["label"].item() for example in data.examples("train", 20)} == {0, 1}


@pytest.mark.parametrize("write", [write_text_files, write_metadata])
def test_without_classes(tmp_path, write):
    """Images in the directories of splits, as Hugging Face's imagefolder has them."""
    root = trees.plant(tmp_path / "birds", {"train": 7, "val": 2})
    write(root)
    for split in ("train", "val"):
        assert found_captions(root, split) == expected(root, split)
    data = opened(root)
    assert data.class_names() is None
    assert "label" not in data.examples("val", 1)[0]
    assert data.num_train_examples() == 7
    with pytest.raises(ValueError, match="no label"):
        Data(data.name, pp=PP, data_dir=data.data_dir, classes="cat").train_reader()


def test_both_forms_in_two_splits(root, caplog):
    write_metadata(root)
    (root / "val/metadata.jsonl").unlink()
    for image in images(root / "val"):
        image.with_suffix(".txt").write_text("\r\n".join(texts_of(image)))
    for split in ("train", "val"):
        assert found_captions(root, split) == expected(root, split)
    assert "ignored" not in caplog.text


def test_batches_are_a_function_of_seed_and_step(root):
    write_text_files(root)
    data = opened(root)
    run = list(itertools.islice(data.train_batches(batch_size=2, seed=3), 30))
    resumed = list(itertools.islice(data.train_batches(batch_size=2, seed=3, start_step=13), 17))
    for a, b in zip(run[13:], resumed, strict=True):
        assert all(np.array_equal(a[key], b[key]) for key in a)
    drawn: dict[bytes, set[bytes]] = {}
    for batch in run:
        for path, text in zip(batch["filename"], batch["text"], strict=True):
            drawn.setdefault(path, set()).add(text)
            assert text.decode() in texts_of(pathlib.Path(os.fsdecode(path)))
    assert max(map(len, drawn.values())) > 1  # not always the same
    other = list(itertools.islice(data.train_batches(batch_size=2, seed=4), 30))
    assert any((a["text"] != b["text"]).any() for a, b in zip(run, other, strict=True))
    for batch in data.eval_batches(batch_size=1):
        assert batch["text"][0].decode() == texts_of(pathlib.Path(os.fsdecode(batch["filename"][0])))[0]


@pytest.mark.parametrize("write", [write_text_files, write_metadata])
def test_the_index_follows_captions_that_are_edited_in_place(root, write):
    """No directory changes then."""
    write(root)
    index_dir = str(root.parent / "index")
    first = Folder(str(root), index_dir)
    assert Folder(str(root), index_dir).fingerprint == first.fingerprint
    file = root / ("val/cat/001.txt" if write is write_text_files else "val/metadata.jsonl")
    for text in ("An edited caption", "Another one, of  "):  # of the same size
        before = file.read_text()
        file.write_text(re.sub(r"val/cat/001.png, caption 0|An edited caption", text, before))
        age_files(root)
        again = Folder(str(root), index_dir)
        assert again.fingerprint != first.fingerprint
        assert text.strip().encode() in again.captions("val")[0]
        first = again


def test_captions_that_have_just_changed_may_change_again(root):
    """Without another modification time: file systems have coarse clocks."""
    write_text_files(root)
    file, index_dir = root / "val/cat/001.txt", str(root.parent / "index")
    file.write_text("one")
    stat = file.stat()
    Folder(str(root), index_dir)
    file.write_text("two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert b"two" in Folder(str(root), index_dir).captions("val")[0]


def test_captions_that_are_added_and_removed(root):
    index_dir = str(root.parent / "index")
    plain = Folder(str(root), index_dir)
    assert not plain.captioned
    write_metadata(root)
    captioned = Folder(str(root), index_dir)
    assert captioned.captioned
    assert captioned.fingerprint != plain.fingerprint
    for split in ("train", "val"):
        (root / split / "metadata.jsonl").unlink()
    age_files(root)
    again = Folder(str(root), index_dir)
    assert not again.captioned
    assert again.fingerprint == plain.fingerprint


def test_captions_belong_to_the_identity_of_the_data(root):
    write_text_files(root)
    before = opened(root).identity()
    (root / "val/cat/001.txt").write_text("another caption")
    sources.prepare(f"folder:{root}", str(root.parent / "data"))
    assert opened(root).identity() != before


def line(**row) -> str:
    return json.dumps(row) + "\n"


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("train/dog/002.txt", None, ["train/dog/002.png", "no caption", "train/dog/002.txt"]),
        ("train/dog/002.txt", b"", ["train/dog/002.txt:1", "empty caption"]),
        ("train/dog/002.txt", b"a dog\n \na cat", ["train/dog/002.txt:2", "empty caption"]),
        ("train/dog/002.txt", b"a dog\n\xff", ["train/dog/002.txt", "not UTF-8"]),
        ("val/metadata.jsonl", b"\xff", ["val/metadata.jsonl", "not UTF-8"]),
        ("val/metadata.jsonl", line(file_name="cat/000.png", text="a") + "{", ["val/metadata.jsonl:2", "not JSON"]),
        ("val/metadata.jsonl", "", ["val/metadata.jsonl:1", "not JSON"]),
        ("val/metadata.jsonl", "[]", ["val/metadata.jsonl:1", "file_name"]),
        ("val/metadata.jsonl", line(text="a"), ["val/metadata.jsonl:1", "no 'file_name'", "'text'"]),
        ("val/metadata.jsonl", line(file_name="cat/000.png"), ["val/metadata.jsonl:1", "no 'text'", "'file_name'"]),
        ("val/metadata.jsonl", line(file_name="cat/9.png", text="a"), ["val/metadata.jsonl:1", "'cat/9.png'"]),
        ("val/metadata.jsonl", line(file_name=3, text="a"), ["val/metadata.jsonl:1", "names 3"]),
        ("val/metadata.jsonl", 2 * line(file_name="cat/000.png", text="a"), [":2", "'cat/000.png' again"]),
        ("val/metadata.jsonl", line(file_name="cat/000.png", text=[]), ["val/metadata.jsonl:1", "[]"]),
        ("val/metadata.jsonl", line(file_name="cat/000.png", text=["a", 1]), ["val/metadata.jsonl:1", "['a', 1]"]),
        ("val/metadata.jsonl", line(file_name="cat/000.png", text=["a", " "]), [":1", "empty caption"]),
        ("val/metadata.jsonl", line(file_name="cat/000.png", text="\ud800"), [":1", "not UTF-8"]),
        ("val/metadata.jsonl", line(file_name="cat/000.png", text="a"), ["val/cat/001.png", "val/metadata.jsonl"]),
    ],
)
def test_bad_captions(root, file, content, says):
    write_text_files(root)
    if content is None:
        (root / file).unlink()
    else:
        (root / file).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=re.escape(says[0])) as error:
        sources.prepare(f"folder:{root}", str(root.parent / "data"))
    assert "\n" not in str(error.value)
    assert str(root) in str(error.value)
    for part in says:
        assert part in str(error.value)
    # Once mended, it is read.
    write_text_files(root)
    (root / "val/metadata.jsonl").unlink(missing_ok=True)
    assert found_captions(root, "val") == expected(root, "val")


LINES = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1).map(str.strip).filter(bool)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(captions=st.lists(st.lists(LINES, min_size=1, max_size=4), min_size=3, max_size=3))
def test_any_text_survives(tmp_path_factory, captions):
    """In both forms, whatever the script; a byte-order mark does not belong to a caption."""
    captions = [[text.removeprefix("\ufeff") or "a" for text in several] for several in captions]
    captions = [[text.strip() or "a" for text in several] for several in captions]
    root = trees.plant(tmp_path_factory.mktemp("any") / "root", {"text": 3, "json": 3})
    rows = []
    for i, several in enumerate(captions):
        (root / f"text/{i:03d}.txt").write_text("\n".join(several), encoding="utf-8-sig" if i else "utf-8")
        rows.append(line(file_name=f"./{i:03d}.png", text=several))
    (root / "json/metadata.jsonl").write_text("".join(rows))
    found = Folder(str(root), str(root.parent / "index"))
    for split in ("text", "json"):
        texts, firsts = found.captions(split)
        numbers, starts, lengths = found.files(split)
        images = [int(found.names()[s : s + n].decode()[:3]) for s, n in zip(starts, lengths, strict=True)]
        for place, image in enumerate(images):
            assert [text.decode() for text in texts[firsts[place] : firsts[place + 1]]] == captions[image]
        assert len(numbers) == 3


def test_a_tokenizer_is_trained_on_them(root):
    write_text_files(root)
    read = list(read_texts(f"folder:{root}", "train", "captions", lower=True, data_dir=str(root.parent / "data")))
    assert sorted(text.decode() for text in read) == sorted(itertools.chain(*expected(root, "train").values()))
    with pytest.raises(ValueError, match=r"no texts under 'text'.* captions.* label"):
        read_texts(f"folder:{root}", "train", "text", data_dir=str(root.parent / "data"))
