"""Runs the image head's Triton kernels by Triton's interpreter; prints how far they are from PyTorch's operations.

    TRITON_INTERPRET=1 python tests/interpreted_mixture.py

A program, because Triton reads the variable when it is imported. Prints a JSON object: for each case and dtype of the
head, the largest difference of each result, relative to the result's largest value.
"""

import json

import torch

from jetformer.models.mixture_nll import mixture_nll, split_logits

WIDTH, BLOCK = 8, 96
# K, D, L and the smallest scale. Tiles have 8 components or dimensions of 128 tokens, and programs 64 components: these
# fill some and exceed others.
SIZES = {
    "uneven": (5, 7, 150, 1e-6),
    "one_component": (1, 3, 20, 1e-6),
    "clamped": (66, 12, 20, 0.3),
    "tiny_scales": (3, 8, 10, 1e-12),
    "extreme": (6, 4, 40, 1e-6),
    "components_1024": (1024, 5, 3, 1e-6),
    "dimensions_48": (9, 48, 5, 1e-6),
    "dimensions_128": (9, 128, 5, 1e-6),
}
NAMES = ("total", "nll", "responsibilities", "entropy", "hidden", "weight", "bias", "target")


def inputs(case: str) -> dict[str, torch.Tensor]:
    k, d, length, _ = SIZES[case]
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (1, length, WIDTH), "weight": (k + 2 * k * d, WIDTH), "bias": (k + 2 * k * d,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["weight"] /= WIDTH**0.5
    weights, means, raw_scales = split_logits(tensors["bias"], k)
    if case == "extreme":  # a component that nobody uses, and others that are narrow, broad or far away
        weights[0] = -1e4
        raw_scales[1], raw_scales[2], means[3] = -300.0, 3000.0, 1e4
    if case == "tiny_scales":
        raw_scales[:, :4] = -1e11  # the product of four such precisions exceeds float32
    return tensors | {"target": torch.randn(1, length, d, generator=generator)}


def results(case: str, dtype: torch.dtype, backend: str, grad: bool = True) -> list[torch.Tensor]:
    """Returns the scores and the gradients, named by `NAMES`."""
    k, _, length, scale_tol = SIZES[case]
    tensors = {
        name: x.to(torch.float32 if name == "target" else dtype, copy=True).requires_grad_()
        for name, x in inputs(case).items()
    }
    token_weight = torch.rand(1, length, generator=torch.Generator().manual_seed(1))
    arguments = {"num_mixtures": k, "scale_tol": scale_tol, "block": BLOCK, "backend": backend}
    with torch.set_grad_enabled(grad):
        scores = mixture_nll(**tensors, token_weight=token_weight, **arguments)
    gradients = torch.autograd.grad(scores.total, tensors.values()) if grad else ()
    return [x.detach() for x in (*scores, *gradients)]


def differences(case: str, dtype: torch.dtype) -> dict[str, float]:
    pairs = zip(NAMES, results(case, dtype, "triton"), results(case, dtype, "eager"), strict=True)
    found = {name: ((x - y).abs().max() / y.abs().max().clamp(min=1e-30)).item() for name, x, y in pairs}
    scored = results(case, dtype, "triton", grad=False)[1], results(case, dtype, "eager", grad=False)[1]
    return found | {"without_gradients": (scored[0] - scored[1]).abs().max().item() / scored[1].abs().max().item()}


if __name__ == "__main__":
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    print(json.dumps({case: {name: differences(case, dtype) for name, dtype in dtypes.items()} for case in SIZES}))
