import functools
import hashlib
import http.server
import itertools
import random
import sys
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from jetformer.data import tokenizer
from jetformer.data.dataset import Data
from jetformer.data.train_tokenizer import read_texts
from runs import start

ALL_WORDS = "a the red green blue little cat dog bird sits stands on under table with two three café naïve"
WORDS = ALL_WORDS.split()
NUM_EXAMPLES = 40

with tfds.core.registered.skip_registration():

    class Sayings(tfds.core.GeneratorBasedBuilder):
        """Two or three captions as in coco_captions, the first of which identifies the example; and a text."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "id": np.int64,
                "title": tfds.features.Text(),
                "image": tfds.features.Image(shape=(4, 4, 3)),
                "captions": tfds.features.Sequence({"text": tfds.features.Text(), "number": np.int64}),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, sentences in enumerate(captions()):
                yield (
                    i,
                    {
                        "id": i,
                        "title": sentences[0].upper(),
                        "image": np.full((4, 4, 3), i, np.uint8),
                        "captions": [{"text": s, "number": k} for k, s in enumerate(sentences)],
                    },
                )


def captions():
    rng = random.Random(1)
    sentence = lambda: " ".join(rng.choices(WORDS, k=rng.randint(2, 8)))
    return [[sentence() for _ in range(2 + i % 2)] for i in range(NUM_EXAMPLES)]


TEXTS = [text for several in captions() for text in several]


@functools.cache
def trained():
    # Not a fixture: hypothesis does not allow one.
    return tokenizer.train(TEXTS, vocab_size=60)


@pytest.fixture
def model():
    return trained()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    path.write_bytes(trained())
    return str(path)


@pytest.fixture(scope="module")
def sayings(data_dir):
    Sayings(data_dir=data_dir).download_and_prepare()
    return str(data_dir)


def test_special_tokens(path):
    small = tokenizer.load(path)
    assert tokenizer.load(path) is small
    assert (small.pad_id, small.eos_id) == (0, 1)
    assert len(WORDS) + 3 <= small.vocab_size <= 60
    assert small.encode("") == []
    ids = small.encode("a red cat")
    assert 3 <= len(ids) < len("a red cat")
    assert min(ids) > 2
    # Without what follows the end, padding, and ids beyond the vocabulary, where a model may have its own tokens.
    assert small.decode([0, ids[0], small.vocab_size, *ids[1:], 10**9, -1, 0, 1, *ids]) == "a red cat"
    assert small.decode(np.array([*ids, 1, 0], np.int32)) == "a red cat"
    assert small.decode([]) == small.decode([1, *ids]) == ""


@settings(deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=12), st.sampled_from([" ", "  ", "\n"]))
def test_decode_inverts_encode_up_to_white_space(words, space):
    small = tokenizer.Tokenizer(trained())
    assert small.decode(small.encode(space.join(words))) == " ".join(words)


@given(st.one_of(st.text(st.characters(codec="utf-8")), st.binary()))
@settings(deadline=None)
def test_anything_can_be_encoded(text):
    small = tokenizer.Tokenizer(trained())
    assert all(0 < i < small.vocab_size and i != small.eos_id for i in small.encode(text))


def test_training_is_deterministic(model):
    assert tokenizer.train((t.encode() for t in TEXTS), vocab_size=60) == model
    assert tokenizer.train(TEXTS[1:], vocab_size=60) != model


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (TEXTS, "vocab_size 8 .*smaller than required_chars. 8 vs"),
        ([], "no texts"),
        ([" "], "no texts"),
    ],
)
def test_training_errors(texts, says):
    with pytest.raises(ValueError, match=says) as e:
        tokenizer.train(texts, vocab_size=8)
    assert "\n" not in str(e.value)


def test_a_model_without_end_of_text_is_refused(tmp_path):
    import sentencepiece

    prefix = tmp_path / "endless"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(prefix), vocab_size=60, hard_vocab_limit=False, eos_id=-1
    )
    with pytest.raises(ValueError, match=r"endless\.model: .*eos_id"):
        tokenizer.load(f"{prefix}.model")


# ---- Loading. ------------------------------------------------------------------------------------


def test_urls_are_read_through_fsspec(model):
    import fsspec

    with fsspec.open("memory://tokenizers/small.model", "wb") as f:
        f.write(model)
    assert tokenizer.load("memory://tokenizers/small.model").encode("a red cat")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("c4_eng", "no tokenizer 'c4_eng': .* c4_en, "),
        ("/nowhere/my.model", "no tokenizer '/nowhere/my.model'"),
        (__file__, "not a SentencePiece model"),
        ("what://is/this", "what"),
    ],
)
def test_models_that_cannot_be_loaded(name, says):
    with pytest.raises(ValueError, match=says) as e:
        tokenizer.load(name)
    assert "\n" not in str(e.value)


@pytest.fixture
def server(model, tmp_path, monkeypatch):
    """Serves small.model and page.model, which is not a model; returns its URL and the requests."""
    directory = tmp_path / "served"
    directory.mkdir()
    (directory / "small.model").write_bytes(model)
    (directory / "page.model").write_text("<html>Please log in</html>")
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=directory)

        def log_message(self, *args):
            requests.append(args)

    monkeypatch.setenv("no_proxy", "localhost")
    with http.server.ThreadingHTTPServer(("localhost", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://localhost:{server.server_port}", requests
        server.shutdown()
        thread.join()


def public(monkeypatch, url, sha256=None):
    monkeypatch.setitem(tokenizer.PUBLIC, "small", (url, sha256))
    tokenizer.load.cache_clear()


@pytest.mark.parametrize("where", ["table", "argument", None])
def test_download(server, model, tmp_path, monkeypatch, where):
    url, requests = server
    sha256 = hashlib.sha256(model).hexdigest()
    public(monkeypatch, f"{url}/small.model", sha256 if where == "table" else None)
    cache = tmp_path / "cache" / "tokenizers"
    kwargs = {"cache_dir": str(cache)} | ({"sha256": sha256} if where == "argument" else {})
    for _ in range(2):
        assert tokenizer.load("small", **kwargs).vocab_size == tokenizer.Tokenizer(model).vocab_size
        assert sorted(file.name for file in cache.iterdir()) == ["small.model", "small.sha256"]
        tokenizer.load.cache_clear()
    assert len(requests) == 1
    # The cached file is checked, too.
    (cache / "small.model").write_bytes(model[:-1])
    with pytest.raises(ValueError, match=rf"tokenizers/small\.model has sha256 .* {sha256}") as e:
        tokenizer.load("small", **kwargs)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("file", "sha256", "says"),
    [
        ("small.model", "0" * 64, f"small.model has sha256 .* {'0' * 64}"),
        ("page.model", None, "page.model: not a SentencePiece model"),
        ("other.model", None, r"other.model \(HTTP Error 404"),
    ],
)
def test_a_bad_download_is_not_kept(server, tmp_path, monkeypatch, file, sha256, says):
    public(monkeypatch, f"{server[0]}/{file}", sha256)
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match=says) as e:
        tokenizer.load("small", cache_dir=str(cache))
    assert "\n" not in str(e.value)
    assert not cache.exists()


def test_no_network(tmp_path, monkeypatch):
    with http.server.HTTPServer(("localhost", 0), None) as closed:
        port = closed.server_port
    public(monkeypatch, f"http://localhost:{port}/small.model")
    monkeypatch.setenv("no_proxy", "localhost")
    with pytest.raises(ValueError, match=f"http://localhost:{port}/small.model ") as e:
        tokenizer.load("small", cache_dir=str(tmp_path / "cache"))
    assert "\n" not in str(e.value)


# ---- Training on a dataset. ----------------------------------------------------------------------


def test_texts_of_a_dataset(sayings):
    read = lambda *args, **kwargs: [t.decode() for t in read_texts("sayings", *args, data_dir=sayings, **kwargs)]
    assert sorted(read("train", "captions/text")) == sorted(TEXTS)
    titles = [several[0].upper() for several in captions()]
    assert sorted(read("train", "title")) == sorted(titles)
    assert sorted(read("train", "title", lower=True)) == sorted(t.lower() for t in titles)
    assert read("train[:25%]", "title") == read("train", "title")[: NUM_EXAMPLES // 4]


@pytest.mark.parametrize(
    ("name", "split", "key", "says"),
    [
        ("sayingz", "train", "title", "no dataset 'sayingz'"),
        ("sayings", "test", "title", "no split 'test'.* train"),
        ("sayings", "train", "captions", "no texts under 'captions': it has texts under .*captions/text.*all.*image"),
        ("sayings", "train", "id", "no texts under 'id'"),
    ],
)
def test_texts_that_do_not_exist(sayings, name, split, key, says):
    with pytest.raises(ValueError, match=says) as e:
        read_texts(name, split, key, data_dir=sayings)
    assert "\n" not in str(e.value)


@pytest.mark.slow
def test_program(sayings, tmp_path):
    program = [sys.executable, "-m", "jetformer.data.train_tokenizer", "--train=sayings", f"--data_dir={sayings}"]
    program += ["--vocab_size=60", "--lower"]
    good = start([*program, "--key=title", f"--output={tmp_path / 'small.model'}"])
    bad = start([*program, "--key=title", f"--output={tmp_path}/nowhere/small.model"])
    _, log = good.communicate(timeout=120)
    assert good.returncode == 0, log
    small = tokenizer.load(str(tmp_path / "small.model"))
    assert small.decode(small.encode("two naïve cat")) == "two naïve cat"
    assert f"{small.vocab_size} tokens" in log
    _, log = bad.communicate(timeout=120)
    assert bad.returncode == 1
    assert log.splitlines()[-1] == f"error: --output: there is no directory {tmp_path}/nowhere"
    assert "Traceback" not in log
    assert [file.name for file in tmp_path.iterdir()] == ["small.model"]


@pytest.mark.slow
def test_the_old_command_names_the_new_one():
    process = start([sys.executable, "-m", "jetformer.data.tokenizer", "--train=sayings"])
    _, log = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "jetformer.data.train_tokenizer" in log
    assert len(log.splitlines()) == 1


# ---- Batches. ------------------------------------------------------------------------------------


def test_batches(sayings, path, monkeypatch):
    def batches(choose="choice", pad="modelled", **kwargs):
        pp = f'flatten|{choose}(inkey="captions/text", outkey="text")|caption({path!r}, 6, {pad!r})'
        pp += '|keep("id", "text", "text_mask", "text_loss")'
        data = Data("sayings", pp, shuffle_buffer_size=16, data_dir=sayings)
        return list(itertools.islice(data.train_batches(**{"batch_size": 8, "seed": 3} | kwargs), 12))

    run = batches()
    small = tokenizer.load(path)
    chosen = set()
    for batch in run:
        assert {k: (v.shape, v.dtype) for k, v in batch.items() if k != "id"} == {
            "text": ((8, 6), np.int32),
            "text_mask": ((8, 6), bool),
            "text_loss": ((8, 6), bool),
        }
        for i, text in zip(batch["id"], batch["text"], strict=True):
            options = [([*small.encode(s)] + 6 * [1])[:6] for s in captions()[i]]
            assert text.tolist() in options
            chosen.add(options.index(text.tolist()))
    assert chosen == {0, 1, 2}

    monkeypatch.setattr("os.cpu_count", lambda: 64)
    for again, batch in zip(batches(), run, strict=True):
        for k in batch:
            np.testing.assert_array_equal(again[k], batch[k])
    assert any((a["text"] != b["text"]).any() for a, b in zip(batches(start_step=12), run, strict=True))

    for batch in batches("first", "ignored"):
        for i, *masked in zip(*batch.values(), strict=True):
            ids = small.encode(captions()[i][0])
            n = len(ids)
            assert [row.tolist() for row in masked] == [
                (ids + [1] + 6 * [0])[:6],
                (n * [True] + 6 * [False])[:6],
                (n * [True] + [True] + 6 * [False])[:6],
            ]
