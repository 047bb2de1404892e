"""The Python API: what it computes is what programs and evaluators compute, side by side, without traces."""

import json
import shutil
import sys

import gin
import numpy as np
import pytest
import torch
from PIL import Image
from upath import UPath

import jetformer
from jetformer.evaluators.likelihood import Likelihood
from jetformer.models.jetformer import JetFormer
from jetformer.runtime import Runtime
from jetformer.state import evaluator_context, load
from runs import bindings, start
from test_sample import serving

pytestmark = pytest.mark.slow

PROMPTS = ["a red circle", "a large blue cross at the left"]
LIKELIHOOD = '{"val": @Likelihood()}'
OF_TEXTS = {
    "train__noise_scale": 0.0,
    "train__autocast": None,
    "Data__name": '"shapes"',
    "Data__eval_split": '"validation"',
    "Data__pp": "\"first(inkey='captions', outkey='text') | caption('experiments/shapes.model', 40, pad='ignored') "
    "| keep('text', 'text_mask', 'text_loss')\"",
    "LanguageModel__vocab_size": 161,
    "LanguageModel__bos_id": 160,
}


def trained(workdir, gin_file, data_dir, **overrides):
    """A run that is too short to learn anything."""
    overrides = {"train__total_steps": 4, "train__evaluators": LIKELIHOOD} | overrides
    jetformer.train(f"experiments/{gin_file}", bindings(data_dir, **overrides), workdir, device="cpu")
    return workdir


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_dir, shapes_dir):
    """Workdirs by name."""
    new = tmp_path_factory.mktemp
    best = {"train__keep_best": '"val/bits_per_dim"', "train__keep_best_mode": '"higher"', "Likelihood__every_steps": 2}
    flow = {"train__noise_scale": 0.0, "train__ema_decay": 0.0, "make_optimizer__lr": 0.03}
    slowly = {"train__total_steps": 40, "make_optimizer__lr": 2e-3}  # its scales have no bound
    noise = {"train__noise_scale": 9.0, "train__noise_min": 8.0}
    return {
        "digits": trained(new("digits"), "digits.gin", data_dir, train__checkpoint_steps=2, **best, **noise),
        "shapes": trained(new("shapes"), "shapes.gin", shapes_dir, Jet__num_heads=2),
        "flow": trained(new("flow"), "jet_digits_labelled.gin", data_dir, **flow),
        "noisy": trained(new("noisy"), "tarflow_digits_noisy.gin", data_dir, **flow | slowly),
        "texts": trained(new("texts"), "tinystories.gin", shapes_dir, **OF_TEXTS),
    }


@pytest.fixture(scope="module")
def models(runs):
    """All models, loaded side by side."""
    return {name: jetformer.load(workdir, device="cpu") for name, workdir in runs.items()}


def program(name, *flags, **environment):
    """Runs a program to its end; returns its log."""
    process = start([sys.executable, "-m", f"jetformer.{name}", *map(str, flags)], **environment)
    _, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    return log


def random_images(shape, count=3):
    return np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)


def drawn_by_program(out, workdir, *flags):
    """Images, or texts, that `jetformer.sample` draws."""
    program("sample", "--device=cpu", f"--workdir={workdir}", f"--out={out}", *flags)
    records = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    if "text" in records[0]:
        return [record["text"] for record in records]
    images = []
    for record in records:
        with Image.open(out / record["file"]) as image:
            pixels = np.asarray(image)
            images.append(pixels if pixels.ndim == 3 else pixels[..., None])
    return np.stack(images)


# Samples


@pytest.mark.parametrize(
    ("name", "arguments", "flags"),
    [
        ("digits", {"classes": [3, 7], "guidance_weight": 1.5}, ["--classes=3,7", "--guidance_weight=1.5"]),
        (
            "digits",
            {"classes": 3, "guidance": "resample", "guidance_weight": 1.0, "guidance_candidates": 3},
            ["--classes=3", "--guidance=resample", "--guidance_weight=1", "--guidance_candidates=3"],
        ),
        (
            "digits",
            {"classes": 3, "temperature": 0.8, "guidance": "clipped", "guidance_weight": 2.0},
            ["--classes=3", "--temperature=0.8", "--guidance=clipped", "--guidance_weight=2"],
        ),
        ("digits", {"classes": 3, "denoise": True}, ["--classes=3", "--denoise"]),
        ("noisy", {"classes": 3, "denoise": True}, ["--classes=3", "--denoise"]),
        (
            "noisy",
            {"classes": [3, 7], "guidance_weight": 9.0, "guidance_schedule": "linear"},
            ["--classes=3,7", "--guidance_weight=9", "--guidance_schedule=linear"],
        ),
        ("shapes", {"prompts": PROMPTS}, [f"--prompt={prompt}" for prompt in PROMPTS]),
        ("flow", {"classes": np.array([3, 7])}, ["--classes=3,7"]),
        ("flow", {"temperature": 0.5}, ["--temperature=0.5"]),
    ],
)
def test_samples_are_those_of_the_program(name, arguments, flags, runs, models, tmp_path):
    expected = drawn_by_program(tmp_path, runs[name], "--num_images=2", "--seed=1", *flags)
    actual = models[name].sample(**arguments, num_images=2, seed=1)
    np.testing.assert_array_equal(actual, expected)
    plain = {option: value for option, value in arguments.items() if not option.startswith(("denoise", "guidance"))}
    assert plain == arguments or (models[name].sample(**plain, num_images=2, seed=1) != actual).any()


def test_texts_are_those_of_the_program(runs, models, tmp_path):
    flags = ["--num_images=2", "--prompt=a red", "--prompt=there is a", "--top_k=5"]
    expected = drawn_by_program(tmp_path, runs["texts"], *flags)
    assert models["texts"].continue_texts(["a red", "there is a"], num_texts=2, top_k=5) == expected
    assert len(models["texts"].continue_texts(num_texts=3)) == 3


def test_captions_and_completions_are_those_of_the_program(runs, models, tmp_path):
    model = models["shapes"]
    images = random_images((32, 32, 3), 2)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    flags = [f"--images={tmp_path}/*.png", "--num_images=2"]
    expected = drawn_by_program(tmp_path / "captions", runs["shapes"], *flags, "--task=caption")
    assert model.caption(images, num_texts=2) == expected
    more = ["--task=complete", f"--prompt={PROMPTS[0]}", "--rows=8"]
    expected = drawn_by_program(tmp_path / "completions", runs["shapes"], *flags, *more)
    completed = model.complete(images, rows=8, prompts=PROMPTS[0], num_images=2)
    np.testing.assert_array_equal(completed, expected)
    np.testing.assert_array_equal(completed[::2, :8], images[:, :8])
    half = model.complete(images, prompts=PROMPTS)
    np.testing.assert_array_equal(half[:, :16], images[:, :16])
    assert (half[:, 16:] != images[:, 16:]).any()


def test_inpainted_images_are_those_of_the_program(runs, models, tmp_path):
    model = models["shapes"]
    images, mask = random_images((32, 32, 3), 2), np.zeros((32, 32), bool)
    mask[10:20, 4:28] = True
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    Image.fromarray(mask).save(tmp_path / "mask.PNG")
    flags = [f"--images={tmp_path}/*.png", "--num_images=2", "--task=inpaint", f"--mask={tmp_path}/mask.PNG"]
    expected = drawn_by_program(tmp_path / "out", runs["shapes"], *flags, f"--prompt={PROMPTS[0]}")
    painted = model.inpaint(images, mask, prompts=PROMPTS[0], num_images=2)
    np.testing.assert_array_equal(painted, expected)
    np.testing.assert_array_equal(painted[::2][:, ~mask], images[:, ~mask])
    assert (painted[::2] != images).any((1, 2, 3)).all()
    # A mask for each; what is under it has no effect.
    masks = np.stack((mask, mask.T))
    painted = model.inpaint(images, masks, prompts=PROMPTS)
    np.testing.assert_array_equal(painted[~masks], images[~masks])
    images[masks] = 0
    np.testing.assert_array_equal(
        model.inpaint(torch.from_numpy(images), torch.from_numpy(masks), prompts=PROMPTS), painted
    )


# Likelihoods


def evaluated(workdir, names, gin_bindings=(), **likelihood):
    """The first examples of the evaluation split, and what the evaluator finds of them, with the moving average."""
    experiment, state, step = load(UPath(workdir), [], gin_bindings, Runtime(torch.device("cpu")))
    context = evaluator_context(experiment, state, step, "val", UPath(workdir))
    results = Likelihood(**likelihood)(context)
    return context.first_examples(40, names), results.ema_scalars or results.scalars


def test_bits_per_dim_given_classes_are_the_evaluators(runs, models):
    rows, expected = evaluated(runs["digits"], ("image", "text"), num_draws=2)
    images, classes = rows["image"], rows["text"][:, 0]
    draws = [models["digits"].bits_per_dim(images, classes, seed=i) for i in range(2)]
    assert draws[0].dtype == np.float64
    assert np.mean(draws) == pytest.approx(expected["bits_per_dim"], rel=1e-6)
    nats = models["digits"].log_likelihood(images, classes, batch_size=7)
    np.testing.assert_allclose(nats, -draws[0] * 64 * np.log(2), rtol=1e-5)


def test_bits_per_dim_of_a_labelled_flow_are_the_evaluators(runs, models):
    rows, expected = evaluated(runs["flow"], ("image", "label"))
    bits = models["flow"].bits_per_dim(rows["image"], rows["label"])
    assert bits.mean() == pytest.approx(expected["bits_per_dim"], rel=1e-6)


def test_a_run_of_students_scores_by_its_flow(data_dir, tmp_path):
    """Its own objective has no likelihood."""
    small = {"train__total_steps": 1, "train__evaluators": "{}", "train__noise_scale": 0.0, "TarFlow__depth": 2}
    flow = trained(tmp_path / "flow", "tarflow_digits.gin", data_dir, **small)
    more = {"train__init_from": f"'{flow}'", "Student__emb_dim": 16}
    students = trained(tmp_path / "students", "tarflow_digits_student.gin", data_dir, **small, **more)
    images, objective = random_images((8, 8, 1)), "train.objective = @JetObjective()"
    with pytest.raises(ValueError, match=objective.replace(".", r"\.").replace("()", r"\(\)")):
        jetformer.load(students, device="cpu").bits_per_dim(images)
    bits = jetformer.load(students, device="cpu", gin_bindings=objective).bits_per_dim(images)
    np.testing.assert_array_equal(bits, jetformer.load(flow, device="cpu").bits_per_dim(images))


def test_bits_per_dim_with_and_without_prompts_are_the_evaluators(runs, models):
    model = models["shapes"]
    rows, expected = evaluated(runs["shapes"], ("image", "text"), text_prefix_prob=1.0)
    prompts = [model.tokenizer.decode(tokens) for tokens in rows["text"]]
    bits = model.bits_per_dim(rows["image"], prompts=prompts)
    assert bits.mean() == pytest.approx(expected["bits_per_dim"], rel=1e-6)
    both = ["JetFormerObjective.loss_on_prefix = True"]  # images are learned without texts before them, too
    _, expected = evaluated(runs["shapes"], ("image",), both, text_prefix_prob=0.0)
    bits = jetformer.load(runs["shapes"], device="cpu", gin_bindings=both).bits_per_dim(rows["image"])
    assert bits.mean() == pytest.approx(expected["bits_per_dim"], rel=1e-6)


# Latents


@pytest.mark.parametrize("name", ["digits", "shapes", "flow"])
def test_decoded_latents_are_the_images(name, models):
    model = models[name]
    images = random_images(model.module.image_shape)
    latents = model.encode(images, batch_size=2)
    assert latents.dtype == np.float32
    difference = model.decode(latents).astype(int) - images
    assert abs(difference).max() <= 1
    assert (difference == 0).mean() > 0.999
    if isinstance(model.module, JetFormer):
        assert latents.shape == (3, model.module.num_image_tokens, model.module.patches.dim)


def test_latents_of_classes_differ(models):
    model = models["flow"]
    images = random_images((8, 8, 1))
    latents = model.encode(images, classes=[1, 2, 3])
    np.testing.assert_array_equal(model.decode(latents, classes=[1, 2, 3]), images)
    assert abs(latents - model.encode(images, classes=4)).max() > 1e-3


def test_tensors_in_and_out(models):
    model = models["digits"]
    images = random_images((8, 8, 1))
    tensor = torch.from_numpy(images)
    for method, arguments in (("encode", {}), ("bits_per_dim", {"classes": 3}), ("complete", {"classes": [1, 2, 3]})):
        ours, theirs = (getattr(model, method)(given, **arguments) for given in (images, tensor))
        assert isinstance(ours, np.ndarray)
        assert isinstance(theirs, torch.Tensor)
        np.testing.assert_array_equal(ours, theirs.numpy())
    assert torch.equal(model.decode(model.encode(tensor).bfloat16()), model.decode(model.encode(tensor).bfloat16()))
    np.testing.assert_array_equal(model.sample(torch.tensor([3, 7])), model.sample([3, 7]))


def test_float64(runs, models):
    for name, classes in (("digits", 3), ("flow", 3)):
        model = jetformer.load(runs[name], device="cpu").to("cpu", torch.float64)
        images = random_images((8, 8, 1))
        assert model.encode(images).dtype == np.float64
        np.testing.assert_array_equal(model.decode(model.encode(images)), images)
        np.testing.assert_allclose(
            model.bits_per_dim(images, classes), models[name].bits_per_dim(images, classes), rtol=1e-5
        )
        difference = model.sample(classes, num_images=4).astype(int) - models[name].sample(classes, num_images=4)
        assert abs(difference).max() <= 1


# What is loaded


def test_what_a_model_knows(runs, models):
    model = models["digits"]
    assert model.step == 4
    assert "JetFormer.image_shape" in model.config
    assert model.tokenizer is None
    assert models["shapes"].tokenizer.vocab_size == 160
    assert not model.module.training
    assert str(runs["digits"]) in repr(model)
    assert "JetFormer" in repr(model)


def test_the_moving_average_is_a_choice(runs, models):
    plain = jetformer.load(runs["digits"], device="cpu", ema=False)
    _, state, _ = load(UPath(runs["digits"]), [], [], Runtime(torch.device("cpu")))
    for model, expected in ((plain, dict(state.model.named_parameters())), (models["digits"], state.ema)):
        for name, parameter in model.module.named_parameters():
            assert torch.equal(parameter, expected[name]), name


def test_steps(runs):
    assert json.loads((runs["digits"] / "best.json").read_text())["ranking"][0]["step"] == 2
    best = jetformer.load(runs["digits"], step="best", device="cpu")
    path = jetformer.load(runs["digits"] / "checkpoints" / "000000002", device="cpu")
    assert best.step == path.step == 2
    np.testing.assert_array_equal(best.sample([3]), path.sample([3]))


def test_safetensors_and_the_hub(runs, models, tmp_path):
    """A directory of safetensors, also as a repository, and a converted workdir: the same model."""
    shared, again = tmp_path / "shared", tmp_path / "again"
    program("convert", "--to=safetensors", f"--workdir={runs['shapes']}", f"--out={shared}")
    expected = models["shapes"].sample(prompts=PROMPTS)
    model = jetformer.load(shared, device="cpu")
    assert (model.step, model.averaged, model.tokenizer.vocab_size) == (4, True, 160)
    np.testing.assert_array_equal(model.sample(prompts=PROMPTS), expected)
    flags = ["--num_images=1", *(f"--prompt={prompt}" for prompt in PROMPTS)]
    np.testing.assert_array_equal(drawn_by_program(tmp_path / "out", shared, *flags), expected)
    program("convert", "--from=safetensors", f"--path={shared}", f"--out={again}")
    np.testing.assert_array_equal(jetformer.load(again, device="cpu").sample(prompts=PROMPTS), expected)

    for number, repository in enumerate((shared, runs["shapes"])):
        code = f"""import numpy, jetformer
model = jetformer.load("hf://people/run@v1", device="cpu")
numpy.save("{tmp_path}/{number}.npy", model.sample(prompts={PROMPTS}))
"""
        with serving(repository) as url:
            home = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / f"home{number}"), "HF_HUB_DISABLE_XET": "1"}
            process = start([sys.executable, "-c", code], **home)
            _, log = process.communicate(timeout=300)
        assert process.returncode == 0, log
        np.testing.assert_array_equal(np.load(tmp_path / f"{number}.npy"), expected)


def test_damaged_safetensors(runs, tmp_path):
    shared = tmp_path / "shared"
    program("convert", "--to=safetensors", f"--workdir={runs['flow']}", f"--out={shared}")
    with pytest.raises(ValueError, match="one step"):
        jetformer.load(shared, step=4)
    with pytest.raises(ValueError, match=r"LabelledFlow"):
        jetformer.load(shared, device="cpu", gin_bindings="Jet.emb_dim = 32")
    (shared / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        jetformer.load(shared, device="cpu")


# No traces


def test_models_of_different_experiments_do_not_mix(runs):
    """Nor do they with the caller's configuration and precision."""
    config = "train.batch_size = 5"
    gin.clear_config()
    gin.parse_config(config)
    text, precision = gin.config_str(), torch.get_float32_matmul_precision()
    first = jetformer.load(runs["digits"], device="cpu", gin_bindings=["train.matmul_precision = 'medium'"])
    before = first.sample([3])
    second = jetformer.load(runs["shapes"], device="cpu")
    images = random_images((32, 32, 3))
    np.testing.assert_array_equal(second.decode(second.encode(images)).shape, images.shape)
    np.testing.assert_array_equal(first.sample([3]), before)
    assert first.config != second.config
    assert gin.config_str() == text
    assert not gin.config_is_locked()
    assert torch.get_float32_matmul_precision() == precision
    with pytest.raises(ValueError, match="Nonexistent"):
        jetformer.load(runs["digits"], gin_bindings=["Nonexistent.argument = 1"])
    assert gin.config_str() == text


def test_training_leaves_no_trace(data_dir, tmp_path):
    gin.clear_config()
    gin.parse_config("train.batch_size = 5")
    text = gin.config_str()
    trained(tmp_path, "digits.gin", data_dir, train__total_steps=1)
    assert gin.config_str() == text
    assert jetformer.load(tmp_path, device="cpu").step == 1


def test_sampling_imports_no_tensorflow(runs):
    code = f"""import sys, jetformer, numpy
assert "torch" not in sys.modules
model = jetformer.load({str(runs["digits"])!r}, device="cpu")
model.decode(model.encode(model.sample([3, 7])))
model.bits_per_dim(model.sample([3, 7]), [3, 7])
model = jetformer.load({str(runs["shapes"])!r}, device="cpu")
assert model.tokenizer.decode(model.tokenizer.encode("a red circle")) == "a red circle"
model.caption(model.decode(model.encode(numpy.zeros((1, 32, 32, 3), numpy.uint8))))
assert "tensorflow" not in sys.modules
"""
    process = start([sys.executable, "-c", code], fresh=True)
    out, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    assert out == ""


def test_sampling_needs_no_compiler(runs, models, monkeypatch, tmp_path, data_dir):
    monkeypatch.setenv("PATH", "")
    compiled = ["train.compile = 'blocks'"]
    model = jetformer.load(runs["digits"], device="cpu", gin_bindings=compiled)
    np.testing.assert_array_equal(model.sample([3]), models["digits"].sample([3]))
    with pytest.raises(ValueError, match=r"train\.compile .*C\+\+"):
        jetformer.train("experiments/digits.gin", bindings(data_dir, train__compile="'blocks'"), tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["main", "evaluate", "sample"])
def test_help_imports_no_torch(name):
    code = f"""import runpy, sys
sys.argv = ["{name}", "--help"]
try:
    runpy.run_module("jetformer.{name}", run_name="__main__", alter_sys=True)
finally:
    assert "torch" not in sys.modules
"""
    process = start([sys.executable, "-c", code], fresh=True)
    out, log = process.communicate(timeout=100)
    assert "--workdir" in out, log
    assert "AssertionError" not in log


# Bad input


@pytest.mark.parametrize(
    ("name", "call", "message"),
    [
        ("digits", lambda m: m.sample(), "classes or prompts"),
        ("digits", lambda m: m.sample([10]), "10.* 0 to 9"),
        ("digits", lambda m: m.sample([1.5]), r"\[1.5\]"),
        ("digits", lambda m: m.sample(["cat"]), "cat"),
        ("digits", lambda m: m.sample(prompts=["a cat"]), "classes"),
        ("shapes", lambda m: m.sample([3]), "prompts"),
        ("shapes", lambda m: m.sample(prompts=[" "]), "empty"),
        ("flow", lambda m: m.sample(prompts=["a cat"]), "LabelledFlow"),
        ("flow", lambda m: m.sample(3, guidance_weight=1.0), "LabelledFlow of a TarFlow"),
        ("flow", lambda m: m.sample(3, temperature_probs=0.5), "temperature_probs"),
        ("flow", lambda m: m.sample(3, denoise=True), "noise_std is 0"),
        ("noisy", lambda m: m.sample(guidance_weight=1.0), "guidance needs classes"),
        ("noisy", lambda m: m.sample(3, guidance="density"), "density .*interp"),
        ("noisy", lambda m: m.bits_per_dim(random_images((8, 8, 1)), 3), "noise_std = 0"),
        ("shapes", lambda m: m.sample(prompts=PROMPTS, denoise=True), "noise_min is 0"),
        ("texts", lambda m: m.sample(), "continue_texts"),
        ("digits", lambda m: m.sample([3], guidance="strong"), "strong"),
        ("digits", lambda m: m.sample([3], guidance_weight=1.0, guidance_candidates=4), "4 candidates .*density"),
        ("digits", lambda m: m.sample([3], temperature=0.0), "temperatures 0.0"),
        ("digits", lambda m: m.sample([3], num_images=0), "num_images = 0"),
        ("digits", lambda m: m.sample([3], batch_size=0), "batch_size = 0"),
        ("digits", lambda m: m.sample([3], seed=-1), "seed = -1"),
        ("digits", lambda m: m.bits_per_dim(random_images((8, 8, 1))), "classes or prompts"),
        ("digits", lambda m: m.bits_per_dim(random_images((8, 8, 1)), [1, 2]), "2 classes .* 3 images"),
        ("digits", lambda m: m.bits_per_dim(random_images((8, 9, 1)), 1), r"\[3, 8, 9, 1\].*\[N, 8, 8, 1\]"),
        ("digits", lambda m: m.bits_per_dim(random_images((8, 8)), 1), r"\[3, 8, 8\].*\[N, 8, 8, 1\]"),
        ("digits", lambda m: m.bits_per_dim(random_images((8, 8, 1), 0), 1), r"\[0, 8, 8, 1\]"),
        ("digits", lambda m: m.bits_per_dim(random_images((8, 8, 1)) / 255, 1), "float64.*uint8"),
        ("digits", lambda m: m.encode([[1, 2]]), "list"),
        ("digits", lambda m: m.encode(random_images((8, 8, 1)), 3), "JetFormer"),
        ("digits", lambda m: m.decode(np.zeros((2, 16, 3))), r"\[2, 16, 3\].*\[N, 16, 4\]"),
        ("digits", lambda m: m.decode(np.zeros((2, 16, 4), int)), "int64"),
        ("digits", lambda m: m.complete(random_images((8, 8, 1)), 3, 1), "3 rows"),
        ("digits", lambda m: m.complete(random_images((8, 8, 1))), "classes or prompts"),
        ("digits", lambda m: m.inpaint(random_images((8, 8, 1)), np.ones((8, 7), bool), 1), r"\[8, 7\].*\[8, 8\]"),
        ("digits", lambda m: m.inpaint(random_images((8, 8, 1)), np.ones((8, 8)), 1), "float64.*bool"),
        ("digits", lambda m: m.inpaint(random_images((8, 8, 1)), np.ones((8, 8), bool), 1), "64 of 64"),
        ("digits", lambda m: m.inpaint(random_images((8, 8, 1)), np.ones((2, 8, 8), bool), 1), "2 masks for 3 images"),
        ("digits", lambda m: m.inpaint(random_images((8, 8, 1)), [[True]], 1), "list"),
        ("digits", lambda m: m.caption(random_images((8, 8, 1))), "no texts"),
        ("digits", lambda m: m.continue_texts("a"), "JetFormer .*LanguageModel"),
        ("flow", lambda m: m.complete(random_images((8, 8, 1))), "LabelledFlow"),
        ("flow", lambda m: m.caption(random_images((8, 8, 1))), "LabelledFlow"),
        ("flow", lambda m: m.encode(random_images((8, 8, 1)), 10), "10.* 0 to 9"),
        ("texts", lambda m: m.encode(random_images((8, 8, 1))), "LanguageModel"),
        ("texts", lambda m: m.bits_per_dim(random_images((8, 8, 1))), "LanguageModel"),
        ("digits", lambda m: m.to("npu"), "'npu'"),
        ("digits", lambda m: m.to("cuda:99"), "cuda:99"),
        ("digits", lambda m: m.to(dtype=torch.bfloat16), "bfloat16.*float64"),
    ],
)
def test_bad_input(name, call, message, models, capfd):
    with pytest.raises(ValueError, match=message) as error:
        call(models[name])
    assert "\n" not in str(error.value)
    out, err = capfd.readouterr()
    assert out == err == ""


def test_what_is_no_run(runs, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(runs["digits"], damaged)
    file = next((damaged / "checkpoints" / "000000004").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for source, arguments, message in (
        (tmp_path / "nowhere", {}, "nowhere holds no run"),
        (runs["digits"], {"step": 3}, "step 3.* 2, 4"),
        (runs["digits"] / "checkpoints" / "000000004", {"step": 2}, "step = 2"),
        (runs["shapes"], {"step": "best"}, "best"),
        (runs["digits"], {"device": "quantum"}, "'quantum'"),
        (runs["digits"], {"gin_bindings": ["Decoder.depth = 2"]}, "Decoder.depth is 1, .* 2;"),
        (damaged, {}, "damaged"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            jetformer.load(source, **{"device": "cpu"} | arguments)
        assert "\n" not in str(error.value)
    assert jetformer.load(damaged, device="cpu", verify=False).step == 4
    with pytest.raises(AttributeError, match="lood"):
        _ = jetformer.lood
