"""Features of single images, kept beside their mean and covariance: a sample that can be taken apart and merged.

Shapes: B images, K images that are kept, D features.
"""

import torch
from torch import Tensor

from ..core.errors import UserError

KEEP = 10_000  # images: what precision, recall and KID of the literature are taken over


def key(image_hash: str) -> int:
    """The first 63 bits of a sha256 in hex: what fits into an int64 without a sign.

    >>> hex(key("ff" * 32))
    '0x7fffffffffffffff'
    """
    return int(image_hash[:16], 16) >> 1


class Sketch:
    """The `limit` distinct images with the smallest keys, and their features.

    A key is a hash of the image's pixels, so that the images with the smallest ones are a uniform sample of the distinct
    images: the same sample in whatever order they come and however they were split, and the sample of two sets is in the
    two samples (Cohen and Kaplan, "Summarizing data using bottom-k sketches", PODC 2007). Of equal images one is kept.

    Features are rounded to float16, at once, so that a value does not depend on whether the file was read or just made.
    That moves a number by at most 1 part in 2048 (numbers below 6e-5: by 3e-8), up or down independently of all others, far less
    than which images were drawn moves it, and halves the file.
    """

    def __init__(self, limit: int, keys: Tensor | None = None, rows: Tensor | None = None) -> None:
        """keys (K,) int64, ascending, and rows (K, D) float16, as a sketch gave them; ValueError for others."""
        self.limit = limit
        self._keys = torch.zeros(0, dtype=torch.int64) if keys is None else keys
        self._rows = torch.zeros((0, 0), dtype=torch.float16) if rows is None else rows
        if self._keys.dtype != torch.int64 or self._rows.dtype != torch.float16 or self._rows.ndim != 2:
            raise ValueError(f"kept features of the types {self._keys.dtype} and {self._rows.dtype}")
        if self._keys.shape != self._rows.shape[:1] or not (self._keys[1:] > self._keys[:-1]).all():
            raise ValueError("kept features and their keys do not belong together")
        self._new: list[tuple[Tensor, Tensor]] = []  # not sorted in yet: sorting every batch in would copy all rows each time

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def keys(self) -> Tensor:
        """(K,) int64, ascending."""
        self._settle()
        return self._keys

    @property
    def rows(self) -> Tensor:
        """(K, D) float16, in the order of the keys."""
        self._settle()
        return self._rows

    def add(self, keys: Tensor, features: Tensor) -> None:
        """keys (B,) int64 and features (B, D). Raises UserError for numbers that float16 cannot hold."""
        if not self.limit:
            return
        rows = features.half()
        if not torch.isfinite(rows).all():
            raise UserError(
                f"features as large as {features.abs().max():.3g} cannot be kept (float16 ends at 65504): "
                "use --keep-features 0, or features of a smaller scale."
            )
        if len(self._keys) == self.limit:
            fits = keys < self._keys[-1]
            keys, rows = keys[fits], rows[fits]
        if len(keys):
            self._new.append((keys, rows))
        if sum(len(k) for k, _ in self._new) > self.limit:
            self._settle()

    def _settle(self) -> None:
        """Sort in what is new; of equal keys the first stays."""
        if not self._new:
            return
        parts = [(self._keys, self._rows)] if len(self._keys) else []  # an empty one has no width yet
        keys = torch.cat([k for k, _ in parts + self._new])
        order = keys.argsort(stable=True)
        keys = keys[order]
        first = torch.ones(len(keys), dtype=torch.bool)
        first[1:] = keys[1:] != keys[:-1]
        self._rows = torch.cat([r for _, r in parts + self._new])[order[first][: self.limit]]
        self._keys, self._new = keys[first][: self.limit], []
