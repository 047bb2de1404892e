"""gin: what can be bound, parsing, and the configuration saved with a run.

Models, objectives and the rest know nothing of gin; they are made configurable here, from outside.
"""

import dataclasses
import importlib
import inspect
import io
import pathlib
import pkgutil
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gin
from gin import config_parser
from pydantic import ConfigDict, InstanceOf, TypeAdapter, ValidationError
from upath import UPath

from jetformer import evaluators, objectives, optim
from jetformer.data import dataset
from jetformer.models import decoder, invertible, jet, jetformer, labelled, language_model, patches
from jetformer.sampling import guidance
from jetformer.storage import write_whole

CONFIG_FILE = "config.gin"  # in the workdir: all that was parsed, includes resolved
OPERATIVE_CONFIG_FILE = "operative_config.gin"  # in the workdir: all that was used, defaults included


def _evaluators() -> Iterator[type]:
    """All dataclasses of the files in `evaluators/`, so that a new evaluator is a new file there."""
    for file in pkgutil.iter_modules(evaluators.__path__):
        try:
            module = importlib.import_module(f"{evaluators.__name__}.{file.name}")
        except ImportError as error:
            raise ImportError(f"jetformer/evaluators/{file.name}.py cannot be imported: {error}") from error
        for value in vars(module).values():
            if file.name != "base" and dataclasses.is_dataclass(value) and value.__module__ == module.__name__:
                yield value


for _configurable in (
    *_evaluators(),
    decoder.Decoder,
    guidance.Guidance,
    invertible.IdentityFlow,
    invertible.LearnedProjection,
    invertible.PCAProjection,
    jet.Jet,
    jetformer.JetFormer,
    labelled.LabelledFlow,
    language_model.LanguageModel,
    objectives.JetFormerObjective,
    objectives.JetObjective,
    objectives.TextObjective,
    optim.make_optimizer,
    optim.make_schedule,
    patches.PatchPCA,
    patches.Patchify,
    dataset.Data,
    dataset.MixtureData,
):
    gin.external_configurable(_configurable, module=_configurable.__module__.rpartition(".")[2])

gin.add_config_file_search_path(str(pathlib.Path(__file__).parent.parent))
# gin would also look for files inside Python packages, takes experiments/ for one, and then fails without naming the
# file.
del gin.config._FILE_READERS[1:]


class ConfigError(ValueError):
    """A configuration that cannot be used. Its message is one line."""


@contextmanager
def gin_errors() -> Iterator[None]:
    """Turns what gin raises into a `ConfigError`: gin's messages are many lines long and of every type."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # whatever a constructor raises, it is about what it was given
        raise ConfigError(" ".join(str(error).split())) from error


def parse(
    gin_files: Sequence[str],
    gin_bindings: Sequence[str],
    saved: str | None = None,
    trust_imports: Sequence[str] = (),
) -> None:
    """Parses a saved configuration, then gin files, then bindings.

    Files are searched in the current directory and in the project's root.

    Args:
      gin_files, gin_bindings: the user's own: they may import any module.
      saved: text of a configuration, perhaps somebody else's: it may import only the modules of `trust_imports`. None:
        the first file takes its place.
      trust_imports: names of modules.

    Raises:
      ConfigError: for a file that does not exist, a syntax error, an unknown name, a macro without a value or use, or
        an import that is not trusted.
    """
    if saved is None and not gin_files:
        raise ConfigError("no experiment: give one with --gin_file=experiments/….gin")
    gin.clear_config()
    # gin takes a misspelt macro for a new one. Those of the first text are the experiment's own; what comes on top has
    # to set one of them, or one that is used.
    defined = lambda: set(re.findall(r"^(\w+) = ", gin.config_str(), flags=re.MULTILINE))
    with gin_errors():
        if saved is None:
            gin.parse_config_file(gin_files[0])
            gin_files = gin_files[1:]
        else:
            saved = io.StringIO(saved, newline=None).read()  # one kind of line ends, in the check and in gin
            _check_runs_nothing(saved, trust_imports)
            gin.parse_config(saved)
        known = defined()
        for file in gin_files:
            gin.parse_config_file(file)
        gin.parse_config(list(gin_bindings))
        gin.finalize()
    _check_values()
    known |= set(re.findall(r"%(\w+)", gin.config_str()))
    if unknown := sorted(defined() - known):
        raise ConfigError(f"nothing uses the macro {unknown[0]}; there are {', '.join(sorted(known)) or 'none'}")


class _Names(config_parser.ParserDelegate):
    """Reads references as their names: nothing is looked up, let alone called."""

    def configurable_reference(self, scoped_configurable_name, evaluate):
        return scoped_configurable_name

    def macro(self, macro_name):
        return macro_name


def _check_runs_nothing(text: str, trust_imports: Sequence[str]) -> None:
    """Checks that a configuration from elsewhere binds values, and imports only the modules that are trusted.

    With imports, among them gin's dynamic registration, a configuration can call any function of any module.

    Raises:
      ConfigError: if it imports another module or includes a file.
    """
    with gin_errors():
        statements = list(config_parser.ConfigParser(text, _Names()))
    for statement in statements:
        if isinstance(statement, config_parser.ImportStatement) and statement.module not in trust_imports:
            raise ConfigError(
                f"the saved configuration imports {statement.module}, which can run anything: if you trust where it is "
                f"from, pass --trust_imports={statement.module}"
            )
        if isinstance(statement, config_parser.IncludeStatement):
            raise ConfigError(f"the saved configuration includes {statement.filename}, which no run saves: remove that")


# An int is a float, but nothing else is turned into what an argument is annotated with.
_AS_ANNOTATED = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


def _without_macros(value: Any) -> Any:
    """Returns a bound value with its macros' values, and tuples in the place of lists."""
    if isinstance(value, gin.config.ConfigurableReference) and value.selector == "gin.macro":
        bound = gin.config._CONFIG.get((value.scopes[-1], "gin.macro"))
        return _without_macros(bound["value"]) if bound else value  # gin says so where it is used
    if isinstance(value, list | tuple):
        return tuple(map(_without_macros, value))
    if isinstance(value, dict):
        return {_without_macros(key): _without_macros(item) for key, item in value.items()}
    return value


def bindings() -> dict[str, str]:
    """Returns all bound values as text, by `Name.argument` or `scope/Name.argument`, with macros replaced."""
    found = {}
    for (scope, selector), values in gin.config._CONFIG.items():
        if selector != "gin.macro":
            name = f"{scope}/{selector.rpartition('.')[2]}".removeprefix("/")
            found |= {f"{name}.{argument}": repr(_without_macros(value)) for argument, value in values.items()}
    return dict(sorted(found.items()))


def _check_values() -> None:
    """Checks all bound literals against the annotations of the arguments.

    Raises:
      ConfigError: for a value of another type or out of range.
    """
    for (_, selector), values in gin.config._CONFIG.items():
        function = gin.config._REGISTRY.get_match(selector).wrapped
        if not (getattr(function, "__module__", None) or "").startswith("jetformer."):
            continue  # a user's own
        hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function, include_extras=True)
        for name in values.keys() & hints.keys():
            value = _without_macros(values[name])
            if any(gin.config.iterate_references(value)):
                continue  # who is given what a reference stands for checks it
            hint, how = hints[name], _AS_ANNOTATED
            if dataclasses.is_dataclass(hint):
                hint, how = InstanceOf[hint], None
            try:
                TypeAdapter(hint, config=how).validate_python(value)
            except ValidationError as error:
                found = dict.fromkeys(e["msg"].replace("Input should be", "it should be") for e in error.errors())
                argument = f"{selector.rpartition('.')[2]}.{name}"
                raise ConfigError(f"{argument} = {value!r}: {', or '.join(found)}") from error


def call(function: Callable) -> Any:
    """Calls a gin-configured function or class with what is bound to it.

    Raises:
      ConfigError: for missing arguments, and for what the function raises as ValueError itself.
    """
    with gin_errors():
        return function()


# What of a model's arguments may change between two parts of a run: it changes no function of the parameters.
_NOT_ARCHITECTURE = ("dropout", "head_block", "head_dtype", "kmeans_init", "mean_init_std", "path", "scale_init")


_MODELS = (
    *(jetformer.JetFormer, language_model.LanguageModel, labelled.LabelledFlow, jet.Jet, decoder.Decoder),
    *(patches.Patchify, patches.PatchPCA, invertible.LearnedProjection, invertible.PCAProjection),
)


def architecture() -> dict[str, str]:
    """What the models are built with, by `Model.argument`, defaults included; not all of it shows in a checkpoint."""
    arguments = {}
    for model in _MODELS:
        parameters = inspect.signature(model).parameters.values()
        values = {p.name: p.default for p in parameters if p.default is not p.empty}
        values |= gin.get_bindings(model.__name__)
        for name, value in values.items():
            if name not in _NOT_ARCHITECTURE:
                value = tuple(value) if isinstance(value, list) else value
                arguments[f"{model.__name__}.{name}"] = getattr(value, "__name__", None) or repr(value)
    return arguments


def save(workdir: UPath) -> None:
    """Writes the parsed and the operative configuration into the workdir."""
    # Whole: an evaluation job may be reading them.
    write_whole(workdir / CONFIG_FILE, gin.config_str())
    write_whole(workdir / OPERATIVE_CONFIG_FILE, gin.operative_config_str())
