"""Resolves the classes that `Data.classes` chooses. No TensorFlow here."""

import collections
import re
from collections.abc import Sequence

from jetformer.class_names import some


def resolve_classes(classes: Sequence[int | str], names: Sequence[str] | None, dataset: str) -> list[int]:
    """Returns the labels of chosen classes, in the order chosen.

    Args:
      classes: each is a name, a label, or a range of labels such as "10:20" (without 20).
      names: of all classes of the dataset by label; None if it has no label.
      dataset: its name, for messages.

    Raises:
      ValueError: the dataset has no label, a class does not exist or is chosen twice, or none is chosen.
    """
    if names is None:
        raise ValueError(f"dataset {dataset!r} has no label, so Data.classes cannot select from it: unset it")
    numbers = {name: i for i, name in enumerate(names)}
    labels: list[int] = []
    for chosen in classes:
        if chosen in numbers:
            labels.append(numbers[chosen])
        elif isinstance(chosen, int) and 0 <= chosen < len(names):
            labels.append(chosen)
        elif isinstance(chosen, str) and (found := re.fullmatch(r"(\d*):(\d*)", chosen)):
            start, stop = int(found[1] or 0), int(found[2] or len(names))
            if not start < stop <= len(names):
                raise ValueError(f'Data.classes: {dataset!r} has no classes {chosen!r}, its range is "0:{len(names)}"')
            labels.extend(range(start, stop))
        else:
            raise ValueError(
                f"Data.classes: {dataset!r} has no class {chosen!r}: it has {len(names)}, with labels 0 to "
                f"{len(names) - 1} and names such as {some(chosen, names)}"
            )
    if not labels:
        raise ValueError("Data.classes is empty: choose a class, or unset it to read all")
    for label, count in collections.Counter(labels).items():
        if count > 1:
            raise ValueError(f"Data.classes: class {names[label]!r} (label {label}) is chosen {count} times")
    return labels
