"""Public weights to a run's workdir, and runs to safetensors; `__main__.py` is the program.

Each format is a module with `read`, which returns `weights.Weights`, and `table`, which returns the source of each
tensor of a model (`sources.Table`).
"""
