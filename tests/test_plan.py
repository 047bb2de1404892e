"""A plan of memory and time; tests/nullcuda compares it with what PyTorch's allocator counts."""

import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from jetformer import benchmark, config, plan
from jetformer.experiment import Experiment
from runs import SMALL, start

H100 = plan.DEVICES["h100"]


def plan_of(count=1, device=H100, **overrides):
    """Plans the small experiment."""
    values = SMALL | {name.replace("__", "."): value for name, value in overrides.items()}
    config.parse(["experiments/digits.gin"], [f"{name} = {value}" for name, value in values.items()])
    experiment = config.call(Experiment)
    batches = [benchmark.synthetic_batch(experiment.check_model(), size, 1) for size in (4, 8)]
    return experiment, plan.plan(experiment, batches, device, count)


@pytest.fixture(scope="module", autouse=True)
def small():
    """With policies that all differ for two couplings and a block of the decoder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "POLICIES", (("none", 1), ("everything", 2), ("everything", 1)))
        yield plan_of()


def test_state(small):
    _, found = small
    parameters = 4 * found.parameters
    steps = found.bytes.pop("optimizer") - 2 * parameters
    assert 0 < steps < 0.1 * parameters  # a number for each tensor
    assert found.bytes == {"parameters": parameters, "gradients": parameters, "average": parameters}


def test_what_is_frozen_has_no_gradient_and_no_moments():
    _, found = plan_of(make_optimizer__frozen='("flow.*",)', train__ema_decay=0.0)
    assert found.bytes["gradients"] < found.bytes["parameters"] == 4 * found.parameters
    assert found.bytes["optimizer"] == pytest.approx(2 * found.bytes["gradients"], rel=0.1)
    assert found.bytes["average"] == 0


@pytest.mark.parametrize(("mesh", "shards"), [("{'fsdp': -1}", 4), ("{'data': -1, 'fsdp': 2}", 2)])
def test_devices_share_the_state_by_the_mesh(small, mesh, shards):
    _, found = plan_of(4, train__mesh=mesh)
    assert found.parameters == small[1].parameters
    for use in ("parameters", "gradients", "average"):
        assert found.bytes[use] == pytest.approx(4 * found.parameters / shards, rel=0.15)  # rows are padded
    # Activations are a device's own.
    for row, whole in zip(found.rows, small[1].rows, strict=True):
        assert row.each == pytest.approx(whole.each, rel=0.05)


def test_recomputation_takes_time_and_saves_memory(small):
    rows = {(row.policy, row.every): row for row in small[1].rows}
    none, half, everything = rows["none", 1], rows["everything", 2], rows["everything", 1]
    assert none.each > half.each > everything.each
    assert none.largest < half.largest < everything.largest
    for i in range(2):
        assert none.seconds[i] < half.seconds[i] < everything.seconds[i]
        assert none.utilization[i] > half.utilization[i] > everything.utilization[i]
    assert none.utilization[0] > none.utilization[1]


def test_flops_are_those_of_the_benchmark(small):
    experiment, found = small
    sizes = (4, 8)
    batches = [benchmark.synthetic_batch(experiment.check_model(), size, 1) for size in sizes]
    first, second = (benchmark.count_flops(experiment, batch) for batch in batches)
    row = found.rows[0]
    assert row.policy == "none"
    assert row.utilization[0] * row.seconds[0] * H100.rate == pytest.approx((second - first) / 4, rel=0.01)


def test_a_model_that_does_not_fit():
    _, found = plan_of(device=plan.Device(memory=1e5, rate=1e12, bandwidth=1e12))
    assert all((row.largest, row.seconds, row.utilization) == (0, None, None) for row in found.rows)
    assert len(plan.report("tiny", found).splitlines()) == 4 + len(found.rows)


def test_a_ledger_counts_what_lives():
    with FakeTensorMode(), plan.Ledger(plan.Device(memory=0, rate=1e9, bandwidth=1e6)) as ledger:
        a = torch.ones(1000)
        b = a.view(10, 100) * 2
        assert ledger.now == ledger.peak == 8000
        del a
        assert (ledger.now, ledger.peak) == (4000, 8000)
        assert ledger.seconds == pytest.approx(12e-3)  # written; read and written
        c = b.t() @ b
        assert (ledger.now, ledger.peak, ledger.flops) == (44_000, 44_000, 200_000)
        c.untyped_storage().resize_(0)
        assert (ledger.now, ledger.peak) == (4000, 44_000)
        before = ledger.seconds
        b.add_(1)
        assert ledger.now == 4000
        assert ledger.seconds - before == pytest.approx(8e-3)


@pytest.mark.parametrize("name", ["h100", "b7x8", "h100x0", "h100 x 8", ""])
def test_a_device_that_is_none(name):
    with pytest.raises(ValueError, match=f"--plan={name}: .*h100.*v5e.*h100x8"):
        plan.parse(name)


def test_the_program_prints_a_plan():
    flags = [f"--gin_bindings={name} = {value}" for name, value in SMALL.items()]
    process = start(
        [sys.executable, "-m", "jetformer.benchmark", "--gin_file=experiments/digits.gin", "--plan=v5ex2", *flags]
    )
    out, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    assert "v5ex2" in out
    assert "everything, 1 in 4" in out
