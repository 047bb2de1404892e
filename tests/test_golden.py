"""Numerics equal those of independent implementations, for every file of the golden directory.

tests/golden/README.md describes the files.
"""

import dataclasses
import functools
import math

import numpy as np
import pytest
import tensorflow as tf
import torch

from golden_files import Golden, assert_gradients, assert_log, assert_output, paths
from jetformer import optim
from jetformer.convert import ml_tarflow
from jetformer.convert.big_vision import from_big_vision, image_head_order
from jetformer.convert.sources import assemble
from jetformer.convert.weights import Weights
from jetformer.data import preprocess
from jetformer.loops.torch_loop import TorchLoop
from jetformer.models.decoder import Decoder
from jetformer.models.jet import Jet
from jetformer.models.jetformer import JetFormer
from jetformer.models.labelled import LabelledFlow
from jetformer.models.mixture import MixtureHead
from jetformer.models.patches import Patchify, PatchPCA
from jetformer.models.tarflow import TarFlow
from jetformer.objectives import JetFormerObjective, JetObjective
from jetformer.runtime import Runtime
from jetformer.sampling.decode import CachedDecoder
from jetformer.sampling.denoising import denoise
from jetformer.sampling.flows import guided_inverse, log_density
from jetformer.sampling.guidance import Guidance
from mixtures import mixture_from_logits, mixture_of


def golden(pattern, having="config"):
    """Parametrizes a test over the golden files of a kind that have the array `having`."""
    files = {path.stem: Golden(path) for path in paths(pattern)}
    files = {name: file for name, file in files.items() if having in file.arrays.files}
    return pytest.mark.parametrize("file", files.values(), ids=files.keys())


def load(model, params):
    model.load_state_dict(from_big_vision(params, model))
    return model


def jet_from_config(config, input_shape, context_dim=None):
    return Jet(tuple(input_shape), context_dim=context_dim, **config)


def jetformer_from_config(config, image_shape=None, patch_size=1, flow=None):
    """Builds a JetFormer from a big_vision configuration; without an image shape, its tokens are its pixels."""
    backbone = ("width", "depth", "mlp_dim", "num_heads", "num_kv_heads", "head_dim", "dropout")
    # Not arguments of the model: how big_vision runs its layers, and a draw of our objective.
    elsewhere = (
        *("scan", "remat_policy", "cache_dtype", "embed_dtype", "dropout_bdims", "norm_eps"),
        "drop_labels_probability",
    )
    rest = {k: v for k, v in config.items() if k not in backbone + elsewhere}
    return JetFormer(
        image_shape=image_shape or (1, 1, config["out_dim"]),
        patches=functools.partial(Patchify, patch_size=patch_size),
        flow=flow,
        decoder=functools.partial(Decoder, **{k: config[k] for k in backbone if k in config}),
        **rest,
    ).eval()


def head_order(model):
    """Returns the positions of the image head's outputs among the reference's."""
    head = model.image_head
    if isinstance(head, MixtureHead):
        return image_head_order(head.num_mixtures, model.out_dim)
    return torch.arange(head.linear.out_features)


@golden("jet_")
def test_jet(file):
    inputs, expected = file.tensors("in"), file.tensors("out")
    x, context = inputs["x"], inputs.get("context")
    context_dim = None if context is None else context.shape[-1]
    model = load(jet_from_config(file.config, x.shape[1:], context_dim), file.numpy("params"))

    z, logdet = model(x, context)
    assert_output(z, expected["z"])
    assert_log(logdet, expected["logdet"])
    x_reconstructed, inverse_logdet = model.inverse(expected["z"], context)
    assert_output(x_reconstructed, expected["x_reconstructed"])
    assert_log(inverse_logdet, expected["inverse_logdet"])

    bits_per_dim, _ = JetObjective.score(model, x, context)["bits_per_dim"]
    assert_output(bits_per_dim, expected["bits_per_dim"])
    bits_per_dim.mean().backward()
    assert_gradients(model, file.numpy("out/grad"), from_big_vision)


def from_ml_tarflow(params, model):
    """Maps parameters of apple/ml-tarflow, or their gradients, to a state dict of a `TarFlow`."""
    weights = Weights({name: torch.from_numpy(value) for name, value in params.items()})
    table, unused = ml_tarflow.table(model, weights)
    return assemble(table, weights.tensors, "TarFlow", unused)


def tarflow_from_file(file):
    """Returns a `TarFlow`, and the contexts of labels, and of labels some of which are dropped."""
    config, inputs = file.config, file.tensors("in")
    flow = functools.partial(
        TarFlow,
        (config["img_size"], config["img_size"], config["in_channels"]),
        depth=config["num_blocks"],
        block_depth=config["layers_per_block"],
        emb_dim=config["channels"],
        num_heads=config["channels"] // config["head_dim"],
        ps=config["patch_size"],
    )
    context, context_with_dropped = None, None
    if config["num_classes"]:
        labelled = LabelledFlow(flow, config["num_classes"], context_dim=None)
        context = labelled.context(inputs["label"])
        with_dropped = inputs["label_with_dropped"]
        context_with_dropped = labelled.context(with_dropped, with_dropped < 0)
    flow = labelled.flow if config["num_classes"] else flow()
    flow.load_state_dict(from_ml_tarflow(file.numpy("params"), flow))
    return flow, context, context_with_dropped


def tarflow_images(file):
    inputs = file.tensors("in")
    return (inputs["image"] + inputs["draw/dequant"]) / 256 * 2 - 1


@golden("tarflow_")
def test_tarflow(file):
    expected = file.tensors("out")
    model, _, context = tarflow_from_file(file)
    x = tarflow_images(file)

    tokens, logdet = model.patchify(x)
    for i, block in enumerate(model.blocks):
        tokens, block_logdet = block(tokens, context)
        logdet = logdet + block_logdet
        assert_output(tokens, expected[f"block{i}"])
    assert_output(tokens, expected["z"])
    z, whole_logdet = model(x, context)
    assert torch.equal(model.patchify(z)[0], tokens)
    assert torch.equal(whole_logdet, logdet)
    logdet_per_dim = logdet / x[0].numel()
    assert_output(logdet_per_dim, expected["logdet_per_dim"])

    bits_per_dim, _ = JetObjective.score(model, x, context)["bits_per_dim"]
    # Pixel values are mapped to [-1, 1) there, to [-1, 1] here.
    assert_output(bits_per_dim + math.log2(128 / 127.5), expected["bits_per_dim"])
    loss = 0.5 * z.square().mean() - logdet_per_dim.mean()
    assert_output(loss, expected["loss"])
    loss.backward()
    assert_gradients(model, file.numpy("out/grad"), from_ml_tarflow)


@golden("tarflow_")
def test_inverse_of_tarflow(file):
    expected = file.tensors("out")
    model, context, _ = tarflow_from_file(file)
    with torch.no_grad():
        z, logdet = model(tarflow_images(file), context)
        assert_output(model.patchify(z)[0], expected["z_labels"])
        reconstruction, inverse_logdet = model.inverse(model.patchify.inverse(expected["z_labels"])[0], context)
        assert_output(reconstruction, expected["reconstruction"])
        assert_log(inverse_logdet, -logdet)
        # The latents' variances, which its authors measure after training.
        noise = file.tensors("in")["noise"] * file.tensors("params")["var"].sqrt()
        sample, _ = model.inverse(model.patchify.inverse(noise)[0], context)
    assert_output(sample, expected["sample"])
    denoised = denoise(lambda x: log_density(model, x, context), sample, file.config["noise_std"])
    assert_output(denoised, expected["sample_denoised"])


@golden("tarflow_", having="out/sample_guided")
@pytest.mark.parametrize(
    ("name", "schedule", "is_tempered"),
    [
        ("sample_guided", "constant", False),
        ("sample_guided_annealed", "linear", False),
        ("sample_guided_temperature", "constant", True),
    ],
)
def test_guidance_of_tarflow(file, name, schedule, is_tempered):
    config = file.config
    model, context, _ = tarflow_from_file(file)
    noise = file.tensors("in")["noise"] * file.tensors("params")["var"].sqrt()
    weights = Guidance("interp", config["guidance"], schedule).weights(noise.shape[1])
    without = torch.full_like(context, 1 / config["num_classes"])
    temperature = config["attn_temp"] if is_tempered else 1.0
    sample = guided_inverse(model, model.patchify.inverse(noise)[0], context, without, weights, temperature)
    assert_output(sample, file.tensors("out")[name])


@golden("model_")
def test_model(file):
    inputs, expected = file.tensors("in"), file.tensors("out")
    model = load(jetformer_from_config(file.config), file.numpy("params"))

    text_hidden, image_hidden = model(
        inputs["text"],
        inputs["image_tokens"],
        text_first=inputs["text_first"],
        text_mask=inputs.get("text_mask"),
        drop_prefix=inputs.get("drop_prefix"),
    )
    assert_output(model.text_logits(text_hidden), expected["text_logits"])
    image_logits = model.image_head.logits(image_hidden)
    assert_output(image_logits, expected["image_logits"][..., head_order(model)])
    head = model.image_head
    density = mixture_of(head, image_logits) if isinstance(head, MixtureHead) else head.distribution(image_logits)
    log_prob = density.log_prob(inputs["image_tokens"])
    assert_log(log_prob, expected["image_log_prob"])
    nll = model.image_head(image_hidden, inputs["image_tokens"], torch.ones(log_prob.shape)).nll
    assert_log(-nll, expected["image_log_prob"])


@golden("decode_cached")
def test_decode_cached(file):
    inputs, expected = file.tensors("in"), file.tensors("out")
    model = load(jetformer_from_config(file.config), file.numpy("params"))
    tokens = inputs["forced_image_tokens"]
    text, text_mask, drop = (inputs.get(name) for name in ("text", "text_mask", "drop_prefix"))
    with torch.no_grad():
        prefix = model.embed(text, tokens[:, :0], text_first=True, text_mask=text_mask, drop_prefix=drop, shift=False)
        decoder = CachedDecoder(model, prefix, modality="image", num_steps=tokens.shape[1] - 1)
        logits = [model.image_head.logits(decoder.prefill())]
        logits += [model.image_head.logits(decoder.step(token)) for token in tokens[:, :-1].unbind(1)]
    expected = expected["image_logits"][..., head_order(model)]
    assert_output(torch.stack(logits, dim=1), expected)


def objective_from_config(config):
    return JetFormerObjective(
        loss_on_prefix=config["loss_on_prefix"],
        text_loss_weight=config["text_loss_weight"],
        input_noise_std=config["input_noise_std"],
        rgb_noise_on_image_prefix=config["rgb_noise_on_image_prefix"],
        stop_grad_image_prefix=config["stop_grad_nvp_prefix"],
        dequantize=config["add_dequant_noise"],
    )


def objective_inputs(file):
    """Returns model, batch and draws of an `objective_*` file."""
    config, inputs = file.config, file.tensors("in")
    flow = functools.partial(Jet, **config["adaptor"]) if config["adaptor"] else None
    model = jetformer_from_config(
        config["model"],
        tuple(inputs["image_uint8"].shape[1:]),
        config["patch_pca"]["patch_size"],
        flow,
    )
    load(model, file.numpy("params"))
    batch = {k: inputs[k] for k in ("text", "text_mask", "text_loss")}
    batch["image"] = inputs["image_uint8"]
    draws = {k: inputs[k] for k in ("text_first", "drop_prefix")}
    return model, batch, draws | file.tensors("in/draw")


@golden("objective_")
def test_objective(file):
    config, expected = file.config, file.tensors("out")
    model, batch, draws = objective_inputs(file)
    assert model.factored_dim == config["latent_noise_dim"]
    objective = dataclasses.replace(objective_from_config(config), loss_on_prefix=True)
    _, terms = objective(model, batch, draws, noise_scale=config["noise_scale"])
    for ours, theirs in (
        ("bits_per_dim", "nll_image"),
        ("bits_per_dim_tokens", "nll_image_tokens"),
        ("bits_per_dim_logdet", "logdet"),
    ):
        assert_output(terms[ours][0], expected[f"{theirs}_per_example"])
    nats = terms["text_bits_per_token"][0] * math.log(2)
    assert_output(nats, expected["nll_text_per_example"])
    loss, _ = objective_from_config(config)(model, batch, draws, noise_scale=config["noise_scale"])
    assert_output(loss, expected["loss"])
    if gradients := file.numpy("out/grad"):  # files of evaluation have none
        loss.backward()
        assert_gradients(model, gradients, from_big_vision)


@golden("objective_")
def test_one_order_of_modalities(file):
    """If all texts come first, a bool and a tensor yield the same loss."""
    model, batch, draws = objective_inputs(file)
    objective = objective_from_config(file.config)
    draws["text_first"] = torch.ones_like(draws["text_first"])
    noise_scale = file.config["noise_scale"]
    expected, _ = objective(model, batch, draws, noise_scale=noise_scale)
    del draws["text_first"]
    objective = dataclasses.replace(objective, text_prefix_prob=1.0)
    loss, _ = objective(model, batch, draws, noise_scale=noise_scale)
    assert_output(loss, expected, 1e-6)


@golden("objective_", having="out/trajectory/loss")
def test_trajectory(file):
    expected = file.tensors("out/trajectory")
    config = file.config["optimizer"]
    model, batch, draws = objective_inputs(file)
    objective = objective_from_config(file.config)
    optimizer = optim.make_optimizer(model, **{k: config[k] for k in ("lr", "wd", "b1", "b2", "eps")})
    elsewhere = ("lr", "wd", "b1", "b2", "eps", "grad_clip_norm", "total_steps")
    durations = {k: v for k, v in config.items() if k not in elsewhere}
    batch_size = len(batch["image"])
    schedule = optim.make_schedule(config["total_steps"], batch_size, batch_size, **durations)
    losses, norms = [], []
    for step in range(config["total_steps"]):
        loss, _ = objective(model, batch, draws, noise_scale=file.config["noise_scale"])
        optimizer.zero_grad()
        loss.backward()
        optim.set_learning_rate(optimizer, schedule(step))
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config["grad_clip_norm"]))
        optimizer.step()
        losses.append(loss.detach())
    assert_output(torch.stack(losses), expected["loss"], 1e-3)
    assert_output(torch.stack(norms), expected["grad_norm"], 1e-3)
    # Norms of the final parameters. One of ours may consist of several of the reference's.
    squares = {}
    for name, value in file.numpy("params").items():
        if "FREEZE_ME" not in name:
            ours = frozenset(from_big_vision({name: value}, model))
            squares[ours] = squares.get(ours, 0.0) + expected[f"param_l2/{name}"].square()
    parameters = dict(model.named_parameters())
    assert frozenset().union(*squares) == parameters.keys()
    for names, value in squares.items():
        assert_output(TorchLoop(Runtime(torch.device("cpu"))).global_norm([parameters[n] for n in names]), value.sqrt())


@golden("gmm")
def test_mixture(file):
    config, inputs, expected = file.config, file.tensors("in"), file.tensors("out")
    order = image_head_order(config["num_mixtures"], config["out_dim"])
    logits = inputs["logits"][..., order].requires_grad_()
    x = inputs["x"].requires_grad_()
    plain = (config["num_mixtures"], config["scale_tol"])
    log_prob = mixture_from_logits(logits, *plain).log_prob(x)
    assert_log(log_prob, expected["log_prob"])
    tempered = mixture_from_logits(logits, *plain, config["temperature_scales"], config["temperature_probs"])
    assert_log(tempered.log_prob(x), expected["log_prob_t"])
    log_prob.sum().backward()
    gradients = file.tensors("out/grad")
    for actual, value in ((logits, gradients["logits"][..., order]), (x, gradients["x"])):
        bound = 1e-3 * value.abs().max().item()
        torch.testing.assert_close(actual.grad, value, rtol=0, atol=bound)


@golden("patch_pca_")
def test_patch_pca(file):
    config, x, expected = file.config, file.tensors("in")["x"], file.tensors("out")
    options = {k: v for k, v in config.items() if k in ("patch_size", "depth_to_seq", "whiten")}
    components = len(file.numpy("params")["components_"])
    model = PatchPCA(tuple(x.shape[1:]), num_components=components, **options)
    load(model, file.numpy("params"))
    codes, _ = model(x)
    assert_output(codes, expected["codes"])
    reconstruction, _ = model.inverse(expected["codes"])
    assert_output(reconstruction.clamp(-1, 1), expected["reconstruction"])


@golden("schedules")
def test_schedules(file):
    config, expected = file.config, file.numpy("out")
    steps = file.numpy("in")["steps"]
    sizes = [config[k] for k in ("total_steps", "batch_size", "data_size")]
    ours = {"polynomial": "linear"}  # big_vision's names, and its default
    for i, options in enumerate(config["schedules"]):
        options = {"decay_type": "stair"} | {"linear_end" if k == "end" else k: v for k, v in options.items()}
        options["decay_type"] = ours.get(options["decay_type"], options["decay_type"])
        schedule = optim.make_schedule(*sizes, **options)
        assert_output(torch.tensor([schedule(int(s)) for s in steps]), expected[f"schedule_{i}"], 1e-6)
    for i, (scale, minimum) in enumerate(config["noise"]):
        noise = [optim.noise_curriculum(int(s), sizes[0], scale, minimum) for s in steps]
        np.testing.assert_allclose(noise, expected[f"noise_{i}"], rtol=1e-6, atol=1e-6)


@golden("preprocess")
def test_preprocess(file):
    inputs, expected = file.numpy("in"), file.numpy("out")
    for i, pp in enumerate(file.config["preprocess"]):
        for kind in ("png", "jpeg"):
            example = {"image": tf.constant(inputs[kind].tobytes()), "label": tf.constant(3)}
            result = preprocess.parse(pp.replace("decode", "decode(precise=False)"))(example)
            assert result.keys() == {"image"}
            assert_output(torch.tensor(result["image"].numpy()), expected[f"{kind}_{i}"])
