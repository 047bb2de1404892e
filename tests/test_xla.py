"""The XLA loop equals the CPU loop on any number of devices: the same losses, checkpoints for both, one graph for all
steps.

Each run is a process of its own on XLA's CPU backend, with several devices.
"""

import importlib.util
import json
import pickle
import re
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from jetformer import checkpoint, prng
from runs import bindings, command, results, run, scalars, start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="torch_xla is not installed"),
]

# Large enough that some parameters are sharded over fsdp.
SIZES = {
    "Decoder__width": 32,
    "Decoder__mlp_dim": 128,
    "train__keep_last": 9,
    "train__evaluators": '{"val": @Likelihood()}',
    "Likelihood__every_steps": 8,
}


def start_on_xla(workdir, gin_bindings, devices=1, *more):
    args = command(workdir, gin_bindings, "experiments/digits.gin", "--device=xla", *more)
    return start(args, PJRT_DEVICE="CPU", CPU_NUM_DEVICES=str(devices))


def run_on_xla(workdir, gin_bindings, devices=1, *more, returncode=0):
    process = start_on_xla(workdir, gin_bindings, devices, *more)
    _, log = process.communicate(timeout=900)
    assert process.returncode == returncode, log[-5000:]
    return log


def run_job(program, workdir, *flags):
    """Runs a program on a workdir, on two XLA devices or on the CPU."""
    args = [sys.executable, "-m", f"jetformer.{program}", f"--workdir={workdir}", *flags]
    process = start(args, PJRT_DEVICE="CPU", CPU_NUM_DEVICES="2")
    _, log = process.communicate(timeout=900)
    assert process.returncode == 0, log[-5000:]
    return log


def chunks(workdir, step, name):
    """Returns the number of shards of a tensor in a checkpoint."""
    metadata = pickle.loads((workdir / "checkpoints" / f"{step:09d}" / ".metadata").read_bytes())
    return len(metadata.state_dict_metadata[name].chunks)


@pytest.fixture(scope="module")
def digits_on_cpu(tmp_path_factory, data_dir):
    workdir = tmp_path_factory.mktemp("digits")
    run_process(workdir, digits(data_dir))
    return scalars(workdir)


def digits(data_dir, *more):
    """Returns bindings for 20 steps of `digits.gin`, otherwise unchanged."""
    return [
        f'Data.data_dir = "{data_dir}"',
        "train.total_steps = 20",
        "train.log_steps = 1",
        'train.evaluators = {"val": @Likelihood()}',
        "Likelihood.every_steps = 20",
        *more,
    ]


def run_process(workdir, gin_bindings):
    process = start(command(workdir, gin_bindings))
    _, log = process.communicate(timeout=900)
    assert process.returncode == 0, log[-5000:]


@pytest.mark.parametrize(
    ("devices", "mesh", "pieces"),
    [
        (1, None, 1),
        (4, {"data": -1}, 1),
        (4, {"fsdp": -1}, 4),
        (4, {"data": 2, "fsdp": 2}, 2),
    ],
    ids=["one", "data", "fsdp", "both"],
)
def test_losses_are_those_of_the_cpu_loop(digits_on_cpu, tmp_path, data_dir, devices, mesh, pieces):
    run_on_xla(tmp_path, digits(data_dir, f"train.mesh = {mesh}"), devices)
    written = scalars(tmp_path)
    components = [f"{where}/{kind}_components" for where in ("train", "val") for kind in ("effective", "distinct")]
    for name in ("train/loss", "val/bits_per_dim", "val_ema/bits_per_dim", *components):
        assert written[name] == pytest.approx(digits_on_cpu[name], rel=1e-5), name
    assert written["grad_norm"] == pytest.approx(digits_on_cpu["grad_norm"], rel=1e-3)
    assert sorted(written["train/loss"]) == list(range(1, 21))
    assert chunks(tmp_path, 20, "model.decoder.blocks.0.mlp.gate_up.weight") == pieces
    assert chunks(tmp_path, 20, "optimizer.decoder.blocks.0.mlp.gate_up.weight.exp_avg") == pieces
    assert any((tmp_path / "compilation_cache").iterdir())


@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        ({"train__grad_accum_steps": 2}, 1e-5),
        ({"train__activation_checkpointing": '"everything"'}, 1e-5),
        ({"train__autocast": '"bfloat16"', "JetFormer__head_dtype": '"bfloat16"'}, 1e-2),
    ],
    ids=["accumulation", "checkpointing", "bfloat16"],
)
def test_losses_with(tmp_path, data_dir, overrides, tolerance):
    common = SIZES | {
        "train__total_steps": 4,
        "train__mesh": "{'data': 1, 'fsdp': -1}",
        "make_optimizer__frozen": '("flow.couplings.0.*", "text_emb.weight")',
    }
    run(tmp_path / "cpu", data_dir, **common)
    run_on_xla(tmp_path / "xla", bindings(data_dir, **common, **overrides), devices=2)
    expected, actual = scalars(tmp_path / "cpu"), scalars(tmp_path / "xla")
    for name in ("train/loss", "val/bits_per_dim"):
        assert actual[name] == pytest.approx(expected[name], rel=tolerance), name


def test_muon_frozen_parameters_and_a_factored_prior(tmp_path, data_dir):
    common = SIZES | {
        "train__total_steps": 4,
        "make_optimizer__muon": True,
        "make_optimizer__frozen": '("flow.couplings.0.*", "text_emb.weight")',
        "make_optimizer__lr_factors": '{"decoder.*": 0.5}',
        "JetFormer__out_dim": 2,
        "JetFormer__factored_prior": "@FactoredPrior",
        "train__evaluators": '{"samples": @Samples()}',
        "Samples__every_steps": 4,
    }
    run(tmp_path / "cpu", data_dir, **common)
    run_on_xla(tmp_path / "xla", bindings(data_dir, **common, train__mesh="{'data': 1, 'fsdp': -1}"), devices=2)
    expected, actual = scalars(tmp_path / "cpu"), scalars(tmp_path / "xla")
    assert actual["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)
    paths = [tmp_path / name / "eval_samples" / "grid" / "000000004.png" for name in ("cpu", "xla")]
    one, other = (np.asarray(Image.open(path)).astype(int) for path in paths)
    assert np.abs(one - other).max() <= 2


@pytest.mark.parametrize(
    "how",
    [
        {"Jet__actnorm": True, "Jet__invertible_dense": '"lu"', "Jet__masking": True, "Jet__scale_form": '"exp"'},
        {"Jet__invertible_dense": '"plain"', "Jet__predictor": '"cnn"', "Jet__num_levels": 2},
        {
            "train__model": "@TarFlow",
            "TarFlow__input_shape": "(8, 8, 1)",
            "TarFlow__depth": 2,
            "TarFlow__block_depth": 1,
            "TarFlow__emb_dim": 16,
            "TarFlow__num_heads": 2,
            "TarFlow__ps": 4,
            "JetObjective__noise_std": 0.1,
            "FlowSamples__denoise": True,
        },
        {
            "train__model": "@TarFlow",
            "train__objective": "@DistillObjective()",
            "TarFlow__input_shape": "(8, 8, 1)",
            "TarFlow__depth": 1,
            "TarFlow__block_depth": 1,
            "TarFlow__emb_dim": 16,
            "TarFlow__num_heads": 2,
            "TarFlow__student": "@Student",
            "Student__emb_dim": 16,
            "Student__num_heads": 2,
        },
    ],
    ids=["glow", "cnn", "tarflow", "student"],
)
def test_a_flow_alone(tmp_path, data_dir, how):
    """Every piece of it has a lowering, starts from the same weights, and inverts itself."""
    flow = {
        "train__model": "@Jet",
        "train__objective": "@JetObjective()",
        "train__evaluators": '{"val": @Likelihood(), "samples": @FlowSamples()}',
        "train__noise_scale": 0.0,
        "train__total_steps": 3,
        "Likelihood__every_steps": 3,
        "FlowSamples__every_steps": 3,
        "Jet__input_shape": "(8, 8, 1)",
        "Jet__ps": 2,
        **how,
    }
    run(tmp_path / "cpu", data_dir, **flow)
    run_on_xla(tmp_path / "xla", bindings(data_dir, **flow), devices=2)
    expected, actual = scalars(tmp_path / "cpu"), scalars(tmp_path / "xla")
    (score,) = {"val/bits_per_dim", "val/noisy_bits_per_dim", "val/student_error"} & expected.keys()
    for name in ("train/loss", score, "samples/latents_std"):
        assert actual[name] == pytest.approx(expected[name], rel=1e-5), name
    assert "TarFlow__student" in how or actual["samples/round_trip_error"][3] < 0.01
    assert set(actual["xla/fallbacks"].values()) == {0.0}


def test_nothing_is_compiled_after_the_second_step(tmp_path, data_dir):
    """200 steps that log; every fiftieth evaluates, samples and saves."""
    everything = {f"{name}_steps": 50 for name in ("Likelihood__every", "Samples__every", "train__checkpoint")}
    overrides = {"train__total_steps": 200, "train__log_steps": 1, "train__ema_decay": 0.0, **everything}
    log = run_on_xla(tmp_path, bindings(data_dir, **overrides), devices=2)
    written = scalars(tmp_path)
    compilations = written["xla/compilations"]
    assert sorted(compilations) == list(range(1, 201))
    assert compilations[2] == compilations[10]
    assert compilations[50] < compilations[51]  # the first evaluation and sampling
    assert compilations[51] == compilations[200]
    assert set(written["xla/fallbacks"].values()) == {0.0}
    assert sorted(written["val/bits_per_dim"]) == [50, 100, 150, 200]
    assert len(list((tmp_path / "eval_samples" / "grid").iterdir())) == 4
    assert "compiled a new graph" not in log
    assert written["trace_fraction"][200] > 0


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, data_dir):
    """An uninterrupted run of 8 steps on 2 × 2 devices, with a checkpoint at step 4."""
    workdir = tmp_path_factory.mktemp("sharded")
    run_on_xla(workdir, sharded_bindings(data_dir), devices=4)
    assert chunks(workdir, 4, "model.decoder.blocks.0.mlp.gate_up.weight") == 2
    return workdir


def sharded_bindings(data_dir, mesh="{'data': 2, 'fsdp': 2}", **overrides):
    return bindings(data_dir, **SIZES, train__mesh=mesh, **{"train__total_steps": 8} | overrides)


def half_of(workdir, to):
    """A workdir at step 4 of another one."""
    shutil.copytree(workdir / "checkpoints" / "000000004", to / "checkpoints" / "000000004")
    return to


def test_a_killed_run_resumes_bit_by_bit(sharded, tmp_path, data_dir):
    process = start_on_xla(tmp_path, sharded_bindings(data_dir, train__checkpoint_steps=1), devices=4)
    deadline = time.monotonic() + 200
    while not checkpoint.steps(tmp_path):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = checkpoint.latest(tmp_path)
    assert first < 8, "the run was over before it was killed"
    log = run_on_xla(tmp_path, sharded_bindings(data_dir, train__checkpoint_steps=1), devices=4)
    assert f"from step {first}" in log
    expected, resumed = scalars(sharded), scalars(tmp_path)
    for name in ("train/loss", "grad_norm", "param_norm", "val/bits_per_dim"):
        for step in range(first + 1, 9):
            assert resumed[name].get(step) == expected[name].get(step), (name, step)


@pytest.mark.parametrize("devices", [1, 2])
def test_checkpoints_of_four_devices_are_read_by_fewer(sharded, tmp_path, data_dir, devices):
    run_on_xla(half_of(sharded, tmp_path), sharded_bindings(data_dir, "{'fsdp': -1}"), devices)
    assert_continues(sharded, tmp_path)


def test_checkpoints_of_four_devices_are_read_by_the_cpu_loop(sharded, tmp_path, data_dir):
    run(half_of(sharded, tmp_path / "run"), data_dir, **SIZES, train__total_steps=8)
    assert_continues(sharded, tmp_path / "run")


def test_checkpoints_of_the_cpu_loop_are_read_by_four_devices(sharded, tmp_path, data_dir):
    run(tmp_path / "cpu", data_dir, **SIZES, train__total_steps=8)
    workdir = half_of(tmp_path / "cpu", tmp_path / "run")
    run_on_xla(workdir, sharded_bindings(data_dir, "{'fsdp': -1}"), devices=4)
    assert_continues(sharded, workdir)


def assert_continues(expected, workdir):
    expected, actual = scalars(expected), scalars(workdir)
    for name in ("train/loss", "param_norm"):
        for step in range(5, 9):
            assert actual[name][step] == pytest.approx(expected[name][step], rel=1e-5), (name, step)
    assert actual["val_ema/bits_per_dim"][8] == pytest.approx(expected["val_ema/bits_per_dim"][8], rel=1e-5)


def test_a_finished_run_does_nothing(sharded, tmp_path, data_dir):
    workdir = tmp_path / "run"
    shutil.copytree(sharded, workdir)
    log = run_on_xla(workdir, sharded_bindings(data_dir), devices=4)
    assert "complete at step 8" in log


def test_sigterm_saves_and_asks_for_a_restart(sharded, tmp_path, data_dir):
    process = start_on_xla(tmp_path, sharded_bindings(data_dir, train__total_steps=100_000), devices=4)
    deadline = time.monotonic() + 200
    while not checkpoint.steps(tmp_path):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=100)
    assert process.returncode == 75, log[-5000:]
    assert checkpoint.latest(tmp_path) >= 4
    assert "Traceback" not in log


def test_evaluation_and_sampling_programs_read_it(sharded, tmp_path, data_dir):
    """Evaluation and sampling on two devices and on the CPU, from a checkpoint of four."""
    workdir = tmp_path / "run"
    shutil.copytree(sharded, workdir)
    # 41 examples in batches of 16, and 9 samples in one batch: no multiples of the number of devices.
    gin = ["Data.eval_split = 'validation[:41]'", "Samples.num_images = 3", "Samples.num_classes = 3",
           'train.evaluators = {"val": @Likelihood(), "samples": @Samples(), "probe": @Probe()}',
           "Probe.shots = (None,)", "Probe.train_split = 'train[:77]'"]  # fmt: skip
    found = {}
    for device in ("xla", "cpu"):
        copied = tmp_path / f"evaluated_{device}"
        shutil.copytree(sharded, copied, ignore=shutil.ignore_patterns("eval_*"))
        flags = [f"--device={device}", "--once", *(f"--gin_bindings={binding}" for binding in gin)]
        run_job("evaluate", copied, *flags)
        found[device] = {name: results(copied, name)[0] for name in ("val", "samples", "probe")}
        found[device]["picture"] = np.asarray(Image.open(copied / "eval_samples" / "grid" / "000000008.png")).astype(
            int
        )
    assert np.abs(found["xla"].pop("picture") - found["cpu"].pop("picture")).max() <= 1
    for name, expected in found["cpu"].items():
        for tag in expected.keys() - {"seconds"}:
            absolute = 1e-7 if name == "val" else 1e-3  # the share of expansion of a flow that hardly expands is near 0
            assert found["xla"][name][tag] == pytest.approx(expected[tag], rel=1e-5, abs=absolute), tag
    drawn, likelihoods = {}, {}
    for device in ("xla", "cpu"):
        out = tmp_path / device
        run_job("sample", workdir, f"--device={device}", "--classes=3,7", "--num_images=2", f"--out={out}")
        records = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        drawn[device] = [np.asarray(Image.open(out / record["file"])).astype(int) for record in records]
        likelihoods[device] = [record["log_likelihood"] for record in records]
    assert np.abs(np.subtract(drawn["xla"], drawn["cpu"])).max() <= 1
    assert likelihoods["xla"] == pytest.approx(likelihoods["cpu"], rel=1e-4)


def test_checkpoints_wait_for_steps_that_have_not_ended(tmp_path):
    """A save and a load that start before the step that computes their tensors has ended."""
    code = """
import sys
from jetformer import runtime
machine = runtime.initialize("xla")
import torch
from jetformer import checkpoint
from jetformer.loops.xla_loop import XlaLoop
loop = XlaLoop(machine, {"fsdp": -1})
checkpointer = checkpoint.Checkpointer(sys.argv[1], keep_last=10, **loop.checkpointing())

def in_the_midst_of_a_step():
    w = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).to(machine.device)
    for _ in range(40):
        w = torch.tanh(w @ w)
    loop.place_state([w])  # starts it
    return {"w": w}

for step in range(1, 11):
    checkpointer.save(step, in_the_midst_of_a_step())
checkpointer.wait()
expected = checkpoint.Checkpoint(sys.argv[1], 1).restore({"w": torch.empty(512, 512)})["w"]
assert expected.abs().max() > 0
for step in range(1, 11):
    saved = checkpoint.Checkpoint(sys.argv[1], step)
    loaded = saved.restore(in_the_midst_of_a_step(), loop.load_planner())["w"]
    assert torch.equal(loaded.cpu(), expected), step
"""
    args = [sys.executable, "-c", code, str(tmp_path)]
    process = start(args, PJRT_DEVICE="CPU", CPU_NUM_DEVICES="4")
    _, log = process.communicate(timeout=900)
    assert process.returncode == 0, log[-5000:]


def test_decoding_is_one_graph_for_all_tokens(tmp_path):
    """Images with guidance and prompts of several lengths, and texts: as on the CPU, compiled once, no fallbacks."""
    code = """
import sys
from jetformer import runtime
device = runtime.initialize(sys.argv[1]).device
import torch
from jetformer import prng
from jetformer.sampling import decode
from jetformer.sampling.guidance import Guidance
from small_models import small_model
if device.type == "xla":
    from jetformer.loops.xla_loop import XlaLoop as Loop
else:
    from jetformer.loops.torch_loop import TorchLoop as Loop
loop = Loop(runtime.Runtime(device))
model = small_model(untie_output_vocab=True, num_mixtures=3).float().eval().to(device)
mask = torch.tensor([[True, False, False], [True, True, True]])
results = []
for seed in range(3):
    text = (torch.arange(6).view(2, 3) + seed).to(device)
    keys = prng.example_keys(seed, torch.arange(2, dtype=torch.int32)).to(device)
    images, nats = decode.sample_images(
        model, text, keys, text_mask=mask.to(device), guidance=Guidance("density", 1.5), compile=loop.compile
    )
    picture = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    tokens = loop.compile(lambda: decode.encode_images(model, picture.to(device), keys).tokens)()
    texts, _, text_nats = decode.sample_text(
        model, keys, image_tokens=tokens, max_length=20, vocab_size=10, eos_id=1, top_p=0.9, compile=loop.compile
    )
    results.append([x.cpu() for x in (images, nats, texts, text_nats)])
    counters = loop.counters()
    print(counters)
    if seed == 1:
        compiled = counters.get("xla/compilations")
assert counters.get("xla/compilations") == compiled, counters
assert not counters.get("xla/fallbacks"), counters
torch.save(results, sys.argv[2])
"""
    drawn = {}
    for device in ("cpu", "xla"):
        path = tmp_path / f"{device}.pt"
        process = start([sys.executable, "-c", code, device, str(path)], PJRT_DEVICE="CPU", PYTHONPATH="tests")
        _, log = process.communicate(timeout=900)
        assert process.returncode == 0, log[-5000:]
        drawn[device] = torch.load(path)
    for actual, expected in zip(drawn["xla"], drawn["cpu"], strict=True):
        assert (actual[0].int() - expected[0].int()).abs().max() <= 1
        assert torch.equal(actual[2], expected[2])
        for i in (1, 3):
            torch.testing.assert_close(actual[i], expected[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train__batch_size": 18}, r"train\.batch_size = 18\b.* 4 devices"),
        ({"train__batch_size": 24, "train__grad_accum_steps": 4}, r"grad_accum_steps = 6\b.* 4 devices"),
        ({"train__eval_batch_size": 10}, r"train\.eval_batch_size = 10\b.* 4 devices"),
        ({"train__mesh": "{'data': 3}"}, r"{'data': 3}.* 4 device"),
        ({"train__mesh": "{'model': 4}"}, r"{'model': 4}.*'data'.*'fsdp'"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, data_dir, overrides, message):
    log = run_on_xla(tmp_path / "run", bindings(data_dir, **overrides), 4, returncode=1)
    assert "Traceback" not in log
    lines = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, log
    assert re.search(message, lines[0])
    assert not (tmp_path / "run").exists()


def test_random_numbers_are_those_of_the_cpu(tmp_path):
    """The same random words; normal draws equal to rounding."""
    code = """
import sys, torch
from jetformer import prng, runtime
device = runtime.initialize("xla").device
keys = prng.example_keys(3, torch.arange(5, dtype=torch.int32, device=device))
drawn = keys, prng.bits(keys, (7, 3)), prng.uniform(keys, ()), prng.normal(keys, (9,))
torch.save([x.cpu() for x in drawn], sys.argv[1])
"""
    process = start([sys.executable, "-c", code, str(tmp_path / "x.pt")], PJRT_DEVICE="CPU")
    _, log = process.communicate(timeout=200)
    assert process.returncode == 0, log
    keys = prng.example_keys(3, torch.arange(5, dtype=torch.int32))
    expected = [keys, prng.bits(keys, (7, 3)), prng.uniform(keys, ()), prng.normal(keys, (9,))]
    actual = torch.load(tmp_path / "x.pt")
    assert all(torch.equal(a, b) for a, b in zip(actual[:3], expected[:3], strict=True))
    torch.testing.assert_close(actual[3], expected[3], rtol=1e-5, atol=1e-6)


def test_a_fallback_is_named_in_a_warning():
    code = """
from jetformer import runtime
machine = runtime.initialize("xla")
import torch
from jetformer.loops.xla_loop import XlaLoop
loop = XlaLoop(machine)
assert loop.counters()["xla/fallbacks"] == 0
torch.ones(3, device=machine.device).sum().item()  # waits for the device
assert loop.counters()["xla/fallbacks"] == 1
"""
    process = start([sys.executable, "-c", code], PJRT_DEVICE="CPU")
    _, log = process.communicate(timeout=200)
    assert process.returncode == 0, log
    assert "_local_scalar_dense (1 times)" in log
