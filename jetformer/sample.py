"""Sample from a trained model: images of classes or prompts, captions of images, completions of images, texts.

    python -m jetformer.sample --workdir=/tmp/digits --classes=3,7 --out=/tmp/samples
    python -m jetformer.sample --workdir=/tmp/shapes --prompt="a red circle" --guidance_weight=2 --out=/tmp/samples
    python -m jetformer.sample --workdir=/tmp/jet_digits --temperature=0.8 --out=/tmp/samples
    python -m jetformer.sample --workdir=/tmp/shapes --images='/tmp/samples/images/*' --task=caption --out=/tmp/texts

Writes PNGs, grid.png, index.html to browse them, and samples.jsonl: a line for each sample, with its prompt, seed,
settings and log-likelihood. Sample i of a prompt has the seed --seed + i and does not depend on other samples. Run
again with the same --out, it draws only the samples that are missing.

Several processes share the samples, each with the whole model on its device:

    torchrun --nproc-per-node=8 -m jetformer.sample --workdir=… --prompts=prompts.txt --out=/tmp/samples
"""

import dataclasses
import hashlib
import pathlib

from absl import flags, logging
from torch import nn
from upath import UPath

# None of these imports TensorFlow, before which `runtime.initialize` has to import torch_xla.
from jetformer import checkpoint, program, run_files, runtime
from jetformer.convert import hub
from jetformer.data.pictures import read_pictures
from jetformer.evaluators.samples import Samples
from jetformer.experiment import Experiment
from jetformer.models.jetformer import JetFormer
from jetformer.models.language_model import LanguageModel
from jetformer.sampling import images, texts
from jetformer.sampling.gallery import PAGE_FILE, Gallery
from jetformer.sampling.guidance import MODES, SCHEDULES, Guidance
from jetformer.sampling.sampler import Request, Sampler, draw, repeated
from jetformer.state import State, load

flags.adopt_module_key_flags(program)
flags.DEFINE_list(*program.TRUST_IMPORTS)
flags.DEFINE_string("workdir", None, "The workdir of a run.")
flags.DEFINE(
    program.StepParser(), "step", None, "Checkpoint of the workdir or repository: a step, or best; default: the newest."
)
flags.DEFINE_string("checkpoint", None, "Or a checkpoint in a run's workdir: …/checkpoints/000012000.")
flags.DEFINE_string("hf_repo", None, "Or a repository on the Hugging Face Hub that holds a workdir: owner/name.")
flags.DEFINE_string("hf_revision", None, "Branch, tag or commit of the repository.")
flags.DEFINE_list("classes", None, "Class labels, as 0,1,2.")
flags.DEFINE_multi_string("prompt", [], "What to draw, or the beginning of a text; may be repeated.")
flags.DEFINE_string("prompts", None, "File with a prompt on each line.")
flags.DEFINE_string("images", None, "Images to caption or complete: a path or a pattern, as '/data/*.png'.")
flags.DEFINE_enum(
    "task",
    None,
    ["caption", "complete"],
    "What to do with --images: write captions; or keep the first --rows of each image and sample the rest.",
)
flags.DEFINE_integer("rows", None, "Rows of pixels to keep of an image to complete; default: half of them.")
flags.DEFINE_integer(
    "num_images", None, "Samples of each class, prompt or image; default: 8, 1 with --images.", lower_bound=1
)
flags.DEFINE_integer("batch_size", 32, "Samples at a time, per process.", lower_bound=1)
flags.DEFINE_enum("guidance", None, MODES, "Classifier-free guidance; default: density with a --guidance_weight.")
flags.DEFINE_float("guidance_weight", 0.0, "Weight w of guidance, which samples from p(x | y)^(1+w) / p(x)^w.")
flags.DEFINE_enum("guidance_schedule", "constant", SCHEDULES, "Guidance weight over the tokens of an image.")
flags.DEFINE_float(
    "temperature",
    1.0,
    "Multiplies the scales of the mixtures of image tokens, or the latents of a flow; divides the logits of texts.",
)
flags.DEFINE_float("temperature_probs", 1.0, "Multiplies the log-weights of the mixtures of image tokens.")
flags.DEFINE_integer("top_k", None, "Texts: number of most probable tokens to choose from.")
flags.DEFINE_float("top_p", 1.0, "Texts: choose from the most probable tokens with at least this probability.")
flags.DEFINE_integer("seed", 0, "Seed of the first sample of each class, prompt or image.", lower_bound=0)
flags.DEFINE_bool("ema", True, "Use the moving average of the parameters if there is one.")
flags.DEFINE_string("out", None, "Local directory to write to.", required=True)
FLAGS = flags.FLAGS

# Flags that apply to some tasks only.
_FLAGS_OF = {
    "image": ("temperature_probs", "guidance", "guidance_weight", "guidance_schedule"),
    "complete": ("temperature_probs", "guidance", "guidance_weight", "guidance_schedule", "rows"),
    "caption": ("top_k", "top_p"),
    "text": ("top_k", "top_p"),
    "flow": (),
}


def source() -> tuple[UPath, int | str | None]:
    """Returns the workdir that the flags name, and the step: a number, "best", or None for the newest."""
    given = [name for name in ("workdir", "checkpoint", "hf_repo") if FLAGS[name].value is not None]
    if len(given) != 1:
        raise ValueError("expected one of --workdir, --checkpoint and --hf_repo")
    if FLAGS.hf_revision is not None and FLAGS.hf_repo is None:
        raise ValueError("--hf_revision needs --hf_repo")
    if FLAGS.hf_repo is not None:
        return hub.fetch_run(FLAGS.hf_repo, FLAGS.hf_revision, FLAGS.step), FLAGS.step
    if FLAGS.workdir is not None:
        return UPath(FLAGS.workdir), FLAGS.step
    workdir, step = checkpoint.split_path(FLAGS.checkpoint)
    if step is None or FLAGS.step is not None:
        raise ValueError(f"--checkpoint={FLAGS.checkpoint}: expected WORKDIR/checkpoints/NUMBER, and no --step")
    return workdir, step


def given_prompts() -> list[str]:
    """Returns all prompts of the flags, each once."""
    prompts = list(FLAGS.prompt)
    if FLAGS.prompts is not None:
        lines = UPath(FLAGS.prompts).read_text(encoding="utf-8").rstrip("\n").split("\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                raise ValueError(f"--prompts: {FLAGS.prompts}:{number} is an empty prompt")
        prompts += lines
    return list(dict.fromkeys(prompts))


def given_classes() -> list[int]:
    """Returns the classes of the flags."""
    for label in FLAGS.classes or ():
        if not label.strip().isdigit():
            raise ValueError(f"--classes: {label!r} is not a class; give numbers, as 0,1,2")
    return [int(label) for label in FLAGS.classes or ()]


def task_of(model: nn.Module) -> str:
    """Returns the task, one of `_FLAGS_OF`, and checks that the flags apply to it."""
    if (FLAGS.images is None) != (FLAGS.task is None):
        raise ValueError("--images and --task need each other: give both or neither")
    if isinstance(model, JetFormer):
        task = FLAGS.task or "image"
    elif FLAGS.images is not None:
        raise ValueError(f"--images does not apply to a {type(model).__name__}, only to a JetFormer")
    else:
        task = "text" if isinstance(model, LanguageModel) else "flow"
    for name in dict.fromkeys(name for names in _FLAGS_OF.values() for name in names):
        if FLAGS[name].present and name not in _FLAGS_OF[task]:
            raise ValueError(f"--{name} does not apply to this task ({task})")
    for name, tasks in (("classes", ("image", "complete", "flow")), ("prompt", ("image", "complete", "text"))):
        if (FLAGS[name].value or (name == "prompt" and FLAGS.prompts)) and task not in tasks:
            raise ValueError(f"--{name} does not apply to this task ({task})")
    return task


def prepare(
    task: str, experiment: Experiment, state: State, workdir: UPath
) -> tuple[Sampler, list[Request], dict[str, str], list[str]]:
    """Prepares a task.

    Returns:
      The sampler; a request for each class, prompt or image; further settings of all samples; the paths of images that
      cannot be read.
    """
    model, prompts, classes = state.model, given_prompts(), given_classes()
    options = {"temperature": FLAGS.temperature, "compile": state.loop.compile}
    given, unreadable = {}, []
    if FLAGS.images is not None:
        given, unreadable = read_pictures(FLAGS.images, model.image_shape, experiment.data.background())
    if task == "flow":
        sampler = images.FlowSampler(model, **options)
        requests = images.class_requests(experiment, model, classes) if classes else [Request("sample")]
        return sampler, requests, {}, unreadable
    if task in ("caption", "text"):
        tokenizing = run_files.texts(experiment, workdir)
        requests, num_tokens = [Request(path, image=image) for path, image in given.items()], None
        if task == "text":
            requests, num_tokens = texts.continuation_requests(tokenizing, prompts or [""])  # "" for a whole text
        options |= {"num_tokens": num_tokens, "top_k": FLAGS.top_k, "top_p": FLAGS.top_p}
        return texts.TextSampler(experiment, model, tokenizing, **options), requests, {}, unreadable

    mode = FLAGS.guidance or ("density" if FLAGS.guidance_weight else "none")
    guidance = Guidance(mode, FLAGS.guidance_weight, FLAGS.guidance_schedule)
    options |= {"guidance": guidance, "temperature_probs": FLAGS.temperature_probs}
    if task == "complete":
        options["rows"] = model.image_shape[0] // 2 if FLAGS.rows is None else FLAGS.rows
    sampler = images.ImageSampler(experiment, model, **options)
    if task == "image" and not classes and not prompts:  # those of the experiment's own samples
        own = next((e for e in experiment.evaluators.values() if isinstance(e, Samples)), None)
        if own is None:
            raise ValueError("nothing to sample: give --classes, --prompt, --prompts or --images")
        classes, prompts = list(range(own.num_classes or 0)), list(own.prompts or ())
    requests = images.class_requests(experiment, model, classes)
    if prompts:
        requests += texts.prompt_requests(run_files.texts(experiment, workdir), prompts)
    if task == "image":
        return sampler, requests, {}, unreadable
    if len(requests) != 1:
        raise ValueError(f"--task=complete needs one --prompt or one of --classes for all images, not {len(requests)}")
    (shown,) = requests
    requests = [dataclasses.replace(shown, label=path, image=image) for path, image in given.items()]
    return sampler, requests, {"prompt": shown.label}, unreadable


def identity(request: Request) -> dict[str, str]:
    """Returns what tells apart images with the same path."""
    return {} if request.image is None else {"image_sha256": hashlib.sha256(request.image.tobytes()).hexdigest()}


def sample(experiment: Experiment, state: State, step: int, workdir: UPath, machine: runtime.Runtime) -> None:
    """Draws the samples that the flags ask for and that --out lacks; process 0 writes them.

    Raises:
      ValueError: for flags that do not fit the model; for images that cannot be read, after all others are done.
    """
    task, out = task_of(state.model), pathlib.Path(FLAGS.out)
    sampler, requests, more, unreadable = prepare(task, experiment, state, workdir)
    settings = {"task": task, "run": str(workdir), "step": step, "ema": state.ema is not None and FLAGS.ema}
    settings |= sampler.settings | more
    count = FLAGS.num_images or (1 if FLAGS.images is not None else 8)
    wanted = repeated(requests, count, FLAGS.seed)
    gallery = None

    def open_gallery() -> list[int]:
        nonlocal gallery
        gallery = Gallery(out, settings, key="prompt" if FLAGS.images is None else "image")
        has = lambda request: gallery.has(request.label, request.seed, **identity(request))
        return [i for i, request in enumerate(wanted) if not has(request)]

    lacking = [wanted[i] for i in machine.on_first(open_gallery)]
    if len(lacking) < len(wanted):
        logging.info("%d of %d samples exist already", len(wanted) - len(lacking), len(wanted))
    options = {"batch_size": FLAGS.batch_size, "ema": FLAGS.ema, "progress": True}
    for samples in draw(sampler, lacking, state, machine, **options):
        if gallery is not None:
            for request, drawn in samples:
                gallery.add(request.label, request.seed, **identity(request), **drawn)
    if gallery is not None and gallery.records:
        gallery.finish()
        logging.info("%d samples in %s: open %s", len(gallery.records), out, out / PAGE_FILE)
    if unreadable:
        total, paths = len(unreadable) + len(requests), ", ".join(unreadable)
        raise ValueError(f"{len(unreadable)} of {total} images could not be read: {paths}; the others are done")


def main() -> None:
    machine = runtime.initialize(FLAGS.device)
    if machine.process_index > 0:  # process 0 logs
        logging.set_verbosity(logging.ERROR)
    if machine.process_count > 1 and machine.device.type == "xla":
        raise ValueError("jetformer.sample with --device=xla runs in one process: start it on one host")
    if "://" in FLAGS.out:
        raise ValueError(f"--out={FLAGS.out}: expected a local directory")
    workdir, step = source()
    # Each process loads and runs the whole model, so that none waits for another within a batch.
    alone = machine if machine.process_count == 1 else runtime.Runtime(machine.device)
    experiment, state, step = load(
        workdir, FLAGS.gin_file, FLAGS.gin_bindings, alone, step, FLAGS.trust_imports, FLAGS.verify
    )
    sample(experiment, state, step, workdir, machine)


if __name__ == "__main__":
    program.run(main, verbose=True)
