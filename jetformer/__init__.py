"""JetFormer (arXiv 2411.19722) and Jet (arXiv 2412.15129) in PyTorch."""

import os

__version__ = "0.1.0"

# TensorFlow only reads data here: its start-up notices about compute say nothing about a run.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
