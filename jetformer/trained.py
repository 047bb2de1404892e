"""Trained models and training from Python: what `jetformer.load` and `jetformer.train` are.

Dimensions: N images or texts, H × W × C image, L image tokens, D dimensions of a patch.
"""

import contextlib
import dataclasses
import functools
import math
import operator
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import gin
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from upath import UPath

from jetformer import checkpoint, class_names, config, run_files, runtime
from jetformer.convert import hub, sharing
from jetformer.convert.sources import state_dicts
from jetformer.evaluators import likelihood
from jetformer.experiment import Experiment
from jetformer.loops.base import Function
from jetformer.models.jetformer import JetFormer
from jetformer.models.labelled import LabelledFlow
from jetformer.models.language_model import LanguageModel
from jetformer.objectives import DistillObjective, JetFormerObjective, to_unit_range
from jetformer.sampling.decode import to_uint8
from jetformer.sampling.guidance import guidance_of
from jetformer.sampling.images import FlowSampler, ImageSampler, class_requests, dtype_of, inpainting_request
from jetformer.sampling.sampler import Request, Sampler, draw, repeated
from jetformer.sampling.texts import TextSampler, continuation_requests, prompt_requests
from jetformer.state import (
    State,
    build_to_load,
    compilation_cache,
    configured,
    evaluator_context,
    load_state,
    make_loop,
    saved_config,
)

if TYPE_CHECKING:
    from jetformer.data.texts import Texts
    from jetformer.data.tokenizer import Tokenizer

# What goes in as an array comes out as one, and a tensor as a tensor on the same device.
Array = TypeVar("Array", npt.NDArray[Any], Tensor)
Classes: TypeAlias = int | str | Sequence[int | str] | npt.NDArray[np.integer] | npt.NDArray[np.str_] | Tensor

# The parameters of a run: they lose digits that a flow needs to be invertible.
_DTYPES = (torch.float32, torch.float64)
_HUB = "hf://"


class Trained:
    """A trained model with its experiment; `load` returns it.

    Images are uint8 `[N, H, W, C]`. What is computed from images or latents is a NumPy array or a tensor, as these are;
    samples are arrays. Sample i of a class, prompt or image has the seed `seed` + i and, as in `jetformer.sample`, does
    not depend on the other samples. `classes` and `prompts` of given images are one for all, or one for each.

    Attributes:
      experiment: that trained it, see `Experiment`.
      state: the model, as a loop has placed it.
      step: of training; None if unknown.
      directory: the workdir, or the directory of safetensors.
      config: the experiment as gin text.
      averaged: whether the parameters are the moving average of those that were trained.
    """

    def __init__(
        self, experiment: Experiment, state: State, step: int | None, directory: UPath, config: str, averaged: bool
    ):
        self.experiment, self.state, self.step = experiment, state, step
        self.directory, self.config, self.averaged = directory, config, averaged

    def __repr__(self) -> str:
        kind, device = type(self.module).__name__, self.state.loop.runtime.device
        return f"Trained({kind}, {self.directory}, step={self.step}, device={device})"

    @property
    def module(self) -> nn.Module:
        """The model, in evaluation mode."""
        return self.state.model

    @property
    def tokenizer(self) -> "Tokenizer | None":
        """The tokenizer of a model of texts, else None."""
        return self._texts.tokenizer if self.experiment.data.has_texts() else None

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Trained":
        """Moves the model.

        Args:
          device: "cpu", "cuda", "cuda:1" or "tpu"; None: where it is.
          dtype: of the parameters, float32 or float64; None: as it is. (For products in bfloat16 bind
            train.autocast = "bfloat16".)

        Returns:
          This object.

        Raises:
          ValueError: for another device or dtype.
        """
        loop = self.state.loop
        machine = loop.runtime if device is None else runtime.initialize(str(device), alone=True)
        if machine != loop.runtime and "xla" in (machine.device.type, loop.runtime.device.type):
            raise ValueError("a model does not move to or from XLA devices: load it with device='xla'")
        if dtype not in (None, *_DTYPES):
            raise ValueError(f"dtype {dtype}: expected float32 or float64, for a flow is not invertible in fewer bits")
        self.module.to(device=machine.device, dtype=dtype)
        if machine != loop.runtime:
            with _kept_precision():
                self.state = dataclasses.replace(self.state, loop=make_loop(self.experiment, machine))
        return self

    @functools.cached_property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of classes by number; None if unknown."""
        return class_names.saved(self.directory)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Sets what the model needs of the process, precision and current device, while the context lasts. The other
        methods do so themselves."""
        device = self.state.loop.runtime.device
        on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with _kept_precision(), on_device:
            torch.set_float32_matmul_precision(self.experiment.matmul_precision)
            yield

    # Samples

    def sample(
        self,
        classes: Classes | None = None,
        prompts: str | Sequence[str] | None = None,
        *,
        num_images: int = 1,
        seed: int = 0,
        temperature: float = 1.0,
        temperature_probs: float = 1.0,
        guidance: str | None = None,
        guidance_weight: float = 0.0,
        guidance_schedule: str = "constant",
        guidance_candidates: int | None = None,
        denoise: bool = False,
        batch_size: int = 32,
        progress: bool = False,
    ) -> npt.NDArray[np.uint8]:
        """Samples images of classes or prompts by a JetFormer; of classes, or of none, by a flow.

        Args:
          classes: names or numbers of classes, see `class_names`; a name takes precedence.
          prompts: what to draw; imports TensorFlow, which tokenizes them.
          num_images: samples of each class and prompt.
          seed: of the first sample of each.
          temperature: multiplies the scales of the mixtures of image tokens, or the latents of a flow.
          temperature_probs: multiplies the log-weights of the mixtures.
          guidance, guidance_weight, guidance_schedule, guidance_candidates: see `sampling.guidance.guidance_of`; of a
            flow `sampling.flows.check_guidance`.
          denoise: remove the noise that the model was trained with, see `sampling.denoising.denoise`.
          batch_size: samples at a time.
          progress: show a progress bar.

        Returns:
          Images, `num_images` of the first class, then of the second, and so on; prompts come after classes.

        Raises:
          ValueError: for arguments that do not fit the model.
        """
        requests = self._requests(classes, prompts)
        default = "density" if isinstance(self.module, JetFormer) else "interp"
        guided = guidance_of(guidance, guidance_weight, guidance_schedule, guidance_candidates, default=default)
        options: dict[str, Any] = {"temperature": temperature, "guidance": guided, "denoise": denoise}
        options["compile"] = self.state.loop.compile
        sampler: Sampler
        if isinstance(self.module, JetFormer):
            if not requests:
                raise ValueError("nothing to sample: give classes or prompts")
            sampler = ImageSampler(self.experiment, self.module, temperature_probs=temperature_probs, **options)
        elif isinstance(self.module, LanguageModel):
            raise ValueError("a LanguageModel samples no images: use continue_texts")
        else:
            if temperature_probs != 1:
                raise ValueError("temperature_probs does not apply to a flow: leave it out")
            sampler = FlowSampler(self.experiment, self.module, **options)
            if guided.on and not requests:
                raise ValueError("guidance needs classes")
            requests = requests or [Request("sample")]
        drawn = self._draw(sampler, requests, num_images, seed, batch_size, progress)
        return np.stack([sample["image"] for sample in drawn])

    def complete(
        self,
        images: Array,
        rows: int | None = None,
        classes: Classes | None = None,
        prompts: str | Sequence[str] | None = None,
        *,
        num_images: int = 1,
        seed: int = 0,
        temperature: float = 1.0,
        temperature_probs: float = 1.0,
        guidance: str | None = None,
        guidance_weight: float = 0.0,
        guidance_schedule: str = "constant",
        guidance_candidates: int | None = None,
        batch_size: int = 32,
        progress: bool = False,
    ) -> Array:
        """Keeps the first rows of images and samples the rest by a JetFormer; approximate, see
        `sampling.decode.complete_images`.

        Args:
          images: uint8 `[N, H, W, C]`.
          rows: number of rows of pixels to keep; None: half of them.
          classes, prompts: what the images show.
          num_images: samples of each image.
          seed: of the first sample of each.
          temperature, temperature_probs, guidance, guidance_weight, guidance_schedule, guidance_candidates, batch_size,
            progress: see `sample`.

        Returns:
          Images, `num_images` of the first image, then of the second, and so on.

        Raises:
          ValueError: for arguments that do not fit the model.
        """
        model = self._jetformer("complete")
        pixels = self._pixels(images)
        shown = self._shown(len(pixels), classes, prompts)
        sampler = ImageSampler(
            self.experiment,
            model,
            guidance=guidance_of(guidance, guidance_weight, guidance_schedule, guidance_candidates),
            temperature=temperature,
            temperature_probs=temperature_probs,
            rows=model.image_shape[0] // 2 if rows is None else rows,
            compile=self.state.loop.compile,
        )
        requests = [dataclasses.replace(request, image=x) for request, x in zip(shown, pixels, strict=True)]
        drawn = self._draw(sampler, requests, num_images, seed, batch_size, progress)
        return _like(images, np.stack([sample["image"] for sample in drawn]))

    def inpaint(
        self,
        images: Array,
        mask: Array,
        classes: Classes | None = None,
        prompts: str | Sequence[str] | None = None,
        *,
        num_images: int = 1,
        seed: int = 0,
        temperature: float = 1.0,
        temperature_probs: float = 1.0,
        guidance: str | None = None,
        guidance_weight: float = 0.0,
        guidance_schedule: str = "constant",
        guidance_candidates: int | None = None,
        batch_size: int = 32,
        progress: bool = False,
    ) -> Array:
        """Samples the pixels of images under a mask by a JetFormer and keeps the others; approximate, see
        `sampling.decode.inpaint_images`.

        Args:
          images: uint8 `[N, H, W, C]`.
          mask: bool `[H, W]` for all images or `[N, H, W]`, the pixels to sample.
          classes, prompts: what the images show.
          num_images: samples of each image.
          seed: of the first sample of each.
          temperature, temperature_probs, guidance, guidance_weight, guidance_schedule, guidance_candidates, batch_size,
            progress: see `sample`.

        Returns:
          Images, `num_images` of the first image, then of the second, and so on.

        Raises:
          ValueError: for arguments that do not fit the model, or a mask of no pixel or of all of them.
        """
        model = self._jetformer("inpaint")
        pixels, masks = self._pixels(images), _array("mask", mask)
        if masks.dtype != bool:
            raise ValueError(f"the mask is {masks.dtype}: expected bool, True for the pixels to sample")
        if masks.ndim < 3:
            masks = np.stack([masks] * len(pixels))
        if len(masks) != len(pixels):
            raise ValueError(f"{len(masks)} masks for {len(pixels)} images: give one [H, W], or one for each")
        sampler = ImageSampler(
            self.experiment,
            model,
            guidance=guidance_of(guidance, guidance_weight, guidance_schedule, guidance_candidates),
            temperature=temperature,
            temperature_probs=temperature_probs,
            compile=self.state.loop.compile,
        )
        shown = zip(self._shown(len(pixels), classes, prompts), pixels, masks, strict=True)
        requests = [inpainting_request(*request) for request in shown]
        drawn = self._draw(sampler, requests, num_images, seed, batch_size, progress)
        return _like(images, np.stack([sample["image"] for sample in drawn]))

    def caption(
        self,
        images: Array,
        *,
        num_texts: int = 1,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        batch_size: int = 32,
        progress: bool = False,
    ) -> list[str]:
        """Samples captions of images by a JetFormer of images and texts.

        Args:
          images: uint8 `[N, H, W, C]`.
          num_texts: captions of each image.
          seed: of the first caption of each.
          temperature: divides the logits.
          top_k: number of most probable tokens to choose from; 1 is greedy decoding. None: all.
          top_p: choose from the most probable tokens with at least this probability.
          batch_size, progress: see `sample`.

        Returns:
          Captions, `num_texts` of the first image, then of the second, and so on.

        Raises:
          ValueError: for arguments that do not fit the model.
        """
        self._jetformer("caption")
        requests = [Request(f"image {i}", image=image) for i, image in enumerate(self._pixels(images))]
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        return self._draw_texts(requests, options, num_texts, seed, batch_size, progress)

    def continue_texts(
        self,
        prompts: str | Sequence[str] = "",
        *,
        num_texts: int = 1,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        batch_size: int = 32,
        progress: bool = False,
    ) -> list[str]:
        """Samples continuations of texts by a LanguageModel. Imports TensorFlow.

        Args:
          prompts: beginnings of texts; "" for a whole text.
          num_texts: continuations of each.
          seed, temperature, top_k, top_p, batch_size, progress: see `caption`.

        Returns:
          Continuations without their beginnings, `num_texts` of the first prompt, then of the second, and so on.

        Raises:
          ValueError: for arguments that do not fit the model.
        """
        if not isinstance(self.module, LanguageModel):
            raise ValueError(f"a {type(self.module).__name__} does not continue texts, only a LanguageModel")
        requests, num_tokens = continuation_requests(self._texts, _listed(prompts))
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "num_tokens": num_tokens}
        return self._draw_texts(requests, options, num_texts, seed, batch_size, progress)

    # Likelihoods and latents

    def bits_per_dim(
        self,
        images: Array,
        classes: Classes | None = None,
        prompts: str | Sequence[str] | None = None,
        *,
        seed: int = 0,
        batch_size: int = 32,
    ) -> Array:
        """Computes the bits per dim of images, given classes or prompts: by example what the evaluator `Likelihood`
        averages, if these are the first images of its split.

        A JetFormer that also learns images without a text before them scores them without classes and prompts, too.

        Args:
          images: uint8 `[N, H, W, C]`.
          classes, prompts: what the images show.
          seed: number of the draw of dequantization noise, counted from 0, see `Likelihood.num_draws`.
          batch_size: images at a time.

        Returns:
          float64 `[N]`.

        Raises:
          ValueError: for arguments that do not fit the model, a flow of noisy images, or a run of students.
        """
        rows, objective = {"image": self._pixels(images)}, self.experiment.objective
        if isinstance(objective, DistillObjective):
            raise ValueError(
                "the run trains students and not the flow's likelihood: to score images load it with "
                'gin_bindings="train.objective = @JetObjective()"'
            )
        if getattr(objective, "noise_std", 0):
            raise ValueError(
                "the flow learns the density of noisy images, not of 8-bit ones: to score these load it with "
                'gin_bindings="JetObjective.noise_std = 0"'
            )
        shown = self._of_each(len(rows["image"]), self._requests(classes, prompts))
        _check_at_least(0, seed=seed)
        if isinstance(objective, JetFormerObjective):
            if shown is not None:
                objective.check_order(text_first=True)
            elif objective.text_prefix_prob == 1 or not objective.loss_on_prefix:
                raise ValueError("the model learns no images without texts before them: give classes or prompts")
            objective = dataclasses.replace(objective, text_prefix_prob=float(shown is not None))
            text = _stacked(shown) if shown else {"text": np.zeros((len(rows["image"]), 1), np.int64)}
            rows |= text | {"text_loss": np.ones(text["text"].shape, bool)}
        elif shown:
            rows["label"] = _stacked(shown)["text"][:, 0]
        elif isinstance(self.module, LabelledFlow):
            if not objective.drop_labels_prob:
                raise ValueError("the flow learns no images without labels: give classes")
            rows["label"] = np.full(len(rows["image"]), self.module.num_labels)  # stands for none

        def score(model: nn.Module, batch: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
            draws = objective.draw(model, batch, likelihood.keys_of_draw(keys, seed), train=False)
            _, terms = objective(model, batch, draws, train=False)
            return {"bits": terms["bits_per_dim"][0]}

        return _like(images, self._per_example(score, rows, batch_size)["bits"].astype(np.float64))

    def log_likelihood(
        self,
        images: Array,
        classes: Classes | None = None,
        prompts: str | Sequence[str] | None = None,
        *,
        seed: int = 0,
        batch_size: int = 32,
    ) -> Array:
        """Computes log-likelihoods in nats of images, given classes or prompts: of pixel values in [0, 256) with
        dequantization noise, so that a mean over draws is at most that of the 8-bit pixels.

        Arguments and errors are those of `bits_per_dim`.

        Returns:
          float64 `[N]`.
        """
        bits = self.bits_per_dim(images, classes, prompts, seed=seed, batch_size=batch_size)
        return bits * (-math.prod(images.shape[1:]) * math.log(2))

    def encode(self, images: Array, classes: Classes | None = None, *, batch_size: int = 32) -> Array:
        """Encodes images by the flow, at the centres of their pixels' intervals: `decode` returns the same images.

        Args:
          images: uint8 `[N, H, W, C]`.
          classes: of a flow that is conditional on them; None: without.
          batch_size: images at a time.

        Returns:
          Latents, in the dtype of the parameters. Of a JetFormer `[N, L, D]`: in the first `module.out_dim` of the D
          dimensions the image tokens, then the factored-out dimensions. Of a flow alone `[N, H, W, C]`.

        Raises:
          ValueError: for arguments that do not fit the model.
        """
        rows = {"image": self._pixels(images)} | self._labels(len(images), classes)

        def function(model: nn.Module, batch: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
            del keys
            pixels = to_unit_range(batch["image"].to(dtype_of(model)) + 0.5)
            if isinstance(model, JetFormer):
                encoded = model.encode_image(pixels)
                return {"latents": torch.cat((encoded.tokens, encoded.factored), dim=-1)}
            return {"latents": model(pixels, _context(model, batch))[0]}

        return _like(images, self._per_example(function, rows, batch_size)["latents"])

    def decode(self, latents: Array, classes: Classes | None = None, *, batch_size: int = 32) -> Array:
        """Decodes latents by the inverse of the flow.

        Args:
          latents: as `encode` returns them, of any floating-point dtype.
          classes, batch_size: see `encode`.

        Returns:
          uint8 `[N, H, W, C]`.

        Raises:
          ValueError: for arguments that do not fit the model.
        """
        model = self._flow()
        is_jetformer = isinstance(model, JetFormer)
        shape = (model.num_image_tokens, model.patches.dim) if is_jetformer else tuple(model.image_shape)
        given = _checked("latents", latents, shape)
        if not np.issubdtype(given.dtype, np.floating):
            raise ValueError(f"latents are {given.dtype}: expected floating-point numbers")

        def function(model: Any, batch: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
            del keys
            z = batch["latents"].to(dtype_of(model))
            if isinstance(model, JetFormer):
                x, _ = model.decode_image(*z.split((model.out_dim, model.factored_dim), dim=-1))
            else:
                x, _ = model.inverse(z, _context(model, batch))
            return {"image": to_uint8(x)}

        rows = {"latents": given} | self._labels(len(given), classes)
        return _like(latents, self._per_example(function, rows, batch_size)["image"])

    # What these share

    @functools.cached_property
    def _texts(self) -> "Texts":
        return run_files.texts(self.experiment, self.directory)

    def _jetformer(self, method: str) -> JetFormer:
        if not isinstance(self.module, JetFormer):
            raise ValueError(f"{method} does not apply to a {type(self.module).__name__}, only to a JetFormer")
        return self.module

    def _flow(self) -> Any:
        """Returns the model: a JetFormer, or a flow alone."""
        if isinstance(self.module, LanguageModel):
            raise ValueError("a LanguageModel is of texts alone, without images")
        if not isinstance(self.module, JetFormer):
            FlowSampler(self.experiment, self.module)  # raises for others
        return self.module

    def _requests(self, classes: Classes | None, prompts: str | Sequence[str] | None) -> list[Request]:
        """Returns a request for each class, then for each prompt."""
        requests = class_requests(self.experiment, self.module, _chosen(classes), self.class_names)
        if prompts is None:
            return requests
        if not isinstance(self.module, JetFormer):
            raise ValueError(f"prompts do not apply to images of a {type(self.module).__name__}: leave them out")
        return requests + prompt_requests(self._texts, _listed(prompts))

    def _shown(self, count: int, classes: Classes | None, prompts: str | Sequence[str] | None) -> list[Request]:
        """Returns what each of the given images shows."""
        shown = self._of_each(count, self._requests(classes, prompts))
        if shown is None:
            raise ValueError("give classes or prompts: what the images show")
        return shown

    @staticmethod
    def _of_each(count: int, requests: list[Request]) -> list[Request] | None:
        """Returns the request of each image; None if there are none."""
        if requests and len(requests) not in (1, count):
            raise ValueError(f"{len(requests)} classes or prompts for {count} images: give one, or one for each")
        return (requests * count if len(requests) == 1 else requests) or None

    def _labels(self, count: int, classes: Classes | None) -> dict[str, np.ndarray]:
        """Returns the labels of images that a flow encodes or decodes; {} for none."""
        if classes is not None and isinstance(self.module, JetFormer):
            raise ValueError("the flow of a JetFormer is not conditional on classes: leave them out")
        shown = self._of_each(count, self._requests(classes, None))
        return {"label": _stacked(shown)["text"][:, 0]} if shown else {}

    def _pixels(self, given: Any) -> np.ndarray:
        pixels = _checked("images", given, tuple(self._flow().image_shape))
        if pixels.dtype != np.uint8:
            raise ValueError(f"images are {pixels.dtype}: expected uint8, from 0 to 255")
        return pixels

    def _per_example(self, function: Function, rows: dict[str, np.ndarray], batch_size: int) -> dict[str, np.ndarray]:
        _check_at_least(1, batch_size=batch_size)
        context = evaluator_context(self.experiment, self.state, self.step or 0, "api", self.directory)
        with self.running():
            return context.per_example(function, context.batches_of(rows, batch_size), seed=likelihood.SEED)

    def _draw(
        self, sampler: Sampler, requests: list[Request], count: int, seed: int, batch_size: int, progress: bool
    ) -> list[dict[str, Any]]:
        name = "num_texts" if isinstance(sampler, TextSampler) else "num_images"
        _check_at_least(1, **{name: count, "batch_size": batch_size})
        _check_at_least(0, seed=seed)
        wanted, machine = repeated(requests, count, seed), self.state.loop.runtime
        with self.running():
            batches = draw(sampler, wanted, self.state, machine, batch_size=batch_size, progress=progress)
            return [sample for batch in batches for _, sample in batch]

    def _draw_texts(
        self,
        requests: list[Request],
        options: dict[str, Any],
        count: int,
        seed: int,
        batch_size: int,
        progress: bool,
    ) -> list[str]:
        model: Any = self.module
        sampler = TextSampler(self.experiment, model, self._texts, compile=self.state.loop.compile, **options)
        drawn = self._draw(sampler, requests, count, seed, batch_size, progress)
        return [sample["text"] for sample in drawn]


def load(
    source: str | os.PathLike[str],
    *,
    step: int | str | None = None,
    ema: bool = True,
    device: str | torch.device = "auto",
    gin_files: str | Sequence[str] = (),
    gin_bindings: str | Sequence[str] = (),
    trust_imports: Sequence[str] = (),
    verify: bool = True,
) -> Trained:
    """Loads a trained model. It reads no data and, except for XLA, changes no setting of the process: models of
    different experiments can be used side by side.

    Args:
      source: a workdir; one of its checkpoints, WORKDIR/checkpoints/NUMBER; a directory that
        `jetformer.convert --to=safetensors` wrote; or "hf://owner/name", or "hf://owner/name@revision", a repository of
        the Hugging Face Hub that holds one of these.
      step: of the checkpoint in a workdir, or "best", see `train.keep_best`; None: the newest.
      ema: use the moving average of the parameters if there is one.
      device: "cpu", "cuda", "cuda:1", "tpu", "xla", or "auto" for a TPU or a GPU if there is one.
      gin_files, gin_bindings: on top of the experiment.
      trust_imports: modules that the experiment may import, which runs their code.
      verify: compare the checksums of a checkpoint's files.

    Raises:
      ValueError: if there is no run or checkpoint, it is damaged, or it does not fit; the message is one line.
    """
    machine = runtime.initialize(str(device), alone=True)
    directory, step = _locate(str(source), step)
    found: int | None
    with config.separate(), _kept_precision():
        experiment = configured(saved_config(directory), _listed(gin_files), _listed(gin_bindings), trust_imports)
        if (directory / sharing.MODEL_FILE).exists() and not checkpoint.steps(str(directory)):
            if step is not None:
                raise ValueError(f"{directory} holds safetensors of one step: leave step = {step!r} out")
            experiment, state, found, averaged = _load_safetensors(experiment, directory, machine, ema)
        else:
            experiment, state, found = load_state(experiment, directory, machine, step, verify)
            averaged = False
            if ema and state.ema is not None:
                state.loop.swap(state.model, state.ema)
                averaged = True
        text = gin.config_str()
    state = dataclasses.replace(state, ema=None)
    state.runner.eval()
    return Trained(experiment, state, found, directory, text, averaged)


def _locate(source: str, step: int | str | None) -> tuple[UPath, int | str | None]:
    """Returns the directory of a run, downloaded from the Hub if it is there, and the step of its checkpoint.

    Args:
      source, step: see `load`.

    Raises:
      ValueError: if it cannot be downloaded, or the step is given twice.
    """
    if source.startswith(_HUB):
        repo, _, revision = source.removeprefix(_HUB).partition("@")
        return hub.fetch_run(repo, revision or None, step), step
    directory, own = checkpoint.split_path(source)
    if own is not None and step is not None:
        raise ValueError(f"{source} is the checkpoint of one step: leave step = {step!r} out")
    return directory, step if own is None else own


def _load_safetensors(
    experiment: Experiment, directory: UPath, machine: runtime.Runtime, ema: bool
) -> tuple[Experiment, State, int | None, bool]:
    weights = sharing.read(directory)
    averaged = ema and weights.ema is not None

    def fill(model: nn.Module) -> None:
        states = state_dicts(*sharing.table(model, weights), weights, model, "safetensors")
        model.load_state_dict(states["model"] | (states["ema"] if averaged else {}))

    experiment = dataclasses.replace(experiment, mesh={"fsdp": -1})
    loop = make_loop(experiment, machine, compilation_cache(experiment, directory))
    return experiment, build_to_load(experiment, loop, fill), weights.step, averaged


def train(
    gin_files: str | Sequence[str],
    gin_bindings: str | Sequence[str],
    workdir: str | os.PathLike[str],
    *,
    device: str = "auto",
    allow_changes: bool = False,
    verify: bool = True,
) -> None:
    """Trains an experiment as `jetformer.main` does; the same call resumes it. It imports TensorFlow, which reads data.

    Ctrl-C, SIGTERM and SIGHUP save a checkpoint and raise `preemption.Preempted`.

    Args:
      gin_files: gin files; later ones override earlier ones.
      gin_bindings: on top of them, as "train.total_steps = 100".
      workdir: directory or URL where the run is saved, and resumed from.
      device: see `runtime.initialize`. Under torchrun all processes call this.
      allow_changes: resume also with another seed or batch size than before.
      verify: compare the checksums of a checkpoint's files when it resumes.

    Raises:
      ValueError: if the experiment cannot be trained, or an evaluator failed; the message is one line.
    """
    machine = runtime.initialize(str(device))
    from jetformer import trainer  # brings TensorFlow, before which torch_xla has to be imported

    with config.separate(), _kept_precision():
        config.parse(_listed(gin_files), _listed(gin_bindings))
        trainer.train(config.call(Experiment), UPath(workdir), machine, allow_changes, verify)


@contextlib.contextmanager
def _kept_precision() -> Iterator[None]:
    """Restores the precision of the caller's matrix products when the context ends."""
    before = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _context(model: Any, batch: dict[str, Tensor]) -> Tensor | None:
    """Returns what a flow is conditional on; None for nothing."""
    return model.context(batch["label"]) if "label" in batch else None


def _stacked(requests: Sequence[Request]) -> dict[str, np.ndarray]:
    """Returns the inputs text `[N, T]`, and text_mask `[N, T]` of prompts."""
    columns = {"text": [r.text for r in requests], "text_mask": [r.text_mask for r in requests]}
    return {name: np.stack(rows) for name, column in columns.items() if (rows := [x for x in column if x is not None])}


def _like(given: Any, found: np.ndarray) -> Any:
    """Returns an array as a tensor on the device of what was given, if that is a tensor."""
    return torch.from_numpy(found).to(given.device) if isinstance(given, Tensor) else found


def _array(name: str, given: Any) -> np.ndarray:
    """Returns an array or tensor as an array."""
    if not isinstance(given, np.ndarray | Tensor):
        raise ValueError(f"{name}: expected a NumPy array or a tensor, not a {type(given).__name__}")
    if isinstance(given, np.ndarray):
        return given
    return (given.float() if given.dtype == torch.bfloat16 else given).detach().cpu().numpy()


def _checked(name: str, given: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Returns an array or tensor `[N, *shape]` as an array."""
    array = _array(name, given)
    if array.ndim != len(shape) + 1 or array.shape[1:] != shape or not len(array):
        expected = ", ".join(map(str, ("N", *shape)))
        raise ValueError(f"{name} have shape {list(array.shape)}: expected [{expected}], with N of at least 1")
    return array


def _chosen(classes: Classes | None) -> list[int | str]:
    """Returns names and numbers of classes."""
    if classes is None:
        return []
    # An array of names and numbers would be one of names.
    listed = classes if isinstance(classes, list | tuple) else np.atleast_1d(np.asarray(classes)).tolist()
    try:
        return [chosen if isinstance(chosen, str) else operator.index(chosen) for chosen in listed]
    except TypeError:
        raise ValueError(f"classes = {classes!r}: expected names or numbers of classes, as [3, 7]") from None


def _listed(given: str | Sequence[str]) -> list[str]:
    """Returns one string, or several, as a list."""
    return [given] if isinstance(given, str) else list(given)


def _check_at_least(smallest: int, **values: int) -> None:
    for name, value in values.items():
        if value < smallest:
            raise ValueError(f"{name} = {value}: expected {smallest} or more")
