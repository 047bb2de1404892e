"""Jet: a normalizing flow of affine couplings predicted by ViTs.

(arXiv 2412.15129; big_vision `models/proj/jet/jet.py`.) Jet splits an image into patches. Each coupling splits the
tokens into two halves, by channels or by position. It keeps the first half and maps the second by an elementwise affine
function, whose shift and scale a ViT predicts from the first half.

Dimensions: B batch, H × W × C image, N tokens, D token dimension, M context tokens.

Notable:
  - a permutation is an index gather, and its backward pass an index scatter (the reference multiplies by one-hot
    matrices);
  - a spatial coupling selects N / 2 tokens and splits each in two, so every ViT sees `[B, N, D / 2]`;
  - the last layer of each ViT starts at zero, so a new coupling scales its half by `scale_factor / 2`: with the default
    of 2 the flow starts as the identity;
  - the paper's ablations are in `flow_ablations.py`.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from jetformer.models import initializers, remat
from jetformer.models.patches import ImageShape, Patchify
from jetformer.models.vit import LAYER_NORM_EPS, CrossAttention, Encoder
from jetformer.ranges import NonNegativeInt, PositiveFloat, PositiveInt


class Gather(torch.autograd.Function):
    """`index_select` by a permutation. The backward pass of PyTorch's own accumulates, which is slower."""

    @staticmethod
    def forward(ctx, x: Tensor, dim: int, permutation: Tensor) -> Tensor:
        ctx.dim = dim
        ctx.save_for_backward(permutation)
        return x.index_select(dim, permutation)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return Scatter.apply(grad, ctx.dim, *ctx.saved_tensors), None, None


class Scatter(torch.autograd.Function):
    """The inverse of `Gather`."""

    @staticmethod
    def forward(ctx, x: Tensor, dim: int, permutation: Tensor) -> Tensor:
        ctx.dim = dim
        ctx.save_for_backward(permutation)
        return torch.empty_like(x).index_copy_(dim, permutation, x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return Gather.apply(grad, ctx.dim, *ctx.saved_tensors), None, None


def spatial_permutation(kind: str, grid: tuple[int, int]) -> Tensor:
    """Returns the order `[N]` of tokens in a spatial coupling: the first half, then the second.

    Args:
      kind: "checkerboard", "vstripes" or "hstripes"; with the suffix "-inv" the halves are swapped.
      grid: rows and columns of tokens.

    Raises:
      ValueError: if the kind is unknown or does not halve the grid.
    """
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    flat = rows * grid[1] + columns
    parity = {
        # As in the reference, an odd number of columns exchanges checkerboard and vstripes.
        "checkerboard": (flat + rows) % 2,
        "vstripes": flat % 2,
        "hstripes": rows % 2,
    }.get(kind.removesuffix("-inv"))
    if parity is None:
        raise ValueError(
            f"unknown spatial coupling {kind!r}: use checkerboard, vstripes, hstripes, or one of them with -inv"
        )
    first, second = (flat[parity == p] for p in (0, 1))
    if len(first) != len(second):
        raise ValueError(
            f"spatial coupling {kind!r} splits a {grid[0]} × {grid[1]} grid of tokens into unequal halves "
            f"({len(first)} and {len(second)}): use another coupling or patch size"
        )
    return torch.cat((second, first) if kind.endswith("-inv") else (first, second))


def channel_permutation(kind: str, dim: int, generator: torch.Generator) -> Tensor:
    """Returns the order `[D]` of a token's dimensions in a channel coupling: the first half, then the second.

    Args:
      kind: "random", drawn from `generator`; "halves", the dimensions in order; "halves-inv", the halves swapped.
      dim: D.

    Raises:
      ValueError: if the kind is unknown.
    """
    if kind == "random":
        return torch.randperm(dim, generator=generator)
    if kind not in ("halves", "halves-inv"):
        raise ValueError(f"unknown channel coupling {kind!r}: use random, halves or halves-inv")
    order = torch.arange(dim)
    return order if kind == "halves" else order.roll(-(dim // 2))


def coupling_kinds(
    depth: int, kinds: Sequence[str], channels_coupling_projs: Sequence[str], spatial_coupling_projs: Sequence[str]
) -> list[tuple[str, str]]:
    """Returns kind and projection of each of `depth` couplings; the kinds, and each kind's projections, repeat.

    Raises:
      ValueError: if a kind is unknown.
    """
    projections = {
        "channels": itertools.cycle(channels_coupling_projs),
        "spatial": itertools.cycle(spatial_coupling_projs),
    }
    result = []
    for kind in itertools.islice(itertools.cycle(kinds), depth):
        if kind not in projections:
            raise ValueError(f"unknown coupling kind {kind!r}: use channels or spatial")
        result.append((kind, next(projections[kind])))
    return result


class Predictor(nn.Module):
    """The ViT of a coupling (the reference's `DNN`): `[B, N, D / 2]` to shift and raw scale, `[B, N, D / 2]` each."""

    def __init__(
        self,
        num_tokens: int,
        dim: int,
        depth: int,
        emb_dim: int,
        num_heads: int,
        context_dim: int | None,
        gelu: str = "tanh",
        norm_eps: float = LAYER_NORM_EPS,
    ):
        super().__init__()
        self.init_proj = nn.Linear(dim, emb_dim)
        self.posemb = nn.Parameter(torch.empty(1, num_tokens, emb_dim))
        self.cross_attn = CrossAttention(emb_dim, num_heads, context_dim) if context_dim else None
        self.vit = Encoder(depth, emb_dim, num_heads, gelu, norm_eps)
        self.final_proj = nn.Linear(emb_dim, 2 * dim)

    def init_weights(self, generator: torch.Generator) -> None:
        initializers.lecun_normal_(self.init_proj.weight, generator)
        nn.init.normal_(self.posemb, std=1 / math.sqrt(self.posemb.shape[-1]), generator=generator)
        nn.init.zeros_(self.init_proj.bias)
        nn.init.zeros_(self.final_proj.weight)
        nn.init.zeros_(self.final_proj.bias)

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        y = self.init_proj(x) + self.posemb
        if context is not None:
            y = y + self.cross_attn(y, context)
        # Autocast may compute these in bfloat16; the affine map keeps the dtype of x, so that it can be inverted.
        shift, raw_scale = self.final_proj(self.vit(y)).to(x.dtype).chunk(2, dim=-1)
        return shift, raw_scale


class Coupling(nn.Module):
    """z = (x1, (x2 + shift(x1)) · scale(x1)) with scale(x1) = scale_factor · sigmoid(raw_scale(x1)).

    Args:
      kind: "channels" or "spatial".
      projection: how to split, see `channel_permutation` and `spatial_permutation`.
      grid: rows and columns of tokens.
      dim: D.
      scale_factor: largest scale.
      dnn: predicts shift and raw scale from x1 and the context, as `Predictor`.
    """

    is_block = True
    recompute_policy = "couplings"  # see `remat`

    def __init__(
        self, kind: str, projection: str, grid: tuple[int, int], dim: int, scale_factor: float, dnn: nn.Module
    ):
        super().__init__()
        self.kind, self.projection, self.grid, self.scale_factor = kind, projection, grid, scale_factor
        with torch.device("cpu"):  # also when the model is built on the meta device: raises if it cannot be halved
            size = len(self._order(dim, torch.Generator()))
        self.register_buffer("permutation", torch.empty(size, dtype=torch.int64))
        self.dnn = dnn

    def _order(self, dim: int, generator: torch.Generator) -> Tensor:
        if self.kind == "channels":
            return channel_permutation(self.projection, dim, generator)
        return spatial_permutation(self.projection, self.grid)

    def init_weights(self, generator: torch.Generator) -> None:
        self.permutation.copy_(self._order(len(self.permutation), generator))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, N, D]` to two halves `[B, N, D / 2]`."""
        if self.kind == "channels":
            return Gather.apply(x, 2, self.permutation).chunk(2, dim=2)
        halves = Gather.apply(x, 1, self.permutation).chunk(2, dim=1)
        x1, x2 = (rearrange(half, "b n (s d) -> b (n s) d", s=2) for half in halves)
        return x1, x2

    def merge(self, x1: Tensor, x2: Tensor) -> Tensor:
        """The inverse of `split`."""
        if self.kind == "channels":
            return Scatter.apply(torch.cat((x1, x2), dim=2), 2, self.permutation)
        halves = [rearrange(half, "b (n s) d -> b n (s d)", s=2) for half in (x1, x2)]
        return Scatter.apply(torch.cat(halves, dim=1), 1, self.permutation)

    def scale(self, raw_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Raw scales to scales and their logarithms."""
        scale = torch.sigmoid(raw_scale) * self.scale_factor
        return scale, F.logsigmoid(raw_scale) + math.log(self.scale_factor)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps `[B, N, D]` to the same shape and log-determinants `[B]` in nats."""
        x1, x2 = self.split(x)
        shift, raw_scale = self.dnn(x1, context)
        scale, log_scale = self.scale(raw_scale)
        return self.merge(x1, (x2 + shift) * scale), log_scale.sum(dim=(1, 2))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Inverts `forward`; returns the inverse's log-determinants."""
        z1, z2 = self.split(z)
        shift, raw_scale = self.dnn(z1, context)
        scale, log_scale = self.scale(raw_scale)
        return self.merge(z1, z2 / scale - shift), -log_scale.sum(dim=(1, 2))


class Jet(nn.Module):
    """A sequence of couplings over the patches of an image.

    Args:
      input_shape: (H, W, C) of one image.
      depth: number of couplings.
      block_depth: number of ViT blocks in each coupling.
      emb_dim: width of the ViTs.
      num_heads: attention heads of the ViTs.
      scale_factor: largest scale of a coupling.
      ps: patch size.
      kinds: kinds of the couplings, repeated up to `depth`.
      channels_coupling_projs: projections of the channel couplings, repeated likewise.
      spatial_coupling_projs: projections of the spatial couplings, repeated likewise.
      context_dim: dimension of the context's tokens; with None there is no cross-attention.
      gelu: form of GELU in the ViTs, see `activations.gelu`.
      norm_eps: epsilon of the ViTs' LayerNorms.

    Attributes:
      max_logdet: the log-determinant in nats with all scales at their largest; None if that is not above 0.

    Raises:
      ValueError: if sizes do not divide, or a kind, projection or form is unknown.
    """

    def __init__(
        self,
        input_shape: ImageShape,
        depth: NonNegativeInt = 2,
        block_depth: PositiveInt = 1,
        emb_dim: PositiveInt = 256,
        num_heads: PositiveInt = 4,
        scale_factor: PositiveFloat = 2.0,
        ps: PositiveInt = 4,
        kinds: Sequence[str] = ("channels", "channels", "spatial"),
        channels_coupling_projs: Sequence[str] = ("random",),
        spatial_coupling_projs: Sequence[str] = ("checkerboard", "checkerboard-inv"),
        context_dim: PositiveInt | None = None,
        gelu: str = "tanh",
        norm_eps: PositiveFloat = LAYER_NORM_EPS,
    ):
        super().__init__()
        self.image_shape = tuple(input_shape)
        self.patchify = Patchify(input_shape, ps)
        grid, num_tokens, dim = self.patchify.grid, self.patchify.num_tokens, self.patchify.dim
        if depth and dim % 2:
            raise ValueError(f"a coupling cannot halve tokens of {dim} dimensions: choose another patch size")
        self.couplings = nn.ModuleList()
        for kind, projection in coupling_kinds(depth, kinds, channels_coupling_projs, spatial_coupling_projs):
            dnn = Predictor(num_tokens, dim // 2, block_depth, emb_dim, num_heads, context_dim, gelu, norm_eps)
            self.couplings.append(Coupling(kind, projection, grid, dim, scale_factor, dnn))
        # Each coupling scales half of the dimensions.
        max_logdet = depth * num_tokens * dim / 2 * math.log(scale_factor)
        self.max_logdet = max_logdet if max_logdet > 0 else None
        initializers.init_on_cpu(self)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps images to latents.

        Args:
          x: `[B, H, W, C]`.
          context: `[B, M, context_dim]` or None.

        Returns:
          Latents `[B, H, W, C]` and log-determinants `[B]` in nats.

        Raises:
          ValueError: if `x` does not have the shape that the flow is built for.
        """
        self.check_shape(x)
        x, logdet = self.patchify(x)
        for coupling in self.couplings:
            x, coupling_logdet = remat.run_block(coupling, x, context)
            logdet = logdet + coupling_logdet
        return self.patchify.inverse(x)[0], logdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps latents to images; arguments and results as in `forward`."""
        z, logdet = self.patchify(z)
        for coupling in reversed(self.couplings):
            z, coupling_logdet = coupling.inverse(z, context)
            logdet = logdet + coupling_logdet
        return self.patchify.inverse(z)[0], logdet

    def check_shape(self, x: Tensor) -> None:
        if x.shape[1:] != self.image_shape:
            raise ValueError(f"images have shape {tuple(x.shape[1:])}, the flow is built for {self.image_shape}")
