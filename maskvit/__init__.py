"""maskvit: masked image modeling with Vision Transformers in JAX."""

__version__ = "0.1.0"


def load(path, weights="params"):
    """Open a checkpoint for use on one's own pictures; see `maskvit.features.load`."""
    from maskvit.features import load as load_checkpoint  # heavy imports only where they are used

    return load_checkpoint(path, weights)
