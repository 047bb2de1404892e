"""WebDataset shards are read as the other datasets are."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from jetformer.data import sources, webdataset
from jetformer.data.dataset import Data

PP = "decode | choice(inkey='captions', outkey='text') | keep('image', 'label', 'text')"
FIRST = "decode | first(inkey='captions', outkey='text') | keep('image', 'label', 'text')"


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_tar(path, files: dict[str, bytes], mode="w") -> None:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def directory(tmp_path_factory, pixels):
    """Three shards of four examples, as img2dataset and webdataset write them: with keys in directories, further files,
    suffixes in capitals, and one shard that is compressed."""
    directory = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        files = {}
        for i in range(4 * shard, 4 * shard + 4):
            kind = "PNG" if i % 2 else "BMP"
            files[f"./some.dir/{i:05d}.{kind if i == 3 else kind.lower()}"] = encoded(pixels[i], kind)
            files[f"./some.dir/{i:05d}.txt"] = f"picture {i}\nalso {i}\n".encode()
            files[f"./some.dir/{i:05d}.cls"] = b"%d" % (i % 3)
            files[f"./some.dir/{i:05d}.json"] = json.dumps({"width": 8}).encode()
        write_tar(directory / f"{shard:02d}.tar", files, "w:gz" if shard == 1 else "w")
    return directory


@pytest.fixture(scope="module")
def name(directory, tmp_path_factory):
    name = f"webdataset:{directory}/{{00..02}}.tar"
    sources.prepare(name, os.fspath(directory / "prepared"))
    return name


def rows(batches) -> dict[str, tuple]:
    return {
        text.decode(): (image.tobytes(), int(label))
        for batch in batches
        for image, label, text, valid in zip(*(batch[k] for k in ("image", "label", "text", "_mask")), strict=True)
        if valid
    }


def test_examples(name, directory, pixels):
    """The same pixels, captions and labels, each once; an image keeps its encoding."""
    data = Data(name, PP, FIRST, eval_split="train", data_dir=os.fspath(directory / "prepared"))
    expected = {f"picture {i}": (pixels[i].tobytes(), i % 3) for i in range(12)}
    assert rows(data.eval_batches(batch_size=5)) == expected
    source = sources.open_source(name, os.fspath(directory / "prepared"))
    kinds = {bytes(source.deserialize(r)["image"].numpy())[:2] for r in source.read(source.shards("train"))}
    assert kinds == {b"\x89P", b"BM"}
    assert data.has_texts() is False
    parts = [Data(name, PP, FIRST, eval_split=s, data_dir=data.data_dir) for s in ("train[:50%]", "train[50%:]")]
    first, second = (rows(part.eval_batches(batch_size=4)) for part in parts)
    assert len(first) == len(second) == 6
    assert first | second == expected


def test_training_resumes(name, directory):
    data = Data(name, PP, data_dir=os.fspath(directory / "prepared"), shuffle_buffer_size=4)
    whole = data.train_batches(batch_size=4, seed=1)
    batches = [next(whole) for _ in range(5)]
    resumed = next(data.train_batches(batch_size=4, seed=1, start_step=4))
    for key in ("image", "text", "label"):
        np.testing.assert_array_equal(resumed[key], batches[4][key])
    assert {text.decode().split()[0] for batch in batches for text in batch["text"]} == {"picture", "also"}


def test_patterns(directory):
    assert webdataset.expand("/a/{098..101}.tar") == [f"/a/{i}.tar" for i in ("098", "099", "100", "101")]
    assert webdataset.expand("gs://b/{x,y}-{0..1}.tar") == [f"gs://b/{i}.tar" for i in ("x-0", "x-1", "y-0", "y-1")]
    assert webdataset.expand(f"{directory}/*.tar") == [f"{directory}/{i}.tar" for i in ("00", "01", "02")]
    with pytest.raises(ValueError, match=rf"{directory}/\*\.zip"):
        webdataset.expand(f"{directory}/*.zip")


IMAGE = encoded(np.zeros((8, 8, 3), np.uint8), "PNG")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"a\.tar has no files: .*\.jpg"),
        ({"0.txt": b"a"}, r"a\.tar has \.txt: .*\.jpg"),
        ({"0.png": IMAGE, "0.txt": b"a", "1.png": IMAGE}, r"example 1 of .*a\.tar has no captions"),
        ({"0.png": IMAGE, "0.cls": b"cat"}, r"label of 0 of .*a\.tar .*'cat'"),
        ({"0.png": IMAGE, "0.txt": b"\xff"}, r"captions of 0 of .*a\.tar .*utf-8"),
    ],
)
def test_bad_shards(files, message, tmp_path):
    write_tar(tmp_path / "a.tar", files)
    with pytest.raises(ValueError, match=message) as error:
        sources.prepare(f"webdataset:{tmp_path}/a.tar", os.fspath(tmp_path))
    assert "\n" not in str(error.value)


def test_shards_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}/none\.tar"):
        sources.prepare(f"webdataset:{tmp_path}/none.tar", os.fspath(tmp_path))
    write_tar(tmp_path / "whole.tar", {f"{i}.png": IMAGE for i in range(30)})
    content = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "part.tar").write_bytes(content[:20000])
    with pytest.raises(ValueError, match=rf"{tmp_path}/part\.tar"):
        sources.prepare(f"webdataset:{tmp_path}/part.tar", os.fspath(tmp_path))
