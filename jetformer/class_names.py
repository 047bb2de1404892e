"""Names of classes: in a run's workdir, on pictures, and as what users ask for."""

import difflib
import json
from collections.abc import Sequence

from upath import UPath

from jetformer.storage import write_whole

CLASSES_FILE = "classes.json"  # in the workdir: the names by label, if the data has any


def saved(directory: UPath) -> tuple[str, ...] | None:
    """Returns the names of classes by label that a workdir holds; None if it holds none, as a converted one or that of
    an older run.

    Raises:
      ValueError: if the file is damaged.
    """
    file = directory / CLASSES_FILE
    if not file.exists():
        return None
    try:
        names = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): delete it") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file} is damaged (it is no list of names): delete it")
    return tuple(names)


def save(directory: UPath, names: Sequence[str]) -> None:
    """Writes the names of classes by label into a workdir."""
    write_whole(directory / CLASSES_FILE, json.dumps(names, indent=1))


def shown(label: int, names: Sequence[str] | None) -> str:
    """Returns a class as it is shown: by its name if that tells it apart, else also by its label."""
    if names is None or not 0 <= label < len(names) or names[label] == str(label):
        return f"class {label}"
    name = names[label]
    return f"{name} (class {label})" if name.isdecimal() or names.count(name) > 1 else name


def resolve(classes: Sequence[int | str], names: Sequence[str] | None) -> list[int]:
    """Returns the labels of classes.

    Args:
      classes: each is a name, or a label as a number or text; a name takes precedence, and stands for the first class
        that has it.
      names: by label; None if unknown.

    Raises:
      ValueError: for an unknown name, or any name if they are unknown.
    """
    numbers = {name.strip(): label for label, name in reversed(list(enumerate(names or ())))}
    labels = []
    for chosen in classes:
        if not isinstance(chosen, str):
            labels.append(chosen)
        elif chosen.strip() in numbers:
            labels.append(numbers[chosen.strip()])
        elif chosen.strip().isdecimal():
            labels.append(int(chosen))
        elif names is None:
            raise ValueError(f"{chosen!r} is not a class: the names of classes are unknown, so give numbers, as 0,1,2")
        else:
            raise ValueError(f"there is no class {chosen!r}: the model has {len(names)}, such as {some(chosen, names)}")
    return labels


def some(chosen: int | str, names: Sequence[str]) -> str:
    """Returns some of the names for a message: those close to `chosen`, else the first."""
    return ", ".join(difflib.get_close_matches(str(chosen), names, 3) or names[:3])
