"""Jet: a normalizing flow of affine couplings predicted by ViTs (arXiv 2412.15129; big_vision
`models/proj/jet/jet.py`).

An image is cut into patches; each coupling splits the tokens' channels, or the tokens themselves, into two halves,
leaves the first as it is and maps the second by an elementwise affine function whose shift and scale a ViT reads off
the first. Dimensions: B batch, H × W × C image, N tokens, D token dimension, M context tokens.

What a reader may want to know:
  - permutations are index gathers, each other's backward (the reference multiplies by one-hot matrices);
  - a spatial coupling cuts each token of its half in two, so that every ViT sees `[B, N, D / 2]`;
  - the last layer of each ViT starts at zero, so at initialization a coupling scales its half by
    `scale_factor / 2`, and the flow is the identity by default.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from jetformer.models import initializers
from jetformer.models.patches import ImageShape, Patchify
from jetformer.models.remat import rematerialize
from jetformer.models.vit import CrossAttention, Encoder


class _Gather(torch.autograd.Function):
    """`index_select` with a permutation; its backward scatters instead of adding up."""

    @staticmethod
    def forward(ctx, x: Tensor, dim: int, permutation: Tensor) -> Tensor:
        ctx.dim = dim
        ctx.save_for_backward(permutation)
        return x.index_select(dim, permutation)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Scatter.apply(grad, ctx.dim, *ctx.saved_tensors), None, None


class _Scatter(torch.autograd.Function):
    """The inverse of `_Gather`."""

    @staticmethod
    def forward(ctx, x: Tensor, dim: int, permutation: Tensor) -> Tensor:
        ctx.dim = dim
        ctx.save_for_backward(permutation)
        return torch.empty_like(x).index_copy_(dim, permutation, x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Gather.apply(grad, ctx.dim, *ctx.saved_tensors), None, None


def spatial_permutation(kind: str, grid: tuple[int, int]) -> Tensor:
    """Token order `[N]` of a spatial coupling: the tokens of the first half, then those of the second.

    Args:
      kind: "checkerboard", "vstripes" or "hstripes", each also with "-inv", which swaps the halves.
      grid: rows and columns of tokens.

    Raises:
      ValueError: for another kind, or a grid that it does not halve.
    """
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    flat = rows * grid[1] + columns
    parity = {
        # As in the reference, a pattern of an odd number of columns follows the flat index.
        "checkerboard": (flat + rows) % 2,
        "vstripes": flat % 2,
        "hstripes": rows % 2,
    }.get(kind.removesuffix("-inv"))
    if parity is None:
        raise ValueError(
            f"unknown spatial coupling {kind!r}: one of checkerboard, vstripes, hstripes, or one of them with -inv"
        )
    first, second = (flat[parity == p] for p in (0, 1))
    if len(first) != len(second):
        raise ValueError(
            f"spatial coupling {kind!r} splits a {grid[0]} × {grid[1]} grid of tokens into unequal halves "
            f"({len(first)} and {len(second)}): use another coupling or patch size"
        )
    return torch.cat((second, first) if kind.endswith("-inv") else (first, second))


class Predictor(nn.Module):
    """The ViT inside a coupling, `[B, N, D / 2]` to shift and raw scale `[B, N, D / 2]` (the reference's `DNN`)."""

    def __init__(
        self,
        num_tokens: int,
        dim: int,
        depth: int,
        emb_dim: int,
        num_heads: int,
        context_dim: int | None,
    ):
        super().__init__()
        self.init_proj = nn.Linear(dim, emb_dim)
        self.posemb = nn.Parameter(torch.empty(1, num_tokens, emb_dim))
        self.cross_attn = CrossAttention(emb_dim, num_heads, context_dim) if context_dim else None
        self.vit = Encoder(depth, emb_dim, num_heads)
        self.final_proj = nn.Linear(emb_dim, 2 * dim)

    def init_weights(self, generator: torch.Generator) -> None:
        initializers.lecun_normal_(self.init_proj.weight, generator)
        initializers.normal_(self.posemb, 1 / math.sqrt(self.posemb.shape[-1]), generator)
        nn.init.zeros_(self.init_proj.bias)
        nn.init.zeros_(self.final_proj.weight)
        nn.init.zeros_(self.final_proj.bias)

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        y = self.init_proj(x) + self.posemb
        if context is not None:
            y = y + self.cross_attn(y, context)
        # The affine map is not to lose precision to autocast: it is inverted later.
        shift, raw_scale = self.final_proj(self.vit(y)).to(x.dtype).chunk(2, dim=-1)
        return shift, raw_scale


class Coupling(nn.Module):
    """z = (x1, (x2 + shift(x1)) · scale(x1)), with scale = scale_factor · sigmoid(raw_scale(x1)).

    Args:
      kind: "channels" or "spatial".
      projection: "random" for channels; see `spatial_permutation` for the others.
      grid: rows and columns of tokens.
      dim: D, even.
      scale_factor: largest scale.
      **predictor: the predictor's `depth`, `emb_dim`, `num_heads`, `context_dim`.
    """

    def __init__(
        self,
        kind: str,
        projection: str,
        grid: tuple[int, int],
        dim: int,
        scale_factor: float,
        **predictor,
    ):
        super().__init__()
        if kind not in ("channels", "spatial"):
            raise ValueError(f"unknown coupling kind {kind!r}: one of channels, spatial")
        if kind == "channels" and projection != "random":
            raise ValueError(f"unknown channel coupling {projection!r}: the only one is random")
        if dim % 2:
            raise ValueError(f"a coupling cannot halve tokens of {dim} dimensions: choose another patch size")
        self.kind, self.projection, self.grid = kind, projection, grid
        self.scale_factor = scale_factor
        num_tokens = grid[0] * grid[1]
        if kind == "spatial":
            with torch.device("cpu"):  # wherever the parameters are: an impossible grid is reported now
                spatial_permutation(projection, grid)
        size = dim if kind == "channels" else num_tokens
        self.register_buffer("permutation", torch.empty(size, dtype=torch.int64))
        self.dnn = Predictor(num_tokens, dim // 2, **predictor)

    def init_weights(self, generator: torch.Generator) -> None:
        if self.kind == "channels":
            order = torch.randperm(len(self.permutation), generator=generator)
        else:
            order = spatial_permutation(self.projection, self.grid)
        self.permutation.copy_(order)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, N, D]` to two halves `[B, N, D / 2]`."""
        if self.kind == "channels":
            return _Gather.apply(x, 2, self.permutation).chunk(2, dim=2)
        halves = _Gather.apply(x, 1, self.permutation).chunk(2, dim=1)
        x1, x2 = (rearrange(half, "b n (s d) -> b (n s) d", s=2) for half in halves)
        return x1, x2

    def _merge(self, x1: Tensor, x2: Tensor) -> Tensor:
        if self.kind == "channels":
            return _Scatter.apply(torch.cat((x1, x2), dim=2), 2, self.permutation)
        halves = [rearrange(half, "b (n s) d -> b n (s d)", s=2) for half in (x1, x2)]
        return _Scatter.apply(torch.cat(halves, dim=1), 1, self.permutation)

    def _affine(self, x1: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        shift, raw_scale = self.dnn(x1, context)
        scale = torch.sigmoid(raw_scale) * self.scale_factor
        logdet = (F.logsigmoid(raw_scale) + math.log(self.scale_factor)).sum(dim=(1, 2))
        return shift, scale, logdet

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`[B, N, D]` to the same shape and log-determinants `[B]`."""
        x1, x2 = self._split(x)
        shift, scale, logdet = self._affine(x1, context)
        return self._merge(x1, (x2 + shift) * scale), logdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`[B, N, D]` to the same shape and log-determinants `[B]`."""
        z1, z2 = self._split(z)
        shift, scale, logdet = self._affine(z1, context)
        return self._merge(z1, z2 / scale - shift), -logdet


class Jet(nn.Module):
    """A sequence of couplings over the patches of an image.

    Args:
      input_shape: (H, W, C) of one input.
      depth: number of couplings.
      block_depth: number of ViT blocks in each.
      emb_dim: width of the ViTs.
      num_heads: attention heads of the ViTs.
      scale_factor: largest scale of a coupling.
      ps: patch size.
      kinds: which couplings, repeated until there are `depth` of them.
      channels_coupling_projs: projections of the channel couplings, repeated likewise.
      spatial_coupling_projs: projections of the spatial couplings, repeated likewise.
      context_dim: size of the context's tokens, for cross-attention to a context; None for none.

    Raises:
      ValueError: if sizes do not divide, or a kind or projection is unknown.
    """

    rematerializes = "couplings"  # see `remat.set_policy`

    def __init__(
        self,
        input_shape: ImageShape,
        depth: int = 2,
        block_depth: int = 1,
        emb_dim: int = 256,
        num_heads: int = 4,
        scale_factor: float = 2.0,
        ps: int = 4,
        kinds: Sequence[str] = ("channels", "channels", "spatial"),
        channels_coupling_projs: Sequence[str] = ("random",),
        spatial_coupling_projs: Sequence[str] = ("checkerboard", "checkerboard-inv"),
        context_dim: int | None = None,
    ):
        super().__init__()
        self.image_shape = tuple(input_shape)
        self.patchify = Patchify(input_shape, ps)
        self.rematerialize = False
        projections = {
            "channels": itertools.cycle(channels_coupling_projs),
            "spatial": itertools.cycle(spatial_coupling_projs),
        }
        self.couplings = nn.ModuleList()
        for kind in itertools.islice(itertools.cycle(kinds), depth):
            if kind not in projections:
                raise ValueError(f"unknown coupling kind {kind!r}: one of channels, spatial")
            coupling = Coupling(
                kind,
                next(projections[kind]),
                self.patchify.grid,
                self.patchify.dim,
                scale_factor,
                depth=block_depth,
                emb_dim=emb_dim,
                num_heads=num_heads,
                context_dim=context_dim,
            )
            self.couplings.append(coupling)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Image to latent.

        Args:
          x: `[B, H, W, C]`.
          context: `[B, M, context_dim]` or None.

        Returns:
          The latent `[B, H, W, C]` and the log-determinants `[B]` in nats.

        Raises:
          ValueError: if `x` has another shape than the flow was built for.
        """
        if x.shape[1:] != self.image_shape:
            raise ValueError(f"images have shape {tuple(x.shape[1:])}, the flow is built for {self.image_shape}")
        x, logdet = self.patchify(x)
        for coupling in self.couplings:
            if self.rematerialize and torch.is_grad_enabled():
                x, coupling_logdet = rematerialize(coupling, x, context)
            else:
                x, coupling_logdet = coupling(x, context)
            logdet = logdet + coupling_logdet
        return self.patchify.inverse(x)[0], logdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent to image; arguments and results as in `forward`."""
        z, logdet = self.patchify(z)
        for coupling in reversed(self.couplings):
            z, coupling_logdet = coupling.inverse(z, context)
            logdet = logdet + coupling_logdet
        return self.patchify.inverse(z)[0], logdet
