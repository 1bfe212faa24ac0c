"""The earlier name of `maskvit.core.modalities`: scripts that import it still run."""

from maskvit.core.modalities import *  # noqa: F403
