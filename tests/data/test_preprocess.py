import numpy as np
import pytest
import tensorflow as tf

from jetformer.data import preprocess, tokenizer

IMAGE = np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3)


def run(pp, **example):
    out = preprocess.parse(pp)({k: tf.constant(v) for k, v in example.items()})
    return {k: np.asarray(v) for k, v in out.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The path of a tokenizer; 0 is padding, 1 end-of-text."""
    words = np.array(["a", "the", "red", "blue", "cat", "dog", "sits"])
    draws = np.random.default_rng(0).integers(0, len(words), (200, 6))
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    path.write_bytes(tokenizer.train([" ".join(words[draw]) for draw in draws], vocab_size=60))
    return str(path)


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


def test_nested_keys():
    nested = {"id": tf.constant(1), "a": {"b": tf.constant(2), "c": {"d": tf.constant(3)}}}
    out = preprocess.parse("flatten")(nested)
    assert {k: v.numpy() for k, v in out.items()} == {"id": 1, "a/b": 2, "a/c/d": 3}
    out = preprocess.parse('flatten|keep("a/b")|flip_lr(key="a/b")')(
        {"a": {"b": IMAGE}, "_seed": tf.constant([1, 2])},
    )
    assert set(out) == {"a/b"}


def test_one_of_several():
    captions = np.array([b"x", b"y", b"z"])
    assert run('first(inkey="captions", outkey="text")', captions=captions)["text"] == b"x"
    pp = preprocess.parse('choice(inkey="captions", outkey="text")|copy("captions", "b")|choice(key="b")')
    draw = lambda i: pp({"captions": tf.constant(captions), "_seed": tf.constant([1, i])})
    drawn = [(draw(i)["text"].numpy(), draw(i)["b"].numpy()) for i in range(90)]
    assert drawn == [(draw(i)["text"].numpy(), draw(i)["b"].numpy()) for i in range(90)]
    assert len(set(drawn)) == 9
    for c in captions:
        assert 15 < sum(text == c for text, _ in drawn) < 45


@pytest.mark.parametrize("op", ["choice", "first"])
def test_a_choice_from_none_is_an_error(op):
    def texts(pp):
        examples = lambda: ({"text": several, "_seed": [1, 2]} for several in (["x"], [], ["y"]))
        spec = {"text": tf.TensorSpec([None], tf.string), "_seed": tf.TensorSpec([2], tf.int64)}
        ds = tf.data.Dataset.from_generator(examples, output_signature=spec).map(preprocess.parse(pp))
        return [example["text"] for example in ds.as_numpy_iterator()]

    with pytest.raises(tf.errors.InvalidArgumentError, match=f"op {op}: .* setdefault"):
        texts(op)
    assert texts(f'setdefault("text", "")|{op}') == [b"x", b"", b"y"]


def test_lower():
    texts = ["A Café ÉTÉ".encode(), b"B\xff", b""]
    assert run("lower", text=texts)["text"].tolist() == ["a café été".encode(), "b\ufffd".encode(), b""]


def test_tok(model):
    ids = tokenizer.load(model).encode("a red cat")
    n = len(ids)
    for arguments, expected in {
        "": ids,
        ', eos="yes"': [*ids, 1],
        f", {n + 2}": [*ids, 0, 0],
        f', {n + 2}, eos="yes"': [*ids, 1, 0],
        f', {n - 1}, eos="yes"': ids[:-1],
    }.items():
        out = run(f"tok({model!r}{arguments})", text="a red cat")["text"]
        assert (out.dtype, out.tolist()) == (np.int32, expected)
    assert run(f"tok({model!r})", text="")["text"].shape == (0,)


def test_masked_concat():
    out = run('masked_concat(["a", "b"], outkey="x", m=[1, 0], l=[False, True])', a=[5, 6], b=[7])
    assert out["x"].tolist() == [5, 6, 7]
    assert (out["m"].dtype, out["m"].tolist()) == (bool, [True, True, False])
    assert out["l"].tolist() == [False, False, True]


def test_tolen():
    out = run('tolen(4, 9, key="a")|tolen(1, 9, key="b")|tolen(3, 1, key="c")', a=[5, 6], b=[7, 8], c=[False, True])
    assert {k: v.tolist() for k, v in out.items()} == {"a": [5, 6, 9, 9], "b": [7], "c": [False, True, True]}
    assert (out["a"].dtype, out["c"].dtype) == (np.int32, bool)


# text, text_mask and text_loss of a text of three tokens, x.
@pytest.mark.parametrize(
    ("pad", "length", "expected"),
    [
        ("modelled", 6, ["xxx111", "111111", "111111"]),
        ("ignored", 6, ["xxx100", "111000", "111100"]),
        ("modelled", 4, ["xxx1", "1111", "1111"]),
        ("ignored", 4, ["xxx1", "1110", "1111"]),
        ("modelled", 3, ["xxx", "111", "111"]),
        ("ignored", 3, ["xxx", "111", "111"]),
        ("ignored", 2, ["xx", "11", "11"]),
    ],
)
def test_caption(model, pad, length, expected):
    ids = tokenizer.load(model).encode("a red cat")
    assert len(ids) == 3
    out = run(f'caption({model!r}, {length}, pad={pad!r}, key="title")', title="a red cat")
    assert out.pop("title") == b"a red cat"
    assert [(k, v.dtype) for k, v in out.items()] == [("text", np.int32), ("text_mask", bool), ("text_loss", bool)]
    assert ["".join(str(int(i)) for i in v) for v in (out["text_mask"], out["text_loss"])] == expected[1:]
    assert out["text"].tolist() == [ids[i] if x == "x" else int(x) for i, x in enumerate(expected[0])]


@pytest.mark.parametrize(("pad", "filler"), [("modelled", 1), ("ignored", 0)])
@pytest.mark.parametrize("text", ["", "a cat", "a red cat", "the red dog sits", b"a \xff\xfe cat"])
def test_caption_is_a_composition(model, pad, filler, text):
    small = "|".join(
        [
            f'tok({model!r}, eos="no")',
            'setdefault("eos", [1])',
            f'masked_concat(["text", "eos"], outkey="text", text_loss=[1, 1], text_mask=[1, {filler}])',
            *(f"tolen(length=4, pad_value={filler}, key={key!r})" for key in ("text", "text_mask", "text_loss")),
            'keep("text", "text_mask", "text_loss")',
        ]
    )
    expected = run(small, text=text)
    out = run(f"caption({model!r}, 4, {pad!r})", text=text)
    assert out.keys() == expected.keys()
    for key in out:
        assert out[key].dtype == expected[key].dtype
        np.testing.assert_array_equal(out[key], expected[key])


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


def test_static_shapes_of_text(model):
    spec = {"text": tf.TensorSpec([None], tf.string), "_seed": tf.TensorSpec([2], tf.int64)}
    for tail in f"caption({model!r}, 5)", f"tok({model!r})|tolen(5, 0)", f"tok({model!r}, 5)":
        pp = tf.function(preprocess.parse(f"choice|lower|{tail}"))
        assert {v.shape for v in pp.get_concrete_function(spec).structured_outputs.values()} == {(5,)}


@pytest.mark.parametrize(
    ("pp", "says"),
    [
        ("decode|rezise(32)", ["'rezise(32)'", "does not exist", "resize_small"]),
        ("decode|resize", ["'resize'", "size", "resize(size, method='bilinear'"]),
        ("decode|resize(32, methd='area')", ["methd"]),
        ("decode|resize(32, method='areal')", ["areal", "lanczos3"]),
        ("decode(2)", ["channels", "2"]),
        ("decode(background=(0, 0))", ["background", "(0, 0)"]),
        ("decode(background=(0, 0, 256))", ["background", "256"]),
        ("decode(background=(0, 0, 0), precise=False)", ["background", "precise=False"]),
        ("decode|resize('32')", ["positive int"]),
        ("decode(4)", ["channels", "1 or 3", "4"]),
        ("decode(background='white')", ["background", "from 0 to 255", "'w'"]),
        ("decode(background=(0, 0, 256))", ["background", "from 0 to 255", "256"]),
        ("decode(background=(0, 0, 0), precise=False)", ["background", "precise"]),
        ("decode|resize(-1)", ["positive int"]),
        ("decode|resize(1.5)", ["positive int"]),
        ("decode|resize((1, 2, 3))", ["positive int"]),
        ("decode|resize_small((1, 2))", ["positive int"]),
        ("decode|resize(__import__('os').getpid())", ["literals"]),
        ("decode|resize(n)", ["literals"]),
        ("tok('c4_eng')", ["no tokenizer 'c4_eng'", "c4_en, "]),
        ("tolen(0, 0)", ["positive int"]),
        ("tolen(3, '0')", ["pad_value"]),
        ("tolen(3)", ["pad_value", "key='text'"]),
        ("masked_concat(['a', 'b'], text_mask=[1])", ["text_mask", "0 or 1 for each"]),
        ("masked_concat(['a', 'b'], text_mask=[1, 2])", ["text_mask", "0 or 1"]),
        ("masked_concat(['a'], outky='x')", ["outky"]),
        ("caption('c4_en', 3, 'masked')", ["'masked'", "modelled"]),
        ("caption('c4_en', 0)", ["positive int"]),
        ("decode||resize(3)", ["cannot be parsed"]),
        ("decode|resize(3", ["cannot be parsed"]),
        ("decode|3", ["'3'", "neither"]),
        ("os.getpid()", ["neither"]),
    ],
)
def test_errors_of_bad_strings_are_one_line(pp, says):
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
        ("choice(key='image')", "preprocessing op 'choice' is random and only works in training"),
        ("label_as_text('n')|reshape([], key='n')|first(key='n')", "preprocessing op 'first' takes one of several"),
        (
            "masked_concat(['image'])",
            "preprocessing op 'masked_concat' takes vectors, but 'image' has shape (6, 10, 3)",
        ),
        (
            "tolen(3, 0, key='image')",
            "preprocessing op 'tolen' takes a vector of numbers, not uint8 of shape (6, 10, 3)",
        ),
        ("lower(key='image')", "preprocessing op 'lower' takes texts, not uint8"),
    ],
)
def test_errors_while_building_the_graph_are_one_line(pp, message):
    ds = tf.data.Dataset.from_tensors({"image": IMAGE, "n": 1})
    with pytest.raises(ValueError, match="preprocessing") as e:
        ds.map(preprocess.parse(pp))
    assert str(e.value).startswith(message)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("op", ["tok({!r})", "caption({!r}, 3)"])
@pytest.mark.parametrize(("text", "kind"), [(["a", "b"], r"string of shape \(2,\)"), (3, r"int32 of shape \(\)")])
def test_one_text_is_tokenized(model, op, text, kind):
    ds = tf.data.Dataset.from_tensors({"text": text})
    with pytest.raises(ValueError, match=f"{kind}.* choice") as e:
        ds.map(preprocess.parse(op.format(model)))
    assert "\n" not in str(e.value)
