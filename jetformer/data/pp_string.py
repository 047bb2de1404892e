"""Preprocessing strings as text: what they say, without TensorFlow, which `preprocess` runs them with."""

import ast

# The ops that make tokens of a text.
TOKENIZING = ("tok", "caption")


def calls(pp: str) -> list[ast.expr]:
    """The ops of a string as Python names and calls: `a|b(1)` is a Python expression, so Python splits it.

    Raises:
      ValueError: if it cannot be read.
    """
    if not pp.strip():
        return []
    try:
        node = ast.parse(f"({pp})", mode="eval").body
    except SyntaxError as e:
        raise ValueError(
            f"preprocessing string {pp!r} cannot be read ({e.msg}): "
            'write ops separated by "|", e.g. decode|resize(64)|flip_lr'
        ) from None
    found = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        found.append(node.right)
        node = node.left
    return [node, *reversed(found)]


def name_of(call: ast.expr) -> str | None:
    """The name of an op; None for what is no op."""
    return getattr(getattr(call, "func", call), "id", None)


def argument(call: ast.expr, name: str, place: int) -> ast.expr | None:
    """An op's argument, which may be given by name or at a place; None where it is neither."""
    if not isinstance(call, ast.Call):
        return None
    by_name = {keyword.arg: keyword.value for keyword in call.keywords}
    return by_name.get(name, call.args[place] if place < len(call.args) else None)


def background_of(pp: str) -> tuple[int, int, int]:
    """RGB of what is behind transparent pixels, as the `decode` of a string has it; white where it does not say."""
    decoding = [call for call in calls(pp) if name_of(call) == "decode"]
    given = argument(decoding[0], "background", 1) if decoding else None
    return (255, 255, 255) if given is None else ast.literal_eval(given)


def tokenizer_in(ops: list[ast.expr]) -> ast.Constant | None:
    """The argument that says where the tokenizer of some ops is; None where they tokenize nothing.

    Raises:
      ValueError: if it is missing, or several ops tokenize.
    """
    tokenizing = [call for call in ops if name_of(call) in TOKENIZING]
    if not tokenizing:
        return None
    model = argument(tokenizing[0], "model", 0)
    if model is None:
        name = name_of(tokenizing[0])
        raise ValueError(f"preprocessing op {name!r} has no tokenizer: give it one, as {name}('my.model', 64)")
    if len(tokenizing) > 1:
        raise ValueError(f"the preprocessing string tokenizes with {' and '.join(map(ast.unparse, tokenizing))}: once")
    return model


def tokenizer_of(pp: str) -> str | None:
    """Where the tokenizer of a string is; None for a string that tokenizes nothing; see `tokenizer_in`."""
    model = tokenizer_in(calls(pp))
    return None if model is None else model.value


def text_length_of(pp: str) -> int:
    """T, how many tokens the texts have that a string makes, with their end; 1 for labels.

    Raises:
      ValueError: if it does not say.
    """
    length = None
    for call in calls(pp):
        name = name_of(call)
        if name == "label_as_text":
            length = 1
        elif name in ("tolen", *TOKENIZING):
            given = argument(call, "length", 0 if name == "tolen" else 1)
            # A mask that is brought to its length is as long as the text.
            length = length if given is None else given.value
    if length is None:
        raise ValueError("the preprocessing string does not say how long texts are: give caption or tok a length")
    return length
