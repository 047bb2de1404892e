"""Measures a run of shapes.gin: what of the captions is in the images that it makes, and of images in its captions.

    python experiments/check_shapes.py --workdir=/tmp/shapes

Takes scenes of the test split, each of which has a combination of shape and colour that training never shows. Prints
the run's likelihoods on the validation split, then, by attribute, the share of what the scenes' first captions name
that is right in images sampled from them; the share of what sampled captions name that is right of the scenes; and, to
compare with, what the checker gives real images.
Exits with 1 where either is below 80%.
"""

import sys

import numpy as np
import torch
from absl import app, flags
from upath import UPath

from jetformer import prng, runtime, train
from jetformer.data.builders.shapes import checker
from jetformer.data.builders.shapes.shapes import example
from jetformer.sampling import decode
from jetformer.sampling.guidance import Guidance

flags.DEFINE_string("workdir", None, "The run's.", required=True)
flags.DEFINE_integer("scenes", 200, "How many scenes of the test split.")
flags.DEFINE_float("guidance_weight", 1.0, "Of density guidance; 0 for none.")
flags.DEFINE_float("temperature", 1.0, "Multiplies the scales of the tokens' mixtures.")
flags.DEFINE_integer("top_k", 1, "Captions: choose among so many of the most probable tokens.")
flags.DEFINE_bool("likelihoods", True, "Also evaluate the validation split.")
FLAGS = flags.FLAGS
FIRST_OF_TEST = 21_000


def share(scores: list[checker.Score], attributes=checker.ATTRIBUTES) -> float:
    """Right of named, over all scenes."""
    right, named = np.sum([score[name] for score in scores for name in attributes], axis=0)
    return right / named


def show(what: str, scores: list[checker.Score]) -> float:
    parts = ", ".join(f"{name} {share(scores, [name]):.1%}" for name in checker.ATTRIBUTES)
    print(f"  {what}: {share(scores):.1%} ({parts})")
    return share(scores)


@torch.no_grad()
def main(_):
    machine = runtime.initialize("cpu")
    run, state, step = train.load(UPath(FLAGS.workdir), [], [], machine)
    model, texts = state.model.eval(), run.data.texts()
    if FLAGS.likelihoods:
        print(f"step {step}, validation split")
        for name, value in train.evaluate(run, state, machine).items():
            print(f"  {name}: {value:.3f}")

    images, captions, scenes = zip(
        *(example(FIRST_OF_TEST + i, held_out=True) for i in range(FLAGS.scenes)), strict=True
    )
    captions = [several[0] for several in captions]
    keys = prng.example_keys(0, torch.arange(FLAGS.scenes, dtype=torch.int32))
    guidance = Guidance("density", FLAGS.guidance_weight) if FLAGS.guidance_weight else Guidance()
    prompts = {name: torch.from_numpy(x) for name, x in texts.encode(captions).items()}
    with state.averaged():
        drawn, _ = decode.sample_images(
            model, keys=keys, guidance=guidance, temperature_scales=FLAGS.temperature, **prompts
        )
        latents = decode.encode_images(model, torch.from_numpy(np.stack(images)), keys)
        tokens, _, _ = decode.sample_text(
            model,
            keys,
            image_tokens=latents.tokens,
            max_length=texts.length,
            vocab_size=texts.tokenizer.vocab_size,
            eos_id=texts.tokenizer.eos_id,
            top_k=FLAGS.top_k,
        )
    written = texts.decode(tokens.numpy())
    print(f"step {step}, {FLAGS.scenes} scenes of the test split, {guidance}")
    of_images = show(
        "images of captions", [checker.score_image(i, c) for i, c in zip(drawn.numpy(), captions, strict=True)]
    )
    of_captions = show(
        "captions of images", [checker.score_caption(c, s) for c, s in zip(written, scenes, strict=True)]
    )
    show("real images", [checker.score_image(i, c) for i, c in zip(images, captions, strict=True)])
    sys.exit(0 if min(of_images, of_captions) >= 0.8 else 1)


if __name__ == "__main__":
    app.run(main)
