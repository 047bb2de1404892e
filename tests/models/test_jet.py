"""Jet is invertible, and its log-determinant is that of its Jacobian."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flows import assert_invertible, randomized
from jetformer.models import jet, remat
from jetformer.models.initializers import init_weights
from jetformer.models.jet import Coupling, Jet, spatial_permutation

CHANNELS = ["random", "halves", "halves-inv"]
SPATIAL = [f"{kind}{inv}" for kind in ("checkerboard", "vstripes", "hstripes") for inv in ("", "-inv")]


@pytest.mark.parametrize("how", [{}, {"predictor": "cnn"}, {"masking": True}, {"scale_form": "exp"}], ids=str)
@pytest.mark.parametrize(
    ("kind", "projection"), [("channels", kind) for kind in CHANNELS] + [("spatial", kind) for kind in SPATIAL]
)
def test_coupling_is_invertible(kind, projection, how):
    coupling = Coupling(kind, projection, (2, 4), 6, 2.0, **how, depth=1, emb_dim=8, num_heads=2, context_dim=None)
    randomized(coupling)
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
    model = Jet(
        shape,
        depth=depth,
        emb_dim=8,
        num_heads=2,
        ps=2,
        kinds=kinds,
        scale_factor=scale_factor,
        spatial_coupling_projs=("checkerboard", "hstripes-inv"),
    )
    randomized(model, seed)
    x = torch.randn(1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert_invertible(model, model.inverse, x)


@settings(max_examples=25, deadline=None)
@given(
    predictor=st.sampled_from(["vit", "cnn"]),
    masking=st.booleans(),
    scale_form=st.sampled_from(["sigmoid", "exp"]),
    actnorm=st.booleans(),
    invertible_dense=st.sampled_from([None, "lu", "plain"]),
    num_levels=st.integers(1, 3),
    kinds=st.lists(st.sampled_from(["channels", "spatial"]), min_size=1, max_size=2),
    seed=st.integers(0, 2**32),
)
def test_every_ablation_is_invertible(seed, num_levels, kinds, **how):
    if num_levels == 3:  # the third has one token left
        kinds = ["channels"]
    model = Jet(
        (8, 8, 1),
        depth=3,
        emb_dim=8,
        num_heads=2,
        ps=2,
        kinds=kinds,
        channels_coupling_projs=CHANNELS,
        num_levels=num_levels,
        **how,
    )
    randomized(model, seed)
    x = torch.randn(1, 8, 8, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert_invertible(model, model.inverse, x)


def test_masks_reach_single_pixels():
    """RealNVP's checkerboard: there is nothing to cut in two."""
    model = randomized(Jet((4, 4, 1), depth=4, emb_dim=8, num_heads=2, ps=1, kinds=("spatial",), masking=True))
    x = torch.randn(1, 4, 4, 1, dtype=torch.float64)
    assert_invertible(model, model.inverse, x)


@pytest.mark.parametrize("predictor", ["vit", "cnn"])
@pytest.mark.parametrize("masking", [False, True])
@pytest.mark.parametrize("kind", ["channels", "spatial"])
def test_a_coupling_keeps_one_half_and_changes_the_other_by_it(kind, masking, predictor):
    projection = "halves" if kind == "channels" else "hstripes"
    how = {"masking": masking, "predictor": predictor, "depth": 1, "emb_dim": 8, "num_heads": 2, "context_dim": None}
    coupling = randomized(Coupling(kind, projection, (2, 2), 4, 2.0, **how))
    x = torch.randn(1, 4, 4, dtype=torch.float64)
    z, _ = coupling(x)
    first = torch.zeros(4, 4, dtype=torch.bool)
    first[(slice(None), slice(2)) if kind == "channels" else slice(2)] = True
    assert torch.equal(z[0][first], x[0][first])
    jacobian = torch.autograd.functional.jacobian(lambda e: coupling(e)[0], x)[0][:, :, 0]
    of_second = jacobian[~first]
    assert (of_second[:, first] != 0).any(dim=0).all()  # what it sees
    among_themselves = of_second[:, ~first]
    assert torch.equal(among_themselves, among_themselves.diagonal().diag())


@pytest.mark.parametrize(("scale_form", "smallest"), [("sigmoid", 0.0), ("exp", 1 / 3)])
def test_scales_are_bounded(scale_form, smallest):
    coupling = Coupling(
        "channels", "halves", (1, 1), 2, 3.0, scale_form, depth=1, emb_dim=8, num_heads=2, context_dim=None
    )
    randomized(coupling)
    for raw, expected in ((-100.0, smallest), (100.0, 3.0)):
        coupling.dnn.final_proj.bias.data.copy_(torch.tensor([0.0, raw]))
        z, _ = coupling(torch.tensor([[[0.0, 1.0]]], dtype=torch.float64))
        zero, _ = coupling(torch.zeros(1, 1, 2, dtype=torch.float64))
        assert (z - zero)[0, 0, 1].item() == pytest.approx(expected, abs=1e-6)


def test_levels_factor_half_of_the_dimensions_out():
    """What the first level factors out is not changed by the second, and what goes on is."""
    how = {"emb_dim": 8, "num_heads": 2, "ps": 2, "kinds": ("channels",), "num_levels": 2}
    model = randomized(Jet((8, 8, 1), depth=4, **how))
    x = torch.randn(1, 8, 8, 1, dtype=torch.float64)
    before, _ = model(x)
    for coupling in model.couplings[2:]:
        coupling.dnn.final_proj.bias.data += 1
    after, _ = model(x)
    tokens = [model.patchify(z)[0] for z in (before, after)]
    assert model.couplings[1].grid == (4, 4)
    assert model.couplings[2].grid == (2, 2)
    assert torch.equal(*(t[..., 2:] for t in tokens))
    assert not torch.isclose(*(t[..., :2] for t in tokens)).all(dim=-1).any()


@pytest.mark.parametrize("predictor", ["vit", "cnn"])
def test_jet_is_invertible_given_a_context(predictor):
    model = randomized(Jet((4, 4, 3), depth=2, emb_dim=8, num_heads=2, ps=2, context_dim=5, predictor=predictor))
    x, context = torch.randn(1, 4, 4, 3).double(), torch.randn(1, 3, 5).double()
    forward, inverse = (functools.partial(f, context=context) for f in (model, model.inverse))
    assert_invertible(forward, inverse, x)
    assert not torch.equal(forward(x)[0], model(x, torch.zeros_like(context))[0])


@pytest.mark.parametrize(
    "how",
    [{}, {"predictor": "cnn"}, {"masking": True}, {"scale_form": "exp"}, {"actnorm": True}],
    ids=str,
)
def test_jet_starts_as_the_identity(how):
    model = Jet((4, 4, 3), depth=3, emb_dim=8, num_heads=2, ps=2, **how)
    init_weights(model, torch.Generator().manual_seed(0))
    x = torch.randn(2, 4, 4, 3)
    z, logdet = model(x)
    torch.testing.assert_close(z, x)
    torch.testing.assert_close(logdet, torch.zeros(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", [{}, {"predictor": "cnn", "actnorm": True, "num_levels": 2}], ids=str)
def test_activation_checkpointing_changes_nothing(how):
    plain = randomized(Jet((4, 4, 3), depth=2, emb_dim=8, num_heads=2, ps=2, kinds=("channels",), **how))
    checkpointed = Jet((4, 4, 3), depth=2, emb_dim=8, num_heads=2, ps=2, kinds=("channels",), **how).double()
    remat.set_policy(checkpointed, "couplings")
    assert checkpointed.rematerialize
    checkpointed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    for model in (plain, checkpointed):
        z, logdet = model(x)
        (z.square().sum() - logdet.sum()).backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("dim", [1, 2])
def test_permutations_are_each_others_inverse_and_backward(dim):
    x = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(5)
    gather, scatter = (lambda y, f=f: f.apply(y, dim, order) for f in (jet._Gather, jet._Scatter))
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
        ({"ps": 3}, "does not divide into patches of 3"),
        ({"emb_dim": 9}, "width 9 does not divide by num_heads 2"),
        ({"kinds": ("diagonal",)}, "unknown coupling kind 'diagonal'"),
        ({"kinds": ("spatial",), "spatial_coupling_projs": ("dots",)}, "unknown spatial coupling"),
        ({"channels_coupling_projs": ("learned",)}, "unknown channel coupling 'learned'"),
        ({"kinds": ("spatial",), "ps": 4}, "unequal halves"),
        ({"ps": 1, "input_shape": (4, 4, 3)}, "cannot halve tokens of 3 dimensions"),
        ({"predictor": "mlp"}, "unknown predictor 'mlp': one of vit, cnn"),
        ({"scale_form": "softplus"}, "unknown scale_form 'softplus'"),
        ({"scale_form": "exp", "scale_factor": 1.0}, "1.0 is not above 1"),
        ({"invertible_dense": "qr"}, "unknown invertible dense layer 'qr': one of lu, plain"),
        ({"num_levels": 2}, "1 couplings cannot be shared out over 2 levels"),
        ({"num_levels": 3, "depth": 3}, "a 1 × 1 grid of tokens of 24 dimensions cannot go into another level"),
    ],
)
def test_impossible_sizes_are_named(kwargs, message):
    arguments = {"input_shape": (4, 4, 3), "emb_dim": 8, "num_heads": 2, "ps": 2, "depth": 1}
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        Jet(**arguments | kwargs)
