"""Preprocessing: small ops, and a string that composes them.

    decode|resize_small(64)|central_crop(64)|flip_lr|label_as_text|keep("image", "text")

An example is a dict of tensors; every op takes one and returns one, from left to right. The string
is big_vision's `pp` (https://github.com/google-research/big_vision, `pp/`), and an op with a name
from there computes the same numbers. Arguments are Python literals, they are never evaluated.

Adding an op is adding a function here: `@register` for one from dict to dict, `@register_keyed` for
one from tensor to tensor, which gets the arguments `key`, `inkey` and `outkey` on top of its own.

Random ops are functions of the example's `_seed`, which the pipeline attaches: the same example at
the same place of the same run is always augmented the same way. Two random ops of one string draw
independently, since each folds in its position. `_seed` is gone when the string has run.
"""

import ast
import functools
import inspect
from collections.abc import Callable

import tensorflow as tf

Example = dict[str, tf.Tensor]
Op = Callable[[Example], Example]

OPS: dict[str, Callable[..., Op]] = {}


def register(builder: Callable[..., Op]) -> Callable[..., Op]:
    """Makes `builder(*literals) -> (example -> example)` an op under its own name."""
    OPS[builder.__name__] = builder
    return builder


def register_keyed(builder: Callable[..., Callable]) -> Callable[..., Op]:
    """Makes `builder(*literals) -> (tensor -> tensor)` an op that reads and writes keys.

    The op reads `inkey` and writes `outkey`; `key` (default "image") stands for both.
    A function that has a second argument, `seed`, is random: it gets this op's own int seed [2].
    """

    @functools.wraps(builder)
    def build(*args, key="image", inkey=None, outkey=None, **kwargs) -> Op:
        function = builder(*args, **kwargs)
        random = "seed" in inspect.signature(function).parameters

        def apply(example: Example) -> Example:
            value = _get(example, inkey or key, builder.__name__)
            if random and "_seed" not in example:
                raise ValueError(
                    f"preprocessing op {builder.__name__!r} is random and only works in training: "
                    "take it out of this preprocessing string"
                )
            value = function(value, seed=example["_seed"]) if random else function(value)
            return example | {outkey or key: value}

        return apply

    # What an error message shows, and what arguments are checked against.
    own = inspect.signature(builder).parameters.values()
    added = inspect.signature(build, follow_wrapped=False).parameters.values()
    added = [p for p in added if p.kind is p.KEYWORD_ONLY]
    build.__signature__ = inspect.Signature([*own, *added])
    return register(build)


def parse(pp: str) -> Op:
    """Turns a preprocessing string into a function for `tf.data.Dataset.map`.

    Args:
      pp: ops separated by `|`, e.g. `decode|resize(32)|flip_lr`. "" does nothing.

    Returns:
      Function from a dict of tensors to a dict of tensors. If the dict has a `_seed` (integer [2]),
      random ops use it; it is not in the result.

    Raises:
      ValueError: the string cannot be read, an op does not exist, or its arguments do not fit. The
        function itself raises it, while the graph is built, where an op misses a key or a seed.
    """
    ops = [_build(call, pp) for call in _calls(pp)]

    # What an op raises reaches the user as it is, without AutoGraph's traceback in its message.
    @tf.autograph.experimental.do_not_convert
    def preprocess(example: Example) -> Example:
        seed = example.get("_seed")
        for position, op in enumerate(ops):
            if seed is not None:
                # Set anew before each op, so `keep` need not know of it. TensorFlow prunes those
                # that no op uses.
                own = tf.random.experimental.stateless_fold_in(seed, position)
                example = example | {"_seed": own}
            example = op(example)
        return {k: v for k, v in example.items() if k != "_seed"}

    return preprocess


def _calls(pp: str) -> list[ast.expr]:
    """The ops of a string, unparsed: `a|b(1)` is a Python expression, so Python splits it."""
    if not pp.strip():
        return []
    try:
        node = ast.parse(f"({pp})", mode="eval").body
    except SyntaxError as e:
        raise ValueError(
            f"preprocessing string {pp!r} cannot be read ({e.msg}): "
            'write ops separated by "|", e.g. decode|resize(64)|flip_lr'
        ) from None
    calls = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        calls.append(node.right)
        node = node.left
    return [node, *reversed(calls)]


def _build(call: ast.expr, pp: str) -> Op:
    """Builds one op of the string from `name` or `name(literals)`."""
    where = f"preprocessing op {ast.unparse(call)!r} of {pp!r}"
    known = f"known ops: {', '.join(sorted(OPS))}"
    has_arguments = isinstance(call, ast.Call)
    name = call.func if has_arguments else call
    if not isinstance(name, ast.Name):
        raise ValueError(f"{where} is neither a name nor a call; {known}")
    if name.id not in OPS:
        raise ValueError(f"{where} does not exist; {known}")
    builder = OPS[name.id]
    try:
        args = [ast.literal_eval(a) for a in call.args] if has_arguments else []
        keywords = call.keywords if has_arguments else []
        kwargs = {k.arg: ast.literal_eval(k.value) for k in keywords}
        inspect.signature(builder).bind(*args, **kwargs)
        return builder(*args, **kwargs)
    except (TypeError, ValueError) as e:
        reason = "arguments must be literals" if "malformed node" in str(e) else str(e)
        signature = f"{name.id}{inspect.signature(builder)}".split(" -> ")[0]
        raise ValueError(f"{where}: {reason}; it takes {signature}; {known}") from None


def _get(example: Example, key: str, op: str) -> tf.Tensor:
    if key not in example:
        has = ", ".join(sorted(k for k in example if k != "_seed"))
        raise ValueError(f"preprocessing op {op!r}: the example has no {key!r}, it has: {has}")
    return example[key]


def _height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    h, w = size if isinstance(size, (tuple, list)) and len(size) == 2 else (size, size)
    return _positive(h), _positive(w)


def _positive(size: int) -> int:
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"a size is a positive int (height = width) or a pair, not {size!r}")
    return size


# ---- Images. -------------------------------------------------------------------------------------


@register_keyed
def decode(channels=3):
    """Encoded JPEG, PNG, GIF or BMP, scalar string -> uint8 [H, W, channels]; 1 channel: grey."""

    def apply(encoded):
        image = tf.io.decode_image(encoded, channels=channels, expand_animations=False)
        image.set_shape([None, None, channels])
        return image

    return apply


_METHODS = (
    tf.image.ResizeMethod.BILINEAR,
    tf.image.ResizeMethod.NEAREST_NEIGHBOR,
    tf.image.ResizeMethod.BICUBIC,
    tf.image.ResizeMethod.AREA,
    tf.image.ResizeMethod.LANCZOS3,
    tf.image.ResizeMethod.LANCZOS5,
    tf.image.ResizeMethod.GAUSSIAN,
    tf.image.ResizeMethod.MITCHELLCUBIC,
)


def _resizer(method: str, antialias: bool):
    """Returns big_vision's resize(image [H, W, C], (h, w)) -> [h, w, C], which keeps the dtype."""
    if method not in _METHODS:
        raise ValueError(f"no resize method {method!r}, there are: {', '.join(_METHODS)}")

    def apply(image, size):
        resized = tf.image.resize(image, size, method=method, antialias=antialias)
        # Bicubic overshoots. The cast truncates, it does not round.
        return tf.cast(tf.clip_by_value(resized, image.dtype.min, image.dtype.max), image.dtype)

    return apply


@register_keyed
def resize(size, method="bilinear", antialias=False):
    """[H, W, C] -> [h, w, C], whatever that does to the aspect ratio. `size` is h = w or (h, w)."""
    size = _height_width(size)
    to_size = _resizer(method, antialias)
    return lambda image: to_size(image, size)


@register_keyed
def resize_small(smaller_size, method="area", antialias=False):
    """[H, W, C] -> the smaller of height and width is `smaller_size`, the aspect ratio is kept."""
    smaller_size = _positive(smaller_size)
    to_size = _resizer(method, antialias)

    def apply(image):
        height_width = tf.cast(tf.shape(image)[:2], tf.float32)
        ratio = smaller_size / tf.reduce_min(height_width)
        return to_size(image, tf.cast(tf.round(height_width * ratio), tf.int32))

    return apply


@register_keyed
def central_crop(crop_size=None):
    """[H, W, C] -> the [h, w, C] in the middle (up and left of it where there are two); None: the largest square."""

    def apply(image):
        side = tf.reduce_min(tf.shape(image)[:2])
        h, w = (side, side) if crop_size is None else _height_width(crop_size)
        top_left = (tf.shape(image)[:2] - (h, w)) // 2
        return tf.image.crop_to_bounding_box(image, top_left[0], top_left[1], h, w)

    return apply


@register_keyed
def random_crop(crop_size):
    """[H, W, C] -> [h, w, C] at a uniformly drawn place. Random."""
    h, w = _height_width(crop_size)

    def apply(image, seed):
        cropped = tf.image.stateless_random_crop(image, (h, w, tf.shape(image)[2]), seed)
        cropped.set_shape([h, w, image.shape[2]])
        return cropped

    return apply


@register_keyed
def flip_lr():
    """[H, W, C] -> the same, mirrored left to right with probability 1/2. Random."""
    return lambda image, seed: tf.image.stateless_random_flip_left_right(image, seed)


@register_keyed
def value_range(vmin=-1, vmax=1, in_min=0, in_max=255.0, clip_values=False):
    """Maps [in_min, in_max] linearly to [vmin, vmax], any dtype to float32; may clip to it."""

    def apply(image):
        image = (tf.cast(image, tf.float32) - in_min) / (in_max - in_min)
        image = vmin + image * (vmax - vmin)
        return tf.clip_by_value(image, vmin, vmax) if clip_values else image

    return apply


@register_keyed
def reshape(shape):
    """Gives a tensor a shape; -1 is worked out. Names `key` for what is not the image."""
    return lambda value: tf.reshape(value, shape)


# ---- Keys. ---------------------------------------------------------------------------------------


@register
def keep(*keys) -> Op:
    """Keeps these keys and no others."""
    return lambda example: {key: _get(example, key, "keep") for key in keys}


@register
def drop(*keys) -> Op:
    """Removes these keys."""

    def apply(example):
        for key in keys:
            _get(example, key, "drop")
        return {k: v for k, v in example.items() if k not in keys}

    return apply


@register
def copy(inkey, outkey) -> Op:
    """Sets `outkey` to what `inkey` holds."""
    return lambda example: example | {outkey: _get(example, inkey, "copy")}


@register
def setdefault(key, value) -> Op:
    """Sets `key` to a constant where the example does not have it."""
    return lambda example: {key: tf.constant(value)} | example


# ---- Text. ---------------------------------------------------------------------------------------


@register
def label_as_text(key="label") -> Op:
    """A class label (integer scalar) becomes a text of one token, the class-conditional prefix.

    Sets `text` int32 [1] (the label), `text_mask` bool [1] (a token is here) and `text_loss`
    bool [1] (the token is scored), both True.
    """

    def apply(example):
        text = tf.reshape(tf.cast(_get(example, key, "label_as_text"), tf.int32), [1])
        return example | {"text": text, "text_mask": [True], "text_loss": [True]}

    return apply
