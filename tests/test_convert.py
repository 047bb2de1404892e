"""The converter: nothing lost, nothing unknown let through."""

import numpy as np
import pytest
import torch

from golden_files import Golden, paths
from jetformer.convert import from_big_vision, image_head_order
from jetformer.models.jet import Jet
from small_models import small_model
from test_golden import load, objective_inputs


def test_image_head_order_takes_apart_what_the_reference_interleaves():
    k, d = 3, 2
    weights = [f"w{i}" for i in range(k)]
    interleaved = [f"{kind}{i}{j}" for i in range(k) for kind in "ms" for j in range(d)]
    order = image_head_order(k, d)
    ours = np.array(weights + interleaved)[order]
    means, scales = ([f"{kind}{i}{j}" for i in range(k) for j in range(d)] for kind in "ms")
    assert ours.tolist() == weights + means + scales


@pytest.mark.parametrize("path", paths("objective_"), ids=lambda p: p.stem)
def test_every_number_finds_its_place(path):
    """As many numbers go in as come out, apart from the permutations, and the model takes all of them."""
    file = Golden(path)
    model, _, _ = objective_inputs(file)
    params = {k: v for k, v in file.numpy("params").items() if "FREEZE_ME" not in k}
    count = sum(value.size for value in params.values())
    assert count == sum(p.numel() for p in model.parameters())
    state = from_big_vision(params, model)
    for name, parameter in model.named_parameters():
        assert torch.equal(state[name], parameter), name


def test_unknown_parameters_are_named():
    with pytest.raises(ValueError, match="EmbedAudio/kernel has no place in JetFormer"):
        from_big_vision({"EmbedAudio/kernel": np.zeros((2, 2))}, small_model())
    flow = Jet((4, 4, 3), depth=1, emb_dim=8, num_heads=2, ps=2)
    with pytest.raises(ValueError, match="couplings/dnn/extra/kernel has no place in Jet"):
        from_big_vision({"couplings/dnn/extra/kernel": np.zeros((1, 2))}, flow)
    with pytest.raises(TypeError, match="Linear"):
        load(torch.nn.Linear(2, 2), {})
