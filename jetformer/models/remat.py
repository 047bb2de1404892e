"""Activation checkpointing: compute a part of the model anew in the backward pass, and keep no activations of it."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# What is computed anew: blocks of the decoder, couplings of the flow, or both.
POLICIES = ("none", "blocks", "couplings", "everything")


def set_policy(model: nn.Module, policy: str) -> None:
    """Says of which parts of a model only the inputs are kept for the backward pass.

    Args:
      model: modules in it that can have their parts computed anew name these in `rematerializes`.
      policy: one of `POLICIES`.
    """
    for module in model.modules():
        if hasattr(module, "rematerializes"):
            module.rematerialize = policy in (module.rematerializes, "everything")


def rematerialize(function: Callable, x: Tensor, *args):
    """`function(x, *args)`, of which only the arguments are kept for the backward pass.

    Nothing may be drawn inside from a generator: the second time would draw other numbers.
    """
    if x.device.type == "xla":
        # XLA sees one graph and would merge what is computed twice; torch_xla's version puts a barrier between.
        from torch_xla.utils.checkpoint import checkpoint as checkpoint_with_barrier

        # Like all reentrant checkpointing it only differentiates where an argument asks for it.
        x = x if x.requires_grad else x.detach().requires_grad_()
        return checkpoint_with_barrier(function, x, *args, preserve_rng_state=False)
    return checkpoint(function, x, *args, use_reentrant=False, preserve_rng_state=False)
