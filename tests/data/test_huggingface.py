"""Datasets of the Hugging Face Hub: parquet files in its layout, in a directory and from a hub on this machine."""

import hashlib
import http.server
import io
import json
import os
import re
import subprocess
import sys
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import trees
from jetformer.data import huggingface, sources
from jetformer.data.dataset import Data

PP = "decode|label_as_text|keep('image', 'text')"
CLASSES = ["tench", "goldfish", "shark"]
# The columns' features, as in the Hub's parquet files.
FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": CLASSES, "_type": "ClassLabel"},
    "captions": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
}


def encoded(i: int) -> bytes:
    return trees.image(i, mode="L" if i == 3 else "RGB", kind="JPEG")


def table(start: int, stop: int) -> pa.Table:
    rows = [
        {
            "image": {"bytes": encoded(i), "path": f"{i}.jpg"},
            "label": i % 3,
            "captions": [f"a {CLASSES[i % 3]}", "a fish"],
        }
        for i in range(start, stop)
    ]
    metadata = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
    return pa.Table.from_pylist(rows).replace_schema_metadata(metadata)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """ImageNet-1k's layout: parquet shards of each split."""
    root = tmp_path_factory.mktemp("hub") / "imagenet"
    (root / "data").mkdir(parents=True)
    for i in range(2):
        pa.parquet.write_table(table(10 * i, 10 * i + 10), root / f"data/train-{i:05d}-of-00002.parquet")
    pa.parquet.write_table(table(20, 26), root / "data/validation-00000-of-00001.parquet")
    return root


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("huggingface:ILSVRC/imagenet-1k", ("ILSVRC/imagenet-1k", None)),
        ("huggingface:roneneldan/TinyStories", ("roneneldan/TinyStories", None)),
        ("huggingface:a/b/c-d", ("a/b", "c-d")),
        ("huggingface:microsoft__cats_vs_dogs", ("microsoft/cats_vs_dogs", None)),
        ("huggingface:/data/x", ("/data/x", None)),
    ],
)
def test_names(name, wanted):
    assert huggingface.split_name(name) == wanted


@pytest.mark.parametrize("name", ["huggingface:", "huggingface:a/b/c/d", "huggingface:a b"])
def test_names_of_another_form(name):
    with pytest.raises(ValueError, match=r"huggingface:owner/name"):
        huggingface.split_name(name)


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"package datasets .*: pip install -e '.\[hf\]'") as error:
        Data("huggingface:owner/name", pp=PP, data_dir=str(tmp_path)).prepare()
    assert "\n" not in str(error.value)


def test_a_prepared_dataset_needs_no_package(tmp_path, monkeypatch):
    with tfds.core.registered.skip_registration():

        class Owner_Name(tfds.core.GeneratorBasedBuilder):
            name = "owner__name"
            VERSION = tfds.core.Version("0.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"id": np.int64}))

            def _split_generators(self, dl_manager):
                return {"train": ((i, {"id": i}) for i in range(7))}

            def _generate_examples(self):
                pass

    Owner_Name(data_dir=tmp_path).download_and_prepare()
    monkeypatch.setitem(sys.modules, "datasets", None)
    data = Data("huggingface:Owner/Name", pp="", eval_split="train", data_dir=str(tmp_path))
    data.prepare()
    assert data.num_examples() == 7


@pytest.fixture(scope="module")
def data(repository, tmp_path_factory):
    pytest.importorskip("datasets")
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", home)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        data = Data(
            f"huggingface:{repository}", pp=PP, shuffle_buffer_size=10, data_dir=str(tmp_path_factory.mktemp("data"))
        )
        data.prepare()
    return data


def test_parquet(data):
    assert data.num_train_examples() == 20
    assert data.num_examples() == 6
    assert data.class_names() == tuple(CLASSES)
    (batch,) = data.eval_batches(batch_size=20, split="train")
    assert batch["text"][:, 0].tolist() == [i % 3 for i in range(20)]
    for i in range(20):
        pixels = np.asarray(Image.open(io.BytesIO(encoded(i))).convert("RGB"), np.int64)
        assert abs(batch["image"][i] - pixels).max() <= 6
    (batch,) = data.eval_batches(batch_size=2, split="train[3:5]", pp="first(key='captions')|keep('captions')")
    assert batch["captions"].tolist() == [b"a tench", b"a goldfish"]
    one = next(data.train_batches(batch_size=4, seed=0))
    assert one["image"].shape == (4, 14, 12, 3)


def test_images_keep_their_bytes(data):
    """They are not encoded again."""
    source = sources.open_source(data.name, data.data_dir)
    records = list(source.read(source.shards("train")))
    assert [source.deserialize(record)["image"].numpy() for record in records] == [encoded(i) for i in range(20)]


# ---- A hub. --------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves as much of the Hub as a gated repository needs."""

    root, seen = None, None
    COMMIT = "0123456789" * 4

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        paths = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}").get("paths", [])
        found = [e for e in self._tree() if e["path"] in paths]
        self._send(json.dumps(found).encode())

    def do_GET(self):
        type(self).seen.append((self.path, self.headers.get("Authorization")))
        if self.headers.get("Authorization") != "Bearer hf_secret":
            self._send(b'{"error": "Access to dataset is restricted"}', 401, {"X-Error-Code": "GatedRepo"})
        elif re.fullmatch(r"/api/datasets/owner/fish(/revision/\w+)?(\?.*)?", self.path):
            siblings = [{"rfilename": entry["path"]} for entry in self._tree()]
            info = {"id": "owner/fish", "sha": self.COMMIT, "private": False, "gated": "auto", "siblings": siblings}
            self._send(json.dumps(info | {"tags": [], "downloads": 0, "disabled": False}).encode())
        elif found := re.fullmatch(r"/api/datasets/owner/fish/tree/\w+(?:/([^?]*))?(\?.*)?", self.path):
            folder, everything = found[1] or ".", "recursive=true" in self.path.lower()
            self._send(json.dumps([e for e in self._tree() if everything or e["in"] == folder]).encode())
        elif found := re.fullmatch(r"/datasets/owner/fish/resolve/\w+/(.*)", self.path):
            path = self.root / found[1].replace("%2F", "/")
            if path.is_file():
                self._send(path.read_bytes())
            else:
                self._send(b"", 404, {"X-Error-Code": "EntryNotFound"})
        else:
            self._send(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    def _tree(self):
        return [
            {
                **{"type": "file" if path.is_file() else "directory", "path": str(path.relative_to(self.root))},
                **{"size": path.stat().st_size if path.is_file() else 0, "oid": "0" * 40},
                "in": str(path.parent.relative_to(self.root)),
            }
            for path in self.root.rglob("*")
        ]

    def _send(self, content, status=200, headers=None):
        self.send_response(status)
        common = {
            "Content-Length": len(content),
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": self.COMMIT,
        }
        for key, value in (common | (headers or {})).items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def hub(repository):
    handler = type("Served", (Hub,), {"root": repository, "seen": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield handler, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


PREPARE = (
    "import sys; from jetformer.data.dataset import Data; d = Data('huggingface:Owner/Fish'.lower(), pp='', "
    "data_dir=sys.argv[1]); d.prepare(); print(d.num_train_examples(), d.num_examples(), d.class_names())"
)


def prepare(hub, tmp_path, **environment):
    variables = os.environ | {"HF_ENDPOINT": hub[1], "HF_HOME": str(tmp_path / "home")} | environment
    command = [sys.executable, "-c", PREPARE, str(tmp_path / "data")]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300)


@pytest.mark.slow
def test_a_gated_repository_by_name(hub, tmp_path):
    pytest.importorskip("datasets")
    done = prepare(hub, tmp_path, HF_TOKEN="hf_secret")
    assert done.stdout.splitlines()[-1:] == [f"20 6 {tuple(CLASSES)}"], done.stderr[-2000:] + str(hub[0].seen)
    # From then on the hub is not asked.
    hub[0].seen.clear()
    assert prepare(hub, tmp_path, HF_TOKEN="").returncode == 0
    assert hub[0].seen == []


@pytest.mark.slow
def test_a_gated_repository_without_a_token(hub, tmp_path):
    pytest.importorskip("datasets")
    done = prepare(hub, tmp_path, HF_TOKEN="")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: cannot load dataset 'huggingface:owner/fish'")
    assert "HF_TOKEN" in last


def test_prepared_names():
    assert huggingface.tfds_name("ILSVRC/imagenet-1k") == "ilsvrc__imagenet_1k"
    assert huggingface.tfds_name("/data/My set") == "data__my_set"
