"""A JetFormer with all its parts, small enough for float64."""

import functools

import torch

from jetformer.models.decoder import Decoder
from jetformer.models.initializers import init_weights
from jetformer.models.jet import Jet
from jetformer.models.jetformer import JetFormer
from jetformer.models.patches import Patchify

T, L = 3, 4


SMALL = {
    "image_shape": (4, 4, 3),
    "patches": functools.partial(Patchify, patch_size=2),
    "flow": functools.partial(Jet, depth=2, emb_dim=8, num_heads=2, ps=1),
    "decoder": functools.partial(Decoder, width=16, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8),
    "vocab_size": 13,
    "bos_id": 10,
    "boi_id": 11,
    "nolabel_id": 12,
    "out_dim": 8,
}


def small_model(**kwargs):
    model = JetFormer(**SMALL | kwargs)
    init_weights(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "final_proj" in name or "head" in name:
                p.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    return model.double()


def inputs(model, batch=2):
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(0, 10, (batch, T), generator=generator)
    return text, torch.randn(batch, L, model.out_dim, generator=generator).double()
