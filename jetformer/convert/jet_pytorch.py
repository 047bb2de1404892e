"""Weights of the PyPI package jet-pytorch (0.0.2): Jet with exact GELU and a LayerNorm epsilon of 1e-5.

Files are a state dict in `.safetensors` (on the Hub: `btrude/jet_imagenet64x64_200m`), or a training checkpoint `.pt`
with `model`, `opt` and `epoch`. Permutations are one-hot matrices, in one tensor for channels and one for tokens, in
the order of the couplings. The weights do not determine the number of attention heads, the scale factor, and the order
of the two kinds of couplings.
"""

import itertools
import math

import torch
from torch import Tensor

from jetformer.convert.pickles import check_axes, count, load_pt, load_safetensors, state_dict
from jetformer.convert.sources import Source, Table, permutation, predictor_table, predictors
from jetformer.convert.weights import Weights, data, gin_text, patches, training
from jetformer.models.jet import Jet, spatial_permutation

MODELS = (Jet,)

# The package's defaults, which the weights on the Hub use.
_KINDS = ("channels", "channels", "channels", "channels", "spatial")
_WIDTH, _NUM_HEADS, _SCALE_FACTOR = 512, 8, 2.0
_LAYERS = {
    "norm1": "ln1.{}",
    "attn.qkv": "mha.in_proj_{}",
    "attn.out": "mha.out_proj.{}",
    "norm2": "ln2.{}",
    "mlp.fc1": "mlp.in_proj.{}",
    "mlp.fc2": "mlp.out_proj.{}",
}
_PROJECTIONS = {"channels": "channel_projections", "spatial": "spatial_projections"}
_SPATIAL = [f"{kind}{inverse}" for kind in ("checkerboard", "vstripes", "hstripes") for inverse in ("", "-inv")]


def read(path: str, step: int | None = None) -> Weights:
    """Reads a `.safetensors` or a `.pt`.

    Args:
      path: of the file.
      step: of training; None: unknown.

    Raises:
      ValueError: if the file is damaged, or is not jet-pytorch's.
    """
    if path.endswith(".safetensors"):
        tensors = load_safetensors(path)[0]
    else:
        content = load_pt(path)
        tensors = state_dict(content.get("model", content), path)
    weights = experiment(tensors, path, step)
    for name in _PROJECTIONS.values():  # a tensor for each projection
        projections = weights.tensors.pop(name)
        weights.tensors |= {f"{name}.{i}": projection for i, projection in enumerate(projections)}
    return weights


def table(model: Jet, weights: Weights) -> tuple[Table, set[str]]:
    """Returns the source of each tensor of a model; no names in the source are to be ignored."""
    del weights
    found: Table = {}
    counts = {"channels": 0, "spatial": 0}
    for i, (coupling, dnn) in enumerate(zip(model.couplings, predictors(model), strict=True)):
        size, number = len(coupling.permutation), counts[coupling.kind]
        counts[coupling.kind] += 1
        found[f"couplings.{i}.permutation"] = Source(
            {f"{_PROJECTIONS[coupling.kind]}.{number}": (size, size)}, permutation
        )
        prefixes = f"couplings.{i}.dnn", f"blocks.{i}.dnn"
        names = {"posemb": "pos_emb", "norm": "encoder.ln", "blocks": "encoder.blocks"}
        found |= predictor_table(*prefixes, dnn, **names, layers=_LAYERS)
    return found, set()


def experiment(tensors: dict[str, Tensor], path: str, step: int | None = None) -> Weights:
    """Returns a state dict with the experiment that the shapes of its tensors determine.

    Args:
      tensors: the state dict.
      path: of its file, for messages.
      step: of training; None: unknown.

    Raises:
      ValueError: if it is not a state dict of jet-pytorch.
    """
    axes = {
        "blocks.0.dnn.pos_emb": 3,
        "blocks.0.dnn.final_proj.weight": 2,
        "channel_projections": 3,
        "spatial_projections": 3,
    }
    check_axes(tensors, axes, path, "jet-pytorch")
    _, num_tokens, width = tensors["blocks.0.dnn.pos_emb"].shape
    dim = len(tensors["blocks.0.dnn.final_proj.weight"])
    depth, block_depth = count(tensors, "blocks."), count(tensors, "blocks.0.dnn.encoder.blocks.")
    numbers = {kind: len(tensors[name]) for kind, name in _PROJECTIONS.items()}
    bindings = {
        "train.model": "@Jet",
        "train.objective": "@JetObjective()",
        "train.evaluators": {"val": "@Likelihood()"},
        "Jet.depth": depth,
        "Jet.block_depth": block_depth,
        "Jet.emb_dim": width,
        "Jet.scale_factor": _SCALE_FACTOR,
        "Jet.gelu": "exact",
        "Jet.norm_eps": 1e-5,
    }
    default = lambda binding: f"{binding}, the package's default: the weights do not determine it"
    image_bindings, needs = patches("Jet", num_tokens, dim)
    bindings |= image_bindings
    notes = [default(f"Jet.scale_factor = {_SCALE_FACTOR}")]

    if width == _WIDTH:
        bindings["Jet.num_heads"] = _NUM_HEADS
        notes.append(default(f"Jet.num_heads = {_NUM_HEADS}"))
    else:
        needs["Jet.num_heads"] = "the number of attention heads"

    if sum(numbers.values()) != depth:
        raise ValueError(
            f"{path} has {depth} couplings, but permutations for {numbers['channels']} channel and "
            f"{numbers['spatial']} spatial ones"
        )
    kinds = tuple(itertools.islice(itertools.cycle(_KINDS), depth))
    if 0 in numbers.values():
        bindings["Jet.kinds"] = ("channels",) if numbers["channels"] else ("spatial",)
    elif all(kinds.count(kind) == number for kind, number in numbers.items()):
        bindings["Jet.kinds"] = _KINDS
        notes.append(default(f"Jet.kinds = {_KINDS}"))
    else:
        needs["Jet.kinds"] = f"the order of {numbers['channels']} channel and {numbers['spatial']} spatial couplings"

    side = math.isqrt(num_tokens)
    if "Jet.input_shape" in bindings and (names := _spatial_names(tensors["spatial_projections"], side)):
        bindings["Jet.spatial_coupling_projs"] = names
    size = bindings.get("Jet.input_shape", (64, 64))[:2]
    bindings |= training(step) | data(None, size, labels=False)
    return Weights(dict(tensors), gin_text(bindings), needs=needs, notes=notes)


def _spatial_names(projections: Tensor, side: int) -> tuple[str, ...] | None:
    """Returns the names of permutations of tokens, or None if one has no name: the weights hold them in any case."""
    if side % 2:
        return None
    known = {name: spatial_permutation(name, (side, side)) for name in _SPATIAL}
    names = []
    for projection in projections:
        order = projection.argmax(0)
        names.append(next((name for name, other in known.items() if torch.equal(order, other)), None))
    return None if None in names else tuple(names)
