"""Invertible modules other than couplings: steps between couplings, and linear flows.

Glow (arXiv 1807.03039) puts ActNorm and invertible 1×1 convolutions between its couplings; Jet (arXiv 2412.15129,
section 4) needs neither. JetFormer (arXiv 2411.19722) compares its flow with linear maps of the patches.

All are flows: `forward(x, context=None) -> (z, logdet)` and `inverse(z, context=None) -> (x, logdet)`. They ignore the
context.

Dimensions: B batch, N tokens, D token dimension; `[B, rows, columns, D]` are tokens on their grid. `dense` layers and
ActNorm take `[B, N, D]`, the flows at the end `[B, rows, columns, D]`; both return the same shape and
log-determinants `[B]` in nats.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from jetformer.models.autocast import without_autocast
from jetformer.models.patches import ImageShape, PatchPCA


class ActNorm(nn.Module):
    """z = (x + bias) · exp(log_scale), with one bias and scale for each of D dimensions (Glow, section 3.1).

    It starts as the identity. `initializing` sets it so that its outputs for a batch have mean 0 and variance 1.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(dim))
        self.log_scale = nn.Parameter(torch.empty(dim))
        self.initializing = False

    def init_weights(self, generator: torch.Generator) -> None:
        del generator
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.log_scale)

    def parameters_from_data(self) -> list[nn.Parameter]:
        """Returns the parameters that `initializing` sets."""
        return [self.bias, self.log_scale]

    def _initialize(self, x: Tensor) -> None:
        std, mean = torch.std_mean(x, dim=(0, 1), correction=0)
        self.bias.copy_(-mean)
        self.log_scale.copy_(-torch.log(std + 1e-6))

    def _logdet(self, x: Tensor) -> Tensor:
        return (x.shape[1] * self.log_scale.sum()).expand(len(x))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.initializing:
            self._initialize(x)
        return (x + self.bias) * self.log_scale.exp(), self._logdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z * (-self.log_scale).exp() - self.bias, -self._logdet(z)


def parameters_from_data(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters of a model that are initialized from data."""
    modules = [module for module in model.modules() if hasattr(module, "parameters_from_data")]
    return [p for module in modules for p in module.parameters_from_data()]


@contextlib.contextmanager
def initializing(model: nn.Module) -> Iterator[None]:
    """Within the context, every ActNorm of a model initializes itself from its input.

    So one forward pass of a batch initializes all of them, in order.
    """
    actnorms = [module for module in model.modules() if isinstance(module, ActNorm)]
    for actnorm in actnorms:
        actnorm.initializing = True
    try:
        with torch.no_grad():
            yield
    finally:
        for actnorm in actnorms:
            actnorm.initializing = False


def _log_abs_det(weight: Tensor) -> Tensor:
    if weight.device.type == "xla":  # slogdet has no backward pass there
        return torch.linalg.svdvals(weight).log().sum()
    return torch.linalg.slogdet(weight).logabsdet


def _solve_on_xla(z: Tensor, weight: Tensor) -> Tensor:
    """Solves z = W x for x at every token; torch_xla would run a solver on the host."""
    return z @ torch.linalg.inv_ex(weight).inverse.T


class PlainDense(nn.Module):
    """z = W x at every token, with any square matrix W, which starts as a random rotation."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim))

    def init_weights(self, generator: torch.Generator) -> None:
        nn.init.orthogonal_(self.weight, generator=generator)

    def _logdet(self, x: Tensor) -> Tensor:
        return (x.shape[1] * _log_abs_det(self.weight)).expand(len(x))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with without_autocast(x.device):
            return x @ self.weight.T, self._logdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with without_autocast(z.device):
            if z.device.type == "xla":
                return _solve_on_xla(z, self.weight), -self._logdet(z)
            return torch.linalg.solve(self.weight.T, z, left=False), -self._logdet(z)


class LUDense(nn.Module):
    """z = W x at every token, with W = P L (U + diag(s)): Glow's invertible 1×1 convolution (section 3.2).

    P is a fixed permutation, L unit lower triangular, U strictly upper triangular; s keeps its signs. The determinant
    is the product of s. W starts as a random rotation.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.lower = nn.Parameter(torch.empty(dim, dim))  # only entries below the diagonal are used
        self.upper = nn.Parameter(torch.empty(dim, dim))  # only entries above it
        self.log_scale = nn.Parameter(torch.empty(dim))
        self.register_buffer("sign", torch.empty(dim))
        self.register_buffer("permutation", torch.empty(dim, dtype=torch.int64))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        rotation = nn.init.orthogonal_(torch.empty(self.lower.shape), generator=generator)
        p, lower, upper = torch.linalg.lu(rotation)
        self.permutation.copy_(p.argmax(dim=1))  # row i of P M is row permutation[i] of M
        self.lower.copy_(lower.tril(-1))
        self.upper.copy_(upper.triu(1))
        self.log_scale.copy_(upper.diagonal().abs().log())
        self.sign.copy_(upper.diagonal().sign())

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Returns L and U + diag(s)."""
        eye = torch.eye(len(self.sign), dtype=self.lower.dtype, device=self.lower.device)
        return self.lower.tril(-1) + eye, self.upper.triu(1) + eye * (self.sign * self.log_scale.exp())

    def _weight(self) -> Tensor:
        lower, upper = self._factors()
        return (lower @ upper).index_select(0, self.permutation)

    def _logdet(self, x: Tensor) -> Tensor:
        return (x.shape[1] * self.log_scale.sum()).expand(len(x))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with without_autocast(x.device):
            return x @ self._weight().T, self._logdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with without_autocast(z.device):
            if z.device.type == "xla":
                return _solve_on_xla(z, self._weight()), -self._logdet(z)
            lower, upper = self._factors()
            y = z.index_select(-1, self.permutation.argsort())
            y = torch.linalg.solve_triangular(lower.T, y, upper=True, left=False, unitriangular=True)
            return torch.linalg.solve_triangular(upper.T, y, upper=False, left=False), -self._logdet(z)


DENSE = {"lu": LUDense, "plain": PlainDense}


def make_dense(form: str, dim: int) -> nn.Module:
    """Builds a learned invertible matrix over D dimensions.

    Args:
      form: "lu" or "plain".
      dim: D.

    Raises:
      ValueError: if the form is unknown.
    """
    if form not in DENSE:
        raise ValueError(f"unknown invertible dense layer {form!r}: use {' or '.join(DENSE)}")
    return DENSE[form](dim)


# Flows over (rows, columns, D): in place of JetFormer's flow, before it or after it.


class IdentityFlow(nn.Module):
    """z = x, as no flow at all."""

    def __init__(self, input_shape: ImageShape):
        super().__init__()
        self.image_shape = tuple(input_shape)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x, x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z, z.new_zeros(len(z))


class LearnedProjection(nn.Module):
    """A learned invertible matrix over the tokens' dimensions.

    Args:
      input_shape: (rows, columns, D).
      form: "lu" or "plain", see `LUDense` and `PlainDense`.
    """

    def __init__(self, input_shape: ImageShape, form: str = "lu"):
        super().__init__()
        self.image_shape = tuple(input_shape)
        self.dense = make_dense(form, input_shape[-1])

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, logdet = self.dense(x.flatten(1, 2))
        return z.view(x.shape), logdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, logdet = self.dense.inverse(z.flatten(1, 2))
        return x.view(z.shape), logdet


class PCAProjection(nn.Module):
    """The basis of a PCA of the training split's patches, frozen: `PatchPCA` for patches.

    The components are sorted by descending variance, so `JetFormer.out_dim` factors out those that vary least.

    Args:
      input_shape: (rows, columns, D).
      path: an `.npz` file of `python -m jetformer.fit_pca`, fitted with the experiment's patch size.
      whiten: divide each component by its standard deviation.
    """

    def __init__(self, input_shape: ImageShape, path: str | None = None, whiten: bool = False):
        super().__init__()
        self.image_shape = tuple(input_shape)
        self.pca = PatchPCA(input_shape, patch_size=1, path=path, whiten=whiten)

    def init_weights(self, generator: torch.Generator) -> None:
        del generator  # the PCA reads its file by itself
        if self.pca.path is None:
            raise ValueError("PCAProjection has no path: fit a PCA with python -m jetformer.fit_pca")

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with without_autocast(x.device):
            codes, logdet = self.pca(x)
        return codes.view(x.shape), logdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with without_autocast(z.device):
            return self.pca.inverse(z.flatten(1, 2))
