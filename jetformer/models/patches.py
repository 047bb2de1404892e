"""Maps between images and sequences of tokens: patches, and patches in a PCA basis.

Both classes have `forward(image) -> (tokens, logdet)` and `inverse(tokens) -> (image, logdet)`.

Dimensions: B batch, H × W × C image, L tokens, D token dimension.
"""

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from jetformer.ranges import PositiveInt
from jetformer.storage import find

ImageShape = tuple[PositiveInt, PositiveInt, PositiveInt]

# Orders of a patch's rows p, columns q and channels c, by name.
_PATCH_ORDERS = {"hwc": "p q c", "chw": "c p q"}


class Patchify(nn.Module):
    """Splits an image into non-overlapping square patches.

    Args:
      image_shape: (H, W, C) of one image.
      patch_size: side of a patch in pixels.
      order: order of a patch's values in a token: "hwc", pixel by pixel; or "chw", channel by channel, as in
        `torch.nn.functional.unfold`.

    Raises:
      ValueError: if the patch size does not divide the image's sides, or the order is unknown.
    """

    def __init__(self, image_shape: ImageShape, patch_size: PositiveInt, order: str = "hwc"):
        super().__init__()
        height, width, channels = image_shape
        if order not in _PATCH_ORDERS:
            raise ValueError(f"unknown order {order!r} of a patch's values: use {' or '.join(_PATCH_ORDERS)}")
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"an image of {height} × {width} pixels does not divide into patches of {patch_size}: use another "
                "patch_size, or resize the images"
            )
        self.patch_size = patch_size
        self._axes = _PATCH_ORDERS[order]
        self.grid = (height // patch_size, width // patch_size)
        self.num_tokens = self.grid[0] * self.grid[1]
        self.dim = patch_size * patch_size * channels

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, H, W, C]` to tokens `[B, L, D]` and log-determinants `[B]`, which are zero."""
        p = self.patch_size
        return rearrange(x, f"b (h p) (w q) c -> b (h w) ({self._axes})", p=p, q=p), x.new_zeros(len(x))

    def inverse(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, L, D]` to the image `[B, H, W, C]` and log-determinants `[B]`."""
        p = self.patch_size
        sizes = {"h": self.grid[0], "w": self.grid[1], "p": p, "q": p}
        x = rearrange(tokens, f"b (h w) ({self._axes}) -> b (h p) (w q) c", **sizes)
        return x, tokens.new_zeros(len(tokens))


class PatchPCA(nn.Module):
    """Patches in the basis of a PCA fitted to a dataset (big_vision `models/proj/jetformer/patch_pca.py`).

    Args:
      image_shape: (H, W, C) of one image.
      patch_size: side of a patch in pixels.
      path: an `.npz` file of `python -m jetformer.fit_pca`, with arrays by scikit-learn's names: `components_`,
        `explained_variance_`, `mean_`. `init_weights` reads it from where `storage.find` finds it. None suffices to
        load a state dict.
      whiten: divide each component by its standard deviation.
      depth_to_seq: number of tokens that each patch's vector is split into.
      num_components: number of components to keep; None keeps all. With fewer the map is not invertible, and a
        likelihood of its codes is not a likelihood of pixels.

    Raises:
      ValueError: if sizes do not divide, or the file holds a PCA of another size.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        patch_size: PositiveInt,
        path: str | None = None,
        whiten: bool = True,
        depth_to_seq: PositiveInt = 1,
        num_components: PositiveInt | None = None,
    ):
        super().__init__()
        self.patchify = Patchify(image_shape, patch_size)
        num_components = num_components or self.patchify.dim
        if num_components % depth_to_seq:
            raise ValueError(f"depth_to_seq {depth_to_seq} does not divide the {num_components} PCA components")
        self.path, self.whiten, self.depth_to_seq = path, whiten, depth_to_seq
        self.grid = (depth_to_seq * self.patchify.grid[0], self.patchify.grid[1])
        self.num_tokens = depth_to_seq * self.patchify.num_tokens
        self.dim = num_components // depth_to_seq
        self.register_buffer("components", torch.empty(num_components, self.patchify.dim))
        self.register_buffer("explained_variance", torch.empty(num_components))
        self.register_buffer("mean", torch.empty(self.patchify.dim))

    def init_weights(self, generator: torch.Generator) -> None:
        del generator
        if self.path is None:
            raise ValueError("PatchPCA has no path: fit a PCA with python -m jetformer.fit_pca")
        with find(self.path).open("rb") as file, np.load(file, allow_pickle=False) as pca:
            for name, buffer in self.named_buffers(recurse=False):
                if f"{name}_" not in pca:
                    raise ValueError(f"{self.path} has no {name}_: fit a PCA with python -m jetformer.fit_pca")
                value = torch.from_numpy(pca[f"{name}_"])
                if value.shape != buffer.shape:
                    raise ValueError(
                        f"{self.path}: {name}_ has shape {tuple(value.shape)}, but patches of "
                        f"{self.patchify.patch_size} pixels and these components need {tuple(buffer.shape)}"
                    )
                buffer.copy_(value)

    def _std(self) -> Tensor:
        std = self.explained_variance.sqrt()
        return std.clamp(min=torch.finfo(std.dtype).eps) if self.whiten else torch.ones_like(std)

    def _logdet(self, x: Tensor) -> Tensor:
        logdet = -self.patchify.num_tokens * self._std().log().sum()
        return logdet.to(x.dtype).expand(len(x))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, H, W, C]` to codes `[B, L, D]` and log-determinants `[B]` in nats."""
        patches, _ = self.patchify(x)
        codes = (patches - self.mean) @ self.components.T / self._std()
        codes = rearrange(codes, "b s (f d) -> b (f s) d", f=self.depth_to_seq)
        return codes, self._logdet(x)

    def inverse(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `[B, L, D]` to the image `[B, H, W, C]`, not clipped, and log-determinants `[B]`."""
        y = rearrange(codes, "b (f s) d -> b s (f d)", f=self.depth_to_seq)
        x, _ = self.patchify.inverse((y * self._std()) @ self.components + self.mean)
        return x, -self._logdet(codes)


def fit_pca(images, patch_size: int, num_components: int | None = None):
    """Fits scikit-learn's PCA to all patches of a dataset, batch by batch.

    Args:
      images: iterable of uint8 batches `[B, H, W, C]`.
      patch_size: side of a patch in pixels.
      num_components: number of components to keep; None keeps all.

    Returns:
      A fitted `sklearn.decomposition.IncrementalPCA` of pixel values in [-1, 1].

    Raises:
      ValueError: if there are fewer patches than dimensions.
    """
    # Slow to import (1 to 6 s), and only `fit_pca` needs it.
    from sklearn.decomposition import IncrementalPCA

    pca = IncrementalPCA(n_components=num_components)
    waiting = []  # batches of patches; partial_fit needs at least as many patches as components
    for batch in images:
        x = torch.from_numpy(np.asarray(batch)).double() / 127.5 - 1
        patches, _ = Patchify(tuple(x.shape[1:]), patch_size)(x)
        waiting.append(patches.flatten(0, 1).numpy())
        # Keeps the newest batch, so that the last call has enough patches.
        if sum(map(len, waiting[:-1])) >= 8 * patches.shape[-1] and len(waiting[-1]) >= patches.shape[-1]:
            pca.partial_fit(np.concatenate(waiting[:-1]))
            waiting = waiting[-1:]
    rest = np.concatenate(waiting)
    if len(rest) < rest.shape[1]:
        raise ValueError(f"{len(rest)} patches are too few to fit a PCA of {rest.shape[1]} dimensions: use more images")
    pca.partial_fit(rest)
    return pca


def save_pca(pca, path: str) -> None:
    """Writes a fitted scikit-learn PCA as an `.npz` file for `PatchPCA.path`."""
    np.savez(
        path,
        components_=pca.components_.astype(np.float32),
        explained_variance_=pca.explained_variance_.astype(np.float32),
        mean_=pca.mean_.astype(np.float32),
    )
