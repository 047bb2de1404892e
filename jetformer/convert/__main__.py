"""Convert public weights to a run's workdir, which the other programs take, and runs to safetensors.

    python -m jetformer.convert --from=big_vision --path=jet.npz --gin_file=experiments/imagenet64.gin --out=/tmp/jet
    python -m jetformer.convert --from=jet_pytorch --hf_repo=btrude/jet_imagenet64x64_200m --out=/tmp/jet64
    python -m jetformer.convert --from=jetformer_pytorch --hf_repo=mojique/jetformer-cifar10 --out=/tmp/cifar10
    python -m jetformer.convert --from=ml_tarflow --path=imagenet64_model_2_768_8_8_0.05.pth --out=/tmp/tarflow64
    python -m jetformer.convert --to=safetensors --workdir=/tmp/digits --out=/tmp/shared --push_to=owner/name
    python -m jetformer.convert --from=safetensors --hf_repo=owner/name --out=/tmp/digits_again

The workdir holds the experiment (config.gin) and one checkpoint. Hyperparameters that the weights do not determine must
be given by --gin_bindings. These and --gin_file override the experiment: --gin_bindings='Data.name = "…"' sets the
images to evaluate on. Tensors and plain values are unpickled, and nothing else.
"""

import tempfile
from types import ModuleType

import gin
from absl import flags, logging
from torch import Tensor, nn
from upath import UPath

from jetformer import checkpoint, class_names, config, program, run_files, runtime
from jetformer.convert import big_vision, hub, jet_pytorch, jetformer_pytorch, ml_tarflow, sharing, sources
from jetformer.convert.weights import Weights
from jetformer.experiment import Experiment
from jetformer.state import load

flags.adopt_module_key_flags(program)
flags.DEFINE_list(*program.TRUST_IMPORTS)
flags.DEFINE_string(
    "from", None, "Format of the weights: big_vision, jet_pytorch, jetformer_pytorch, ml_tarflow or safetensors."
)
flags.DEFINE_string("to", None, "Format to convert the run in --workdir to: safetensors.")
flags.DEFINE_string("path", None, "File or directory of the weights.")
flags.DEFINE_string("hf_repo", None, "Or a repository of the weights on the Hugging Face Hub: owner/name.")
flags.DEFINE_string("hf_file", None, "File of the repository; default: the only one of the format.")
flags.DEFINE_string("hf_revision", None, "Branch, tag or commit of the repository.")
flags.DEFINE_string("yaml", None, "With --from=jetformer_pytorch: YAML, with --hf_repo a file of the repository.")
flags.DEFINE(
    program.StepParser(),
    "step",
    None,
    "Number of training steps of the weights; with --to the checkpoint: a step, or best; default: the newest.",
)
flags.DEFINE_string("workdir", None, "With --to: the workdir of the run.")
flags.DEFINE_string("out", None, "Where to write: a workdir; with --to a local directory.")
flags.DEFINE_string("push_to", None, "With --to: a repository on the Hugging Face Hub to upload to: owner/name.")
flags.DEFINE_bool("private", False, "Make a new repository of --push_to private.")
flags.DEFINE_string("license", None, "With --to: license of the weights, as the Hub names it: mit, apache-2.0, …")
FLAGS = flags.FLAGS

FORMATS: dict[str, ModuleType] = {
    "big_vision": big_vision,
    "jet_pytorch": jet_pytorch,
    "jetformer_pytorch": jetformer_pytorch,
    "ml_tarflow": ml_tarflow,
    "safetensors": sharing,
}
# Flags that do not apply to a format of --from, or to --to.
_USELESS = {
    "big_vision": ("yaml", "workdir", "push_to", "private", "license"),
    "jet_pytorch": ("yaml", "workdir", "push_to", "private", "license"),
    "jetformer_pytorch": ("workdir", "push_to", "private", "license"),
    "ml_tarflow": ("yaml", "workdir", "push_to", "private", "license"),
    "safetensors": ("yaml", "hf_file", "workdir", "push_to", "private", "license"),
    "to": ("path", "hf_repo", "hf_file", "hf_revision", "yaml"),
}


def check_flags() -> str | None:
    """Checks the flags before any work is done.

    Returns:
      The format of --from; None with --to.

    Raises:
      ValueError: if they do not go together.
    """
    source, target = FLAGS["from"].value, FLAGS.to
    if (source is None) == (target is None):
        raise ValueError(f"expected --from=FORMAT, one of {', '.join(FORMATS)}, or --to=safetensors")
    if source is not None and source not in FORMATS:
        raise ValueError(f"--from={source}: expected one of {', '.join(FORMATS)}")
    if target is not None and target != "safetensors":
        raise ValueError(f"--to={target}: expected safetensors")
    for name in _USELESS[source or "to"]:
        if FLAGS[name].present:
            raise ValueError(f"--{name} does not apply to --{'from' if source else 'to'}={source or target}")
    if source is not None:
        if (FLAGS.path is None) == (FLAGS.hf_repo is None):
            raise ValueError("expected the weights as either --path or --hf_repo")
        if FLAGS.hf_repo is None and (FLAGS.hf_file or FLAGS.hf_revision):
            raise ValueError("--hf_file and --hf_revision need --hf_repo")
        if FLAGS.out is None:
            raise ValueError("give --out, the workdir to write")
        if FLAGS.step == "best" or (FLAGS.step is not None and FLAGS.step < 0):
            raise ValueError(f"--step={FLAGS.step}: expected 0 or more")
    else:
        if FLAGS.workdir is None:
            raise ValueError("give --workdir, the run to convert")
        if FLAGS.out is None and FLAGS.push_to is None:
            raise ValueError("give --out, --push_to, or both")
        if FLAGS.out is not None and "://" in FLAGS.out:
            raise ValueError(f"--out={FLAGS.out}: expected a local directory")
    return source


def local(suffixes: tuple[str, ...]) -> str:
    """Returns the local path of the weights' file, downloaded with --hf_repo; `suffixes` as in `hub.fetch`."""
    if FLAGS.path is not None:
        return FLAGS.path
    return hub.fetch(FLAGS.hf_repo, FLAGS.hf_revision, FLAGS.hf_file, suffixes, "--hf_file")


def read(source: str) -> Weights:
    """Reads the weights."""
    if source == "big_vision":
        return big_vision.read(local((".npz",)))
    if source == "jet_pytorch":
        return jet_pytorch.read(local((".safetensors", ".pt")), FLAGS.step)
    if source == "ml_tarflow":
        return ml_tarflow.read(local((".pth",)), FLAGS.step)
    if source == "jetformer_pytorch":
        file, yaml = local((".pt",)), FLAGS.yaml
        if FLAGS.hf_repo is not None:
            yaml = hub.fetch(FLAGS.hf_repo, FLAGS.hf_revision, yaml, (".yaml", ".yml"), "--yaml")
        return jetformer_pytorch.read(file, yaml, FLAGS.step)
    if FLAGS.hf_repo is not None:
        return sharing.read(hub.fetch_all(FLAGS.hf_repo, FLAGS.hf_revision, sharing.PATTERNS))
    return sharing.read(UPath(FLAGS.path))


def parse(weights: Weights) -> None:
    """Parses the experiment: that of the weights, with --gin_file and --gin_bindings on top."""
    if weights.gin is None and not FLAGS.gin_file:
        raise ValueError("the weights do not determine the model: give its experiment with --gin_file")
    config.parse(FLAGS.gin_file, FLAGS.gin_bindings, saved=weights.gin, trust_imports=FLAGS.trust_imports)
    for name, what in weights.needs.items():
        model, _, argument = name.partition(".")
        if argument not in gin.get_bindings(model):
            raise ValueError(f"the weights do not determine {what}: give --gin_bindings='{name} = …'")
    ema_decay = gin.get_bindings("train").get("ema_decay", 0.0)
    with gin.unlock_config():
        if weights.ema is None and ema_decay:
            logging.info("train.ema_decay is set to 0: the weights have no moving average")
            gin.bind_parameter("train.ema_decay", 0.0)
        elif weights.ema is not None and not ema_decay:
            gin.bind_parameter("train.ema_decay", 0.999)


def state_dicts(source: str, weights: Weights, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors of a checkpoint, see `sources.state_dicts`."""
    module, kind = FORMATS[source], type(model).__name__
    if not isinstance(model, module.MODELS):
        models = " or ".join(m.__name__ for m in module.MODELS)
        raise ValueError(f"--from={source} needs a {models}, but train.model is a {kind}")
    table, unused = module.table(model, weights)
    return sources.state_dicts(table, unused, weights, model, source)


def to_workdir(source: str) -> None:
    """Converts weights to a workdir."""
    workdir = UPath(FLAGS.out)
    if (workdir / config.CONFIG_FILE).exists() or checkpoint.steps(workdir):
        raise ValueError(f"--out={workdir} holds a run already: give another directory")
    weights = read(source)
    parse(weights)
    experiment = config.call(Experiment)
    model = experiment.check_model()
    states = state_dicts(source, weights, model)
    tokenizer = weights.tokenizer
    if tokenizer is None and experiment.data.has_texts():
        tokenizer = experiment.data.texts().tokenizer.serialized()

    step = next((step for step in (FLAGS.step, weights.step) if step is not None), 1)
    checkpointer = checkpoint.Checkpointer(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    config.save(workdir)
    if tokenizer is not None:
        (workdir / run_files.TOKENIZER_FILE).write_bytes(tokenizer)
    if weights.class_names is not None:
        class_names.save(workdir, weights.class_names)
    checkpointer.save(step, states, info={"architecture": config.architecture()})
    checkpointer.wait()
    for note in weights.notes:
        logging.warning("%s", note)
    logging.info(
        "%s: a %s of %d parameters%s, step %d",
        workdir,
        type(model).__name__,
        sum(p.numel() for p in model.parameters()),
        ", with moving average" if "ema" in states else "",
        step,
    )


def to_safetensors(machine: runtime.Runtime) -> None:
    """Converts a run to safetensors with a model card, and uploads it."""
    workdir = UPath(FLAGS.workdir)
    if FLAGS.out is not None and UPath(FLAGS.out).exists() and any(UPath(FLAGS.out).iterdir()):
        raise ValueError(f"--out={FLAGS.out} is not empty: give another directory")
    experiment, state, step = load(
        workdir, FLAGS.gin_file, FLAGS.gin_bindings, machine, FLAGS.step, FLAGS.trust_imports, FLAGS.verify
    )
    tensors = {name: {k: v.detach() for k, v in part.items()} for name, part in state.tensors().items()}
    names = (config.CONFIG_FILE, class_names.CLASSES_FILE)
    files = {name: (workdir / name).read_bytes() for name in names if (workdir / name).exists()}
    if (tokenizer := sharing.tokenizer_of(workdir)) is not None:
        files[run_files.TOKENIZER_FILE] = tokenizer
    card = sharing.card(
        state.model,
        name=(FLAGS.push_to or workdir.name).rpartition("/")[2],
        config_text=files[config.CONFIG_FILE].decode(),
        step=step,
        metrics=sharing.evaluations(workdir, step),
        dataset=", ".join(data.name for data in getattr(experiment.data, "datasets", (experiment.data,))),
        texts=experiment.data.has_texts(),
        ema=state.ema is not None,
        names=class_names.saved(workdir),
        repo=FLAGS.push_to,
        license=FLAGS.license,
    )
    with tempfile.TemporaryDirectory() as temporary:
        directory = UPath(FLAGS.out or temporary)
        sharing.write(directory, tensors, step=step, files=files, card=card)
        if FLAGS.out is not None:
            logging.info("%s: step %d as safetensors", directory, step)
        if FLAGS.push_to is not None:
            hub.push(directory, FLAGS.push_to, f"Step {step}", FLAGS.private)
            logging.info("Uploaded to %s", FLAGS.push_to)


def main() -> None:
    source = check_flags()
    machine = runtime.initialize("cpu")
    if machine.process_count > 1:
        raise ValueError("jetformer.convert runs in one process: start it with python, on one host")
    if source is not None:
        to_workdir(source)
    else:
        to_safetensors(machine)


if __name__ == "__main__":
    program.run(main, verbose=True)
