"""The whole model: the tokens that each token depends on, and the round trip from image to tokens."""

import functools

import pytest
import torch

from jetformer.models.decoder import Decoder
from jetformer.models.initializers import init_weights
from jetformer.models.jet import Jet
from jetformer.models.jetformer import JetFormer
from jetformer.models.patches import Patchify
from small_models import L, T, inputs, small_model


def test_an_image_is_restored_from_its_tokens():
    model = small_model()
    image = torch.rand(2, 4, 4, 3, dtype=torch.float64) * 2 - 1
    tokens, factored, logdet, _ = model.encode_image(image)
    assert tokens.shape == (2, L, 8)
    assert factored.shape == (2, L, 4)
    restored, inverse_logdet = model.decode_image(tokens, factored)
    torch.testing.assert_close(restored, image)
    torch.testing.assert_close(inverse_logdet, -logdet)


@pytest.mark.parametrize("boi_id", [None, 11])
@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("repeats", [1, 2])
def test_each_token_is_predicted_from_what_comes_before(boi_id, text_first, repeats):
    model = small_model(boi_id=boi_id, num_vocab_repeats=repeats)
    text, image = inputs(model)
    image.requires_grad_()
    text_hidden, image_hidden = model(text, image, text_first=text_first)
    assert text_hidden.shape == (2, T, 16)
    assert image_hidden.shape == (2, L, 16)
    for i in range(L):
        (gradient,) = torch.autograd.grad(image_hidden[:, i].sum(), image, retain_graph=True, allow_unused=True)
        assert (gradient[:, :i] != 0).any(-1).all()
        assert (gradient[:, i:] == 0).all()
    (gradient,) = torch.autograd.grad(text_hidden.sum(), image, allow_unused=True)
    sees_image = gradient is not None and (gradient != 0).any()
    assert sees_image == (not text_first)


def test_image_tokens_know_their_places():
    """Each place in the image has its own embedding, independent of the text before it."""
    model = small_model(image_posemb=True)
    plain, tokens = small_model(), inputs(model)[1][:, :1].expand(-1, L, -1)
    plain.load_state_dict(model.state_dict(), strict=False)
    for text_first, first in ((True, 1 + T + 1), (False, 1)):
        text = inputs(model)[0]
        (x, *_), (expected, *_) = (m.embed(text, tokens, text_first=text_first, shift=False) for m in (model, plain))
        image = slice(first, first + L)
        torch.testing.assert_close(x[:, image] - expected[:, image], model.image_posemb.expand(2, -1, -1))
        x[:, image], expected[:, image] = 0.0, 0.0
        torch.testing.assert_close(x, expected)


def test_a_mixed_batch_is_its_examples():
    """In a batch of both orders, padding and a dropped prefix, each example has the outputs that it has alone."""
    model = small_model()
    text, image = inputs(model, batch=4)
    text_first = torch.tensor([True, False, True, False])
    text_mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
    drop_prefix = torch.tensor([False, False, True, False])
    together = model(text, image, text_first=text_first, text_mask=text_mask, drop_prefix=drop_prefix)
    for i in range(4):
        one = slice(i, i + 1)
        alone = model(
            text[one],
            image[one],
            text_first=bool(text_first[i]),
            text_mask=text_mask[one],
            drop_prefix=drop_prefix[one],
        )
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[one], b)


def test_padding_is_invisible():
    """Masked text tokens do not affect the image after them."""
    model = small_model()
    text, image = inputs(model)
    mask = torch.tensor([[True, True, False]] * 2)
    other = text.clone()
    other[:, 2] = (text[:, 2] + 1) % 10
    hidden = [model(t, image, text_first=True, text_mask=mask)[1] for t in (text, other)]
    torch.testing.assert_close(*hidden)
    # Padding takes no positions: the text without it has the same outputs.
    torch.testing.assert_close(hidden[0], model(text[:, :2], image, text_first=True)[1])


def test_a_dropped_prefix_has_no_effect():
    model = small_model(num_vocab_repeats=2)
    text, image = inputs(model)
    drop = torch.ones(2, dtype=torch.bool)
    hidden = [model(t, image, text_first=True, drop_prefix=drop)[1] for t in (text, (text + 1) % 10)]
    torch.testing.assert_close(*hidden)
    assert not torch.allclose(hidden[0], model(text, image, text_first=True)[1])


def test_a_prefix_without_causal_mask_attends_to_itself():
    model = small_model(causal_mask_on_prefix=False)
    text, image = inputs(model)
    x, mask, _ = model.embed(text, image, text_first=True)
    assert x.shape[1] == mask.shape[1] == T + L + 1
    assert mask[:, : T + 1, : T + 1].all()
    assert torch.equal(mask[0, T + 1 :, T + 1 :], torch.ones(L, L, dtype=torch.bool).tril())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"boi_id": 13}, "boi_id 13 .* 13 tokens"),
        ({"out_dim": 13}, "out_dim 13 .* 12 dimensions"),
        ({"multivariate": True}, "num_mixtures to 1, not 4"),
        ({"untie_output_vocab": True, "num_vocab_repeats": 2}, "untie_output_vocab .*num_vocab_repeats = 1"),
        ({"head_dtype": "float16"}, "'float16'.*float32.*bfloat16"),
    ],
)
def test_impossible_options_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small_model(**kwargs)


def test_an_image_of_another_size_is_named():
    with pytest.raises(ValueError, match=r"images have shape \(8, 8, 3\)"):
        small_model().encode_image(torch.zeros(1, 8, 8, 3))


def test_initial_weights_are_a_function_of_the_seed():
    states = []
    for seed in (0, 0, 1):
        with torch.device("meta"):
            model = small_model_on_meta()
        model.to_empty(device="cpu")
        init_weights(model, torch.Generator().manual_seed(seed))
        states.append(model.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["text_emb.weight"], states[2]["text_emb.weight"])
    for name, value in states[0].items():
        assert value.isfinite().all(), name


def small_model_on_meta():
    return JetFormer(
        image_shape=(4, 4, 3),
        patches=functools.partial(Patchify, patch_size=2),
        flow=functools.partial(Jet, depth=2, emb_dim=8, num_heads=2, ps=1, context_dim=4),
        decoder=functools.partial(Decoder, width=16, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8),
        vocab_size=13,
        bos_id=10,
        boi_id=None,
        nolabel_id=12,
        untie_output_vocab=True,
        per_modality_final_norm=True,
    )
