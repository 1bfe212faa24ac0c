"""The earlier name of `maskvit.checkpoints`: scripts that import it still run."""

from maskvit.checkpoints import *  # noqa: F403
