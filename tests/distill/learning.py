"""A linear student and teacher, and samples that are a function of their number: trainings that are over in milliseconds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lissom.core import methods
from lissom.distill._loop import Sample, Settings, Term, Trainer
from lissom.distill._seen import Pairing, Site
from torch import Tensor, nn

WIDTH = 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.line(x)


class Net(nn.Module):
    """A denoiser in small: (B, WIDTH) -> (B, WIDTH), and a module that no loss reaches."""

    def __init__(self, blocks: int, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.unused = nn.Linear(2, 2)

    def forward(self, sample: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        for block in self.blocks:
            sample = block(sample)
        return (sample,)


class Numbered:
    """Samples; `broken`: numbers whose noise is NaN, unless other noise is asked for."""

    def __init__(self, broken: Sequence[int] = (), always: bool = False) -> None:
        self.broken, self.always = set(broken), always
        self.asked: list[int] = []

    def __call__(self, positions: Sequence[int], salt: int) -> Sample:
        self.asked += positions
        rows = [torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(97 * n + salt)) for n in positions]
        shown, target = torch.stack(rows).unbind(1)
        bad = [n in self.broken and (self.always or not salt) for n in positions]
        return Sample({"sample": torch.where(torch.tensor(bad)[:, None], torch.nan, shown)}, target)


def accelerator() -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # a test before this one may have had another precision

    return Accelerator(cpu=True)


def term(name: str, weight: float = 1.0, sites: tuple[Site, ...] = (), **settings: Any) -> Term:
    module = methods.load("distill", name)
    return Term(name, weight, module, module.Config(**settings), sites)


def pairing() -> Pairing:
    student, teacher = Net(2, seed=1), Net(3, seed=2)
    return Pairing(student, teacher, {"blocks.0": "blocks.0", "blocks.1": "blocks.2"})


def trainer(
    folder: Path,
    samples: Any = None,
    terms: Sequence[Term] | None = None,
    pair: Pairing | None = None,
    say: Any = None,
    **settings: Any,
) -> Trainer:
    known = {"iterations": 30, "batch": 4, "learning_rate": 1e-2, "ema": 0.9, **settings}
    terms = terms or [term("task"), term("output"), term("features", sites=(Site("blocks.0", "blocks.0"),))]
    return Trainer(
        pair or pairing(),
        terms,
        samples or Numbered(),
        Settings(**known),
        accelerator(),
        folder,
        "same",
        say=say or (lambda t: None),
    )


def weights(made: Trainer) -> dict[str, Tensor]:
    with made.averaged():
        return {k: v.clone() for k, v in made.pairing.student.state_dict().items()}
