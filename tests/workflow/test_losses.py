"""Losses on disk: asked twice, measured once; never mixed with those of other conditions; memory that runs out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lissom.core import calibration
from lissom.core.candidate import Cut
from lissom.core.errors import SamplingError, UserError
from lissom.core.output_loss import OutputLoss
from lissom.tests.core import tiny
from lissom.tests.core.test_calibration import sampler
from lissom.workflow._losses import Losses
from lissom.workflow.context import Silent

OPTIONS = [(Cut(address="transformer_blocks.0", what="remove"),), (Cut(address="transformer_blocks.1", what="remove"),)]


def losses(path: Path, identity: str = "same", count: int = 4) -> Losses:
    s = sampler("dit")
    return Losses(s.pipe, calibration.record(s, count, 2, seed=0), path, identity, Silent())


def test_what_is_known_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = losses(tmp_path / "a.jsonl")
    found = first(OPTIONS)
    assert first.cuts_scored == 4 and min(found) > 0
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('["0-2 at 7", "[]", 0.')  # torn by kill -9
    monkeypatch.setattr(OutputLoss, "each", lambda *args: pytest.fail("measured again"))
    again = losses(tmp_path / "a.jsonl")
    assert again(OPTIONS) == found and again([OPTIONS[1], ()]) == [found[1], 0.0]
    assert (tmp_path / "a.jsonl").read_text().endswith("]\n")


def test_other_conditions_are_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    losses(tmp_path / "a.jsonl")(OPTIONS)
    before = (tmp_path / "a.jsonl").read_text()
    with pytest.raises(UserError, match="measured under other conditions.*choose another --out"):
        losses(tmp_path / "a.jsonl", "other")
    assert (tmp_path / "a.jsonl").read_text() == before


def test_calls_are_known_by_their_images_not_by_their_number(tmp_path: Path) -> None:
    """Another session may have split a call, because memory ran out: its third call is of other images."""
    more = losses(tmp_path / "a.jsonl", count=6)
    more(OPTIONS)
    fewer = losses(tmp_path / "a.jsonl", count=4)
    assert fewer(OPTIONS) == losses(tmp_path / "b.jsonl", count=4)(OPTIONS)


def test_out_of_memory_halves_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = losses(tmp_path / "a.jsonl")(OPTIONS)
    each = OutputLoss.each

    def small(self: OutputLoss, options: Any) -> list[float]:
        if self.calls[0].rows > limit:
            raise torch.OutOfMemoryError("no")
        return each(self, options)

    monkeypatch.setattr(OutputLoss, "each", small)
    limit = 1
    assert losses(tmp_path / "b.jsonl")(OPTIONS) == pytest.approx(wanted, rel=1e-5)
    limit = 0
    with pytest.raises(SamplingError, match="on a single image"):
        losses(tmp_path / "c.jsonl")(OPTIONS)


def test_calls_of_a_second_denoiser_do_not_count(tmp_path: Path) -> None:
    s = sampler("dit")
    one, two = calibration.record(s, 4, 2, seed=0)
    other = calibration.Inputs("transformer_2", two.kwargs, two.rows, two.images, two.timestep)
    alone = Losses(s.pipe, [one], tmp_path / "a.jsonl", "", Silent())(OPTIONS)
    assert Losses(s.pipe, [one, other], tmp_path / "b.jsonl", "", Silent())(OPTIONS) == alone
    with pytest.raises(UserError, match="none of the 1 recorded calls is of the transformer"):
        Losses(s.pipe, [other], tmp_path / "c.jsonl", "", Silent())


def test_parts_of_a_call() -> None:
    (call,) = calibration.record(sampler("sdxl"), 2, 1, seed=0)
    part = call.part(1, 3)
    assert part.rows == 2 and torch.equal(part.kwargs["sample"], call.kwargs["sample"][1:3])
    embeds = part.kwargs["added_cond_kwargs"]["text_embeds"]
    assert torch.equal(embeds, call.kwargs["added_cond_kwargs"]["text_embeds"][1:3])
    unet = tiny.denoiser(tiny.shared("sdxl"))
    torch.testing.assert_close(part(unet), call(unet)[1:3], atol=1e-5, rtol=1e-4)
