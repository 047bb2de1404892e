"""Sample from a trained model: images of classes or prompts, captions of images, the rest of an image, texts.

    python -m jetformer.sample --workdir=/tmp/digits --classes=3,7 --out=/tmp/samples
    python -m jetformer.sample --workdir=/tmp/shapes --prompt="a red circle" --guidance_weight=2 --out=/tmp/samples
    python -m jetformer.sample --workdir=/tmp/jet_digits --temperature=0.8 --out=/tmp/samples
    python -m jetformer.sample --workdir=/tmp/shapes --images='/tmp/samples/images/*' --task=caption --out=/tmp/texts

Writes PNGs, a grid of them, a page to browse them (index.html) and samples.jsonl, where each line is an image with its
prompt, seed, settings and likelihood. Sample i of a prompt has the seed --seed + i, and is the same whatever is sampled
beside it. Started again with the same --out, it goes on with what is missing.

Several processes share the samples out, each with the whole model on its device:

    torchrun --nproc-per-node=8 -m jetformer.sample --workdir=… --prompts=prompts.txt --out=/tmp/samples
"""

import contextlib
import dataclasses
import hashlib
import itertools
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from absl import app, flags, logging
from upath import UPath

from jetformer import program, runtime
from jetformer.data.pictures import read_pictures

flags.adopt_module_key_flags(program)
flags.DEFINE_string("workdir", None, "A run's: its newest checkpoint, or that of --step.")
flags.DEFINE(
    program.StepParser(), "step", None, "Which checkpoint of the workdir or repository, or best; default: the newest."
)
flags.DEFINE_string("checkpoint", None, "A checkpoint of a run's workdir: …/checkpoints/000012000.")
flags.DEFINE_string("hf_repo", None, "A repository on the Hugging Face Hub that holds a run's workdir: owner/name.")
flags.DEFINE_string("hf_revision", None, "A branch, tag or commit of the repository.")
flags.DEFINE_list("classes", None, "Class labels, as 0,1,2.")
flags.DEFINE_multi_string("prompt", [], "What an image is to show; may be given several times.")
flags.DEFINE_string("prompts", None, "A file with a prompt on each line.")
flags.DEFINE_string("images", None, "Images to work on: a path or a pattern as '/data/*.png'.")
flags.DEFINE_enum(
    "task",
    None,
    ["caption", "complete"],
    "What to do with --images: write captions; or keep the first --rows of each, and sample the rest.",
)
flags.DEFINE_integer("rows", None, "How many rows of pixels of an image are given to complete; default: half of them.")
flags.DEFINE_integer(
    "num_images",
    None,
    "How many samples of each class, prompt or image; default: 8, 1 with --images.",
    lower_bound=1,
)
flags.DEFINE_integer("batch_size", 32, "How many samples at a time.", lower_bound=1)
flags.DEFINE_enum(
    "guidance", None, ["none", "density", "interp"], "How to guide; default: density if there is a --guidance_weight."
)
flags.DEFINE_float("guidance_weight", 0.0, "w of p(x | y)^(1+w) / p(x)^w.")
flags.DEFINE_enum(
    "guidance_schedule", "constant", ["constant", "linear", "cosine"], "The weight over an image's tokens."
)
flags.DEFINE_float(
    "temperature",
    1.0,
    "Multiplies the scales of image tokens' mixtures, or a flow's latents; divides a caption's logits.",
)
flags.DEFINE_float("temperature_probs", 1.0, "Multiplies the log-weights of image tokens' mixtures.")
flags.DEFINE_integer("top_k", None, "Captions: choose among so many of the most probable tokens.")
flags.DEFINE_float("top_p", 1.0, "Captions: choose among the most probable tokens of at least this probability.")
flags.DEFINE_integer("seed", 0, "Of each class's, prompt's or image's first sample; the others' follow.", lower_bound=0)
flags.DEFINE_bool("ema", True, "Use the moving average of the parameters, if there is one.")
flags.DEFINE_string("out", None, "A local directory to write to.", required=True)
FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Job:
    """One sample: of which class, prompt or image (its name); the seed; the text's tokens and the image, where it is
    given them."""

    label: str
    seed: int
    text: np.ndarray | None = None
    text_mask: np.ndarray | None = None
    image: np.ndarray | None = None

    def identity(self) -> dict[str, str]:
        """What tells images of one name apart."""
        return {} if self.image is None else {"image_sha256": hashlib.sha256(self.image.tobytes()).hexdigest()}


def source() -> tuple[UPath, int | str | None]:
    """The workdir that the flags name, and the step, or "best"; None for the newest."""
    given = [name for name in ("workdir", "checkpoint", "hf_repo") if FLAGS[name].value is not None]
    if len(given) != 1:
        raise ValueError("give one of --workdir, --checkpoint and --hf_repo")
    if FLAGS.hf_revision is not None and FLAGS.hf_repo is None:
        raise ValueError("--hf_revision is of a --hf_repo")
    if FLAGS.hf_repo is not None:
        return download(FLAGS.hf_repo, FLAGS.hf_revision, FLAGS.step), FLAGS.step
    if FLAGS.workdir is not None:
        return UPath(FLAGS.workdir), FLAGS.step
    directory = UPath(FLAGS.checkpoint.rstrip("/"))
    if not directory.name.isdigit() or directory.parent.name != "checkpoints" or FLAGS.step is not None:
        raise ValueError(
            f"--checkpoint={FLAGS.checkpoint}: give …/checkpoints/NUMBER of a run's workdir, and no --step"
        )
    return directory.parent.parent, int(directory.name)


def download(repo: str, revision: str | None, step: int | str | None) -> UPath:
    """The workdir that a repository holds: its configuration, its tokenizer, and the checkpoint of `step`, the "best"
    one, or the newest."""
    from huggingface_hub import HfApi

    from jetformer import checkpoint
    from jetformer.convert import hub

    if not isinstance(step, int):
        with hub.plain_errors(f"--hf_repo={repo}"):
            files = (file.split("/") for file in HfApi().list_repo_files(repo, revision=revision))
            steps = [int(f[1]) for f in files if len(f) == 3 and f[0] == "checkpoints" and f[2] == checkpoint.MARKER]
        order = sorted(steps, reverse=True)
        if step == "best":
            ranked = checkpoint.ranked(hub.fetch_all(repo, revision, [checkpoint.BEST_FILE]))
            order = [step for step in ranked if step in steps]
        step = next(iter(order), 0)
    return hub.fetch_all(repo, revision, ["*.gin", "*.model", checkpoint.BEST_FILE, f"checkpoints/{step:09d}/*"])


def given_prompts() -> list[str]:
    """All prompts of the flags, each once."""
    prompts = list(FLAGS.prompt)
    if FLAGS.prompts is not None:
        lines = UPath(FLAGS.prompts).read_text(encoding="utf-8").rstrip("\n").split("\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                raise ValueError(f"--prompts: {FLAGS.prompts}:{number} is an empty prompt")
        prompts += lines
    return list(dict.fromkeys(prompts))


def class_jobs(model, classes: list[str]) -> list[Job]:
    """A job for each class."""
    import torch

    from jetformer.sampling.grid import check_tokens

    jobs = []
    for label in classes:
        if not label.strip().isdigit():
            raise ValueError(f"--classes: {label!r} is no class; give numbers, as 0,1,2")
        text = np.array([int(label)])
        check_tokens(torch.from_numpy(text)[None], model)
        jobs.append(Job(f"class {int(label)}", FLAGS.seed, text))
    return jobs


def prompt_jobs(texts, prompts: list[str], whole: bool) -> list[Job]:
    """A job for each prompt: a whole text, or the beginning of one."""
    encoded = (texts.encode if whole else texts.encode_beginnings)(prompts)
    for prompt in prompts:
        if cut := texts.cut(prompt):
            logging.warning("The prompt %r is too long; cut off: %r", prompt, cut)
    rows = zip(prompts, encoded["text"], encoded["text_mask"], strict=True)
    return [Job(prompt, FLAGS.seed, text, mask) for prompt, text, mask in rows]


def tokenizing(run, workdir: UPath):
    """How the run tokenizes texts: its own copy of the tokenizer, wherever the original is."""
    from jetformer.run_files import TOKENIZER_FILE

    copy = workdir / TOKENIZER_FILE
    return run.data.texts(str(copy) if copy.exists() else None)


def batches(jobs: list[Job], size: int) -> list[list[Job]]:
    """Returns jobs in groups of `size`; the last may be smaller."""
    return [jobs[first : first + size] for first in range(0, len(jobs), size)]


def stacked(arrays: Iterable[np.ndarray | None], device):
    """Arrays as one tensor; None if they are None."""
    import torch

    arrays = list(arrays)
    return None if arrays[0] is None else torch.from_numpy(np.stack(arrays)).to(device)


class Images:
    """Images of classes or prompts; or, of images whose first rows are given, the rest."""

    def __init__(self, run, model, workdir: UPath, compile):
        from jetformer.evaluators.samples import Samples
        from jetformer.sampling import decode
        from jetformer.sampling.guidance import Guidance

        run.objective.check_order(text_first=True)
        self._compile = compile
        self._guidance = Guidance(
            FLAGS.guidance or ("density" if FLAGS.guidance_weight else "none"),
            FLAGS.guidance_weight,
            FLAGS.guidance_schedule,
        )
        self._guidance.check(model.image_head)
        run.objective.check_guidance(self._guidance.mode)
        self.settings = {
            "temperature": FLAGS.temperature,
            "temperature_probs": FLAGS.temperature_probs,
            "guidance": self._guidance.mode,
            "guidance_weight": self._guidance.weight,
            "guidance_schedule": self._guidance.schedule,
        }
        classes, prompts = FLAGS.classes, given_prompts()
        if classes is None and not prompts and FLAGS.images is None:  # the experiment's own picture
            own = next((e for e in run.evaluators.values() if isinstance(e, Samples)), None)
            if own is None:
                raise ValueError("nothing to sample: give --classes, --prompt, --prompts or --images")
            classes = None if own.num_classes is None else [str(c) for c in range(own.num_classes)]
            prompts = list(own.prompts or ())
        if classes is not None and run.data.has_texts():
            raise ValueError("the model reads texts, not classes: give --prompt or --prompts")
        self.jobs = class_jobs(model, classes or [])
        if prompts:
            self.jobs += prompt_jobs(tokenizing(run, workdir), prompts, whole=True)
        self.unreadable, self.num_tokens = [], model.num_image_tokens
        if FLAGS.images is not None:
            if len(self.jobs) != 1:
                raise ValueError(
                    "--task=complete: give one --prompt, or one of --classes, which says what the images show"
                )
            (shown,) = self.jobs
            self._rows = model.image_shape[0] // 2 if FLAGS.rows is None else FLAGS.rows
            self.settings |= {"rows": self._rows, "prompt": shown.label}
            images, self.unreadable = read_pictures(FLAGS.images, model.image_shape, run.data.background())
            self.jobs = [dataclasses.replace(shown, label=path, image=image) for path, image in images.items()]
            self.num_tokens -= self._rows // decode.rows_per_token(model) * model.patches.grid[1]

    def __call__(self, model, group: list[Job], keys, on_token) -> tuple[np.ndarray, list[dict[str, float]]]:
        from jetformer.sampling import decode

        options = {
            "text_mask": stacked((job.text_mask for job in group), keys.device),
            "guidance": self._guidance,
            "temperature_scales": FLAGS.temperature,
            "temperature_probs": FLAGS.temperature_probs,
            "compile": self._compile,
            "on_token": on_token,
        }
        text = stacked((job.text for job in group), keys.device)
        pictures = stacked((job.image for job in group), keys.device)
        if pictures is None:
            sampled, nats = decode.sample_images(model, text, keys, **options)
        else:
            sampled, nats = decode.complete_images(model, text, keys, pictures, self._rows, **options)
        scale = -1 / (math.prod(model.image_shape) * math.log(2))
        known = [{"log_likelihood": x, "bits_per_dim": x * scale} for x in nats.cpu().tolist()]
        return sampled.cpu().numpy(), known


class FlowImages:
    """Images of a flow alone; of a `LabelledFlow` also of classes."""

    def __init__(self, run, model, workdir: UPath, compile):
        from jetformer.models.labelled import LabelledFlow

        del run, workdir
        self._compile = compile
        self.settings = {"temperature": FLAGS.temperature}
        self.unreadable, self.num_tokens = [], 1
        if given_prompts() or FLAGS.images is not None:
            raise ValueError("a flow alone reads no texts and no images: leave out --prompt, --prompts and --images")
        if FLAGS.classes is None:
            self.jobs = [Job("sample", FLAGS.seed)]
            return
        if not isinstance(model, LabelledFlow):
            raise ValueError(f"a {type(model).__name__} knows no classes: leave out --classes")
        self.jobs = []
        for label in FLAGS.classes:
            if not label.strip().isdigit() or int(label) >= model.num_labels:
                raise ValueError(f"--classes: there is no class {label!r}, but those below {model.num_labels}")
            self.jobs.append(Job(f"class {int(label)}", FLAGS.seed, np.array(int(label))))

    def __call__(self, model, group: list[Job], keys, on_token) -> tuple[np.ndarray, list[dict[str, float]]]:
        import torch

        from jetformer import objectives, prng
        from jetformer.sampling.decode import to_uint8

        labels = stacked((job.text for job in group), keys.device)

        def draw():
            latents = prng.normal(keys, model.image_shape)
            context = None if labels is None else model.context(labels)
            image, logdet = model.inverse(latents * FLAGS.temperature, context)
            nats = -objectives.standard_normal_nll(latents * FLAGS.temperature) - logdet
            return to_uint8(image), nats - math.prod(model.image_shape) * math.log(127.5)

        with torch.no_grad():
            sampled, nats = self._compile(draw)()
        on_token()
        scale = -1 / (math.prod(model.image_shape) * math.log(2))
        known = [{"log_likelihood": x, "bits_per_dim": x * scale} for x in nats.cpu().tolist()]
        return sampled.cpu().numpy(), known


class Texts:
    """Texts: captions of images by a JetFormer, or by a language model how its prompts go on."""

    def __init__(self, run, model, workdir: UPath, compile):
        self._texts, self._compile = tokenizing(run, workdir), compile
        self.settings = {"temperature": FLAGS.temperature, "top_k": FLAGS.top_k, "top_p": FLAGS.top_p}
        self.unreadable, self.num_tokens = [], self._texts.length
        prompts = given_prompts()
        if FLAGS.classes is not None or (FLAGS.images is not None and prompts):
            raise ValueError("--task=caption reads images only: leave out --classes, --prompt and --prompts")
        if FLAGS.images is not None:
            run.objective.check_order(text_first=False)
            images, self.unreadable = read_pictures(FLAGS.images, model.image_shape, run.data.background())
            self.jobs = [Job(path, FLAGS.seed, image=image) for path, image in images.items()]
            return
        # Without a prompt, whole texts.
        self.jobs = prompt_jobs(self._texts, prompts or [""], whole=False)
        lengths = [int(job.text_mask.sum()) for job in self.jobs]
        if max(lengths) == self._texts.length:
            raise ValueError(f"a prompt has {max(lengths)} tokens, as many as a text: there is no room to go on")
        cut = lambda x: x[: max(lengths)]
        self.jobs = [dataclasses.replace(j, text=cut(j.text), text_mask=cut(j.text_mask)) for j in self.jobs]
        self.num_tokens -= min(lengths)

    def __call__(self, model, group: list[Job], keys, on_token) -> tuple[np.ndarray | None, list[dict]]:
        from jetformer.sampling import decode

        pictures, latents = stacked((job.image for job in group), keys.device), None
        if pictures is not None:
            latents = self._compile(lambda: decode.encode_images(model, pictures, keys).tokens)()
        text_mask = stacked((job.text_mask for job in group), keys.device)
        tokens, lengths, nats = decode.sample_text(
            model,
            keys,
            image_tokens=latents,
            text=stacked((job.text for job in group), keys.device),
            text_mask=text_mask,
            max_length=self.num_tokens,
            lengths=None if text_mask is None else self._texts.length - text_mask.sum(1),
            vocab_size=self._texts.tokenizer.vocab_size,
            eos_id=self._texts.tokenizer.eos_id,
            temperature=FLAGS.temperature,
            top_k=FLAGS.top_k,
            top_p=FLAGS.top_p,
            compile=self._compile,
            on_token=on_token,
        )
        rows = zip(self._texts.decode(tokens.cpu().numpy()), lengths.cpu().tolist(), nats.cpu().tolist(), strict=True)
        known = [{"text": text, "log_likelihood": x, "bits_per_token": -x / math.log(2) / n} for text, n, x in rows]
        return None if pictures is None else pictures.cpu().numpy(), known


_FLAGS_OF = {
    "image": ("temperature_probs", "guidance", "guidance_weight", "guidance_schedule"),
    "complete": ("temperature_probs", "guidance", "guidance_weight", "guidance_schedule", "rows"),
    "caption": ("top_k", "top_p"),
    "text": ("top_k", "top_p"),
    "flow": (),
}


def check_flags(what: str) -> None:
    """Looks for flags that mean nothing for what is sampled.

    Raises:
      ValueError: if there is one.
    """
    for name in {name for names in _FLAGS_OF.values() for name in names} - set(_FLAGS_OF[what]):
        if FLAGS[name].present:
            raise ValueError(f"--{name} means nothing for what is sampled here ({what}): leave it out")


def sample_all(run, state, step: int, workdir: UPath, machine: runtime.Runtime, out: pathlib.Path) -> None:
    """Samples what the flags ask for. Of several processes each makes every so many-th batch; process 0 writes.

    Raises:
      ValueError: for what cannot be sampled; for images that could not be read, when all others are done.
    """
    import torch
    from tqdm import tqdm

    from jetformer import prng
    from jetformer.models.jet import Jet
    from jetformer.models.jetformer import JetFormer
    from jetformer.models.labelled import LabelledFlow
    from jetformer.models.language_model import LanguageModel
    from jetformer.sampling import gallery

    model, loop = state.model, state.loop
    if not isinstance(model, JetFormer | LanguageModel | Jet | LabelledFlow):
        raise ValueError(f"a {type(model).__name__} alone has nothing to sample: give a JetFormer's or a flow's run")
    if (FLAGS.images is None) != (FLAGS.task is None):
        raise ValueError("--images and --task go together: give both, or neither")
    if FLAGS.images is not None and isinstance(model, LanguageModel):
        raise ValueError("a LanguageModel reads no images: leave out --images")
    of_flow = isinstance(model, Jet | LabelledFlow)
    writes_text = not of_flow and (FLAGS.task == "caption" or isinstance(model, LanguageModel))
    what = FLAGS.task or ("text" if writes_text else "flow" if of_flow else "image")
    check_flags(what)
    task = (Texts if writes_text else FlowImages if of_flow else Images)(run, model, workdir, loop.compile)
    settings = {"task": what, "run": str(workdir), "step": step, "ema": state.ema is not None and FLAGS.ema}
    settings |= task.settings

    count = FLAGS.num_images or (1 if FLAGS.images is not None else 8)
    jobs = [dataclasses.replace(job, seed=FLAGS.seed + i) for job in task.jobs for i in range(count)]
    collected, missing = None, []

    def open_gallery() -> None:
        nonlocal collected, missing
        collected = gallery.Gallery(out, settings, key="prompt" if FLAGS.images is None else "image")
        missing = [i for i, job in enumerate(jobs) if not collected.has(job.label, job.seed, **job.identity())]

    machine.first_does(open_gallery)
    todo = [jobs[i] for i in machine.of_first(missing)]
    if len(todo) < len(jobs):
        logging.info("%d of %d samples are there already", len(jobs) - len(todo), len(jobs))
    # Batches are those of one process, so that images are equal to the bit.
    size = min(FLAGS.batch_size, len(todo)) or 1
    groups = batches(todo, size)
    rounds = math.ceil(len(groups) / machine.process_count)
    own = groups[machine.process_index :: machine.process_count]

    state.runner.eval()
    average = state.averaged() if FLAGS.ema else contextlib.nullcontext()
    with (
        average,
        loop.gathered(state.runner),
        loop.autocast(),
        tqdm(
            total=sum(map(len, own)) * task.num_tokens,
            unit="tokens",
            unit_scale=True,
            disable=not own or machine.process_index > 0,
        ) as progress,
    ):

        def sample(group: list[Job]) -> list[tuple[Job, np.ndarray | None, dict[str, Any]]]:
            filled = group + group[-1:] * (size - len(group))  # so that all batches have one shape
            keys = torch.stack([prng.key(job.seed) for job in filled]).to(machine.device)
            pictures, known = state.runner(task, filled, keys, lambda: progress.update(len(group)))
            return list(zip(group, itertools.repeat(None) if pictures is None else pictures, known, strict=False))

        for group in itertools.islice(itertools.chain(own, itertools.repeat([])), rounds):
            for samples in machine.of_all(sample(group) if group else []):
                if collected is not None:
                    for job, picture, facts in samples:
                        collected.add(job.label, job.seed, picture, **job.identity(), **facts)
    if collected is not None and collected.records:
        collected.finish()
        logging.info("%d samples in %s: open %s", len(collected.records), out, out / gallery.PAGE_FILE)
    if task.unreadable:
        raise ValueError(
            f"{len(task.unreadable)} of {len(task.unreadable) + len(task.jobs)} images could not be read: "
            f"{', '.join(task.unreadable)}; the others are done"
        )


def main(argv: list[str]) -> None:
    program.no_arguments(argv)
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.INFO)
    with program.one_line_errors():
        machine = runtime.initialize(FLAGS.device)
        if machine.process_index > 0:  # one says how it goes
            logging.set_verbosity(logging.ERROR)
        if machine.process_count > 1 and machine.device.type == "xla":
            raise ValueError("with --device=xla jetformer.sample is one process: start it on one host")
        # A process loads and runs the model as if it were alone, so that none waits for another within a batch.
        alone = machine if machine.process_count == 1 else runtime.Runtime(machine.device)
        from jetformer.state import load

        workdir, step = source()
        if "://" in FLAGS.out:
            raise ValueError(f"--out={FLAGS.out}: give a local directory")
        run, state, step = load(
            workdir, FLAGS.gin_file, FLAGS.gin_bindings, alone, step, FLAGS.trust_imports, FLAGS.verify
        )
        sample_all(run, state, step, workdir, machine, pathlib.Path(FLAGS.out))


if __name__ == "__main__":
    app.run(main)
