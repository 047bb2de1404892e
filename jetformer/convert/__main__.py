"""Convert public weights to a run's workdir, which the other programs take, and runs to safetensors.

    python -m jetformer.convert --from=big_vision --path=jet.npz --gin_file=experiments/imagenet64.gin --out=/tmp/jet
    python -m jetformer.convert --from=jet_pytorch --hf_repo=btrude/jet_imagenet64x64_200m --out=/tmp/jet64
    python -m jetformer.convert --from=jetformer_pytorch --hf_repo=mojique/jetformer-cifar10 --out=/tmp/cifar10
    python -m jetformer.convert --to=safetensors --workdir=/tmp/digits --out=/tmp/shared --push_to=owner/name
    python -m jetformer.convert --from=safetensors --hf_repo=owner/name --out=/tmp/digits_again

The workdir has the experiment (config.gin) and one checkpoint. What the weights do not tell is asked for, and given by
--gin_bindings; these and --gin_file come on top of the experiment, so that --gin_bindings='Data.name = "…"' says on
which images to evaluate. Nothing is unpickled but tensors and plain values.
"""

import tempfile

from absl import app, flags, logging
from upath import UPath

from jetformer import program, runtime

flags.adopt_module_key_flags(program)
flags.DEFINE_string("from", None, "What the weights are of: big_vision, jet_pytorch, jetformer_pytorch or safetensors.")
flags.DEFINE_string("to", None, "What to make of the run in --workdir: safetensors.")
flags.DEFINE_string("path", None, "The weights: a file or directory.")
flags.DEFINE_string("hf_repo", None, "Or a repository on the Hugging Face Hub that has them: owner/name.")
flags.DEFINE_string("hf_file", None, "Which of its files; default: the only one there is.")
flags.DEFINE_string("hf_revision", None, "A branch, tag or commit of the repository.")
flags.DEFINE_string("yaml", None, "With jetformer_pytorch: the YAML (a file of --hf_repo where that is given).")
flags.DEFINE(
    program.StepParser(),
    "step",
    None,
    "How many steps they were trained for; with --to which checkpoint, or best, default: the newest.",
)
flags.DEFINE_string("workdir", None, "With --to: the run's.")
flags.DEFINE_string("out", None, "Where to write: a workdir, or with --to a local directory.")
flags.DEFINE_string("push_to", None, "With --to: a repository on the Hugging Face Hub: owner/name.")
flags.DEFINE_bool("private", False, "Make the repository of --push_to a private one, if it is new.")
flags.DEFINE_string("license", None, "With --to: the license of the weights, as the Hub calls it: mit, apache-2.0, …")
FLAGS = flags.FLAGS

FORMATS = ("big_vision", "jet_pytorch", "jetformer_pytorch", "safetensors")
# What each direction and format has no use for.
_USELESS = {
    "big_vision": ("yaml", "workdir", "push_to", "private", "license"),
    "jet_pytorch": ("yaml", "workdir", "push_to", "private", "license"),
    "jetformer_pytorch": ("workdir", "push_to", "private", "license"),
    "safetensors": ("yaml", "hf_file", "workdir", "push_to", "private", "license"),
    "to": ("path", "hf_repo", "hf_file", "hf_revision", "yaml"),
}


def check_flags() -> str | None:
    """Looks at the flags before anything is done.

    Returns:
      The format of --from; None with --to.

    Raises:
      ValueError: if they do not go together.
    """
    source, target = FLAGS["from"].value, FLAGS.to
    if (source is None) == (target is None):
        raise ValueError(f"give --from=FORMAT, of {', '.join(FORMATS)}, or --to=safetensors")
    if source is not None and source not in FORMATS:
        raise ValueError(f"--from={source} is no format: give one of {', '.join(FORMATS)}")
    if target is not None and target != "safetensors":
        raise ValueError(f"--to={target} is no format: give safetensors")
    for name in _USELESS[source or "to"]:
        if FLAGS[name].present:
            raise ValueError(
                f"--{name} means nothing with --{'from' if source else 'to'}={source or target}: leave it out"
            )
    if source is not None:
        if (FLAGS.path is None) == (FLAGS.hf_repo is None):
            raise ValueError("give the weights with --path or --hf_repo")
        if FLAGS.hf_repo is None and (FLAGS.hf_file or FLAGS.hf_revision):
            raise ValueError("--hf_file and --hf_revision are of a --hf_repo")
        if FLAGS.out is None:
            raise ValueError("give --out, the workdir to write")
        if FLAGS.step == "best" or (FLAGS.step is not None and FLAGS.step < 0):
            raise ValueError(f"--step={FLAGS.step}: give 0 or more")
    else:
        if FLAGS.workdir is None:
            raise ValueError("give --workdir, the run to share")
        if FLAGS.out is None and FLAGS.push_to is None:
            raise ValueError("give --out, --push_to, or both")
        if FLAGS.out is not None and "://" in FLAGS.out:
            raise ValueError(f"--out={FLAGS.out}: give a local directory")
    return source


def local(suffixes: tuple[str, ...]) -> str:
    """The file of weights, downloaded if it has to be; `suffixes` as in `hub.fetch`."""
    from jetformer.convert import hub

    if FLAGS.path is not None:
        return FLAGS.path
    return hub.fetch(FLAGS.hf_repo, FLAGS.hf_revision, FLAGS.hf_file, suffixes, "--hf_file")


def read(source: str):
    """The weights as they are, `experiment.Weights`."""
    from jetformer.convert import big_vision, hub, jet_pytorch, jetformer_pytorch, sharing

    if source == "big_vision":
        return big_vision.read(local((".npz",)))
    if source == "jet_pytorch":
        return jet_pytorch.read(local((".safetensors", ".pt")), FLAGS.step)
    if source == "jetformer_pytorch":
        file, yaml = local((".pt",)), FLAGS.yaml
        if FLAGS.hf_repo is not None:
            yaml = hub.fetch(FLAGS.hf_repo, FLAGS.hf_revision, yaml, (".yaml", ".yml"), "--yaml")
        return jetformer_pytorch.read(file, yaml, FLAGS.step)
    if FLAGS.hf_repo is not None:
        return sharing.read(hub.fetch_all(FLAGS.hf_repo, FLAGS.hf_revision, sharing.PATTERNS))
    return sharing.read(UPath(FLAGS.path))


def parse(weights) -> None:
    """Parses the experiment: what came with the weights, with --gin_file and --gin_bindings on top."""
    import gin

    from jetformer import config

    gin_files = list(FLAGS.gin_file)
    with tempfile.NamedTemporaryFile("w", suffix=".gin") as own:  # gin reads local files
        if weights.gin is not None:
            config.check_runs_nothing(weights.gin, FLAGS.trust_imports)
            own.write(weights.gin)
            own.flush()
            gin_files.insert(0, own.name)
        elif not gin_files:
            raise ValueError("the weights do not tell the model: give its experiment with --gin_file")
        config.parse(gin_files, FLAGS.gin_bindings)
    for name, what in weights.needs.items():
        model, _, argument = name.partition(".")
        if argument not in gin.get_bindings(model):
            raise ValueError(f"the weights do not tell {what}: give --gin_bindings='{name} = …'")
    ema_decay = gin.get_bindings("train").get("ema_decay", 0.0)
    with gin.unlock_config():
        if weights.ema is None and ema_decay:
            logging.info("There is no moving average: train.ema_decay is 0")
            gin.bind_parameter("train.ema_decay", 0.0)
        elif weights.ema is not None and not ema_decay:
            gin.bind_parameter("train.ema_decay", 0.999)


def state_dicts(source: str, weights, model) -> dict[str, dict]:
    """The tensors of a checkpoint: those of the model, and of its moving average if there is one."""
    from jetformer.convert import big_vision, jet_pytorch, jetformer_pytorch, sharing
    from jetformer.convert.sources import assemble, fit

    modules = {
        "big_vision": big_vision,
        "jet_pytorch": jet_pytorch,
        "jetformer_pytorch": jetformer_pytorch,
        "safetensors": sharing,
    }
    module, kind = modules[source], type(model).__name__
    if not isinstance(model, module.MODELS):
        models = " or ".join(m.__name__ for m in module.MODELS)
        raise ValueError(f"--from={source} gives a {models}, and train.model is a {kind}")
    table, unused = module.table(model, weights)
    state = assemble(table, weights.tensors, kind, unused)
    states = {"model": fit(state, model.state_dict(), model, f"weights of {source}")}
    if weights.ema is not None:
        parameters = dict(model.named_parameters())
        table = {name: entry for name, entry in table.items() if name in parameters}
        average = assemble(table, weights.ema, f"the moving average of {kind}", unused)
        states["ema"] = fit(average, parameters, model, f"moving averages of {source}")
    return states


def to_workdir(source: str) -> None:
    """Converts weights to a workdir."""
    from jetformer import checkpoint, config
    from jetformer.experiment import Experiment
    from jetformer.run_files import TOKENIZER_FILE

    workdir = UPath(FLAGS.out)
    if (workdir / config.CONFIG_FILE).exists() or checkpoint.steps(workdir):
        raise ValueError(f"--out={workdir} holds a run already: give another directory")
    weights = read(source)
    parse(weights)
    run = config.call(Experiment)
    model = run.check_model()
    states = state_dicts(source, weights, model)
    tokenizer = weights.tokenizer
    if tokenizer is None and run.data.has_texts():
        tokenizer = run.data.texts().tokenizer.serialized()

    step = next((step for step in (FLAGS.step, weights.step) if step is not None), 1)
    checkpointer = checkpoint.Checkpointer(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    config.save(workdir)
    if tokenizer is not None:
        (workdir / TOKENIZER_FILE).write_bytes(tokenizer)
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
    """Writes a run as safetensors with a model card, and uploads it."""
    from jetformer import config
    from jetformer.convert import hub, sharing
    from jetformer.run_files import TOKENIZER_FILE
    from jetformer.state import load

    workdir = UPath(FLAGS.workdir)
    if FLAGS.out is not None and UPath(FLAGS.out).exists() and any(UPath(FLAGS.out).iterdir()):
        raise ValueError(f"--out={FLAGS.out} is not empty: give another directory")
    run, state, step = load(
        workdir, FLAGS.gin_file, FLAGS.gin_bindings, machine, FLAGS.step, FLAGS.trust_imports, FLAGS.verify
    )
    tensors = {name: {k: v.detach() for k, v in part.items()} for name, part in state.tensors().items()}
    names = (config.CONFIG_FILE, TOKENIZER_FILE)
    files = {name: (workdir / name).read_bytes() for name in names if (workdir / name).exists()}
    card = sharing.card(
        state.model,
        name=(FLAGS.push_to or workdir.name).rpartition("/")[2],
        config=files[config.CONFIG_FILE].decode(),
        step=step,
        metrics=sharing.evaluations(workdir, step),
        dataset=", ".join(data.name for data in getattr(run.data, "datasets", (run.data,))),
        texts=run.data.has_texts(),
        ema=state.ema is not None,
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


def main(argv: list[str]) -> None:
    program.no_arguments(argv)
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.INFO)
    with program.one_line_errors():
        source = check_flags()
        machine = runtime.initialize("cpu")
        if machine.process_count > 1:
            raise ValueError("jetformer.convert is one process: start it with python, on one host")
        if source is not None:
            to_workdir(source)
        else:
            to_safetensors(machine)


if __name__ == "__main__":
    app.run(main)
