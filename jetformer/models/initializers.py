"""Initializes weights as the reference does, from a generator, so that they are a function of a seed."""

import math

import torch
from torch import Tensor, nn

# The standard deviation of a standard normal truncated to [-2, 2].
_TRUNCATED_STD = 0.87962566103423978


def lecun_normal_(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Fills the weight `[out, in]` of a linear layer in place with a truncated normal of variance 1 / in.

    (flax's default for `nn.Dense`, and Gemma's.)
    """
    std = math.sqrt(1.0 / tensor.shape[1]) / _TRUNCATED_STD
    return nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std, generator=generator)


def init_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Initializes a model: calls `init_weights(generator)` of every submodule that has it, in order of registration.

    A run builds its model on the meta device, materializes it with `to_empty`, and initializes it here, so that no
    weight is drawn twice, or from the global generator.
    """
    for submodule in module.modules():
        if hasattr(submodule, "init_weights"):
            submodule.init_weights(generator)


@torch.no_grad()
def init_on_cpu(model: nn.Module) -> None:
    """Initializes a model at the end of its constructor, from PyTorch's global generator, as PyTorch's modules do.

    Does nothing on the meta device, for a run initializes its model later.

    Raises:
      ValueError: if the model is on another device, whose generator would draw other weights.
    """
    device = next((p.device.type for p in model.parameters()), "cpu")
    if device == "meta":
        return
    if device != "cpu":
        raise ValueError(f"a model cannot be initialized on {device}: build it on the CPU, then move it with .to()")
    init_weights(model, torch.default_generator)


def embedding(num_embeddings: int, dim: int) -> nn.Embedding:
    """Returns an embedding whose weights are not initialized: on the meta device PyTorch would import its compiler for
    that, which takes seconds."""
    return nn.Embedding.from_pretrained(torch.empty(num_embeddings, dim), freeze=False)
