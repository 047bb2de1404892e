from jetformer.trained import Trained, load, train

__all__ = ["Trained", "__version__", "load", "train"]
__version__: str
