import numpy as np
import pytest
import tensorflow as tf

from jetformer.data import preprocess

IMAGE = np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3)


def run(pp, **example):
    out = preprocess.parse(pp)({k: tf.constant(v) for k, v in example.items()})
    return {k: np.asarray(v) for k, v in out.items()}


@pytest.mark.parametrize("channels", [1, 3])
def test_decode(channels):
    grey = IMAGE[..., :1]
    out = run(f"decode(channels={channels})", image=tf.io.encode_png(grey).numpy())["image"]
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, np.repeat(grey, channels, axis=-1))


def test_keys():
    out = run('resize_small(3, inkey="image", outkey="small")', image=IMAGE)
    assert out["image"].shape == (6, 10, 3)
    assert out["small"].shape == (3, 5, 3)
    assert out["small"].dtype == np.uint8
    out = run('copy("image", "x")|central_crop((2, 4), key="x")|drop("image")', image=IMAGE)
    assert set(out) == {"x"}
    np.testing.assert_array_equal(out["x"], IMAGE[2:4, 3:7])
    assert set(run('keep("a|b")', **{"a|b": 1, "c": 2})) == {"a|b"}
    out = run('setdefault("a", 5)|setdefault("b", 6)|reshape([2, -1], key="c")', a=1, c=[1, 2, 3, 4])
    assert (out["a"], out["b"], out["c"].tolist()) == (1, 6, [[1, 2], [3, 4]])
    assert set(run("", image=IMAGE)) == {"image"}


def test_value_range():
    out = run("value_range(-1, 1)", image=np.array([0, 255], np.uint8))["image"]
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, [-1, 1])
    out = run("value_range(0, 1, -1, 1, True)", image=np.array([-3.0, 0.0, 1.0]))["image"]
    np.testing.assert_allclose(out, [0, 0.5, 1])


def test_label_as_text():
    out = run('label_as_text|keep("text", "text_mask", "text_loss")', label=np.int64(7))
    assert {k: (v.dtype, v.tolist()) for k, v in out.items()} == {
        "text": (np.int32, [7]),
        "text_mask": (bool, [True]),
        "text_loss": (bool, [True]),
    }


def test_random_ops_are_functions_of_the_seed():
    flip, crop = preprocess.parse("flip_lr"), preprocess.parse("random_crop((4, 5))")
    seeds = [np.array([1, i], np.int64) for i in range(64)]
    flips = [flip({"image": IMAGE, "_seed": s})["image"].numpy() for s in seeds]
    again = [flip({"image": IMAGE, "_seed": s})["image"].numpy() for s in seeds]
    np.testing.assert_array_equal(flips, again)
    flipped = [np.array_equal(f, IMAGE[:, ::-1]) for f in flips]
    assert all(a or np.array_equal(f, IMAGE) for a, f in zip(flipped, flips, strict=True))
    assert 16 < sum(flipped) < 48

    crops = [crop({"image": IMAGE, "_seed": s})["image"].numpy() for s in seeds]
    places = {np.unravel_index(c[0, 0, 0] // 3, (6, 10)) for c in crops}
    assert places <= {(y, x) for y in range(3) for x in range(6)}
    assert len(places) > 9


def test_random_ops_of_one_string_are_independent():
    pp = preprocess.parse('flip_lr(key="a")|flip_lr(key="b")')
    pairs = set()
    for i in range(32):
        out = pp({"a": IMAGE, "b": IMAGE, "_seed": tf.constant([1, i])})
        assert set(out) == {"a", "b"}
        pairs.add((np.array_equal(out["a"], IMAGE), np.array_equal(out["b"], IMAGE)))
    assert len(pairs) == 4


def test_seed_outlives_keep():
    out = preprocess.parse('keep("image")|flip_lr')({"image": IMAGE, "_seed": tf.constant([1, 2])})
    assert set(out) == {"image"}


def test_static_shapes():
    spec = {"image": tf.TensorSpec([], tf.string), "_seed": tf.TensorSpec([2], tf.int64)}
    for crop in "central_crop(8)", "random_crop(8)", "resize(8)":
        pp = tf.function(preprocess.parse(f"decode|{crop}|flip_lr"))
        assert pp.get_concrete_function(spec).structured_outputs["image"].shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("pp", "says"),
    [
        ("decode|rezise(32)", ["'rezise(32)'", "does not exist", "resize_small"]),
        ("decode|resize", ["'resize'", "size", "resize(size, method='bilinear'"]),
        ("decode|resize(32, methd='area')", ["methd"]),
        ("decode|resize(32, method='areal')", ["areal", "lanczos3"]),
        ("decode|resize('32')", ["positive int"]),
        ("decode|resize(-1)", ["positive int"]),
        ("decode|resize(1.5)", ["positive int"]),
        ("decode|resize((1, 2, 3))", ["positive int"]),
        ("decode|resize_small((1, 2))", ["positive int"]),
        ("decode|resize(__import__('os').getpid())", ["literals"]),
        ("decode|resize(n)", ["literals"]),
        ("decode||resize(3)", ["cannot be read"]),
        ("decode|resize(3", ["cannot be read"]),
        ("decode|3", ["'3'", "neither"]),
        ("os.getpid()", ["neither"]),
    ],
)
def test_bad_strings_say_so_in_one_line(pp, says):
    with pytest.raises(ValueError, match="preprocessing") as e:
        preprocess.parse(pp)
    message = str(e.value)
    assert "\n" not in message
    for part in [repr(pp), *says]:
        assert part in message


@pytest.mark.parametrize(
    ("pp", "message"),
    [
        ("flip_lr", "preprocessing op 'flip_lr' is random and only works in training"),
        ('keep("image", "labl")', "preprocessing op 'keep': the example has no 'labl', it has: im"),
        ("label_as_text", "preprocessing op 'label_as_text': the example has no 'label'"),
    ],
)
def test_errors_while_building_the_graph_are_one_line(pp, message):
    ds = tf.data.Dataset.from_tensors({"image": IMAGE})
    with pytest.raises(ValueError, match="preprocessing") as e:
        ds.map(preprocess.parse(pp))
    assert str(e.value).startswith(message)
    assert "\n" not in str(e.value)
