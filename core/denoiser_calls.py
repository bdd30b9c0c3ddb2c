"""What a pipeline gives its denoiser beside the noised samples: text, labels, sizes; for any conditions, without sampling.

The pipeline itself is asked: it runs up to its first denoiser call, whose arguments are kept row by row. Under guidance an image has
several rows (with and without its condition); each is a condition of its own here, as a guided step calls the denoiser with each.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .calibration import Inputs, first
from .conditions import Conditions
from .errors import UserError
from .sampling import Sampler

TIMES = ("timestep", "timesteps", "t")  # what diffusers' denoisers call the noise level
CACHE = 256 * 2**20  # bytes of arguments that are kept, so that a text is encoded once where there are few
MOVING = (
    "residual",
    "controlnet",
)  # in names of arguments that are made from the noised samples: there are none for other ones

Path = tuple[str | int, ...]  # of a tensor among the arguments


class Calls:
    """Arguments of denoiser calls for rows of conditions."""

    def __init__(self, sampler: Sampler, seed: int) -> None:
        """Asks the pipeline. UserError for denoisers whose arguments cannot be made apart from its loop."""
        self.sampler, self.seed = sampler, seed
        two, three = self._record([0, 0]), self._record([0, 0, 0])
        self.sample = two.sample
        self.shape = tuple(two.kwargs[self.sample].shape[1:])  # of one noised sample
        self.rows = two.rows // 2  # of each image: 2 under guidance
        name = next((name for name in TIMES if name in two.kwargs), None)
        moving = [key for key, value in two.kwargs.items() if value is not None and any(word in key for word in MOVING)]
        if name is None or moving:
            why = (
                f"its denoiser is given {moving[0]}, which belongs to one noised sample"
                if moving
                else "its denoiser is told no timestep"
            )
            raise UserError(
                f"{type(sampler.pipe).__name__}: cannot be trained here: {why}. Train the plain pipeline of the same denoiser."
            )
        self.time = name
        given = torch.as_tensor(two.kwargs[name]).flatten()
        self.whole = not given.is_floating_point()
        # FLUX is given t / 1000, Sana a multiple: whatever the pipeline makes of its scheduler's timestep.
        self.scale = 1.0 if self.whole or not two.timestep else float(given[0]) / two.timestep
        lengths = dict(_tensors(three.kwargs))
        # Tensors with a row for each image grow with their number; others (positions of tokens) may have that length by chance.
        self._per_image = {p for p, v in _tensors(two.kwargs) if v.ndim and (len(v), len(lengths[p])) == (two.rows, three.rows)}
        self._kept: dict[int, list[Any]] = {}
        self._size = 0

    def __call__(self, conditions: Sequence[int], rows: Sequence[int], shown: Tensor, times: Tensor) -> dict[str, Any]:
        """Keyword arguments of one forward.

        conditions: indices of rows of the sampler's conditions, (B,). rows: which row of each image (see above), below
        `self.rows`. shown: the noised samples, (B, …). times: as the scheduler counts them, (B,).
        """
        self._fetch(conditions)
        parts = [self._kept[c][row] for c, row in zip(conditions, rows, strict=True)]
        levels = times.to(shown.device)
        kwargs: dict[str, Any] = _map(parts, lambda path, found: torch.cat(found) if path in self._per_image else found[0])
        self._trim()
        return {**kwargs, self.sample: shown, self.time: levels.long() if self.whole else levels.float() * self.scale}

    def _fetch(self, conditions: Sequence[int]) -> None:
        missing = sorted(set(conditions) - self._kept.keys())
        for start in range(0, len(missing), self.sampler.chunk):
            some = missing[start : start + self.sampler.chunk]
            call, n = self._record(some), len(some)
            for i, condition in enumerate(some):
                self._kept[condition] = [self._row(call.kwargs, i + k * n) for k in range(self.rows)]
                self._size += sum(map(_bytes, self._kept[condition]))

    def _row(self, kwargs: dict[str, Any], at: int) -> Any:
        """One row of a call, without what is given anew each time."""
        rest = {k: v for k, v in kwargs.items() if k not in (self.sample, self.time, "return_dict")}
        return _map([rest], lambda path, found: found[0][at : at + 1].clone() if path in self._per_image else found[0])

    def _trim(self) -> None:
        """Forget the oldest beyond the limit."""
        while self._size > CACHE and len(self._kept) > 1:
            self._size -= sum(map(_bytes, self._kept.pop(next(iter(self._kept)))))

    def _record(self, conditions: Sequence[int]) -> Inputs:
        """The pipeline's first denoiser call for these conditions."""
        given = self.sampler.conditions
        some = Conditions([given.row(c) for c in conditions], given.source, given.folder)
        return first(
            Sampler(self.sampler.pipe, some, chunk=len(conditions), call=self.sampler.call), self.seed, len(conditions)
        )


def _tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor among nested arguments."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict | list | tuple):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(each, (*path, key))


def _map(values: Sequence[Any], join: Callable[[Path, list[Tensor]], Tensor], path: Path = ()) -> Any:
    """Nested arguments of the same form made into one: tensors by `join`, the rest as in the first."""
    one = values[0]
    if isinstance(one, Tensor):
        return join(path, list(values))
    if isinstance(one, dict):
        return {key: _map([v[key] for v in values], join, (*path, key)) for key in one}
    if isinstance(one, list | tuple):
        return type(one)(_map([v[i] for v in values], join, (*path, i)) for i in range(len(one)))
    return one


def _bytes(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for _, tensor in _tensors(value))
