"""What Jet's paper compares Jet with: other predictors, masks, scales, ActNorm, dense layers, levels.

In gin files `Jet` is `make_jet`, which builds the paper's flow of `jet.py` unless an argument asks for an ablation.

Dimensions: B batch, H × W × C image, N tokens, D token dimension, E width of the predictors, M context tokens.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from jetformer.models import initializers, remat
from jetformer.models.activations import gelu
from jetformer.models.invertible import ActNorm, make_dense
from jetformer.models.jet import Coupling, Jet, Predictor, coupling_kinds
from jetformer.models.patches import ImageShape, Patchify
from jetformer.models.vit import LAYER_NORM_EPS, CrossAttention
from jetformer.ranges import NonNegativeInt, PositiveFloat, PositiveInt


def make_jet(
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
) -> Jet:
    """Builds a `Jet`, or an `AblatedJet` if one of the last six arguments differs from its default.

    Args:
      input_shape, depth, block_depth, emb_dim, num_heads, scale_factor, ps, kinds, channels_coupling_projs,
        spatial_coupling_projs, context_dim, gelu, norm_eps: see `Jet`.
      predictor: "vit", or "cnn": a convolutional residual network with as many blocks and the same width. In spatial
        couplings it implies `masking`, for half of the tokens do not form a grid.
      masking: mask the second half of the tokens instead of cutting it out, see `MaskedCoupling`.
      scale_form: "sigmoid", or "exp", see `ExpCoupling`.
      actnorm: put an ActNorm before each coupling; `invertible.initializing` sets them by a batch of data.
      invertible_dense: put a learned matrix over the tokens' dimensions before each coupling, after its ActNorm: "lu"
        or "plain", see `invertible.make_dense`; None for none.
      num_levels: number of levels that share the couplings evenly (RealNVP, arXiv 1605.08803, section 3.6). Each level
        but the first keeps half of each token's dimensions as latents, and joins 2 × 2 tokens into one.

    Raises:
      ValueError: if sizes do not fit, or a kind, projection or form is unknown.
    """
    ablation = (predictor, masking, scale_form, actnorm, invertible_dense, num_levels)
    if ablation == ("vit", False, "sigmoid", False, None, 1):
        return Jet(
            *(input_shape, depth, block_depth, emb_dim, num_heads, scale_factor, ps, kinds),
            *(channels_coupling_projs, spatial_coupling_projs, context_dim, gelu, norm_eps),
        )
    if predictor not in ("vit", "cnn"):
        raise ValueError(f"unknown predictor {predictor!r}: use vit or cnn")
    if scale_form not in ("sigmoid", "exp"):
        raise ValueError(f"unknown scale_form {scale_form!r}: use sigmoid or exp")
    if scale_form == "exp" and scale_factor <= 1:
        raise ValueError(f"scale_factor {scale_factor} is too small: scale_form exp needs one above 1")

    def make_coupling(kind: str, projection: str, grid: tuple[int, int], dim: int) -> Coupling:
        masked = masking or (predictor == "cnn" and kind == "spatial")
        if dim % 2 and (kind == "channels" or not masked):
            raise ValueError(f"a coupling cannot halve tokens of {dim} dimensions: choose another patch size")
        width = dim if masked else dim // 2
        sizes = (width, block_depth, emb_dim, num_heads, context_dim, gelu, norm_eps)
        dnn = Predictor(math.prod(grid), *sizes) if predictor == "vit" else ConvPredictor(grid, *sizes)
        return _COUPLINGS[scale_form, masked](kind, projection, grid, dim, scale_factor, dnn)

    each = coupling_kinds(depth, kinds, channels_coupling_projs, spatial_coupling_projs)
    return AblatedJet(input_shape, ps, each, make_coupling, actnorm, invertible_dense, num_levels)


class ExpCoupling(Coupling):
    """scale = exp(b · tanh(raw_scale / b)) with b = log(scale_factor), between 1 / scale_factor and scale_factor.

    A bounded log-scale, as in RealNVP (arXiv 1605.08803, section 3.7) and Glow.
    """

    def scale(self, raw_scale: Tensor) -> tuple[Tensor, Tensor]:
        bound = math.log(self.scale_factor)
        log_scale = bound * torch.tanh(raw_scale / bound)
        return log_scale.exp(), log_scale


class MaskedCoupling(Coupling):
    """Sets the second half to zero for the predictor, instead of cutting it out (RealNVP, section 3.4).

    The predictor maps all tokens `[B, N, D]` to shift and raw scale `[B, N, D]`, of which those of the second half
    count.
    """

    def _in_first_half(self, x: Tensor) -> Tensor:
        """Marks the entries of `x` `[B, N, D]` that belong to the first half, bool `[D]` or `[N, 1]`."""
        size = len(self.permutation)
        is_first = torch.arange(size, device=x.device) < size // 2
        mask = torch.zeros_like(is_first).index_copy_(0, self.permutation, is_first)
        return mask if self.kind == "channels" else mask[:, None]

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.where(self._in_first_half(x), 0.0), x

    def merge(self, x1: Tensor, x2: Tensor) -> Tensor:
        return x1.where(self._in_first_half(x1), x2)

    def scale(self, raw_scale: Tensor) -> tuple[Tensor, Tensor]:
        scale, log_scale = super().scale(raw_scale)
        return scale, log_scale.masked_fill(self._in_first_half(log_scale), 0.0)


class MaskedExpCoupling(MaskedCoupling, ExpCoupling):
    """Both."""


class ConvBlock(nn.Module):
    """A pre-norm residual block of two 3 × 3 convolutions, `[B, E, rows, columns]` to the same."""

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
    """A convolutional residual network over the grid of tokens, in place of `Predictor`, as in flows before Jet."""

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


_COUPLINGS = {
    ("sigmoid", False): Coupling,
    ("sigmoid", True): MaskedCoupling,
    ("exp", False): ExpCoupling,
    ("exp", True): MaskedExpCoupling,
}


class AblatedJet(Jet):
    """A flow of other steps than Jet's.

    Args:
      image_shape: (H, W, C) of one image.
      ps: patch size.
      kinds: kind and projection of each coupling.
      make_coupling: builds a coupling, called with kind, projection, grid and D.
      actnorm, invertible_dense, num_levels: see `make_jet`.

    Attributes:
      max_logdet: as in `Jet`; None with ActNorms or dense layers, which have no largest scale.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        ps: int,
        kinds: Sequence[tuple[str, str]],
        make_coupling: Callable[[str, str, tuple[int, int], int], Coupling],
        actnorm: bool,
        invertible_dense: str | None,
        num_levels: int,
    ):
        nn.Module.__init__(self)  # not Jet's constructor, which builds other couplings
        depth = len(kinds)
        if not 1 <= num_levels <= max(depth, 1):
            raise ValueError(f"{depth} couplings do not suffice for {num_levels} levels: use fewer num_levels")
        self.image_shape = tuple(image_shape)
        self.patchify = Patchify(image_shape, ps)
        grid, dim = self.patchify.grid, self.patchify.dim
        # The levels' first couplings, and the end of the last level.
        self._bounds = [depth * level // num_levels for level in range(num_levels + 1)]
        self.couplings = nn.ModuleList()
        self.actnorms = nn.ModuleList() if actnorm else None
        self.denses = nn.ModuleList() if invertible_dense else None
        self.squeezes = nn.ModuleList()  # at the start of each level but the first
        max_logdet = 0.0
        for i, (kind, projection) in enumerate(kinds):
            if i in self._bounds[1:]:
                self.squeezes.append(_squeeze(grid, dim))
                grid, dim = self.squeezes[-1].grid, self.squeezes[-1].dim
            if actnorm:
                self.actnorms.append(ActNorm(dim))
            if invertible_dense:
                self.denses.append(make_dense(invertible_dense, dim))
            self.couplings.append(make_coupling(kind, projection, grid, dim))
            max_logdet += math.prod(grid) * dim / 2 * math.log(self.couplings[-1].scale_factor)
        self.max_logdet = max_logdet if max_logdet > 0 and not (actnorm or invertible_dense) else None
        initializers.init_on_cpu(self)

    def _levels(self) -> list[list[nn.Module]]:
        """Returns the steps of each level."""
        lists = [part for part in (self.actnorms, self.denses, self.couplings) if part is not None]
        return [[part[i] for i in range(*bounds) for part in lists] for bounds in itertools.pairwise(self._bounds)]

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_shape(x)
        x, logdet = self.patchify(x)
        factored = []
        for level, steps in enumerate(self._levels()):
            if level:
                x, out = self._factor_out(x, level)
                factored.append(out)
            for step in steps:
                x, step_logdet = remat.run_block(step, x, context)
                logdet = logdet + step_logdet
        for level in reversed(range(1, len(factored) + 1)):
            x = self._put_back(x, factored.pop(), level)
        return self.patchify.inverse(x)[0], logdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, logdet = self.patchify(z)
        levels, factored = self._levels(), []
        for level in range(1, len(levels)):
            z, out = self._factor_out(z, level)
            factored.append(out)
        for level, steps in reversed(list(enumerate(levels))):
            for step in reversed(steps):
                z, step_logdet = step.inverse(z, context)
                logdet = logdet + step_logdet
            if level:
                z = self._put_back(z, factored.pop(), level)
        return self.patchify.inverse(z)[0], logdet

    def _factor_out(self, x: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Returns the tokens `[B, N / 4, 2 · D]` of a level and the dimensions `[B, N, D / 2]` that it factors out,
        from the tokens `[B, N, D]` of the level before."""
        squeeze = self.squeezes[level - 1]
        kept, out = x.chunk(2, dim=2)
        rows, columns = squeeze.grid
        return squeeze(kept.unflatten(1, (2 * rows, 2 * columns)))[0], out

    def _put_back(self, x: Tensor, out: Tensor, level: int) -> Tensor:
        """The inverse of `_factor_out`."""
        kept, _ = self.squeezes[level - 1].inverse(x)
        return torch.cat((kept.flatten(1, 2), out), dim=2)


def _squeeze(grid: tuple[int, int], dim: int) -> Patchify:
    """Returns the map of 2 × 2 tokens, of half of their dimensions each, to one token."""
    if dim % 2 or grid[0] % 2 or grid[1] % 2:
        raise ValueError(
            f"a {grid[0]} × {grid[1]} grid of tokens of {dim} dimensions cannot be halved for another level: use fewer "
            "num_levels, or another patch size"
        )
    return Patchify((*grid, dim // 2), 2)
