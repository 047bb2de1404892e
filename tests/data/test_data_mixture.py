"""Mixtures of datasets."""

import dataclasses
import itertools

import numpy as np
import pytest

import trees
from jetformer import config
from jetformer.data import mixture
from jetformer.data.dataset import Data, MixtureData
from jetformer.experiment import Experiment

PP = "decode|resize(8)|flip_lr|label_as_text|keep('image', 'text', 'text_mask')"
PP_EVAL = PP.replace("|flip_lr", "")


@pytest.fixture(scope="module")
def parts(tmp_path_factory, data_dir):
    root = tmp_path_factory.mktemp("mixed")
    trees.plant(root / "a", {"train/cat": 12, "train/dog": 10, "val/dog": 5})
    trees.plant(root / "b", {"train/7": 30, "train/cat": 14, "val/cat": 4})
    where = {"pp": PP, "pp_eval": PP_EVAL, "eval_split": "val", "data_dir": str(root / "data")}
    digits = Data("digits", pp=PP, pp_eval=PP_EVAL, data_dir=str(data_dir), shuffle_buffer_size=50)
    return Data(f"folder:{root}/a", **where), Data(f"folder:{root}/b", **where), digits


def take(data, count, **options):
    return list(itertools.islice(data.train_batches(**{"batch_size": 2, "seed": 3} | options), count))


def test_weights(parts):
    mixed = MixtureData(parts, (1, 2, 5), labels="apart")
    texts = np.concatenate([batch["text"][:, 0] for batch in take(mixed, 400)])
    shares = [np.mean(texts < 2), np.mean((texts >= 2) & (texts < 4)), np.mean(texts >= 4)]
    np.testing.assert_allclose(shares, [1 / 8, 2 / 8, 5 / 8], atol=0.05)
    # Without weights: as many as there are.
    texts = np.concatenate([batch["text"][:, 0] for batch in take(MixtureData(parts, labels="apart"), 200)])
    assert np.mean(texts >= 4) > 0.9


def test_a_mixture_of_one_dataset_is_that_dataset(parts):
    for a, b in zip(take(MixtureData(parts[:1]), 3), take(parts[0], 3), strict=True):
        assert all(np.array_equal(a[k], b[k]) for k in a)


def test_a_short_schedule_is_exact(parts, monkeypatch):
    monkeypatch.setattr(mixture, "_SCHEDULE_LENGTH", 8)
    run = take(MixtureData(parts, (1, 2, 5), labels="apart"), 24)
    texts = np.stack([batch["text"][:, 0] for batch in run])  # a stream for each place
    counts = [(texts < 2).sum(0), ((texts >= 2) & (texts < 4)).sum(0), (texts >= 4).sum(0)]
    assert [c.tolist() for c in counts] == [[3] * 2, [6] * 2, [15] * 2]
    for step in (8, 19):
        for a, b in zip(
            run[step:], take(MixtureData(parts, (1, 2, 5), labels="apart"), 24 - step, start_step=step), strict=True
        ):
            assert all(np.array_equal(a[k], b[k]) for k in a)


def test_resumed_and_shared(parts):
    mixed = MixtureData(parts, (1, 2, 5))
    run = take(mixed, 60)
    for step in (57,):
        for a, b in zip(run[step:], take(mixed, 60 - step, start_step=step), strict=True):
            assert all(np.array_equal(a[k], b[k]) for k in a)
    halves = [take(mixed, 4, process_index=i, process_count=2) for i in range(2)]
    for batch, *of_processes in zip(run[:4], *halves, strict=True):
        assert all(np.array_equal(batch[k], np.concatenate([b[k] for b in of_processes])) for k in batch)
    assert not np.array_equal(run[0]["image"], take(mixed, 1, seed=4)[0]["image"])


def test_labels(parts):
    by_name = MixtureData(parts, (1, 1, 1))
    by_name.prepare()
    assert by_name.class_names() == ("cat", "dog", "7", "0", "1", "2", "3", "4", "5", "6", "8", "9")
    apart = MixtureData(parts, labels="apart")
    assert apart.class_names() == ("cat", "dog", "7", "cat", *map(str, range(10)))
    as_they_are = MixtureData(parts, labels="as_they_are")
    assert as_they_are.class_names() == ("cat", "dog", *map(str, range(2, 10)))
    chosen = dataclasses.replace(parts[2], classes=("9", "7"))
    some = MixtureData((chosen, parts[1]))
    assert some.class_names() == ("9", "7", "cat")
    texts = np.concatenate([b["text"][:, 0] for b in take(some, 40)])
    assert set(texts) == {0, 1, 2}
    evaluated = np.concatenate([b["text"][b["_mask"], 0] for b in some.eval_batches(batch_size=4)])
    nines_and_sevens = len(evaluated) - 4
    assert evaluated[nines_and_sevens:].tolist() == [2] * 4


def test_evaluation(parts):
    mixed = MixtureData(parts)
    total = 5 + 4 + 225
    assert mixed.num_examples() == total
    assert mixed.num_train_examples() == 22 + 44 + 1347
    (whole,) = mixed.eval_batches(batch_size=240)
    images = [next(d.eval_batches(batch_size=225))["image"] for d in parts]
    np.testing.assert_array_equal(whole["image"][:5], images[0][:5])
    np.testing.assert_array_equal(whole["image"][5:9], images[1][:4])
    np.testing.assert_array_equal(whole["image"][9:total], images[2])
    found = {}
    for i in range(3):
        for batch in mixed.eval_batches(batch_size=6, process_index=i, process_count=3):
            found |= dict(zip(batch["_index"][batch["_mask"]], batch["image"], strict=False))
    assert sorted(found) == list(range(total))
    assert all(np.array_equal(found[i], whole["image"][i]) for i in found)
    training = [b["image"] for b in mixed.eval_batches(batch_size=1, split=mixed.train_split)]
    assert len(training) == 22 + 44 + 1347
    assert len(mixed.examples(mixed.eval_split, 7)) == 7


def test_texts(tmp_path, parts, shapes_dir):
    """Each has texts of its own: a dataset's captions, and a constant."""
    model = "experiments/shapes.model"
    captions = Data(
        "shapes",
        pp=f"decode|resize(8)|choice(inkey='captions', outkey='text')|caption('{model}', 12)|keep('image', 'text')",
        pp_eval=f"decode|resize(8)|first(inkey='captions', outkey='text')|caption('{model}', 12)|keep('image', 'text')",
        data_dir=shapes_dir,
    )
    named = f"decode|resize(8)|setdefault('text', 'a picture')|caption('{model}', 12)|keep('image', 'text')"
    mixed = MixtureData((captions, dataclasses.replace(parts[0], pp=named, pp_eval=named)), (1, 1))
    assert mixed.has_texts()
    assert mixed.text_length() == 12
    run = take(mixed, 16)
    texts = {text for batch in run for text in mixed.texts().decode(batch["text"])}
    assert "a picture" in {text[:9] for text in texts}
    assert len(texts) > 10
    again = take(mixed, 1, start_step=13)
    assert all(np.array_equal(run[13][k], again[0][k]) for k in again[0])
    longer = dataclasses.replace(parts[0], pp=named.replace("12", "13"))
    with pytest.raises(ValueError, match=r"texts have different lengths: 'shapes' 12, .* 13 tokens"):
        MixtureData((captions, longer))


def test_bad_mixtures(parts):
    a, b, digits = parts
    for datasets, options, says in (
        ((), {}, "datasets is empty"),
        ((Data,), {}, r"write @scope/Data\(\)"),
        ((a, b), {"weights": (1,)}, "1 numbers for 2 datasets"),
        ((a, b), {"weights": (1, 0)}, "b' has the weight 0: .* MixtureData.datasets"),
        ((a, b), {"weights": (1, float("nan"))}, "has the weight nan"),
        ((a, b), {"labels": "both"}, '"by_name", "apart" or "as_they_are"'),
    ):
        with pytest.raises(ValueError, match=says):
            MixtureData(datasets, **options)
    grey = dataclasses.replace(digits, pp="decode(channels=1)|resize(8)|keep('image')")
    with pytest.raises(ValueError, match=r"a has image .* text .*; digits has image .*Data.pp") as error:
        take(MixtureData((a, grey)), 1)
    assert "\n" not in str(error.value)
    # Examples of all datasets must have one size.
    smaller = dataclasses.replace(digits, pp=PP.replace("8", "7"))
    with pytest.raises(ValueError, match=r"image 7×7×3.* image 8×8×3"):
        take(MixtureData((a, smaller), (6, 1)), 60)


def test_gin(parts):
    a, b, _ = parts
    config.parse(
        ["experiments/digits.gin"],
        [
            "train.data = @MixtureData()",
            "MixtureData.datasets = (@x/Data(), @y/Data())",
            "MixtureData.weights = (3, 1)",
            f"x/Data.name = '{a.name}'",
            f"y/Data.name = '{b.name}'",
            "y/Data.classes = ('cat',)",
        ],
    )
    run = config.call(Experiment)
    assert [data.name for data in run.data.datasets] == [a.name, b.name]
    assert run.data.datasets[1].classes == ("cat",)
    assert hash(run.data) == hash(config.call(Experiment).data)
