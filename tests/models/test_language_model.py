"""The language model equals the text part of a JetFormer, decodes as it is trained, and is scored over tokens."""

import functools
import math

import pytest
import torch

from jetformer import objectives, prng
from jetformer.models.decoder import Decoder
from jetformer.models.initializers import init_weights
from jetformer.models.language_model import LanguageModel
from jetformer.objectives import TextObjective
from jetformer.sampling.decode import CachedDecoder, sample_text
from small_models import small_model

DECODER = functools.partial(Decoder, width=16, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8)
MASK = torch.tensor([[True, True, True, False], [True] * 4, [True, False, False, False]])


def small_language_model(**kwargs):
    model = LanguageModel(**{"decoder": DECODER, "vocab_size": 13, "bos_id": 10} | kwargs)
    init_weights(model, torch.Generator().manual_seed(0))
    return model.double()


def text(size=3, length=4):
    return torch.randint(0, 10, (size, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mask", [None, MASK])
@torch.no_grad()
def test_it_equals_the_text_part_of_a_jetformer(mask):
    both = small_model(untie_output_vocab=True)
    alone = small_language_model()
    alone.load_state_dict({k: v for k, v in both.state_dict().items() if k in alone.state_dict()})
    no_image = torch.empty(3, 0, both.out_dim).double()
    x, attention, positions = both.embed(text(), no_image, text_first=True, text_mask=mask)
    expected = both.text_logits(both.run_decoder(x, mask=attention, positions=positions))[:, :4]
    logits = alone.text_logits(alone(text(), mask))
    valid = torch.ones_like(text(), dtype=torch.bool) if mask is None else mask
    torch.testing.assert_close(logits[valid], expected[valid])


@pytest.mark.parametrize("mask", [None, MASK])
@torch.no_grad()
def test_cached_equals_uncached(mask):
    """Texts of different lengths are continued in one batch."""
    model = small_language_model()
    more = text(3, 5)
    decoder = CachedDecoder(model, model.embed(text(), mask, shift=False), modality="text", num_steps=4)
    hidden = torch.stack([decoder.prefill(), *(decoder.step(token) for token in more[:, :4].unbind(1))], dim=1)
    for i in range(3):
        beginning = text()[i] if mask is None else text()[i][mask[i]]
        whole = torch.cat((beginning, more[i]))[None]
        torch.testing.assert_close(hidden[i], model(whole)[0, len(beginning) :])


@torch.no_grad()
def test_sampled_texts_and_their_likelihoods():
    model = small_language_model().float()
    keys = prng.example_keys(0, torch.arange(3, dtype=torch.int32))
    begun, mask = text(), MASK
    options = {"max_length": 6, "vocab_size": 10, "eos_id": 1}
    limits = torch.tensor([6, 2, 6])
    tokens, lengths, log_likelihood = sample_text(model, keys, text=begun, text_mask=mask, lengths=limits, **options)
    assert (tokens[1, 2:] == 1).all()
    for i in range(3):
        beginning = begun[i][mask[i]]
        end = (tokens[i] == 1).nonzero().flatten().tolist()
        own = tokens[i, : min([limits[i].item(), *(e + 1 for e in end)])]
        assert lengths[i] == len(own)
        whole = torch.cat((beginning, own))[None]
        log_probs = model.text_logits(model(whole))[0, len(beginning) :, :10].log_softmax(-1)
        torch.testing.assert_close(log_likelihood[i], log_probs.gather(1, own[:, None]).sum())
    alone, _, _ = sample_text(model, keys[1:2], text=begun[1:2], lengths=limits[1:2], **options)
    assert torch.equal(alone, tokens[1:2])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_objective_counts_tokens(dropout):
    """Losses of parts with different numbers of tokens add up to the loss of the batch."""
    model = small_language_model(decoder=functools.partial(DECODER, dropout=dropout))
    objective = TextObjective()
    batch = {"text": text(4), "text_mask": torch.ones(4, 4, dtype=torch.bool)}
    batch["text_loss"] = torch.arange(4) < torch.tensor([[1], [4], [2], [3]])
    draws = objective.draw(model, batch, prng.example_keys(0, torch.arange(4, dtype=torch.int32)), train=True)
    loss, terms = objective(model, batch, draws)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}

    if not dropout:
        log_probs = model.text_logits(model(batch["text"])).log_softmax(-1).gather(2, batch["text"][..., None])
        torch.testing.assert_close(loss.double(), -log_probs.squeeze(2)[batch["text_loss"]].mean(), rtol=1e-5, atol=0)
    bits, count = objectives.sum_terms(terms)["text_bits_per_token"]
    assert count == 10
    torch.testing.assert_close(bits / count * math.log(2), loss.detach())

    model.zero_grad()
    normalizers = objective.normalizers(batch, draws, train=True)
    for part, part_draws in zip(objectives.split(batch, 2), objectives.split(draws, 2), strict=True):
        objective(model, part, part_draws, normalizers=normalizers)[0].backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"bos_id 13 .* 13 tokens"):
        small_language_model(bos_id=13)
    model = small_language_model()
    with pytest.raises(ValueError, match="no 'text_loss'"):
        TextObjective()(model, {"text": text()}, {})
    with pytest.raises(ValueError, match=r"leave train\.noise_scale .* at 0"):
        TextObjective()(model, {"text": text(), "text_loss": text() > 0}, {}, noise_scale=1.0)
