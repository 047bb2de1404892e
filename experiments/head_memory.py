"""Measures the memory of the image head in training, for 256 and 4,096 tokens: the peak of the process beyond weights,
hidden states, targets and their gradients.

    python experiments/head_memory.py

Each case runs in a process of its own. Results are in experiments/README.md.
"""

import math
import resource
import subprocess
import sys

import torch
from torch.nn import functional as F

from jetformer.models.mixture import MixtureHead, square_plus

WIDTH, DIM, MIXTURES = 64, 128, 1024


def peak() -> int:
    """Returns the peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(way: str, tokens: int) -> None:
    head = MixtureHead(WIDTH, DIM, MIXTURES)
    torch.nn.init.normal_(head.linear.weight, std=0.1)
    torch.nn.init.zeros_(head.linear.bias)
    hidden = torch.randn(1, tokens, WIDTH, requires_grad=True)
    target = torch.randn(1, tokens, DIM, requires_grad=True)
    weight = torch.ones(1, tokens)
    tensors = (hidden, target, *head.parameters())
    for tensor in tensors:
        tensor.grad = torch.zeros_like(tensor)  # so that they are part of what is there before
    before = peak()
    if way == "fused":
        loss = head(hidden, target, weight).total
    else:
        logits = F.linear(hidden, head.linear.weight, head.linear.bias)
        weights, means, raw_scales = logits.split((MIXTURES, MIXTURES * DIM, MIXTURES * DIM), dim=-1)
        means, raw_scales = (x.unflatten(-1, (MIXTURES, DIM)) for x in (means, raw_scales))
        scales = square_plus(raw_scales).clamp(min=head.scale_tol)
        squares = ((target.unsqueeze(-2) - means) / scales).square()
        components = -0.5 * (squares + math.log(2 * math.pi)).sum(-1) - scales.log().sum(-1)
        loss = -torch.logsumexp(weights.log_softmax(-1) + components, dim=-1).sum()
    loss.backward()
    print((peak() - before) / 1e9)


def main() -> None:
    if len(sys.argv) > 1:
        measure(sys.argv[1], int(sys.argv[2]))
        return
    for way, sizes in (("fused", (256, 4096)), ("plain", (256, 1024))):
        for tokens in sizes:
            args = [sys.executable, __file__, way, str(tokens)]
            gigabytes = float(subprocess.run(args, capture_output=True, text=True, check=True).stdout)
            print(f"{way} {tokens:5d} tokens: {gigabytes:.3f} GB")


if __name__ == "__main__":
    main()
