"""Values that gin binds, against what arguments are annotated with."""

import collections.abc
import inspect
import typing

import gin
import pytest

from jetformer import config
from jetformer.experiment import Experiment


@pytest.mark.parametrize(
    "binding",
    [
        "ClassifierFeatures.hidden_dim = 0",
        "Data.max_examples = 0",
        "Decoder.dropout = 1.5",
        "Decoder.dropout = 1.0",
        'Decoder.dropout = "0.1"',
        "Decoder.depth = 2.0",
        "Guidance.weight = -1",
        "Jet.actnorm = 1",
        'Jet.kinds = "channels"',
        "JetFormer.image_shape = (8, 8)",
        "JetFormer.mean_init_std = -0.5",
        "JetFormer.out_dim = 0",
        "JetFormerObjective.drop_labels_prob = -1",
        "Samples.num_classes = 0",
        "Samples.num_images = True",
        "make_optimizer.lr = 0",
        "make_schedule.steps = (1, 2.5)",
        "Samples.guidance = None",
        "Fid.batch_size = 0",
        'Fid.features = "inception"',
        "Fid.temperature_scales = 0.0",
        "FlowSamples.num_images = 0",
        "train.batch_size = 16.0",
        'train.data = "mnist"',
        "train.ema_decay = 2.0",
        "train.grad_clip_norm = 0",
        'train.mesh = {"data": "all"}',
        "train.noise_scale = 1e400",
        'train.total_steps = "3"',
    ],
)
def test_a_value_of_another_type_or_out_of_range(binding):
    name, _ = binding.split(" = ")
    with pytest.raises(config.ConfigError) as error:
        config.parse(["experiments/digits.gin"], [binding])
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_values_that_come_by_macros_and_scopes():
    with pytest.raises(config.ConfigError, match=r"train\.total_steps = 2\.5"):
        config.parse(["experiments/digits.gin"], ["TOTAL_STEPS = 2.5"])
    with pytest.raises(config.ConfigError, match=r"Decoder\.dropout = 7"):
        config.parse(["experiments/digits.gin"], ["of_one/Decoder.dropout = 7"])


@pytest.mark.parametrize(
    "binding",
    [
        "train.grad_clip_norm = None",
        "train.noise_scale = 8",  # an int is a float
        'Samples.prompts = ["a", "b"]',  # a list is a tuple
        'Data.classes = "one"',
        "Probe.shots = (None, 10)",
        "JetFormer.flow = None",
    ],
)
def test_values_that_can_be(binding):
    config.parse(["experiments/digits.gin"], [binding])


def test_every_number_has_a_range():
    """So that a new argument is thought about. What is any number is listed."""
    free = {"train.mesh"}  # -1 stands for the rest of the devices
    bare = set()
    functions = {name: configurable.wrapped for name, configurable in gin.config._REGISTRY.items()}
    assert Experiment in functions.values()
    for name, function in functions.items():
        if not function.__module__.startswith("jetformer."):
            continue
        hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function, include_extras=True)
        bare |= {
            f"{name.rpartition('.')[2]}.{argument}"
            for argument, hint in hints.items()
            if argument != "return" and has_bare_number(hint)
        }
    assert bare - free == set()


def has_bare_number(hint) -> bool:
    if hint in (int, float):
        return True
    is_range_or_function = typing.get_origin(hint) in (typing.Annotated, collections.abc.Callable)
    return not is_range_or_function and any(has_bare_number(part) for part in typing.get_args(hint))


SAVED = "train.batch_size = 4\nDecoder.depth = 2\ntrain.evaluators = {'val': @Likelihood()}\n"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("import os", "os"),
        ("import os.path", "os.path"),
        ("from __gin__ import dynamic_registration", "__gin__.dynamic_registration"),
        ("from mycode import models", "mycode.models"),
        ("include 'more.gin'", "more.gin"),
        ("# a comment\rimport os", "os"),
    ],
)
def test_a_configuration_from_elsewhere_imports_nothing(line, named):
    config.parse([], [], SAVED)
    with pytest.raises(config.ConfigError, match=named):
        config.parse([], [], f"{line}\n{SAVED}", ["mycode"])


def test_a_module_that_is_trusted(tmp_path, monkeypatch):
    (tmp_path / "mycode.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    config.parse([], [], f"import mycode\n{SAVED}", ["mycode"])
    with pytest.raises(config.ConfigError, match="--trust_imports=mycode"):
        config.parse([], [], f"import mycode\n{SAVED}")
