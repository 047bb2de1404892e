"""Weights of another implementation to a model's state dict, by a table that says where each tensor comes from."""

import dataclasses
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from jetformer.models.jet import Jet, Predictor

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a tensor comes from.

    Attributes:
      shapes: the tensors that it is made of, by their names over there, with their shapes.
      convert: what each of them goes through before all are concatenated along the first axis. What it raises as
        ValueError begins with a verb, and is about the tensor.
    """

    shapes: dict[str, Shape]
    convert: Callable[[Tensor], Tensor] = lambda x: x


# By the names of our state dict; a tensor that is not among theirs stands there itself.
Table = dict[str, Source | Tensor]


def assemble(
    table: Table, theirs: Mapping[str, Tensor], model: str, unused: Collection[str] = (), partial: bool = False
) -> dict[str, Tensor]:
    """Makes a state dict.

    Args:
      table: where its tensors come from.
      theirs: tensors by their names over there.
      model: what the table is of, for messages.
      unused: names that may be among `theirs`, and make no difference.
      partial: leave out what `theirs` has nothing for.

    Raises:
      ValueError: for a tensor that is missing, that has another shape, or that has no place in the table; the message
        is one line, with its name and the shape it should have.
    """
    sources = {name: source for name, source in table.items() if isinstance(source, Source)}
    expected = {name: shape for source in sources.values() for name, shape in source.shapes.items()}
    extra = [name for name in theirs if name not in expected and name not in unused]
    if extra:
        raise ValueError(
            f"{extra[0]} has no place in {model}{_and_more(extra)}: its shape is {shown(theirs[extra[0]])}"
        )
    for name, shape in expected.items():
        if name in theirs and tuple(theirs[name].shape) != shape:
            raise ValueError(f"{name} has shape {shown(theirs[name])}, and {model} needs {list(shape)}")
    missing = [] if partial else [name for name in expected if name not in theirs]
    if missing:
        raise ValueError(
            f"{missing[0]} is missing{_and_more(missing)}: {model} needs it, in shape {list(expected[missing[0]])}"
        )
    state = {} if partial else {name: value for name, value in table.items() if isinstance(value, Tensor)}
    for ours, source in sources.items():
        parts = []
        for name in source.shapes:
            if name in theirs:
                try:
                    parts.append(source.convert(theirs[name]))
                except ValueError as error:
                    raise ValueError(f"{name} {error}") from error
        if parts:
            state[ours] = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)
    return state


def fit(state: Mapping[str, Tensor], names: Collection[str], model: nn.Module, what: str) -> dict[str, Tensor]:
    """The tensors `names` of `state` as the model has them: in its types.

    Args:
      state: a state dict.
      names: which tensors of the model it has to hold.
      model: the model; it may be on the meta device.
      what: whose weights these are, for messages.

    Raises:
      ValueError: if a tensor is missing, or has another shape; only where a table does not fit the model.
    """
    fitted = {}
    for name, expected in model.state_dict().items():
        if name not in names:
            continue
        if name not in state:
            raise ValueError(
                f"{what} have nothing for {name} {list(expected.shape)}: this {type(model).__name__} has a part that "
                "they do not know"
            )
        if state[name].shape != expected.shape:
            raise ValueError(
                f"{name} has shape {shown(state[name])}, and this {type(model).__name__} needs {list(expected.shape)}"
            )
        fitted[name] = state[name].to(expected.dtype)
    return fitted


def predictors(flow: Jet) -> list[Predictor]:
    """What the couplings of a flow predict with.

    Raises:
      ValueError: if that is no ViT.
    """
    for coupling in flow.couplings:
        if not isinstance(coupling.dnn, Predictor):
            raise ValueError("other implementations' weights are of ViTs: leave Jet.predictor at 'vit'")
    return [coupling.dnn for coupling in flow.couplings]


def permutation(mask: Tensor) -> Tensor:
    """A permutation matrix `[N, N]`, whose column j picks what comes j-th, as indices int64 `[N]`.

    Raises:
      ValueError: if it is none.
    """
    ones_and_zeros = ((mask == 0) | (mask == 1)).all()
    if not (ones_and_zeros and (mask.sum(0) == 1).all() and (mask.sum(1) == 1).all()):
        raise ValueError("is no permutation matrix, as a coupling needs it: one 1 in each row and each column")
    return mask.argmax(0)


def shown(x: Tensor) -> str:
    """A tensor's shape, for messages."""
    return str(list(x.shape))


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
