"""A flow given labels: each label, and no label, has a density of its own, and the flow is invertible."""

import functools

import numpy as np
import pytest
import torch

from flows import assert_invertible, randomized
from jetformer import prng
from jetformer.experiment import Experiment
from jetformer.models.jet import Jet
from jetformer.models.labelled import LabelledFlow
from jetformer.models.tarflow import TarFlow
from jetformer.objectives import JetObjective

SMALL = {"input_shape": (4, 4, 1), "depth": 2, "emb_dim": 8, "num_heads": 2, "ps": 2}
FLOWS = {"jet": functools.partial(Jet, **SMALL), "tarflow": functools.partial(TarFlow, **SMALL, block_depth=1)}


@pytest.fixture(params=[("jet", 5), ("jet", None), ("tarflow", 5), ("tarflow", None)], ids=str)
def model(request):
    flow, context_dim = request.param
    return randomized(LabelledFlow(FLOWS[flow], num_labels=3, context_dim=context_dim))


def test_it_has_the_bound_of_its_flow():
    assert LabelledFlow(FLOWS["jet"], num_labels=3).max_logdet == FLOWS["jet"]().max_logdet > 0
    assert LabelledFlow(FLOWS["tarflow"], num_labels=3).max_logdet is None


def test_it_is_invertible_given_a_label_and_without_one(model):
    x = torch.randn(2, 4, 4, 1, dtype=torch.float64)
    context = model.context(torch.tensor([0, 2]))
    assert context.shape == (2, 1, 3 if model.label_emb is None else 5)
    for given in (context, None):
        # One example at a time, as the Jacobian needs it.
        for i in range(2):
            one = None if given is None else given[i : i + 1]
            forward, inverse = (functools.partial(f, context=one) for f in (model, model.inverse))
            assert_invertible(forward, inverse, x[i : i + 1])


def test_labels_matter_and_dropped_labels_equal_no_label(model):
    x = torch.randn(1, 4, 4, 1, dtype=torch.float64).expand(3, -1, -1, -1)
    z, _ = model(x, model.context(torch.tensor([0, 1, 2])))
    assert not torch.allclose(z[0], z[1])
    assert not torch.allclose(z[1], z[2])
    dropped = torch.tensor([True, False, True])
    mixed, _ = model(x, model.context(torch.tensor([0, 1, 2]), dropped))
    without, _ = model(x)
    torch.testing.assert_close(mixed[dropped], without[dropped])
    torch.testing.assert_close(mixed[1], z[1])


@pytest.mark.parametrize("key", ["label", "text"])
def test_the_objective_scores_images_given_their_labels(model, key):
    """Training drops labels by the examples' keys, evaluation drops none."""
    objective = JetObjective(drop_labels_prob=0.5)
    labels = torch.arange(40) % 3
    batch = {"image": torch.randint(0, 256, (1, 4, 4, 1), dtype=torch.uint8).expand(40, -1, -1, -1)}
    batch[key] = labels.int() if key == "label" else labels[:, None].int()
    draws = objective.draw(model, batch, prng.example_keys(0, torch.arange(40, dtype=torch.int32)), train=True)
    draws["dequant"] = torch.zeros(40, 4, 4, 1, dtype=torch.float64)
    dropped = draws["drop_labels"]
    assert 5 < dropped.sum() < 35
    x = batch["image"].double() / 127.5 - 1
    expected = {
        train: JetObjective.score(model, x, model.context(labels, dropped if train else None))
        for train in (True, False)
    }
    for train in (True, False):
        loss, terms = objective(model, batch, draws, train=train)
        torch.testing.assert_close(terms["bits_per_dim"][0], expected[train]["bits_per_dim"][0])
        torch.testing.assert_close(loss, expected[train]["bits_per_dim"][0].mean())
    assert "drop_labels" not in objective.draw(model, batch, torch.zeros(40, 2, dtype=torch.int32), train=False)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_without_embeddings_no_label_is_the_average_of_labels():
    model = LabelledFlow(FLOWS["tarflow"], num_labels=3, context_dim=None)
    contexts = model.context(torch.tensor([0, 1, 2, 3]))
    assert torch.equal(contexts[:3, 0], torch.eye(3))
    torch.testing.assert_close(contexts[3], contexts[:3].mean(0))
    condition = model.flow.blocks[0].condition(contexts)
    torch.testing.assert_close(condition[3], condition[:3].mean(0))


def test_mistakes_are_named(model):
    batch = {"image": torch.zeros(1, 4, 4, 1, dtype=torch.uint8)}
    keys = torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"have no label: .* Data\.pp = "):
        JetObjective(dequantize=False)(model, batch, {})
    with pytest.raises(ValueError, match=r"drop_labels_prob .*LabelledFlow.* (Jet|TarFlow)"):
        JetObjective(drop_labels_prob=0.1).draw(model.flow, batch, keys, train=True)


@pytest.mark.parametrize("key", ["label", "text"])
def test_an_unknown_label_is_named(model, key):
    labels = np.array([0, 3], np.int32)
    batch = {"image": np.zeros((2, 4, 4, 1), np.uint8), key: labels if key == "label" else labels[:, None]}
    with pytest.raises(ValueError, match=r"token 3: .* 0 to 2: .*LabelledFlow\.num_labels"):
        Experiment.check_text(batch, model)
