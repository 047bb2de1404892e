"""Decoding with a cache: equal to the model without one, prompts of any length together, samples of the right
distribution."""

import pytest
import torch
from scipy import stats

from jetformer import prng
from jetformer.sampling.decode import ImageDecoder, right_align, sample_images, to_uint8
from jetformer.sampling.grid import ClassGrid
from small_models import L, inputs, small_model

OPTIONS = [{}, {"num_vocab_repeats": 2}, {"causal_mask_on_prefix": False}, {"per_modality_final_norm": True}]
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
    decoder = ImageDecoder(model, text, text_mask, L, drop)
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
    """One token of one dimension: what is sampled is distributed as the head's mixture says."""
    model = small_model(flow=None, out_dim=1, image_shape=(2, 2, 3), num_mixtures=3).float().eval()
    text = torch.full((4000, 1), 4)
    with torch.no_grad():
        hidden = ImageDecoder(model, text[:1], None, 1).prefill()
        mixture = model.image_head.distribution(model.image_head.logits(hidden))
    images = sample_images(model, text, keys(0, 4000))
    assert images.shape == (4000, 2, 2, 3)
    # The first pixel value, between the ends that clipping fills up.
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
    first, again, other = (sample_images(model, text, keys(seed, 4)) for seed in (0, 0, 1))
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    part = sample_images(model, text[[3, 1]], keys(0, 4)[[3, 1]])
    assert (part.int() - first[[3, 1]].int()).abs().max() <= 1


def test_low_temperature_is_the_mode():
    model = small_model(num_mixtures=1, out_dim=None).float().eval()
    text = torch.zeros(2, 1, dtype=torch.int64)
    kwargs = {"temperature_scales": 1e-6}
    a, b = (sample_images(model, text, keys(s, 2), **kwargs) for s in (0, 1))
    assert (a.int() - b.int()).abs().max() <= 1


def test_8_bits_survive_dequantization():
    pixels = torch.arange(256, dtype=torch.float64)
    for u in (0.01, 0.5, 0.99):
        assert torch.equal(to_uint8((pixels + u) / 127.5 - 1), pixels.to(torch.uint8))
    assert to_uint8(torch.tensor([-2.0, 2.0])).tolist() == [0, 255]


def test_grid_has_a_row_for_each_class():
    model = small_model().float().eval()
    picture = ClassGrid(num_classes=5, per_class=3)(model, seed=0)
    assert picture.shape == (5 * 5 + 1, 3 * 5 + 1, 3)
    labels = torch.arange(5).repeat_interleave(3)[:, None]
    images = sample_images(model, labels, keys(0, 15))
    assert (picture[6:10, 11:15] == images[5].numpy()).all()
    assert (picture[::5] == picture[0, 0]).all()
    assert (picture[:, ::5] == picture[0, 0]).all()
