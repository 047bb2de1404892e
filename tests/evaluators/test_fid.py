"""FID and related metrics equal torch-fidelity's, for any batches and processes; extractors load and refuse files."""

import dataclasses
import sys
import threading
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neural_network import MLPClassifier
from upath import UPath

from jetformer import config, prng
from jetformer.data.dataset import Data
from jetformer.evaluators import features, fid
from jetformer.evaluators.context import Context, prepare
from jetformer.evaluators.features import ClassifierFeatures, InceptionFeatures
from jetformer.evaluators.fid import METRICS, Fid
from jetformer.experiment import Experiment
from jetformer.loops.base import Runner
from jetformer.models.labelled import LabelledFlow
from jetformer.runtime import Runtime, derive_seed
from jetformer.sampling.guidance import Guidance
from jetformer.sampling.images import sample_flow
from jetformer.state import build, evaluator_context, make_loop
from runs import bindings, untrained

CPU = Runtime(torch.device("cpu"))


@pytest.fixture(autouse=True)
def no_split_read_before(monkeypatch):
    monkeypatch.setattr(fid, "read_splits", {})


@pytest.fixture(scope="module")
def torch_fidelity():
    try:
        return features.torch_fidelity()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def make_context(data_dir, tmp_path_factory):
    """Makes contexts of an untrained run of digits.gin."""

    def make(runtime=CPU, **overrides):
        config.parse(["experiments/digits.gin"], bindings(data_dir, **overrides))
        run = config.call(Experiment)
        prepare(run.data, CPU)
        state = build(run, make_loop(run, runtime))
        return evaluator_context(run, state, 7, "fid", UPath(tmp_path_factory.mktemp("run")))

    return make


@pytest.fixture
def separate_config():
    """Lets a test parse another experiment than that of `context`."""
    with config.separate():
        yield


@pytest.fixture(scope="module")
def context(make_context):
    return make_context()


@pytest.fixture(scope="module")
def classifier(context, tmp_path_factory):
    """A trained classifier with few features."""
    extractor = ClassifierFeatures(hidden_dim=8, path=str(tmp_path_factory.mktemp("classifier") / "small.npz"))
    extractor.load(context)
    return extractor


def gaussian_features(count, seed, size=12):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, size)) @ rng.normal(size=(size, size)) + seed).astype(np.float32)


class Images(torch.utils.data.Dataset):
    """Images uint8 `[N, C, H, W]` for torch-fidelity."""

    def __init__(self, images):
        self._images = torch.tensor(images)

    def __len__(self):
        return len(self._images)

    def __getitem__(self, i):
        return self._images[i]


# ---- Metrics. ------------------------------------------------------------------------------------


def test_the_distance_of_two_gaussians(torch_fidelity):
    ours = {"mu": np.array([1.0, 2.0, 0.0]), "sigma": np.diag([1.0, 4.0, 0.0])}
    theirs = {"mu": np.array([0.0, 2.0, 2.0]), "sigma": np.diag([9.0, 1.0, 0.25])}
    assert fid.frechet_distance(ours, theirs) == pytest.approx((1 + 4) + (2**2 + 1**2 + 0.5**2))
    assert fid.frechet_distance(ours, ours) == pytest.approx(0, abs=1e-12)


def test_metrics_equal_torch_fidelitys(torch_fidelity):
    """Compares with its `calculate_metrics`, with an extractor that takes pixels as features."""

    class Passing(torch_fidelity.FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)

        def forward(self, images):
            return tuple(images.flatten(1)[:, :12].float() / 16 for _ in self.features_list)

        get_provided_features_list = staticmethod(lambda: ("all",))
        get_default_feature_layer_for_metric = staticmethod(lambda metric: "all")
        can_be_compiled = staticmethod(lambda: False)

    torch_fidelity.register_feature_extractor("passing", Passing)
    rng = np.random.default_rng(0)
    made, real = (rng.integers(0, high, (count, 3, 2, 2), np.uint8) for high, count in ((256, 60), (200, 50)))
    expected = torch_fidelity.calculate_metrics(
        input1=Images(made),
        input2=Images(real),
        feature_extractor="passing",
        kid_subset_size=50,
        batch_size=16,
        **dict.fromkeys(("isc", "fid", "kid", "prc"), True),
        **dict.fromkeys(("cuda", "cache", "verbose"), False),
    )
    ours, theirs = (x.reshape(len(x), -1).astype(np.float32) / 16 for x in (made, real))
    distance = fid.frechet_distance(fid.statistics(ours), fid.statistics(theirs))
    assert distance == pytest.approx(expected["frechet_inception_distance"], rel=1e-5)
    assert fid.inception_score(ours) == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert fid.kernel_distance(ours, theirs) == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    assert fid.precision_and_recall(ours, theirs) == {name: expected[name] for name in ("precision", "recall")}


def test_statistics_are_in_float64(torch_fidelity):
    found = fid.statistics(gaussian_features(500, 3) + 1000)
    assert found["mu"].dtype == found["sigma"].dtype == np.float64
    x = (gaussian_features(500, 3) + 1000).astype(np.float64)
    np.testing.assert_allclose(found["mu"], x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found["sigma"], (x - x.mean(0)).T @ (x - x.mean(0)) / 499, rtol=1e-9)


def test_precision_and_recall_are_not_swapped(torch_fidelity):
    real = np.concatenate([gaussian_features(50, 1), 1000 + gaussian_features(50, 2)])
    found = fid.precision_and_recall(real[:50] + 0.001, real)
    assert found["precision"] == 1
    assert found["recall"] <= 0.55  # half of the real images are far from all generated ones


# ---- The evaluator. ------------------------------------------------------------------------------


def test_metrics_do_not_depend_on_batches(torch_fidelity, context, make_context, classifier):
    evaluator = Fid(num_images=50, metrics=METRICS, features=classifier)
    evaluator.check(context)
    figures = evaluator(context).scalars
    assert set(figures) == {"frechet_distance", *METRICS} - {"fid"}
    assert np.isfinite(list(figures.values())).all()
    fid.read_splits.clear()
    other = dataclasses.replace(evaluator, batch_size=7)(make_context(train__eval_batch_size=40))
    assert other.scalars == pytest.approx(figures, rel=1e-3)


def test_real_images_are_read_once(torch_fidelity, context, classifier, monkeypatch):
    """For all steps and evaluators of the same split."""
    splits, batches = [], Context.batches
    monkeypatch.setattr(Context, "batches", lambda self, *args: splits.append(args[1]) or batches(self, *args))
    evaluator = Fid(num_images=10, metrics=("fid", "kid"), features=classifier, split="validation[:20]")
    first = evaluator(context).scalars
    assert evaluator(context).scalars == first
    assert dataclasses.replace(evaluator, split="validation[20:40]")(context).scalars != first
    assert splits == ["validation[:20]", "validation[20:40]"]


@dataclasses.dataclass(frozen=True, eq=False)
class InThread(Runtime):
    """Threads of this process in the place of processes."""

    values: list = dataclasses.field(default_factory=list)
    barrier: threading.Barrier | None = None

    def all_gather(self, value):
        self.values[self.process_index] = value
        self.barrier.wait(timeout=300)
        values = list(self.values)
        self.barrier.wait(timeout=300)
        return values


@pytest.mark.slow
def test_metrics_do_not_depend_on_processes(torch_fidelity, context, make_context, classifier):
    evaluator = Fid(num_images=45, split="validation[:35]", metrics=METRICS, features=classifier, keep_images=True)
    expected = evaluator(context).scalars
    values, barrier = [None, None], threading.Barrier(2)
    directory = UPath("memory://two_processes/eval_fid")
    contexts = [
        dataclasses.replace(
            make_context(InThread(CPU.device, i, 2, 2, values=values, barrier=barrier)), directory=directory
        )
        for i in range(2)
    ]
    found = [None, None]

    def evaluate(i):
        try:
            found[i] = evaluator(contexts[i]).scalars
        finally:
            if found[i] is None:
                barrier.abort()

    threads = [threading.Thread(target=evaluate, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == pytest.approx(expected, rel=1e-3)
    # Each has written the images that it has generated.
    for of in (context.directory, directory):
        written = sorted(path.name for path in (of / "images" / "000000007").iterdir())
        assert written == [f"{i:06d}.png" for i in range(45)]


def test_the_texts_of_the_split_are_repeated(context, classifier):
    """Replaces the model's images by real ones of the given class, which the classifier recognizes."""
    rows = context.first_examples(12, ("image", "text"), split="validation[:12]")
    evaluator = Fid(num_images=30, split="validation[:12]", metrics=("class_accuracy",), features=classifier)
    asked = []

    def function(context, **options):
        def sample(model, batch, keys):
            asked.append(batch["text"])
            same = (batch["text"] == torch.tensor(rows["text"]).T).int().argmax(1)
            return {"image": torch.tensor(rows["image"])[same]}

        return sample

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "sampling_function", function)
        figures = evaluator(context).scalars
    np.testing.assert_array_equal(np.concatenate(asked)[:30], np.tile(rows["text"], (3, 1))[:30])
    found = classifier.load(context)(rows["image"])
    assert figures["class_accuracy"] > 0.7
    assert fid.class_accuracy(found["logits"], rows["text"]) > 0.7


def test_class_accuracy_alone_needs_no_torch_fidelity(context, classifier, monkeypatch):
    def missing():
        raise ImportError

    monkeypatch.setattr(fid, "torch_fidelity", missing)
    evaluator = Fid(num_images=10, metrics=("class_accuracy",), features=classifier)
    evaluator.check(context)
    assert set(evaluator(context).scalars) == {"class_accuracy"}
    with pytest.raises(ImportError):
        dataclasses.replace(evaluator, metrics=("kid",)).check(context)


class ListingFeatures:
    """An extractor that notes which images are in a directory whenever it is called."""

    num_features, distance, knows_labels = 1, "distance", True

    def __init__(self, directory):
        self.directory, self.seen = directory, []

    def name(self, context):
        return "listing"

    def check(self, context):
        pass

    def load(self, context):
        return self.extract

    def extract(self, images):
        self.seen.append(sorted(path.name for path in self.directory.glob("*.png")))
        return {"features": np.zeros((len(images), 1), np.float32), "logits": np.zeros((len(images), 10), np.float32)}


def test_images_of_another_job_stay(context, tmp_path):
    """Two jobs that evaluate the same step write the same images. Images of an earlier, larger evaluation go."""
    context = dataclasses.replace(context, directory=UPath(tmp_path))
    extractor = ListingFeatures(tmp_path / "images" / "000000007")
    extractor.directory.mkdir(parents=True)
    for number in (13, 30):
        (extractor.directory / f"{number:06d}.png").write_bytes(b"another job's")
    Fid(num_images=20, metrics=("class_accuracy",), features=extractor, keep_images=True, batch_size=10)(context)
    assert extractor.seen[-2] == [f"{i:06d}.png" for i in (*range(10), 13)]
    assert extractor.seen[-1] == [f"{i:06d}.png" for i in range(20)]


def test_saved_statistics(torch_fidelity, context, classifier, tmp_path):
    path = str(tmp_path / "deeper" / "real.npz")
    metrics = tuple(name for name in METRICS if name != "class_accuracy")
    evaluator = Fid(num_images=20, metrics=metrics, features=classifier, save_statistics=path)
    first = evaluator(context).scalars
    again = dataclasses.replace(evaluator, save_statistics=None, statistics=path)
    again.check(context)
    assert again(context).scalars == first
    assert [file.name for file in (tmp_path / "deeper").iterdir()] == ["real.npz"]
    other = dataclasses.replace(again, features=ClassifierFeatures(hidden_dim=8, max_epochs=3))
    with pytest.raises(ValueError, match=r"statistics of the features classifier_\w+, not of classifier_\w+"):
        other.check(context)


def test_statistics_as_adm_publishes_them(torch_fidelity, context, classifier, tmp_path):
    real = gaussian_features(100, 4, size=8)
    arrays = fid.statistics(real) | {"mu_s": np.zeros(5), "sigma_s": np.eye(5)}
    path = tmp_path / "adm.npz"
    # arr_0 of published files takes gigabytes and must not be read: here reading it would fail.
    np.savez(path, arr_0=np.array([None]), **arrays)
    evaluator = Fid(num_images=20, features=classifier, statistics=str(path), metrics=("fid", "inception_score"))
    evaluator.check(context)
    assert evaluator(context).scalars["frechet_distance"] > 0
    with pytest.raises(ValueError, match=r"only mu and sigma, and kid, recall need"):
        dataclasses.replace(evaluator, metrics=("fid", "kid", "recall")).check(context)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(8)}, r"not a file of statistics: give .* \(.*sigma"),
        ({"mu": np.zeros(9), "sigma": np.eye(9)}, r"give .* mu \[8\] and sigma \[8, 8\] \(its mu is float64 \[9\]\)"),
        ({"mu": np.zeros(8), "sigma": np.zeros(8)}, r"\(its sigma is float64 \[8\]\)"),
        ({"mu": np.zeros(8), "sigma": np.full((8, 8), np.nan)}, r"not a file of statistics"),
        ({"mu": np.array([None] * 8), "sigma": np.eye(8)}, r"not a file of statistics.*allow_pickle"),
        ({"mu": np.zeros(8), "sigma": np.eye(8), "features": np.zeros((3, 8))}, r"of fewer than 10 images"),
        (b"mu and sigma", r"not a file of statistics"),
        (b"", r"not a file of statistics"),
        (None, r"cannot be read: .*No such file"),
    ],
)
def test_unfit_statistics(torch_fidelity, context, classifier, tmp_path, arrays, message):
    path = tmp_path / "unfit.npz"
    if isinstance(arrays, dict):
        np.savez(path, **arrays)
    elif arrays is not None:
        path.write_bytes(arrays)
    evaluator = Fid(num_images=20, features=classifier, metrics=("fid",), statistics=str(path))
    with pytest.raises(ValueError, match=message) as raised:
        evaluator.check(context)
    assert "\n" not in str(raised.value)


def test_one_array_is_not_a_file_of_statistics(torch_fidelity, context, classifier, tmp_path):
    np.save(tmp_path / "mu.npy", np.zeros(8))
    evaluator = Fid(num_images=20, features=classifier, metrics=("fid",), statistics=str(tmp_path / "mu.npy"))
    with pytest.raises(ValueError, match=r"not a file of statistics.*holds one array"):
        evaluator.check(context)


@pytest.mark.parametrize("gin_file", ["jet_digits.gin", "tarflow_digits_noisy.gin"])
def test_images_of_a_flow_alone(torch_fidelity, separate_config, data_dir, tmp_path, gin_file):
    """Their features are those of the sampler's images, of the labels if it has some; any batch size gives the same."""
    small = {"train__noise_scale": 0.0, "train__evaluators": "{}", "TarFlow__depth": 2}
    context = untrained(tmp_path, data_dir, f"experiments/{gin_file}", **small)
    labelled = isinstance(context.model, LabelledFlow)
    arguments = {"features": ClassifierFeatures(hidden_dim=8, path=str(tmp_path / "classifier.npz")), "num_images": 12}
    arguments |= {"split": "validation[:12]", "temperature_scales": 0.8, "keep_images": True}
    if labelled:
        arguments |= {"guidance": Guidance("interp", 1.0), "denoise": True}
    evaluator = Fid(**arguments)
    evaluator.check(context)
    scalars = evaluator(context).scalars
    assert set(scalars) == {"frechet_distance", *["class_accuracy"] * labelled}
    for name, value in Fid(**arguments, batch_size=5)(context).scalars.items():
        assert value == pytest.approx(scalars[name], rel=1e-4)
    labels = None
    if labelled:
        labels = torch.from_numpy(context.first_examples(12, ("label",))["label"]).long()
    keys = prng.example_keys(derive_seed(context.seed, 6), torch.arange(12, dtype=torch.int32))
    options = {"guidance": Guidance("interp", 1.0), "noise_std": 0.1} if labelled else {}
    with context.averaged():
        expected, _ = sample_flow(context.model, keys, labels, temperature=0.8, **options)
    for i, image in enumerate(expected):
        with Image.open(context.directory / "images" / f"{context.step:09d}" / f"{i:06d}.png") as kept:
            assert np.abs(np.asarray(kept).astype(int) - image[..., 0].numpy()).max() <= 1


def test_what_does_not_fit_a_flow_alone(torch_fidelity, separate_config, data_dir, tmp_path):
    context = untrained(
        tmp_path, data_dir, "experiments/jet_digits.gin", train__noise_scale=0.0, train__evaluators="{}"
    )
    classifier = ClassifierFeatures(hidden_dim=8, path=str(tmp_path / "classifier.npz"))
    for arguments, message in (
        ({"guidance": Guidance("interp", 1.0)}, "LabelledFlow of a TarFlow"),
        ({"denoise": True}, "noise_std is 0"),
        ({"temperature_probs": 0.5}, "temperature_probs"),
        ({"metrics": ("class_accuracy",)}, "class_accuracy needs classes"),
    ):
        with pytest.raises(ValueError, match=message):
            Fid(features=classifier, **arguments).check(context)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": "fid"}, r"Fid\.metrics = 'fid': give a tuple of names"),
        ({"metrics": ()}, r"Fid\.metrics = \(\): give a tuple of names"),
        ({"num_images": 9}, "num_images = 9: give 10 or more"),
        ({"features": InceptionFeatures}, r"Fid\.features is a class: write @InceptionFeatures\(\)"),
        ({"statistics": "a", "save_statistics": "b"}, "not both"),
    ],
)
def test_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Fid(**arguments)


def test_check_finds_unsuitable_runs(torch_fidelity, context, classifier):
    flow = dataclasses.replace(context, runner=Runner(torch.nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="Fid needs a model of images, not a Linear"):
        Fid().check(flow)
    with pytest.raises(ValueError, match=r"class_accuracy needs .* InceptionFeatures is not: .*@ClassifierFeatures"):
        Fid(metrics=("fid", "class_accuracy")).check(context)
    with pytest.raises(ValueError, match=r"there is no 'fib'; .* fid, inception_score, kid"):
        Fid(metrics=("fid", "fib")).check(context)  # and not before: the job's other evaluators still run
    data = Data(name="digits", pp="decode(channels=1) | caption('some.model', 8)")
    texts = dataclasses.replace(context, data=data)
    with pytest.raises(ValueError, match="class_accuracy needs classes"):
        Fid(metrics=("class_accuracy",), features=classifier).check(texts)
    assert Fid(features=classifier).metrics_of(texts) == ("fid",)
    with pytest.raises(ValueError, match=r"split 'validation\[:5\]' has fewer than 10 images"):
        Fid(features=classifier, split="validation[:5]").check(context)
    undropped = dataclasses.replace(context.objective, drop_labels_prob=0.0)
    unguided = dataclasses.replace(context, objective=undropped)
    with pytest.raises(ValueError, match=r"drop_labels_prob is 0"):
        Fid(features=classifier, guidance=Guidance("density", 1.0)).check(unguided)


@pytest.mark.slow
def test_in_training(torch_fidelity, make_context, data_dir):
    """Configured by gin."""
    context = make_context(
        train__evaluators='{"fid": @Fid()}',
        Fid__num_images=12,
        Fid__features="@ClassifierFeatures()",
        Fid__metrics=None,
        Fid__every_steps=5,
        ClassifierFeatures__hidden_dim=4,
    )
    evaluator = config.call(Experiment).evaluators["fid"]
    evaluator.check(context)
    assert set(evaluator(context).scalars) == {"frechet_distance", "class_accuracy"}


# ---- torch-fidelity. -----------------------------------------------------------------------------


def test_without_torch_fidelity(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"torch-fidelity: pip install -e '\.\[fid\]'"):
        features.torch_fidelity()


def test_a_torchvision_that_does_not_fit(monkeypatch, tmp_path):
    (tmp_path / "torch_fidelity.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_fidelity", raising=False)
    monkeypatch.setattr(features.importlib.metadata, "version", lambda name: "0.99")
    with pytest.raises(ImportError, match=r"torchvision 0\.99 does not fit torch .*: install both from one index"):
        features.torch_fidelity()


# ---- Inception. ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception_weights(torch_fidelity, tmp_path_factory):
    """A file of random weights, of torch-fidelity's format."""

    class Random(torch_fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, weights):
            del weights

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    weights = Random("random", ["2048"], str(path)).state_dict()
    for name in weights:
        if name.endswith("conv.weight"):  # so large that images differ in their features
            weights[name] *= 6**0.5
    torch.save(weights, path)
    return str(path)


@pytest.mark.slow
def test_inception_equals_torch_fidelitys(torch_fidelity, inception_weights, context):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    extract = InceptionFeatures(weights_path=inception_weights).load(context)
    found = extract(images)
    network = torch_fidelity.FeatureExtractorInceptionV3("same", ["2048", "logits_unbiased"], inception_weights)
    expected = network(torch.tensor(images).permute(0, 3, 1, 2))
    for name, values in zip(("features", "logits"), expected, strict=True):
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], values.numpy(), rtol=1e-4, atol=1e-5)
    assert found["features"].std(0).max() > 0
    grey = images[:, :, :, :1]
    np.testing.assert_array_equal(extract(grey)["features"], extract(grey.repeat(3, -1))["features"])
    assert extract(images[:0])["features"].shape == (0, 2048)


@pytest.mark.slow
def test_kept_images_have_the_same_metrics(torch_fidelity, inception_weights, make_context):
    """By torch-fidelity's own program: generated images from their directory, real ones from the dataset."""
    metrics = ("kid", "precision", "recall")  # with random weights all images have one class
    evaluator = Fid(
        num_images=11,
        split="validation[:10]",
        metrics=metrics,
        features=InceptionFeatures(weights_path=inception_weights),
        keep_images=True,
    )
    context = make_context()
    directory = context.directory / "images" / "000000007"
    directory.mkdir(parents=True)
    (directory / "000000011.png").write_bytes(b"of an earlier evaluation")
    evaluator.check(context)
    figures = evaluator(context).scalars
    assert sorted(path.name for path in directory.iterdir()) == [f"{i:06d}.png" for i in range(11)]
    assert Image.open(directory / "000010.png").size == (8, 8)
    real = context.first_examples(10, ("image",))["image"].repeat(3, -1)
    expected = torch_fidelity.calculate_metrics(
        input1=str(directory),
        input2=Images(real.transpose(0, 3, 1, 2)),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=inception_weights,
        kid_subset_size=10,
        **dict.fromkeys(("kid", "prc"), True),
        **dict.fromkeys(("cuda", "cache", "verbose"), False),
    )
    assert figures["kid"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3, abs=1e-6)
    assert {name: figures[name] for name in ("precision", "recall")} == {
        name: pytest.approx(expected[name]) for name in ("precision", "recall")
    }


class Unpickled:
    """Fails the test when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("a file of weights was unpickled",)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, "is not available .*No such file"),
        (b"weights", "not a file of weights"),
        (b"", "not a file of weights"),
        ({"fc.weight": Unpickled()}, "not a file of weights"),
        ({"fc.weight": torch.zeros(1)}, "weights of another network than Inception"),
        (torch.zeros(1), "not a file of weights"),
    ],
)
def test_unfit_weights(torch_fidelity, context, tmp_path, weights, message):
    path = tmp_path / "weights.pth"
    if isinstance(weights, bytes):
        path.write_bytes(weights)
    elif weights is not None:
        torch.save(weights, path)
    evaluator = Fid(features=InceptionFeatures(weights_path=str(path)))
    with pytest.raises(
        ValueError, match=message + r".*: download https://github\.com/toshas/\S+\.pth and set"
    ) as raised:
        evaluator.check(context)
    assert str(path) in str(raised.value)


def test_weights_that_cannot_be_downloaded(torch_fidelity, context, monkeypatch):
    asked = {}

    def fetch(url, **options):
        asked.update(options, url=url)
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    with pytest.raises(ValueError, match=r"weights of Inception is not available \(.*no route.*\): download https://"):
        Fid().check(context)
    assert asked["weights_only"]
    assert asked["check_hash"]


# ---- The classifier. -----------------------------------------------------------------------------


def test_the_classifier_knows_digits_and_is_trained_once(context, monkeypatch, data_dir):
    extractor = ClassifierFeatures()
    extractor.check(context)
    extract = extractor.load(context)
    (kept,) = (data_dir / "digits" / "1.0.0").glob(f"{extractor.name(context)}.npz")
    assert not list(kept.parent.glob(".*"))
    with np.load(kept, allow_pickle=False) as arrays:
        assert arrays["hidden_weights"].shape == (64, 64)
    (batch,) = context.data.eval_batches(
        batch_size=225, split="validation", pp="decode(channels=1) | keep('image', 'label')"
    )
    found = extract(batch["image"])
    assert found["features"].shape == (225, 64)
    assert found["features"].dtype == found["logits"].dtype == np.float32
    assert fid.class_accuracy(found["logits"], batch["label"][:, None]) > 0.9

    monkeypatch.setattr(MLPClassifier, "fit", lambda *args: pytest.fail("it is trained again"))
    again = ClassifierFeatures().load(context)(batch["image"])
    np.testing.assert_array_equal(again["features"], found["features"])
    assert extract(batch["image"][:0])["features"].shape == (0, 64)


class OddAndEven(Data):
    """Digits of two classes."""

    def eval_batches(self, **options):
        for batch in super().eval_batches(**options):
            yield batch | {"label": batch["label"] % 2}


def with_data(context, **changes):
    return dataclasses.replace(context, data=dataclasses.replace(context.data, **changes))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(("data_class", "num_classes"), [(Data, 10), (OddAndEven, 2)])
def test_the_classifier_equals_scikit_learns(context, tmp_path, data_class, num_classes):
    """With two classes scikit-learn has one logit, from which we make two."""
    data = data_class(**dataclasses.asdict(context.data))
    extractor = ClassifierFeatures(hidden_dim=5, max_epochs=20, path=str(tmp_path / "own.npz"))
    pp = "decode(channels=1) | keep('image', 'label')"
    (batch,) = data.eval_batches(batch_size=1347, split="train", pp=pp)
    found = extractor.load(dataclasses.replace(context, data=data))(batch["image"])
    pixels = (batch["image"].reshape(1347, -1) / 255).astype(np.float32)
    theirs = MLPClassifier((5,), max_iter=20, random_state=0).fit(pixels, batch["label"])
    assert found["logits"].shape == (1347, num_classes)
    probabilities = torch.tensor(found["logits"]).softmax(1).numpy()
    np.testing.assert_allclose(probabilities, theirs.predict_proba(pixels), atol=1e-5)
    assert found["features"].min() == 0


@pytest.mark.parametrize(
    ("pp", "message"),
    [
        ("decode(channels=1) | keep('image')", r"of which .* leaves image uint8 \[8, 8, 1\]"),
        ("decode(channels=3) | keep('image', 'label')", r"image uint8 \[8, 8, 3\], label int64 \[\]"),
        ("decode(channels=1) | keep('image', 'name')", r"the example has no 'name', it has"),
    ],
)
def test_unsuitable_data_for_a_classifier(context, pp, message):
    with pytest.raises(ValueError, match=message) as raised:
        ClassifierFeatures(pp=pp).check(context)
    assert "ClassifierFeatures cannot learn from 'digits'" in str(raised.value)
    assert "ClassifierFeatures.pp to leave an image [8, 8, 1]" in str(raised.value)


def test_classes_without_examples(context, tmp_path):
    with pytest.raises(
        ValueError, match=r"the labels in split 'train\[:3\]' of 'digits' are .*: ClassifierFeatures needs"
    ):
        ClassifierFeatures(path=str(tmp_path / "few.npz")).load(with_data(context, train_split="train[:3]"))
    assert not list(tmp_path.iterdir())


def test_files_of_another_classifier(context, classifier, tmp_path):
    other = dataclasses.replace(classifier, max_epochs=3)
    with pytest.raises(ValueError, match=r"small\.npz is a classifier for other data"):
        other.load(context)
    (tmp_path / "damaged.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"damaged\.npz is not a classifier of ClassifierFeatures"):
        ClassifierFeatures(path=str(tmp_path / "damaged.npz")).load(context)
