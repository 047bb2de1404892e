"""Public weights to a run's workdir, and runs to safetensors.

    python -m jetformer.convert --from=jet_pytorch --hf_repo=btrude/jet_imagenet64x64_200m --out=/tmp/jet64

See `__main__.py` for the program. Each format is a file with `read`, which gives what was read and its experiment
(`experiment.Weights`), and a table that says where a model's tensors come from (`sources.Source`).
"""

from jetformer.convert.big_vision import from_big_vision, image_head_order

__all__ = ["from_big_vision", "image_head_order"]
