"""Small flows, and checks of invertible modules."""

import torch

from jetformer.models.initializers import init_weights

SMALL = {"emb_dim": 8, "num_heads": 2, "ps": 2}
CHANNELS = ["random", "halves", "halves-inv"]
SPATIAL = [f"{kind}{inv}" for kind in ("checkerboard", "vstripes", "hstripes") for inv in ("", "-inv")]


def randomized(model, seed=0):
    """The model in float64, with random values also for weights that start at zero: these make couplings constant."""
    generator = torch.Generator().manual_seed(seed)
    init_weights(model, generator)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "final_proj" in name or name.endswith("out.weight"):
                p.normal_(std=0.3, generator=generator)
            elif "actnorm" in name or "dense" in name:
                p += torch.empty(p.shape).normal_(std=0.1, generator=generator)
    return model.double()


def assert_invertible(forward, inverse, x):
    """Asserts that inverse(forward(x)) = x, and that both log-determinants agree with autograd's Jacobian."""
    z, logdet = forward(x)
    y, inverse_logdet = inverse(z)
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(inverse_logdet, -logdet)
    for i, example in enumerate(x):
        jacobian = torch.autograd.functional.jacobian(lambda e: forward(e[None])[0][0], example)
        jacobian = jacobian.reshape(example.numel(), example.numel())
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, logdet[i].detach())
