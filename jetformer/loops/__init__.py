"""The training loops: `base` says what a loop is, `torch_loop` and `xla_loop` are the two."""
