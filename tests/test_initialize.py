"""What a run begins with: weights of another run, or ActNorms set by the first batch; never where it is resumed."""

import json
import re
import shutil

import pytest
import torch
from upath import UPath

from jetformer import checkpoint, config, trainer
from jetformer.experiment import Experiment
from jetformer.runtime import Runtime
from jetformer.state import build, build_model, initialize, load_weights, make_loop
from runs import bindings, command, run, scalars, start, torchrun

pytestmark = pytest.mark.slow

CPU = Runtime(torch.device("cpu"))
# A flow alone, with ActNorms, made small.
JET = {
    "train__model": "@Jet",
    "train__objective": "@JetObjective()",
    "train__evaluators": "{}",
    "train__noise_scale": 0.0,
    "train__ema_decay": 0.9,
    "Jet__input_shape": "(8, 8, 1)",
    "Jet__ps": 2,
    "Jet__actnorm": True,
    "Jet__invertible_dense": '"lu"',
}


def experiment(data_dir, **overrides):
    config.parse(["experiments/digits.gin"], bindings(data_dir, **JET | overrides))
    return config.call(Experiment)


def weights(workdir, part="model"):
    """A checkpoint's newest parameters by name."""
    config.parse([str(workdir / config.CONFIG_FILE)], [])
    experiment = config.call(Experiment)
    tensors = build(experiment, make_loop(experiment, CPU)).tensors()
    checkpoint.Checkpoint(workdir, checkpoint.latest(workdir)).restore(tensors)
    return tensors[part]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
    """A run of 4 steps of a flow with ActNorms."""
    workdir = tmp_path_factory.mktemp("finished")
    run(workdir, data_dir, **JET, train__total_steps=4)
    return workdir


# The mixture


EQUAL = {"JetFormer__kmeans_init": False, "JetFormer__scale_init": 1.0}


@pytest.mark.parametrize("std", [0.0, 0.3])
def test_a_warning_of_equal_components(data_dir, caplog, std):
    config.parse(["experiments/digits.gin"], bindings(data_dir, **EQUAL, JetFormer__mean_init_std=std))
    experiment = config.call(Experiment)
    initialize(experiment, CPU, build_model(experiment))
    assert ("mean_init_std" in caplog.text) == (std == 0)


def test_a_warning_of_equal_components_of_a_prior(data_dir, caplog):
    """It names the head whose components are equal, and what sets them."""
    prior = {"JetFormer__out_dim": 2, "JetFormer__factored_prior": "@FactoredPrior", "FactoredPrior__num_mixtures": 3}
    for equal, std, expected, other in (
        ({}, 0.0, "All 3 components of factored_prior.head .*FactoredPrior.mean_init_std", "image_head"),
        (EQUAL, 0.5, "All 4 components of image_head .*JetFormer.mean_init_std", "factored_prior"),
    ):
        overrides = prior | equal | {"FactoredPrior__mean_init_std": std}
        config.parse(["experiments/digits.gin"], bindings(data_dir, **overrides))
        experiment = config.call(Experiment)
        caplog.clear()
        initialize(experiment, CPU, build_model(experiment))
        assert re.search(expected, caplog.text)
        assert other not in caplog.text


def test_components_start_at_clusters(data_dir):
    """Of the tokens of the first batch, which are then more likely than under equal components."""
    config.parse(["experiments/digits.gin"], bindings(data_dir, JetFormer__num_mixtures=8, train__batch_size=64))
    experiment = config.call(Experiment)
    models = [build_model(experiment) for _ in range(3)]
    for model in models[:2]:
        initialize(experiment, CPU, model)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models[:2]), strict=True))
    head, equal = models[0].image_head, models[2].image_head
    assert not head.components_equal()
    assert equal.components_equal()
    images = torch.tensor(next(experiment.data.train_batches(batch_size=256, seed=1))["image"])
    tokens = models[0].encode_image(images / 127.5 - 1).tokens
    hidden = torch.zeros(*tokens.shape[:2], models[0].decoder.width)
    nlls = [h(hidden, tokens, torch.ones(tokens.shape[:2])).nll.mean().item() for h in (head, equal)]
    assert nlls[0] < nlls[1] - 1


def test_the_mixture_of_another_run_is_kept(data_dir, tmp_path, caplog):
    """Whatever this run's initialization is; a warning names the other run if its components are equal."""
    run(tmp_path / "equal", data_dir, **EQUAL, train__total_steps=1, train__evaluators="{}")
    config.parse(["experiments/digits.gin"], bindings(data_dir, train__init_from=f'"{tmp_path}/equal"'))
    caplog.clear()
    experiment = config.call(Experiment)
    model = build_model(experiment)
    initialize(experiment, CPU, model)
    assert model.image_head.components_equal()
    assert f"{tmp_path}/equal" in caplog.text.partition("components")[2]


# ActNorm


def test_actnorms_are_initialized_from_the_first_batch(data_dir):
    experiment_ = experiment(data_dir, train__batch_size=256)
    model = build_model(experiment_)
    assert all((p == 0).all() for p in model.actnorms.parameters())
    initialize(experiment_, CPU, model)
    batch = next(experiment_.data.train_batches(batch_size=256, seed=0))
    x = torch.tensor(batch["image"]).float().add(0.5) / 127.5 - 1
    tokens, _ = model.patchify(x)
    z, _ = model.actnorms[0](tokens)
    # Up to the dequantization noise.
    torch.testing.assert_close(z.mean((0, 1)), torch.zeros(4), atol=2e-3, rtol=0)
    torch.testing.assert_close(z.std((0, 1)), torch.ones(4), atol=5e-3, rtol=0)
    again = build_model(experiment_)
    initialize(experiment_, CPU, again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_resumed_run_is_not_initialized_again(finished, tmp_path, data_dir, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setattr(trainer, "initialize", lambda *args: pytest.fail("initialized"))
    run(tmp_path / "run", data_dir, **JET, train__total_steps=8)
    monkeypatch.undo()
    run(tmp_path / "whole", data_dir, **JET, train__total_steps=8)
    # Only the first step is equal: the schedules are of 8 steps, and of 4 and then 8.
    first = [scalars(tmp_path / name)["train/loss"][1] for name in ("run", "whole")]
    assert first[0] == first[1]


def test_two_processes_start_as_one(tmp_path, data_dir):
    run(tmp_path / "one", data_dir, **JET, train__total_steps=4)
    for mesh in ("{'data': -1}", "{'fsdp': -1}"):
        workdir = tmp_path / mesh[2:6]
        args = torchrun(command(workdir, bindings(data_dir, **JET, train__total_steps=4, train__mesh=mesh)), 2)
        process = start(args, OMP_NUM_THREADS="1", TORCH_CPP_LOG_LEVEL="ERROR")
        _, log = process.communicate(timeout=300)
        assert process.returncode == 0, log[-5000:]
        expected, actual = scalars(tmp_path / "one"), scalars(workdir)
        for name in ("train/loss", "grad_norm", "param_norm"):
            assert actual[name] == pytest.approx(expected[name], rel=1e-5), (mesh, name)


def test_a_jetformers_flow_is_initialized_too(tmp_path, data_dir):
    run(tmp_path, data_dir, Jet__actnorm=True, train__total_steps=1, train__evaluators="{}")
    assert weights(tmp_path)["flow.actnorms.0.bias"].abs().max() > 0.1


# Weights of another run


def test_a_run_starts_from_the_average_of_another(finished, tmp_path, data_dir):
    expected = weights(finished, "ema")
    for path in (finished, f"{finished}/checkpoints/000000004/"):
        model = build_model(found := experiment(data_dir, train__init_from=f'"{path}"'))
        initialize(found, CPU, model)
        parameters = dict(model.named_parameters())
        assert parameters.keys() == expected.keys()
        assert all(torch.equal(parameters[name], expected[name]) for name in expected)
        buffers = weights(finished)
        assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    # In a whole run: without a learning rate these weights are saved. A resumed run does not read them.
    more = {"train__init_from": f'"{finished}"', "make_optimizer__lr": 1e-30, "make_optimizer__wd": 0.0}
    run(tmp_path, data_dir, **JET | more, train__total_steps=2)
    saved = weights(tmp_path)
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    assert checkpoint.latest(tmp_path) == 2
    run(tmp_path, data_dir, **JET | more | {"train__init_from": '"/nowhere"'}, train__total_steps=3)


def test_weights_are_those_of_the_checkpoint_named(tmp_path, data_dir):
    run(tmp_path, data_dir, **JET | {"train__ema_decay": 0.0}, train__total_steps=8, train__keep_last=2)
    model = build_model(experiment(data_dir))
    load_weights(str(tmp_path / "checkpoints" / "000000004"), model)
    expected = {"model": {name: torch.empty_like(value) for name, value in model.state_dict().items()}}
    checkpoint.Checkpoint(tmp_path, 4).restore(expected)
    assert all(torch.equal(value, expected["model"][name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"Jet__depth": 3}, r"\w+\.2\.\S+ is absent there, \S+\[\d.* here"),
        ({"Jet__depth": 1}, r"\w+\.1\.\S+ is \w+\[.*\] there, absent here"),
        ({"Jet__emb_dim": 32}, r"couplings\.\S+ is float32\[.*16.*\] there, float32\[.*32.*\] here"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(finished, tmp_path, data_dir, overrides, message):
    model = build_model(experiment(data_dir, **overrides))
    shutil.copytree(finished, tmp_path / "run")
    marker = tmp_path / "run" / "checkpoints" / "000000004" / "COMPLETE"
    content = json.loads(marker.read_text())
    del content["info"]["architecture"]  # else that is compared first
    marker.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        load_weights(str(tmp_path / "run"), model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"Jet__scale_factor": 4.0}, r"Jet\.scale_factor is 2\.0.*4\.0"),
        ({"train__init_from": '"/nowhere"'}, r"train\.init_from = '/nowhere'"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(finished, tmp_path, data_dir, overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        run(tmp_path / "run", data_dir, **JET | {"train__init_from": f'"{finished}"'} | overrides)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_workdir_may_be_a_url(finished, data_dir):
    model = build_model(experiment(data_dir))
    load_weights(f"file://{UPath(finished)}", model)
    assert (model.actnorms[0].bias != 0).any()
