"""Training steps of the experiments at their full size: no wait for the device, and no more launches than they need."""

import functools
import gc
import itertools
import pathlib

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map_only

from jetformer import benchmark, config, plan
from jetformer.data import tokenizer
from jetformer.experiment import Experiment
from jetformer.models import attention, remat
from jetformer.runtime import Runtime
from jetformer.state import State, make_loop
from jetformer.trainer import training_of

EXPERIMENTS = pathlib.Path("experiments")
ONE = Runtime(torch.device("cuda:0"))


@pytest.fixture(autouse=True)
def tokenizers(monkeypatch, tmp_path):
    """The first would be downloaded, the second is the user's own."""
    here = (EXPERIMENTS / "shapes.model").absolute().as_uri()
    monkeypatch.setattr(tokenizer, "PUBLIC", {"c4_en": (here, None), "captions.model": (here, None)})
    monkeypatch.setattr(tokenizer, "load", functools.partial(tokenizer.load, cache_dir=str(tmp_path)))


def load(name, *bindings, runtime=ONE) -> tuple[Experiment, State]:
    """An experiment and its state, with no initial weights: they mean nothing here."""
    config.parse([str(EXPERIMENTS / f"{name}.gin")], bindings)
    experiment = config.call(Experiment)
    loop = make_loop(experiment, runtime)
    model = experiment.check_model().to_empty(device="cpu")
    state = State(loop, loop.place(model, experiment.compile), experiment.optimizer(model), ema=None)
    if experiment.ema_decay:
        state.ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    return experiment, state


def steps(experiment, state, count):
    """Runs training steps, and stops after each."""
    length = benchmark.text_length_of(experiment, state.model)
    local_size = experiment.batch_size // state.loop.runtime.process_count
    batch = benchmark.synthetic_batch(state.model, local_size, length)
    training = training_of(experiment, state, count, schedule=lambda step: 1e-3)
    return state.loop.train_steps(training, itertools.repeat(batch))


NAMES = sorted(
    path.relative_to(EXPERIMENTS).with_suffix("").as_posix()
    for path in EXPERIMENTS.rglob("*.gin")
    if path.stem not in ("on_photo_patches", "dense_plain")  # is no experiment; needs cuSOLVER
)


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_steps_do_not_wait(name, autocast, seen, monkeypatch):
    """And attention has a fused kernel, which keeps no scores, on the oldest GPU with bfloat16."""
    kernels, fused = set(), attention.F.scaled_dot_product_attention

    def attend(*args, **kwargs):
        kernels.add(SDPBackend(torch._fused_sdp_choice(*args, **kwargs)))
        return fused(*args, **kwargs)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", attend)
    experiment, state = load(name, "train.batch_size = 8", f"train.autocast = {autocast!r}", "train.compile = None")
    for _ in steps(experiment, state, 3):
        waits, places = seen["waits"], dict(seen.places)
        seen.reset()
    assert waits == 0, places
    assert SDPBackend.MATH not in kernels


@pytest.mark.parametrize(
    ("name", "most"), [("digits", 3_750), ("cifar10", 9_700), ("imagenet256", 21_000), ("jet_imagenet64", 5_800)]
)
def test_launches(name, most, seen):
    """Of a training step in bfloat16 that nothing compiles."""
    experiment, state = load(name, "train.batch_size = 8", "train.autocast = 'bfloat16'", "train.compile = None")
    for _ in steps(experiment, state, 2):
        launches = seen["launches"]
        seen.reset()
    assert launches <= most


@pytest.fixture
def eight():
    """The first of eight processes; the others and their collectives are made up."""
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield Runtime(torch.device("cuda:0"), 0, 8, 8)
    dist.destroy_process_group()


def dtypes(experiment, state) -> dict[str, torch.dtype]:
    """The dtypes of what modules return in a training step, by module."""
    found = {}

    def hook(name):
        return lambda module, args, output: found.update({name: tree_map_only(torch.Tensor, lambda x: x.dtype, output)})

    for name, module in state.model.named_modules():
        module.register_forward_hook(hook(name))
    for _ in steps(experiment, state, 1):
        return found


def test_fsdp(seen, eight):
    """It keeps an eighth of all tensors, does not wait, and computes in the dtypes of one process."""
    bindings = ["train.batch_size = 8", "train.compile = None", "train.ema_decay = 0.999"]
    bindings += ["Jet.depth = 2", "Decoder.depth = 2"]
    expected = dtypes(*load("imagenet256", *bindings))
    experiment, state = load("imagenet256", *bindings, "train.mesh = {'fsdp': -1}", runtime=eight)
    assert dtypes(experiment, state) == expected
    for _ in steps(experiment, state, 3):
        waits, places = seen["waits"], dict(seen.places)
        seen.reset()
    assert waits == 0, places
    kept = [*state.model.parameters(), *state.ema.values()]
    kept += [x for values in state.optimizer.state.values() for x in values.values() if x.ndim]
    assert all(isinstance(x, DTensor) for x in kept)
    # Rows that eight does not divide are padded.
    assert sum(x.to_local().numel() for x in kept) <= 1.01 * sum(x.numel() for x in kept) / 8


def test_fsdp_places_a_model_module_by_module(eight):
    """The device holds the shards, and at most the image head, the largest module, as a whole."""
    config.parse(["experiments/imagenet256.gin"], ["train.compile = None"])
    experiment = config.call(Experiment)
    model = experiment.check_model().to_empty(device="cpu")
    head = sum(p.nbytes for p in model.image_head.parameters())
    loop = make_loop(experiment, eight)
    gc.collect()  # other tests' models
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loop.place(model)
    shards = sum(loop.local(x).nbytes for x in [*model.parameters(), *model.buffers()])
    assert torch.cuda.memory_allocated() - before <= 1.01 * shards
    assert torch.cuda.max_memory_allocated() - before <= 1.01 * (shards + head)


@pytest.mark.parametrize(("name", "count"), [("imagenet256", 1), ("imagenet256", 8), ("coco_captions", 8)])
def test_a_plan_is_what_is_allocated(name, count, request, monkeypatch):
    """To 5%, in another batch than those that it computes."""
    monkeypatch.setattr(plan, "POLICIES", (("none", 1), ("couplings", 1), ("everything", 2)))
    bindings = ["train.compile = None", "train.mesh = {'fsdp': -1}", "Jet.depth = 2", "Decoder.depth = 2"]
    config.parse([str(EXPERIMENTS / f"{name}.gin")], bindings)
    experiment = config.call(Experiment)
    model = experiment.check_model()
    batches = [benchmark.synthetic_batch(model, n, benchmark.text_length_of(experiment, model)) for n in plan.SIZES]
    rows = plan.plan(experiment, batches, plan.DEVICES["a100"], count).rows

    runtime = request.getfixturevalue("eight") if count == 8 else ONE
    experiment, state = load(name, *bindings, f"train.batch_size = {96 * count}", runtime=runtime)
    for row in rows:
        remat.set_policy(state.model, row.policy, row.every)
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        for _ in steps(experiment, state, 2):
            pass
        state.optimizer.zero_grad(set_to_none=True)
        assert row.fixed + 96 * row.each == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.05), row
