"""Decoding with a KV cache equals the model without one, for prompts of any lengths; samples have the model's
distribution."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jetformer import prng
from jetformer.objectives import JetFormerObjective
from jetformer.sampling import decode
from jetformer.sampling.decode import (
    CachedDecoder,
    Latents,
    complete_images,
    decode_latents,
    encode_images,
    inpaint_images,
    keep_top,
    right_align,
    sample_images,
    sample_latents,
    sample_text,
    to_uint8,
)
from jetformer.sampling.guidance import Guidance, draft_token, draw, resolve
from mixtures import mixture_of
from small_models import L, T, inputs, small_model

OPTIONS = [
    *({}, {"num_vocab_repeats": 2}, {"causal_mask_on_prefix": False}, {"per_modality_final_norm": True}),
    {"image_posemb": True},
]
PADDED = [[True, True, True], [True, False, False], [True, True, False]]
# Without begin-of-image token the last place of the text predicts the image, so it has to be filled.
FULL = [[True] * 3] * 3


def keys(seed, size):
    return prng.example_keys(seed, torch.arange(size, dtype=torch.int32))


@pytest.mark.parametrize(
    ("kwargs", "text_mask"), [(options, PADDED) for options in OPTIONS] + [({"boi_id": None}, FULL)]
)
@torch.no_grad()
def test_cached_equals_uncached(kwargs, text_mask):
    model = small_model(**kwargs).eval()
    text, image = inputs(model, batch=3)
    text_mask = torch.tensor(text_mask)
    drop = torch.tensor([False, False, True])
    _, expected = model(text, image, text_first=True, text_mask=text_mask, drop_prefix=drop)
    prefix = model.embed(text, image[:, :0], text_first=True, text_mask=text_mask, drop_prefix=drop, shift=False)
    decoder = CachedDecoder(model, prefix, modality="image", num_steps=L - 1)
    hidden = [decoder.prefill(), *(decoder.step(token) for token in image[:, :-1].unbind(1))]
    torch.testing.assert_close(torch.stack(hidden, dim=1), expected)


def test_right_align_keeps_the_order():
    valid = torch.tensor([[True, False, True, False], [False, True, True, True]])
    x = torch.arange(8).view(2, 4)
    aligned = right_align(x, valid)
    assert aligned[0, 2:].tolist() == [0, 2]
    assert aligned[1, 1:].tolist() == [5, 6, 7]
    assert right_align(valid, valid).tolist() == [[False, False, True, True], [False, True, True, True]]


def test_samples_follow_the_models_density():
    """Samples of one token of one dimension follow the head's mixture."""
    model = small_model(flow=None, out_dim=1, image_shape=(2, 2, 3), num_mixtures=3).float().eval()
    text = torch.full((4000, 1), 4)
    with torch.no_grad():
        no_image = torch.empty(1, 0, 1)
        prefix = model.embed(text[:1], no_image, text_first=True, shift=False)
        hidden = CachedDecoder(model, prefix, modality="image", num_steps=0).prefill()
        mixture = mixture_of(model.image_head, model.image_head.logits(hidden))
    images, _ = sample_images(model, text, keys(0, 4000))
    assert images.shape == (4000, 2, 2, 3)
    # The first pixel value, away from the ends, where values are clipped.
    values = images[:, 0, 0, 0]
    weights, locs, scales = (
        y[0].squeeze(-1).numpy() for y in (mixture.logits.softmax(-1)[..., None], mixture.locs, mixture.scales)
    )
    cdf = lambda x: sum(w * stats.norm.cdf(x, m, s) for w, m, s in zip(weights, locs, scales, strict=True))
    for level in (32, 96, 128, 200):
        share = (values < level).float().mean().item()
        assert share == pytest.approx(cdf(level / 127.5 - 1), abs=0.03)


def test_samples_are_a_function_of_text_and_key():
    model = small_model().float().eval()
    text = torch.arange(4)[:, None]
    first, again, other = (sample_images(model, text, keys(seed, 4))[0] for seed in (0, 0, 1))
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    part, _ = sample_images(model, text[[3, 1]], keys(0, 4)[[3, 1]])
    assert (part.int() - first[[3, 1]].int()).abs().max() <= 1


def test_low_temperature_is_the_mode():
    model = small_model(num_mixtures=1, out_dim=None).float().eval()
    text = torch.zeros(2, 1, dtype=torch.int64)
    kwargs = {"temperature_scales": 1e-6}
    a, b = (sample_images(model, text, keys(s, 2), **kwargs)[0] for s in (0, 1))
    assert (a.int() - b.int()).abs().max() <= 1


def test_8_bits_survive_dequantization():
    pixels = torch.arange(256, dtype=torch.float64)
    for u in (0.01, 0.5, 0.99):
        assert torch.equal(to_uint8((pixels + u) / 127.5 - 1), pixels.to(torch.uint8))
    assert to_uint8(torch.tensor([-2.0, 2.0])).tolist() == [0, 255]


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    given_tokens=st.integers(0, L - 1),
    seed=st.integers(0, 2**31 - 1),
)
@torch.no_grad()
def test_cached_equals_uncached_for_any_prompts(lengths, given_tokens, seed):
    model = small_model(image_posemb=True).eval()
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 10, (len(lengths), 4), generator=generator)
    text_mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    image = torch.randn(len(lengths), L, model.out_dim, generator=generator).double()
    _, expected = model(text, image, text_first=True, text_mask=text_mask)
    start = image[:, :given_tokens]
    prefix = model.embed(text, start, text_first=True, text_mask=text_mask, shift=False)
    steps = {"num_steps": L - given_tokens - 1, "start": given_tokens}
    decoder = CachedDecoder(model, prefix, modality="image", **steps)
    hidden = [decoder.prefill(), *(decoder.step(token) for token in image[:, given_tokens:-1].unbind(1))]
    torch.testing.assert_close(torch.stack(hidden, dim=1), expected[:, given_tokens:])


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"boi_id": None}, {"causal_mask_on_prefix": False}, {"untie_output_vocab": True, "image_posemb": True}],
)
@torch.no_grad()
def test_cached_text_equals_uncached(kwargs):
    model = small_model(**kwargs).eval()
    text, image = inputs(model, batch=3)
    expected, _ = model(text, image, text_first=False)
    prefix = model.embed(text[:, :0], image, text_first=False, shift=False)
    decoder = CachedDecoder(model, prefix, modality="text", num_steps=T - 1)
    hidden = [decoder.prefill(), *(decoder.step(token) for token in text[:, :-1].unbind(1))]
    torch.testing.assert_close(torch.stack(hidden, dim=1), expected)


@pytest.mark.parametrize("mode", ["density", "clipped", "resample"])
@torch.no_grad()
def test_guided_equals_guiding_two_batches(mode):
    """One batch with both halves equals the model on the texts and the model without them."""
    model = small_model(num_mixtures=3).float().eval()
    text = torch.tensor([[1, 2], [3, 4], [5, 6]])
    text_mask = torch.tensor([[True, True], [True, False], [True, True]])
    guidance = Guidance(mode, 1.5, "linear", num_candidates=3)
    latents = sample_latents(model, text, keys(0, 3), text_mask=text_mask, guidance=guidance)
    noise = draw(model.image_head, keys(0, 3), L, model.out_dim)
    _, given_text = model(text, latents.tokens, text_first=True, text_mask=text_mask)
    all_dropped = torch.ones(3, dtype=torch.bool)
    _, without = model(text, latents.tokens, text_first=True, text_mask=text_mask, drop_prefix=all_dropped)
    for i, weight in enumerate(guidance.weights(L)):
        hidden = torch.cat((given_text[:, i], without[:, i]))
        options = {"mode": mode, "weight": weight, "num_candidates": 3}
        expected = resolve(draft_token(model.image_head, hidden, noise.at(torch.tensor([i])), **options))
        torch.testing.assert_close(latents.tokens[:, i], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_given_tokens_of_an_image_are_kept():
    model = small_model().eval()
    images = torch.randint(0, 256, (2, 4, 4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    whole = encode_images(model, images, keys(0, 2))
    given = Latents(*(x[:, :3] for x in whole))
    text = torch.tensor([[1], [2]])
    latents = sample_latents(model, text, keys(0, 2), given=given)
    for kept, sampled in zip(given, latents, strict=True):
        assert torch.equal(sampled[:, :3], kept)
        assert sampled.shape[1] == L
    assert not torch.equal(latents.tokens[:, 3], whole.tokens[:, 3])
    # All latents of an image decode to it.
    assert torch.equal(decode_latents(model, text, whole)[0], images)


@pytest.mark.parametrize("text_mask", [None, [[True, False], [True, True]]])
@torch.no_grad()
def test_likelihoods_are_those_of_the_objective(text_mask):
    """Bits per dim of an image, with the same dequantization noise, by the objective and by the sampler."""
    model = small_model().eval()
    images = torch.randint(0, 256, (2, 4, 4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    text = torch.tensor([[1, 2], [3, 4]])
    batch = {"image": images, "text": text, "text_loss": torch.ones_like(text, dtype=torch.bool)}
    if text_mask is not None:
        text_mask = batch["text_mask"] = torch.tensor(text_mask)
    draws = {"dequant": prng.uniform(prng.fold_in(keys(7, 2), decode.DEQUANT), (4, 4, 3))}
    _, terms = JetFormerObjective(text_prefix_prob=1.0)(model, batch, draws, train=False)
    latents = encode_images(model, images, keys(7, 2))
    _, log_likelihoods = decode_latents(model, text, latents, text_mask)
    torch.testing.assert_close(-log_likelihoods / (48 * math.log(2)), terms["bits_per_dim"][0])


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(mode="interp", weight=1.5)])
@torch.no_grad()
def test_a_sample_continues_its_own_first_tokens(guidance):
    """A sample given its own first tokens has the same rest."""
    model = small_model(image_posemb=True, num_mixtures=3).eval()
    text, _ = inputs(model, batch=3)
    whole = sample_latents(model, text, keys(0, 3), guidance=guidance)
    begun = sample_latents(model, text, keys(0, 3), guidance=guidance, given=Latents(*(x[:, :2] for x in whole)))
    torch.testing.assert_close(begun.tokens, whole.tokens)


@torch.no_grad()
def test_completed_images():
    """Given rows are kept, other rows have no effect, and the likelihood is that of the whole image."""
    model = small_model().eval()
    images = torch.randint(0, 256, (3, 4, 4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    text = torch.tensor([[1], [2], [3]])
    completed, log_likelihoods = complete_images(model, text, keys(0, 3), images, 2)
    assert torch.equal(completed[:, :2], images[:, :2])
    assert not torch.equal(completed[:, 2:], images[:, 2:])
    _, expected = decode_latents(model, text, encode_images(model, completed, keys(0, 3)))
    torch.testing.assert_close(log_likelihoods, expected)
    changed = torch.cat((images[:, :2], 255 - images[:, 2:]), dim=1)
    assert torch.equal(complete_images(model, text, keys(0, 3), changed, 2)[0], completed)
    for rows in (0, 1, 4):
        with pytest.raises(ValueError, match=f"{rows} rows: .*multiple of the patch size 2 "):
            complete_images(model, text, keys(0, 3), images, rows)


@torch.no_grad()
def test_inpainted_images():
    """Pixels that are not under the mask are kept, and the likelihood is that of the whole image."""
    model = small_model().eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 4, 4, 3), generator=generator, dtype=torch.uint8)
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    mask[0, 1:3, 1:3] = mask[1, :2, :] = mask[2, :, 3:] = True
    text = torch.tensor([[1], [2], [3]])
    painted, log_likelihoods = inpaint_images(model, text, keys(0, 3), images, mask)
    assert torch.equal(painted[~mask], images[~mask])
    assert ((painted != images).any(-1) & mask).flatten(1).any(1).all()
    _, expected = decode_latents(model, text, encode_images(model, painted, keys(0, 3)))
    torch.testing.assert_close(log_likelihoods, expected)
    # None depends on the others, whose masks differ.
    alone, _ = inpaint_images(model, text[1:2], keys(0, 3)[1:2], images[1:2], mask[1:2])
    assert torch.equal(alone, painted[1:2])


@pytest.mark.parametrize("guidance", [Guidance(), Guidance("interp", 1.5), Guidance("density", 0.5)])
@torch.no_grad()
def test_inpainting_the_last_rows_completes_images(guidance):
    """Without a flow, tokens are patches: what is under the mask has no effect on those to keep."""
    model = small_model(flow=None, num_mixtures=3).eval()
    images = torch.randint(0, 256, (3, 4, 4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    text, mask = torch.tensor([[1], [2], [3]]), torch.arange(4)[:, None].expand(3, 4, 4) >= 2
    expected = complete_images(model, text, keys(0, 3), images, 2, guidance=guidance)
    painted = inpaint_images(model, text, keys(0, 3), images, mask, guidance=guidance)
    assert torch.equal(painted[0], expected[0])
    torch.testing.assert_close(painted[1], expected[1])


@torch.no_grad()
def test_inpainted_tokens_follow_those_before_them():
    """A patch is sampled given the patches before it, and has no effect on those."""
    model = small_model(flow=None, num_mixtures=3).eval()
    images = torch.randint(0, 256, (3, 4, 4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    text, mask = torch.tensor([[1], [2], [3]]), torch.zeros(3, 4, 4, dtype=torch.bool)
    mask[:, :2, 2:] = True  # the second patch of four
    painted, _ = inpaint_images(model, text, keys(0, 3), images, mask)
    for row, same in ((0, False), (2, True)):  # of a patch before it, of one after it
        changed = images.clone()
        changed[:, row, :2] = 255 - changed[:, row, :2]
        again, _ = inpaint_images(model, text, keys(0, 3), changed, mask)
        assert torch.equal(again[mask], painted[mask]) == same


@torch.no_grad()
def test_autocast_keeps_the_residual_stream_in_float32():
    """Token by token as all at once: products in bfloat16, the residual stream in float32."""
    model = small_model().float().eval()
    text, image = inputs(model, batch=3)
    image = image.float()
    with torch.autocast("cpu", torch.bfloat16):
        _, expected = model(text, image, text_first=True)
        decoder = CachedDecoder(
            model, model.embed(text, image[:, :0], text_first=True, shift=False), modality="image", num_steps=L - 1
        )
        hidden = [decoder.prefill(), *(decoder.step(token) for token in image[:, :-1].unbind(1))]
    assert {x.dtype for x in hidden} == {expected.dtype} == {torch.float32}
    torch.testing.assert_close(torch.stack(hidden, dim=1), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("temperatures", [(0.0, 1.0), (1.0, -1.0)])
def test_temperatures_are_positive(temperatures):
    kwargs = dict(zip(("temperature_scales", "temperature_probs"), temperatures, strict=True))
    with pytest.raises(ValueError, match="temperatures {} and {}".format(*temperatures)):
        sample_images(small_model().eval(), torch.zeros(1, 1, dtype=torch.int64), keys(0, 1), **kwargs)


VOCAB, EOS = 10, 1


def texts(model, seed, size=3, **kwargs):
    image = torch.randn(3, L, model.out_dim, generator=torch.Generator().manual_seed(0))[:size]
    options = {"max_length": 12, "vocab_size": VOCAB, "eos_id": EOS} | kwargs
    tokens, lengths, log_likelihoods = sample_text(model, keys(seed, 3)[:size], image_tokens=image, **options)
    ends = (tokens == EOS).int()
    assert torch.equal(lengths, (ends.cumsum(1) - ends == 0).sum(1))
    return image, tokens, log_likelihoods


@torch.no_grad()
def test_texts_and_their_likelihoods():
    model = small_model(untie_output_vocab=True).float().eval()
    image, tokens, log_likelihoods = texts(model, 0)
    assert tokens.shape == (3, 12)
    assert tokens.max() < VOCAB
    hidden, _ = model(tokens, image, text_first=False)
    log_probs = model.text_logits(hidden)[..., :VOCAB].log_softmax(-1).gather(2, tokens[..., None]).squeeze(2)
    is_end = tokens == EOS
    after_the_end = is_end.int().cumsum(1) - is_end.int() > 0
    assert (tokens[after_the_end] == EOS).all()
    assert after_the_end.any()
    torch.testing.assert_close(log_likelihoods, log_probs.masked_fill(after_the_end, 0).sum(1))
    _, again, _ = texts(model, 0)
    assert torch.equal(tokens, again)
    _, part, _ = texts(model, 0, size=2)
    assert torch.equal(tokens[:2], part)
    _, other, _ = texts(model, 1)
    assert not torch.equal(tokens, other)


@torch.no_grad()
def test_the_most_probable_text():
    """A top-k of 1, a low temperature and a small top-p return it, for any seed."""
    model = small_model(untie_output_vocab=True).float().eval()
    image, tokens, _ = texts(model, 0, top_k=1)
    for kwargs in ({"top_k": 1}, {"temperature": 1e-4}, {"top_p": 1e-6}):
        assert torch.equal(texts(model, 5, **kwargs)[1], tokens)
    hidden, _ = model(tokens, image, text_first=False)
    best = model.text_logits(hidden)[..., :VOCAB].argmax(-1)
    until_the_end = (tokens == EOS).int().cumsum(1) - (tokens == EOS).int() == 0
    assert torch.equal(best[until_the_end], tokens[until_the_end])


def test_the_first_tokens_follow_the_models_distribution():
    model = small_model(untie_output_vocab=True).float().eval()
    image = torch.randn(1, L, model.out_dim, generator=torch.Generator().manual_seed(0)).expand(4000, -1, -1)
    tokens, _, log_likelihoods = sample_text(
        model, keys(0, 4000), image_tokens=image, max_length=1, vocab_size=VOCAB, eos_id=EOS, top_k=4, temperature=1.5
    )
    with torch.no_grad():
        hidden, _ = model(torch.zeros(1, 1, dtype=torch.int64), image[:1], text_first=False)
        log_probs = model.text_logits(hidden)[0, 0, :VOCAB].log_softmax(-1)
    torch.testing.assert_close(log_likelihoods, log_probs[tokens[:, 0]])
    expected = keep_top(log_probs.double() / 1.5, 4, 1.0).softmax(-1)
    expected = expected / expected.sum()
    counts = tokens.flatten().bincount(minlength=VOCAB)
    assert stats.chisquare(counts[expected > 0].numpy(), 4000 * expected[expected > 0].numpy()).pvalue > 1e-3
    assert counts[expected == 0].sum() == 0


def test_keep_top():
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
    kept = lambda *args: (keep_top(logits, *args) > -math.inf).tolist()
    assert kept(None, 1.0) == [True] * 4
    assert kept(2, 1.0) == [True, False, True, False]
    assert kept(9, 1.0) == [True] * 4
    assert kept(None, 0.5) == [True, False, True, False]
    assert kept(None, 0.39) == [True, False, False, False]
    assert kept(None, 0.75) == [True, False, True, True]
    assert kept(2, 0.3) == [True, False, False, False]


@pytest.mark.parametrize(
    ("model", "kwargs", "message"),
    [
        ({}, {"temperature": 0.0}, "temperature 0.0"),
        ({}, {"top_k": 0}, "top_k 0"),
        ({}, {"top_p": 0.0}, "top_p 0.0"),
        ({"num_vocab_repeats": 2}, {}, "class labels"),
    ],
)
def test_texts_that_cannot_be_sampled(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        texts(small_model(**model).float(), 0, **kwargs)


@pytest.mark.parametrize("kwargs", [{}, {"num_mixtures": 1, "multivariate": True}])
def test_denoising_follows_the_gradient_of_the_objective(kwargs):
    """The objective's gradient by the dequantization noise is that of the log-density by pixels."""
    model = small_model(**kwargs).eval()
    text, _ = inputs(model, batch=2)
    pixels = torch.randint(0, 256, (2, *model.image_shape), generator=torch.Generator().manual_seed(3))
    objective, noise_std = JetFormerObjective(text_prefix_prob=1.0, loss_on_prefix=False), 0.02
    noise = torch.full(pixels.shape, 0.5, dtype=torch.float64, requires_grad=True)
    batch = {"image": pixels.byte(), "text": text, "text_loss": torch.ones_like(text, dtype=torch.bool)}
    loss, _ = objective(model, batch, {"dequant": noise}, train=False)
    (gradient,) = torch.autograd.grad(loss * len(text) * pixels[0].numel() * math.log(2), noise)
    score = -gradient * 127.5
    x = (pixels.double() + 0.5) / 127.5 - 1
    encoded = model.encode_image(x)
    latents = Latents(encoded.tokens, encoded.factored)
    with torch.no_grad():
        plain, nats = decode_latents(model, text, latents)
        denoised, again = decode_latents(model, text, latents, noise_std=noise_std)
    assert torch.equal(plain, pixels.byte())
    assert torch.equal(nats, again)
    assert torch.equal(denoised, to_uint8(x + noise_std**2 * score))
    assert not torch.equal(denoised, plain)
