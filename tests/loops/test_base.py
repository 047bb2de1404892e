"""What a step leaves behind: packed and averaged again, vectors too."""

import numpy as np
import pytest
import torch

from jetformer.loops.base import means, pack


def packed(values, count, vectors):
    sums = {
        "loss": (torch.tensor(values), torch.tensor(count)),
        "responsibilities": (torch.tensor(vectors), torch.tensor(count)),
        "responsibility_entropy": (torch.tensor(0.0), torch.tensor(count)),
    }
    names, tensor = pack(sums)
    return names, tensor.numpy()


def test_means_are_over_what_counts():
    names, first = packed(2.0, 1, [1.0, 0.0, 0.0])
    _, second = packed(10.0, 3, [1.0, 2.0, 0.0])
    assert means(names, np.stack((first, second))) == pytest.approx(
        {"loss": 3.0, "effective_components": 2.0, "distinct_components": 2.0}
    )


def test_components_of_no_image_are_left_out():
    names, values = packed(0.0, 0, [0.0, 0.0])
    assert means(names, values[None]) == {"loss": 0.0}
