"""TorchScript modules: FID's Inception, and modules of the user's own. TorchScript holds code that torch runs, not Python's pickles.

Shapes: B images, S x S pixels, D features, N images whose features are known, C classes.
"""

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError, one_line
from ._download import INCEPTION, fetch
from ._extractor import BATCH, LARGE, Features, exact, sha256

SIZE = 299  # S, where none is given


class Inception(Features):
    """The Inception v3 of FID: NVIDIA's translation of the 2015 TensorFlow graph, as clean-fid's mode "clean" runs it.

    Features are the 2048 means before the classifier (Heusel et al., 1706.08500).
    """

    dim, size, batch = 2048, SIZE, LARGE

    def __init__(self, name: str, path: Path, file_hash: str, device: str) -> None:
        """Raises UserError for a file with another structure."""
        self.name, self.hash, self.device = name, file_hash, torch.device(device)
        module = open_module(path, self.device)
        if not hasattr(module, "layers"):
            raise UserError(
                f"{path}: no translation of Inception, it has no `layers`. Give torchscript:{path} for another network."
            )
        self._layers = module.layers
        self._classifier: Tensor | None = None
        weight = dict(module.named_parameters()).get("output.weight")
        if weight is not None and weight.shape[1:] == (self.dim,):
            self._classifier = weight.detach().float().cpu()
        self.has_probabilities = self._classifier is not None
        _dimension(self, path, self.dim)

    def forward(self, images: Tensor) -> Tensor:
        return _run(self._layers, (images.to(self.device) - 128) / 128, self.device).flatten(1)

    def probabilities(self, features: Tensor, classes: Tensor | None = None) -> Tensor:
        """Of the network's own classes (C = 1008), without the classifier's bias, as the first Inception Score was computed."""
        if self._classifier is None:
            return super().probabilities(features)
        return (features.float() @ self._classifier.T).softmax(1)


class Script(Features):
    """A module of the user's own: it takes float32 (B, 3, S, S) in 0..255 and returns (B, D)."""

    def __init__(self, name: str, path: Path, file_hash: str, size: int, device: str) -> None:
        """Raises UserError if it does not return that of a black image."""
        self.name, self.hash, self.size, self.device = name, file_hash, size, torch.device(device)
        self.batch = LARGE if size >= 224 else BATCH
        self._module = open_module(path, self.device)
        self.dim = _dimension(self, path)

    def forward(self, images: Tensor) -> Tensor:
        return _run(self._module, images.to(self.device), self.device)


def inception(where: str, device: str) -> Features:
    """FID's Inception from the cache, downloaded into it if need be; or from a file, whose name then shows that it is another.

    Raises MissingOffline if it is neither here nor to be had, UserError for a wrong file.
    """
    if not where:
        return Inception("inception", fetch(INCEPTION), INCEPTION.sha256, device)
    path = _file(f"inception:{where}", where)
    found = sha256(path)
    return Inception("inception" if found == INCEPTION.sha256 else f"inception:{path.name}", path, found, device)


def named(where: str, device: str) -> Features:
    """FILE or FILE@S. FID's Inception is known by its checksum, since its own forward returns classes.

    Raises UserError for a missing file, a pickle, and a module that does not return (B, D).
    """
    path, size = split(where)
    path = _file(f"torchscript:{where}", path)
    if (found := sha256(path)) == INCEPTION.sha256:
        return Inception("inception", path, found, device)
    return Script(f"torchscript:{path.name}{f'@{size}' if size else ''}", path, found, size or SIZE, device)


def split(where: str) -> tuple[Path, int]:
    """FILE@S as the file and S; 0 where none is given.

    >>> split("nets/mine.pt@224"), split("mine.pt")
    ((PosixPath('nets/mine.pt'), 224), (PosixPath('mine.pt'), 0))
    """
    file, size = match.groups() if (match := re.fullmatch(r"(.+)@([1-9]\d*)", where)) else (where, "0")
    return Path(file), int(size)


def open_module(path: Path, device: torch.device) -> Any:
    """The module in evaluation mode. Raises UserError for anything but TorchScript, of which nothing is then unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            script = any(name.endswith("/constants.pkl") for name in archive.namelist())  # a checkpoint has none
    except (zipfile.BadZipFile, OSError):
        script = False
    if not script:
        raise UserError(
            f"{path}: not TorchScript, or cut short. A pickled checkpoint is never read: save the module with torch.jit.save, "
            "or the weights as safetensors."
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"`torch\.jit\.load` is deprecated", category=FutureWarning)
            return torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as e:
        raise UserError(f"{path}: torch cannot read this TorchScript file ({one_line(e)}). Fetch or save it again.") from e


def _run(module: Any, images: Tensor, device: torch.device) -> Any:
    """The module's answer as it is, on the CPU if it is a tensor. No optimised execution: it would compile anew for every batch size."""
    with torch.no_grad(), exact(device), torch.jit.optimized_execution(False):
        found = module(images)
    return found.float().cpu() if isinstance(found, Tensor) else found


def _dimension(features: Features, path: Path, wanted: int | None = None) -> int:
    """D, by a black image. Raises UserError if the answer is not (1, D), D as wanted."""
    shape = f"(B, 3, {features.size}, {features.size})"
    try:
        found: Any = features.forward(torch.zeros(1, 3, features.size, features.size))
    except Exception as e:  # whatever a module raises
        last = ([line for line in str(e).splitlines() if line.strip()] or [type(e).__name__])[-1].strip()  # before it: the code
        raise UserError(f"{path}: fails on float32 {shape} ({last[:200]}). Give its size as torchscript:FILE@S.") from e
    got = f"{tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 1 or wanted not in (None, found.shape[1]):
        raise UserError(f"{path}: gives {got} for one image of {shape}, where features are (1, {wanted or 'D'}).")
    return found.shape[1]


def _file(name: str, path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"features {name!r}: no file {path} here.")
    return path
