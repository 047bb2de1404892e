"""Likelihoods: each example counts once for any batch size, terms add up, bounds hold."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jetformer import prng
from jetformer.evaluators.likelihood import Likelihood, importance_weighted
from jetformer.runtime import derive_seed
from mixtures import mixture_of
from runs import untrained

SHAPES = {"gin_file": "experiments/shapes.gin", "Jet__num_heads": 2, "Data__eval_split": '"validation[:7]"'}


def by_hand(context, averaged, draw=0, term="bits_per_dim"):
    """Returns a term of all examples, scored one by one."""
    scores = []
    batches = context.batches()
    for batch in batches:
        for i in np.flatnonzero(batch["_mask"]):
            one = {name: torch.tensor(batch[name][i : i + 1]) for name in ("image", "text", "text_mask", "text_loss")
                   if name in batch}  # fmt: skip
            keys = prng.example_keys(derive_seed(context.seed, 2), torch.tensor(batch["_index"][i : i + 1]))
            draws = context.objective.draw(context.model, one, keys, train=False)
            if draw:
                again = context.objective.draw(context.model, one, prng.fold_in(keys, 1000 + draw), train=False)
                draws["dequant"] = again["dequant"]
            if averaged:
                with context.averaged(), torch.no_grad():
                    _, terms = context.objective(context.model, one, draws, train=False)
            else:
                with torch.no_grad():
                    _, terms = context.objective(context.model, one, draws, train=False)
            scores.append(terms[term][0].item())
    return np.array(scores)


@pytest.mark.parametrize("batch_size", [7, 64])
def test_every_example_counts_once(tmp_path, data_dir, batch_size):
    context = untrained(tmp_path, data_dir, train__eval_batch_size=batch_size)
    results = Likelihood()(context)
    assert results.scalars["bits_per_dim"] == pytest.approx(by_hand(context, averaged=False).mean(), rel=1e-6)
    assert results.ema_scalars["bits_per_dim"] == pytest.approx(by_hand(context, averaged=True).mean(), rel=1e-6)
    assert results.scalars["bits_per_dim"] != results.ema_scalars["bits_per_dim"]
    for scalars in (results.scalars, results.ema_scalars):
        parts = scalars["bits_per_dim_tokens"] - scalars["bits_per_dim_logdet"]
        assert scalars["bits_per_dim"] == pytest.approx(parts, abs=1e-5)


def test_components_are_counted_over_all_examples(tmp_path, data_dir):
    """For any batch size, as of all tokens in one batch."""
    context = untrained(tmp_path, data_dir, train__eval_batch_size=7)
    scalars = Likelihood()(context).scalars
    model = context.model
    batch = next(untrained(tmp_path, data_dir, train__eval_batch_size=40).batches())
    tensors = {name: torch.tensor(array) for name, array in batch.items()}
    keys = prng.example_keys(derive_seed(0, 2), tensors["_index"])
    with torch.no_grad():
        image = tensors["image"] + context.objective.draw(model, tensors, keys, train=False)["dequant"]
        tokens = model.encode_image(image / 127.5 - 1).tokens
        _, hidden = model(tensors["text"], tokens, text_first=True, text_mask=tensors.get("text_mask"))
        mixture = mixture_of(model.image_head, model.image_head.logits(hidden))
        components = torch.distributions.Normal(mixture.locs, mixture.scales).log_prob(tokens[..., None, :]).sum(-1)
    posterior = (mixture.logits.log_softmax(-1) + components).softmax(-1).flatten(0, 1)
    average = torch.special.entr(posterior.mean(0)).sum()
    information = average - torch.special.entr(posterior).sum(1).mean()
    assert scalars["effective_components"] == pytest.approx(average.exp().item(), rel=1e-4)
    assert scalars["distinct_components"] == pytest.approx(information.exp().item(), rel=1e-4)
    assert 1.001 < scalars["distinct_components"] < scalars["effective_components"] < 4


def test_several_draws(tmp_path, data_dir):
    context = untrained(tmp_path, data_dir, train__ema_decay=0.0, Data__eval_split='"validation[:9]"')
    results = Likelihood(num_draws=3)(context)
    draws = np.stack([by_hand(context, averaged=False, draw=i) for i in range(3)])
    assert results.scalars["bits_per_dim"] == pytest.approx(draws.mean(), rel=1e-6)
    bound = importance_weighted(draws, 64)
    assert results.scalars["bits_per_dim_importance_weighted"] == pytest.approx(bound, rel=1e-6)
    assert bound < draws.mean()
    assert results.ema_scalars == {}


def test_several_draws_of_students(tmp_path, data_dir):
    """Their terms are means over the draws, too; they have no likelihood to bound."""
    sizes = {"TarFlow__depth": 2, "TarFlow__emb_dim": 16, "Student__emb_dim": 16, "train__noise_scale": 0.0}
    sizes |= {"train__ema_decay": 0.0, "train__evaluators": "{}", "Data__eval_split": '"validation[:9]"'}
    context = untrained(tmp_path, data_dir, "experiments/tarflow_digits_student.gin", **sizes)
    scalars = Likelihood(num_draws=2)(context).scalars
    assert scalars.keys() == {"student_loss", "student_error"}
    draws = np.stack([by_hand(context, averaged=False, draw=i, term="student_error") for i in range(2)])
    assert scalars["student_error"] == pytest.approx(draws.mean(), rel=1e-6)
    assert (draws[0] != draws[1]).all()


@given(bits=st.lists(st.floats(-2, 10), min_size=1, max_size=6), num_dims=st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_the_importance_weighted_bound_is_the_log_of_the_mean(bits, num_dims):
    """And is between the mean of the draws' bits and the smallest of them."""
    draws = np.array(bits)[:, None]
    bound = importance_weighted(draws, num_dims)
    assert bound == pytest.approx(-math.log2(np.mean(2.0 ** (-draws * num_dims))) / num_dims, abs=1e-9)
    assert min(bits) - 1e-9 <= bound <= np.mean(bits) + 1e-9
    assert bound <= min(bits) + math.log2(len(bits)) / num_dims + 1e-9


def test_texts(tmp_path, shapes_dir):
    """Bits per character are all bits over all characters, also for prefixes and suffixes alone."""
    context = untrained(tmp_path, shapes_dir, **SHAPES)
    results = Likelihood(text_prefix_prob=0.0)(context)
    texts, bits, characters, num_tokens, means = context.data.texts(), 0.0, 0, 0, []
    for batch in context.batches():
        with torch.no_grad():
            tensors = {name: torch.tensor(array) for name, array in batch.items() if not name.startswith("_")}
            model = context.model
            keys = prng.example_keys(derive_seed(0, 2), torch.tensor(batch["_index"]))
            dequant = context.objective.draw(model, tensors, keys, train=False)["dequant"]
            tokens = model.encode_image((tensors["image"] + dequant) / 127.5 - 1).tokens
            hidden, _ = model(tensors["text"], tokens, text_first=False, text_mask=tensors["text_mask"])
            nats = -model.text_logits(hidden).log_softmax(-1).gather(2, tensors["text"].long()[..., None]).squeeze(2)
        for i in np.flatnonzero(batch["_mask"]):
            counted = nats[i][tensors["text_loss"][i]].double() / math.log(2)
            bits += counted.sum().item()
            means.append(counted.mean().item())
            num_tokens += len(counted)
            (text,) = texts.decode(batch["text"][i : i + 1])
            characters += len(text)
    assert characters > 7 * 20
    assert results.scalars["text_bits_per_character"] == pytest.approx(bits / characters, rel=1e-5)
    assert results.scalars["text_bits_per_token"] == pytest.approx(np.mean(means), rel=1e-5)
    assert results.scalars["text_bits_per_token_overall"] == pytest.approx(bits / num_tokens, rel=1e-5)
    assert "bits_per_dim" not in results.scalars  # images come first, and are not scored

    mixed = Likelihood()(context).scalars
    assert {"bits_per_dim_prefix", "bits_per_dim_suffix", "text_prefix_bits_per_token", "text_suffix_bits_per_token",
            "bits_per_dim_factored"} <= mixed.keys()  # fmt: skip
    # The loss of this experiment scores only what comes second; the order of each example is drawn from its key.
    for unit in ("bits_per_character", "bits_per_token_overall", "bits_per_token"):
        assert mixed[f"text_suffix_{unit}"] == pytest.approx(mixed[f"text_{unit}"], rel=1e-6)
        assert mixed[f"text_prefix_{unit}"] != pytest.approx(mixed[f"text_suffix_{unit}"], rel=1e-5)
    shares = [mixed[f"text_{where}_bits_per_character"] / mixed[f"text_{where}_bits_per_token_overall"]
              for where in ("prefix", "suffix")]  # fmt: skip
    assert all(0.05 < share < 1 for share in shares)  # a token has more than one character
    # With texts first none is scored.
    assert "text_bits_per_character" not in Likelihood(text_prefix_prob=1.0)(context).scalars


def test_another_split(tmp_path, data_dir):
    context = untrained(tmp_path, data_dir)
    scores = {split: Likelihood(split=split)(context).scalars["bits_per_dim"] for split in ("test[:5]", "test[5:9]")}
    both = Likelihood(split="test[:9]")(context).scalars["bits_per_dim"]
    assert scores["test[:5]"] != scores["test[5:9]"]
    assert both != scores["test[:5]"]


@pytest.mark.parametrize(
    ("evaluator", "message"),
    [
        (lambda: Likelihood(split="nope"), "no split 'nope'"),
        (lambda: Likelihood(text_prefix_prob=0.0), "does not learn texts after images"),
        (lambda: Likelihood(split="test[:0]"), r"split 'test\[:0\]' of 'digits' has no examples"),
    ],
)
def test_check_finds_errors(tmp_path, data_dir, evaluator, message):
    context = untrained(tmp_path, data_dir)
    with pytest.raises(ValueError, match=message) as error:
        evaluator().check(context)
    assert "\n" not in str(error.value)
