"""Preprocessing ops, and the string that composes them.

    decode|resize_small(64)|central_crop(64)|flip_lr|label_as_text|keep("image", "text")

An example is a dict of tensors; every op takes one and returns one, from left to right. The string is big_vision's `pp`
(https://github.com/google-research/big_vision, `pp/`), and ops of the same name compute the same values. Arguments are
Python literals; nothing is evaluated.

To add an op, register a function: with `@register` one from dict to dict, with `@register_keyed` or `@register_text`
one from tensor to tensor, which also gets the arguments `key`, `inkey` and `outkey`.

Random ops are functions of the example's `_seed`, which the pipeline adds: the same example at the same place of the
same run is always augmented in the same way. Each op of a string derives its own seed by its position. The result has
no `_seed`.
"""

import ast
import functools
import inspect
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from jetformer.data import pp_string, tokenizer
from jetformer.data.pictures import MAX_PIXELS, decode_picture

# This module is imported before any other of the package runs TensorFlow, which must not take a GPU.
tf.config.set_visible_devices([], "GPU")

Example = dict[str, tf.Tensor]
Op = Callable[[Example], Example]

OPS: dict[str, Callable[..., Op]] = {}


def register(builder: Callable[..., Op]) -> Callable[..., Op]:
    """Registers `builder(*literals) -> (example -> example)` as an op under its own name."""
    OPS[builder.__name__] = builder
    return builder


def register_keyed(builder: Callable[..., Callable], *, key: str = "image") -> Callable[..., Op]:
    """Registers `builder(*literals) -> (tensor -> tensor)` as an op that reads `inkey` and writes `outkey`.

    `key`, whose default is set here, stands for both. If the inner function has a second argument, `seed`, the op is
    random: it gets this op's own integer seed [2].
    """

    @functools.wraps(builder)
    def build(*args, key=key, inkey=None, outkey=None, **kwargs) -> Op:
        function = builder(*args, **kwargs)
        random = "seed" in inspect.signature(function).parameters

        def apply(example: Example) -> Example:
            value = _get(example, inkey or key, builder.__name__)
            if random and "_seed" not in example:
                raise ValueError(
                    f"preprocessing op {builder.__name__!r} is random and only works in training: remove it from this "
                    "preprocessing string"
                )
            value = function(value, seed=example["_seed"]) if random else function(value)
            return example | {outkey or key: value}

        return apply

    # For checking arguments, and for error messages.
    own = inspect.signature(builder).parameters.values()
    added = inspect.signature(build, follow_wrapped=False).parameters.values()
    added = [p for p in added if p.kind is p.KEYWORD_ONLY]
    build.__signature__ = inspect.Signature([*own, *added])
    return register(build)


register_text = functools.partial(register_keyed, key="text")


def parse(pp: str) -> Op:
    """Returns the function of a preprocessing string, for `tf.data.Dataset.map`.

    Args:
      pp: ops separated by `|`, e.g. `decode|resize(32)|flip_lr`. "" does nothing.

    Returns:
      Function from a dict of tensors to a dict of tensors. Random ops use its `_seed` (integer [2]), which is not in
      the result.

    Raises:
      ValueError: the string cannot be parsed, an op does not exist, or its arguments do not fit. The function raises
        it, while the graph is built, if an op misses a key or a seed.
    """
    ops = [_build(call, pp) for call in pp_string.calls(pp)]

    @tf.autograph.experimental.do_not_convert  # see `map_examples`
    def preprocess(example: Example) -> Example:
        seed = example.get("_seed")
        for position, op in enumerate(ops):
            if seed is not None:
                # Added before each op, so that `keep` need not know it. TensorFlow prunes unused ones.
                own = tf.random.experimental.stateless_fold_in(seed, position)
                example = example | {"_seed": own}
            example = op(example)
        return {k: v for k, v in example.items() if k != "_seed"}

    return preprocess


def map_examples(ds: tf.data.Dataset, function: Callable, num_parallel_calls: int) -> tf.data.Dataset:
    """Maps a dataset in order; an error raised while the graph is built stays one line, without AutoGraph's
    traceback."""
    function = tf.autograph.experimental.do_not_convert(function)
    return ds.map(function, num_parallel_calls=num_parallel_calls, deterministic=True)


def _build(call: ast.expr, pp: str) -> Op:
    """Builds an op of the string from `name` or `name(literals)`."""
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
        raise ValueError(f"a size is a positive int (height = width) or a pair of them, not {size!r}")
    return size


# ---- Images. -------------------------------------------------------------------------------------


# A PNG of 8 bits, greyscale or RGB, of at most 9,215 × 9,215 pixels, without a chunk between header and pixels (such as
# one that makes a colour transparent). In RE2 `\C` is a byte.
_PLAIN_PNG = (
    r"\CPNG\r\n\x1a\n\C{4}IHDR\x00\x00[\x00-\x23]\C\x00\x00[\x00-\x23]\C\x08[\x00\x02]\x00\x00[\x00\x01]\C{8}IDAT\C*"
)
_PNG_WITH_EXIF = r"\C*eXIf\C*"
# An EXIF orientation of 2 to 8, in either byte order.
_TURNED = (
    r"Exif\x00\x00\C*(\x12\x01\C\x00\x01\x00\x00\x00[\x02-\x08]|\x01\x12\x00\C\x00\x00\x00\x01\x00{0,3}[\x02-\x08])"
)
_GREY = (19595, 38470, 7471)  # 0.299, 0.587, 0.114 in units of 2⁻¹⁶, as in PIL


@register_keyed
def decode(channels=3, background=(255, 255, 255), precise=True):
    """Decodes a JPEG, PNG, GIF, BMP or WebP file: scalar string -> uint8 [H, W, channels], see docs/data.md.

    Args:
      channels: 3 is RGB, 1 is greyscale.
      background: RGB from 0 to 255 behind transparent pixels.
      precise: False returns big_vision's pixels, those of `tf.io.decode_image`: JPEGs by the fast DCT, no EXIF
        orientation, no background.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is 1 or 3, not {channels!r}")
    background = tuple(background)
    if len(background) != 3 or not all(isinstance(c, int) and 0 <= c <= 255 for c in background):
        raise ValueError(f"a background is three ints from 0 to 255, not {background!r}")
    if not precise and background != (255, 255, 255):
        raise ValueError("precise=False ignores transparency: remove background")

    def any_picture(encoded):
        # In a graph `x` is bytes, otherwise an array of them.
        to_pixels = lambda x: decode_picture(np.asarray(x, object).item(), channels, background)
        return tf.numpy_function(to_pixels, [encoded], tf.uint8, stateful=False)

    def plain(encoded):
        """Decodes by libjpeg or libpng, without Python, to the pixels of `decode_picture`."""
        rgb = tf.io.decode_jpeg(encoded, 3, dct_method="INTEGER_ACCURATE")  # also reads PNG
        if channels == 3:
            return rgb
        grey = tf.reduce_sum(tf.cast(rgb, tf.int32) * _GREY, -1, keepdims=True)
        return tf.cast((grey + 2**15) // 2**16, tf.uint8)

    def not_png(encoded):
        is_jpeg = tf.strings.substr(encoded, 0, 3) == b"\xff\xd8\xff"
        return tf.cond(is_jpeg, lambda: jpeg(encoded), lambda: any_picture(encoded))

    def jpeg(encoded):
        height, width, components = tf.unstack(tf.cast(tf.io.extract_jpeg_shape(encoded), tf.int64))
        # In RE2, replacing a match is faster than searching for one.
        is_turned = tf.strings.length(encoded) > tf.strings.length(
            tf.strings.regex_replace(encoded, _TURNED, "", replace_global=False)
        )
        is_plain = (components < 4) & (height * width <= MAX_PIXELS) & ~is_turned
        return tf.cond(is_plain, lambda: plain(encoded), lambda: any_picture(encoded))

    def apply(encoded):
        if precise:
            is_plain = tf.strings.regex_full_match(encoded, _PLAIN_PNG)
            is_plain &= ~tf.strings.regex_full_match(encoded, _PNG_WITH_EXIF)
            image = tf.cond(is_plain, lambda: plain(encoded), lambda: not_png(encoded))
        else:
            image = tf.io.decode_image(encoded, channels=channels, expand_animations=False)
        image.set_shape([None, None, channels])
        return image

    return apply


_METHODS = [value for name, value in vars(tf.image.ResizeMethod).items() if name.isupper()]


def _resizer(method: str, antialias: bool):
    """Returns big_vision's resize(image [H, W, C], (h, w)) -> [h, w, C], which keeps the dtype."""
    if method not in _METHODS:
        raise ValueError(f"no resize method {method!r}, there are: {', '.join(_METHODS)}")

    # Means of pixels never overshoot, and clipping would take as long as resizing.
    within = method in ("bilinear", "nearest", "area")

    def apply(image, size):
        resized = tf.image.resize(image, size, method=method, antialias=antialias)
        # The cast truncates, it does not round.
        if within:
            return tf.cast(resized, image.dtype)
        return tf.cast(tf.clip_by_value(resized, image.dtype.min, image.dtype.max), image.dtype)

    return apply


@register_keyed
def resize(size, method="bilinear", antialias=False):
    """Resizes [H, W, C] to [h, w, C], without keeping the aspect ratio. `size` is h = w or (h, w)."""
    size = _height_width(size)
    to_size = _resizer(method, antialias)
    return lambda image: to_size(image, size)


@register_keyed
def resize_small(smaller_size, method="area", antialias=False):
    """Resizes [H, W, C] so that the smaller side is `smaller_size`; keeps the aspect ratio."""
    smaller_size = _positive(smaller_size)
    to_size = _resizer(method, antialias)

    def apply(image):
        height_width = tf.cast(tf.shape(image)[:2], tf.float32)
        ratio = smaller_size / tf.reduce_min(height_width)
        return to_size(image, tf.cast(tf.round(height_width * ratio), tf.int32))

    return apply


@register_keyed
def central_crop(crop_size=None):
    """Crops the central [h, w, C] of [H, W, C], rounded to the upper left; None: the largest square."""

    def apply(image):
        side = tf.reduce_min(tf.shape(image)[:2])
        h, w = (side, side) if crop_size is None else _height_width(crop_size)
        if crop_size is not None:
            _check_crop(f"central_crop({crop_size})", image, h, w)
        top_left = (tf.shape(image)[:2] - (h, w)) // 2
        return tf.image.crop_to_bounding_box(image, top_left[0], top_left[1], h, w)

    return apply


def _check_crop(op: str, image: tf.Tensor, h: int, w: int) -> None:
    message = f"{op} is larger than the image: put resize_small({max(h, w)}) before it"
    tf.debugging.assert_greater_equal(tf.shape(image)[:2], (h, w), message)


@register_keyed
def random_crop(crop_size):
    """Crops [h, w, C] of [H, W, C] at a uniformly random place. Random."""
    h, w = _height_width(crop_size)

    def apply(image, seed):
        _check_crop(f"random_crop({crop_size})", image, h, w)
        cropped = tf.image.stateless_random_crop(image, (h, w, tf.shape(image)[2]), seed)
        cropped.set_shape([h, w, image.shape[2]])
        return cropped

    return apply


@register_keyed
def flip_lr():
    """Mirrors [H, W, C] left to right with probability 1/2. Random."""
    return lambda image, seed: tf.image.stateless_random_flip_left_right(image, seed)


@register_keyed
def value_range(vmin=-1, vmax=1, in_min=0, in_max=255.0, clip_values=False):
    """Maps [in_min, in_max] linearly to [vmin, vmax], as float32; clips to it on request."""

    def apply(image):
        image = (tf.cast(image, tf.float32) - in_min) / (in_max - in_min)
        image = vmin + image * (vmax - vmin)
        return tf.clip_by_value(image, vmin, vmax) if clip_values else image

    return apply


@register_keyed
def reshape(shape):
    """Reshapes a tensor; one -1 is inferred. Set `key` for tensors other than the image."""
    return lambda value: tf.reshape(value, shape)


# ---- Keys. ---------------------------------------------------------------------------------------


@register
def keep(*keys) -> Op:
    """Keeps only these keys."""
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
    """Copies the value of `inkey` to `outkey`."""
    return lambda example: example | {outkey: _get(example, inkey, "copy")}


@register
def setdefault(key, value) -> Op:
    """Sets `key` to a constant if the example does not have it, or it is empty (no captions)."""

    def apply(example):
        if key not in example:
            return example | {key: tf.constant(value)}
        given = example[key]
        if given.shape.num_elements():
            return example
        if (given.dtype == tf.string) != (tf.constant(value).dtype == tf.string):
            raise ValueError(f"preprocessing op 'setdefault': {key!r} is {given.dtype.name}, but {value!r} is not")
        default = tf.broadcast_to(tf.constant(value, given.dtype), [n or 1 for n in given.shape])
        return example | {key: tf.cond(tf.size(given) > 0, lambda: given, lambda: default)}

    return apply


@register
def flatten() -> Op:
    """Flattens nested dicts: `text` in the dict `captions` becomes `captions/text`."""

    def apply(example, prefix=""):
        flat = {}
        for key, value in example.items():
            flat |= apply(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
        return flat

    return apply


@register_text
def choice():
    """Takes one of n, [n, ...] -> [...], e.g. of several captions. Random."""

    def apply(several, seed):
        n = _size_of_some(several, "choice")
        return several[tf.random.stateless_uniform([], seed, 0, n, tf.int32)]

    return apply


@register_text
def first():
    """Takes the first of n, [n, ...] -> [...]: in evaluation, instead of `choice`."""

    def apply(several):
        with tf.control_dependencies([_size_of_some(several, "first")]):
            return tf.identity(several[0])

    return apply


def _size_of_some(several: tf.Tensor, op: str) -> tf.Tensor:
    """Returns the n of [n, ...]; an error if it is 0."""
    if several.shape.rank == 0:
        raise ValueError(f"preprocessing op {op!r} takes one of several, but the value is a scalar: remove the op")
    n = tf.shape(several)[0]
    message = f"preprocessing op {op}: an example has none to take: put setdefault(…) before it"
    with tf.control_dependencies([tf.debugging.assert_positive(n, message)]):
        return tf.identity(n)


# ---- Text. ---------------------------------------------------------------------------------------


@register
def label_as_text(key="label") -> Op:
    """Turns a class label (integer scalar) into a text of one token, the class-conditional prefix.

    Sets `text` int32 [1] (the label), `text_mask` bool [1] (others attend to the token) and `text_loss` bool [1] (the
    token is scored), both True.
    """

    def apply(example):
        text = tf.reshape(tf.cast(_get(example, key, "label_as_text"), tf.int32), [1])
        return example | {"text": text, "text_mask": [True], "text_loss": [True]}

    return apply


@register_text
def lower():
    """Lower-cases texts, in UTF-8 (big_vision's op changes A to Z only)."""

    def apply(text):
        if text.dtype != tf.string:
            raise ValueError(f"preprocessing op 'lower' takes texts, not {text.dtype.name}")
        return tf.strings.lower(text, encoding="utf-8")

    return apply


@register_text
def tok(model, length=None, *, eos="no"):
    """Tokenizes a text: scalar string -> int32 [n] or, with a `length`, [length], truncated or padded.

    `model` is a path, a URL, or the name of a public tokenizer, see `tokenizer.load`. `eos="yes"` appends its
    end-of-text token.
    """
    if eos not in ("no", "yes"):
        raise ValueError(f'eos is "no" or "yes", not {eos!r}')
    tokens_of = _tokenize(model, "tok")
    end = [tokenizer.load(model).eos_id] if eos == "yes" else []
    if length is None:
        return lambda text: tf.concat([tokens_of(text), tf.constant(end, tf.int32)], 0)
    length, pad_id = _length(length), tokenizer.load(model).pad_id
    if pad_id is None:
        raise ValueError(f"tokenizer {model!r} has no padding token: instead of a length, use tolen with a pad_value")
    return lambda text: _to_length(tf.concat([tokens_of(text), tf.constant(end, tf.int32)], 0), length, pad_id)


@register
def masked_concat(keys, outkey="text", **masks) -> Op:
    """Concatenates vectors, and marks in masks from which of them each position comes.

    `masked_concat(["text", "eos"], text_mask=[1, 0])` sets `text` to both vectors, and `text_mask`, bool, to True at
    positions of the first.
    """
    for mask, values in masks.items():
        if not isinstance(values, (list, tuple)) or len(values) != len(keys) or not set(values) <= {0, 1}:
            raise ValueError(f"mask {mask} must be a list of 0 or 1 for each of {keys}, not {values!r}")

    def apply(example):
        parts = [_get(example, key, "masked_concat") for key in keys]
        for key, part in zip(keys, parts, strict=True):
            if part.shape.rank != 1:
                raise ValueError(f"preprocessing op 'masked_concat' takes vectors, but {key!r} has shape {part.shape}")
        filled = {
            mask: tf.concat([tf.fill(tf.shape(p), bool(v)) for p, v in zip(parts, values, strict=True)], 0)
            for mask, values in masks.items()
        }
        return example | {outkey: tf.concat(parts, 0)} | filled

    return apply


@register_text
def tolen(length, pad_value):
    """Truncates or pads a vector at its end: [n] -> [length]."""
    length = _length(length)
    if not isinstance(pad_value, (int, float)):
        raise ValueError(f"pad_value is a number, not {pad_value!r}")

    def apply(vector):
        if vector.shape.rank != 1 or vector.dtype == tf.string:
            kind = f"{vector.dtype.name} of shape {vector.shape}"
            raise ValueError(f"preprocessing op 'tolen' takes a vector of numbers, not {kind}")
        return _to_length(vector, length, pad_value)

    return apply


@register
def caption(model, length, pad="modelled", key="text") -> Op:
    """Tokenizes a caption: scalar string -> its tokens, end-of-text and padding, [length].

    Sets `text` int32, `text_mask` bool (others attend to the token) and `text_loss` bool (the token is scored). What
    follows a text `A B` (`/` is end-of-text) depends on `pad`:

    - "modelled": padding is end-of-text tokens, modelled as any other. `A B / / /`, both masks all True.
    - "ignored": the sequence continues directly after the text. `A B / 0 0`; text_mask `1 1 0 0 0`, because the token
      that begins the image, which has the same id, is attended to instead of the end; text_loss `1 1 1 0 0`, because
      the end is scored.

    A longer text is truncated, without an end.

    Args:
      model: a path, a URL, or the name of a public tokenizer, see `tokenizer.load`.
      length: number of tokens, with the end.
      pad: "modelled" or "ignored".
      key: of the text.
    """
    if pad not in ("modelled", "ignored"):
        raise ValueError(f'pad is "modelled" or "ignored", not {pad!r}')
    length = _length(length)
    tokens_of = _tokenize(model, "caption")
    end = tokenizer.load(model).eos_id
    modelled = pad == "modelled"

    def apply(example):
        tokens = tokens_of(_get(example, key, "caption"))
        place = tf.range(length)
        return example | {
            "text": _to_length(tf.concat([tokens, [end]], 0), length, end if modelled else 0),
            "text_mask": modelled | (place < tf.size(tokens)),
            "text_loss": modelled | (place <= tf.size(tokens)),
        }

    return apply


def _tokenize(model: str, op: str) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns encode(scalar string) -> int32 [n], without end-of-text."""
    encode = tokenizer.load(model).encode

    def apply(text):
        if text.dtype != tf.string or text.shape.rank not in (0, None):
            kind = f"{text.dtype.name} of shape {text.shape}"
            raise ValueError(f"preprocessing op {op!r} takes one text, not {kind}: choose one with choice or first")
        # In a graph `t` is bytes, otherwise an array of them.
        to_array = lambda t: np.array(encode(np.asarray(t, object).item()), np.int32)
        return tf.ensure_shape(tf.numpy_function(to_array, [text], tf.int32, stateful=False), [None])

    return apply


def _to_length(vector: tf.Tensor, length: int, pad_value) -> tf.Tensor:
    vector = vector[:length]
    vector = tf.pad(vector, [[0, length - tf.size(vector)]], constant_values=tf.cast(pad_value, vector.dtype))
    vector.set_shape([length])
    return vector


def _length(length: int) -> int:
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"a length is a positive int, not {length!r}")
    return length
