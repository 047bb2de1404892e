"""Optimizers and schedules: the reference's update, decayed parameters, durations in every unit, the EMA."""

import functools

import pytest
import torch

from jetformer import optim
from small_models import small_model


def test_an_update_is_adam_plus_decay_by_the_schedule():
    """-schedule · (lr · adam + wd · p): the learning rate is no factor of the weight decay."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optim.make_optimizer(model, lr=0.01, wd=0.1, b1=0.9, b2=0.95)
    model(torch.randn(4, 3)).square().sum().backward()
    optim.set_learning_rate(optimizer, 0.5)
    optimizer.step()
    for name, p in model.named_parameters():
        adam = p.grad / (p.grad.abs() + 1e-8)  # at the first step both moments are the gradient's
        decay = 0.1 * before[name] if name == "weight" else 0.0
        torch.testing.assert_close(p.detach(), before[name] - 0.5 * (0.01 * adam + decay))


def test_decayed_are_matrices_and_nothing_else():
    model = small_model(untie_output_vocab=True)
    ids = {id(p) for p in optim.decayed_parameters(model)}
    decayed = {name for name, p in model.named_parameters() if id(p) in ids}
    rest = {name for name, _ in model.named_parameters()} - decayed
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in decayed} == {
        *("qkv", "out", "gate_up", "linear"),  # decoder, and the image head's
        *("fc1", "fc2", "init_proj", "final_proj"),  # flow
        *("image_emb", "text_head"),
    }
    assert all(name.endswith(("bias", "posemb")) or "norm" in name or name == "text_emb.weight" for name in rest)


def test_optimizer_state_is_there_before_the_first_step():
    """So a checkpoint can be restored into it; the first step is the same without it."""
    models = [small_model(), small_model()]
    optimizers = [optim.make_optimizer(m) for m in models]
    optimizers[1].state.clear()
    for model, optimizer in zip(models, optimizers, strict=True):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)
    states = [optim.state_tensors(o, m) for o, m in zip(optimizers, models, strict=True)]
    torch.testing.assert_close(*states)


def test_muon_equals_pytorchs():
    """Up to 2%, for PyTorch computes in bfloat16."""
    torch.manual_seed(0)
    shapes = [(6, 10), (10, 6), (6, 10)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    before = [p.detach().clone() for p in ours]
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3}
    optimizers = [optim.Muon(ours, **settings), torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw")]
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, start in zip(ours, theirs, before, strict=True):
        assert (a - b).norm() < 0.02 * (b - start).norm()


def test_muon_updates_the_blocks_and_adamw_the_rest():
    models = [small_model(), small_model()]
    optimizers = [
        optim.make_optimizer(m, lr=0.01, wd=0.1, muon=muon) for m, muon in zip(models, (False, True), strict=True)
    ]
    generator = torch.Generator().manual_seed(0)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        q.grad = p.grad.clone()
    for optimizer in optimizers:
        optim.set_learning_rate(optimizer, 0.5)
        optimizer.step()
    named = [dict(m.named_parameters()) for m in models]
    differ = {name for name in named[0] if not torch.equal(named[0][name], named[1][name])}
    of_muon = {name for name, state in optim.state_tensors(optimizers[1], models[1]).items() if len(state) == 1}
    assert differ == of_muon
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in differ} == {
        "qkv",
        "out",
        "gate_up",
        "linear",
        "fc1",
        "fc2",
    }
    assert all(".blocks." in name for name in differ)


def test_muon_needs_transformer_blocks():
    with pytest.raises(ValueError, match=r"make_optimizer\.muon"):
        optim.make_optimizer(torch.nn.Linear(2, 2), muon=True)


def step(model, optimizer):
    """Updates the trained parameters by the same random gradients each time."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        gradient = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.grad = gradient if p.requires_grad else None
    optim.set_learning_rate(optimizer, 0.5)
    optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("muon", [False, True])
def test_frozen_parameters_are_left_alone(muon):
    """All others are updated as if nothing were frozen."""
    whole, part = small_model(), small_model()
    before = {name: p.detach().clone() for name, p in part.named_parameters()}
    frozen = {name for name in before if name.startswith("flow.") or name.endswith(".qkv.weight")}
    optimizers = [
        optim.make_optimizer(whole, wd=0.1, muon=muon),
        optim.make_optimizer(part, wd=0.1, muon=muon, frozen=("flow.*", r".*\.qkv\.weight")),
    ]
    expected, actual = (step(*pair) for pair in zip((whole, part), optimizers, strict=True))
    for name in before:
        assert torch.equal(actual[name], (before if name in frozen else expected)[name]), name
    assert frozen == {name for name, p in part.named_parameters() if not p.requires_grad}
    assert frozen == before.keys() - optim.state_tensors(optimizers[1], part).keys()


@pytest.mark.parametrize("muon", [False, True])
def test_a_factor_is_another_learning_rate(muon):
    """The weight decay is the same. The first of several matching patterns counts."""
    factors = {r"decoder\..*\.qkv\..*": 3.0, "decoder.*": 0.1}
    updated = {}
    for factor in (1.0, 0.1, 3.0, None):
        model = small_model()
        how = {"lr": 0.01, "lr_factors": factors} if factor is None else {"lr": 0.01 * factor}
        updated[factor] = step(model, optim.make_optimizer(model, wd=0.1, muon=muon, **how))
    for name, value in updated.pop(None).items():
        factor = 1.0 if not name.startswith("decoder.") else 3.0 if ".qkv." in name else 0.1
        torch.testing.assert_close(value, updated[factor][name], rtol=1e-12, atol=0)
        assert not torch.equal(value, updated[0.1 if factor == 3.0 else 3.0][name])


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"frozen": ("flow",)}, r"frozen: 'flow' .*flow\.couplings"),
        ({"frozen": ("flow(",)}, r"frozen: 'flow\('"),
        ({"lr_factors": {"text_emb": 0.1}}, r"lr_factors: 'text_emb' .*text_emb\.weight"),
        ({"frozen": ("flow.*", ".*")}, r"frozen = \('flow\.\*', '\.\*'\)"),
    ],
)
def test_impossible_patterns_are_named(how, named):
    with pytest.raises(ValueError, match=rf"make_optimizer\.{named}") as error:
        optim.make_optimizer(small_model(), **how)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 20), (2, 20, 5)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    singular_values = u.mT @ optim.orthogonalize(matrices) @ v.mT
    diagonal = singular_values.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.5
    assert diagonal.max() < 1.3
    torch.testing.assert_close(singular_values, diagonal.diag_embed(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("amounts", "steps"),
    [
        ({"steps": 7}, 7),
        ({"steps": 0}, 0),
        ({"examples": 100}, 3),
        ({"examples": 1}, 1),
        ({"epochs": 2.0}, 62),
        ({"percent": 0.1}, 12),
        ({"percent": 0.0}, 0),
        ({}, 5),
    ],
)
def test_durations(amounts, steps):
    sizes = {"total_steps": 120, "batch_size": 32, "data_size": 1000}
    assert optim.to_steps("warmup", amounts, default=5, **sizes) == steps


@pytest.mark.parametrize(
    ("amounts", "message"),
    [
        ({"steps": 1, "epochs": 1}, "warmup .*steps .*epochs"),
        ({"percent": 10}, "warmup_percent = 10 "),
        ({"steps": -1}, "warmup_steps = -1 "),
        ({"steps": None}, "warmup .*warmup_steps"),
    ],
)
def test_impossible_durations_are_named(amounts, message):
    with pytest.raises(ValueError, match=message):
        optim.to_steps("warmup", amounts, total_steps=10, batch_size=1, data_size=1)


@pytest.mark.parametrize("decay_type", ["cosine", "rsqrt", "linear", "constant"])
def test_schedule_warms_up_and_cools_down(decay_type):
    schedule = optim.make_schedule(100, 32, 1000, decay_type=decay_type, warmup_percent=0.1, cooldown_steps=20)
    values = [schedule(step) for step in range(101)]
    assert values[0] == 0
    assert values[10] == 1
    assert values[100] == 0
    assert values[:11] == sorted(values[:11])
    assert values[80:] == sorted(values[80:], reverse=True)


def test_stair():
    schedule = optim.make_schedule(9, 32, 1000, decay_type="stair", steps=(3, 6), mults=(0.5, 0.1))
    assert [schedule(step) for step in range(9)] == [1, 1, 1, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1]


def test_rsqrt_begins_where_it_warms_up_to():
    schedule = optim.make_schedule(100, 32, 1000, decay_type="rsqrt", warmup_steps=10, timescale_examples=320, shift=30)
    assert schedule(10) == pytest.approx(0.5)  # 1 / sqrt(1 + 30 / 10)
    assert schedule(5) == pytest.approx(0.25)
    assert schedule(60) == pytest.approx(1 / 3)


def test_impossible_schedules_are_named():
    with pytest.raises(ValueError, match=r"1 steps .*0 mults"):
        optim.make_schedule(100, 32, 1000, decay_type="stair", steps=(10,))
    with pytest.raises(ValueError, match=r"decay_type 'exponential'.*cosine"):
        optim.make_schedule(100, 32, 1000, decay_type="exponential")
    with pytest.raises(ValueError, match=r"warm-up of 100 .* 100 steps"):
        optim.make_schedule(100, 32, 1000, warmup_steps=100)


def test_noise_falls_from_its_scale_to_its_minimum():
    noise = functools.partial(optim.noise_curriculum, total_steps=100, noise_scale=64.0, noise_min=3.0)
    values = [noise(step) for step in range(101)]
    assert values[0] == 64
    assert values[100] == 3
    assert values == sorted(values, reverse=True)


def test_an_ema_that_warms_up_forgets_the_initial_parameters():
    average, steps = 1.0, 30
    for step in range(steps):
        average *= optim.warmed_up_decay(step, 0.998)  # of parameters that are 1 at the start and 0 after each step
    assert average < 1e-5 < 0.998**steps
    assert [optim.warmed_up_decay(step, 0.9) for step in (0, 80, 10_000)] == pytest.approx([0.1, 0.9, 0.9])


def test_ema():
    model = torch.nn.Linear(2, 1)
    ema = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for _ in range(3):
        optim.update_ema(ema, model, 1 - 0.9)
    for name, p in model.named_parameters():
        torch.testing.assert_close(ema[name], (1 - 0.9**3) * p.detach())
