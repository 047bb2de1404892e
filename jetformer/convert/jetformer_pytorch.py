"""Checkpoints of alexojica/JetFormer.

Files are a `.pt` with `model_state_dict`, `config` and sometimes `ema_state_dict`, and the `config` as YAML. There are
three formats:
  - no `format_version`, up to its commit 6bdd607 (on the Hub: `mojique/jetformer-cifar10`). Differences from the
    reference: GELU is exact; the gated MLP activates its other branch; LayerNorm's epsilon is 1e-5; a token holds its
    patch channel by channel; RMSNorm multiplies by the weight instead of 1 + weight; channel couplings do not permute,
    so each changes the same half;
  - `format_version` 5, from before its package of 2026-09: it computes what the reference does, and saves permutations;
  - `format_version` 6, of its versions 0.1 (on the Hub: `mojique/jetformer-cifar10-32-42m`): it computes what format 5
    does, has other names of tensors and of the configuration's keys, and one tensor for projections of one input.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import yaml
from torch import Tensor
from upath import UPath

from jetformer.convert.big_vision import image_head_order
from jetformer.convert.pickles import load_pt, state_dict
from jetformer.convert.sources import Source, Table, predictor_table, predictors
from jetformer.convert.weights import Weights, data, gin_text, training
from jetformer.models.jet import Jet
from jetformer.models.jetformer import JetFormer

MODELS = (JetFormer,)

# Names of a ViT block's layers, see `predictor_table`.
_LAYERS = {
    "norm1": "norm1.{}",
    "attn.qkv": "attn.in_proj_{}",
    "attn.out": "attn.out_proj.{}",
    "norm2": "norm2.{}",
    "mlp.fc1": "mlp.fc1.{}",
    "mlp.fc2": "mlp.fc2.{}",
}

# Parts of names in format 6, by those of the formats before it; "" if it leaves them out. Tensors that have one name in
# format 6 are one tensor there, in this order.
_PARTS_6 = {
    **{"text_emb": "token_emb", "img_head": "image_head", "transformer": "blocks", "adaptor": "", "dnn": "net"},
    **{"w_q": "qkv", "w_k": "qkv", "w_v": "qkv", "w_o": "out", "w_gate": "gate_up", "w_up": "gate_up"},
    **{"w_linear": "down", "vit_encoder": "", "layers": "blocks", "out_proj": "out"},
    **{"in_proj_weight": "qkv.weight", "in_proj_bias": "qkv.bias"},
}

# Likewise, keys of the configuration.
_KEYS_6 = {
    "patch_pca.model.patch_size": "image.patch_size",
    "patch_pca.model.codeword_dim": "image.ar_dim",
    "patch_pca.model.add_dequant_noise": "image.dequant_noise",
    "model.num_vocab_repeats": "model.num_class_repeats",
    **{
        f"adaptor.model.{key}": f"flow.{key}"
        for key in ("depth", "block_depth", "emb_dim", "num_heads", "kinds", "spatial_coupling_projs")
    },
}

# TFDS names by the YAML's names of datasets.
_DATA = {"cifar10": "cifar10", "imagenet64_tfds": "imagenet_resized/64x64", "imagenet1k_hf": "imagenet2012"}

# YAML keys with a single supported value, and the effect of other values.
_ONLY: dict[str, tuple[Any, str]] = {
    "adaptor.model.actnorm": (False, "normalizes activations between couplings"),
    "adaptor.model.invertible_dense": (False, "multiplies channels between couplings"),
    "adaptor.model.backbone": ("vit", "predicts with another network"),
    "adaptor.model.masking_mode": ("masking", "permutes channels at random, and does not save how"),
    "adaptor.model.ps": (1, "cuts the flow's input into patches once more"),
    "jetformer_training_mode": ("pca", "builds another model"),
    "patch_pca.model.depth_to_seq": (1, "cuts tokens into several"),
}

# The same, for formats 5 and 6 alone.
_ONLY_VERSIONED: dict[str, tuple[Any, str]] = {
    "use_adaptor": (True, "leaves out the flow"),
    "adaptor.kind": ("jet", "uses another flow"),
    "model.causal_mask_on_prefix": (True, "lets tokens attend to the whole prefix"),
    "model.per_modality_final_norm": (False, "normalizes text and images separately"),
    "model.untie_output_vocab": (False, "adds a text head"),
}

# Keys that do not change what the model computes, and sections of such keys.
_SECTIONS = ("optimizer", "schedule", "training", "sampling", "eval", "logging", "wandb", "accelerator", "input")
_HARMLESS = {
    *("num_epochs", "torch_compile", "advanced_metrics", "batch_size", "grad_accum_steps", "ema_decay"),
    *("log_every_batches", "grad_logging", "resume_from", "wandb_run_id", "use_adaptor", "adaptor.kind"),
    *("seed", "max_run_epochs", "torch_compile_mode", "init_from", "resume_optimizer", "output_dir"),
    *("model.grad_checkpoint", "flow.grad_checkpoint", "flow.seed"),
    *("adaptor.model.flow_grad_checkpoint", "adaptor.model.channels_coupling_projs"),
    *("adaptor.model.spatial_coupling_projs", "adaptor.latent_noise_dim"),
    *("model.remat_policy", "model.max_seq_len", "model.rope_skip_pad", "model.right_align_inputs"),
    *("model.strict_special_ids", "model.use_boi_token", "model.out_dim"),
    *("patch_pca.model.input_size", "patch_pca.model.noise_std", "patch_pca.model.eps", "patch_pca.model.whiten"),
}

# Sections of keys that do change it.
_MODEL_SECTIONS = ("model", "image", "flow", "patch_pca", "adaptor")


@dataclasses.dataclass
class VersionedWeights(Weights):
    """Weights and the `format_version` of their file, None if it has none."""

    version: int | None = None


def read(path: str, yaml_path: str | None = None, step: int | None = None) -> VersionedWeights:
    """Reads a `.pt` and its YAML.

    Args:
      path: of the `.pt`.
      yaml_path: of the YAML; None: use the configuration in the `.pt`.
      step: of training; None: that of the file, if it has one.

    Raises:
      ValueError: if a file cannot be read, is not of this implementation, or has a value that is not supported.
    """
    content = load_pt(path)
    if "model_state_dict" not in content:
        raise ValueError(f"{path} is not a checkpoint of alexojica/JetFormer: it has no model_state_dict")
    version = content.get("format_version")
    if version not in (None, 5, 6):
        raise ValueError(f"{path} has format_version {version}: expected 5, 6 or none")
    if version is not None and step is None and isinstance(content.get("global_step"), int):
        step = content["global_step"]
    config = content.get("config") if yaml_path is None else _read_yaml(yaml_path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} has no config: give the YAML with --yaml")
    where = yaml_path or f"the config in {path}"
    ema = content.get("ema_state_dict")
    weights = experiment(config, where, bool(ema) and version is None, step, version)
    weights.tensors = _without_aliases(state_dict(content["model_state_dict"], f"{path}: model_state_dict"))
    for name, x in weights.tensors.items():
        if name.startswith("patch_pca.") and not torch.equal(x, torch.eye(len(x)).to(x) if x.ndim == 2 else 0 * x):
            raise ValueError(f"{path}: {name} is not that of an identity: a PCA of patches is not supported")
    if ema and version is None:
        weights.ema = _without_aliases(state_dict(ema, f"{path}: ema_state_dict"))
    elif ema:
        weights.notes.append(f"{path}: ema_state_dict is ignored: its layout in format {version} is not known")
    return weights


def table(model: JetFormer, weights: VersionedWeights) -> tuple[Table, set[str]]:
    """Returns the source of each tensor of a model, and the names in the source to ignore."""
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    head = model.image_head
    order = image_head_order(head.num_mixtures, model.out_dim)
    found: Table = {
        name: Source({name: shapes[name]}) for name in ("text_emb.weight", "image_emb.weight", "image_emb.bias")
    }
    for part in ("weight", "bias"):
        shape = shapes[f"image_head.linear.{part}"]
        found[f"image_head.linear.{part}"] = Source({f"img_head.{part}": shape}, lambda x: x[order])
    unused = set()
    if model.text_head is not None:
        found["text_head.weight"] = Source({"text_head.weight": shapes["text_head.weight"]})
        found["text_head.bias"] = torch.zeros(shapes["text_head.bias"])  # the source has none
    norms = {"text_norm": "text_norm", "image_norm": "img_norm"}
    if model.final_norm is None:
        unused.add("final_norm.weight")  # exists, but is unused with a norm for each modality
    else:
        norms = {"final_norm": "final_norm"}
    width, mlp_dim = model.decoder.width, shapes["decoder.blocks.0.mlp.linear.weight"][1]
    for i, block in enumerate(model.decoder.blocks):
        here, there = f"decoder.blocks.{i}", f"transformer.{i}"
        sizes = {"q": block.attn.num_heads, "k": block.attn.num_kv_heads, "v": block.attn.num_kv_heads}
        found |= {
            f"{here}.attn.qkv.weight": Source(
                {f"{there}.attention.w_{x}.weight": (n * block.attn.head_dim, width) for x, n in sizes.items()}
            ),
            f"{here}.attn.out.weight": Source(
                {f"{there}.attention.w_o.weight": shapes[f"{here}.attn.out.weight"]},
            ),
            f"{here}.mlp.gate_up.weight": Source(
                {f"{there}.feed_forward.w_{x}.weight": (mlp_dim, width) for x in ("gate", "up")}
            ),
            f"{here}.mlp.linear.weight": Source({f"{there}.feed_forward.w_linear.weight": (width, mlp_dim)}),
        }
        norms |= {f"{here}.pre_attention_norm": f"{there}.norm1", f"{here}.pre_mlp_norm": f"{there}.norm2"}
    norm_source = lambda name: (
        Source({f"{name}.weight": (width,)}, lambda weight: weight - 1)
        if weights.version is None
        else Source({f"{name}.scale": (width,)})
    )
    found |= {f"{ours}.weight": norm_source(theirs) for ours, theirs in norms.items()}
    if isinstance(model.flow, Jet):
        for i, (coupling, dnn) in enumerate(zip(model.flow.couplings, predictors(model.flow), strict=True)):
            size = len(coupling.permutation)
            found[f"flow.couplings.{i}.permutation"] = (
                torch.arange(size)
                if weights.version is None
                else Source({f"adaptor.flow.couplings.{i}.permutation": (size,)}, _permutation)
            )
            prefixes = f"flow.couplings.{i}.dnn", f"adaptor.flow.couplings.{i}.dnn"
            names = {"posemb": "posemb", "norm": "vit_encoder.norm", "blocks": "vit_encoder.layers"}
            found |= predictor_table(*prefixes, dnn, **names, layers=_LAYERS)
        # Without a context, cross-attention is unused. Older versions share position embeddings, which are unused too.
        unused |= {name for name in (*weights.tensors, *(weights.ema or ())) if ".dnn.cross_attn." in name}
        unused |= {"adaptor.flow.pos_emb_full", "adaptor.flow.pos_emb_half"}
    if weights.version is not None:
        # The former follow from permutations, the latter are the identity (see `read`).
        unused = {x for x in weights.tensors if x.endswith(".inverse_permutation") or x.startswith("patch_pca.")}
    if weights.version == 6:
        found = {name: _in_format_6(x) if isinstance(x, Source) else x for name, x in found.items()}
    return found, unused


def _in_format_6(source: Source) -> Source:
    """Returns a source with the names of format 6."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, *rest) in source.shapes.items():
        new = ".".join(filter(None, (_PARTS_6.get(part, part) for part in name.split("."))))
        shapes[new] = (rows + (shapes[new][0] if new in shapes else 0), *rest)
    return Source(shapes, source.convert)


def _permutation(order: Tensor) -> Tensor:
    if sorted(order.tolist()) != list(range(len(order))):
        raise ValueError(f"is not a permutation of 0 to {len(order) - 1}")
    return order


def _without_aliases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors with `adaptor.flow.…` in the place of its other name, `jet.…`."""
    once = {name: x for name, x in tensors.items() if not name.startswith("jet.")}
    for name, x in tensors.items():
        if name.startswith("jet."):
            other = f"adaptor.flow.{name.removeprefix('jet.')}"
            if not torch.equal(once.setdefault(other, x), x):
                raise ValueError(f"{name} differs from {other}: expected the same values")
    return once


class _Config:
    """A nested configuration by dotted keys, which records the keys that were read.

    Args:
      config: nested dictionaries.
      where: their place, for messages.
      version: the checkpoint's `format_version`; None: it has none.

    Attributes:
      has_new_keys: the keys are those of format 6. The methods take those of the formats before it.
    """

    def __init__(self, config: Mapping[str, Any], where: str, version: int | None):
        self._values, self.where, self.version = dict(_leaves(config)), where, version
        # Also a configuration that was written for a checkpoint of format 5 later.
        self.has_new_keys = version == 6 or (version == 5 and "image" in config)
        self.asked: set[str] = set()

    def keys(self) -> Iterator[str]:
        """Yields the keys that have a value."""
        return (key for key, value in self._values.items() if value is not None)

    def _own(self, key: str) -> str:
        return _KEYS_6.get(key, key) if self.has_new_keys else key

    def get(self, key: str, default: Any) -> Any:
        """Returns the value of a key in the default's type, or the default if it is missing or null.

        Raises:
          ValueError: if it has another type.
        """
        key = self._own(key)
        self.asked.add(key)
        value = self._values.get(key)
        if value is None:
            return default
        # YAML reads 1e-3 as text.
        kind = float if isinstance(default, float) else type(default)
        try:
            if isinstance(value, bool) is not (kind is bool) or (kind is tuple) is not isinstance(value, list):
                raise TypeError
            if kind is int and isinstance(value, float) and not value.is_integer():
                raise ValueError
            return kind(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.where}: {key} = {value!r}: expected a {kind.__name__}") from error

    def need(self, key: str, example: Any) -> Any:
        """Returns the value of a key in the example's type.

        Raises:
          ValueError: if it is missing or has another type.
        """
        if self._values.get(self._own(key)) is None:
            raise ValueError(f"{self.where} has no {self._own(key)}, which the model needs")
        return self.get(key, example)

    def saved(self, key: str, default: Any) -> Any:
        """Returns the value of a key that formats 5 and 6 need and earlier ones may leave out; see `need` and `get`."""
        return self.get(key, default) if self.version is None else self.need(key, default)


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_yaml(path: str) -> Any:
    try:
        return yaml.safe_load(UPath(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error


def experiment(
    values: Mapping[str, Any], where: str, ema: bool, step: int | None, version: int | None = None
) -> VersionedWeights:
    """Returns the experiment that a configuration describes, as weights without tensors.

    Args:
      values: nested dictionaries.
      where: their place, for messages.
      ema: whether there is a moving average.
      step: of training; None: unknown.
      version: the checkpoint's `format_version`; None: it has none.

    Raises:
      ValueError: for a value that is missing, of another type, or not supported.
    """
    config = _Config(values, where, version)
    for key, (only, effect) in (_ONLY if version is None else _ONLY | _ONLY_VERSIONED).items():
        if (value := config.get(key, only)) != only:
            raise ValueError(f"{where}: {key} = {value!r} {effect}, which is not supported: only {only!r} is")
    if not config.get("patch_pca.model.skip_pca", False) and config.get("patch_pca.model.pca_init_file", ""):
        raise ValueError(f"{where}: patch_pca.model.pca_init_file: a PCA in a file of its own is not supported")
    size = config.need("input.input_size", ())
    if len(size) != 2 or not all(isinstance(x, int) for x in size):
        raise ValueError(f"{where}: input.input_size = {list(size)}: expected height and width")
    patch_size = config.need("patch_pca.model.patch_size", 0)
    width, num_heads = config.need("model.width", 0), config.need("model.num_heads", 0)
    out_dim, dim = config.need("patch_pca.model.codeword_dim", 0), 3 * patch_size**2
    num_classes = config.need("input.num_classes", 0)
    if config.has_new_keys:
        names = ("bos_id", "boi_id", "nolabel_id", "vocab_size")
        tokens = dict(zip(names, range(num_classes, num_classes + 4), strict=True))
    else:
        tokens = {name: config.need(f"model.{name}", 0) for name in ("vocab_size", "bos_id", "nolabel_id")}
        tokens["boi_id"] = None if (boi_id := config.saved("model.boi_id", -1)) < 0 else boi_id
    notes = []
    if config.get("model.head_dim", width // num_heads) != width // num_heads:
        notes.append(f"{where}: model.head_dim is ignored: it is width / num_heads = {width // num_heads}")
    bindings = {
        "train.model": "@JetFormer",
        "train.objective": "@JetFormerObjective()",
        "train.evaluators": {"val": "@Likelihood()", "samples": "@Samples()"},
        "Samples.num_classes": num_classes,
        "JetFormer.image_shape": (*size, 3),
        "JetFormer.patches": "@Patchify",
        "JetFormer.decoder": "@Decoder",
        **{f"JetFormer.{name}": token for name, token in tokens.items()},
        "JetFormer.out_dim": out_dim,
        "JetFormer.num_mixtures": config.need("model.num_mixtures", 0),
        "JetFormer.scale_tol": config.saved("model.scale_tol", 1e-6),
        "JetFormer.head_dtype": "bfloat16" if config.get("model.head_dtype", "fp32") == "bfloat16" else "float32",
        "JetFormer.mean_init_std": config.get("model.gmm_mean_init_std", 0.0),
        "JetFormer.num_vocab_repeats": config.saved("model.num_vocab_repeats", 1),
        "JetFormer.causal_mask_on_prefix": config.get("model.causal_mask_on_prefix", True),
        "JetFormer.untie_output_vocab": config.get("model.untie_output_vocab", False),
        "JetFormer.per_modality_final_norm": config.get("model.per_modality_final_norm", False),
        "Patchify.patch_size": patch_size,
        "Decoder.width": width,
        "Decoder.depth": config.need("model.depth", 0),
        "Decoder.mlp_dim": config.need("model.mlp_dim", 0),
        "Decoder.num_heads": num_heads,
        "Decoder.num_kv_heads": config.saved("model.num_kv_heads", 1),
        "Decoder.head_dim": width // num_heads,
        "Decoder.dropout": config.get("model.dropout", 0.1),
        "JetFormerObjective.text_prefix_prob": config.get("training.text_prefix_prob", 1.0),
        "JetFormerObjective.loss_on_prefix": config.get("training.loss_on_prefix", False),
        "JetFormerObjective.drop_labels_prob": config.get("model.drop_labels_probability", 0.0),
        "JetFormerObjective.input_noise_std": config.get("training.input_noise_std", 0.0),
        "JetFormerObjective.dequantize": config.saved("patch_pca.model.add_dequant_noise", False),
    }
    if version is None:
        bindings |= {"Patchify.order": "chw", "Decoder.gelu": "exact", "Decoder.activated": "up"}
    if version is not None or (config.get("use_adaptor", False) and config.get("adaptor.kind", "jet") == "jet"):
        bindings |= _flow_experiment(config)
        noise = config.get("adaptor.latent_noise_dim", 0)
        if version is None and out_dim + noise < dim:
            notes.append(
                f"{where}: {dim - out_dim - noise} of a token's {dim} dimensions are missing from the original "
                "likelihood and are standard Gaussian noise here: bits per dim differ"
            )
    name = _DATA.get(config.get("input.dataset", ""))
    bindings |= training(step) | _training(config, ema) | data(name, tuple(size), labels=True)
    unknown = [
        key
        for key in config.keys()  # noqa: SIM118 (no mapping)
        if key not in config.asked | _HARMLESS and key.partition(".")[0] not in _SECTIONS
    ]
    changing = [key for key in unknown if key.partition(".")[0] in _MODEL_SECTIONS]
    if version is not None and changing:
        raise ValueError(f"{where}: {changing[0]} is unknown and may change what the model computes: not supported")
    if unknown:
        notes.append(f"{where}: {len(unknown)} unknown keys are ignored: {', '.join(unknown)}")
    return VersionedWeights(
        {}, gin_text(bindings), step=None if version is None else step, notes=notes, version=version
    )


def _flow_experiment(config: _Config) -> dict[str, Any]:
    depth = config.saved("adaptor.model.depth", 8)
    kinds = config.saved("adaptor.model.kinds", ("channels", "channels", "spatial"))
    bindings = {
        "JetFormer.flow": "@Jet",
        "Jet.depth": depth,
        "Jet.block_depth": config.saved("adaptor.model.block_depth", 2),
        "Jet.emb_dim": config.saved("adaptor.model.emb_dim", 256),
        "Jet.num_heads": config.saved("adaptor.model.num_heads", 4),
        "Jet.ps": 1,
    }
    if config.version is not None:
        projections = config.need("adaptor.model.spatial_coupling_projs", ())
        return bindings | {"Jet.kinds": kinds, "Jet.spatial_coupling_projs": projections}
    if "spatial" in kinds[:depth]:
        raise ValueError(
            f"{config.where}: adaptor.model.kinds = {list(kinds)}: spatial couplings are not supported (the original "
            "code cannot run them either)"
        )
    return bindings | {
        "Jet.kinds": ("channels",),
        "Jet.channels_coupling_projs": ("halves",),
        "Jet.gelu": "exact",
        "Jet.norm_eps": 1e-5,
    }


def _training(config: _Config, ema: bool) -> dict[str, Any]:
    return {
        "train.batch_size": config.get("batch_size", 64),
        "train.noise_scale": config.get("training.noise_scale", 0.0),
        "train.noise_min": config.get("training.noise_min", 0.0),
        "train.ema_decay": (config.get("ema_decay", 0.0) or 0.999) if ema else 0.0,
        "make_optimizer.lr": config.get("optimizer.lr", 1e-3),
        "make_optimizer.wd": config.get("optimizer.wd", 1e-4),
        "make_optimizer.b2": config.get("optimizer.b2", 0.95),
        "make_schedule.decay_type": config.get("schedule.decay_type", "cosine"),
        "make_schedule.warmup_percent": config.get("schedule.warmup_percent", 0.1),
    }
