"""Weights of apple/ml-tarflow (commit 313120e): TarFlow (arXiv 2412.06329), alone or given class labels.

A file is the state dict that its train.py saves as `….pth`; another one holds the optimizer. The weights do not
determine the number of attention heads, the noise of training, and the data of labels other than ImageNet's.

Notable: with uniform noise (`--noise_type=uniform`) its train.py maps a pixel p to (p + noise) / 128 - 1, which is
(p + noise) / 127.5 - 1 here.
"""

import torch
from torch import Tensor

from jetformer.convert.pickles import check_axes, count, load_pt, state_dict
from jetformer.convert.sources import Source, Table
from jetformer.convert.weights import Weights, data, gin_text, patches, training
from jetformer.models.labelled import LabelledFlow
from jetformer.models.tarflow import TarFlow

MODELS = (TarFlow, LabelledFlow)

# The code's default, which its programs do not change.
_HEAD_DIM = 64
_IMAGENET = "imagenet2012", 1000  # name in TFDS, and number of classes
_BLOCK = {"init_proj": "proj_in", "final_proj": "proj_out"}
_LAYER = {
    "norm1": "attention.norm",
    "attn.qkv": "attention.qkv",
    "attn.out": "attention.proj",
    "norm2": "mlp.norm",
    "mlp.fc1": "mlp.main.0",
    "mlp.fc2": "mlp.main.2",
}


def read(path: str, step: int | None = None) -> Weights:
    """Reads a `.pth`.

    Args:
      path: of the file.
      step: of training; None: unknown.

    Raises:
      ValueError: if the file is damaged, is not ml-tarflow's, or is of a flow that preserves volume.
    """
    return experiment(state_dict(load_pt(path), path), path, step)


def table(model: TarFlow | LabelledFlow, weights: Weights) -> tuple[Table, set[str]]:
    """Returns the source of each tensor of a model, and the names in the source to ignore.

    Raises:
      ValueError: if the model is another flow given labels.
    """
    del weights
    flow, prefix = (model.flow, "flow.") if isinstance(model, LabelledFlow) else (model, "")
    if not isinstance(flow, TarFlow):
        raise ValueError(f"weights of ml_tarflow need LabelledFlow.flow = @TarFlow, not a {type(flow).__name__}")
    shapes = {name: tuple(p.shape) for name, p in flow.named_parameters()}
    found: Table = {}
    for i, block in enumerate(flow.blocks):
        here = f"blocks.{i}"
        names = {f"{here}.posemb": f"{here}.pos_embed"}
        for part in ("weight", "bias"):
            names |= {f"{here}.{ours}.{part}": f"{here}.{theirs}.{part}" for ours, theirs in _BLOCK.items()}
            for j in range(len(block.layers)):
                names |= {
                    f"{here}.layers.{j}.{ours}.{part}": f"{here}.attn_blocks.{j}.{theirs}.{part}"
                    for ours, theirs in _LAYER.items()
                }
        found |= {f"{prefix}{ours}": Source({theirs: shapes[ours]}) for ours, theirs in names.items()}
        if block.context_proj is not None:
            width, num_labels = block.context_proj.weight.shape
            source = Source({f"{here}.class_embed": (num_labels, 1, width)}, lambda x: x[:, 0].T)
            found[f"{prefix}{here}.context_proj.weight"] = source
    return found, {"var", *(f"blocks.{i}.attn_mask" for i in range(len(flow.blocks)))}


def experiment(tensors: dict[str, Tensor], path: str, step: int | None = None) -> Weights:
    """Returns a state dict with the experiment that the shapes of its tensors determine.

    Args:
      tensors: the state dict.
      path: of its file, for messages.
      step: of training; None: unknown.

    Raises:
      ValueError: if it is not a state dict of ml-tarflow, or is of a flow that preserves volume.
    """
    axes = {"blocks.0.pos_embed": 2, "blocks.0.proj_in.weight": 2, "blocks.0.proj_out.weight": 2, "var": 2}
    if "blocks.0.class_embed" in tensors:
        axes["blocks.0.class_embed"] = 3
    check_axes(tensors, axes, path, "ml-tarflow")
    num_tokens, width = tensors["blocks.0.pos_embed"].shape
    dim = tensors["blocks.0.proj_in.weight"].shape[1]
    if len(tensors["blocks.0.proj_out.weight"]) == dim:
        raise ValueError(f"{path}: a flow without scales (--no-nvp), which preserves volume, is not supported")
    causal = torch.ones(num_tokens, num_tokens).tril()
    for name, mask in tensors.items():
        if name.endswith(".attn_mask") and not torch.equal(mask, causal.to(mask)):
            raise ValueError(f"{path}: {name} is not a lower triangle of ones: only causal attention is supported")
    notes = [
        f"{path} does not determine the noise of its training: bind JetObjective.noise_std for Gaussian noise. With "
        "uniform noise a pixel p was mapped to (p + noise) / 128 - 1, and is mapped to (p + noise) / 127.5 - 1 here: "
        "bits per dim differ"
    ]
    if not (tensors["var"] == 1).all():
        notes.append(f"{path}: var is ignored: latents of samples have variance 1 here")
    bindings = {
        "train.model": "@TarFlow",
        "train.objective": "@JetObjective()",
        "train.evaluators": {"val": "@Likelihood()"},
        "TarFlow.depth": count(tensors, "blocks."),
        "TarFlow.block_depth": count(tensors, "blocks.0.attn_blocks."),
        "TarFlow.emb_dim": width,
    }
    image_bindings, needs = patches("TarFlow", num_tokens, dim)
    bindings |= image_bindings
    if width % _HEAD_DIM:
        needs["TarFlow.num_heads"] = "the number of attention heads"
    else:
        bindings["TarFlow.num_heads"] = width // _HEAD_DIM
        notes.append(f"TarFlow.num_heads = {width // _HEAD_DIM}, heads of {_HEAD_DIM} dimensions as the code has them")

    labels = "blocks.0.class_embed" in tensors
    size = bindings.get("TarFlow.input_shape", (64, 64))[:2]
    images = data(_IMAGENET[0] if labels else None, size, labels)
    if labels:
        num_labels = len(tensors["blocks.0.class_embed"])
        bindings |= {
            "train.model": "@LabelledFlow",
            "LabelledFlow.flow": "@TarFlow",
            "LabelledFlow.num_labels": num_labels,
            "LabelledFlow.context_dim": None,
        }
        if num_labels != _IMAGENET[1]:
            del images["Data.name"]
            needs["Data.name"] = f"the images of its {num_labels} classes"
    return Weights(tensors, gin_text(bindings | training(step) | images), needs=needs, notes=notes)
