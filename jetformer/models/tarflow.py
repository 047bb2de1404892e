"""TarFlow: an autoregressive flow of causal transformers over patches (arXiv 2412.06329).

Each block predicts shift and log-scale of a token from the tokens before it. The order of tokens alternates between
blocks. So a block encodes all tokens in one pass, and decodes them one by one.

Dimensions: B batch, H × W × C image, N tokens, D token dimension, T tokens of one call, E width, M context tokens, X
their dimension.

Notable:
  - a block whose last layer is zero is the identity, and a new one is;
  - decoding keeps keys and values in a cache that lives as long as the call of `inverse`;
  - scales have no bound, unlike Jet's;
  - under autocast the inverse is as exact as autocast's dtype: its predictions are not computed as in `forward`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jetformer.models import initializers, remat
from jetformer.models.attention import attend
from jetformer.models.patches import ImageShape, Patchify
from jetformer.models.vit import Mlp, SelfAttention
from jetformer.ranges import NonNegativeInt, PositiveInt

# As in the authors' code, which has PyTorch's defaults.
_GELU, _NORM_EPS = "exact", 1e-5
_EMBEDDING_STD = 0.01


class LayerCache(NamedTuple):
    """Keys and values of one layer, for calls with some tokens at a time.

    k, v: `[B, heads, N, E / heads]`, written in place.
    slots: int64 `[T]`, the tokens' numbers. (A tensor, so that all steps are one graph to a compiler.)
    mask: bool `[1, T, N]`, true for each token and those before it.
    temperature: divides the attention logits.
    """

    k: Tensor
    v: Tensor
    slots: Tensor
    mask: Tensor
    temperature: float


class CausalAttention(SelfAttention):
    """Multi-head attention of each token to itself and the tokens before it, `[B, T, E]` to `[B, T, E]`."""

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3 * self.num_heads, -1)).transpose(1, 2)
        q, k, v = heads.chunk(3, dim=1)
        if cache is None:
            y = attend(q, k, v, is_causal=True)
        else:
            k = cache.k.index_copy_(2, cache.slots, k.to(cache.k.dtype)).to(q.dtype)
            v = cache.v.index_copy_(2, cache.slots, v.to(cache.v.dtype)).to(q.dtype)
            y = attend(q / cache.temperature, k, v, cache.mask)
        return self.out(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A pre-norm transformer layer, `[B, T, E]` to `[B, T, E]`."""

    is_transformer_block = True  # see `optim.block_matrices`

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_NORM_EPS)
        self.attn = CausalAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=_NORM_EPS)
        self.mlp = Mlp(width, _GELU)

    def init_weights(self, generator: torch.Generator) -> None:
        del generator
        self.norm1.reset_parameters()
        self.norm2.reset_parameters()

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), cache)
        return x + self.mlp(self.norm2(x))


class TarFlowBlock(nn.Module):
    """z_i = (x_i - shift_i) · exp(-log_scale_i), where a causal transformer predicts both from x_0 … x_(i - 1).

    The first token stays as it is.

    Args:
      num_tokens: N.
      dim: D.
      depth: number of transformer layers.
      emb_dim: E.
      num_heads: attention heads.
      context_dim: X; None for no context.
      inverse_method, student: see `TarFlow`.
      flip: start at the last token.
    """

    is_block = True
    recompute_policy = "couplings"  # see `remat`

    def __init__(
        self,
        num_tokens: int,
        dim: int,
        depth: int,
        emb_dim: int,
        num_heads: int,
        context_dim: int | None,
        inverse_method: "InverseMethod | None",
        student: Callable[..., nn.Module] | None,
        flip: bool,
    ):
        super().__init__()
        self.inverse_method, self.flip = inverse_method, flip
        self.init_proj = nn.Linear(dim, emb_dim)
        self.posemb = nn.Parameter(torch.empty(num_tokens, emb_dim))
        self.context_proj = nn.Linear(context_dim, emb_dim, bias=False) if context_dim else None
        self.layers = nn.ModuleList(Layer(emb_dim, num_heads) for _ in range(depth))
        self.final_proj = nn.Linear(emb_dim, 2 * dim)
        self.student = student(num_tokens, dim, context_dim) if student else None

    def init_weights(self, generator: torch.Generator) -> None:
        initializers.lecun_normal_(self.init_proj.weight, generator)
        nn.init.zeros_(self.init_proj.bias)
        nn.init.normal_(self.posemb, std=_EMBEDDING_STD, generator=generator)
        if self.context_proj is not None:
            nn.init.normal_(self.context_proj.weight, std=_EMBEDDING_STD, generator=generator)
        nn.init.zeros_(self.final_proj.weight)
        nn.init.zeros_(self.final_proj.bias)

    def in_order(self, x: Tensor) -> Tensor:
        """Puts tokens `[..., N, D]` in the block's order, or back."""
        return x.flip(-2) if self.flip else x

    def condition(self, context: Tensor | None) -> Tensor:
        """Returns what is added to the embeddings of tokens in the block's order: positions and context.

        Args:
          context: `[B, M, X]`; its tokens are averaged.

        Returns:
          `[1, N, E]`; with a context `[B, N, E]`.
        """
        positions = self.in_order(self.posemb)[None]
        return positions if context is None else positions + self.context_proj(context).mean(1, keepdim=True)

    def predict(self, x: Tensor, condition: Tensor, caches: list[LayerCache] | None = None) -> tuple[Tensor, Tensor]:
        """Predicts shift and log-scale `[B, T, D]` of the token after each.

        Args:
          x: `[B, T, D]`, tokens in the block's order: the first T, or with caches those at their slots.
          condition: `[1 or B, T, E]`, see `condition`.
          caches: one for each layer.
        """
        y = self.init_proj(x) + condition
        for i, layer in enumerate(self.layers):
            y = layer(y, caches[i] if caches else None)
        # Autocast may compute these in bfloat16; the affine map keeps the dtype of x.
        log_scale, shift = self.final_proj(y).to(x.dtype).chunk(2, dim=-1)
        return shift, log_scale

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps `[B, N, D]` to the same shape and log-determinants `[B]` in nats; context `[B, M, X]` or None."""
        x = self.in_order(x)
        predicted = self.predict(x, self.condition(context))
        shift, log_scale = (F.pad(p[:, :-1], (0, 0, 1, 0)) for p in predicted)
        return self.in_order((x - shift) * (-log_scale).exp()), -log_scale.sum(dim=(1, 2))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Inverts `forward`, token by token or by `inverse_method`, or approximately by the student; returns also the
        inverse's log-determinants. It has no gradient."""
        if self.student is not None:
            x = self.student(z, context)
            return x, -self.forward(x, context)[1]
        if self.inverse_method is not None:
            return self.inverse_method(self, z, context)
        return self.invert(z, CachedBlock(self, z, context).step)

    def invert(self, z: Tensor, predict: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Inverts `forward` with the predictions of a function.

        Args:
          z: `[B, N, D]`.
          predict: called with one decoded token `[B, 1, D]` after another, in the block's order; returns shift and
            log-scale `[B, 1, D]` of the next.

        Returns:
          Tokens `[B, N, D]`, and log-determinants `[B]` of the inverse in nats.
        """
        first, *rest = self.in_order(z).split(1, dim=1)
        tokens, logdet = [first], z.new_zeros(len(z))
        for token in rest:
            shift, log_scale = predict(tokens[-1])
            tokens.append(token * log_scale.exp() + shift)
            logdet = logdet + log_scale.sum(dim=(1, 2))
        return self.in_order(torch.cat(tokens, dim=1)), logdet


# Inverts a block: called with the block, z `[B, N, D]` and the context, returns as `TarFlowBlock.inverse`.
InverseMethod = Callable[[TarFlowBlock, Tensor, Tensor | None], tuple[Tensor, Tensor]]


class CachedBlock:
    """Runs a block on some tokens at a time, with a KV cache.

    Args:
      block: the block.
      x: `[B, N, D]`; its shape, dtype and device are those of the tokens to come.
      context: `[B, M, X]` or None.
      temperature: divides the attention logits.
    """

    def __init__(self, block: TarFlowBlock, x: Tensor, context: Tensor | None, temperature: float = 1.0):
        self._block = block
        self._condition = block.condition(context)
        batch_size, num_tokens = x.shape[:2]
        self._numbers = torch.arange(num_tokens, device=x.device)
        self._next = torch.zeros(1, dtype=torch.int64, device=x.device)
        self._temperature = temperature
        width = self._condition.shape[-1]
        self._caches = []
        for layer in block.layers:
            heads = layer.attn.num_heads
            k, v = (x.new_zeros(batch_size, heads, num_tokens, width // heads) for _ in range(2))
            self._caches.append((k, v))

    def predict(self, tokens: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Writes tokens to the cache and predicts those after them, from all tokens up to each.

        Args:
          tokens: `[B, T, D]`.
          slots: int64 `[T]`, their numbers in the block's order. The cache holds all tokens before them.

        Returns:
          Shift and log-scale `[B, T, D]`.
        """
        mask = (self._numbers <= slots[:, None])[None]
        caches = [LayerCache(k, v, slots, mask, self._temperature) for k, v in self._caches]
        return self._block.predict(tokens, self._condition.index_select(1, slots), caches)

    def step(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """Appends a token `[B, 1, D]`, and returns shift and log-scale `[B, 1, D]` of the next one."""
        predicted = self.predict(token, self._next)
        self._next.add_(1)
        return predicted


class TarFlow(nn.Module):
    """A sequence of autoregressive blocks over the patches of an image; every second block starts at the last patch.

    Args:
      input_shape: (H, W, C) of one image.
      depth: number of blocks.
      block_depth: number of transformer layers in each block.
      emb_dim: E, width of the transformers.
      num_heads: attention heads of the transformers.
      ps: patch size.
      context_dim: X; the average of the context's tokens is mapped to E dimensions and added to every token. None for
        no context.
      inverse_method: inverts a block; None: token by token, which is exact. See `sampling.jacobi.Jacobi`.
      student: `Student`, called with N, D and X, to invert each block in one pass, as closely as it has learned to by
        `objectives.DistillObjective`; None for none.

    Raises:
      ValueError: if sizes do not divide, or with both inverse_method and student.
    """

    def __init__(
        self,
        input_shape: ImageShape,
        depth: NonNegativeInt = 8,
        block_depth: PositiveInt = 8,
        emb_dim: PositiveInt = 768,
        num_heads: PositiveInt = 12,
        ps: PositiveInt = 2,
        context_dim: PositiveInt | None = None,
        inverse_method: InverseMethod | None = None,
        student: Callable[..., nn.Module] | None = None,
    ):
        super().__init__()
        if inverse_method and student:
            raise ValueError("TarFlow has an inverse_method and a student: bind one of them to None")
        if isinstance(inverse_method, type):
            raise ValueError(f"TarFlow.inverse_method is a class: write @{inverse_method.__name__}(), with parentheses")
        self.image_shape = tuple(input_shape)
        self.patchify = Patchify(input_shape, ps, order="chw")
        sizes = (
            self.patchify.num_tokens,
            self.patchify.dim,
            block_depth,
            emb_dim,
            num_heads,
            context_dim,
            inverse_method,
            student,
        )
        self.blocks = nn.ModuleList(TarFlowBlock(*sizes, flip=i % 2 == 1) for i in range(depth))
        initializers.init_on_cpu(self)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps images to latents.

        Args:
          x: `[B, H, W, C]`.
          context: `[B, M, X]` or None.

        Returns:
          Latents `[B, H, W, C]` and log-determinants `[B]` in nats.

        Raises:
          ValueError: if `x` does not have the shape that the flow is built for.
        """
        if x.shape[1:] != self.image_shape:
            raise ValueError(f"images have shape {tuple(x.shape[1:])}, the flow is built for {self.image_shape}")
        x, logdet = self.patchify(x)
        for block in self.blocks:
            x, block_logdet = remat.run_block(block, x, context)
            logdet = logdet + block_logdet
        return self.patchify.inverse(x)[0], logdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps latents to images, block by block; arguments and results as in `forward`."""
        z, logdet = self.patchify(z)
        for block in reversed(self.blocks):
            z, block_logdet = block.inverse(z, context)
            logdet = logdet + block_logdet
        return self.patchify.inverse(z)[0], logdet
