"""Parameters of big_vision's JetFormer, Jet and PatchPCA.

A file is an `.npz` with an array for each `a/b/c`, or a directory `….bv-000012345` with a Zarr array for each `a~b~c`.
It holds parameters alone, or a training state with parameters under `params/`. A flax kernel is [in, out], a PyTorch
weight [out, in].
"""

import re
import zipfile
from collections.abc import Mapping

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from upath import UPath

from jetformer.convert.sources import Source, Table, assemble, permutation, predictors
from jetformer.convert.weights import Weights
from jetformer.models.jet import Jet
from jetformer.models.jetformer import JetFormer
from jetformer.models.mixture import MixtureHead
from jetformer.models.patches import PatchPCA
from jetformer.models.vit import CrossAttention, SelfAttention

# Names of layers that may be stacked along the first axis, and the names of single layers.
_STACKED = (
    (re.compile(r"(.*couplings|decoder/layers)/(?!\d+/)(.+)"), "{0}/{i}/{1}"),
    (re.compile(r"(.*coupling_masks-FREEZE_ME)"), "{0}/{i}"),
    (re.compile(r"(.*/vit/encoderblock)/(.+)"), "{0}_{i}/{1}"),
)
MODELS = (JetFormer, Jet, PatchPCA)
_MASKS = {"channels": "channel_coupling_masks-FREEZE_ME", "spatial": "spatial_coupling_masks-FREEZE_ME"}


def from_big_vision(params: Mapping[str, np.ndarray], model: nn.Module, partial: bool = True) -> dict[str, Tensor]:
    """Maps big_vision's flat parameters (`a/b/c` names) to the state dict of `model`.

    The map is linear, so it also maps gradients (without the frozen permutations).

    Args:
      params: arrays by name; layers are stacked along a leading axis or not.
      model: a `JetFormer`, `Jet` or `PatchPCA` of the same configuration; may be on the meta device.
      partial: allow missing parameters, and leave out their tensors.

    Returns:
      A state dict.

    Raises:
      ValueError: for a parameter that is unknown, missing, or has another shape.
      TypeError: for another model.
    """
    if not isinstance(model, MODELS):
        raise TypeError(f"expected a {', '.join(m.__name__ for m in MODELS)}, not a {type(model).__name__}")
    sources, unused = _sources(model)
    return assemble(sources, _tensors(params), type(model).__name__, unused, partial)


def image_head_order(num_mixtures: int, dim: int) -> Tensor:
    """Returns the positions of this project's image-head outputs `[P]` in big_vision's, which interleave means and
    scales."""
    rest = torch.arange(num_mixtures * 2 * dim).view(num_mixtures, 2, dim)
    return torch.cat((torch.arange(num_mixtures), num_mixtures + rest.transpose(0, 1).flatten()))


def unstacked(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the parameters layer by layer."""
    for pattern, name_of in _STACKED:
        layers = {}
        for name, value in params.items():
            if (match := pattern.fullmatch(name)) and value.ndim:
                layers |= {name_of.format(*match.groups(), i=i): layer for i, layer in enumerate(value)}
            else:
                layers[name] = value
        params = layers
    return dict(params)


def table(model: nn.Module, weights: Weights) -> tuple[Table, set[str]]:
    """Returns the source of each tensor of a model, and the names in the source to ignore.

    big_vision keeps a PCA in a file of its own. It is read here, from the `PatchPCA.path` of a JetFormer.
    """
    patches = getattr(model, "patches", None)
    if isinstance(patches, PatchPCA) and patches.path is not None:
        arrays = _read_npz(patches.path)
        weights.tensors |= _tensors(
            {k: arrays[k] for k in ("components_", "explained_variance_", "mean_") if k in arrays}
        )
    return _sources(model)


def _tensors(params: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in unstacked(params).items()}


def _sources(model: nn.Module) -> tuple[Table, set[str]]:
    if isinstance(model, Jet):
        return _jet(model)
    if isinstance(model, JetFormer):
        return _jetformer(model)
    return _pca(model), set()


def _linear(ours: str, theirs: str, linear: nn.Linear) -> Table:
    shape = (linear.in_features, linear.out_features)
    return {
        f"{ours}.weight": Source({f"{theirs}/kernel": shape}, lambda w: w.T),
        f"{ours}.bias": Source({f"{theirs}/bias": shape[1:]}),
    }


def _layer_norm(ours: str, theirs: str, norm: nn.LayerNorm) -> Table:
    shape = tuple(norm.normalized_shape)
    return {f"{ours}.weight": Source({f"{theirs}/scale": shape}), f"{ours}.bias": Source({f"{theirs}/bias": shape})}


def _attention(ours: str, theirs: str, attention: SelfAttention | CrossAttention) -> Table:
    """Returns the table of flax's `MultiHeadDotProductAttention`, with a matrix for each of query, key and value."""
    width, num_heads = attention.out.in_features, attention.num_heads
    heads = (num_heads, width // num_heads)
    if isinstance(attention, CrossAttention):
        groups = {"query": ("query",), "key_value": ("key", "value")}
    else:
        groups = {"qkv": ("query", "key", "value")}
    table = {
        f"{ours}.out.weight": Source(
            {f"{theirs}/out/kernel": (*heads, width)}, lambda w: rearrange(w, "n h d -> d (n h)")
        ),
        f"{ours}.out.bias": Source({f"{theirs}/out/bias": (width,)}),
    }
    for target, parts in groups.items():
        in_features = getattr(attention, target).in_features
        table |= {
            f"{ours}.{target}.weight": Source(
                {f"{theirs}/{part}/kernel": (in_features, *heads) for part in parts},
                lambda w: rearrange(w, "d n h -> (n h) d"),
            ),
            f"{ours}.{target}.bias": Source({f"{theirs}/{part}/bias": heads for part in parts}, lambda b: b.flatten()),
        }
    return table


def _jet(model: Jet, ours: str = "", theirs: str = "") -> tuple[Table, set[str]]:
    """Returns the table of a flow; `ours` and `theirs` are prefixes of all names."""
    table, unused = {}, set()
    for i, (coupling, dnn) in enumerate(zip(model.couplings, predictors(model), strict=True)):
        size = len(coupling.permutation)
        table[f"{ours}couplings.{i}.permutation"] = Source(
            {f"{theirs}{_MASKS[coupling.kind]}/{i}": (size, size)}, permutation
        )
        # Each coupling has masks of both kinds; that of the other kind is zero.
        unused |= {f"{theirs}{mask}/{i}" for kind, mask in _MASKS.items() if kind != coupling.kind}
        here, there = f"{ours}couplings.{i}.dnn", f"{theirs}couplings/{i}/dnn"
        table[f"{here}.posemb"] = Source({f"{there}/posemb": tuple(dnn.posemb.shape)})
        table |= _linear(f"{here}.init_proj", f"{there}/init_proj", dnn.init_proj)
        table |= _linear(f"{here}.final_proj", f"{there}/final_proj", dnn.final_proj)
        if dnn.cross_attn is not None:
            table |= _attention(f"{here}.cross_attn", f"{there}/MultiHeadDotProductAttention_0", dnn.cross_attn)
        for j, block in enumerate(dnn.vit.blocks):
            here_j, there_j = f"{here}.vit.blocks.{j}", f"{there}/vit/encoderblock_{j}"
            table |= _layer_norm(f"{here_j}.norm1", f"{there_j}/LayerNorm_0", block.norm1)
            table |= _attention(f"{here_j}.attn", f"{there_j}/MultiHeadDotProductAttention_0", block.attn)
            table |= _layer_norm(f"{here_j}.norm2", f"{there_j}/LayerNorm_1", block.norm2)
            table |= _linear(f"{here_j}.mlp.fc1", f"{there_j}/MlpBlock_0/Dense_0", block.mlp.fc1)
            table |= _linear(f"{here_j}.mlp.fc2", f"{there_j}/MlpBlock_0/Dense_1", block.mlp.fc2)
        table |= _layer_norm(f"{here}.vit.norm", f"{there}/vit/encoder_norm", dnn.vit.norm)
    return table, unused


def _jetformer(model: JetFormer) -> tuple[Table, set[str]]:
    width = model.decoder.width
    table: Table = {"text_emb.weight": Source({"EmbedText/embedding": tuple(model.text_emb.weight.shape)})}
    table |= _linear("image_emb", "EmbedImage", model.image_emb)
    head = model.image_head
    order = slice(None)
    if isinstance(head, MixtureHead):
        order = image_head_order(head.num_mixtures, model.out_dim)
    table |= {
        "image_head.linear.weight": Source(
            {"LogitsImage/kernel": (width, head.linear.out_features)}, lambda w: w.T[order]
        ),
        "image_head.linear.bias": Source({"LogitsImage/bias": (head.linear.out_features,)}, lambda b: b[order]),
    }
    if model.text_head is not None:
        table |= _linear("text_head", "LogitsText", model.text_head)
    unused = set()
    if model.final_norm is None:
        unused.add("decoder/final_norm/scale")  # exists, but is unused with a norm for each modality
        table["text_norm.weight"] = Source({"TextNorm/scale": (width,)})
        table["image_norm.weight"] = Source({"ImageNorm/scale": (width,)})
    else:
        table["final_norm.weight"] = Source({"decoder/final_norm/scale": (width,)})
    for i, block in enumerate(model.decoder.blocks):
        here, there = f"decoder.blocks.{i}", f"decoder/layers/{i}"
        n, k, h = block.attn.num_heads, block.attn.num_kv_heads, block.attn.head_dim
        if n == k:
            qkv = {f"{there}/attn/qkv_einsum/w": (3, n, width, h)}
        else:
            qkv = {f"{there}/attn/q_einsum/w": (n, width, h), f"{there}/attn/kv_einsum/w": (2, k, width, h)}
        mlp_dim = block.mlp.linear.in_features
        table |= {
            f"{here}.attn.qkv.weight": Source(qkv, lambda w: rearrange(w, "... d h -> (... h) d")),
            f"{here}.attn.out.weight": Source(
                {f"{there}/attn/attn_vec_einsum/w": (n, h, width)}, lambda w: rearrange(w, "n h d -> d (n h)")
            ),
            f"{here}.mlp.gate_up.weight": Source(
                {f"{there}/mlp/gating_einsum": (2, width, mlp_dim)}, lambda w: rearrange(w, "s d m -> (s m) d")
            ),
            f"{here}.mlp.linear.weight": Source({f"{there}/mlp/linear": (mlp_dim, width)}, lambda w: w.T),
            f"{here}.pre_attention_norm.weight": Source({f"{there}/pre_attention_norm/scale": (width,)}),
            f"{here}.pre_mlp_norm.weight": Source({f"{there}/pre_ffw_norm/scale": (width,)}),
        }
    if isinstance(model.flow, Jet):
        flow, unused_of_flow = _jet(model.flow, "flow.", "params_adaptor/")
        table, unused = table | flow, unused | unused_of_flow
    if isinstance(model.patches, PatchPCA):
        table |= _pca(model.patches, "patches.")
    return table, unused


def _pca(model: PatchPCA, ours: str = "") -> Table:
    buffers = dict(model.named_buffers(recurse=False))
    return {f"{ours}{name}": Source({f"{name}_": tuple(buffer.shape)}) for name, buffer in buffers.items()}


def read(path: str) -> Weights:
    """Reads parameters.

    Args:
      path: of a `.npz` or a directory `….bv-000012345`, or `….bv` if `….bv-LAST` names the step. Local or gs://.

    Returns:
      The parameters layer by layer, and the step in the directory's name.

    Raises:
      ValueError: if there is no such file, or it cannot be read.
    """
    pointer = UPath(f"{path}-LAST")
    if not UPath(path).exists() and pointer.exists():
        path = f"{path}-{pointer.read_text().strip()}"
    if not UPath(path).exists():
        raise ValueError(f"{path} does not exist")
    step = None
    if UPath(path).is_dir():
        arrays = _read_directory(path.rstrip("/"))
        if match := re.search(r"-(\d+)(-tmp)?$", path.rstrip("/")):
            step = int(match[1])
    else:
        arrays = _read_npz(path)
    arrays = {name: _recovered(name, array) for name, array in _parameters(arrays).items()}
    if not arrays:
        raise ValueError(f"{path} holds no parameters")
    return Weights(_tensors(arrays), step=step)


def _parameters(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the parameters of a training state, or all arrays if they are not a training state."""
    for prefix in ("params/", "opt/target/"):
        if found := {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}:
            return found
    return arrays


def _recovered(name: str, array: np.ndarray) -> np.ndarray:
    """Returns an array as float32; numpy stores bfloat16 as two bytes of an unknown type."""
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    try:
        return array.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} holds {array.dtype}, expected numbers") from error


def _read_npz(path: str) -> dict[str, np.ndarray]:
    try:
        with UPath(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return dict(file)
    except (ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an .npz of arrays, or damaged: {error}") from error


def _read_directory(path: str) -> dict[str, np.ndarray]:
    try:
        import tensorstore  # not installed by default
    except ImportError as error:
        raise ImportError(f"reading {path} needs tensorstore: pip install tensorstore") from error
    if path.startswith("gs://"):
        bucket, _, root = path.removeprefix("gs://").partition("/")
        store = {"driver": "gcs", "bucket": bucket}
    else:
        store, root = {"driver": "file"}, path
    names = sorted(entry.name for entry in UPath(path).iterdir() if entry.is_dir())
    # Parameters are a third of a training state.
    names = [name for name in names if name.startswith("params~")] or names
    arrays = {}
    for name in names:
        spec = {"driver": "zarr", "kvstore": {**store, "path": f"{root}/{name}/"}}
        try:
            arrays[name.replace("~", "/")] = tensorstore.open(spec, open=True, read=True).result().read().result()
        except ValueError as error:  # its message ends with details of the library's source
            raise ValueError(f"{path}/{name} cannot be read as an array: {str(error).partition(' [')[0]}") from error
    return arrays
