import itertools
import re
import shutil

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.core.utils import tqdm_utils

from jetformer.data import pictures, pipeline, preprocess, sources
from jetformer.data.dataset import Data

NUM_TRAIN, NUM_TEST = 41, 11
AUGMENT = 'decode|resize_small(12)|random_crop(8)|flip_lr|keep("image", "id")'
PLAIN = 'decode|resize_small(8)|central_crop(8)|keep("image", "id")'

# Unregistered, so that the pipeline must find it by its files, as any prepared dataset.
with tfds.core.registered.skip_registration():

    class Pebbles(tfds.core.GeneratorBasedBuilder):
        """JPEG images of different sizes in several shards."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                "id": np.int64,
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples(0, NUM_TRAIN),
                "test": self._generate_examples(NUM_TRAIN, NUM_TRAIN + NUM_TEST),
            }

        def _generate_examples(self, start, stop):
            for i in range(start, stop):
                rng = np.random.default_rng(i)
                size = (*rng.integers(12, 40, size=2), 3)
                yield i, {"image": rng.integers(0, 256, size=size, dtype=np.uint8), "id": i}


@pytest.fixture(scope="module")
def builder(data_dir):
    builder = Pebbles(data_dir=data_dir)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=4))
    assert builder.info.splits["train"].num_shards == 4
    return builder


@pytest.fixture
def train(builder, data_dir):
    def batches(n, split="train", pp=AUGMENT, **kwargs):
        size = kwargs.pop("shuffle_buffer_size", 16)
        data = Data("pebbles", pp, train_split=split, shuffle_buffer_size=size, data_dir=data_dir)
        return list(itertools.islice(data.train_batches(**{"batch_size": 6, "seed": 3} | kwargs), n))

    return batches


@pytest.fixture
def evaluate(builder, data_dir):
    def batches(split="train", pp=PLAIN, **kwargs):
        return list(Data("pebbles", pp, eval_split=split, data_dir=data_dir).eval_batches(**kwargs))

    return batches


def ids(batches):
    return np.concatenate([b["id"][b["_mask"]] if "_mask" in b else b["id"] for b in batches])


def assert_equal(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for k in x:
            np.testing.assert_array_equal(x[k], y[k])


@pytest.mark.parametrize("process", [{}, {"process_index": 1, "process_count": 2}])
def test_batches_from_a_start_step_are_those_of_the_whole_run(train, process):
    run = train(30, **process)  # 4.4 epochs
    for step in 0, 1, 6, 7, 20:
        assert_equal(run[step:], train(30 - step, start_step=step, **process))


def test_every_epoch_has_all_examples_in_another_order(train):
    order = ids(train(164, batch_size=1))
    epochs = order.reshape(4, NUM_TRAIN)
    for epoch in epochs:
        assert sorted(epoch) == list(range(NUM_TRAIN))
    assert len({tuple(e) for e in epochs}) == 4
    assert tuple(ids(train(164, batch_size=1, seed=4))) != tuple(order)


def test_each_epoch_is_augmented_differently(train):
    batches = train(164, batch_size=1)
    images = np.concatenate([b["image"] for b in batches]).reshape(4, NUM_TRAIN, 8, 8, 3)
    by_id = [e[np.argsort(o)] for e, o in zip(images, ids(batches).reshape(4, -1), strict=True)]
    for a, b in itertools.pairwise(by_id):
        assert (a != b).any(axis=(1, 2, 3)).mean() > 0.5


@pytest.mark.parametrize("process_count", [2, 4, 8])
def test_batches_are_the_same_for_all_numbers_of_processes(train, process_count):
    whole = train(9, batch_size=16, start_step=5)
    parts = [
        train(9, batch_size=16, start_step=5, process_index=i, process_count=process_count)
        for i in range(process_count)
    ]
    for batch, *of_processes in zip(whole, *parts, strict=True):
        together = {k: np.concatenate([b[k] for b in of_processes]) for k in batch}
        assert_equal([batch], [together])


@pytest.mark.parametrize(("process_count", "sizes"), [(1, [14, 14, 13]), (3, [14, 14, 13])])
def test_streams_share_the_split(train, process_count, sizes, monkeypatch):
    monkeypatch.setattr(pipeline, "_NUM_STREAMS", 3)
    parts = [
        train(14, batch_size=3, process_index=i, process_count=process_count, shuffle_buffer_size=99)
        for i in range(process_count)
    ]
    assert all(b["image"].shape == (3 // process_count, 8, 8, 3) for part in parts for b in part)
    streams = np.concatenate([np.stack([b["id"] for b in part], axis=1) for part in parts])
    epoch = [set(ids) for ids in streams]
    assert sorted(map(len, epoch), reverse=True) == sizes
    assert set.union(*epoch) == set(range(NUM_TRAIN))


@pytest.mark.parametrize(("num_examples", "process_count"), [(1, 1), (3, 1), (4, 1), (4, 2), (6, 1)])
def test_few_examples_are_seen_equally_often(train, num_examples, process_count):
    """So a model can be tested on memorizing four images."""
    few = {"split": f"train[:{num_examples}]", "batch_size": 16, "process_count": process_count}
    parts = [train(3, process_index=i, **few) for i in range(process_count)]
    _, counts = np.unique(np.concatenate([ids(part) for part in parts]), return_counts=True)
    assert counts.tolist() == [48 // num_examples] * num_examples


def test_fewer_examples_than_processes_are_refused(train):
    with pytest.raises(ValueError, match=r"2 example\(s\).* 4 process"):
        train(1, "train[:2]", batch_size=16, process_count=4)


def test_slices_and_sums_of_splits(train, evaluate):
    everything = set(range(NUM_TRAIN))
    rest, first = set(ids(train(31, "train[10:]", batch_size=1))), set(ids(train(10, "train[:10]")))
    assert len(rest) == 31
    assert first | rest == everything
    assert rest == set(ids(evaluate("train[10:]", batch_size=4)))
    assert len(set(ids(train(NUM_TRAIN + NUM_TEST, "train+test", batch_size=1)))) == 52


def test_types_and_shapes_of_a_batch(data_dir):
    pp = 'decode(channels=1)|label_as_text|keep("image", "text", "text_mask", "text_loss")'
    data = Data("digits", pp, data_dir=data_dir)
    batch = next(data.train_batches(batch_size=4, seed=0))
    assert {k: (v.dtype, v.shape) for k, v in batch.items()} == {
        "image": (np.uint8, (4, 8, 8, 1)),
        "text": (np.int32, (4, 1)),
        "text_mask": (bool, (4, 1)),
        "text_loss": (bool, (4, 1)),
    }
    assert data.num_train_examples() == 1347
    assert data.num_examples("test[25:]") == 200


def test_skipped_examples_are_not_decoded(data_dir, monkeypatch):
    sources.prepare("digits", data_dir)
    count = 0

    def one_more(image):
        nonlocal count
        count += 1
        return image

    def counted():
        op = lambda x: tf.numpy_function(one_more, [x], tf.string)
        return lambda example: {"image": tf.ensure_shape(op(example["image"]), [])}

    monkeypatch.setitem(preprocess.OPS, "counted", counted)
    data = Data("digits", "counted|decode", shuffle_buffer_size=100, data_dir=data_dir)
    next(data.train_batches(batch_size=1, seed=0, start_step=1347 + 1300))
    assert 1 <= count < 1300  # those that are preprocessed ahead


@pytest.mark.parametrize("process_count", [1, 2, 3])
def test_evaluation_sees_every_example_once(evaluate, process_count):
    parts = [evaluate(batch_size=6, process_index=i, process_count=process_count) for i in range(process_count)]
    assert len({len(part) for part in parts}) == 1
    seen = np.concatenate([ids(part) for part in parts])
    assert sorted(seen) == list(range(NUM_TRAIN))
    for b in itertools.chain(*parts):
        assert b["_mask"].dtype == bool
        assert b["_mask"].shape == (6 // process_count,)
        assert b["image"].shape == (6 // process_count, 8, 8, 3)
        assert not b["image"][~b["_mask"]].any()
        assert b["image"][b["_mask"]].any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("process_count", [2, 3, 4])
def test_examples_have_the_same_numbers_for_all_numbers_of_processes(evaluate, process_count):
    """Also in a sum of splits."""
    split = "test[:7]+train[2:9]+test[9:]"
    whole = {i: id for b in evaluate(split, batch_size=12) for i, id in zip(b["_index"], b["id"], strict=True)}
    parts = {}
    for index in range(process_count):
        for batch in evaluate(split, batch_size=12, process_index=index, process_count=process_count):
            known = zip(batch["_index"][batch["_mask"]], batch["id"][batch["_mask"]], strict=True)
            parts |= dict(known)
    assert len(parts) == 16
    assert parts == {i: whole[i] for i in range(16)}


def test_examples_as_the_dataset_has_them(builder, data_dir):
    found = Data("pebbles", "", data_dir=data_dir).examples("test[2:]", 3)
    encoded = {"image": tfds.decode.SkipDecoding()}
    expected = list(tfds.as_numpy(builder.as_dataset(split="test[2:5]", decoders=encoded)))
    assert [e["id"] for e in found] == [e["id"] for e in expected]
    pairs = zip(found, expected, strict=True)
    assert all(np.array_equal(a["image"], pictures.decode_picture(b["image"])) for a, b in pairs)


def test_evaluation_pads_whole_batches(evaluate):
    parts = [evaluate("test[:2]", batch_size=5, process_index=i, process_count=5) for i in range(5)]
    assert [len(p) for p in parts] == [1] * 5
    assert [p[0]["_mask"].tolist() for p in parts] == [[True], [True], [False], [False], [False]]
    assert {p[0]["image"].shape for p in parts} == {(1, 8, 8, 3)}


def test_evaluation_is_tfds_in_file_order(builder, evaluate):
    ds = builder.as_dataset(split="train", read_config=tfds.ReadConfig(interleave_cycle_length=1), shuffle_files=False)
    batches = evaluate(pp="decode(precise=False)", batch_size=1)
    for have, want in zip(batches, tfds.as_numpy(ds), strict=True):
        np.testing.assert_array_equal(have["id"][0], want["id"])
        np.testing.assert_array_equal(have["image"][0], want["image"])


def test_strings_can_be_padded(evaluate):
    (batch,) = evaluate("test[:2]", pp='keep("image")', batch_size=3)
    assert batch["image"][2] == b""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "pebblez"}, ["'pebblez'", "digits", "jetformer.data.builders", "data_dir"]),
        ({"name": "pebbles/large"}, ["pebbles/large"]),
        ({"name": "no good"}, ["'no good'"]),
        ({"name": "imagenet2012"}, ["imagenet2012", "elsewhere", "data_dir", "anual"]),
        ({"name": "digits:9.9.9"}, ["9.9.9", "1.0.0"]),
        ({"name": "mnist", "process_count": 2}, ["mnist", "prepare"]),
        ({"train_split": "tran"}, ["'tran'", "train, test"]),
        ({"train_split": "train[100:]"}, ["'train[100:]'", "41"]),
        ({"train_split": "train[9:5]"}, ["'train[9:5]'"]),
        ({"train_split": "test[:1]", "process_count": 2}, ["'test[:1]'", "1 example", "2 process"]),
        ({"batch_size": 0}, ["batch_size 0"]),
        ({"batch_size": 5, "process_count": 2}, ["batch_size 5", "2 process"]),
        ({"shuffle_buffer_size": 0}, ["shuffle_buffer_size 0"]),
        ({"pp": "decode|rezise(8)"}, ["rezise", "resize_small"]),
        ({"pp": 'decode|keep("label")'}, ["keep", "'label'", "id, image"]),
    ],
)
def test_errors_are_one_line(builder, data_dir, change, says):
    settings = {"name": "pebbles", "pp": PLAIN, "data_dir": data_dir, "batch_size": 2} | change
    options = {key: settings.pop(key) for key in ("batch_size", "process_count") if key in settings}
    with pytest.raises(ValueError, match=re.escape(says[0])) as e:
        Data(**settings).train_batches(seed=0, **options)
    assert "\n" not in str(e.value)
    for part in says:
        assert part in str(e.value)


def test_random_ops_are_refused_in_evaluation(builder, data_dir):
    with pytest.raises(ValueError, match="'flip_lr' is random") as e:
        Data("pebbles", "decode|flip_lr", eval_split="test", data_dir=data_dir).eval_batches(batch_size=1)
    assert "\n" not in str(e.value)


def test_other_file_formats_are_refused(builder, tmp_path):
    copy = tmp_path / "pebbles" / "1.0.0"
    shutil.copytree(builder.data_dir, copy)
    info = copy / "dataset_info.json"
    info.write_text(info.read_text().replace('"tfrecord"', '"array_record"'))
    for f in copy.glob("*tfrecord*"):
        f.rename(copy / f.name.replace("tfrecord", "array_record"))
    with pytest.raises(ValueError, match=r"'pebbles' .* array_record, .* tfrecord"):
        Data("pebbles", PLAIN, eval_split="test", data_dir=tmp_path).eval_batches(batch_size=1)


@pytest.mark.parametrize(("error", "says"), [(OSError("no\nroute"), "no route"), (TimeoutError(), "TimeoutError")])
def test_a_dataset_that_cannot_be_downloaded(tmp_path, monkeypatch, error, says):
    def fails(self):
        raise error

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fails)
    with pytest.raises(ValueError, match=rf"^dataset 'digits' .* \({says}\)$"):
        sources.prepare("digits", str(tmp_path))


def test_without_a_network_preparing_fails_at_once(tmp_path, monkeypatch, capfd, caplog):
    """TFDS itself would retry for minutes."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nothing answers
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"it waits for {seconds} s"))
    for name in ("cifar10", "tinystories"):
        with pytest.raises(ValueError, match=f"^dataset '{name}' .*127.0.0.1"):
            sources.prepare(name, str(tmp_path))
    assert not [record for record in caplog.records if "Retrying" in record.message]
    assert "%|" not in capfd.readouterr().err
    assert (downloader.MAX_RETRIES, tqdm_utils._active) == (10, True)
