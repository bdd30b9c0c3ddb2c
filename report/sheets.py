"""Contact sheets: the images of one schedule in one PNG."""

import io
from pathlib import Path
from typing import Any

from ..core.files import write_bytes


def sheet(pixels: Any, path: Path, columns: int = 8) -> None:
    """Write images side by side, row by row, in the order of their seeds.

    pixels: uint8 array (N, H, W, 3) or (N, H, W, 1), N >= 1. The gaps are transparent, so the sheet sits well on any page.
    The file is written beside and then renamed: a reader never sees half of it.
    Raises ValueError for other arrays, DiskError for a full disk.
    """
    import numpy as np
    from PIL import Image

    if pixels.ndim != 4 or pixels.dtype != np.uint8 or pixels.shape[3] not in (1, 3) or not len(pixels):
        raise ValueError(f"a sheet takes a uint8 array (N, H, W, 3) with N >= 1, got {pixels.dtype} {pixels.shape}")
    count, height, width, _ = pixels.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    gap = max(1, height // 32)
    canvas = Image.new("RGBA", (columns * (width + gap) - gap, rows * (height + gap) - gap))
    for i, image in enumerate(np.broadcast_to(pixels, (count, height, width, 3))):
        at = (i % columns * (width + gap), i // columns * (height + gap))
        canvas.paste(Image.fromarray(np.ascontiguousarray(image)), at)
    packed = io.BytesIO()
    canvas.save(packed, format="PNG")
    write_bytes(path, packed.getvalue())
