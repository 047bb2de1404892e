"""Weights of the PyPI package jet-pytorch (0.0.2): Jet with exact GELU and a LayerNorm epsilon of 1e-5.

Its state dict comes as `.safetensors` (on the Hub: `btrude/jet_imagenet64x64_200m`) or in a training checkpoint `.pt`
with `model`, `opt` and `epoch`. Permutations are one-hot matrices, those of channels and those of tokens each in a
tensor of their own, in the order of the couplings. Of what the model is built with, the state dict does not tell the
number of attention heads, the scale factor, and in which order both kinds of couplings come.
"""

import itertools
import math

import torch
from torch import Tensor

from jetformer.convert.experiment import Weights, data, gin_text, training
from jetformer.convert.pickles import load_pt, load_safetensors, state_dict
from jetformer.convert.sources import Source, Table, permutation, predictors, shown
from jetformer.models.jet import Jet, spatial_permutation

MODELS = (Jet,)

# The package's defaults, which the weights on the Hub have.
_KINDS = ("channels", "channels", "channels", "channels", "spatial")
_WIDTH, _NUM_HEADS, _SCALE_FACTOR = 512, 8, 2.0
_PROJECTIONS = {"channels": "channel_projections", "spatial": "spatial_projections"}
_SPATIAL = [f"{kind}{inverse}" for kind in ("checkerboard", "vstripes", "hstripes") for inverse in ("", "-inv")]


def read(path: str, step: int | None = None) -> Weights:
    """Reads a `.safetensors` or a `.pt`.

    Args:
      path: of the file.
      step: of training, where it is known.

    Raises:
      ValueError: if there is no such file, it cannot be read, or it holds something else.
    """
    if path.endswith(".safetensors"):
        tensors = load_safetensors(path)[0]
    else:
        content = load_pt(path)
        tensors = state_dict(content.get("model", content), path)
    return _unstacked(_experiment(tensors, path, step))


def table(model: Jet, weights: Weights) -> tuple[Table, set[str]]:
    """Where the tensors of a model come from."""
    del weights
    found: Table = {}
    counts = {"channels": 0, "spatial": 0}
    for i, (coupling, dnn) in enumerate(zip(model.couplings, predictors(model), strict=True)):
        here, there = f"couplings.{i}", f"blocks.{i}.dnn"
        size, number = len(coupling.permutation), counts[coupling.kind]
        counts[coupling.kind] += 1
        found[f"{here}.permutation"] = Source({f"{_PROJECTIONS[coupling.kind]}.{number}": (size, size)}, permutation)
        names = {"posemb": "pos_emb"}
        for part in ("weight", "bias"):
            names |= {f"{name}.{part}": f"{name}.{part}" for name in ("init_proj", "final_proj")}
            names[f"vit.norm.{part}"] = f"encoder.ln.{part}"
            for j in range(len(dnn.vit.blocks)):
                ours, theirs = f"vit.blocks.{j}", f"encoder.blocks.{j}"
                names |= {
                    f"{ours}.norm1.{part}": f"{theirs}.ln1.{part}",
                    f"{ours}.attn.qkv.{part}": f"{theirs}.mha.in_proj_{part}",
                    f"{ours}.attn.out.{part}": f"{theirs}.mha.out_proj.{part}",
                    f"{ours}.norm2.{part}": f"{theirs}.ln2.{part}",
                    f"{ours}.mlp.fc1.{part}": f"{theirs}.mlp.in_proj.{part}",
                    f"{ours}.mlp.fc2.{part}": f"{theirs}.mlp.out_proj.{part}",
                }
        shapes = {name: tuple(p.shape) for name, p in dnn.named_parameters()}
        found |= {f"{here}.dnn.{ours}": Source({f"{there}.{name}": shapes[ours]}) for ours, name in names.items()}
    return found, set()


def _unstacked(weights: Weights) -> Weights:
    """A tensor for each projection."""
    for name in _PROJECTIONS.values():
        projections = weights.tensors.pop(name)
        weights.tensors |= {f"{name}.{i}": projection for i, projection in enumerate(projections)}
    return weights


def _experiment(tensors: dict[str, Tensor], path: str, step: int | None = None) -> Weights:
    """What the tensors' shapes tell of the model."""
    shape_of = {name: tuple(x.shape) for name, x in tensors.items()}
    dimensions = {
        "blocks.0.dnn.pos_emb": 3,
        "blocks.0.dnn.final_proj.weight": 2,
        "channel_projections": 3,
        "spatial_projections": 3,
    }
    for name, ndim in dimensions.items():
        if len(shape_of.get(name, ())) != ndim:
            has = f"its shape is {shown(tensors[name])}" if name in tensors else "it is missing"
            raise ValueError(f"{path} is no state dict of jet-pytorch: {name} should have {ndim} axes, and {has}")
    _, num_tokens, width = shape_of["blocks.0.dnn.pos_emb"]
    dim = shape_of["blocks.0.dnn.final_proj.weight"][0]
    count = lambda prefix: len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})
    depth, block_depth = count("blocks."), count("blocks.0.dnn.encoder.blocks.")
    numbers = {kind: shape_of[name][0] for kind, name in _PROJECTIONS.items()}
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
    needs, notes = (
        {},
        [f"taken, for the weights do not tell: Jet.scale_factor = {_SCALE_FACTOR}, the package's default"],
    )

    if width == _WIDTH:
        bindings["Jet.num_heads"] = _NUM_HEADS
        notes.append(f"taken, for the weights do not tell: Jet.num_heads = {_NUM_HEADS}, the package's default")
    else:
        needs["Jet.num_heads"] = "how many attention heads there are"

    if sum(numbers.values()) != depth:
        raise ValueError(
            f"{path} has {depth} couplings, but permutations for {numbers['channels']} of channels and "
            f"{numbers['spatial']} of tokens"
        )
    kinds = tuple(itertools.islice(itertools.cycle(_KINDS), depth))
    if 0 in numbers.values():
        bindings["Jet.kinds"] = ("channels",) if numbers["channels"] else ("spatial",)
    elif all(kinds.count(kind) == number for kind, number in numbers.items()):
        bindings["Jet.kinds"] = _KINDS
        notes.append(f"taken, for the weights do not tell: Jet.kinds = {_KINDS}, the package's default")
    else:
        needs["Jet.kinds"] = (
            f"in which order {numbers['channels']} couplings of channels and {numbers['spatial']} of tokens come"
        )

    side, patch_size = math.isqrt(num_tokens), math.isqrt(dim // 3)
    size = (64, 64)
    if 3 * patch_size**2 == dim:
        bindings["Jet.ps"] = patch_size
    else:
        needs["Jet.ps"] = f"which patches have {dim} numbers"
    if side**2 == num_tokens and "Jet.ps" in bindings:
        size = (side * patch_size, side * patch_size)
        bindings["Jet.input_shape"] = (*size, 3)
        if names := _spatial_names(tensors["spatial_projections"], side):
            bindings["Jet.spatial_coupling_projs"] = names
    else:
        needs["Jet.input_shape"] = f"which image has {num_tokens} patches"
    bindings |= training(step) | data(None, size, labels=False)
    return Weights(dict(tensors), gin_text(bindings), needs=needs, notes=notes)


def _spatial_names(projections: Tensor, side: int) -> tuple[str, ...] | None:
    """What permutations of tokens are called; None where one of them has no name. They are in the weights, too."""
    if side % 2:
        return None
    known = {name: spatial_permutation(name, (side, side)) for name in _SPATIAL}
    names = []
    for projection in projections:
        order = projection.argmax(0)
        names.append(next((name for name, other in known.items() if torch.equal(order, other)), None))
    return None if None in names else tuple(names)
