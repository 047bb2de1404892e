"""The data set of texts, from files in the format of the real ones, over a real download."""

import functools
import http.server
import threading

import numpy as np
import pytest

from jetformer.data import pipeline, tokenizer
from jetformer.data.builders.tinystories import tinystories

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
    """The data set, downloaded from a server on this machine."""
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / tinystories.FILES["train"]).write_text(TRAIN * 8, encoding="utf-8")
    (hub / tinystories.FILES["validation"]).write_text(TRAIN, encoding="utf-8")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(hub))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(tinystories, "URL", f"http://127.0.0.1:{server.server_port}")
        pipeline.prepare("tinystories", str(tmp_path / "data"))
        server.shutdown()
    return str(tmp_path / "data")


def test_batches(prepared, tmp_path):
    # 8 times one after the other: the last story of each is one with the next one's first.
    assert pipeline.num_examples("tinystories", "train", prepared) == 1 + 8 + 7 + 1
    model = tmp_path / "stories.model"
    model.write_bytes(tokenizer.train(TRAIN.split("\n"), vocab_size=60))
    pp = f"lower | caption({str(model)!r}, 24, pad='ignored') | keep('text', 'text_mask', 'text_loss')"
    batch = next(pipeline.eval_batches("tinystories", "validation", pp, batch_size=3, data_dir=prepared))
    words = tokenizer.load(str(model))
    assert "one day, ann saw a dog." in [words.decode(row) for row in batch["text"]]  # TFDS has an order of its own
    assert (batch["text_loss"].sum(1) == np.minimum(batch["text_mask"].sum(1) + 1, 24)).all()
