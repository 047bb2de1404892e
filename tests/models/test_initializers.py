"""Models built outside a run are initialized by their constructors."""

import functools

import pytest
import torch

from jetformer.models.decoder import Decoder
from jetformer.models.flow_ablations import make_jet
from jetformer.models.jet import Jet
from jetformer.models.jetformer import JetFormer
from jetformer.models.labelled import LabelledFlow
from jetformer.models.language_model import LanguageModel
from jetformer.models.tarflow import TarFlow
from small_models import SMALL

SMALL_JET = functools.partial(Jet, (4, 4, 3), depth=2, emb_dim=8, num_heads=2, ps=2)
SMALL_DECODER = functools.partial(Decoder, width=16, depth=1, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8)
MODELS = {
    "jet": functools.partial(
        make_jet, **SMALL_JET.keywords, input_shape=(4, 4, 3), actnorm=True, invertible_dense="lu"
    ),
    "labelled": functools.partial(LabelledFlow, SMALL_JET, num_labels=3),
    "tarflow": functools.partial(TarFlow, (4, 4, 3), depth=2, block_depth=1, emb_dim=8, num_heads=2, context_dim=3),
    "language_model": functools.partial(LanguageModel, SMALL_DECODER, vocab_size=5, bos_id=4),
    "jetformer": functools.partial(JetFormer, **SMALL, image_posemb=True),
}


@pytest.fixture
def memory_is_nan():
    """Makes torch.empty return NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("memory_is_nan")
@pytest.mark.parametrize("name", MODELS)
def test_constructors_leave_no_memory_uninitialized(name):
    state = MODELS[name]().state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    assert all(tensor.max() < 1e9 for tensor in state.values() if tensor.numel())


def test_weights_come_from_the_global_generator():
    states = []
    for seed in 0, 0, 1:
        torch.manual_seed(seed)
        states.append(SMALL_JET().state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_nothing_is_drawn_on_the_meta_device():
    before = torch.get_rng_state()
    with torch.device("meta"):
        SMALL_JET()
    assert torch.equal(torch.get_rng_state(), before)
