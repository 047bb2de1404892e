"""JetFormer (arXiv 2411.19722) and Jet (arXiv 2412.15129) in PyTorch."""

__version__ = "0.1.0"
