"""Evaluation jobs: the metrics of training, each checkpoint once, through deletions and restarts, one process equals
several."""

import json
import shutil
import signal
import sys
import textwrap

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from upath import UPath

from jetformer import checkpoint, evaluation, metrics
from jetformer.evaluators import base
from jetformer.evaluators import results as files
from jetformer.evaluators.likelihood import Likelihood
from jetformer.evaluators.probe import Probe
from jetformer.preemption import Preempted
from jetformer.runtime import Runtime
from runs import results, run, scalars, start, torchrun

pytestmark = pytest.mark.slow

CPU = Runtime(torch.device("cpu"))
VAL = '{"val": @Likelihood()}'


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
    """A run of 8 steps with checkpoints at 2, 4, 6 and 8, evaluated during training at 4 and 8."""
    workdir = tmp_path_factory.mktemp("finished")
    run(workdir, data_dir, train__total_steps=8, train__checkpoint_steps=2, train__keep_last=9, train__evaluators=VAL,
        Likelihood__every_steps=4, train__keep_best='"val_ema/bits_per_dim"')  # fmt: skip
    return workdir


def copy_of(finished, to, *steps):
    """Copies the run as it is when it has saved these steps, without evaluations."""
    shutil.copytree(finished, to, ignore=shutil.ignore_patterns("eval_*"))
    for step in {2, 4, 6, 8} - set(steps):
        shutil.rmtree(to / "checkpoints" / f"{step:09d}")
    return to


def save(finished, workdir, step):
    """Saves a step, as training does."""
    name = f"checkpoints/{step:09d}"
    shutil.copytree(finished / name, workdir / name)


def job(workdir, *gin_bindings, names=None):
    return evaluation.Job(UPath(workdir), [], gin_bindings, CPU, names)


def follow(workdir, *gin_bindings, names=None, **how):
    """Follows a run to its end; returns the failures."""
    following = job(workdir, *gin_bindings, names=names)
    following.follow(poll_seconds=0.0, **how)
    following.close()
    return following.evaluations.failures


def evaluated(workdir, name="val"):
    return [line["step"] for line in results(workdir, name)]


def program(workdir, *flags):
    args = [sys.executable, "-m", "jetformer.evaluate", f"--workdir={workdir}", "--device=cpu", *flags]
    return start(args, OMP_NUM_THREADS="1")


def test_metrics_equal_those_of_training(finished, tmp_path):
    workdir = copy_of(finished, tmp_path / "run", 2, 4, 6, 8)
    assert follow(workdir) == []
    assert evaluated(workdir) == [2, 4, 6, 8]
    ours = {line["step"]: line for line in results(workdir, "val")}
    for trained in results(finished, "val"):
        assert {k: v for k, v in ours[trained["step"]].items() if k != "seconds"} == {
            k: v for k, v in trained.items() if k != "seconds"
        }
    written = scalars(workdir / "eval_val")
    for name in ("val/bits_per_dim", "val_ema/bits_per_dim"):
        assert written[name] == pytest.approx({step: line[name] for step, line in ours.items()}, rel=1e-6)
    follow(workdir)  # started again, it has nothing left to do
    assert evaluated(workdir) == [2, 4, 6, 8]


def test_steps_that_training_evaluated_are_skipped(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    before = (workdir / "eval_val" / "steps" / "000000004.json").stat().st_mtime_ns
    follow(workdir)
    assert evaluated(workdir) == [2, 4, 6, 8]
    assert (workdir / "eval_val" / "steps" / "000000004.json").stat().st_mtime_ns == before


def test_checkpoints_are_evaluated_as_they_appear(finished, tmp_path, monkeypatch):
    workdir = copy_of(finished, tmp_path / "run", 4)
    waited = []

    def sleep(seconds):
        """Saves the last step and deletes the one before, as training does meanwhile."""
        waited.append(seconds)
        save(finished, workdir, 8)
        shutil.rmtree(workdir / "checkpoints" / "000000004")

    monkeypatch.setattr(evaluation.time, "sleep", sleep)
    follow(workdir)
    assert len(waited) == 1
    assert evaluated(workdir) == [4, 8]


def deleting(monkeypatch, when, delete):
    """Deletes a checkpoint, as training does, before or after the check that precedes reading it."""
    check = checkpoint.Checkpoint.check_compatible

    def delete_then_check(*args):
        if when == "before":
            delete()
        check(*args)
        if when == "after":
            delete()

    monkeypatch.setattr(checkpoint.Checkpoint, "check_compatible", delete_then_check)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_checkpoint_deleted_while_it_is_read(finished, tmp_path, monkeypatch, caplog, when):
    workdir = copy_of(finished, tmp_path / "run", 4)

    def delete():
        if checkpoint.latest(workdir) == 4:
            save(finished, workdir, 8)
            shutil.rmtree(workdir / "checkpoints" / "000000004")

    deleting(monkeypatch, when, delete)
    caplog.set_level("WARNING")
    assert follow(workdir) == []
    assert evaluated(workdir) == [8]
    (warning,) = [record.message for record in caplog.records if record.name == "absl"]
    assert "step 4 was deleted while it was read" in warning


def test_waits_for_a_checkpoint_that_is_being_written(finished, tmp_path, monkeypatch):
    workdir = copy_of(finished, tmp_path / "run", 8)
    marker = workdir / "checkpoints" / "000000008" / checkpoint.MARKER
    whole = marker.read_bytes()
    marker.unlink()
    monkeypatch.setattr(evaluation.time, "sleep", lambda seconds: marker.write_bytes(whole))
    follow(workdir)
    assert evaluated(workdir) == [8]


@pytest.mark.parametrize(
    ("how", "steps"), [({"every": 3}, [6, 8]), ({"every": 2}, [4, 8]), ({"newest": True}, [8])], ids=str
)
def test_selected_checkpoints(finished, tmp_path, how, steps):
    workdir = copy_of(finished, tmp_path / "run", 2, 4, 6, 8)
    follow(workdir, **how)
    assert evaluated(workdir) == steps


@pytest.mark.parametrize(
    ("steps", "period", "newest", "expected"),
    [
        ([17, 30, 40], None, False, [17, 30, 40]),  # 17 was saved on SIGTERM
        ([17, 30, 40, 45], 20, False, [40, 45]),
        ([17, 30], 20, False, []),
        ([10, 20, 30], None, True, [30]),
        ([10, 20, 30], 20, True, [20]),
        ([], None, True, []),
    ],
)
def test_which_checkpoints_are_due(steps, period, newest, expected):
    assert evaluation.due(steps, 45, period, newest) == expected


def test_one_step(finished, tmp_path):
    workdir = copy_of(finished, tmp_path / "run", 2, 4, 6)
    shutil.copytree(finished / "eval_val", workdir / "eval_val")  # of 4, and of 8, whose checkpoint is gone
    for flag, step, steps in (("--step=best", 4, [4, 8]), ("--once", 6, [4, 6, 8]), ("--step=2", 2, [2, 4, 6, 8])):
        process = program(workdir, flag)
        _, log = process.communicate(timeout=600)
        assert process.returncode == 0, log
        assert f"Step {step}: val took" in log
        assert evaluated(workdir) == steps
    for flags, message in (
        (["--step=8"], "has no complete checkpoint of step 8, only of 2, 4, 6 (see train.keep_last)"),
        (["--step=2", "--once"], "give --once or --step"),
        (["--once", "--newest"], "--newest does not apply"),
        (["--evaluators="], "--evaluators is empty"),
        (["--evaluators=vall"], "there is no evaluator 'vall'; train.evaluators has val"),
        (["--gin_bindings=train.evaluators = {}"], "has no evaluators"),
    ):
        process = program(workdir, *flags)
        _, log = process.communicate(timeout=600)
        assert process.returncode == 1, log
        assert message in log.splitlines()[-1]
        assert "Traceback" not in log


def test_the_others_run_if_an_evaluator_fails(finished, tmp_path, monkeypatch):
    """One lacks its dataset, one fails at every step, one has a misspelt metric."""
    workdir = copy_of(finished, tmp_path / "run", 4, 8)
    several = (
        'train.evaluators = {"lacking": @lacking/Likelihood(), "failing": @failing/Likelihood(), "misspelt": @Fid(), '
        '"val": @Likelihood()}'
    )
    gin = [several, "lacking/Likelihood.data = @lacking/Data()", 'lacking/Data.name = "coco_capshuns"',
           "failing/Likelihood.text_prefix_prob = 1.0", 'Fid.metrics = ("frechet",)']  # fmt: skip
    call = Likelihood.__call__

    def fails(self, context):
        if self.text_prefix_prob is not None:
            raise OSError("no space left")
        return call(self, context)

    monkeypatch.setattr(Likelihood, "__call__", fails)
    following = job(workdir, *gin)
    following.follow(poll_seconds=0.0)
    following.close()
    assert evaluated(workdir) == [4, 8]
    assert [line.partition(":")[0] for line in following.evaluations.failures if line.startswith("lacking")] == [
        "lacking at step 4"
    ]
    assert "'coco_capshuns'" in following.evaluations.failures[0]
    (misspelt,) = [line for line in following.evaluations.failures if line.startswith("misspelt")]
    assert misspelt.startswith("misspelt at step 4: Fid.metrics: there is no 'frechet'")
    assert [line.partition(":")[0] for line in following.evaluations.failures if "failing" in line] == [
        "failing at step 4",
        "failing at step 8",
    ]


def test_a_failure_shows_in_the_exit_code(finished, tmp_path):
    workdir = copy_of(finished, tmp_path / "run", 8)
    process = program(
        workdir,
        '--gin_bindings=train.evaluators = {"lacking": @lacking/Likelihood(), "val": @Likelihood()}',
        "--gin_bindings=lacking/Likelihood.split = 'nope'",
    )
    _, log = process.communicate(timeout=600)
    assert process.returncode == 1
    assert evaluated(workdir) == [8]
    assert log.count("has no split 'nope'") == 1
    assert log.splitlines()[-1] == "error: 1 evaluation(s) failed, see the errors above: lacking at step 8"
    assert "Traceback" not in log


def test_a_job_ranks_the_checkpoints(finished, tmp_path, caplog):
    """By its own metric. Training, which has none, keeps the best, and the job ends where training stopped early."""
    workdir = copy_of(finished, tmp_path / "run", 2, 4, 6)
    facts = json.loads((workdir / "run.json").read_text())
    (workdir / "run.json").write_text(json.dumps(facts | {"stopped_at": 6}))
    follow(workdir, 'train.keep_best = "val/bits_per_dim"', 'train.keep_best_mode = "higher"')
    figures = {line["step"]: line["val/bits_per_dim"] for line in results(workdir, "val")}
    assert list(figures) == [2, 4, 6]
    first = max(figures, key=figures.get)
    assert checkpoint.best(workdir) == first
    checkpointer = checkpoint.Checkpointer(workdir)
    checkpointer.save(7, {"w": torch.zeros(1)})
    checkpointer.wait()
    assert checkpoint.steps(workdir) == [first, 7]


def test_a_run_without_new_checkpoints_times_out(finished, tmp_path, monkeypatch):
    """But not while checkpoints appear."""
    workdir, clock = copy_of(finished, tmp_path / "run", 2), [0.0]

    def sleep(seconds):
        clock[0] += 1.0
        if clock[0] in (2.0, 5.0):
            save(finished, workdir, {2.0: 4, 5.0: 6}[clock[0]])

    monkeypatch.setattr(evaluation.time, "sleep", sleep)
    monkeypatch.setattr(evaluation.time, "monotonic", lambda: clock[0])
    with pytest.raises(ValueError, match=r"after step 6 of 8 for 4 s: .*--timeout_seconds"):
        follow(workdir, timeout_seconds=3.5)
    assert evaluated(workdir) == [2, 4, 6]
    assert clock[0] == 9.0


def test_a_new_evaluator_is_a_new_file(tmp_path, data_dir):
    """The example in the docstring of `base.py`."""
    example = base.__doc__[base.__doc__.index("    @dataclasses") : base.__doc__.index("`Context.per_example`")]
    imports = """
        import dataclasses
        from jetformer.evaluators.base import Context, Evaluator, Results
        from jetformer.objectives import to_unit_range
    """
    (tmp_path / "new.py").write_text(textwrap.dedent(imports) + textwrap.dedent(example))
    (tmp_path / "broken.py").write_text("import nothing_like_it")
    code = f"""if True:
        import sys
        from jetformer import evaluators
        evaluators.__path__.append({str(tmp_path)!r})
        sys.path.append("tests")
        from jetformer import config
        from jetformer.experiment import Experiment
        from runs import untrained
        overrides = {{"train__evaluators": '{{"latents": @LatentStd()}}', "LatentStd__split": '"validation[:20]"'}}
        context = untrained({str(tmp_path)!r}, {str(data_dir)!r}, **overrides)
        evaluator = config.call(Experiment).evaluators["latents"]
        (std,) = evaluator(context).scalars.values()
        print(0.1 < std < 10)"""
    _, log = start([sys.executable, "-c", code]).communicate(timeout=100)
    message = "ImportError: jetformer/evaluators/broken.py cannot be imported: No module named 'nothing_like_it'"
    assert log.splitlines()[-1] == message
    (tmp_path / "broken.py").unlink()
    printed, log = start([sys.executable, "-c", code]).communicate(timeout=100)
    assert printed.splitlines()[-1:] == ["True"], log  # TFDS prints before, if it prepares the dataset here


def test_two_jobs_at_once_lose_nothing(finished, tmp_path):
    workdir = copy_of(finished, tmp_path / "run", 2, 4, 6, 8)
    processes = [program(workdir), program(workdir)]
    for process in processes:
        _, log = process.communicate(timeout=600)
        assert process.returncode == 0, log
    assert evaluated(workdir) == [2, 4, 6, 8]
    assert len(list((workdir / "eval_val").glob(".*"))) == 0
    figures = {line["step"]: line["val_ema/bits_per_dim"] for line in results(workdir, "val")}
    assert checkpoint.ranked(workdir) == sorted(figures, key=figures.get)
    assert len(list(workdir.glob(".*"))) == 0


def test_results_include_those_of_all_jobs(tmp_path):
    """If a job wrote results.jsonl without a record of another job, the next to write includes both."""

    workdir = UPath(tmp_path)
    written = metrics.Metrics(workdir, process_index=0)
    found = lambda value: base.Results(scalars={"x": value}, ema_scalars={"x": -value})
    add = lambda step, value: files.write(found(value), "e", step, 1.0, Likelihood(), workdir, written, CPU)
    add(4, 1.0)
    stale = (tmp_path / "eval_e" / "results.jsonl").read_text()
    add(2, 2.0)
    (tmp_path / "eval_e" / "results.jsonl").write_text(stale)
    assert files.evaluated_steps(workdir, "e") == {2, 4}
    (tmp_path / "eval_e" / "steps" / "notes.json").write_text("mine")
    files.build(workdir, "e")  # as a job does at its start and end
    assert [line["step"] for line in results(tmp_path, "e")] == [2, 4]
    loads = json.loads
    with pytest.MonkeyPatch.context() as patch:
        read = []
        patch.setattr(files.json, "loads", lambda text: read.append(loads(text)) or read[-1])
        add(6, 3.0)
        add(4, 4.0)
    assert [record["step"] for record in read] == [6, 4]  # and no others: on gs:// each takes its time
    written.close()
    assert [(line["step"], line["e/x"], line["e_ema/x"]) for line in results(tmp_path, "e")] == [
        (2, 2.0, -2.0), (4, 4.0, -4.0), (6, 3.0, -3.0)]  # fmt: skip


def test_an_unusable_configuration_ends_the_job(finished, tmp_path, monkeypatch):
    """With an error, unlike the end of the run."""
    workdir = copy_of(finished, tmp_path / "run", 4)

    def sleep(seconds):
        text = (finished / "config.gin").read_text()
        (workdir / "config.gin").write_text(text.replace("'val': @Likelihood()", "'other': @Likelihood()"))

    monkeypatch.setattr(evaluation.time, "sleep", sleep)
    with pytest.raises(ValueError, match=r"there is no evaluator 'val'; train\.evaluators has other"):
        follow(workdir, names=["val"])
    assert evaluated(workdir) == [4]


def test_a_changed_configuration_is_read(finished, tmp_path, monkeypatch, data_dir):
    """Training is restarted for longer, while the job waits."""
    workdir = copy_of(finished, tmp_path / "run", 8)
    facts = (workdir / "run.json").read_text()
    longer = facts.replace('"total_steps": 8', '"total_steps": 100')
    assert longer != facts
    (workdir / "run.json").write_text(longer)
    waited = []

    def sleep(seconds):
        """The configuration changes, then the run ends at a step that is there."""
        waited.append(seconds)
        if len(waited) == 1:
            (workdir / "config.gin").write_text((finished / "config.gin").read_text() + "\nLikelihood.num_draws = 2\n")
        if len(waited) == 2:
            save(finished, workdir, 6)
            (workdir / "run.json").write_text(facts)

    monkeypatch.setattr(evaluation.time, "sleep", sleep)
    follow(workdir)
    assert len(waited) == 2
    assert evaluated(workdir) == [6, 8]
    assert ["val/bits_per_dim_importance_weighted" in line for line in results(workdir, "val")] == [True, False]


@pytest.mark.parametrize(("processes", "batch_size"), [(2, 16), (3, 18)])
def test_several_processes_equal_one(finished, tmp_path, processes, batch_size):
    """With 41 examples: the last batch is smaller on the second process, or empty."""
    gin = [f"train.eval_batch_size = {batch_size}", "Data.eval_split = 'validation[:41]'",
           "Samples.num_images = 3", "Samples.num_classes = 3",
           'train.evaluators = {"val": @Likelihood(), "samples": @Samples(), "probe": @Probe()}',
           "Probe.shots = (3, None)", "Probe.train_split = 'train[:77]'"]  # fmt: skip
    one, several = (copy_of(finished, tmp_path / name, 8) for name in ("one", "several"))
    assert follow(one, *gin) == []
    args = [sys.executable, "-m", "jetformer.evaluate", f"--workdir={several}", "--device=cpu"]
    process = start(
        torchrun([*args, *(f"--gin_bindings={binding}" for binding in gin)], processes),
        OMP_NUM_THREADS="1", TORCH_CPP_LOG_LEVEL="ERROR")  # fmt: skip
    _, log = process.communicate(timeout=600)
    assert process.returncode == 0, log[-5000:]
    for name in ("val", "samples", "probe"):
        (expected,), (actual,) = results(one, name), results(several, name)
        assert actual.keys() == expected.keys()
        for tag in expected.keys() - {"seconds"}:
            assert actual[tag] == pytest.approx(expected[tag], rel=1e-5, abs=0.0 if name == "val" else 1e-4), tag


def test_a_missing_split_with_several_processes(finished, tmp_path):
    """All leave out the same evaluator, and none waits for another."""
    workdir = copy_of(finished, tmp_path / "run", 8)
    args = [sys.executable, "-m", "jetformer.evaluate", f"--workdir={workdir}", "--device=cpu",
            '--gin_bindings=train.evaluators = {"lacking": @lacking/Likelihood(), "val": @Likelihood()}',
            "--gin_bindings=lacking/Likelihood.split = 'nope'"]  # fmt: skip
    process = start(torchrun(args, 2), OMP_NUM_THREADS="1", TORCH_CPP_LOG_LEVEL="ERROR")
    _, log = process.communicate(timeout=600)
    assert process.returncode == 1
    assert log.count("error: 1 evaluation(s) failed, see the errors above: lacking at step 8") == 1
    assert log.count("has no split 'nope'") == 1
    assert evaluated(workdir) == [8]


def test_repeated_steps_are_evaluated_again(finished, tmp_path, data_dir, caplog):
    """Its last checkpoints are deleted, and it resumes from the one before with a lower learning rate."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    follow(workdir)
    before = results(workdir, "val")
    (workdir / "eval_val" / "grid").mkdir()
    for step in (4, 6):
        (workdir / "eval_val" / "grid" / f"{step:09d}.png").write_bytes(b"")
        (workdir / "eval_val" / "images" / f"{step:09d}").mkdir(parents=True)  # as Fid.keep_images keeps
        (workdir / "eval_val" / "images" / f"{step:09d}" / "000000.png").write_bytes(b"")
    for step in (6, 8):
        shutil.rmtree(workdir / "checkpoints" / f"{step:09d}")
    caplog.set_level("WARNING")
    run(workdir, data_dir, train__total_steps=8, train__checkpoint_steps=2, train__keep_last=9, train__evaluators=VAL,
        Likelihood__every_steps=8, make_optimizer__lr=1e-5)  # fmt: skip
    assert "val: deleted the results of 2 step(s)" in caplog.text
    assert [path.name for path in (workdir / "eval_val" / "grid").iterdir()] == ["000000004.png"]
    assert [path.name for path in (workdir / "eval_val" / "images").iterdir()] == ["000000004"]
    assert evaluated(workdir) == [2, 4, 8]
    follow(workdir)
    after = results(workdir, "val")
    assert [line["step"] for line in after] == [2, 4, 6, 8]
    same = [a["val/bits_per_dim"] == b["val/bits_per_dim"] for a, b in zip(before, after, strict=True)]
    assert same == [True, True, False, False]


@pytest.mark.parametrize("starts", [[0, 4], [0, 4, 8], [4]], ids=str)
@pytest.mark.parametrize("when", ["evaluating", "writing"])
def test_results_of_steps_that_a_run_repeats_do_not_count(finished, tmp_path, monkeypatch, caplog, when, starts):
    """The run goes back to before a checkpoint while the job evaluates it: once, or again from its new step 8; or it is
    another run."""
    workdir = copy_of(finished, tmp_path / "run", 8)
    call, write = Likelihood.__call__, files.write
    facts = json.loads((workdir / "run.json").read_text())
    assert facts["start_steps"] == [0]

    def go_back():
        (workdir / "run.json").write_text(json.dumps(facts | {"start_steps": starts}))

    def evaluating(self, context):
        if when == "evaluating":
            go_back()
        return call(self, context)

    def writing(*args):
        if when == "writing":  # after the first check, and the run finds nothing to delete
            go_back()
        write(*args)

    monkeypatch.setattr(Likelihood, "__call__", evaluating)
    monkeypatch.setattr(files, "write", writing)
    following = job(workdir)
    caplog.set_level("WARNING")
    assert following.evaluate(8)
    assert "repeats step 8" in caplog.text
    assert files.evaluated_steps(UPath(workdir), "val") == set()
    starts = [*starts, 8]
    assert following.reload()  # as a job that follows does
    assert following.evaluate(8)  # now the run resumes from there
    following.close()
    assert evaluated(workdir) == [8]


def test_metrics_and_pictures_are_in_the_event_files(finished, tmp_path):
    workdir = copy_of(finished, tmp_path / "run", 8)
    follow(workdir, 'train.evaluators = {"samples": @Samples()}', "Samples.num_images = 1")
    accumulator = EventAccumulator(str(workdir / "eval_samples"), size_guidance={"tensors": 0})
    accumulator.Reload()
    tags = set(accumulator.Tags()["tensors"])
    assert {"samples/grid", "samples/round_trip", "samples/round_trip_error"} <= tags
    (event,) = accumulator.Tensors("samples/grid")
    assert event.step == 8
    assert event.tensor_proto.string_val[2].startswith(b"\x89PNG")


def test_values_that_are_not_finite_are_null(tmp_path):
    """JSON has no NaN; the event file has the value."""
    workdir = UPath(tmp_path)
    written = metrics.Metrics(workdir, process_index=0)
    found = base.Results(scalars={"x": float("nan"), "y": float("-inf"), "z": 1.0})
    files.write(found, "e", 3, 1.0, Likelihood(), workdir, written, CPU)
    written.close()
    (line,) = (tmp_path / "eval_e" / "results.jsonl").read_text().splitlines()
    assert line == '{"step": 3, "seconds": 1.0, "e/x": null, "e/y": null, "e/z": 1.0}'


def test_unreadable_records_are_left_out(tmp_path, caplog):
    """One is damaged, another was just deleted: training continues, and the others count."""
    workdir = UPath(tmp_path)
    written = metrics.Metrics(workdir, process_index=0)
    caplog.set_level("WARNING")
    for step in (2, 4):
        files.write(base.Results(scalars={"x": 1.0}), "e", step, 1.0, Likelihood(), workdir, written, CPU)
    written.close()
    steps = tmp_path / "eval_e" / "steps"
    (steps / "000000003.json").write_text("")
    (steps / "000000005.json").symlink_to(tmp_path / "deleted")
    files.build(workdir, "e")
    assert [line["step"] for line in results(tmp_path, "e")] == [2, 4]
    assert files.other_settings(workdir, "e", Likelihood(num_draws=2)) == [2, 4]
    (warning,) = {record.message for record in caplog.records}
    assert "000000003.json is damaged" in warning


def test_a_workdir_at_a_url(finished):
    workdir = UPath("memory://evaluated")
    for file in finished.rglob("*"):
        if file.is_file() and "eval_" not in str(file) and "events" not in file.name:
            target = workdir / str(file.relative_to(finished))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    follow(workdir)
    lines = [json.loads(line) for line in (workdir / "eval_val" / "results.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert any(path.name.startswith("events") for path in (workdir / "eval_val").iterdir())


def test_a_damaged_checkpoint_is_left_out(finished, tmp_path):
    workdir = copy_of(finished, tmp_path / "run", 4, 8)
    (file,) = (workdir / "checkpoints" / "000000004").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-100])
    (failure,) = follow(workdir)
    assert failure.startswith("the checkpoint of step 4: the checkpoint of step 4 is damaged")
    assert evaluated(workdir) == [8]
    with pytest.raises(ValueError, match="damaged"):
        job(workdir).evaluate(4)


def test_a_damaged_checkpoint_that_is_saved_again(finished, tmp_path, monkeypatch):
    """It is deleted, as the message says, and the run saves it again."""
    workdir = copy_of(finished, tmp_path / "run", 4)
    (file,) = (workdir / "checkpoints" / "000000004").glob("*.distcp")
    file.write_bytes(bytes(file.stat().st_size))
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 1:
            shutil.rmtree(workdir / "checkpoints" / "000000004")
        if len(waited) == 2:
            save(finished, workdir, 4)
            save(finished, workdir, 8)

    monkeypatch.setattr(evaluation.time, "sleep", sleep)
    (failure,) = follow(workdir)
    assert failure.startswith("the checkpoint of step 4: the checkpoint of step 4 is damaged")
    assert evaluated(workdir) == [4, 8]


def test_sigterm_while_a_checkpoint_is_read(finished, tmp_path, monkeypatch):
    workdir = copy_of(finished, tmp_path / "run", 4, 8)

    def load(*args, **kwargs):
        raise Preempted(signal.SIGTERM)

    monkeypatch.setattr(checkpoint.dcp, "load", load)
    with pytest.raises(Preempted):
        follow(workdir)


def test_the_others_run_if_an_evaluator_has_a_bug(finished, tmp_path, monkeypatch, caplog):
    workdir = copy_of(finished, tmp_path / "run", 8)
    monkeypatch.setattr(Probe, "__call__", lambda self, context: [][0])
    failures = follow(workdir, 'train.evaluators = {"probe": @Probe(), "val": @Likelihood()}')
    assert failures == ["probe at step 8: list index out of range"]
    assert "IndexError" in caplog.text
    assert evaluated(workdir) == [8]


def test_a_checkpoint_deleted_before_its_turn_is_named(finished, tmp_path, monkeypatch, caplog):
    workdir = copy_of(finished, tmp_path / "run", 2, 4, 8)
    call = Likelihood.__call__

    def slow(self, context):
        shutil.rmtree(workdir / "checkpoints" / "000000004", ignore_errors=True)
        return call(self, context)

    monkeypatch.setattr(Likelihood, "__call__", slow)
    caplog.set_level("WARNING")
    follow(workdir)
    assert "The checkpoint of step 4 was deleted before it was evaluated" in caplog.text
    assert evaluated(workdir) == [2, 8]


def test_results_with_other_settings_are_named(finished, tmp_path, caplog):
    workdir = copy_of(finished, tmp_path / "run", 8)
    follow(workdir)
    caplog.set_level("WARNING")
    follow(workdir)
    assert "other settings" not in caplog.text
    other = "Likelihood.num_draws = 2"
    follow(workdir, other)
    assert "val: 1 step(s) were evaluated with other settings" in caplog.text
    caplog.clear()
    following = job(workdir, other)  # --once
    assert following.evaluate(8)
    following.close()
    assert [record.message.partition(":")[0] for record in caplog.records] == ["val"]
    assert "replaced the results of step 8" in caplog.text
    caplog.clear()
    following = job(workdir, "Likelihood.split = 'nope'")
    assert following.evaluate(8)
    following.close()
    assert "replaced" not in caplog.text
    (line,) = results(workdir, "val")
    assert "val/bits_per_dim_importance_weighted" in line


def test_a_deleted_checkpoint_is_reported_to_the_caller(finished, tmp_path, monkeypatch):
    workdir = copy_of(finished, tmp_path / "run", 4)

    def delete():
        if checkpoint.latest(workdir) == 4:
            save(finished, workdir, 8)
            shutil.rmtree(workdir / "checkpoints" / "000000004")

    deleting(monkeypatch, "after", delete)
    following = job(workdir)
    assert not following.evaluate(4)
    assert following.evaluate(8)
    assert following.evaluations.failures == []
    assert evaluated(workdir) == [8]


def test_a_job_started_before_its_run(finished, tmp_path):
    process = program(tmp_path / "run", "--poll_seconds=0.1")
    for line in process.stderr:
        if "Waiting up to 60 s for a run" in line:
            break
    copy_of(finished, tmp_path / "other", 8)
    shutil.copytree(tmp_path / "other", tmp_path / "run")
    _, log = process.communicate(timeout=100)
    assert process.returncode == 0, log
    assert evaluated(tmp_path / "run") == [8]


def test_a_workdir_without_a_run(tmp_path):
    with pytest.raises(ValueError, match=r"holds no run: it has no config\.gin"):
        job(tmp_path)
