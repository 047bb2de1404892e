"""Probes: representations are the model's own, and the regression finds what they contain."""

import numpy as np
import pytest
import torch

from jetformer import prng
from jetformer.evaluators import probe
from jetformer.evaluators.probe import Probe, ridge_accuracy
from jetformer.runtime import derive_seed
from jetformer.sampling import decode
from runs import untrained

SPLITS = {"train_split": "train[:60]", "split": "validation[:30]"}


def test_ridge_finds_labels_only_if_features_contain_them():
    generator = np.random.default_rng(0)
    labels = np.arange(400) % 4
    there = np.eye(4)[labels] @ generator.normal(size=(4, 10)) + 0.1 * generator.normal(size=(400, 10))
    assert ridge_accuracy(there[:200], labels[:200], there[200:], labels[200:]) == 1.0
    noise = generator.normal(size=(400, 10))
    assert ridge_accuracy(noise[:200], labels[:200], noise[200:], labels[200:]) < 0.4


@pytest.mark.parametrize("text_prefix_prob", [0.5, 1.0])
def test_representations_are_the_models_own(tmp_path, data_dir, monkeypatch, text_prefix_prob):
    """The last layer's is the input of the final norm, for an image after a dropped text, or without one."""
    overrides = {"JetFormerObjective__text_prefix_prob": text_prefix_prob, "Decoder__depth": 2, "JetFormer__out_dim": 3}
    context = untrained(tmp_path, data_dir, **overrides)
    seen = {}
    monkeypatch.setattr(probe, "ridge_accuracy", lambda x, y, test_x, test_y: seen.setdefault(len(seen), test_x)[0, 0])
    Probe(shots=(None,), **SPLITS)(context)
    assert [x.shape for x in seen.values()] == [(30, 4), (30, 16), (30, 16)]  # latents, then two layers
    model, batch = context.model.eval(), next(context.batches(split="validation[:30]"))
    with context.averaged(), torch.no_grad():
        keys = prng.example_keys(derive_seed(0, 8), torch.arange(16, dtype=torch.int32))
        latents = decode.encode_images(model, torch.tensor(batch["image"]), keys)
        torch.testing.assert_close(torch.from_numpy(seen[0][:16]), torch.cat(latents, -1).mean(1), atol=1e-5, rtol=1e-4)
        model.final_norm = torch.nn.Identity()
        if text_prefix_prob == 1.0:
            # A hidden state predicts the next token: with one more token at the end there is one for the last.
            longer = torch.cat((latents.tokens, latents.tokens[:, :1]), dim=1)
            dropped = torch.ones(16, dtype=torch.bool)
            _, hidden = model(torch.zeros(16, 1, dtype=torch.int64), longer, text_first=True, drop_prefix=dropped)
            expected = hidden[:, 1:].mean(1)
        else:
            longer = torch.cat((latents.tokens, latents.tokens[:, :1]), dim=1)
            _, hidden = model(torch.zeros(16, 0, dtype=torch.int64), longer, text_first=False)
            expected = hidden[:, 1:].mean(1)
    torch.testing.assert_close(torch.from_numpy(seen[2][:16]), expected, atol=1e-4, rtol=1e-4)


def test_shots(tmp_path, data_dir, monkeypatch):
    context = untrained(tmp_path, data_dir)
    fitted = []
    monkeypatch.setattr(probe, "ridge_accuracy", lambda x, y, test_x, test_y: fitted.append(np.bincount(y)) or 0.5)
    evaluator = Probe(shots=(1, 3, None), **SPLITS)
    evaluator.check(context)
    scalars = evaluator(context).scalars
    assert set(scalars) == {
        f"accuracy_{k}/{layer}" for layer in ("latents", "layer_00") for k in ("1_shot", "3_shot", "all")
    }
    assert fitted[0].tolist() == [1] * 10
    assert (fitted[2] <= 3).all()
    assert fitted[4].sum() == 60


def test_few_shots_embed_few_examples(tmp_path, data_dir, monkeypatch):
    """And have the same accuracy as if all are embedded."""
    context, embedded = untrained(tmp_path, data_dir), []
    encode = decode.encode_images
    monkeypatch.setattr(
        decode, "encode_images", lambda model, x, keys: embedded.append(len(x)) or encode(model, x, keys)
    )
    all_of_them = Probe(shots=(2, None), **SPLITS)(context).scalars
    assert sum(embedded) == 64 + 32  # of 60 and 30, in batches of 16
    embedded.clear()
    few = Probe(shots=(2,), **SPLITS)(context).scalars
    assert sum(embedded) == 32 + 32
    assert few == {name: value for name, value in all_of_them.items() if "2_shot" in name}
    taken, probe_all = np.array([3, 17, 18, 40, 59]), Probe(shots=(None,), **SPLITS)
    whole, part = (probe_all.represent(context, "train[:60]", numbers) for numbers in (None, taken))
    for name in whole:
        np.testing.assert_allclose(part[name], whole[name][taken], rtol=1e-5, atol=1e-6)


def test_an_untrained_model_separates_digits(tmp_path, data_dir):
    scalars = Probe(shots=(None,), train_split="train[:500]")(untrained(tmp_path, data_dir)).scalars
    assert scalars["accuracy_all/layer_00"] > 0.2


@pytest.mark.parametrize("shots", [(), (0,), (1, -2)])
def test_invalid_shots(shots):
    with pytest.raises(ValueError, match=r"Probe\.shots"):
        Probe(shots=shots)


def test_no_label(tmp_path, data_dir):
    with pytest.raises(ValueError, match=r"have no label: .* Probe\.pp = "):
        Probe(pp="decode(channels=1) | keep('image')").check(untrained(tmp_path, data_dir))
