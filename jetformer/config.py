"""gin: what is configurable, how configurations are parsed and checked, and what a run saves of them.

Models, objectives and the rest do not know gin: they are made configurable here, from outside.
"""

import dataclasses
import importlib
import inspect
import io
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
from jetformer.models import (
    decoder,
    factored_prior,
    flow_ablations,
    invertible,
    jetformer,
    labelled,
    language_model,
    patches,
    student,
    tarflow,
)
from jetformer.sampling import guidance, jacobi
from jetformer.storage import PLACES, write_whole

CONFIG_FILE = "config.gin"  # in the workdir: everything that was parsed, with includes resolved
OPERATIVE_CONFIG_FILE = "operative_config.gin"  # in the workdir: everything that was used, with defaults


def _evaluators() -> Iterator[type]:
    """Yields all dataclasses of the files in `evaluators/`: a new evaluator is a new file there."""
    for file in pkgutil.iter_modules(evaluators.__path__):
        try:
            module = importlib.import_module(f"{evaluators.__name__}.{file.name}")
        except ImportError as error:
            raise ImportError(f"jetformer/evaluators/{file.name}.py cannot be imported: {error}") from error
        for value in vars(module).values():
            is_own = dataclasses.is_dataclass(value) and value.__module__ == module.__name__
            if is_own and file.name not in ("base", "context"):
                yield value


for _configurable in (
    *_evaluators(),
    decoder.Decoder,
    factored_prior.FactoredPrior,
    guidance.Guidance,
    invertible.IdentityFlow,
    invertible.LearnedProjection,
    invertible.PCAProjection,
    jacobi.Jacobi,
    jetformer.JetFormer,
    labelled.LabelledFlow,
    language_model.LanguageModel,
    objectives.DistillObjective,
    objectives.JetFormerObjective,
    objectives.JetObjective,
    objectives.TextObjective,
    optim.make_optimizer,
    optim.make_schedule,
    patches.PatchPCA,
    patches.Patchify,
    student.Student,
    tarflow.TarFlow,
    dataset.Data,
    dataset.MixtureData,
):
    gin.external_configurable(_configurable, module=_configurable.__module__.rpartition(".")[2])
gin.external_configurable(flow_ablations.make_jet, name="Jet", module="jet")

for _place in PLACES:
    gin.add_config_file_search_path(str(_place))
# gin would also search in Python packages, take experiments/ for one, and then fail without naming the file.
del gin.config._FILE_READERS[1:]


class ConfigError(ValueError):
    """A configuration that cannot be used. Its message is one line."""


@contextmanager
def separate() -> Iterator[None]:
    """Restores the caller's configuration, and whether it is locked, when the context ends."""
    parts = [gin.config._CONFIG, gin.config._OPERATIVE_CONFIG, gin.config._SINGLETONS, gin.config._IMPORTS]
    kept, locked = [part.copy() for part in parts], gin.config_is_locked()
    try:
        yield
    finally:
        for part, before in zip(parts, kept, strict=True):
            part.clear()
            part.update(before)
        gin.config._set_config_is_locked(locked)


@contextmanager
def gin_errors() -> Iterator[None]:
    """Turns gin's errors, which have many lines and all types, into a `ConfigError`."""
    try:
        yield
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        message = " ".join(str(error).split())
        raise ConfigError(f"{message}: install it, or put the directory of its file on PYTHONPATH") from error
    except Exception as error:  # of any type: a constructor complains about its arguments
        raise ConfigError(" ".join(str(error).split())) from error


def parse(
    gin_files: Sequence[str],
    gin_bindings: Sequence[str],
    saved: str | None = None,
    trust_imports: Sequence[str] = (),
) -> None:
    """Parses a saved configuration, then gin files, then bindings.

    Files are searched for in the current directory and in `storage.PLACES`: digits.gin is experiments/digits.gin.

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
    """Reads references as their names, without looking anything up."""

    def configurable_reference(self, scoped_configurable_name, evaluate):
        return scoped_configurable_name

    def macro(self, macro_name):
        return macro_name


def _check_runs_nothing(text: str, trust_imports: Sequence[str]) -> None:
    """Checks that a configuration from elsewhere imports only trusted modules.

    An import, gin's dynamic registration among them, lets a configuration call any function of any module.

    Raises:
      ConfigError: if it imports another module or includes a file.
    """
    with gin_errors():
        statements = list(config_parser.ConfigParser(text, _Names()))
    for statement in statements:
        if isinstance(statement, config_parser.ImportStatement) and statement.module not in trust_imports:
            raise ConfigError(
                f"the saved configuration imports {statement.module}, which can run any code: if you trust its source, "
                f"pass --trust_imports={statement.module}"
            )
        if isinstance(statement, config_parser.IncludeStatement):
            raise ConfigError(f"the saved configuration includes {statement.filename}, but a run saves none: remove it")


# An int is accepted for a float; nothing else is converted.
_AS_ANNOTATED = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


def _without_macros(value: Any) -> Any:
    """Returns a bound value with macros replaced by their values, and lists by tuples."""
    if isinstance(value, gin.config.ConfigurableReference) and value.selector == "gin.macro":
        bound = gin.config._CONFIG.get((value.scopes[-1], "gin.macro"))
        return _without_macros(bound["value"]) if bound else value  # gin raises where it is used
    if isinstance(value, list | tuple):
        return tuple(map(_without_macros, value))
    if isinstance(value, dict):
        return {_without_macros(key): _without_macros(item) for key, item in value.items()}
    return value


def bindings() -> dict[str, str]:
    """Returns all bound values as text by `Name.argument` or `scope/Name.argument`, with macros replaced."""
    found = {}
    for (scope, selector), values in gin.config._CONFIG.items():
        if selector != "gin.macro":
            name = f"{scope}/{selector.rpartition('.')[2]}".removeprefix("/")
            found |= {f"{name}.{argument}": repr(_without_macros(value)) for argument, value in values.items()}
    return dict(sorted(found.items()))


def _check_values() -> None:
    """Checks all bound literals against the annotations of their arguments.

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
                continue  # its receiver checks it
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
    """Calls a configurable function or class with its bindings.

    Raises:
      ConfigError: for missing arguments, and for every error of the function.
    """
    with gin_errors():
        return function()


# Arguments of models that may change when a run resumes: the function that the parameters define stays the same.
_NOT_ARCHITECTURE = (
    "dropout",
    "head_block",
    "head_dtype",
    "inverse_method",
    "student",
    "kmeans_init",
    "mean_init_std",
    "path",
    "scale_init",
)
_MODELS = {
    "JetFormer": jetformer.JetFormer,
    "LanguageModel": language_model.LanguageModel,
    "LabelledFlow": labelled.LabelledFlow,
    "Jet": flow_ablations.make_jet,
    "TarFlow": tarflow.TarFlow,
    "Student": student.Student,
    "Decoder": decoder.Decoder,
    "Patchify": patches.Patchify,
    "PatchPCA": patches.PatchPCA,
    "LearnedProjection": invertible.LearnedProjection,
    "PCAProjection": invertible.PCAProjection,
    "FactoredPrior": factored_prior.FactoredPrior,
}


def architecture() -> dict[str, str]:
    """Returns the arguments of all models by `Model.argument`, with defaults: tensors do not determine them. Those of
    `Student` are left out where a flow has none, which may get students later."""
    arguments = {}
    has_students = gin.get_bindings("TarFlow", resolve_references=False).get("student") is not None
    for model, function in _MODELS.items():
        if model == "Student" and not has_students:
            continue
        parameters = inspect.signature(function).parameters.values()
        values = {p.name: p.default for p in parameters if p.default is not p.empty}
        values |= gin.get_bindings(model, resolve_references=False)
        for name, value in values.items():
            if name not in _NOT_ARCHITECTURE:
                value = _without_macros(value)
                is_reference = isinstance(value, gin.config.ConfigurableReference)
                arguments[f"{model}.{name}"] = value.selector.rpartition(".")[2] if is_reference else repr(value)
    return arguments


def save(workdir: UPath) -> None:
    """Writes the parsed and the operative configuration to the workdir, atomically: a job may be reading them."""
    write_whole(workdir / CONFIG_FILE, gin.config_str())
    write_whole(workdir / OPERATIVE_CONFIG_FILE, gin.operative_config_str())
