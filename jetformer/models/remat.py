"""Activation checkpointing: compute a part of the model anew in the backward pass, and keep no activations of it."""

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint


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
