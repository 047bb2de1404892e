"""The dataset of texts, downloaded from files in the format of the real ones."""

import functools
import http.server
import threading

import numpy as np
import pytest

from jetformer.data import sources, tokenizer
from jetformer.data.builders.tinystories import tinystories
from jetformer.data.dataset import Data

TRAIN = (
    "Tom had a cat.\n\nThe cat was red.\n<|endoftext|>\nOne day, Ann saw a dog.\n<|endoftext|>\n\n"
    "<|endoftext|>\nThe “end”"
)


def test_stories():
    assert list(tinystories.stories(TRAIN.splitlines(keepends=True))) == [
        "Tom had a cat.\n\nThe cat was red.",
        "One day, Ann saw a dog.",
        "The “end”",
    ]
    assert list(tinystories.stories(["a<|endoftext|>b<|endoftext|>"])) == ["a", "b"]
    assert list(tinystories.stories([])) == []


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """The dataset, downloaded from a server on this machine."""
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / tinystories.FILES["train"]).write_text(TRAIN * 8, encoding="utf-8")
    (hub / tinystories.FILES["validation"]).write_text(TRAIN, encoding="utf-8")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(hub))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(tinystories, "URL", f"http://127.0.0.1:{server.server_port}")
        sources.prepare("tinystories", str(tmp_path / "data"))
        server.shutdown()
    return str(tmp_path / "data")


def test_batches(prepared, tmp_path):
    model = tmp_path / "stories.model"
    model.write_bytes(tokenizer.train(TRAIN.split("\n"), vocab_size=60))
    pp = f"lower | caption({str(model)!r}, 24, pad='ignored') | keep('text', 'text_mask', 'text_loss')"
    data = Data("tinystories", pp, data_dir=prepared)
    # 8 copies: the last story of each is joined with the first of the next.
    assert data.num_train_examples() == 1 + 8 + 7 + 1
    batch = next(data.eval_batches(batch_size=3))
    words = tokenizer.load(str(model))
    assert "one day, ann saw a dog." in [words.decode(row) for row in batch["text"]]  # in TFDS's order
    assert (batch["text_loss"].sum(1) == np.minimum(batch["text_mask"].sum(1) + 1, 24)).all()
