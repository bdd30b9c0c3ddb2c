"""Forwards of student and teacher, and whether what they gave can be compared."""

from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ._seen import Site


def forward(denoiser: nn.Module, kwargs: dict[str, Any]) -> Tensor:
    """What a denoiser predicts, given floating tensors of its own precision."""
    first = next(p for p in denoiser.parameters() if p.is_floating_point())
    out: Tensor = denoiser(**_cast(kwargs, first.dtype), return_dict=False)[0]
    return out


def check_fit(student: Tensor, teacher: Tensor | None, features: dict[Site, tuple[Tensor, Tensor]]) -> None:
    """UserError that names the first place where shapes differ."""
    pairs = [(site.student, site.teacher, ours, theirs) for site, (ours, theirs) in features.items()]
    if teacher is not None:
        pairs.append(("the output", "the output", student, teacher))
    for ours, theirs, a, b in pairs:
        if a.shape != b.shape:
            raise UserError(
                f"student and teacher do not fit: {ours} of the student is {tuple(a.shape)}, {theirs} of the teacher is "
                f"{tuple(b.shape)}. Name the model that the student was pruned from as the teacher, or choose other losses."
            )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    return [_cast(v, dtype) for v in value] if isinstance(value, list) else value
