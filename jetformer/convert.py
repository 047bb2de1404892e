"""Parameters of other implementations to this one's state dicts."""

from collections.abc import Mapping

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from jetformer.models.jet import Jet
from jetformer.models.jetformer import JetFormer
from jetformer.models.mixture import MixtureHead
from jetformer.models.patches import PatchPCA


def image_head_order(num_mixtures: int, dim: int) -> Tensor:
    """Where this project's image-head outputs `[P]` stand in big_vision's, which interleaves means and scales."""
    rest = torch.arange(num_mixtures * 2 * dim).view(num_mixtures, 2, dim)
    return torch.cat((torch.arange(num_mixtures), num_mixtures + rest.transpose(0, 1).flatten()))


def from_big_vision(params: Mapping[str, np.ndarray], model: nn.Module) -> dict[str, Tensor]:
    """Maps big_vision's flat parameters (`a/b/c` names) to the state dict of `model`.

    Linear in the parameters, so it maps gradients too (leave out the frozen permutations then).

    Args:
      params: numpy arrays by name, layers stacked along a leading axis or unrolled.
      model: a `JetFormer`, `Jet` or `PatchPCA` of the same configuration.

    Returns:
      A state dict; it holds what `params` holds, so an incomplete `params` gives an incomplete one.

    Raises:
      ValueError: for a parameter that has no place in the model.
    """
    if isinstance(model, Jet):
        state = _jet(params, model)
    elif isinstance(model, PatchPCA):
        state = {name.removesuffix("_"): value for name, value in params.items()}
    elif isinstance(model, JetFormer):
        adaptor = "params_adaptor/"
        flow = {k.removeprefix(adaptor): v for k, v in params.items() if k.startswith(adaptor)}
        rest = {k: v for k, v in params.items() if not k.startswith(adaptor)}
        state = _jetformer(rest, model)
        if flow:
            state |= {f"flow.{k}": v for k, v in _jet(flow, model.flow).items()}
    else:
        raise TypeError(f"no big_vision parameters are known for {type(model).__name__}")
    return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in state.items()}


# What follows maps one layer's parameter. A flax kernel is [in, out], a PyTorch weight [out, in].

_DENSE = {"kernel": ("weight", lambda w: w.T), "bias": ("bias", lambda b: b)}
_NORM = {"scale": "weight", "bias": "bias"}


def _unstack(params: Mapping[str, np.ndarray], prefix: str) -> dict[tuple[int, str], np.ndarray]:
    """`prefix/i/name` (unrolled) or `prefix/name` (stacked along the first axis) to {(i, name): array}."""
    layers = {}
    for name, value in params.items():
        if not name.startswith(f"{prefix}/"):
            continue
        rest = name.removeprefix(f"{prefix}/")
        index, _, tail = rest.partition("/")
        if index.isdigit():
            layers[int(index), tail] = value
        else:
            layers |= {(i, rest): layer for i, layer in enumerate(value)}
    return layers


def _attention(state: dict, prefix: str, params: Mapping[str, np.ndarray], groups: Mapping[str, str]):
    """flax's `MultiHeadDotProductAttention`: one matrix for each of `groups`' keys, stacked into those of its
    values."""
    for kind, ours, to_rows, out in (
        ("kernel", "weight", "d n h -> (n h) d", "n h d -> d (n h)"),
        ("bias", "bias", "n h -> (n h)", "d -> d"),
    ):
        stacked = {}
        for source, target in groups.items():
            if (value := params.get(f"{source}/{kind}")) is not None:
                stacked.setdefault(target, []).append(rearrange(value, to_rows))
        for target, rows in stacked.items():
            state[f"{prefix}.{target}.{ours}"] = np.concatenate(rows)
        if (value := params.get(f"out/{kind}")) is not None:
            state[f"{prefix}.out.{ours}"] = rearrange(value, out)


def _jet(params: Mapping[str, np.ndarray], model: Jet) -> dict[str, np.ndarray]:
    state = {}
    masks = {
        "channels": params.get("channel_coupling_masks-FREEZE_ME"),
        "spatial": params.get("spatial_coupling_masks-FREEZE_ME"),
    }
    for i, coupling in enumerate(model.couplings):
        if (mask := masks[coupling.kind]) is not None:
            # Column j of the one-hot matrix picks the dimension (or token) that comes j-th.
            state[f"couplings.{i}.permutation"] = mask[i].argmax(0)
    attention = {}
    for (i, name), value in _unstack(params, "couplings").items():
        module, _, kind = name.removeprefix("dnn/").rpartition("/")
        prefix = f"couplings.{i}.dnn"
        if "MultiHeadDotProductAttention_0" in module:
            owner, _, matrix = name.removeprefix("dnn/").partition("MultiHeadDotProductAttention_0/")
            attention.setdefault((prefix, owner), {})[matrix] = value
        elif name == "dnn/posemb":
            state[f"{prefix}.posemb"] = value
        elif module in ("init_proj", "final_proj"):
            target, convert = _DENSE[kind]
            state[f"{prefix}.{module}.{target}"] = convert(value)
        elif module == "vit/encoder_norm":
            state[f"{prefix}.vit.norm.{_NORM[kind]}"] = value
        elif module.startswith("vit/encoderblock_"):
            block, _, part = module.removeprefix("vit/encoderblock_").partition("/")
            target = f"{prefix}.vit.blocks.{block}"
            if part in ("LayerNorm_0", "LayerNorm_1"):
                state[f"{target}.norm{int(part[-1]) + 1}.{_NORM[kind]}"] = value
            else:
                weight, convert = _DENSE[kind]
                dense = {"MlpBlock_0/Dense_0": "fc1", "MlpBlock_0/Dense_1": "fc2"}[part]
                state[f"{target}.mlp.{dense}.{weight}"] = convert(value)
        else:
            raise ValueError(f"big_vision parameter couplings/{name} has no place in Jet")
    for (prefix, owner), matrices in attention.items():
        if owner:  # inside an encoder block
            block = owner.removeprefix("vit/encoderblock_").removesuffix("/")
            groups = {"query": "qkv", "key": "qkv", "value": "qkv"}
            _attention(state, f"{prefix}.vit.blocks.{block}.attn", matrices, groups)
        else:
            groups = {"query": "query", "key": "key_value", "value": "key_value"}
            _attention(state, f"{prefix}.cross_attn", matrices, groups)
    return state


def _jetformer(params: Mapping[str, np.ndarray], model: JetFormer) -> dict[str, np.ndarray]:
    state = {}
    head = model.image_head
    order = slice(None)
    if isinstance(head, MixtureHead):
        order = image_head_order(head.num_mixtures, model.out_dim).numpy()
    for name, value in params.items():
        module, _, kind = name.rpartition("/")
        if name == "EmbedText/embedding":
            state["text_emb.weight"] = value
        elif module in ("EmbedImage", "LogitsText"):
            target, convert = _DENSE[kind]
            ours = {"EmbedImage": "image_emb", "LogitsText": "text_head"}[module]
            state[f"{ours}.{target}"] = convert(value)
        elif module == "LogitsImage":
            target, convert = _DENSE[kind]
            state[f"image_head.linear.{target}"] = convert(value)[order]
        elif module in ("TextNorm", "ImageNorm"):
            state[f"{module.removesuffix('Norm').lower()}_norm.weight"] = value
        elif module == "decoder/final_norm":
            if model.final_norm is not None:  # with a norm for each modality, theirs exists unused
                state["final_norm.weight"] = value
        elif not name.startswith("decoder/layers/"):
            raise ValueError(f"big_vision parameter {name} has no place in JetFormer")
    qkv = {}
    for (i, name), value in _unstack(params, "decoder/layers").items():
        prefix = f"decoder.blocks.{i}"
        if name in ("attn/q_einsum/w", "attn/kv_einsum/w", "attn/qkv_einsum/w"):
            rows = rearrange(value, "... d h -> (... h) d")
            qkv.setdefault(prefix, {})[name] = rows
        elif name == "attn/attn_vec_einsum/w":
            state[f"{prefix}.attn.out.weight"] = rearrange(value, "n h d -> d (n h)")
        elif name == "mlp/gating_einsum":
            state[f"{prefix}.mlp.gate_up.weight"] = rearrange(value, "s d m -> (s m) d")
        elif name == "mlp/linear":
            state[f"{prefix}.mlp.linear.weight"] = value.T
        elif name == "pre_attention_norm/scale":
            state[f"{prefix}.pre_attention_norm.weight"] = value
        elif name == "pre_ffw_norm/scale":
            state[f"{prefix}.pre_mlp_norm.weight"] = value
        else:
            raise ValueError(f"big_vision parameter decoder/layers/{name} has no place in JetFormer")
    for prefix, matrices in qkv.items():
        ordered = ("attn/q_einsum/w", "attn/kv_einsum/w", "attn/qkv_einsum/w")
        state[f"{prefix}.attn.qkv.weight"] = np.concatenate([matrices[name] for name in ordered if name in matrices])
    return state
