"""Guidance samples from the density that it names."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from jetformer import prng
from jetformer.models.mixture import MixtureHead, MultivariateHead
from jetformer.sampling import guidance
from jetformer.sampling.guidance import Guidance
from mixtures import mixture_from_logits, mixture_of

N = 20_000
# loc_c, scale_c, loc_u, scale_u, w; all of these can be normalized.
GAUSSIAN = [
    (0.3, 0.5, -0.2, 0.8, 1.0),
    (0.0, 1.0, 0.5, 1.0, 4.0),
    (-1.0, 0.2, 1.0, 2.0, 7.5),
    (0.1, 1.0, 0.2, 0.95, 0.5),
]
# These cannot: the unconditional Gaussian is the narrower one.
NOT_GAUSSIAN = [(0.0, 1.0, 0.1, 0.5, 1.0), (0.2, 0.5, 0.2, 0.4, 3.0), (0.0, 1.0, 0.0, 0.9995 * math.sqrt(0.5), 1.0)]


def log_target(x, loc_c, scale_c, loc_u, scale_u, w):
    return (1 + w) * stats.norm.logpdf(x, loc_c, scale_c) - w * stats.norm.logpdf(x, loc_u, scale_u)


def samples(case, n=N, seed=0):
    """Samples of all cases, one in each dimension."""
    columns = torch.tensor(case, dtype=torch.float64).T
    loc_c, scale_c, loc_u, scale_u = (x.expand(n, -1) for x in columns[:4])
    noise = guidance.draw(
        MixtureHead(1, 1, 1), prng.example_keys(seed, torch.arange(n, dtype=torch.int32)), 1, len(case)
    )
    noise = noise.at(torch.zeros(1, dtype=torch.int64))
    # The function takes one weight.
    weights = columns[4].unique()
    result = torch.empty(n, len(case), dtype=torch.float64)
    for w in weights:
        mine = columns[4] == w
        drawn = guidance.resolve(guidance.draft_quotient(loc_c, scale_c, loc_u, scale_u, w, noise.normal, noise.keys))
        result[:, mine] = drawn[:, mine]
    return result.numpy()


def reference_rejection_sampler(case, n, rng):
    """The reference's, as its paper and code describe it: a grid for the envelope, proposals one by one."""
    loc_c, scale_c, _, scale_u, _ = case
    width = 2 * max(scale_c, scale_u)
    grid = loc_c + np.linspace(-10, 10, 1001)
    log_factor = log_target(grid, *case).max() - stats.norm.logpdf(loc_c, loc_c, width)
    x = rng.normal(loc_c, width, (n, 1000))
    log_accept = log_target(x, *case) - log_factor - stats.norm.logpdf(x, loc_c, width)
    accepted = np.log(rng.uniform(size=x.shape)) < log_accept
    first = x[np.arange(n), accepted.argmax(1)]
    # How far the target exceeds the envelope, whose maximum is at loc_c and not at the target's.
    excess = (log_target(grid, *case) - log_factor - stats.norm.logpdf(grid, loc_c, width)).max()
    return np.where(accepted.any(1), first, rng.normal(loc_c, scale_c, n)), excess


def test_the_closed_form_agrees_with_integration():
    drawn = samples(GAUSSIAN)
    for case, x in zip(GAUSSIAN, drawn.T, strict=True):
        grid = np.linspace(-30, 30, 600_001)
        density = np.exp(log_target(grid, *case) - log_target(grid, *case).max())
        cdf = density.cumsum() / density.sum()
        assert stats.kstest(x, lambda at, cdf=cdf, grid=grid: np.interp(at, grid, cdf)).pvalue > 1e-3


def test_the_closed_form_agrees_with_rejection_sampling():
    rng = np.random.default_rng(0)
    drawn = samples(GAUSSIAN, n=3000)
    compared = 0
    for case, x in zip(GAUSSIAN, drawn.T, strict=True):
        theirs, excess = reference_rejection_sampler(case, 3000, rng)
        if excess < 0.01:  # above that, the reference's sampler truncates the target
            assert stats.ks_2samp(x, theirs).pvalue > 1e-3
            compared += 1
    assert compared == 3


def test_other_densities_are_rejection_sampled_as_in_the_reference():
    rng = np.random.default_rng(1)
    drawn = samples(NOT_GAUSSIAN, n=3000)
    for case, x in zip(NOT_GAUSSIAN, drawn.T, strict=True):
        assert log_target(40, *case) > log_target(0, *case)  # it grows without bound
        theirs, _ = reference_rejection_sampler(case, 3000, rng)
        assert stats.ks_2samp(x, theirs).pvalue > 1e-3
    # The last is nearly flat, so samples follow the proposals, not the conditional density.
    assert drawn[:, 2].std() > 1.5


def test_dimensions_are_independent():
    """Rejection sampling of other dimensions does not change a dimension's sample."""
    mixed = samples([*GAUSSIAN[1:2], *NOT_GAUSSIAN[:1]], n=50)
    assert np.array_equal(mixed[:, 0], samples(GAUSSIAN[1:2] * 2, n=50)[:, 0])
    assert np.array_equal(mixed[:, 1], samples(NOT_GAUSSIAN[:1] * 2, n=50)[:, 1])


def test_weight_0_is_no_guidance():
    case = [(*x[:4], 0.0) for x in (*GAUSSIAN, *NOT_GAUSSIAN)]
    for (loc, scale, *_), x in zip(case, samples(case).T, strict=True):
        assert stats.kstest(x, stats.norm(loc, scale).cdf).pvalue > 1e-3


def integral(grid, log_density):
    """Returns the distribution function of an unnormalized log-density on a grid."""
    cdf = np.exp(log_density - log_density.max()).cumsum()
    return lambda at: np.interp(at, grid, cdf / cdf[-1])


def test_clipped_is_the_gaussian_with_the_unconditional_scale_at_least_the_conditional():
    grid = np.linspace(-30, 30, 600_001)
    for case in (*GAUSSIAN, *NOT_GAUSSIAN):
        keys = prng.example_keys(0, torch.arange(N, dtype=torch.int32))
        quotient = [torch.tensor(x, dtype=torch.float64).expand(N, 1) for x in case[:4]]
        quotient += [torch.tensor(case[4]), prng.normal(keys, (1,)).double(), keys]
        draft = guidance.draft_quotient(*quotient, clip=True)
        assert draft.pending is None
        drawn = draft.sample[:, 0].numpy()
        loc_c, scale_c, loc_u, scale_u, w = case
        log_density = log_target(grid, loc_c, scale_c, loc_u, max(scale_c, scale_u), w)
        assert stats.kstest(drawn, integral(grid, log_density)).pvalue > 1e-3
        assert drawn.std() < scale_c * 1.02
        if scale_c <= scale_u:  # nothing is clipped
            np.testing.assert_array_equal(drawn, guidance.draft_quotient(*quotient).sample[:, 0])


def resampled(mixtures, weight, num_candidates, n):
    """Draws n times from the quotient of two mixtures in one dimension, `[2, K]` of log-weights, means and scales."""
    log_weights, locs, scales = (torch.tensor(x).repeat_interleave(n, 0) for x in mixtures)
    keys = prng.example_keys(0, torch.arange(n, dtype=torch.int32))
    mixtures = log_weights, locs[..., None], scales[..., None]
    return guidance.resample(*mixtures, torch.tensor(weight), keys, num_candidates)[:, 0].numpy()


def test_resample_converges_to_the_quotient_of_mixtures():
    mixtures = np.log([[0.3, 0.7], [0.5, 0.5]]), [[-1.0, 1.0], [-0.5, 1.5]], [[0.4, 0.6], [0.8, 1.0]]
    log_c, log_u = (
        lambda x, log_weights=log_weights, locs=locs, scales=scales: np.logaddexp(
            *(a + stats.norm.logpdf(x, m, s) for a, m, s in zip(log_weights, locs, scales, strict=True))
        )
        for log_weights, locs, scales in zip(*mixtures, strict=True)
    )
    grid, w, n = np.linspace(-10, 10, 20_001), 2.0, 4000
    target = integral(grid, (1 + w) * log_c(grid) - w * log_u(grid))
    conditional = integral(grid, log_c(grid))
    assert stats.kstest(resampled(mixtures, w, 1, n), conditional).pvalue > 1e-3
    assert stats.kstest(resampled(mixtures, 0.0, 8, n), conditional).pvalue > 1e-3
    distances = [stats.kstest(resampled(mixtures, w, m, n), target) for m in (1, 4, 16, 256)]
    assert distances[0].statistic > 2 * distances[1].statistic > 2 * distances[2].statistic
    assert distances[0].pvalue < 1e-9
    assert distances[3].pvalue > 1e-3


@torch.no_grad()
def test_the_mixtures_to_resample_are_the_heads():
    head, hidden = random_head()
    log_weights, locs, scales = head.mixture(hidden, 0.9, 1.1)
    expected = mixture_from_logits(head.logits(hidden), head.num_mixtures, head.scale_tol, 0.9, 1.1)
    torch.testing.assert_close(log_weights, expected.logits.log_softmax(-1))
    torch.testing.assert_close((locs, scales), (expected.locs, expected.scales))


@torch.no_grad()
def test_a_resampled_token_is_a_candidate_of_its_own_key():
    """It depends on its key and hidden states, not on the other tokens of the batch."""
    head, hidden = random_head()
    noise = guidance.draw(head, prng.example_keys(0, torch.arange(3, dtype=torch.int32)), 4, 3).at(torch.tensor([2]))
    weight = torch.tensor(1.5)
    whole = guidance.draft_token(head, hidden, noise, "resample", weight, num_candidates=5).sample
    for i in range(3):
        mine = guidance.Noise(*(x[i : i + 1] for x in noise))
        drawn = guidance.draft_token(head, hidden[[i, 3 + i]], mine, "resample", weight, num_candidates=5).sample
        torch.testing.assert_close(drawn, whole[i : i + 1])


def random_head(k=5, d=3):
    generator = torch.Generator().manual_seed(0)
    head = MixtureHead(8, d, k)
    for p in head.parameters():
        p.data.normal_(std=0.5, generator=generator)
    return head, torch.randn(6, 8, generator=generator)


@torch.no_grad()
def test_modes_agree_without_a_difference_to_guide_by():
    """With equal hidden states with and without the text, modes at all weights are plain sampling."""
    head, hidden = random_head()
    keys = prng.example_keys(0, torch.arange(6, dtype=torch.int32))
    noise = guidance.draw(head, keys, 4, 3).at(torch.tensor([2]))
    plain = guidance.resolve(guidance.draft_token(head, hidden, noise, "none", torch.tensor(0.0), 0.9, 1.1))
    twice = torch.cat((hidden, hidden))
    for mode in ("density", "clipped", "interp"):
        for weight in (0.0, 3.0):
            guided = guidance.resolve(guidance.draft_token(head, twice, noise, mode, torch.tensor(weight), 0.9, 1.1))
            torch.testing.assert_close(guided, plain)


@torch.no_grad()
def test_interp_is_a_mixture_with_extrapolated_parameters():
    head, hidden = random_head(k=3, d=1)
    c, u = hidden[:1], hidden[1:2]
    w, n = 1.5, 8000
    logits = head.logits(u) + (1 + w) * (head.logits(c) - head.logits(u))
    mixture = mixture_of(head, logits)
    keys = prng.example_keys(0, torch.arange(n, dtype=torch.int32))
    noise = guidance.draw(head, keys, 1, 1).at(torch.tensor([0]))
    halves = torch.cat((c.expand(n, -1), u.expand(n, -1)))
    drawn = guidance.resolve(guidance.draft_token(head, halves, noise, "interp", torch.tensor(w)))[:, 0]
    weights, locs, scales = (
        x[0].numpy() for x in (mixture.logits.softmax(-1), mixture.locs[..., 0], mixture.scales[..., 0])
    )
    cdf = lambda x: sum(a * stats.norm.cdf(x, m, s) for a, m, s in zip(weights, locs, scales, strict=True))
    assert stats.kstest(drawn.numpy(), cdf).pvalue > 1e-3


@torch.no_grad()
def test_density_takes_the_component_of_the_conditional_mixture():
    """The conditional density has one component and the unconditional another, whose mean has no effect."""
    head = MixtureHead(2, 1, 2)
    head.linear.weight.zero_()
    head.linear.bias.zero_()
    head.linear.weight[:2] = torch.tensor([[40.0, 0.0], [0.0, 40.0]])  # hidden state i chooses component i
    head.linear.bias[2:4] = torch.tensor([-3.0, 7.0])
    keys = prng.example_keys(0, torch.arange(2000, dtype=torch.int32))
    noise = guidance.draw(head, keys, 1, 1).at(torch.tensor([0]))
    halves = torch.eye(2).repeat_interleave(2000, dim=0)
    drawn = guidance.resolve(guidance.draft_token(head, halves, noise, "density", torch.tensor(2.0)))[:, 0]
    assert stats.kstest(drawn.numpy(), stats.norm(-3, 1).cdf).pvalue > 1e-3


def test_schedules():
    assert Guidance("density", 2.0).weights(3).tolist() == [2, 2, 2]
    assert Guidance("density", 2.0, "linear").weights(3).tolist() == [0, 1, 2]
    torch.testing.assert_close(Guidance("density", 2.0, "cosine").weights(5)[[0, 2, 4]], torch.tensor([0.0, 1.0, 2.0]))
    assert Guidance("density", 2.0, "linear").weights(1).tolist() == [2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dense", 1.0), "'dense'"),
        (("density", 1.0, "square"), "'square'"),
        (("density", -1.0), "-1.0"),
        (("none", 1.0), "without guidance: .*clipped"),
        (("resample", 1.0, "constant", 0), "0 candidates"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        Guidance(*arguments)


def test_candidates_apply_to_resampling_only():
    assert guidance.guidance_of("resample", 1.0, "constant", 4).num_candidates == 4
    with pytest.raises(ValueError, match=r"4 candidates .*clipped"):
        guidance.guidance_of("clipped", 1.0, "constant", 4)


def test_one_multivariate_gaussian_is_not_guided():
    Guidance().check(MultivariateHead(4, 2))
    with pytest.raises(ValueError, match="one multivariate Gaussian"):
        Guidance("interp", 1.0).check(MultivariateHead(4, 2))
