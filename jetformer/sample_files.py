"""Writes samples to a directory: what `jetformer.sample` does once its flags are parsed."""

import dataclasses
import hashlib
import pathlib
from typing import Any

import numpy as np
from absl import flags, logging
from torch import nn
from upath import UPath

# None of these imports TensorFlow, before which `runtime.initialize` has to import torch_xla.
from jetformer import checkpoint, run_files, runtime, trained
from jetformer.data.pictures import decode_picture, read_pictures
from jetformer.evaluators.samples import Samples
from jetformer.models.jetformer import JetFormer
from jetformer.models.language_model import LanguageModel
from jetformer.sampling import images, texts
from jetformer.sampling.gallery import PAGE_FILE, Gallery
from jetformer.sampling.guidance import Guidance, guidance_of
from jetformer.sampling.sampler import Request, Sampler, draw, repeated

FLAGS = flags.FLAGS  # defined in `jetformer.sample`

_OF_FLOWS = ("guidance", "guidance_weight", "guidance_schedule")
_OF_IMAGES = (*_OF_FLOWS, "temperature_probs", "guidance_candidates")
# Flags that apply to some tasks only.
_FLAGS_OF = {
    "image": (*_OF_IMAGES, "denoise"),
    "complete": (*_OF_IMAGES, "rows"),
    "inpaint": (*_OF_IMAGES, "mask"),
    "caption": ("top_k", "top_p"),
    "text": ("top_k", "top_p"),
    "flow": (*_OF_FLOWS, "denoise"),
}

# Tasks that sample a part of an image.
_EDITING = ("complete", "inpaint")


def source() -> str:
    """Returns what the flags name, as `trained.load` takes it."""
    given = [name for name in ("workdir", "checkpoint", "hf_repo") if FLAGS[name].value is not None]
    if len(given) != 1:
        raise ValueError("expected one of --workdir, --checkpoint and --hf_repo")
    if FLAGS.hf_revision is not None and FLAGS.hf_repo is None:
        raise ValueError("--hf_revision needs --hf_repo")
    if FLAGS.hf_repo is not None:
        return f"hf://{FLAGS.hf_repo}" + (f"@{FLAGS.hf_revision}" if FLAGS.hf_revision else "")
    if FLAGS.checkpoint is not None and checkpoint.split_path(FLAGS.checkpoint)[1] is None:
        raise ValueError(f"--checkpoint={FLAGS.checkpoint}: expected WORKDIR/checkpoints/NUMBER")
    return FLAGS.workdir or FLAGS.checkpoint


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
    for name, tasks in (("classes", ("image", *_EDITING, "flow")), ("prompt", ("image", *_EDITING, "text"))):
        if (FLAGS[name].value or (name == "prompt" and FLAGS.prompts)) and task not in tasks:
            raise ValueError(f"--{name} does not apply to this task ({task})")
    if task == "inpaint" and FLAGS.mask is None:
        raise ValueError("--task=inpaint needs a --mask")
    return task


def prepare(
    task: str, found: trained.Trained, guidance: Guidance
) -> tuple[Sampler, list[Request], dict[str, str], list[str]]:
    """Prepares a task.

    Args:
      task: see `task_of`.
      found: the model.
      guidance: of images.

    Returns:
      The sampler; a request for each class, prompt or image; further settings of all samples; the paths of images that
      cannot be read.
    """
    experiment, model, prompts, classes = found.experiment, found.module, given_prompts(), FLAGS.classes or []
    options: dict[str, Any] = {"temperature": FLAGS.temperature, "compile": found.state.loop.compile}
    given, unreadable = {}, []
    if FLAGS.images is not None:
        given, unreadable = read_pictures(FLAGS.images, model.image_shape, experiment.data.background())
    if task == "flow":
        sampler = images.FlowSampler(experiment, model, guidance=guidance, denoise=FLAGS.denoise, **options)
        requests = images.class_requests(experiment, model, classes, found.class_names)
        if guidance.on and not requests:
            raise ValueError("guidance needs --classes")
        return sampler, requests or [Request("sample")], {}, unreadable
    if task in ("caption", "text"):
        tokenizing = run_files.texts(experiment, found.directory)
        requests, num_tokens = [Request(path, image=image) for path, image in given.items()], None
        if task == "text":
            requests, num_tokens = texts.continuation_requests(tokenizing, prompts or [""])  # "" for a whole text
        options |= {"num_tokens": num_tokens, "top_k": FLAGS.top_k, "top_p": FLAGS.top_p}
        return texts.TextSampler(experiment, model, tokenizing, **options), requests, {}, unreadable

    options |= {"guidance": guidance, "temperature_probs": FLAGS.temperature_probs}
    if task == "image":
        options["denoise"] = FLAGS.denoise
    if task == "complete":
        options["rows"] = model.image_shape[0] // 2 if FLAGS.rows is None else FLAGS.rows
    sampler = images.ImageSampler(experiment, model, **options)
    if task == "image" and not classes and not prompts:  # those of the experiment's own samples
        own = next((e for e in experiment.evaluators.values() if isinstance(e, Samples)), None)
        if own is None:
            raise ValueError("nothing to sample: give --classes, --prompt, --prompts or --images")
        classes, prompts = own.classes(found.class_names), list(own.prompts or ())
    requests = images.class_requests(experiment, model, classes, found.class_names)
    if prompts:
        requests += texts.prompt_requests(run_files.texts(experiment, found.directory), prompts)
    if task == "image":
        return sampler, requests, {}, unreadable
    if len(requests) != 1:
        raise ValueError(f"--task={task} needs one --prompt or one of --classes for all images, not {len(requests)}")
    (shown,) = requests
    more, requests = {"prompt": shown.label}, []
    if task == "complete":
        requests = [dataclasses.replace(shown, label=path, image=image) for path, image in given.items()]
        return sampler, requests, more, unreadable
    mask = decode_picture(UPath(FLAGS.mask).read_bytes(), channels=1)[..., 0] > 127
    more["mask_sha256"] = hashlib.sha256(mask.tobytes()).hexdigest()
    for path, image in given.items():
        requests.append(images.inpainting_request(dataclasses.replace(shown, label=path), image, mask))
    return sampler, requests, more, unreadable


def identity(request: Request) -> dict[str, str]:
    """Returns what tells apart images with the same path."""
    return {} if request.image is None else {"image_sha256": hashlib.sha256(request.image.tobytes()).hexdigest()}


def _sampled_pixels(request: Request, rows: int | None) -> np.ndarray:
    """Returns the pixels bool `[H, W]` that are sampled: the request's mask, or all below the first rows."""
    if rows is None:
        return request.mask
    height, width = request.image.shape[:2]
    return np.repeat(np.arange(height)[:, None] >= rows, width, axis=1)


def sample() -> None:
    """Draws the samples that the flags ask for and that --out lacks; process 0 writes them.

    Raises:
      ValueError: for flags that do not fit the model; for images that cannot be read, after all others are done.
    """
    machine = runtime.initialize(FLAGS.device)
    if machine.process_index > 0:  # process 0 logs
        logging.set_verbosity(logging.ERROR)
    if machine.process_count > 1 and machine.device.type == "xla":
        raise ValueError("jetformer.sample with --device=xla runs in one process: start it on one host")
    if "://" in FLAGS.out:
        raise ValueError(f"--out={FLAGS.out}: expected a local directory")
    given = (FLAGS.guidance, FLAGS.guidance_weight, FLAGS.guidance_schedule, FLAGS.guidance_candidates)
    guidance_of(*given)  # before the model loads
    # Each process loads and runs the whole model, so that none waits for another within a batch.
    found = trained.load(
        source(),
        step=FLAGS.step,
        ema=FLAGS.ema,
        device=FLAGS.device,
        gin_files=FLAGS.gin_file,
        gin_bindings=FLAGS.gin_bindings,
        trust_imports=FLAGS.trust_imports,
        verify=FLAGS.verify,
    )
    task, out = task_of(found.module), pathlib.Path(FLAGS.out)
    guidance = guidance_of(*given, default="interp" if task == "flow" else "density")
    sampler, requests, more, unreadable = prepare(task, found, guidance)
    settings = {"task": task, "run": str(found.directory), "step": found.step, "ema": found.averaged}
    settings |= sampler.settings | more
    count = FLAGS.num_images or (1 if FLAGS.images is not None else 8)
    wanted = repeated(requests, count, FLAGS.seed)
    gallery = None

    def open_gallery() -> list[int]:
        nonlocal gallery
        sampled = _sampled_pixels(requests[0], settings.get("rows")) if task in _EDITING and requests else None
        gallery = Gallery(out, settings, key="prompt" if FLAGS.images is None else "image", sampled=sampled)
        has = lambda request: gallery.has(request.label, request.seed, **identity(request))
        return [i for i, request in enumerate(wanted) if not has(request)]

    lacking = [wanted[i] for i in machine.on_first(open_gallery)]
    if len(lacking) < len(wanted):
        logging.info("%d of %d samples exist already", len(wanted) - len(lacking), len(wanted))
    with found.running():
        for samples in draw(sampler, lacking, found.state, machine, batch_size=FLAGS.batch_size, progress=True):
            if gallery is not None:
                for request, drawn in samples:
                    original = request.image if task in _EDITING else None
                    gallery.add(request.label, request.seed, original=original, **identity(request), **drawn)
    if gallery is not None and gallery.records:
        gallery.finish()
        logging.info("%d samples in %s: open %s", len(gallery.records), out, out / PAGE_FILE)
    if unreadable:
        total, paths = len(unreadable) + len(requests), ", ".join(unreadable)
        raise ValueError(f"{len(unreadable)} of {total} images could not be read: {paths}; the others are done")
