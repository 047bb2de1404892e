"""Parses preprocessing strings, without TensorFlow, which `preprocess` needs to run them."""

import ast

# The ops that tokenize a text.
TOKENIZING = ("tok", "caption")


def calls(pp: str) -> list[ast.expr]:
    """Returns the ops of a string as Python names and calls: `a|b(1)` is a Python expression.

    Raises:
      ValueError: it cannot be parsed.
    """
    if not pp.strip():
        return []
    try:
        node = ast.parse(f"({pp})", mode="eval").body
    except SyntaxError as e:
        raise ValueError(
            f"preprocessing string {pp!r} cannot be parsed ({e.msg}): "
            'write ops separated by "|", e.g. decode|resize(64)|flip_lr'
        ) from None
    found = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        found.append(node.right)
        node = node.left
    return [node, *reversed(found)]


def name_of(call: ast.expr) -> str | None:
    """Returns the name of an op; None if the expression is not an op."""
    return getattr(getattr(call, "func", call), "id", None)


def argument(call: ast.expr, name: str, place: int) -> ast.expr | None:
    """Returns an op's argument, given by name or by position; None if it is not given."""
    if not isinstance(call, ast.Call):
        return None
    by_name = {keyword.arg: keyword.value for keyword in call.keywords}
    return by_name.get(name, call.args[place] if place < len(call.args) else None)


def background_of(pp: str) -> tuple[int, int, int]:
    """Returns the RGB background of transparent pixels that the `decode` of a string sets; white by default."""
    decoding = [call for call in calls(pp) if name_of(call) == "decode"]
    given = argument(decoding[0], "background", 1) if decoding else None
    return (255, 255, 255) if given is None else ast.literal_eval(given)


def tokenizer_in(ops: list[ast.expr]) -> ast.Constant | None:
    """Returns the argument with the path of the tokenizer among some ops; None if they tokenize nothing.

    Raises:
      ValueError: the argument is missing, or several ops tokenize.
    """
    tokenizing = [call for call in ops if name_of(call) in TOKENIZING]
    if not tokenizing:
        return None
    model = argument(tokenizing[0], "model", 0)
    if model is None:
        name = name_of(tokenizing[0])
        raise ValueError(f"preprocessing op {name!r} has no tokenizer: add one, e.g. {name}('my.model', 64)")
    if len(tokenizing) > 1:
        raise ValueError(
            f"the preprocessing string tokenizes several times: keep one of {', '.join(map(ast.unparse, tokenizing))}"
        )
    return model


def tokenizer_of(pp: str) -> str | None:
    """Returns the path of a string's tokenizer; None if it tokenizes nothing; see `tokenizer_in`."""
    model = tokenizer_in(calls(pp))
    return None if model is None else model.value


def text_length_of(pp: str) -> int:
    """Returns T, the tokens of each text that a string makes, with end-of-text; 1 for labels.

    Raises:
      ValueError: the string does not determine it.
    """
    length = None
    for call in calls(pp):
        name = name_of(call)
        if name == "label_as_text":
            length = 1
        elif name in ("tolen", *TOKENIZING):
            given = argument(call, "length", 0 if name == "tolen" else 1)
            # `tolen` of a mask has the length of the text.
            length = length if given is None else given.value
    if length is None:
        raise ValueError(
            "the preprocessing string does not determine the length of texts: give caption or tok a length"
        )
    return length
