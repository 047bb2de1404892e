"""Jet is invertible, and its log-determinant is that of its Jacobian."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flows import CHANNELS, SMALL, SPATIAL, assert_invertible, randomized
from jetformer.models import remat
from jetformer.models.initializers import init_weights
from jetformer.models.jet import Gather, Jet, Scatter, spatial_permutation


@pytest.mark.parametrize(
    ("kind", "projection"), [("channels", kind) for kind in CHANNELS] + [("spatial", kind) for kind in SPATIAL]
)
def test_coupling_is_invertible(kind, projection):
    how = {"kinds": (kind,), f"{kind}_coupling_projs": (projection,)}
    (coupling,) = randomized(Jet((2, 4, 6), depth=1, **SMALL | {"ps": 1}, **how)).couplings
    x = torch.randn(2, 8, 6, dtype=torch.float64)
    assert_invertible(coupling, coupling.inverse, x)


@settings(max_examples=15, deadline=None)
@given(
    grid=st.tuples(st.sampled_from([2, 4]), st.sampled_from([2, 4])),
    channels=st.sampled_from([1, 3]),
    scale_factor=st.floats(0.5, 4.0),
    kinds=st.lists(st.sampled_from(["channels", "spatial"]), min_size=1, max_size=3),
    depth=st.integers(0, 4),
    seed=st.integers(0, 2**32),
)
def test_jet_is_invertible(grid, channels, scale_factor, kinds, depth, seed):
    shape = (2 * grid[0], 2 * grid[1], channels)
    projections = {"spatial_coupling_projs": ("checkerboard", "hstripes-inv")}
    model = Jet(shape, depth=depth, kinds=kinds, scale_factor=scale_factor, **SMALL, **projections)
    randomized(model, seed)
    x = torch.randn(1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert_invertible(model, model.inverse, x)


def test_scales_are_bounded():
    model = randomized(Jet((1, 1, 2), depth=1, scale_factor=3.0, kinds=("channels",), **SMALL | {"ps": 1}))
    scale, log_scale = model.couplings[0].scale(torch.tensor([-100.0, 100.0], dtype=torch.float64))
    torch.testing.assert_close(scale, torch.tensor([0.0, 3.0], dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(log_scale, scale.log())


def test_the_largest_log_determinant_is_reached_at_the_largest_scales():
    model = randomized(Jet((4, 4, 3), depth=3, **SMALL))
    for coupling in model.couplings:
        coupling.dnn.final_proj.bias.data[6:] = 100.0
    _, logdet = model(torch.randn(1, 4, 4, 3, dtype=torch.float64))
    assert logdet.item() == pytest.approx(model.max_logdet)
    assert Jet((4, 4, 3), depth=3, scale_factor=1.0, **SMALL).max_logdet is None


def test_jet_is_invertible_given_a_context():
    model = randomized(Jet((4, 4, 3), depth=2, context_dim=5, **SMALL))
    x, context = torch.randn(1, 4, 4, 3).double(), torch.randn(1, 3, 5).double()
    forward, inverse = (functools.partial(f, context=context) for f in (model, model.inverse))
    assert_invertible(forward, inverse, x)
    assert not torch.equal(forward(x)[0], model(x, torch.zeros_like(context))[0])


def test_jet_starts_as_the_identity():
    model = Jet((4, 4, 3), depth=3, **SMALL)
    init_weights(model, torch.Generator().manual_seed(0))
    x = torch.randn(2, 4, 4, 3)
    z, logdet = model(x)
    torch.testing.assert_close(z, x)
    torch.testing.assert_close(logdet, torch.zeros(2), atol=1e-5, rtol=0)


def test_activation_checkpointing_changes_nothing():
    plain = randomized(Jet((4, 4, 3), depth=2, **SMALL))
    checkpointed = Jet((4, 4, 3), depth=2, **SMALL).double()
    remat.set_policy(checkpointed, "couplings")
    assert all(coupling.recompute for coupling in checkpointed.couplings)
    checkpointed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    for model in (plain, checkpointed):
        z, logdet = model(x)
        (z.square().sum() - logdet.sum()).backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("dim", [1, 2])
def test_gather_and_scatter_are_each_others_inverse_and_backward(dim):
    x = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(5)
    gather, scatter = (lambda y, f=f: f.apply(y, dim, order) for f in (Gather, Scatter))
    torch.testing.assert_close(gather(x), x.index_select(dim, order))
    torch.testing.assert_close(scatter(gather(x)), x)
    for function in (gather, scatter):
        assert torch.autograd.gradcheck(function, (x,))
        assert torch.autograd.gradgradcheck(function, (x,))


@pytest.mark.parametrize("kind", ["checkerboard", "vstripes", "hstripes"])
def test_inv_swaps_the_halves(kind):
    first, second = spatial_permutation(kind, (4, 6)).chunk(2)
    swapped = spatial_permutation(f"{kind}-inv", (4, 6))
    assert torch.equal(swapped, torch.cat((second, first)))
    rows, columns = torch.div(first, 6, rounding_mode="floor"), first % 6
    pattern = {"checkerboard": rows + columns, "vstripes": columns, "hstripes": rows}[kind]
    assert (pattern % 2 == 0).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ps": 3}, r"4 × 4 .* 3"),
        ({"emb_dim": 9}, r"num_heads 2 .*width 9"),
        ({"kinds": ("diagonal",)}, "'diagonal'.*channels.*spatial"),
        ({"kinds": ("spatial",), "spatial_coupling_projs": ("dots",)}, "'dots'.*checkerboard"),
        ({"channels_coupling_projs": ("learned",)}, "'learned'.*random"),
        ({"kinds": ("spatial",), "ps": 4}, r"1 × 1 .*\(1 and 0\)"),
        ({"ps": 1}, "3 dimensions"),
    ],
)
def test_impossible_sizes_are_named(kwargs, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        Jet(**{"input_shape": (4, 4, 3), "depth": 1} | SMALL | kwargs)
