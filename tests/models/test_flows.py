"""Every flow of the package keeps one contract, alone and inside a JetFormer."""

import functools
import importlib
import inspect
import math
import pkgutil

import numpy as np
import pytest
import torch

from flows import assert_invertible, randomized
from jetformer import models, objectives
from jetformer.models.flow_ablations import make_jet
from jetformer.models.invertible import IdentityFlow, LearnedProjection, PCAProjection
from jetformer.models.jet import Jet
from jetformer.models.labelled import LabelledFlow
from jetformer.models.patches import fit_pca, save_pca
from jetformer.models.tarflow import TarFlow
from small_models import small_model

SHAPE = (2, 2, 12)  # of the patches of `small_model`
SMALL = {"depth": 2, "emb_dim": 8, "num_heads": 2, "ps": 1}
FLOWS = {
    "jet": functools.partial(Jet, **SMALL, kinds=("channels", "spatial")),
    "labelled": lambda shape: LabelledFlow(functools.partial(Jet, shape, **SMALL), num_labels=3, context_dim=5),
    "masked": functools.partial(make_jet, **SMALL, masking=True),
    "exp": functools.partial(make_jet, **SMALL, scale_form="exp"),
    "masked exp": functools.partial(make_jet, **SMALL, masking=True, scale_form="exp"),
    "cnn": functools.partial(make_jet, **SMALL, predictor="cnn"),
    "glow": functools.partial(
        make_jet, **SMALL, kinds=("channels",), actnorm=True, invertible_dense="lu", num_levels=2
    ),
    "plain dense": functools.partial(make_jet, **SMALL, invertible_dense="plain"),
    "tarflow": functools.partial(TarFlow, **SMALL, block_depth=2),
    "labelled tarflow": lambda shape: LabelledFlow(
        functools.partial(TarFlow, shape, **SMALL, block_depth=1), num_labels=3, context_dim=None
    ),
    "identity": IdentityFlow,
    "learned projection": LearnedProjection,
    "pca": PCAProjection,
    "whitening pca": functools.partial(PCAProjection, whiten=True),
}
of_every_flow = pytest.mark.parametrize("name", FLOWS)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Builds a flow by its name and the shape of its inputs."""
    path = str(tmp_path_factory.mktemp("pca") / "pca.npz")
    images = np.random.default_rng(0).normal(128, 40, (64, 8, 8, 3)).clip(0, 255).astype(np.uint8)
    save_pca(fit_pca([images], 2), path)
    return lambda name, shape: FLOWS[name](shape, **({"path": path} if "pca" in name else {}))


def exact(model):
    """A model in float64; a PCA on file is orthonormal only to float32."""
    for module in model.modules():
        if isinstance(module, PCAProjection):
            module.pca.components.copy_(torch.linalg.qr(module.pca.components.T).Q.T)
    return model


def invertible_classes():
    modules = [
        importlib.import_module(f"{models.__name__}.{file.name}") for file in pkgutil.iter_modules(models.__path__)
    ]
    classes = {value for module in modules for value in vars(module).values() if inspect.isclass(value)}
    return {c for c in classes if c.__module__.startswith(models.__name__) and hasattr(c, "inverse")}


def test_every_flow_is_here(make):
    tested = {type(module) for name in FLOWS for module in make(name, SHAPE).modules()}
    assert invertible_classes() <= tested


@of_every_flow
def test_a_flow_alone(make, name):
    flow = exact(randomized(make(name, SHAPE)))
    assert flow.image_shape == SHAPE
    x = torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z, logdet = flow(x)
    assert z.shape == x.shape
    assert logdet.shape == (2,)
    assert_invertible(flow, flow.inverse, x)
    for function, argument in ((flow, x), (flow.inverse, z)):
        for given, expected in zip(function(argument, context=None), function(argument), strict=True):
            assert torch.equal(given, expected)


@of_every_flow
def test_its_objective(make, name):
    """Bits per dim are those of the latents and of the log-determinant, and every parameter gets a gradient."""
    flow = exact(randomized(make(name, SHAPE)))
    dtype = next((p.dtype for p in flow.parameters()), torch.float32)
    image = torch.randint(0, 256, (2, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    draws = {"dequant": torch.rand(image.shape, dtype=dtype)}
    batch = {"image": image, "label": torch.tensor([0, 2])}
    loss, terms = objectives.JetObjective()(flow, batch, draws)
    x = objectives.to_unit_range(image.to(dtype) + draws["dequant"])
    z, logdet = flow(x, flow.context(batch["label"])) if isinstance(flow, LabelledFlow) else flow(x)
    nats = torch.distributions.Normal(0.0, 1.0).log_prob(z).flatten(1).sum(1) + logdet
    expected = math.log2(127.5) - nats / (math.prod(SHAPE) * math.log(2))
    torch.testing.assert_close(terms["bits_per_dim"][0], expected.detach())
    torch.testing.assert_close(loss.detach(), expected.mean().detach())
    if any(p.requires_grad for p in flow.parameters()):
        loss.backward()
        assert all(p.grad is not None for p in flow.parameters())


@of_every_flow
@pytest.mark.parametrize("place", ["before_flow", "flow", "after_flow"])
def test_a_flow_inside_a_jetformer(make, name, place):
    model = small_model(**{"flow": None, place: functools.partial(make, name)})
    exact(randomized(model))
    image = torch.rand(1, *model.image_shape, dtype=torch.float64) * 2 - 1
    encoded = model.encode_image(image)
    restored, inverse_logdet = model.decode_image(encoded.tokens, encoded.factored)
    torch.testing.assert_close(restored, image)
    torch.testing.assert_close(inverse_logdet, -encoded.logdet)
    latents = lambda x: torch.cat(model.encode_image(x)[:2], dim=-1).flatten()
    jacobian = torch.autograd.functional.jacobian(latents, image).flatten(1)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, encoded.logdet[0].detach())
    if place == "flow":
        tokens, _ = model.patches(image)
        torch.testing.assert_close(encoded.flow_logdet, model.flow(tokens.unflatten(1, model.patches.grid))[1])
