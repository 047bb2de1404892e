"""Prompts are tokenized as the data's texts are, and tokens become texts again."""

import numpy as np
import pytest
import tensorflow as tf

from jetformer.data import preprocess
from jetformer.data.dataset import Data
from jetformer.data.pp_string import text_length_of, tokenizer_of
from jetformer.data.texts import Texts

MODEL = "experiments/shapes.model"
IGNORED = f"decode | choice(inkey='captions', outkey='text') | lower | caption('{MODEL}', 12, pad='ignored')"
MODELLED = f"flatten | first(inkey='captions/text', outkey='text') | caption(model='{MODEL}', length=12) | keep('text')"
BY_HAND = (
    f"lower | tok('{MODEL}') | setdefault('eos', [1]) | masked_concat(['text', 'eos'], text_mask=[1, 0], "
    "text_loss=[1, 1]) | tolen(12, pad_value=0) | tolen(12, pad_value=0, key='text_mask') | "
    "tolen(12, pad_value=0, key='text_loss') | keep('text', 'text_mask', 'text_loss')"
)


@pytest.mark.parametrize("pp", [IGNORED, BY_HAND])
def test_prompts_are_tokenized_as_the_data_is(pp):
    texts = Texts(pp)
    prompts = ["A red Circle", "a small blue cross at the top left"]
    encoded = texts.encode(prompts)
    for i, prompt in enumerate(prompts):
        op = preprocess.parse(f"lower | caption('{MODEL}', 12, pad='ignored')")
        expected = op({"text": tf.constant(prompt)})
        assert np.array_equal(encoded["text"][i], expected["text"])
        assert np.array_equal(encoded["text_mask"][i], expected["text_mask"])
    assert texts.decode(encoded["text"]) == [prompt.lower() for prompt in prompts]
    assert texts.length == encoded["text"].shape[1] == 12


def test_padding_that_is_modelled():
    encoded = Texts(MODELLED).encode(["a red circle"])
    assert encoded["text_mask"].all()
    assert (encoded["text"][0, 3:] == 1).all()


@pytest.mark.parametrize("pp", [IGNORED, MODELLED])
def test_beginnings_have_no_end_of_text(pp):
    texts = Texts(pp)
    beginning = texts.encode_beginnings(["", "a red circle"])
    assert beginning["text_mask"].sum(1).tolist() == [0, 3]
    assert texts.tokenizer.decode(beginning["text"][1][beginning["text_mask"][1]]) == "a red circle"


def test_the_end_that_is_cut_off():
    texts = Texts(IGNORED)
    assert texts.cut("A red circle") == ""
    eleven = "a red circle " * 3 + "a red"
    assert texts.cut(eleven) == ""
    assert texts.cut(eleven + " circle") == ""  # only end-of-text does not fit
    assert texts.cut(eleven + " circle at the TOP") == "at the top"


def test_empty_prompts():
    with pytest.raises(ValueError, match="a prompt is empty"):
        Texts(IGNORED).encode(["a red circle", " "])


def test_another_copy_of_the_tokenizer(tmp_path):
    """That of the workdir, if the original does not exist."""
    copy = tmp_path / "tokenizer.model"
    with open(MODEL, "rb") as file:
        copy.write_bytes(file.read())
    elsewhere = IGNORED.replace(MODEL, "/nowhere.model")
    with pytest.raises(ValueError, match=r"there is no tokenizer '/nowhere\.model'"):
        Texts(elsewhere)
    ours, theirs = Texts(elsewhere, str(copy)).encode(["a red circle"]), Texts(IGNORED).encode(["a red circle"])
    assert np.array_equal(ours["text"], theirs["text"])


@pytest.mark.parametrize(
    ("pp", "length"),
    [
        ("decode | label_as_text | keep('image', 'text')", 1),
        ("caption('m', 7)", 7),
        ("caption('m', length=7, pad='ignored')", 7),
        ("tok('m') | tolen(5, 0)", 5),
        ("tok('m', 9, eos='yes') | lower", 9),
        ("tok('m', 9) | tolen(length=3, pad_value=0)", 3),
    ],
)
def test_lengths(pp, length):
    assert text_length_of(pp) == length
    assert Data(name="digits", pp=pp).text_length() == length


def test_a_string_without_texts():
    with pytest.raises(ValueError, match="length of texts"):
        text_length_of("decode | keep('image')")
    with pytest.raises(ValueError, match="reads no texts"):
        Texts("decode | label_as_text")
    assert tokenizer_of("decode | label_as_text") is None
    assert tokenizer_of(BY_HAND) == tokenizer_of(MODELLED) == MODEL
    assert Data(name="digits", pp=IGNORED).has_texts()
    assert not Data(name="digits", pp="decode | label_as_text").has_texts()


def test_the_key_of_the_text():
    pp = f"choice(inkey='captions', outkey='c') | lower(key='c') | caption('{MODEL}', 12, 'ignored', 'c')"
    assert np.array_equal(Texts(pp).encode(["A red circle"])["text"], Texts(IGNORED).encode(["a red circle"])["text"])
    no_mask = f"tok('{MODEL}', 12, eos='yes')"
    assert Texts(no_mask).encode(["a red circle"])["text_mask"].all()


@pytest.mark.parametrize(
    ("pp", "message"),
    [
        ("decode | caption | keep('text')", "op 'caption' has no tokenizer"),
        ("caption(length=40)", "op 'caption' has no tokenizer"),
        (f"tok('{MODEL}', 12) | caption('{MODEL}', 12)", "tok\\(.* caption\\("),
    ],
)
def test_strings_that_cannot_tokenize(pp, message):
    with pytest.raises(ValueError, match=message):
        Texts(pp)
    with pytest.raises(ValueError, match=message):
        Data(name="digits", pp=pp).has_texts()
