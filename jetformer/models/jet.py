"""Jet: a normalizing flow of affine couplings predicted by ViTs (arXiv 2412.15129; big_vision
`models/proj/jet/jet.py`).

An image is cut into patches; each coupling splits the tokens' channels, or the tokens themselves, into two halves,
leaves the first as it is and maps the second by an elementwise affine function whose shift and scale a ViT reads off
the first. Dimensions: B batch, H × W × C image, N tokens, D token dimension, M context tokens.

What a reader may want to know:
  - permutations are index gathers, each other's backward (the reference multiplies by one-hot matrices);
  - a spatial coupling cuts each token of its half in two, so that every ViT sees `[B, N, D / 2]`;
  - the last layer of each ViT starts at zero, so at initialization a coupling scales its half by
    `scale_factor / 2`, and the flow is the identity by default;
  - what the paper compares with, or flows before it had, is an argument each: convolutions in the place of ViTs,
    masks, other scales, ActNorm and dense layers between the couplings (`invertible.py`), several levels.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from jetformer.models import initializers
from jetformer.models.activations import gelu
from jetformer.models.invertible import ActNorm, make_dense
from jetformer.models.patches import ImageShape, Patchify
from jetformer.models.remat import rematerialize
from jetformer.models.vit import LAYER_NORM_EPS, CrossAttention, Encoder
from jetformer.ranges import NonNegativeInt, PositiveFloat, PositiveInt


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


def channel_permutation(kind: str, dim: int, generator: torch.Generator) -> Tensor:
    """Order `[D]` of a token's dimensions in a channel coupling: those of the first half, then those of the second.

    Args:
      kind: "random", drawn from `generator`; "halves", as they are; "halves-inv", the halves swapped.
      dim: D.

    Raises:
      ValueError: for another kind.
    """
    if kind == "random":
        return torch.randperm(dim, generator=generator)
    if kind not in ("halves", "halves-inv"):
        raise ValueError(f"unknown channel coupling {kind!r}: one of random, halves, halves-inv")
    order = torch.arange(dim)
    return order if kind == "halves" else order.roll(-(dim // 2))


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


class ConvBlock(nn.Module):
    """One pre-norm residual block of two 3 × 3 convolutions, `[B, E, rows, columns]` to the same."""

    def __init__(self, width: int, gelu_form: str, norm_eps: float):
        super().__init__()
        self.gelu = gelu(gelu_form)
        self.norm = nn.GroupNorm(1, width, norm_eps)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def init_weights(self, generator: torch.Generator) -> None:
        self.norm.reset_parameters()
        for conv in (self.conv1, self.conv2):
            initializers.lecun_normal_(conv.weight.flatten(1), generator)
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.gelu(self.conv1(self.norm(x))))


class ConvPredictor(nn.Module):
    """As `Predictor`, by a convolutional residual network over the grid of tokens, as flows before Jet had it."""

    def __init__(
        self,
        grid: tuple[int, int],
        dim: int,
        depth: int,
        emb_dim: int,
        num_heads: int,
        context_dim: int | None,
        gelu: str = "tanh",
        norm_eps: float = LAYER_NORM_EPS,
    ):
        super().__init__()
        self.grid = grid
        self.init_proj = nn.Linear(dim, emb_dim)
        self.cross_attn = CrossAttention(emb_dim, num_heads, context_dim) if context_dim else None
        self.blocks = nn.ModuleList(ConvBlock(emb_dim, gelu, norm_eps) for _ in range(depth))
        self.norm = nn.GroupNorm(1, emb_dim, norm_eps)
        self.final_proj = nn.Linear(emb_dim, 2 * dim)

    def init_weights(self, generator: torch.Generator) -> None:
        initializers.lecun_normal_(self.init_proj.weight, generator)
        nn.init.zeros_(self.init_proj.bias)
        self.norm.reset_parameters()
        nn.init.zeros_(self.final_proj.weight)
        nn.init.zeros_(self.final_proj.bias)

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        y = self.init_proj(x)
        if context is not None:
            y = y + self.cross_attn(y, context)
        y = y.transpose(1, 2).unflatten(2, self.grid)
        for block in self.blocks:
            y = block(y)
        y = self.norm(y).flatten(2).transpose(1, 2)
        shift, raw_scale = self.final_proj(y).to(x.dtype).chunk(2, dim=-1)
        return shift, raw_scale


class Coupling(nn.Module):
    """z = (x1, (x2 + shift(x1)) · scale(x1)), with scale = scale_factor · sigmoid(raw_scale(x1)).

    Args:
      kind: "channels" or "spatial".
      projection: see `channel_permutation` and `spatial_permutation`.
      grid: rows and columns of tokens.
      dim: D, even, unless halves of the tokens are masked.
      scale_factor: largest scale.
      scale_form: "sigmoid", as above; or "exp": scale = exp(b · tanh(raw_scale(x1) / b)) with b = log(scale_factor),
        which lies between 1 / scale_factor and scale_factor (a bounded log-scale, as in RealNVP, arXiv 1605.08803,
        section 3.7, and Glow).
      masking: show the predictor all of the tokens with the second half set to zero, and use what it says of that half
        (RealNVP, section 3.4), in place of the first half alone. It then maps `[B, N, D]` to `[B, N, D]`.
      predictor: "vit", or "cnn" for convolutions, to which in spatial couplings tokens are always masked: half of them
        are no grid.
      **sizes: the predictor's `depth`, `emb_dim`, `num_heads`, `context_dim`, `gelu`, `norm_eps`.
    """

    is_block = True

    def __init__(
        self,
        kind: str,
        projection: str,
        grid: tuple[int, int],
        dim: int,
        scale_factor: float,
        scale_form: str = "sigmoid",
        masking: bool = False,
        predictor: str = "vit",
        **sizes,
    ):
        super().__init__()
        if kind not in ("channels", "spatial"):
            raise ValueError(f"unknown coupling kind {kind!r}: one of channels, spatial")
        if predictor not in ("vit", "cnn"):
            raise ValueError(f"unknown predictor {predictor!r}: one of vit, cnn")
        if scale_form not in ("sigmoid", "exp"):
            raise ValueError(f"unknown scale_form {scale_form!r}: one of sigmoid, exp")
        if scale_form == "exp" and scale_factor <= 1:
            raise ValueError(f"with scale_form exp scales are at least 1 / scale_factor: {scale_factor} is not above 1")
        self.masking = masking or (predictor == "cnn" and kind == "spatial")
        if dim % 2 and (kind == "channels" or not self.masking):
            raise ValueError(f"a coupling cannot halve tokens of {dim} dimensions: choose another patch size")
        self.kind, self.projection, self.grid = kind, projection, grid
        self.scale_factor, self.scale_form = scale_factor, scale_form
        num_tokens = grid[0] * grid[1]
        with torch.device("cpu"):  # wherever the parameters are: what is impossible is reported now
            size = len(self._order(dim, torch.Generator()))
        self.register_buffer("permutation", torch.empty(size, dtype=torch.int64))
        width = dim if self.masking else dim // 2
        if predictor == "vit":
            self.dnn = Predictor(num_tokens, width, **sizes)
        else:
            self.dnn = ConvPredictor(grid, width, **sizes)

    def _order(self, dim: int, generator: torch.Generator) -> Tensor:
        if self.kind == "channels":
            return channel_permutation(self.projection, dim, generator)
        return spatial_permutation(self.projection, self.grid)

    def init_weights(self, generator: torch.Generator) -> None:
        self.permutation.copy_(self._order(len(self.permutation), generator))

    def _first_half(self, x: Tensor) -> Tensor:
        """Where `x` `[B, N, D]` is of the first half, bool `[D]` or `[N, 1]`."""
        size = len(self.permutation)
        is_first = torch.arange(size, device=x.device) < size // 2
        mask = torch.zeros_like(is_first).index_copy_(0, self.permutation, is_first)
        return mask if self.kind == "channels" else mask[:, None]

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, N, D]` to two halves `[B, N, D / 2]`; with masking, to what the predictor sees and all, `[B, N, D]`."""
        if self.masking:
            return x.where(self._first_half(x), 0.0), x
        if self.kind == "channels":
            return _Gather.apply(x, 2, self.permutation).chunk(2, dim=2)
        halves = _Gather.apply(x, 1, self.permutation).chunk(2, dim=1)
        x1, x2 = (rearrange(half, "b n (s d) -> b (n s) d", s=2) for half in halves)
        return x1, x2

    def _merge(self, x1: Tensor, x2: Tensor) -> Tensor:
        if self.masking:
            return x1.where(self._first_half(x1), x2)
        if self.kind == "channels":
            return _Scatter.apply(torch.cat((x1, x2), dim=2), 2, self.permutation)
        halves = [rearrange(half, "b (n s) d -> b n (s d)", s=2) for half in (x1, x2)]
        return _Scatter.apply(torch.cat(halves, dim=1), 1, self.permutation)

    def _affine(self, x1: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        shift, raw_scale = self.dnn(x1, context)
        bound = math.log(self.scale_factor)
        if self.scale_form == "sigmoid":
            scale = torch.sigmoid(raw_scale) * self.scale_factor
            log_scale = F.logsigmoid(raw_scale) + bound
        else:
            log_scale = bound * torch.tanh(raw_scale / bound)
            scale = log_scale.exp()
        if self.masking:
            log_scale = log_scale.masked_fill(self._first_half(log_scale), 0.0)
        return shift, scale, log_scale.sum(dim=(1, 2))

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
      predictor: "vit", or "cnn": a convolutional residual network of as many blocks and the same width.
      masking: mask tokens in the place of cutting them out, see `Coupling`.
      scale_form: "sigmoid" or "exp", see `Coupling`.
      actnorm: put an ActNorm before each coupling; `invertible.initializing` sets them by a batch of data.
      invertible_dense: put a learned matrix over the tokens' dimensions before each coupling (and after its ActNorm):
        "lu" or "plain", see `invertible.make_dense`; None for none.
      num_levels: over how many levels the couplings are shared out evenly (RealNVP, arXiv 1605.08803, section 3.6).
        After each level but the last half of each token's dimensions are factored out: they are part of the latent as
        they are; and of the rest 2 × 2 tokens become one.
      gelu: the ViTs' form of GELU, see `activations.gelu`.
      norm_eps: epsilon of the ViTs' LayerNorms.

    Attributes:
      max_logdet: the log-determinant in nats that all couplings together approach at their largest scale; None where it
        is not bounded, with ActNorms or dense layers, or not above 0.

    Raises:
      ValueError: if sizes do not divide, or a kind, projection or form is unknown.
    """

    rematerializes = "couplings"  # see `remat.set_policy`

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
        predictor: str = "vit",
        masking: bool = False,
        scale_form: str = "sigmoid",
        actnorm: bool = False,
        invertible_dense: str | None = None,
        num_levels: PositiveInt = 1,
    ):
        super().__init__()
        if num_levels < 1 or num_levels > max(depth, 1):
            raise ValueError(f"{depth} couplings cannot be shared out over {num_levels} levels")
        self.image_shape = tuple(input_shape)
        self.patchify = Patchify(input_shape, ps)
        self.rematerialize = False
        projections = {
            "channels": itertools.cycle(channels_coupling_projs),
            "spatial": itertools.cycle(spatial_coupling_projs),
        }
        grid, dim = self.patchify.grid, self.patchify.dim
        self._starts = [depth * level // num_levels for level in range(num_levels + 1)]  # of the levels, and the end
        self.couplings = nn.ModuleList()
        self.actnorms = nn.ModuleList() if actnorm else None
        self.denses = nn.ModuleList() if invertible_dense else None
        self.squeezes = nn.ModuleList()  # into the second level and those after it
        max_logdet = 0.0
        for i, kind in enumerate(itertools.islice(itertools.cycle(kinds), depth)):
            if kind not in projections:
                raise ValueError(f"unknown coupling kind {kind!r}: one of channels, spatial")
            if i in self._starts[1:]:
                self.squeezes.append(_squeeze(grid, dim))
                grid, dim = self.squeezes[-1].grid, self.squeezes[-1].dim
            if actnorm:
                self.actnorms.append(ActNorm(dim))
            if invertible_dense:
                self.denses.append(make_dense(invertible_dense, dim))
            coupling = Coupling(
                kind,
                next(projections[kind]),
                grid,
                dim,
                scale_factor,
                scale_form=scale_form,
                masking=masking,
                predictor=predictor,
                depth=block_depth,
                emb_dim=emb_dim,
                num_heads=num_heads,
                context_dim=context_dim,
                gelu=gelu,
                norm_eps=norm_eps,
            )
            self.couplings.append(coupling)
            max_logdet += math.prod(grid) * dim / 2 * math.log(scale_factor)  # each scales half of its dimensions
        self.max_logdet = max_logdet if max_logdet > 0 and not (actnorm or invertible_dense) else None
        initializers.init_on_cpu(self)

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
        factored = []
        for level in range(len(self._starts) - 1):
            if level:
                x, out = self._factor_out(x, level)
                factored.append(out)
            for step in self._steps(level):
                x, step_logdet = self._run(step, x, context)
                logdet = logdet + step_logdet
        for level in reversed(range(1, len(self._starts) - 1)):
            x = self._put_back(x, factored.pop(), level)
        return self.patchify.inverse(x)[0], logdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent to image; arguments and results as in `forward`."""
        z, logdet = self.patchify(z)
        factored = []
        for level in range(1, len(self._starts) - 1):
            z, out = self._factor_out(z, level)
            factored.append(out)
        for level in reversed(range(len(self._starts) - 1)):
            for step in reversed(self._steps(level)):
                z, step_logdet = step.inverse(z, context) if isinstance(step, Coupling) else step.inverse(z)
                logdet = logdet + step_logdet
            if level:
                z = self._put_back(z, factored.pop(), level)
        return self.patchify.inverse(z)[0], logdet

    def _steps(self, level: int) -> list[nn.Module]:
        """What a level maps its tokens by, in order."""
        steps = []
        for i in range(*self._starts[level : level + 2]):
            steps += [parts[i] for parts in (self.actnorms, self.denses, self.couplings) if parts is not None]
        return steps

    def _run(self, step: nn.Module, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if not isinstance(step, Coupling):
            return step(x)
        if self.rematerialize and torch.is_grad_enabled():
            return rematerialize(step, x, context)
        return step(x, context)

    def _factor_out(self, x: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Tokens of the level before `[B, N, D]` to those of this one `[B, N / 4, 2 · D]` and what is factored out,
        `[B, N, D / 2]`."""
        squeeze = self.squeezes[level - 1]
        kept, out = x.chunk(2, dim=2)
        rows, columns = squeeze.grid
        return squeeze(kept.unflatten(1, (2 * rows, 2 * columns)))[0], out

    def _put_back(self, x: Tensor, out: Tensor, level: int) -> Tensor:
        """The inverse of `_factor_out`."""
        kept, _ = self.squeezes[level - 1].inverse(x)
        return torch.cat((kept.flatten(1, 2), out), dim=2)


def _squeeze(grid: tuple[int, int], dim: int) -> Patchify:
    """What makes one token of 2 × 2, of half the dimensions each."""
    if dim % 2 or grid[0] % 2 or grid[1] % 2:
        raise ValueError(
            f"a {grid[0]} × {grid[1]} grid of tokens of {dim} dimensions cannot go into another level: all three have "
            "to be even; use fewer num_levels, or another patch size"
        )
    return Patchify((*grid, dim // 2), 2)
