"""Make diffusion models small and fast: search sampling schedules, prune, distil, score.

The repository root is this package: `lissom.search` lives in search/, `lissom.core` in core/, and so on.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["follow", "load"]

if TYPE_CHECKING:
    from .core.driving import follow
    from .core.models import load


def __getattr__(name: str) -> Any:  # lazy: `import lissom` must not import torch
    if name == "follow":
        from .core.driving import follow

        return follow
    if name == "load":
        from .core.models import load

        return load
    raise AttributeError(f"module 'lissom' has no attribute {name!r}")
