"""Makes a state dict from weights of another implementation, by a table of the source of each tensor."""

import dataclasses
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from jetformer.convert.weights import Weights
from jetformer.models.jet import Jet, Predictor

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """The source of a tensor.

    Attributes:
      shapes: shapes of the tensors that it is made of, by their names in the source.
      convert: applied to each of them before they are concatenated along the first axis. The message of its ValueError
        completes a sentence that begins with the tensor's name.
    """

    shapes: dict[str, Shape]
    convert: Callable[[Tensor], Tensor] = lambda x: x


# By the names of the model's state dict. A tensor that the source lacks is its own entry.
Table = dict[str, Source | Tensor]


def assemble(
    table: Table, theirs: Mapping[str, Tensor], model: str, unused: Collection[str] = (), partial: bool = False
) -> dict[str, Tensor]:
    """Returns the state dict that a table describes.

    Args:
      table: the source of each tensor.
      theirs: tensors by their names in the source.
      model: name of the model, for messages.
      unused: names in `theirs` to ignore.
      partial: leave out tensors whose source is missing.

    Raises:
      ValueError: for a missing tensor, another shape, or a tensor that the table lacks.
    """
    sources = {name: source for name, source in table.items() if isinstance(source, Source)}
    expected = {name: shape for source in sources.values() for name, shape in source.shapes.items()}
    extra = [name for name in theirs if name not in expected and name not in unused]
    if extra:
        raise ValueError(
            f"{extra[0]} has no place in {model}{_and_more(extra)}: its shape is {list(theirs[extra[0]].shape)}"
        )
    for name, shape in expected.items():
        if name in theirs and tuple(theirs[name].shape) != shape:
            raise ValueError(f"{name} has shape {list(theirs[name].shape)}, but {model} needs {list(shape)}")
    missing = [] if partial else [name for name in expected if name not in theirs]
    if missing:
        raise ValueError(
            f"{missing[0]} is missing{_and_more(missing)}: {model} needs it with shape {list(expected[missing[0]])}"
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


def state_dicts(
    table: Table, unused: Collection[str], weights: Weights, model: nn.Module, format: str
) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors of a checkpoint: those of the model as "model", and of its moving average, if there is one,
    as "ema".

    Args:
      table, unused: see `assemble`.
      weights: as they were read.
      model: may be on the meta device.
      format: of the weights, for messages.

    Raises:
      ValueError: if they do not fit, see `assemble` and `fit`.
    """
    kind = type(model).__name__
    state = assemble(table, weights.tensors, kind, unused)
    states = {"model": fit(state, model.state_dict(), model, f"weights of {format}")}
    if weights.ema is not None:
        parameters = dict(model.named_parameters())
        table = {name: entry for name, entry in table.items() if name in parameters}
        average = assemble(table, weights.ema, f"the moving average of {kind}", unused)
        states["ema"] = fit(average, parameters, model, f"moving averages of {format}")
    return states


def fit(state: Mapping[str, Tensor], names: Collection[str], model: nn.Module, what: str) -> dict[str, Tensor]:
    """Returns tensors of a state dict in the model's dtypes.

    Args:
      state: a state dict.
      names: the model's tensors to return.
      model: may be on the meta device.
      what: names the weights in messages.

    Raises:
      ValueError: if a tensor is missing or has another shape, because the model has parts that the table lacks.
    """
    fitted = {}
    for name, expected in model.state_dict().items():
        if name not in names:
            continue
        if name not in state:
            raise ValueError(
                f"{what} lack {name} {list(expected.shape)}: the {type(model).__name__} has a part that their format "
                "does not have"
            )
        if state[name].shape != expected.shape:
            raise ValueError(
                f"{name} has shape {list(state[name].shape)}, but the {type(model).__name__} needs "
                f"{list(expected.shape)}"
            )
        fitted[name] = state[name].to(expected.dtype)
    return fitted


def predictors(flow: Jet) -> list[Predictor]:
    """Returns the predictors of a flow's couplings.

    Raises:
      ValueError: if they are not ViTs.
    """
    for coupling in flow.couplings:
        if not isinstance(coupling.dnn, Predictor):
            raise ValueError("weights of other implementations need ViTs as predictors: leave Jet.predictor at 'vit'")
    return [coupling.dnn for coupling in flow.couplings]


def predictor_table(
    ours: str, theirs: str, dnn: Predictor, *, posemb: str, norm: str, blocks: str, layers: Mapping[str, str]
) -> Table:
    """Returns the table of a coupling's ViT in another PyTorch implementation.

    Args:
      ours, theirs: prefixes of all names.
      dnn: the ViT.
      posemb, norm, blocks: names of its position embedding, its final norm, and the list of its blocks.
      layers: names of a block's layers by ours, with {} in the place of "weight" or "bias".
    """
    names = {"posemb": posemb}
    for part in ("weight", "bias"):
        names |= {f"{name}.{part}": f"{name}.{part}" for name in ("init_proj", "final_proj")}
        names[f"vit.norm.{part}"] = f"{norm}.{part}"
        for i in range(len(dnn.vit.blocks)):
            for name, other in layers.items():
                names[f"vit.blocks.{i}.{name}.{part}"] = f"{blocks}.{i}.{other.format(part)}"
    shapes = {name: tuple(p.shape) for name, p in dnn.named_parameters()}
    return {f"{ours}.{name}": Source({f"{theirs}.{other}": shapes[name]}) for name, other in names.items()}


def permutation(mask: Tensor) -> Tensor:
    """Returns a permutation matrix `[N, N]`, whose column j selects entry j of the result, as indices int64 `[N]`.

    Raises:
      ValueError: if it is not a permutation matrix.
    """
    ones_and_zeros = ((mask == 0) | (mask == 1)).all()
    if not (ones_and_zeros and (mask.sum(0) == 1).all() and (mask.sum(1) == 1).all()):
        raise ValueError("is not a permutation matrix, with one 1 in each row and each column")
    return mask.argmax(0)


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
