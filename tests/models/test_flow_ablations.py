"""Every ablation of Jet is invertible, and keeps the properties of its model."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flows import CHANNELS, SMALL, SPATIAL, assert_invertible, randomized
from jetformer.models import remat
from jetformer.models.flow_ablations import AblatedJet, make_jet
from jetformer.models.initializers import init_weights
from jetformer.models.jet import Jet

COUPLINGS = [{"predictor": "cnn"}, {"masking": True}, {"scale_form": "exp"}]


def coupling(kind, projection, shape, **how):
    """The only coupling of a flow whose tokens are pixels."""
    how |= {"depth": 1, "kinds": (kind,), f"{kind}_coupling_projs": (projection,)}
    return randomized(make_jet(shape, **SMALL | {"ps": 1} | how)).couplings[0]


def test_without_an_ablation_it_is_the_papers_flow():
    assert type(make_jet((4, 4, 3), **SMALL)) is Jet
    for how in (*COUPLINGS, {"actnorm": True}, {"invertible_dense": "lu"}, {"num_levels": 2}):
        flow = make_jet((4, 4, 3), kinds=("channels",), **SMALL, **how)
        assert type(flow) is AblatedJet
        assert isinstance(flow, Jet)


@pytest.mark.parametrize("how", COUPLINGS, ids=str)
@pytest.mark.parametrize(
    ("kind", "projection"), [("channels", kind) for kind in CHANNELS] + [("spatial", kind) for kind in SPATIAL]
)
def test_coupling_is_invertible(kind, projection, how):
    model = coupling(kind, projection, (2, 4, 6), **how)
    assert_invertible(model, model.inverse, torch.randn(2, 8, 6, dtype=torch.float64))


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
def test_every_combination_is_invertible(seed, num_levels, kinds, **how):
    if num_levels == 3:  # the third has one token left
        kinds = ["channels"]
    how |= {"kinds": kinds, "channels_coupling_projs": CHANNELS, "num_levels": num_levels}
    model = randomized(make_jet((8, 8, 1), depth=3, **SMALL, **how), seed)
    x = torch.randn(1, 8, 8, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert_invertible(model, model.inverse, x)


def test_masks_work_for_single_pixels():
    """RealNVP's checkerboard: a token of one dimension cannot be halved."""
    model = randomized(make_jet((4, 4, 1), depth=4, kinds=("spatial",), masking=True, **SMALL | {"ps": 1}))
    x = torch.randn(1, 4, 4, 1, dtype=torch.float64)
    assert_invertible(model, model.inverse, x)


@pytest.mark.parametrize("predictor", ["vit", "cnn"])
@pytest.mark.parametrize("masking", [False, True])
@pytest.mark.parametrize("kind", ["channels", "spatial"])
def test_a_coupling_keeps_one_half_and_maps_the_other_by_it(kind, masking, predictor):
    projection = "halves" if kind == "channels" else "hstripes"
    model = coupling(kind, projection, (2, 2, 4), masking=masking, predictor=predictor)
    x = torch.randn(1, 4, 4, dtype=torch.float64)
    z, _ = model(x)
    first = torch.zeros(4, 4, dtype=torch.bool)
    first[(slice(None), slice(2)) if kind == "channels" else slice(2)] = True
    assert torch.equal(z[0][first], x[0][first])
    jacobian = torch.autograd.functional.jacobian(lambda e: model(e)[0], x)[0][:, :, 0]
    of_second = jacobian[~first]
    assert (of_second[:, first] != 0).any(dim=0).all()  # depends on all of the first half
    among_themselves = of_second[:, ~first]
    assert torch.equal(among_themselves, among_themselves.diagonal().diag())


def test_exponential_scales_are_bounded():
    model = coupling("channels", "halves", (1, 1, 2), scale_factor=3.0, scale_form="exp")
    scale, log_scale = model.scale(torch.tensor([-100.0, 100.0], dtype=torch.float64))
    torch.testing.assert_close(scale, torch.tensor([1 / 3, 3.0], dtype=torch.float64))
    torch.testing.assert_close(log_scale, scale.log())


def test_levels_factor_half_of_the_dimensions_out():
    """The second level changes only the dimensions that the first does not factor out."""
    model = randomized(make_jet((8, 8, 1), depth=4, kinds=("channels",), num_levels=2, **SMALL))
    x = torch.randn(1, 8, 8, 1, dtype=torch.float64)
    before, _ = model(x)
    for later in model.couplings[2:]:
        later.dnn.final_proj.bias.data += 1
    after, _ = model(x)
    tokens = [model.patchify(z)[0] for z in (before, after)]
    assert model.couplings[1].grid == (4, 4)
    assert model.couplings[2].grid == (2, 2)
    assert torch.equal(*(t[..., 2:] for t in tokens))
    assert not torch.isclose(*(t[..., :2] for t in tokens)).all(dim=-1).any()


def test_a_cnn_attends_to_a_context():
    model = randomized(make_jet((4, 4, 3), depth=2, context_dim=5, predictor="cnn", **SMALL))
    x, context = torch.randn(1, 4, 4, 3).double(), torch.randn(1, 3, 5).double()
    forward, inverse = (functools.partial(f, context=context) for f in (model, model.inverse))
    assert_invertible(forward, inverse, x)
    assert not torch.equal(forward(x)[0], model(x, torch.zeros_like(context))[0])


@pytest.mark.parametrize("how", [*COUPLINGS, {"actnorm": True}], ids=str)
def test_it_starts_as_the_identity(how):
    model = make_jet((4, 4, 3), depth=3, **SMALL, **how)
    init_weights(model, torch.Generator().manual_seed(0))
    x = torch.randn(2, 4, 4, 3)
    z, logdet = model(x)
    torch.testing.assert_close(z, x)
    torch.testing.assert_close(logdet, torch.zeros(2), atol=1e-5, rtol=0)


def test_activation_checkpointing_changes_nothing():
    how = {"kinds": ("channels",), "predictor": "cnn", "actnorm": True, "num_levels": 2}
    plain, checkpointed = (make_jet((4, 4, 3), **SMALL, **how) for _ in range(2))
    randomized(plain)
    checkpointed.double().load_state_dict(plain.state_dict())
    remat.set_policy(checkpointed, "couplings")
    x = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    for model in (plain, checkpointed):
        z, logdet = model(x)
        (z.square().sum() - logdet.sum()).backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"predictor": "mlp"}, "'mlp'.*vit.*cnn"),
        ({"scale_form": "softplus"}, "'softplus'.*sigmoid.*exp"),
        ({"scale_form": "exp", "scale_factor": 1.0}, r"scale_factor 1\.0"),
        ({"masking": True, "ps": 1}, "3 dimensions"),
        ({"invertible_dense": "qr"}, "'qr'.*lu.*plain"),
        ({"num_levels": 2}, "1 couplings .* 2 levels"),
        ({"num_levels": 3, "depth": 3}, "1 × 1 .* 24 dimensions"),
    ],
)
def test_impossible_sizes_are_named(kwargs, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        make_jet(**{"input_shape": (4, 4, 3), "depth": 1} | SMALL | kwargs)
