"""Converted weights compute what the original implementations compute; no tensor is lost, unknown or unpickled."""

import pathlib
import pickle
import shutil

import gin
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch.nn import functional as F
from upath import UPath

from golden_files import DIRECTORY, Golden, assert_log, assert_output, paths
from jetformer import config
from jetformer.convert import big_vision, jet_pytorch, jetformer_pytorch, ml_tarflow, sharing
from jetformer.convert.big_vision import from_big_vision, image_head_order
from jetformer.convert.sources import Source, assemble, fit, permutation
from jetformer.convert.weights import Weights
from jetformer.experiment import Experiment
from jetformer.models.decoder import Decoder, GatedMlp
from jetformer.models.flow_ablations import make_jet
from jetformer.models.initializers import init_weights
from jetformer.models.jet import Jet, spatial_permutation
from jetformer.models.jetformer import JetFormer
from jetformer.models.patches import Patchify, PatchPCA
from jetformer.objectives import JetFormerObjective, JetObjective
from small_models import small_model
from test_golden import jet_from_config, load, objective_inputs, tarflow_images

TOKENIZER = pathlib.Path("experiments/shapes.model")
# Hyperparameters that the golden jet-pytorch weights do not determine.
JET_BINDINGS = ("Jet.num_heads = 2", 'Jet.kinds = ("channels", "spatial")')
# Likewise of the golden TarFlows; the second is needed with labels.
TARFLOW_BINDINGS = ("TarFlow.num_heads = 2", 'Data.name = "folder:/data/five"')


# Tables.


def test_image_head_order_separates_what_the_reference_interleaves():
    k, d = 3, 2
    weights = [f"w{i}" for i in range(k)]
    interleaved = [f"{kind}{i}{j}" for i in range(k) for kind in "ms" for j in range(d)]
    order = image_head_order(k, d)
    ours = np.array(weights + interleaved)[order]
    means, scales = ([f"{kind}{i}{j}" for i in range(k) for j in range(d)] for kind in "ms")
    assert ours.tolist() == weights + means + scales


@pytest.mark.parametrize("path", paths("objective_"), ids=lambda p: p.stem)
def test_every_parameter_is_mapped(path):
    """All parameters apart from permutations are mapped to the model's."""
    file = Golden(path)
    model, _, _ = objective_inputs(file)
    params = {k: v for k, v in file.numpy("params").items() if "FREEZE_ME" not in k}
    count = sum(value.size for value in params.values())
    assert count == sum(p.numel() for p in model.parameters())
    state = from_big_vision(params, model)
    for name, parameter in model.named_parameters():
        assert torch.equal(state[name], parameter), name


def test_unknown_parameters_are_named():
    with pytest.raises(ValueError, match=r"EmbedAudio/kernel .*JetFormer.* \[2, 2\]"):
        from_big_vision({"EmbedAudio/kernel": np.zeros((2, 2))}, small_model())
    flow = Jet((4, 4, 3), depth=1, emb_dim=8, num_heads=2, ps=2)
    with pytest.raises(ValueError, match=r"couplings/0/dnn/extra/kernel .*Jet"):
        from_big_vision({"couplings/dnn/extra/kernel": np.zeros((1, 2))}, flow)
    with pytest.raises(TypeError, match="Linear"):
        load(torch.nn.Linear(2, 2), {})


def test_layers_may_be_stacked_or_unrolled():
    """Couplings, their permutations and the blocks of their ViTs."""
    file = Golden(DIRECTORY / "jet_mixed.npz")
    params = file.numpy("params")
    model = jet_from_config(file.config, file.numpy("in")["x"].shape[1:])
    expected = from_big_vision(params, model, partial=False)
    unrolled = big_vision.unstacked(params)
    assert "couplings/1/dnn/init_proj/kernel" in unrolled
    stacked = {k: v for k, v in params.items() if "encoderblock_" not in k}
    for name in params:
        if "/encoderblock_0/" in name:
            blocks = [params[name.replace("_0/", f"_{i}/", 1)] for i in range(file.config["block_depth"])]
            stacked[name.replace("encoderblock_0", "encoderblock")] = np.stack(blocks, axis=1)
    for other in (unrolled, stacked):
        state = from_big_vision(other, model, partial=False)
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)


TABLE = {
    "ab": Source({"a": (1, 2), "b": (2, 2)}),
    "c": Source({"c": (3,)}, lambda x: x - 1),
    "d": torch.arange(2),
}


def theirs(**changes):
    tensors = {"a": torch.zeros(1, 2), "b": torch.ones(2, 2), "c": torch.zeros(3), **changes}
    return {name: x for name, x in tensors.items() if x is not None}


def test_a_table_makes_a_state_dict():
    state = assemble(TABLE, theirs(e=torch.zeros(5)), "M", unused={"e"})
    assert state["ab"].tolist() == [[0, 0], [1, 1], [1, 1]]
    assert state["c"].tolist() == [-1, -1, -1]
    assert state["d"].tolist() == [0, 1]
    assert assemble(TABLE, {"c": torch.zeros(3)}, "M", partial=True).keys() == {"c"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b": None}, r"^b is missing: M .*\[2, 2\]$"),
        ({"a": None, "b": None}, r"^a is missing \(and 1 more\): M .*\[1, 2\]$"),
        ({"c": torch.zeros(4)}, r"^c .*\[4\].* M .*\[3\]$"),
        ({"e": torch.zeros(5)}, r"^e .* M.*\[5\]$"),
    ],
)
def test_mismatches_with_a_table_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        assemble(TABLE, theirs(**changes), "M")


def test_permutations_have_one_1_in_each_row_and_column():
    order = torch.tensor([2, 0, 1])
    matrix = F.one_hot(order, 3).T.float()  # column j picks what comes j-th
    assert permutation(matrix).tolist() == order.tolist()
    for wrong in (torch.zeros(3, 3), torch.ones(3, 3), F.one_hot(torch.tensor([0, 0, 1])).float(), matrix * 1.5):
        with pytest.raises(ValueError, match="permutation matrix"):
            permutation(wrong)
    table = {"p": Source({"mask": (3, 3)}, permutation)}
    with pytest.raises(ValueError, match=r"^mask is not a permutation matrix"):
        assemble(table, {"mask": torch.zeros(3, 3)}, "M")


def test_parts_that_a_format_lacks_are_named():
    model = make_jet((4, 4, 3), depth=1, emb_dim=8, num_heads=2, ps=2, actnorm=True)
    state = {k: v for k, v in model.state_dict().items() if "actnorm" not in k}
    with pytest.raises(ValueError, match=r"weights of jet_pytorch .*actnorms"):
        fit(state, model.state_dict(), model, "weights of jet_pytorch")
    model = make_jet((4, 4, 3), depth=1, emb_dim=8, num_heads=2, ps=2, predictor="cnn")
    with pytest.raises(ValueError, match=r"Jet\.predictor .*'vit'"):
        from_big_vision({}, model)


# jet-pytorch.


@pytest.fixture(scope="module")
def jet_file(tmp_path_factory):
    """The golden state dict as a file, as on the Hub; with a training checkpoint beside it."""
    directory = tmp_path_factory.mktemp("jet_pytorch")
    tensors = Golden(DIRECTORY / "convert_jet_pytorch.npz").tensors("params")
    save_file(tensors, directory / "jet.safetensors")
    torch.save({"model": tensors, "opt": {"state": {}, "param_groups": []}, "epoch": 4}, directory / "jet.pt")
    return directory / "jet.safetensors"


def parsed(weights, *bindings):
    """The model of the weights' experiment, on the meta device."""
    gin.clear_config()
    gin.parse_config(weights.gin)
    gin.parse_config(list(bindings))
    return config.call(Experiment).check_model()


def converted(module, weights, *bindings):
    model = parsed(weights, *bindings)
    table, unused = module.table(model, weights)
    state = fit(assemble(table, weights.tensors, type(model).__name__, unused), model.state_dict(), model, "weights")
    model.load_state_dict(state, assign=True)
    return model.eval()


def check_jet(model, tolerance=2e-4):
    """The model computes what jet-pytorch does."""
    file = Golden(DIRECTORY / "convert_jet_pytorch.npz")
    x, expected = file.tensors("in")["x"], file.tensors("out")
    with torch.no_grad():
        z, logdet = model(x)
        tokens, _ = model.patchify(z)
        assert_output(tokens, expected["z"], tolerance)
        assert_log(logdet, expected["logdet"])
        image, _ = model.patchify.inverse(expected["z"])
        assert_output(model.inverse(image)[0], expected["x_reconstructed"], tolerance)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_jet_pytorch(jet_file, suffix):
    weights = jet_pytorch.read(str(jet_file.with_suffix(suffix)))
    assert weights.needs.keys() == {"Jet.num_heads", "Jet.kinds"}
    model = converted(jet_pytorch, weights, *JET_BINDINGS)
    assert [c.projection for c in model.couplings][1::2] == ["checkerboard", "checkerboard-inv", "vstripes"]
    check_jet(model)


def test_the_numerics_of_jet_pytorch_are_not_the_references(jet_file):
    """Each of the two differences shows in the golden values at a small tolerance."""
    check_jet(converted(jet_pytorch, jet_pytorch.read(str(jet_file)), *JET_BINDINGS), 1e-6)
    for binding in ('Jet.gelu = "tanh"', "Jet.norm_eps = 1e-6"):
        model = converted(jet_pytorch, jet_pytorch.read(str(jet_file)), *JET_BINDINGS, binding)
        with pytest.raises(AssertionError):
            check_jet(model, 1e-6)


SPATIAL = ("checkerboard", "checkerboard-inv", "vstripes", "vstripes-inv", "hstripes", "hstripes-inv")


def package_defaults(**changes):
    """The shapes of jet_imagenet64x64_200m, without values; permutations of tokens with values."""
    spatial = [spatial_permutation(name, (16, 16)) for name in SPATIAL]
    block = {
        **{"pos_emb": (1, 256, 512), "init_proj.weight": (512, 24), "init_proj.bias": (512,)},
        **{"final_proj.weight": (48, 512), "final_proj.bias": (48,)},
        **{f"encoder.blocks.{i}.ln1.weight": (512,) for i in range(2)},
    }
    shapes = {f"blocks.{i}.dnn.{name}": shape for i in range(32) for name, shape in block.items()}
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    tensors["channel_projections"] = torch.empty(26, 48, 48, device="meta")
    tensors["spatial_projections"] = torch.stack([F.one_hot(p, 256).T for p in spatial])
    return {name: x for name, x in {**tensors, **changes}.items() if x is not None}


def test_the_packages_default_sizes_imply_its_other_defaults():
    """As for the weights on the Hub; each default is noted."""
    weights = jet_pytorch.experiment(package_defaults(), "x", step=7)
    assert not weights.needs
    assert len(weights.notes) == 3
    model = parsed(weights)
    assert model.image_shape == (64, 64, 3)
    assert [c.kind for c in model.couplings[:6]] == ["channels"] * 4 + ["spatial", "channels"]
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(210e6, rel=0.05)
    assert gin.query_parameter("Jet.num_heads") == 8
    assert gin.query_parameter("Jet.spatial_coupling_projs") == SPATIAL
    assert gin.query_parameter("Data.name") == "downsampled_imagenet/64x64"
    assert gin.query_parameter("train.total_steps") == 7


def test_hyperparameters_that_jet_pytorch_weights_do_not_determine():
    empty = lambda *shape: torch.empty(shape, device="meta")
    wide = {"blocks.0.dnn.pos_emb": empty(1, 250, 512), "blocks.0.dnn.final_proj.weight": empty(20, 512)}
    weights = jet_pytorch.experiment(package_defaults(**wide), "x")
    assert weights.needs.keys() == {"Jet.ps", "Jet.input_shape"}
    assert "20" in weights.needs["Jet.ps"]
    assert "250" in weights.needs["Jet.input_shape"]
    only_channels = {"channel_projections": empty(32, 48, 48), "spatial_projections": empty(0, 256, 256)}
    weights = jet_pytorch.experiment(package_defaults(**only_channels), "x")
    assert "Jet.kinds = ('channels',)" in weights.gin
    with pytest.raises(ValueError, match=r"32 couplings.* 5 .* 6 "):
        jet_pytorch.experiment(package_defaults(channel_projections=empty(5, 48, 48)), "x")
    with pytest.raises(ValueError, match=r"channel_projections .* 3 axes, .*missing"):
        jet_pytorch.experiment(package_defaults(channel_projections=None), "x")


# alexojica/JetFormer.


JETFORMER_PT, JETFORMER_YAML = (DIRECTORY / f"convert_jetformer_pytorch.{suffix}" for suffix in ("pt", "yaml"))


def check_jetformer(model, tolerance=2e-4):
    """The model computes what alexojica/JetFormer does."""
    file = Golden(DIRECTORY / "convert_jetformer_pytorch.npz")
    inputs, expected = file.tensors("in"), file.tensors("out")
    image = inputs["image_uint8_nchw"].permute(0, 2, 3, 1)
    text = inputs["label"][:, None]
    with torch.no_grad():
        tokens, factored, logdet, _ = model.encode_image(image.float() / 127.5 - 1)
        assert_output(torch.cat((tokens, factored), dim=-1), expected["latent_tokens"], tolerance)
        assert_log(logdet, expected["logdet"])
        text_hidden, image_hidden = model(text, tokens, text_first=True)
        assert_output(model.text_logits(text_hidden), expected["text_logits"], tolerance)
        order = image_head_order(model.image_head.num_mixtures, model.out_dim)
        assert_output(model.image_head.logits(image_hidden), expected["image_logits"][..., order], tolerance)
        batch = {"image": image, "text": text, "text_loss": torch.ones_like(text, dtype=torch.bool)}
        objective = JetFormerObjective(text_prefix_prob=1.0, loss_on_prefix=False, dequantize=False)
        _, terms = objective(model, batch, {}, train=False)
        assert_output(terms["bits_per_dim"][0].mean(), expected["image_bits_per_dim"], tolerance)


def changed(tree, **changes):
    """A configuration with changes: `model__width=8` sets model.width, None removes a key."""
    for name, value in changes.items():
        *parents, key = name.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = value
        if value is None:
            del node[key]
    return tree


def read_jetformer(**changes):
    """The golden checkpoint, with its YAML changed."""
    tree = changed(yaml.safe_load(JETFORMER_YAML.read_text()), **changes)
    weights = jetformer_pytorch.experiment(tree, "its YAML", ema=False, step=None)
    weights.tensors = jetformer_pytorch.read(str(JETFORMER_PT)).tensors
    return weights


@pytest.mark.parametrize("yaml_path", [None, str(JETFORMER_YAML)], ids=["its own config", "YAML"])
def test_jetformer_pytorch(yaml_path):
    weights = jetformer_pytorch.read(str(JETFORMER_PT), yaml_path)
    assert not weights.notes
    assert not weights.needs
    check_jetformer(converted(jetformer_pytorch, weights))


@pytest.mark.parametrize("binding", ['Decoder.activated = "gate"', "Jet.norm_eps = 1e-6", 'Patchify.order = "hwc"'])
def test_the_numerics_of_jetformer_pytorch_are_not_the_references(binding):
    """Each of these differences shows in the golden values at a small tolerance."""
    check_jetformer(converted(jetformer_pytorch, read_jetformer()), 2e-6)
    with pytest.raises(AssertionError):
        check_jetformer(converted(jetformer_pytorch, read_jetformer(), binding), 2e-6)


def test_blocks_of_jetformer_pytorch_with_large_weights():
    """The golden weights are so small that the form of GELU does not show."""
    weights = read_jetformer()
    weights.tensors = {name: 5 * x for name, x in weights.tensors.items()}
    model, own = converted(jetformer_pytorch, weights), weights.tensors
    x = 3 * torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    prefix = "transformer.1.feed_forward"
    gate, up, linear = (own[f"{prefix}.w_{name}.weight"] for name in ("gate", "up", "linear"))
    expected, wrong = ((F.gelu(x @ up.T, approximate=a) * (x @ gate.T)) @ linear.T for a in ("none", "tanh"))
    assert (wrong - expected).abs().max() > 1e-3
    assert_output(model.decoder.blocks[1].mlp(x), expected, 1e-4)

    prefix = "adaptor.flow.couplings.2.dnn.vit_encoder.layers.0"
    part = {name.removeprefix(f"{prefix}."): x for name, x in own.items() if name.startswith(f"{prefix}.")}
    norm = lambda x, name: F.layer_norm(x, (16,), part[f"{name}.weight"], part[f"{name}.bias"])
    linear = lambda x, name: F.linear(x, part[f"{name}.weight"], part[f"{name}.bias"])
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    attention.load_state_dict({k.removeprefix("attn."): v for k, v in part.items() if k.startswith("attn.")})
    x = x[..., :16]
    with torch.no_grad():
        y = norm(x, "norm1")
        expected = x + attention(y, y, y, need_weights=False)[0]
        expected = expected + linear(F.gelu(linear(norm(expected, "norm2"), "mlp.fc1")), "mlp.fc2")
    assert_output(model.flow.couplings[2].dnn.vit.blocks[0](x), expected, 1e-4)


def test_unknown_yaml_keys_are_noted_in_one_line():
    weights = read_jetformer(model__attn_logits_softcap=30.0, new__thing=[1], optimizer__name="adamw", num_epochs=3)
    (note,) = weights.notes
    assert note.startswith("its YAML: 2 ")
    assert note.endswith(": model.attn_logits_softcap, new.thing")
    check_jetformer(converted(jetformer_pytorch, weights))


def test_a_yaml_is_read_as_its_program_reads_it():
    """Numbers that YAML reads as text, an unused head dimension, dimensions without a likelihood."""
    weights = read_jetformer(model__scale_tol="1e-3", model__head_dim=64, training__noise_scale=16, ema_decay="0.99")
    (note,) = weights.notes
    assert "model.head_dim" in note
    assert note.endswith("width / num_heads = 8")
    check_jetformer(converted(jetformer_pytorch, weights))
    assert gin.query_parameter("train.noise_scale") == 16.0
    weights = read_jetformer(patch_pca__model__codeword_dim=8, adaptor__latent_noise_dim=30)
    assert "10 of a token's 48 dimensions" in weights.notes[0]
    weights = read_jetformer(input__dataset="cifar10", model__boi_id=None, patch_pca__model__add_dequant_noise=True)
    parsed(weights)
    assert gin.query_parameter("Data.name") == "cifar10"
    assert gin.query_parameter("JetFormer.boi_id") is None
    assert gin.query_parameter("JetFormerObjective.dequantize") is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adaptor__model__actnorm": True}, "adaptor.model.actnorm = True "),
        ({"adaptor__model__masking_mode": "pairing"}, "adaptor.model.masking_mode = 'pairing' "),
        ({"adaptor__model__kinds": ["channels", "spatial"]}, "adaptor.model.kinds = .*spatial"),
        ({"adaptor__model__kinds": None}, "adaptor.model.kinds = .*spatial"),
        ({"patch_pca__model__depth_to_seq": 2}, "patch_pca.model.depth_to_seq = 2 "),
        (
            {"patch_pca__model__skip_pca": False, "patch_pca__model__pca_init_file": "pca.npz"},
            "patch_pca.model.pca_init_file",
        ),
        ({"model__width": None}, "its YAML has no model.width"),
        ({"model__bos_id": None}, "its YAML has no model.bos_id"),
        ({"model__width": "wide"}, "its YAML: model.width = 'wide': .*int"),
        ({"model__width": 32.5}, "its YAML: model.width = 32.5: .*int"),
        ({"model__causal_mask_on_prefix": 1}, "its YAML: model.causal_mask_on_prefix = 1: .*bool"),
        ({"input__input_size": 16}, "its YAML: input.input_size = 16: .*tuple"),
        ({"input__input_size": [16]}, r"its YAML: input.input_size = \[16\]: .*height and width"),
    ],
)
def test_unsupported_yaml_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read_jetformer(**changes)


def test_a_moving_average_is_converted(tmp_path):
    content = torch.load(JETFORMER_PT, weights_only=True)
    own = [name for name in content["model_state_dict"] if not name.startswith("jet.")]
    content["ema_state_dict"] = {name: 2 * content["model_state_dict"][name] for name in own}
    content["config"]["ema_decay"] = 0.99
    torch.save(content, tmp_path / "x.pt")
    weights = jetformer_pytorch.read(str(tmp_path / "x.pt"))
    model = parsed(weights)
    assert gin.query_parameter("train.ema_decay") == 0.99
    table, unused = jetformer_pytorch.table(model, weights)
    state, average = (assemble(table, tensors, "M", unused) for tensors in (weights.tensors, weights.ema))
    name = "flow.couplings.0.dnn.vit.blocks.0.attn.qkv.weight"
    assert torch.equal(average[name], 2 * state[name])
    torch.testing.assert_close(average["text_norm.weight"] + 1, 2 * (state["text_norm.weight"] + 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("image_emb.bias"), r"image_emb.bias is missing: JetFormer .*\[32\]"),
        (
            lambda s: s.update({"transformer.1.attention.w_k.weight": torch.zeros(4, 32)}),
            r"transformer.1.attention.w_k.weight .*\[4, 32\].* JetFormer .*\[8, 32\]",
        ),
        (lambda s: s.update({"audio.weight": torch.zeros(3)}), r"audio.weight .*JetFormer"),
        (
            lambda s: s.update({"jet.couplings.0.dnn.init_proj.bias": torch.ones(16)}),
            r"jet.couplings.0.dnn.init_proj.bias .* adaptor.flow.couplings.0.dnn.init_proj.bias",
        ),
    ],
)
def test_tensors_of_jetformer_pytorch_that_do_not_fit_are_named(change, message, tmp_path):
    content = torch.load(JETFORMER_PT, weights_only=True)
    change(content["model_state_dict"])
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        converted(jetformer_pytorch, jetformer_pytorch.read(str(tmp_path / "x.pt")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.5.dnn.pos_emb": None}, r"blocks.5.dnn.pos_emb is missing: Jet .*\[1, 16, 16\]"),
        (
            {"blocks.2.dnn.encoder.blocks.0.mha.in_proj_bias": torch.zeros(47)},
            r"blocks.2.dnn.encoder.blocks.0.mha.in_proj_bias .*\[47\].* Jet .*\[48\]",
        ),
        ({"extra": torch.zeros(2, 3)}, r"extra .* Jet.*\[2, 3\]"),
        ({"channel_projections": torch.zeros(3, 12, 12)}, r"channel_projections.0 .*permutation matrix"),
    ],
)
def test_tensors_of_jet_pytorch_that_do_not_fit_are_named(change, message, tmp_path):
    tensors = Golden(DIRECTORY / "convert_jet_pytorch.npz").tensors("params") | change
    torch.save({name: x for name, x in tensors.items() if x is not None}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        converted(jet_pytorch, jet_pytorch.read(str(tmp_path / "x.pt")), *JET_BINDINGS)


def test_other_files_are_refused(tmp_path):
    torch.save({"state": 1}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="model_state_dict"):
        jetformer_pytorch.read(str(tmp_path / "x.pt"))
    with pytest.raises(ValueError, match=r"x.pt .*state dict"):
        jet_pytorch.read(str(tmp_path / "x.pt"))
    torch.save({"model_state_dict": {"a": torch.zeros(1)}}, tmp_path / "y.pt")
    with pytest.raises(ValueError, match=r"has no config: .*--yaml"):
        jetformer_pytorch.read(str(tmp_path / "y.pt"))
    for version in (4, 7, "6"):
        torch.save({"model_state_dict": {"a": torch.zeros(1)}, "format_version": version}, tmp_path / "z.pt")
        with pytest.raises(ValueError, match=rf"z.pt .*format_version {version}: .*5, 6 or none"):
            jetformer_pytorch.read(str(tmp_path / "z.pt"))
    (tmp_path / "no.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match=r"no.yaml is not YAML"):
        jetformer_pytorch.read(str(JETFORMER_PT), str(tmp_path / "no.yaml"))


# alexojica/JetFormer, formats 5 and 6.


VERSIONED_PT = {version: DIRECTORY / f"convert_jetformer_pytorch_{version}.pt" for version in (5, 6)}


def check_versioned(model, tolerance=2e-4):
    """The model computes what alexojica/JetFormer 0.1 does."""
    file = Golden(DIRECTORY / "convert_jetformer_pytorch_6.npz")
    inputs, expected = file.tensors("in"), file.tensors("out")
    image = inputs["image_uint8_nchw"].permute(0, 2, 3, 1)
    text, drop = inputs["label"][:, None], inputs["drop_condition"]
    order = image_head_order(model.image_head.num_mixtures, model.out_dim)
    with torch.no_grad():
        tokens, factored, logdet, _ = model.encode_image(image.float() / 127.5 - 1)
        assert_output(torch.cat((tokens, factored), dim=-1), expected["latents"], tolerance)
        assert_log(logdet, expected["logdet"])
        pixels, _ = model.decode_image(*(0.9 * expected["latents"]).split((model.out_dim, model.factored_dim), dim=-1))
        assert_output(model.patches(pixels)[0], expected["inverse"], tolerance)
        for drop_prefix, logits in ((None, "image_logits"), (drop, "image_logits_dropped")):
            _, hidden = model(text, tokens, text_first=True, drop_prefix=drop_prefix)
            assert_output(model.image_head.logits(hidden), expected[logits][..., order], tolerance)
        batch = {"image": image, "text": text, "text_loss": torch.ones_like(text, dtype=torch.bool)}
        objective = JetFormerObjective(text_prefix_prob=1.0, loss_on_prefix=False, dequantize=False)
        _, terms = objective(model, batch, {}, train=False)
        assert_output(terms["bits_per_dim"][0], expected["bits_per_dim"], tolerance)


def read_versioned(version, **changes):
    """The golden checkpoint of a format, with its configuration changed."""
    tree = changed(torch.load(VERSIONED_PT[version], weights_only=True)["config"], **changes)
    weights = jetformer_pytorch.experiment(tree, "its config", ema=False, step=None, version=version)
    weights.tensors = jetformer_pytorch.read(str(VERSIONED_PT[version])).tensors
    return weights


@pytest.mark.parametrize("version", VERSIONED_PT)
def test_formats_5_and_6_of_jetformer_pytorch(version):
    weights = jetformer_pytorch.read(str(VERSIONED_PT[version]))
    assert not weights.notes
    assert not weights.needs
    assert weights.step == 30
    check_versioned(converted(jetformer_pytorch, weights))
    assert jetformer_pytorch.read(str(VERSIONED_PT[version]), step=7).step == 7


def test_format_5_with_a_configuration_of_format_6(tmp_path):
    """As its own package takes it."""
    tree = torch.load(VERSIONED_PT[6], weights_only=True)["config"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    weights = jetformer_pytorch.read(str(VERSIONED_PT[5]), str(tmp_path / "config.yaml"))
    check_versioned(converted(jetformer_pytorch, weights))


@pytest.mark.parametrize(
    "binding",
    [
        *('Decoder.gelu = "exact"', 'Decoder.activated = "up"', 'Jet.gelu = "exact"', "Jet.norm_eps = 1e-5"),
        *('Patchify.order = "chw"', "JetFormer.scale_tol = 0.9", "Jet.num_heads = 4"),
    ],
)
def test_the_numerics_of_formats_5_and_6_are_the_references(binding):
    """Each other choice shows in the golden values at a small tolerance."""
    check_versioned(converted(jetformer_pytorch, read_versioned(6)), 2e-5)
    with pytest.raises(AssertionError):
        check_versioned(converted(jetformer_pytorch, read_versioned(6), binding), 2e-5)


def test_the_published_model_of_format_6():
    """The configuration of mojique/jetformer-cifar10-32-42m has the architecture of its experiment."""
    published = {
        **{"input__input_size": [32, 32], "image__ar_dim": 8, "flow__depth": 32, "flow__block_depth": 1},
        **{"flow__emb_dim": 192, "flow__num_heads": 3, "flow__kinds": ["channels"], "model__width": 384},
        **{"flow__spatial_coupling_projs": ["checkerboard", "checkerboard-inv"], "model__num_class_repeats": 16},
        **{"model__depth": 12, "model__mlp_dim": 1536, "model__num_heads": 6, "model__num_kv_heads": 1},
        **{"model__num_mixtures": 256, "model__scale_tol": 1e-6},
    }
    model = parsed(read_versioned(6, **published))
    assert sum(p.numel() for p in model.parameters()) == 42_222_080
    assert gin.query_parameter("Data.pp_eval").startswith("decode | label_as_text")
    assert gin.query_parameter("Data.eval_split") == "test"
    found = config.architecture()
    gin.clear_config()
    gin.parse_config_file("experiments/cifar10_seed.gin")
    differing = {name for name, value in config.architecture().items() if found[name] != value}
    assert differing <= {"JetFormer.head_dtype"}


@pytest.mark.parametrize(
    ("version", "changes", "message"),
    [
        (5, {"model__per_modality_final_norm": True}, "its config: model.per_modality_final_norm = True "),
        (5, {"model__causal_mask_on_prefix": False}, "its config: model.causal_mask_on_prefix = False "),
        (5, {"use_adaptor": False}, "its config: use_adaptor = False "),
        (5, {"adaptor__model__actnorm": True}, "its config: adaptor.model.actnorm = True "),
        (5, {"adaptor__model__kinds": None}, "its config has no adaptor.model.kinds"),
        (5, {"model__bos_id": None}, "its config has no model.bos_id"),
        (5, {"model__attn_logits_softcap": 30.0}, "its config: model.attn_logits_softcap is unknown"),
        (6, {"image": None}, "its config has no image.patch_size"),
        (6, {"image__ar_dim": "all"}, "its config: image.ar_dim = 'all': .*int"),
        (6, {"flow__num_heads": None}, "its config has no flow.num_heads"),
        (6, {"model__num_class_repeats": None}, "its config has no model.num_class_repeats"),
        (6, {"flow__levels": 2}, "its config: flow.levels is unknown"),
    ],
)
def test_unsupported_configurations_of_formats_5_and_6_are_refused(version, changes, message):
    with pytest.raises(ValueError, match=message):
        read_versioned(version, **changes)


def test_unknown_keys_of_format_6_outside_of_its_model_are_noted():
    weights = read_versioned(6, cluster__nodes=3)
    (note,) = weights.notes
    assert note.endswith(": cluster.nodes")
    check_versioned(converted(jetformer_pytorch, weights))


@pytest.mark.parametrize(
    ("version", "change", "message"),
    [
        (6, lambda s: s.pop("token_emb.weight"), r"token_emb.weight is missing: JetFormer .*\[39, 16\]"),
        (
            6,
            lambda s: s.pop("blocks.1.attention.qkv.weight"),
            r"blocks.1.attention.qkv.weight is missing: JetFormer .*\[32, 16\]",
        ),
        (6, lambda s: s.pop("flow.couplings.2.permutation"), r"flow.couplings.2.permutation is missing: .*\[48\]"),
        (
            6,
            lambda s: s.update({"flow.couplings.1.permutation": torch.zeros(16, dtype=torch.int64)}),
            "flow.couplings.1.permutation is not a permutation of 0 to 15",
        ),
        (
            6,
            lambda s: s.update({"flow.couplings.0.net.posemb": torch.zeros(1, 4, 8)}),
            r"flow.couplings.0.net.posemb .*\[1, 4, 8\].* JetFormer .*\[1, 16, 8\]",
        ),
        (6, lambda s: s.update({"text_norm.scale": torch.zeros(16)}), r"text_norm.scale .*JetFormer"),
        (5, lambda s: s.pop("transformer.0.norm1.scale"), r"transformer.0.norm1.scale is missing: .*\[16\]"),
        (
            5,
            lambda s: s.pop("adaptor.flow.couplings.0.permutation"),
            r"adaptor.flow.couplings.0.permutation is missing: .*\[48\]",
        ),
        (5, lambda s: s.update({"patch_pca.pca_proj": 2 * torch.eye(48)}), "patch_pca.pca_proj .*identity"),
        (5, lambda s: s.update({"patch_pca.pca_mean": torch.ones(48)}), "patch_pca.pca_mean .*identity"),
    ],
)
def test_tensors_of_formats_5_and_6_that_do_not_fit_are_named(version, change, message, tmp_path):
    content = torch.load(VERSIONED_PT[version], weights_only=True)
    change(content["model_state_dict"])
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        converted(jetformer_pytorch, jetformer_pytorch.read(str(tmp_path / "x.pt")))


def test_a_moving_average_of_format_5_is_noted(tmp_path):
    content = torch.load(VERSIONED_PT[5], weights_only=True)
    content["ema_state_dict"] = {"shadow": {}}
    torch.save(content, tmp_path / "x.pt")
    weights = jetformer_pytorch.read(str(tmp_path / "x.pt"))
    assert weights.ema is None
    (note,) = weights.notes
    assert "ema_state_dict" in note
    check_versioned(converted(jetformer_pytorch, weights))


# ml-tarflow.


def write_tarflow(path, name, **changes):
    """Writes a golden state dict as train.py does; a tensor that is None is left out."""
    tensors = Golden(DIRECTORY / f"{name}.npz").tensors("params")
    num_tokens = len(tensors["var"])
    masks = {name.replace("pos_embed", "attn_mask") for name in tensors if name.endswith(".pos_embed")}
    tensors |= dict.fromkeys(masks, torch.ones(num_tokens, num_tokens).tril()) | changes
    torch.save({name: x for name, x in tensors.items() if x is not None}, path)
    return path


def check_tarflow(model, name):
    """The model computes what ml-tarflow does: latents, images and bits per dim."""
    file = Golden(DIRECTORY / f"{name}.npz")
    x, expected = tarflow_images(file), file.tensors("out")
    context, without_dropped = None, None
    if file.config["num_classes"]:
        labels, with_dropped = (file.tensors("in")[key] for key in ("label", "label_with_dropped"))
        without_dropped, context = model.context(labels), model.context(with_dropped, with_dropped < 0)
    patches = Patchify(model.image_shape, file.config["patch_size"], order="chw")
    with torch.no_grad():
        assert_output(patches(model(x, context)[0])[0], expected["z"])
        bits_per_dim, _ = JetObjective.score(model, x, context)["bits_per_dim"]
        assert_output(model.inverse(patches.inverse(expected["z_labels"])[0], without_dropped)[0], x)
    # The unit of images was 1 / 128 there, and is 1 / 127.5 here.
    assert_output(bits_per_dim + np.log2(128 / 127.5), expected["bits_per_dim"])


@pytest.mark.parametrize("name", ["tarflow_unconditional", "tarflow_class_conditional"])
def test_ml_tarflow(name, tmp_path):
    weights = ml_tarflow.read(str(write_tarflow(tmp_path / "x.pth", name)))
    needs = {"TarFlow.num_heads"} | ({"Data.name"} if name == "tarflow_class_conditional" else set())
    assert weights.needs.keys() == needs
    (note,) = weights.notes
    assert "noise" in note
    model = converted(ml_tarflow, weights, *TARFLOW_BINDINGS)
    check_tarflow(model, name)
    if name == "tarflow_class_conditional":
        assert weights.needs["Data.name"] == "the images of its 5 classes"


def published(num_tokens, dim, width, num_labels=0, **changes):
    """The shapes of a published TarFlow of 8 blocks, each of 8 layers, without values."""
    layer = {
        **{"attention.norm.weight": (width,), "attention.qkv.weight": (3 * width, width), "mlp.norm.weight": (width,)},
        **{"attention.proj.weight": (width, width), "mlp.main.0.weight": (4 * width, width)},
        **{"mlp.main.2.weight": (width, 4 * width)},
    }
    block = {"pos_embed": (num_tokens, width), "proj_in.weight": (width, dim), "proj_out.weight": (2 * dim, width)}
    block |= {f"attn_blocks.{j}.{name}": shape for j in range(8) for name, shape in layer.items()}
    block |= {"class_embed": (num_labels, 1, width)} if num_labels else {}
    tensors = {f"blocks.{i}.{k}": torch.empty(v, device="meta") for i in range(8) for k, v in block.items()}
    return tensors | {"var": torch.ones(num_tokens, dim)} | changes


@pytest.mark.parametrize(
    ("shapes", "model", "size", "num_heads", "data", "count"),
    [
        ((1024, 12, 768), "TarFlow", 64, 12, "downsampled_imagenet/64x64", 460e6),
        ((256, 48, 1024, 1000), "LabelledFlow", 64, 16, "imagenet2012", 820e6),
        ((1024, 192, 768, 3), "LabelledFlow", 256, 12, "folder:/data/afhq", 463e6),
    ],
)
def test_published_tarflows(shapes, model, size, num_heads, data, count):
    """Their shapes determine all but the images of labels that are not ImageNet's."""
    weights = ml_tarflow.experiment(published(*shapes), "x", step=7)
    assert weights.needs.keys() == ({"Data.name"} if shapes[3:] == (3,) else set())
    flow = parsed(weights, *('Data.name = "folder:/data/afhq"' for _ in weights.needs))
    assert type(flow).__name__ == model
    assert flow.image_shape == (size, size, 3)
    assert gin.query_parameter("TarFlow.num_heads") == num_heads
    assert any(note.startswith(f"TarFlow.num_heads = {num_heads}, ") for note in weights.notes)
    assert gin.query_parameter("Data.name") == data
    assert sum(p.numel() for p in flow.parameters()) == pytest.approx(count, rel=0.03)


def test_hyperparameters_that_ml_tarflow_weights_do_not_determine():
    weights = ml_tarflow.experiment(published(250, 16, 96), "x")
    assert weights.needs.keys() == {"TarFlow.num_heads", "TarFlow.ps", "TarFlow.input_shape"}
    assert "16" in weights.needs["TarFlow.ps"]
    assert "250" in weights.needs["TarFlow.input_shape"]
    flow = parsed(weights, "TarFlow.num_heads = 3", "TarFlow.ps = 4", "TarFlow.input_shape = (40, 100, 1)")  # greyscale
    assert flow.patchify.num_tokens == 250


def test_variances_of_latents_are_noted(tmp_path):
    path = write_tarflow(tmp_path / "x.pth", "tarflow_unconditional", var=torch.full((16, 12), 2.0))
    assert any("var is ignored" in note for note in ml_tarflow.read(str(path)).notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.0.pos_embed": None}, "not a state dict of ml-tarflow: blocks.0.pos_embed .*missing"),
        ({"var": torch.zeros(1, 1, 1)}, r"not a state dict of ml-tarflow: var .*\[1, 1, 1\]"),
        ({"blocks.0.proj_out.weight": torch.zeros(12, 32)}, "--no-nvp"),
        ({"blocks.1.attn_mask": torch.ones(16, 16)}, "blocks.1.attn_mask .*triangle"),
        ({"blocks.0.attn_mask": torch.ones(16)}, "blocks.0.attn_mask .*triangle"),
        ({"blocks.1.pos_embed": None}, r"blocks.1.pos_embed is missing: TarFlow .*\[16, 32\]"),
        ({"blocks.1.class_embed": torch.zeros(5, 1, 32)}, r"blocks.1.class_embed .*TarFlow.*\[5, 1, 32\]"),
        (
            {"blocks.2.attn_blocks.1.mlp.main.2.bias": torch.zeros(8)},
            r"blocks.2.attn_blocks.1.mlp.main.2.bias .*\[8\].* TarFlow .*\[32\]",
        ),
    ],
)
def test_ml_tarflow_tensors_that_do_not_fit_are_named(changes, message, tmp_path):
    path = write_tarflow(tmp_path / "x.pth", "tarflow_unconditional", **changes)
    with pytest.raises(ValueError, match=message) as error:
        converted(ml_tarflow, ml_tarflow.read(str(path)), *TARFLOW_BINDINGS)
    assert "\n" not in str(error.value)


def test_files_beside_those_of_ml_tarflow_are_named(tmp_path):
    """Those of its optimizer, and weights of other formats; weights with labels need a TarFlow."""
    torch.save({"optimizer": {"state": {}}, "lr_schedule": {"counter": torch.zeros(())}}, tmp_path / "opt.pth")
    with pytest.raises(ValueError, match=r"opt.pth is not a state dict"):
        ml_tarflow.read(str(tmp_path / "opt.pth"))
    torch.save(Golden(DIRECTORY / "convert_jet_pytorch.npz").tensors("params"), tmp_path / "jet.pth")
    with pytest.raises(ValueError, match=r"jet.pth is not a state dict of ml-tarflow: "):
        ml_tarflow.read(str(tmp_path / "jet.pth"))
    weights = ml_tarflow.read(str(write_tarflow(tmp_path / "x.pth", "tarflow_class_conditional")))
    jet = ("LabelledFlow.flow = @Jet", "Jet.input_shape = (8, 8, 3)", "Jet.ps = 2", "LabelledFlow.context_dim = 4")
    with pytest.raises(ValueError, match=r"LabelledFlow.flow = @TarFlow, not a Jet"):
        converted(ml_tarflow, weights, *TARFLOW_BINDINGS, *jet)


# big_vision's files.


def jet_params():
    file = Golden(DIRECTORY / "jet_mixed.npz")
    return file.numpy("params"), jet_from_config(file.config, file.numpy("in")["x"].shape[1:])


def same(state, expected):
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/"])
def test_npz(prefix, tmp_path):
    """Parameters alone, or in a training state of either version."""
    params, model = jet_params()
    rest = {"params/": {"opt/0/mu/x": np.zeros(3)}, "opt/target/": {"opt/state/step": np.array(7)}}.get(prefix, {})
    np.savez(tmp_path / "x.npz", **{f"{prefix}{k}": v for k, v in params.items()}, **rest)
    weights = big_vision.read(str(tmp_path / "x.npz"))
    table, unused = big_vision.table(model, weights)
    same(assemble(table, weights.tensors, "Jet", unused), from_big_vision(params, model, partial=False))


def test_bfloat16_in_npz(tmp_path):
    """numpy stores bfloat16 as two bytes of an unknown type."""
    numbers = torch.tensor([1.5, -2.0, 3e38, 0.0])
    np.savez(tmp_path / "x.npz", a=numbers.bfloat16().view(torch.uint16).numpy().view("V2"))
    assert torch.equal(big_vision.read(str(tmp_path / "x.npz")).tensors["a"], numbers.bfloat16().float())


def test_arrays_that_are_not_numbers_are_named(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros(2), note=np.array("text"))
    with pytest.raises(ValueError, match="note holds <U4"):
        big_vision.read(str(tmp_path / "x.npz"))


def write_bv(directory, arrays):
    """Writes arrays as big_vision's `tssave`: a Zarr array for each name, with ~ for /."""
    tensorstore = pytest.importorskip("tensorstore")
    for name, array in arrays.items():
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{directory}/{name.replace('/', '~')}/"},
            "metadata": {"compressor": {"id": "zstd"}, "chunks": [max(1, (n + 1) // 2) for n in array.shape]},
        }
        store = tensorstore.open(spec, create=True, open=True, dtype=array.dtype, shape=array.shape).result()
        store.write(array).result()


def test_bv(tmp_path):
    """The directory of a step, or the prefix with a file that names the last step."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    params, model = jet_params()
    state = {f"params/{k}": v for k, v in params.items()} | {"opt/0/count": np.array(3), "opt/0/mu/x": np.ones(4)}
    name = "params/couplings/dnn/posemb"
    state[name] = state[name].astype(ml_dtypes.bfloat16)
    write_bv(tmp_path / "checkpoint.bv-000012345", state)
    (tmp_path / "checkpoint.bv-LAST").write_text("000012345\n")
    expected = from_big_vision(params | {name[7:]: state[name].astype(np.float32)}, model, partial=False)
    for path in ("checkpoint.bv", "checkpoint.bv-000012345", "checkpoint.bv-000012345/"):
        weights = big_vision.read(str(tmp_path / path))
        assert weights.step == 12345
        table, unused = big_vision.table(model, weights)
        same(assemble(table, weights.tensors, "Jet", unused), expected)
    shutil.rmtree(tmp_path / "checkpoint.bv-000012345" / "params~couplings~dnn~posemb")
    (tmp_path / "checkpoint.bv-000012345" / "params~couplings~dnn~posemb").mkdir()
    with pytest.raises(ValueError, match="params~couplings~dnn~posemb cannot be read"):
        big_vision.read(str(tmp_path / "checkpoint.bv"))


def test_a_pca_of_patches_comes_from_its_file(tmp_path):
    file = Golden(DIRECTORY / "patch_pca_whiten.npz")
    params = file.numpy("params")
    np.savez(tmp_path / "pca.npz", **params, n_samples_seen_=np.array(3))
    shape, size = file.numpy("in")["x"].shape[1:], file.config["patch_size"]
    path = str(tmp_path / "pca.npz")
    pca = PatchPCA(tuple(shape), size, whiten=file.config["whiten"])
    np.savez(tmp_path / "alone.npz", **params)
    weights = big_vision.read(str(tmp_path / "alone.npz"))
    table, unused = big_vision.table(pca, weights)
    state = assemble(table, weights.tensors, "PatchPCA", unused)
    model = JetFormer(
        tuple(shape),
        lambda s: PatchPCA(s, size, path=path),
        lambda: Decoder(width=16, depth=1, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8),
        **{"vocab_size": 13, "bos_id": 10, "boi_id": 11, "nolabel_id": 12},
    )
    weights = Weights({})
    table, unused = big_vision.table(model, weights)
    found = assemble(table, weights.tensors, "JetFormer", unused, partial=True)
    same(found, {f"patches.{name}": value for name, value in state.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("EmbedImage/bias"), r"EmbedImage/bias is missing: JetFormer .*\[32\]"),
        (
            lambda p: p.update({"decoder/layers/mlp/linear": p["decoder/layers/mlp/linear"][:1]}),
            r"decoder/layers/1/mlp/linear is missing: JetFormer .*\[64, 32\]",
        ),
        (
            lambda p: p.update({"LogitsImage/kernel": np.zeros((32, 67))}),
            r"LogitsImage/kernel .*\[32, 67\].* JetFormer .*\[32, 68\]",
        ),
        (
            lambda p: p.update({"params_adaptor/couplings/dnn/posemb": np.zeros((3, 1, 16, 16))}),
            r"params_adaptor/couplings/2/dnn/posemb .* JetFormer.*\[1, 16, 16\]",
        ),
    ],
)
def test_big_vision_parameters_that_do_not_fit_are_named(change, message):
    file = Golden(DIRECTORY / "objective_class_conditional.npz")
    model, _, _ = objective_inputs(file)
    params = file.numpy("params")
    change(params)
    with pytest.raises(ValueError, match=message):
        from_big_vision(params, model, partial=False)


# Nothing is unpickled.


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return pathlib.Path.touch, (self.marker,)


def test_nothing_is_unpickled(tmp_path):
    marker = tmp_path / "marker"
    bomb = Malicious(marker)
    torch.save({"model": {"a": torch.zeros(1)}, "opt": bomb}, tmp_path / "new.pt")
    torch.save({"model_state_dict": bomb}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(bomb, protocol=2))
    np.savez(tmp_path / "x.npz", a=np.array([bomb], dtype=object))
    np.save(tmp_path / "y.npy", np.array([bomb], dtype=object), allow_pickle=True)
    (tmp_path / "y.npy").rename(tmp_path / "y.npz")
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(bomb, protocol=2))
    for name in ("new.pt", "old.pt", "plain.pt"):
        for read in (jet_pytorch.read, jetformer_pytorch.read, ml_tarflow.read):
            with pytest.raises(ValueError, match=rf"{name} is not loaded: .*more than tensors") as error:
                read(str(tmp_path / name))
            assert "\n" not in str(error.value)
    for name in ("x.npz", "y.npz", "plain.npz"):
        with pytest.raises(ValueError, match=rf"{name} is not an .npz of arrays, or damaged") as error:
            big_vision.read(str(tmp_path / name))
        assert "\n" not in str(error.value)
    (tmp_path / "x.yaml").write_text(f"a: !!python/object/apply:pathlib.Path.touch [{marker}]")
    with pytest.raises(ValueError, match=r"x.yaml is not YAML"):
        jetformer_pytorch.read(str(JETFORMER_PT), str(tmp_path / "x.yaml"))
    assert not marker.exists()
    pickle.loads(pickle.dumps(bomb))  # the file would appear
    assert marker.exists()


def test_damaged_files_are_named(tmp_path, jet_file):
    (tmp_path / "x.safetensors").write_bytes(jet_file.read_bytes()[:-100])
    (tmp_path / "x.pt").write_bytes(JETFORMER_PT.read_bytes()[:-1000])
    (tmp_path / "x.npz").write_bytes((DIRECTORY / "jet_mixed.npz").read_bytes()[:-1000])
    for name, read in (("x.safetensors", jet_pytorch.read), ("x.pt", jet_pytorch.read), ("x.npz", big_vision.read)):
        with pytest.raises(ValueError, match=rf"{name} is .*, or damaged"):
            read(str(tmp_path / name))
        with pytest.raises((ValueError, OSError), match=f"no_{name}"):
            read(str(tmp_path / f"no_{name}"))


# Numerics of other implementations are arguments.


def test_numerics_are_part_of_the_architecture():
    gin.clear_config()
    reference = config.architecture()
    names = ("Jet.gelu", "Jet.norm_eps", "Decoder.gelu", "Decoder.activated", "Patchify.order")
    assert [reference[name] for name in names] == ["'tanh'", "1e-06", "'tanh'", "'gate'", "'hwc'"]
    gin.parse_config('Jet.gelu = "exact"')
    assert config.architecture()["Jet.gelu"] == "'exact'"


def test_the_other_branch_of_the_gated_mlp():
    """Activating it equals exchanging the weights of both branches."""
    gate, up = (GatedMlp(8, 16, "tanh", activated) for activated in ("gate", "up"))
    init_weights(gate, torch.Generator().manual_seed(0))
    state = gate.state_dict()
    up.load_state_dict(state | {"gate_up.weight": state["gate_up.weight"].roll(16, 0)})
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(up(x), gate(x))
    with pytest.raises(ValueError, match=r"'both' .*gate or up"):
        GatedMlp(8, 16, "tanh", "both")
    with pytest.raises(ValueError, match=r"'erf'.*tanh or exact"):
        Decoder(width=8, depth=1, mlp_dim=8, num_heads=1, num_kv_heads=1, head_dim=8, gelu="erf")


def test_patches_channel_by_channel():
    """As `torch.nn.functional.unfold` makes them, and back."""
    x = torch.randn(2, 6, 4, 3)
    patches = Patchify((6, 4, 3), 2, order="chw")
    tokens, _ = patches(x)
    assert torch.equal(tokens, F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2))
    assert torch.equal(patches.inverse(tokens)[0], x)
    with pytest.raises(ValueError, match=r"'cwh' .*hwc or chw"):
        Patchify((6, 4, 3), 2, order="cwh")


# Sharing.


def shared(tmp_path, **options):
    model = small_model().float()
    tensors = {"model": model.state_dict(), "ema": {name: 2 * p.detach() for name, p in model.named_parameters()}}
    card = sharing.card(
        model,
        name="run",
        config_text="train.seed = 3\n",
        step=12,
        metrics={"val/bits_per_dim": 3.25},
        dataset="imagenet_resized/64x64",
        texts=False,
        ema=True,
        **options,
    )
    files = {"config.gin": b"train.seed = 3\n", "tokenizer.model": TOKENIZER.read_bytes()}
    sharing.write(UPath(tmp_path / "shared"), tensors, step=12, files=files, card=card)
    return model, tensors, tmp_path / "shared"


def test_safetensors_there_and_back(tmp_path):
    model, tensors, directory = shared(tmp_path)
    weights = sharing.read(UPath(directory))
    assert (weights.step, weights.gin, weights.tokenizer) == (12, "train.seed = 3\n", TOKENIZER.read_bytes())
    table, unused = sharing.table(model, weights)
    same(assemble(table, weights.tensors, "JetFormer", unused), tensors["model"])
    same(dict(weights.ema), tensors["ema"])
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model.safetensors: .*--to=safetensors"):
        sharing.read(UPath(directory))


@pytest.mark.parametrize(
    ("names", "says", "command"),
    [
        (("cat", "a dog", "emu"), "0 cat, 1 a dog, 2 emu", "--classes=cat,emu "),
        (tuple(f"kind{i}" for i in range(1000)), "99 kind99, … (all 1,000", "--classes=kind0,kind1 "),
        (tuple("0123"), None, "--classes=0,1 "),
        (None, None, "--classes=0,1 "),
    ],
)
def test_classes_of_a_card(tmp_path, names, says, command):
    text = (shared(tmp_path, names=names)[2] / "README.md").read_text()
    assert ("## Classes" in text) == (says is not None)
    assert (says or "") in text
    assert command in text


def test_metrics_of_a_card(tmp_path):
    """Those of its step, without values that are not finite."""
    (tmp_path / "eval_val").mkdir()
    lines = ('{"step": 4, "val/x": 1.0}', '{"step": 8, "seconds": 2.0, "val/x": 0.5, "val/y": null}')
    (tmp_path / "eval_val" / "results.jsonl").write_text("\n".join(lines))
    assert sharing.evaluations(UPath(tmp_path), 8) == {"val/x": 0.5}


def test_the_model_card(tmp_path):
    """The Hub reads its header; its commands are those of this project."""
    model, _, directory = shared(tmp_path, repo="people/run", license="mit")
    text = (directory / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    header = yaml.safe_load(header)
    assert header["license"] == "mit"
    assert header["pipeline_tag"] == "unconditional-image-generation"
    assert "jetformer" in header["tags"]
    (result,) = header["model-index"][0]["results"]
    assert result["dataset"] == {"name": "imagenet_resized/64x64", "type": "imagenet_resized_64x64"}
    assert result["metrics"] == [{"type": "bits_per_dim", "name": "val/bits_per_dim", "value": 3.25}]
    assert "| val/bits_per_dim | 3.25 |" in body
    assert "--from=safetensors --hf_repo=people/run --out=WORKDIR" in body
    assert "--classes=0,1" in body
    assert "train.seed = 3" in body
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in body
    huggingface_hub = pytest.importorskip("huggingface_hub")
    huggingface_hub.ModelCard(text)  # parses it as the Hub does
