"""Sample from a trained model: images of classes or prompts, captions of images, completions of images, texts.

    python -m jetformer.sample --workdir=/tmp/digits --classes=3,7 --out=/tmp/samples
    python -m jetformer.sample --workdir=/tmp/shapes --prompt="a red circle" --guidance_weight=2 --out=/tmp/samples
    python -m jetformer.sample --workdir=/tmp/jet_digits --temperature=0.8 --out=/tmp/samples
    python -m jetformer.sample --workdir=/tmp/shapes --images='/tmp/samples/images/*' --task=caption --out=/tmp/texts
    python -m jetformer.sample --workdir=/tmp/digits --images=a.png --task=inpaint --mask=b.png --classes=3 --out=/tmp/b

Writes PNGs, grid.png, index.html to browse them, and samples.jsonl: a line for each sample, with its prompt, seed,
settings and log-likelihood. Sample i of a prompt has the seed --seed + i and does not depend on other samples. Run
again with the same --out, it draws only the samples that are missing.

Several processes share the samples, each with the whole model on its device:

    torchrun --nproc-per-node=8 -m jetformer.sample --workdir=… --prompts=prompts.txt --out=/tmp/samples
"""

from absl import flags

from jetformer import program

flags.adopt_module_key_flags(program)
flags.DEFINE_list(*program.TRUST_IMPORTS)
flags.DEFINE_string("workdir", None, "The workdir of a run, or a directory that convert --to=safetensors wrote.")
flags.DEFINE(
    program.StepParser(), "step", None, "Checkpoint of the workdir or repository: a step, or best; default: the newest."
)
flags.DEFINE_string("checkpoint", None, "Or a checkpoint in a run's workdir: …/checkpoints/000012000.")
flags.DEFINE_string("hf_repo", None, "Or a repository on the Hugging Face Hub that holds either: owner/name.")
flags.DEFINE_string("hf_revision", None, "Branch, tag or commit of the repository.")
flags.DEFINE_list("classes", None, "Classes: names or numbers, as cat,dog or 0,1,2.")
flags.DEFINE_multi_string("prompt", [], "What to draw, or the beginning of a text; may be repeated.")
flags.DEFINE_string("prompts", None, "File with a prompt on each line.")
flags.DEFINE_string("images", None, "Images to caption, complete or inpaint: a path or a pattern, as '/data/*.png'.")
flags.DEFINE_enum(
    "task",
    None,
    ["caption", "complete", "inpaint"],
    "What to do with --images: write captions; or keep the first --rows, or what is not under a --mask, and sample the "
    "rest.",
)
flags.DEFINE_integer("rows", None, "Rows of pixels to keep of an image to complete; default: half of them.")
flags.DEFINE_string(
    "mask", None, "Picture of the size of the model's images, white where to sample and black where to keep."
)
flags.DEFINE_integer(
    "num_images", None, "Samples of each class, prompt or image; default: 8, 1 with --images.", lower_bound=1
)
flags.DEFINE_integer("batch_size", 32, "Samples at a time, per process.", lower_bound=1)
flags.DEFINE_string(
    "guidance",
    None,
    "Classifier-free guidance: density, clipped, resample, interp or none; default with a --guidance_weight: density, "
    "of a flow alone interp.",
)
flags.DEFINE_float("guidance_weight", 0.0, "Weight w of guidance, which samples from p(x | y)^(1+w) / p(x)^w.")
flags.DEFINE_string(
    "guidance_schedule", "constant", "Guidance weight over the tokens of an image: constant, linear or cosine."
)
flags.DEFINE_integer(
    "guidance_candidates", None, "Candidates of each token with --guidance=resample; default: 16.", lower_bound=1
)
flags.DEFINE_float(
    "temperature",
    1.0,
    "Multiplies the scales of the mixtures of image tokens, or the latents of a flow; divides the logits of texts.",
)
flags.DEFINE_bool("denoise", False, "Remove the noise that the model was trained with from images.")
flags.DEFINE_float("temperature_probs", 1.0, "Multiplies the log-weights of the mixtures of image tokens.")
flags.DEFINE_integer("top_k", None, "Texts: number of most probable tokens to choose from.")
flags.DEFINE_float("top_p", 1.0, "Texts: choose from the most probable tokens with at least this probability.")
flags.DEFINE_integer("seed", 0, "Seed of the first sample of each class, prompt or image.", lower_bound=0)
flags.DEFINE_bool("ema", True, "Use the moving average of the parameters if there is one.")
flags.DEFINE_string("out", None, "Local directory to write to.", required=True)
FLAGS = flags.FLAGS


def main() -> None:
    from jetformer import sample_files  # takes seconds to import

    sample_files.sample()


if __name__ == "__main__":
    program.run(main, verbose=True)
