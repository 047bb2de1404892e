"""The prior of factored-out dimensions is a density, samples have it, and all positions share it."""

import functools
import math

import pytest
import torch
from scipy import stats
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from flows import randomized
from jetformer import prng
from jetformer.models.factored_prior import FactoredPrior
from jetformer.objectives import JetFormerObjective
from jetformer.sampling import decode
from jetformer.sampling.guidance import gumbel
from small_models import L, inputs, small_model

D = 3


def prior_of(factored_dim, **kwargs):
    torch.manual_seed(0)
    return randomized(FactoredPrior(D, factored_dim, num_mixtures=3, width=5, **kwargs)).double()


def mixture_of(prior, tokens):
    """The same mixtures by torch.distributions, `[B, L]`."""
    log_weights, locs, scales = prior.head.mixture(prior.hidden(tokens).expand(-1, tokens.shape[1], -1).flatten(0, 1))
    log_weights, locs, scales = (x.unflatten(0, tokens.shape[:2]) for x in (log_weights, locs, scales))
    return MixtureSameFamily(Categorical(logits=log_weights), Independent(Normal(locs, scales), 1))


@pytest.mark.parametrize("per_token", [False, True])
def test_it_integrates_to_one(per_token):
    """Over the factored-out dimensions of two positions, given their tokens."""
    prior, tokens = prior_of(1, per_token=per_token), torch.randn(1, 2, D, dtype=torch.float64)
    axis = torch.linspace(-12, 12, 400, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)[..., None]
    with torch.no_grad():
        scores = prior(tokens.expand(len(grid), -1, -1), grid, torch.ones(len(grid), 2).double())
    total = (-scores.nll.sum(1)).exp().sum() * (axis[1] - axis[0]) ** 2
    assert total.item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("per_token", [False, True])
def test_scores_and_gradients(per_token):
    """Those of torch.distributions, by autograd."""
    prior = prior_of(2, per_token=per_token)
    tokens, factored = torch.randn(4, L, D).double().requires_grad_(), torch.randn(4, L, 2).double().requires_grad_()
    weight = torch.rand(4, L).double()
    scores = prior(tokens, factored, weight)
    expected = -mixture_of(prior, tokens).log_prob(factored)
    torch.testing.assert_close(scores.nll, expected.detach())
    wanted = [tokens, factored, *prior.parameters()]
    actual = torch.autograd.grad(scores.total, wanted)
    torch.testing.assert_close(actual, torch.autograd.grad((weight * expected).sum(), wanted))


def test_samples_have_its_distribution():
    prior, tokens = prior_of(1), torch.randn(1, L, D, dtype=torch.float64)
    keys = prng.example_keys(0, torch.arange(4000, dtype=torch.int32))
    noise = gumbel(prng.fold_in(keys, 0), 3 * L).unflatten(-1, (L, 3)), prng.normal(prng.fold_in(keys, 1), (L, 1))
    with torch.no_grad():
        samples = prior.sample(tokens.expand(4000, -1, -1), *noise)[..., 0]
        mixture = mixture_of(prior, tokens)
        components = Normal(
            *(x[..., 0] for x in (mixture.component_distribution.mean, mixture.component_distribution.stddev))
        )
        weights = mixture.mixture_distribution.probs[0, 0]
    cdf = lambda x: (weights * components.cdf(torch.as_tensor(x)[:, None, None])[..., 0, :].squeeze(1)).sum(-1).numpy()
    for position in range(L):
        assert stats.kstest(samples[:, position].numpy(), lambda x: cdf(x)).pvalue > 1e-3
    # Positions choose their components on their own.
    assert abs(stats.pearsonr(samples[:, 0], samples[:, 1]).statistic) < 0.06


def test_all_positions_share_a_mixture():
    tokens = torch.randn(2, L, D, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    shared, own = prior_of(2), prior_of(2, per_token=True)
    assert shared.hidden(tokens).shape == (2, 1, 5)
    torch.testing.assert_close(shared.hidden(tokens[:, order]), shared.hidden(tokens))
    torch.testing.assert_close(own.hidden(tokens[:, order]), own.hidden(tokens)[:, order])
    assert not torch.allclose(shared.hidden(tokens)[0], shared.hidden(tokens)[1])


def test_components_do_not_start_equal():
    prior = FactoredPrior(D, 2)
    assert not prior.head.components_equal()


PRIOR = functools.partial(FactoredPrior, num_mixtures=3, width=5)


def test_likelihood_of_a_jetformer():
    """The objective's bits per dim, and their gradient, contain the prior's in the place of a standard normal."""
    model = small_model(factored_prior=PRIOR)
    randomized(model.factored_prior)
    text, _ = inputs(model)
    image = torch.randint(0, 256, (2, *model.image_shape), dtype=torch.uint8)
    batch = {"image": image, "text": text, "text_loss": torch.ones_like(text, dtype=torch.bool)}
    draws = {"dequant": torch.rand(image.shape).double()}
    objective = JetFormerObjective(text_prefix_prob=1.0, loss_on_prefix=False)
    loss, terms = objective(model, batch, draws, train=False)
    encoded = model.encode_image((image + draws["dequant"]) / 127.5 - 1)
    nats = -mixture_of(model.factored_prior, encoded.tokens).log_prob(encoded.factored).sum(1)
    bits = nats / (image[0].numel() * math.log(2))
    torch.testing.assert_close(terms["bits_per_dim_factored"][0], bits.detach())
    torch.testing.assert_close(terms["bits_per_dim"][0].mean(), loss.detach())
    model.factored_prior = None
    plain, _ = objective(model, batch, draws, train=False)
    normal = (0.5 * (encoded.factored.square() + math.log(2 * math.pi))).sum((1, 2)) / (image[0].numel() * math.log(2))
    torch.testing.assert_close(loss - bits.mean(), plain - normal.mean())
    flow = list(model.flow.parameters())
    gradient = lambda x: torch.cat([g.flatten() for g in torch.autograd.grad(x, flow, retain_graph=True)])
    torch.testing.assert_close(gradient(loss) - gradient(bits.mean()), gradient(plain) - gradient(normal.mean()))


def test_sampled_images():
    """Factored-out dimensions are drawn given the tokens; the likelihood is the objective's; completion keeps them."""
    model = small_model(factored_prior=PRIOR).eval()
    randomized(model.factored_prior)
    text, _ = inputs(model)
    keys = prng.example_keys(5, torch.arange(2, dtype=torch.int32))
    latents = decode.sample_latents(model, text, keys)
    _, nats = decode.decode_latents(model, text, latents)
    with torch.no_grad():
        x, _ = model.decode_image(*latents)
        pixels = (x + 1) * 127.5
        batch = {"image": torch.zeros(pixels.shape, dtype=torch.uint8), "text": text}
        batch["text_loss"] = torch.ones_like(text, dtype=torch.bool)
        objective = JetFormerObjective(text_prefix_prob=1.0, loss_on_prefix=False)
        _, terms = objective(model, batch, {"dequant": pixels}, train=False)
    torch.testing.assert_close(-nats / (pixels[0].numel() * math.log(2)), terms["bits_per_dim"][0])
    kept = torch.tensor([[True, False, True, False]] * 2)
    given = decode.Latents(torch.zeros_like(latents.tokens), torch.zeros_like(latents.factored))
    again = decode.sample_latents(model, text, keys, given=given, kept=kept)
    assert not again.factored[kept].any()
    assert again.factored[~kept].all()
    model.factored_prior = None
    plain = decode.sample_latents(model, text, keys)
    torch.testing.assert_close(latents.tokens, plain.tokens)
    assert not torch.allclose(latents.factored, plain.factored)


def test_it_needs_factored_out_dimensions():
    with pytest.raises(ValueError, match="set out_dim below 12"):
        small_model(factored_prior=PRIOR, out_dim=12)
