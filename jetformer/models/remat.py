"""Activation checkpointing: drop the activations of a block, and recompute them in the backward pass.

A block is a module with the class attribute `is_block = True`. It takes part if its parent runs it by `run_block`. Its
class attribute `recompute_policy` names the policy that recomputes it: "blocks", the default, as for a decoder, or
"couplings", as for a flow.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# What is recomputed: nothing, the decoder's blocks, the flow's couplings, or both.
POLICIES = ("none", "blocks", "couplings", "everything")


def set_policy(model: nn.Module, policy: str, every: int = 1) -> None:
    """Chooses the blocks of a model that `run_block` recomputes in the backward pass.

    Args:
      model: any module.
      policy: one of `POLICIES`.
      every: recompute only each so many of the policy's blocks, from the first on; 1: all of them.
    """
    chosen = 0
    for module in model.modules():
        if getattr(module, "is_block", False):
            module.recompute = policy in (getattr(module, "recompute_policy", "blocks"), "everything")
            if module.recompute:
                module.recompute = chosen % every == 0
                chosen += 1


def run_block(block: nn.Module, x: Tensor, *args):
    """Returns `block(x, *args)`; if `set_policy` chose the block, only its arguments are kept for the backward pass.

    A recomputed block must not draw from a generator, which would return other numbers the second time.
    """
    if not (getattr(block, "recompute", False) and torch.is_grad_enabled()):
        return block(x, *args)
    if x.device.type == "xla":
        # XLA sees one graph and would merge both computations; torch_xla's version puts a barrier between them.
        from torch_xla.utils.checkpoint import checkpoint as checkpoint_with_barrier

        # Like all reentrant checkpointing it returns gradients only if an argument requires one.
        x = x if x.requires_grad else x.detach().requires_grad_()
        return checkpoint_with_barrier(block, x, *args, preserve_rng_state=False)
    return checkpoint(block, x, *args, use_reentrant=False, preserve_rng_state=False)
