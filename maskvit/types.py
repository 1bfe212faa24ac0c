"""The earlier name of `maskvit.core.types`: scripts that import it still run."""

from maskvit.core.types import *  # noqa: F403
