"""Zero-shot classification: scores equal those of whole sequences, for labels of one token and of several."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jetformer.evaluators.classify import Classify
from jetformer.sampling import decode
from runs import untrained
from small_models import L, small_model

IMAGES_FIRST = {"JetFormerObjective__text_prefix_prob": 0.0}


@settings(max_examples=15, deadline=None)
@given(
    length=st.integers(1, 5),
    num_labels=st.integers(1, 4),
    boi=st.sampled_from([None, 11]),
    causal=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
@torch.no_grad()
def test_cached_scores_equal_uncached_ones(length, num_labels, boi, causal, seed):
    model = small_model(boi_id=boi, causal_mask_on_prefix=causal).eval()
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, L, model.out_dim, generator=generator).double()
    texts = torch.randint(0, 10, (num_labels, length), generator=generator)
    counts = torch.rand(num_labels, length, generator=generator) < 0.8
    expected = torch.empty(2, num_labels)
    for c in range(num_labels):
        hidden, _ = model(texts[c].expand(2, -1), images, text_first=False)
        log_probs = model.text_logits(hidden).log_softmax(-1)
        own = log_probs.gather(2, texts[c].expand(2, -1)[..., None]).squeeze(2)
        expected[:, c] = (own * counts[c]).sum(1)
    torch.testing.assert_close(decode.score_texts(model, images, texts, counts), expected, atol=1e-4, rtol=1e-4)


def test_labels_that_are_tokens(tmp_path, data_dir):
    """As in the class-conditional experiments, with a repeated vocabulary."""
    context = untrained(tmp_path, data_dir, **IMAGES_FIRST)
    evaluator = Classify(num_classes=10)
    evaluator.check(context)
    scalars = evaluator(context).scalars
    right, labels = [], []
    with context.averaged(), torch.no_grad():
        for batch in context.batches():
            from jetformer import prng
            from jetformer.runtime import derive_seed

            keys = prng.example_keys(derive_seed(0, 7), torch.tensor(batch["_index"]))
            tokens = decode.encode_images(context.model, torch.tensor(batch["image"]), keys).tokens
            hidden, _ = context.model(torch.tensor(batch["text"]), tokens, text_first=False)
            predicted = context.model.text_logits(hidden)[:, 0, :10].argmax(-1).numpy()
            right += (predicted == batch["text"][:, 0])[batch["_mask"]].tolist()
            labels += batch["text"][:, 0][batch["_mask"]].tolist()
    assert scalars["accuracy"] == pytest.approx(np.mean(right))
    for label in set(labels):
        of_label = [r for r, other in zip(right, labels, strict=True) if other == label]
        assert scalars[f"accuracy/{label}"] == pytest.approx(np.mean(of_label))


def test_a_text_for_each_label(tmp_path, shapes_dir, monkeypatch):
    """The ends of texts count, padding does not, as in training."""
    context = untrained(tmp_path, shapes_dir, gin_file="experiments/shapes.gin", Jet__num_heads=2)
    labels = ("a black background", "a grey background", "a picture of a white background")
    pp = "decode | copy('background', 'label') | keep('image', 'label')"
    evaluator = Classify(labels=labels, pp=pp)
    evaluator.check(context)
    ids, counts = evaluator.texts(context)
    eos = context.data.texts().tokenizer.eos_id
    for row, counted in zip(ids, counts, strict=True):
        assert counted.sum() == (row == eos).nonzero()[0, 0] + 1
    prefilled, prefill = [], decode.CachedDecoder.prefill
    monkeypatch.setattr(decode.CachedDecoder, "prefill", lambda self: prefilled.append(1) or prefill(self))
    scalars = evaluator(context).scalars
    assert set(scalars) == {"accuracy", *(f"accuracy/{label}" for label in labels)}
    assert len(prefilled) == len(list(context.batches()))  # once for all labels
    long = Classify(labels=(*labels[:2], "a very " + "dark " * 60 + "background"), pp=pp)
    with pytest.raises(ValueError, match=r"^Classify.labels: 'a very .*' is too long for the model.* '.*background'"):
        long.check(context)


@pytest.mark.parametrize(
    ("evaluator", "overrides", "message"),
    [
        (Classify(num_classes=10), {}, "does not learn texts after images"),
        (Classify(num_classes=99), IMAGES_FIRST, "99 labels, .* 13 tokens"),
        (Classify(num_classes=10, pp="decode(channels=1) | keep('image')"), IMAGES_FIRST, "have no label"),
    ],
)
def test_check_finds_errors(tmp_path, data_dir, evaluator, overrides, message):
    with pytest.raises(ValueError, match=message):
        evaluator.check(untrained(tmp_path, data_dir, **overrides))


def test_invalid_arguments():
    for arguments in ({}, {"labels": ("a", "b"), "num_classes": 2}):
        with pytest.raises(ValueError, match="give labels"):
            Classify(**arguments)
    with pytest.raises(ValueError, match="give a tuple of texts"):
        Classify(labels="cat")
