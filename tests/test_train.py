"""The training program: resumed equals uninterrupted, parts equal the whole, mistakes end in one line."""

import fcntl
import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
from PIL import Image
from upath import UPath

from jetformer import checkpoint, config, metrics
from jetformer.evaluators import best
from jetformer.experiment import Experiment
from jetformer.loops.torch_loop import TorchLoop
from jetformer.preemption import Preempted
from jetformer.runtime import Runtime
from jetformer.state import load
from jetformer.trainer import NonFiniteLoss, train
from runs import bindings, checkpoint_tensors, command, results, run, scalars, start


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
    """The workdir of an uninterrupted run of 12 steps."""
    workdir = tmp_path_factory.mktemp("finished")
    run(workdir, data_dir)
    return workdir


@pytest.mark.slow
def test_what_a_run_leaves_behind(finished):
    written = scalars(finished)
    for name in ("train/loss", "train/bits_per_dim", "grad_norm", "param_norm", "learning_rate",
                 "noise_scale", "examples_per_sec", "data_wait_fraction", "train/effective_components",
                 "train/distinct_components", "train/flow_expansion_used"):  # fmt: skip
        assert sorted(written[name]) == list(range(1, 13)), name
    for name in ("val/bits_per_dim", "val_ema/bits_per_dim", "val/bits_per_dim_logdet", "val_ema/distinct_components",
                 "val/effective_components"):  # fmt: skip
        assert sorted(written[name]) == [6, 12], name
    assert "train/responsibilities" not in written
    assert written["noise_scale"][1] == 8.0
    assert written["learning_rate"][1] == 0.0  # as the experiment's schedule, which starts with a warm-up
    assert checkpoint.steps(finished) == [12]
    with Image.open(finished / "eval_samples" / "grid" / "000000012.png") as image:
        width, height = image.size
    rows, line = divmod(height, 10)  # each of two images of 8 pixels with lines around them, enlarged, under a label
    assert (width % 19, line, (rows - 14) * 19) == (0, 0, width * 10)
    for name in ("val", "samples"):
        assert [line["step"] for line in results(finished, name)] == ([6, 12] if name == "val" else [12])
    assert {line["step"]: line["val_ema/bits_per_dim"] for line in results(finished, "val")} == pytest.approx(
        written["val_ema/bits_per_dim"], rel=1e-6
    )
    facts = json.loads((finished / "run.json").read_text())
    assert facts["versions"]["torch"] == torch.__version__
    assert (facts["total_steps"], facts["batch_size"], facts["train_examples"]) == (12, 16, 1347)
    assert {"name": "image_emb.bias", "shape": [16], "dtype": "float32", "size": 16} in facts["parameters"]
    assert "JetFormer.num_mixtures = 4" in (finished / config.CONFIG_FILE).read_text()
    operative = (finished / config.OPERATIVE_CONFIG_FILE).read_text()
    assert "Jet.scale_factor = 2.0" in operative  # a default
    assert "Samples.temperature_scales = 1.0" in operative  # used at the end only


@pytest.mark.slow
def test_a_killed_run_resumes_bit_by_bit(finished, tmp_path, data_dir):
    """SIGKILL in the middle, then the same command again: the same losses, the same weights."""
    args = command(tmp_path, bindings(data_dir))
    process = start(args)
    deadline = time.monotonic() + 120
    while not checkpoint.steps(tmp_path):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = checkpoint.latest(tmp_path)
    assert first < 12, "the run was over before it was killed"

    process = start(args)
    _, log = process.communicate(timeout=600)
    assert process.returncode == 0, log
    assert f"from step {first}" in log
    expected, resumed = scalars(finished), scalars(tmp_path)
    for name in ("train/loss", "grad_norm", "param_norm", "val/bits_per_dim"):
        steps = [step for step in expected[name] if step > first]
        assert steps
        for step in steps:
            assert resumed[name][step] == expected[name][step], (name, step)
    expected, resumed = (checkpoint_tensors(w, 12) for w in (finished, tmp_path))
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "returncode"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_run_that_is_stopped_saves(tmp_path, data_dir, signum, returncode):
    overrides = {"train__total_steps": 100_000, "train__checkpoint_steps": 2, "Likelihood__every_steps": 7}
    process = start(command(tmp_path, bindings(data_dir, **overrides)))
    deadline = time.monotonic() + 120
    while not checkpoint.steps(tmp_path):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signum)
    _, log = process.communicate(timeout=60)
    assert process.returncode == returncode, log
    assert "Traceback" not in log
    step = checkpoint.latest(tmp_path)
    assert f"{signum.name} after step {step}, which is saved" in log
    written = scalars(tmp_path)["train/loss"]
    assert max(written) == step
    run(tmp_path, data_dir, train__total_steps=step + 2)
    assert checkpoint.latest(tmp_path) == step + 2


@pytest.mark.slow
def test_a_run_mirrored_to_wandb(tmp_path, data_dir, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(tmp_path, data_dir, train__total_steps=2, train__wandb_project='"tests"')
    (directory,) = (tmp_path / "wandb").glob("offline-run-*")
    assert (tmp_path / metrics.WANDB_ID_FILE).read_text() in directory.name
    assert list(directory.glob("run-*.wandb"))
    assert list(scalars(tmp_path)["train/loss"]) == [1, 2]


@pytest.mark.slow
def test_sigterm_during_an_evaluation(tmp_path, data_dir, monkeypatch):
    """The step before it is saved, with the parameters and not with their moving average."""
    per_example = TorchLoop.per_example

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return per_example(*args, **kwargs)

    monkeypatch.setattr(TorchLoop, "per_example", interrupted)
    with pytest.raises(Preempted):
        run(tmp_path / "interrupted", data_dir, train__total_steps=6, train__checkpoint_steps=6)
    monkeypatch.undo()
    assert checkpoint.steps(tmp_path / "interrupted") == [6]
    run(tmp_path / "whole", data_dir, train__total_steps=6)
    expected, saved = (checkpoint_tensors(tmp_path / name, 6) for name in ("whole", "interrupted"))
    assert all(torch.equal(expected[name], saved[name]) for name in expected)
    # Resumed, the run makes up for the evaluation.
    assert not (tmp_path / "interrupted" / "eval_val" / "results.jsonl").exists()
    run(tmp_path / "interrupted", data_dir, train__total_steps=6, train__checkpoint_steps=6)
    figures = [results(tmp_path / name, "val")[0]["val_ema/bits_per_dim"] for name in ("whole", "interrupted")]
    assert figures[0] == figures[1]


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoints(finished, tmp_path, data_dir):
    """A limit of the size of files, below that of a checkpoint, stands in for the disk."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    before = checkpoint_tensors(workdir, 12)
    args = command(workdir, bindings(data_dir, train__total_steps=20, train__checkpoint_steps=16))
    process = start(["bash", "-c", 'ulimit -f 100; exec "$@"', "limited", *args])  # KiB
    _, log = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "Traceback" not in log
    line = log.splitlines()[-1]
    assert str(workdir / "checkpoints" / "000000016") in line
    assert "File too large" in line
    assert checkpoint.steps(workdir) == [12]
    after = checkpoint_tensors(workdir, 12)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_a_workdir_that_disappears(tmp_path, data_dir, monkeypatch):
    """It is deleted during the evaluation at step 6, before the checkpoint at step 8, which is not written."""
    workdir, per_example = tmp_path / "run", TorchLoop.per_example

    def deletes(*args, **kwargs):
        shutil.rmtree(workdir)
        (workdir / "eval_val").mkdir(parents=True)
        monkeypatch.undo()
        return per_example(*args, **kwargs)

    monkeypatch.setattr(TorchLoop, "per_example", deletes)
    with pytest.raises(FileNotFoundError, match=re.escape(str(workdir))) as error:
        run(workdir, data_dir)
    assert "\n" not in str(error.value)
    assert not (workdir / "checkpoints").exists()


@pytest.mark.slow
def test_an_evaluator_that_fails_leaves_the_run(finished, tmp_path, data_dir, monkeypatch, caplog):
    """It fails in the middle of an evaluation with the moving average. The others still run, training ends as if none
    had failed, and the last line names the failure."""
    per_example, calls = TorchLoop.per_example, []

    def fails_once(loop, runner, function, batches, **kwargs):
        calls.append(kwargs)
        if len(calls) == 2:
            batches = iter([next(batches), None])  # the second is no batch
        return per_example(loop, runner, function, batches, **kwargs)

    monkeypatch.setattr(TorchLoop, "per_example", fails_once)
    with pytest.raises(ValueError, match=r"^the run is complete, but 1 evaluation\(s\) failed, .*: val at step 6$"):
        run(tmp_path, data_dir)
    assert "val at step 6: " in caplog.text
    expected, left = (checkpoint_tensors(workdir, 12) for workdir in (finished, tmp_path))
    assert all(torch.equal(expected[name], left[name]) for name in expected)
    assert [line["step"] for line in results(tmp_path, "val")] == [12]
    assert [line["step"] for line in results(tmp_path, "samples")] == [12]
    run(tmp_path, data_dir, train__total_steps=12)  # again: nothing is missing at its last step


@pytest.mark.slow
def test_an_evaluator_that_can_no_longer_evaluate_leaves_the_run(tmp_path, data_dir, caplog):
    """A file that it needs has disappeared since the run started."""
    pytest.importorskip("torch_fidelity")
    overrides = {"train__evaluators": '{"fid": @Fid(), "val": @Likelihood()}', "Fid__every_steps": 6,
                 "Fid__statistics": f'"{tmp_path}/statistics.npz"', "train__checkpoint_steps": 4}  # fmt: skip
    with pytest.raises(ValueError, match=r"statistics\.npz"):  # before the first step it is an error
        run(tmp_path / "run", data_dir, **overrides)
    assert not (tmp_path / "run").exists()
    workdir = tmp_path / "resumed"
    run(workdir, data_dir, train__total_steps=4, train__evaluators="{}")
    with pytest.raises(ValueError, match=r"^the run is complete, but 1 evaluation\(s\) failed, .*: fid at step 4$"):
        run(workdir, data_dir, **overrides)
    (said,) = [record.message for record in caplog.records if record.levelname == "ERROR"]  # tried once
    assert said.startswith("fid at step 4: ")
    assert said.endswith(" (left out from here on)")
    assert [line["step"] for line in results(workdir, "val")] == [6, 12]
    assert checkpoint.latest(workdir) == 12


@pytest.mark.slow
def test_gradient_accumulation_is_the_large_batch(tmp_path, data_dir):
    losses = {}
    for parts in (1, 4):
        workdir = tmp_path / str(parts)
        run(workdir, data_dir, train__grad_accum_steps=parts, train__total_steps=4)
        losses[parts] = scalars(workdir)["train/loss"]
    assert losses[1] == pytest.approx(losses[4], rel=1e-5)


@pytest.mark.slow
def test_a_frozen_flow(tmp_path, data_dir):
    """Its parameters and their average stay equal to the bit; a resumed run is the same and freezes the same part."""
    overrides = {
        "train__total_steps": 8,
        "train__keep_last": 9,
        "train__evaluators": "{}",
        "train__activation_checkpointing": '"everything"',
        "make_optimizer__wd": 0.01,
    }
    frozen = overrides | {"make_optimizer__frozen": '("flow.*",)', "make_optimizer__lr_factors": '{"decoder.*": 0.5}'}
    run(tmp_path, data_dir, **frozen)
    half, whole = checkpoint_tensors(tmp_path, 4), checkpoint_tensors(tmp_path, 8)
    for name in whole:
        assert torch.equal(half[name], whole[name]) == (".flow." in f".{name.partition('/')[2]}"), name
    assert not any(name.startswith("optimizer/flow.") for name in whole)
    flow = [name.removeprefix("model/") for name in whole if name.startswith("model/flow.")]
    assert all(torch.equal(whole[f"ema/{name}"], whole[f"model/{name}"]) for name in flow if f"ema/{name}" in whole)
    shutil.rmtree(tmp_path / "checkpoints" / "000000008")
    with pytest.raises(ValueError, match=r"optimizer\.flow\..* step 4 .*train\.init_from") as error:
        run(tmp_path, data_dir, **overrides)
    assert "\n" not in str(error.value)
    run(tmp_path, data_dir, **frozen)
    resumed = checkpoint_tensors(tmp_path, 8)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_other_seed_other_run(finished, tmp_path, data_dir):
    run(tmp_path, data_dir, train__seed=1, train__total_steps=1)
    assert scalars(tmp_path)["train/loss"][1] != scalars(finished)["train/loss"][1]


@pytest.mark.slow
def test_learning_rate_and_weight_decay_are_applied(finished, tmp_path, data_dir):
    """With a tiny learning rate the parameters stay, and with weight decay they shrink."""
    norms = {}
    for wd in (0.0, 0.1):
        workdir = tmp_path / str(wd)
        run(workdir, data_dir, make_optimizer__lr=1e-12, make_optimizer__wd=wd, train__total_steps=3)
        norms[wd] = scalars(workdir)["param_norm"]
    assert norms[0.0][1] == norms[0.0][3] == norms[0.1][1]
    assert norms[0.1][3] < 0.97 * norms[0.1][1]


# Bits per dim fall in these steps: with "higher", the first evaluation is the best.
STOPPING = {
    "train__keep_best": '"val_ema/bits_per_dim"',
    "train__keep_best_mode": '"higher"',
    "train__patience": 3,
    "Likelihood__every_steps": 2,
}


@pytest.mark.slow
def test_the_best_checkpoint_and_early_stopping(tmp_path, data_dir, monkeypatch, caplog):
    """A run that is killed as it evaluates stops at the same step, with the same best checkpoint."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole, data_dir, **STOPPING)
    figures = {line["step"]: line["val_ema/bits_per_dim"] for line in results(whole, "val")}
    assert list(figures) == [2, 4, 6, 8]
    assert checkpoint.best(whole) == max(figures, key=figures.get) == 2
    assert checkpoint.steps(whole) == [2, 8]  # the best, and where it stopped
    assert [line["step"] for line in results(whole, "samples")] == [8]
    ranking = json.loads((whole / checkpoint.BEST_FILE).read_text())["ranking"]
    assert [(entry["step"], entry["value"]) for entry in ranking] == sorted(figures.items(), key=lambda x: -x[1])

    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    caplog.set_level("INFO")
    run(whole, data_dir, **STOPPING)
    assert before == {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    assert "complete at step 8" in caplog.text

    class Killed(BaseException):
        pass

    since = best.evaluations_since_best
    for count in (0, 2):

        def kill(*args, count=count):
            if since(*args) == count:
                raise Killed
            return since(*args)

        with monkeypatch.context() as patch:
            patch.setattr(best, "evaluations_since_best", kill)
            with pytest.raises(Killed):
                run(killed, data_dir, **STOPPING)
    assert checkpoint.steps(killed) == [2, 4]
    run(killed, data_dir, **STOPPING)
    assert checkpoint.steps(killed) == [2, 8]
    assert (killed / checkpoint.BEST_FILE).read_text() == (whole / checkpoint.BEST_FILE).read_text()
    state = load(UPath(killed), [], [], Runtime(torch.device("cpu")), step="best")[1]
    expected = checkpoint_tensors(whole, 2)
    assert all(torch.equal(x, expected[f"model/{name}"]) for name, x in state.model.state_dict().items())

    run(whole, data_dir, **STOPPING | {"train__patience": None})  # it resumes from where it stopped
    assert checkpoint.steps(whole) == [2, 12]


@pytest.mark.slow
def test_a_metric_that_its_evaluator_does_not_give(tmp_path, data_dir):
    overrides = {"train__keep_best": '"val/bits_per_dime"', "Likelihood__every_steps": 1}
    with pytest.raises(ValueError, match=r"'val/bits_per_dime'.*val/bits_per_dim,") as error:
        run(tmp_path, data_dir, **overrides)
    assert "\n" not in str(error.value)
    assert checkpoint.steps(tmp_path) == []


@pytest.mark.slow
def test_another_architecture_in_the_workdir(finished, data_dir):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="another architecture") as error:
        run(finished, data_dir, train__total_steps=13, Decoder__mlp_dim=64)
    assert "\n" not in str(error.value)
    assert "mlp" in str(error.value)
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_another_architecture_of_the_same_shapes(finished, tmp_path, data_dir):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    before = (workdir / config.CONFIG_FILE).read_text()
    with pytest.raises(ValueError, match=r"Jet\.scale_factor is 2\.0.*4\.0"):
        run(workdir, data_dir, train__total_steps=13, Jet__scale_factor=4.0)
    assert (workdir / config.CONFIG_FILE).read_text() == before
    # Arguments that do not change the function may differ, and a default may be given.
    free = {"train__activation_checkpointing": '"everything"', "JetFormer__scale_init": 0.7}
    run(workdir, data_dir, train__total_steps=13, Jet__scale_factor=2.0, **free)
    assert checkpoint.latest(workdir) == 13


@pytest.mark.slow
def test_a_finished_run_does_not_change(finished, data_dir, caplog):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    caplog.set_level("INFO")
    run(finished, data_dir, make_optimizer__lr=0.1, train__seed=3)
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    assert "complete at step 12" in caplog.text
    assert "make_optimizer.lr = 0.1, was 0.002" in caplog.text


@pytest.mark.slow
def test_two_runs_on_one_workdir(tmp_path, data_dir):
    quick = {"train__evaluators": "{}", "train__total_steps": 1}
    run(tmp_path, data_dir, **quick)
    refused = pytest.raises(ValueError, match=f"another process trains in {tmp_path}: {os.getpid()} on ")
    with (tmp_path / "lock").open("a") as lock, refused as error:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run(tmp_path, data_dir, **quick | {"train__total_steps": 2})
    assert "\n" not in str(error.value)
    assert checkpoint.latest(tmp_path) == 1
    run(tmp_path, data_dir, **quick | {"train__total_steps": 2})
    assert checkpoint.latest(tmp_path) == 2


@pytest.mark.slow
def test_a_run_resumed_with_other_settings(tmp_path, data_dir, caplog):
    quick = {"train__evaluators": "{}", "train__ema_decay": 0.0, "train__keep_last": 9}
    run(tmp_path, data_dir, train__total_steps=2, **quick)
    first = (tmp_path / config.CONFIG_FILE).read_text()
    trained = checkpoint_tensors(tmp_path, 2)
    for change, message in (({"train__seed": 1}, r"train\.seed = 1.* step 2 with 0"),
                            ({"train__batch_size": 8}, r"train\.batch_size = 8.* step 2 with 16")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            run(tmp_path, data_dir, train__total_steps=4, **quick, **change)
    assert (tmp_path / config.CONFIG_FILE).read_text() == first
    # A moving average may start later, from the parameters at that step.
    changes = quick | {"train__ema_decay": 0.999, "train__ema_warmup": False, "make_optimizer__lr": 1e-3}
    config.parse(["experiments/digits.gin"], bindings(data_dir, train__total_steps=4, train__seed=1, **changes))
    train(config.call(Experiment), UPath(tmp_path), Runtime(torch.device("cpu")), allow_changes=True)
    assert "make_optimizer.lr = 0.001, was 0.002" in caplog.text
    assert "train.seed = 1, was not bound" in caplog.text
    configs = {file.name: file.read_text() for file in (tmp_path / "configs").iterdir()}
    assert configs == {"000000000.gin": first, "000000002.gin": (tmp_path / config.CONFIG_FILE).read_text()}
    averaged = checkpoint_tensors(tmp_path, 4)
    for name in ("text_emb.weight", "image_emb.weight"):
        moved = (averaged[f"model/{name}"] - trained[f"model/{name}"]).abs().max()
        assert (averaged[f"ema/{name}"] - trained[f"model/{name}"]).abs().max() < 0.01 * moved


@pytest.mark.slow
def test_a_short_run_whose_average_is_of_its_start(data_dir, tmp_path, caplog):
    overrides = {"train__total_steps": 1, "train__evaluators": "{}", "train__ema_decay": 0.9}
    run(tmp_path / "warmed_up", data_dir, **overrides)
    assert "ema_warmup" not in caplog.text
    run(tmp_path / "not", data_dir, train__ema_warmup=False, **overrides)
    assert "ema_warmup" in caplog.text
    assert "90%" in caplog.text


@pytest.mark.slow
def test_a_damaged_run_json(tmp_path, data_dir):
    (tmp_path / "run.json").write_text('{"start_steps": [0')
    with pytest.raises(ValueError, match=r"run\.json is damaged \(.*\): delete it"):
        run(tmp_path, data_dir)
    (tmp_path / "run.json").unlink()
    for total_steps in (1, 2):
        run(tmp_path, data_dir, train__total_steps=total_steps, train__evaluators="{}")
    assert json.loads((tmp_path / "run.json").read_text())["start_steps"] == [0, 1]


@pytest.mark.slow
def test_a_run_that_is_already_further(finished, data_dir):
    with pytest.raises(ValueError, match=r"step 12\b.* 6\b"):
        run(finished, data_dir, train__total_steps=6)


@pytest.mark.slow
def test_an_infinite_gradient_stops_the_run(tmp_path, data_dir, monkeypatch):
    """The loss is finite at that step; the parameters after it are not saved."""
    clip = torch.nn.utils.clip_grad_norm_
    calls = []

    def clip_with_one_infinite_entry(parameters, max_norm):
        parameters = list(parameters)
        calls.append(len(calls))
        if len(calls) == 3:
            parameters[0].grad[0] = float("inf")
        return clip(parameters, max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_with_one_infinite_entry)
    with pytest.raises(NonFiniteLoss, match="not finite at step 3: grad_norm"):
        run(tmp_path, data_dir, train__checkpoint_steps=1, train__total_steps=3, train__log_steps=3)
    assert checkpoint.steps(tmp_path) == [2]


@pytest.mark.slow
def test_jet_alone(tmp_path, data_dir):
    overrides = {
        "train__model": "@Jet",
        "train__objective": "@JetObjective()",
        "train__evaluators": '{"val": @Likelihood()}',
        "train__noise_scale": 0.0,
        "Jet__input_shape": "(8, 8, 1)",
        "Jet__ps": 2,
    }
    run(tmp_path / "run", data_dir, **overrides)
    losses = scalars(tmp_path / "run")
    assert losses["val/bits_per_dim"][12] == pytest.approx(
        losses["val/bits_per_dim_latents"][12] - losses["val/bits_per_dim_logdet"][12], rel=1e-5
    )
    for wrong, message in (
        ({"train__noise_scale": 8.0}, "no noise curriculum"),
        ({"train__noise_min": 3.0}, "no noise curriculum"),
        ({"train__evaluators": '{"samples": @Samples()}'}, "not a Jet"),
        ({"Jet__input_shape": "(4, 4, 1)"}, "built for"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "other", data_dir, **overrides | wrong)
        assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_truncated_checkpoint(finished, tmp_path, data_dir):
    run(tmp_path, data_dir, train__total_steps=8, train__keep_last=2)
    assert checkpoint.steps(tmp_path) == [4, 8]
    (file,) = (tmp_path / "checkpoints" / "000000008").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"step 8 is damaged: {file.name}") as error:
        run(tmp_path, data_dir, train__total_steps=8)
    assert "resumes from step 4" in str(error.value)
    assert checkpoint.steps(tmp_path) == [4, 8]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, data_dir):
    overrides = {"train__checkpoint_steps": 1, "train__log_steps": 5, "train__keep_last": 9}
    run(tmp_path, data_dir, train__total_steps=2, **overrides)
    # Infinite noise makes the loss infinite or NaN.
    with pytest.raises(NonFiniteLoss, match=r"not finite at step 3: loss, grad_norm, bits_per_dim") as error:
        run(tmp_path, data_dir, train__total_steps=8, train__noise_scale=1e39, **overrides)
    assert "\n" not in str(error.value)
    assert checkpoint.steps(tmp_path) == [1, 2]
    assert all(value.isfinite().all() for value in checkpoint_tensors(tmp_path, 2).values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"Data__name": '"digitz"'}, "there is no dataset 'digitz'"),
        ({"Data__eval_split": '"val"'}, "validation"),
        ({"Patchify__patch_size": 3}, "does not divide into patches of 3"),
        ({"train__batch_size": 15, "train__grad_accum_steps": 2}, r"train\.batch_size = 15\b.*grad_accum_steps = 2"),
        ({"train__total_epochs": 3}, r"train\.total .*steps.*epochs"),
        ({"train__checkpoint_steps": 0}, "train.checkpoint_steps = 0"),
        ({"train__keep_last": 0}, r"train\.keep_last = 0"),
        ({"train__grad_accum_steps": 0}, "train.grad_accum_steps = 0"),
        ({"train__data": "@Data"}, r"train.data is a class: write @Data\(\)"),
        ({"train__evaluators": '{"val": @Likelihood}'}, r"train.evaluators\['val'\] is a class: write @Likelihood\(\)"),
        ({"train__evaluators": '{"a b": @Likelihood()}'}, "'a b'"),
        (
            {"train__evaluators": '{"val": None}'},
            r"train\.evaluators = {'val': None}.*Evaluator",
        ),
        ({"Likelihood__every_steps": 0}, "Likelihood.every_steps = 0"),
        ({"train__keep_best": '"vla/bits_per_dim"'}, r"train\.keep_best = 'vla/bits_per_dim'.*'vla'.*val, samples"),
        ({"train__keep_best": '"val/x"'}, r"train\.keep_best = 'val/x'.*train\.keep_best_mode"),
        ({"train__patience": 2}, r"train\.patience = 2.*train\.keep_best"),
        (STOPPING | {"Likelihood__every_steps": None}, r"train\.patience = 3.*'val'.*every_steps"),
        ({"Likelihood__num_draws": 0}, "Likelihood.num_draws = 0"),
        ({"Samples__prompts": "('3',)"}, "Samples: give num_classes or prompts"),
        ({"Samples__num_classes": 11}, "there is no class or token 10: the model has 0 to 9"),
        ({"Data__eval_split": '"validation[:0]"'}, "split 'validation\\[:0\\]' of 'digits' has no examples"),
        ({"Data__pp": '"label_as_text"'}, "has strings under 'image'"),
        ({"Data__pp": '"decode(channels=1) | central_crop(9) | label_as_text"'}, "cannot be preprocessed"),
        ({"Data__pp": '"decode | flip_ud"'}, "flip_ud"),
        ({"Data__pp": '"decode(channels=1) | label_as_text | flip_lr"'}, "'flip_lr' is random"),
        ({"JetFormer__image_shape": "(4, 4, 1)"}, r"images have shape \(8, 8, 1\)"),
        ({"JetFormer__mean_init_std": -0.1}, r"mean_init_std.*-0\.1"),
        (
            {"JetFormer__mean_init_std": 0.1, "JetFormer__multivariate": True, "JetFormer__num_mixtures": 1},
            r"mean_init_std.*0\.1.*multivariate",
        ),
        ({"Data__pp": "\"decode(channels=1) | keep('image')\""}, "the batch has no 'text'"),
        (
            {
                "JetFormer__vocab_size": 8,
                "JetFormer__bos_id": 5,
                "JetFormer__boi_id": 6,
                "JetFormer__nolabel_id": 7,
                "train__evaluators": '{"val": @Likelihood()}',
            },
            r"token 9: .* 0 to 4, .*JetFormer\.bos_id .*JetFormer\.vocab_size",
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_written(tmp_path, data_dir, overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        run(tmp_path / "run", data_dir, **overrides)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gin_bindings", "gin_file", "message"),
    [
        (["JetFormr.num_mixtures = 3"], "experiments/digits.gin", "JetFormr"),
        (["Jet.deepth = 3"], "experiments/digits.gin", "deepth"),
        (["Jet.depth = %DEPTH"], "experiments/digits.gin", "DEPTH"),
        (["TOTAL_STEP = 3"], "experiments/digits.gin", "nothing uses the macro TOTAL_STEP"),
        ([], "experiments/no_such.gin", "experiments/no_such.gin"),
        (["Decoder.num_kv_heads = 3"], "experiments/digits.gin", "num_kv_heads 3"),
    ],
)
def test_a_mistake_ends_in_one_line(tmp_path, gin_bindings, gin_file, message):
    workdir = tmp_path / "run"
    process = start(command(workdir, gin_bindings, gin_file))
    output, log = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "Traceback" not in output + log
    lines = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, log
    assert message in lines[0]
    assert not workdir.exists()


@pytest.mark.slow
def test_a_workdir_at_a_url(finished, tmp_path, data_dir):
    """A run in fsspec's memory, resumed there, is the run on disk."""
    workdir = UPath("memory://run")
    run(workdir, data_dir, train__total_steps=12, train__keep_last=9)
    assert checkpoint.steps(workdir) == [4, 8, 12]
    for step in (8, 12):
        UPath(f"memory://run/checkpoints/{step:09d}/COMPLETE").unlink()
    run(workdir, data_dir, train__total_steps=12, train__keep_last=9)
    names = {path.name.partition(".")[0] for path in workdir.iterdir()}
    assert names == {
        "checkpoints",
        "classes",
        "config",
        "configs",
        "operative_config",
        "run",
        "eval_val",
        "eval_samples",
        "events",
    }
    assert (workdir / "eval_samples" / "grid" / "000000012.png").read_bytes().startswith(b"\x89PNG")
    for path in workdir.iterdir():
        if path.name.startswith("events"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert scalars(tmp_path)["train/loss"] == scalars(finished)["train/loss"]


@pytest.mark.slow
@pytest.mark.parametrize(("workdir", "named"), [("nope://run", "nope"), ("/proc/run", "/proc/run")])
def test_a_workdir_that_cannot_be_written(workdir, named):
    """A URL of an unknown kind, and a file system that creates no files."""
    process = start(command(workdir, []))
    _, log = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "Traceback" not in log
    assert named in log.splitlines()[-1]
