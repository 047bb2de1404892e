"""A run as safetensors with a model card, for the Hugging Face Hub, and back.

model.safetensors   parameters and buffers     ema.safetensors   the moving average, if there is one
config.gin          the experiment             tokenizer.model   of a model of texts
README.md           the model card             classes.json      names of classes, if the data has any
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import yaml
from safetensors.torch import save
from torch import Tensor, nn
from upath import UPath

import jetformer
from jetformer import class_names, config
from jetformer.class_names import CLASSES_FILE
from jetformer.convert.pickles import load_safetensors
from jetformer.convert.sources import Source, Table
from jetformer.convert.weights import Weights
from jetformer.data.tokenizer import Tokenizer
from jetformer.evaluators.results import RESULTS_FILE
from jetformer.models.jet import Jet
from jetformer.models.jetformer import JetFormer
from jetformer.models.labelled import LabelledFlow
from jetformer.models.language_model import LanguageModel
from jetformer.models.tarflow import TarFlow
from jetformer.run_files import TOKENIZER_FILE

MODEL_FILE, EMA_FILE, CARD_FILE = "model.safetensors", "ema.safetensors", "README.md"
PATTERNS = ("*.safetensors", "*.gin", "*.model", CLASSES_FILE)  # of the files that `read` reads
MODELS = (nn.Module,)

_LISTED = 100  # classes on a card

_PAPERS = {
    "JetFormer": "https://arxiv.org/abs/2411.19722",
    "Jet": "https://arxiv.org/abs/2412.15129",
    "TarFlow": "https://arxiv.org/abs/2412.06329",
}


def write(
    directory: UPath,
    tensors: Mapping[str, Mapping[str, Tensor]],
    *,
    step: int,
    files: Mapping[str, bytes],
    card: str,
) -> None:
    """Writes a run.

    Args:
      directory: local.
      tensors: the state dict as "model", and the moving average as "ema" if there is one.
      step: of training.
      files: contents of further files by name.
      card: the model card.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, file in (("model", MODEL_FILE), ("ema", EMA_FILE)):
        if name in tensors:
            content = save(dict(tensors[name]), metadata={"format": "pt", "step": str(step)})
            (directory / file).write_bytes(content)  # `save_file` would ignore the umask
    for name, content in files.items():
        (directory / name).write_bytes(content)
    (directory / CARD_FILE).write_text(card, encoding="utf-8")


def read(directory: UPath) -> Weights:
    """Reads what `write` wrote.

    Raises:
      ValueError: if a file is missing or damaged.
    """
    for name in (MODEL_FILE, config.CONFIG_FILE):
        if not (directory / name).exists():
            raise ValueError(f"{directory} has no {name}: expected a directory that --to=safetensors wrote")
    tensors, notes = load_safetensors(str(directory / MODEL_FILE))
    ema = load_safetensors(str(directory / EMA_FILE))[0] if (directory / EMA_FILE).exists() else None
    step = notes.get("step", "")
    return Weights(
        tensors,
        gin=(directory / config.CONFIG_FILE).read_text(),
        ema=ema,
        step=int(step) if step.isdecimal() else None,
        tokenizer=tokenizer_of(directory),
        class_names=class_names.saved(directory),
    )


def tokenizer_of(directory: UPath) -> bytes | None:
    """Returns the tokenizer of a run; None if it has none.

    Raises:
      ValueError: if the file is something else. It may be a link to a private file, which must not be copied or
        uploaded.
    """
    file = directory / TOKENIZER_FILE
    if not file.exists():
        return None
    content = file.read_bytes()
    try:
        Tokenizer(content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}: replace it by the tokenizer of the run") from None
    return content


def table(model: nn.Module, weights: Weights) -> tuple[Table, set[str]]:
    """Returns the source of each tensor of a model: the tensor with its name."""
    del weights
    return {name: Source({name: tuple(x.shape)}) for name, x in model.state_dict().items()}, set()


def evaluations(workdir: UPath, step: int) -> dict[str, float]:
    """Returns the metrics of all evaluators at a step by tag, except those that are not finite."""
    found: dict[str, float] = {}
    if not workdir.exists():
        return found
    for directory in sorted(workdir.iterdir()):
        file = directory / RESULTS_FILE
        if directory.name.startswith("eval_") and file.exists():
            for line in file.read_text().splitlines():
                record = json.loads(line)
                if record["step"] == step:
                    found |= {tag: value for tag, value in record.items() if "/" in tag and value is not None}
    return found


def card(
    model: nn.Module,
    *,
    name: str,
    config_text: str,
    step: int,
    metrics: Mapping[str, float],
    dataset: str,
    texts: bool,
    ema: bool,
    names: Sequence[str] | None = None,
    repo: str | None = None,
    license: str | None = None,
) -> str:
    """Returns a model card: a YAML header and Markdown.

    Args:
      model: may be on the meta device.
      name: title of the card.
      config_text: the gin configuration.
      step: of training.
      metrics: by tag, see `evaluations`.
      dataset: name of the training data.
      texts: whether the model is of texts.
      ema: whether there is a moving average.
      names: of the classes of the data; None: unknown.
      repo: repository on the Hub; None for none.
      license: of the weights; None for none.
    """
    kind = type(model).__name__
    header = {
        **({"license": license} if license else {}),
        "library_name": "jetformer",
        "pipeline_tag": _pipeline(model, texts),
        "tags": ["jetformer", "pytorch", *_tags(model)],
    }
    if metrics:
        result = {
            "task": {"type": header["pipeline_tag"]},
            "dataset": {"name": dataset, "type": re.sub(r"\W+", "_", dataset)},
            "metrics": [
                {"type": tag.rpartition("/")[2], "name": tag, "value": value} for tag, value in metrics.items()
            ],
        }
        header["model-index"] = [{"name": name, "results": [result]}]
    paper = f" ([paper]({_PAPERS[kind]}))" if kind in _PAPERS else ""
    parameters = sum(p.numel() for p in model.parameters())
    source = f"--hf_repo={repo}" if repo else "--path=DIRECTORY"
    by_class = isinstance(model, LabelledFlow) or (isinstance(model, JetFormer) and not texts)
    classes = (names if by_class else None) or ()
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {name}",
        "",
        f"A {kind}{paper} of {parameters:,} parameters, trained on `{dataset}` for {step:,} steps with jetformer "
        f"{jetformer.__version__}. `{MODEL_FILE}` holds its parameters"
        + (f", `{EMA_FILE}` their moving average, which samples and metrics use." if ema else "."),
        "",
        "```bash",
        f"python -m jetformer.convert --from=safetensors {source} --out=WORKDIR",
        *_commands(model, texts, classes),
        "```",
        "",
        *_table(metrics),
        *_classes(classes),
        "## Configuration",
        "",
        "```",
        config_text.strip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _pipeline(model: nn.Module, texts: bool) -> str:
    if isinstance(model, LanguageModel):
        return "text-generation"
    return "text-to-image" if texts and isinstance(model, JetFormer) else "unconditional-image-generation"


def _tags(model: nn.Module) -> Iterator[str]:
    if any(isinstance(module, Jet | TarFlow) for module in model.modules()):
        yield "normalizing-flow"
    if isinstance(model, JetFormer | LanguageModel):
        yield "autoregressive"


def _commands(model: nn.Module, texts: bool, classes: Sequence[str]) -> Iterator[str]:
    condition = ""
    if isinstance(model, JetFormer | LanguageModel):
        plain = [name for name in classes if re.fullmatch(r"[\w-]+", name)][:2]
        condition = '--prompt="…" ' if texts else f"--classes={','.join(plain) or '0,1'} "
    yield f"python -m jetformer.sample --workdir=WORKDIR {condition}--out=SAMPLES"
    yield "python -m jetformer.evaluate --workdir=WORKDIR --once"


def _classes(names: Sequence[str]) -> Collection[str]:
    if all(name == str(label) for label, name in enumerate(names)):
        return ()
    listed = ", ".join(f"{label} {name}" for label, name in enumerate(names[:_LISTED]))
    more = f", … (all {len(names):,} are in `{CLASSES_FILE}`)" if len(names) > _LISTED else ""
    return "## Classes", "", listed + more, ""


def _table(metrics: Mapping[str, float]) -> Collection[str]:
    if not metrics:
        return ()
    rows = (f"| {tag} | {value:.4g} |" for tag, value in metrics.items())
    return ("## Evaluation", "", "| metric | value |", "| --- | ---: |", *rows, "")
