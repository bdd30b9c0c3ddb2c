"""Gates learned in parts: the same gates whatever is computed at once, parts half as large where memory runs out, blocks computed again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lissom.core.anatomy import uncompiled
from lissom.core.errors import UserError
from lissom.tests.core import tiny
from lissom.tests.workflow import small, test_masks, test_tinyfusion
from lissom.workflow._lesson import Lessons
from lissom.workflow._subject import Subject
from lissom.workflow.context import Options
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.sd().save_pretrained(folder / "sd")
    (folder / "prompts.txt").write_text("a shoe\na bag\n")
    return folder


def learned(method: str, home: Path, out: Path, chunk: int, progress: Any = None, **stage: Any) -> dict[str, torch.Tensor]:
    """The gates of a run that computes at most `chunk` samples at once."""
    options = Options(device="cpu", chunk=chunk)
    if method == "masks":
        test_masks.prune(out, test_masks.text(home, **{"batch": 3, **stage}), options, progress)
    else:
        test_tinyfusion.prune(out, test_tinyfusion.text(**stage), progress, options)
    return load_file(out / "gates.safetensors")


def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[k], v, rtol=1e-4, atol=1e-6) for k, v in other.items())


def moved(gates: dict[str, torch.Tensor]) -> bool:
    """Gates that learned anything differ from each other."""
    return any(float(values.std()) > 1e-5 for values in gates.values() if values.numel() > 1)


class Sizes:
    """Counts the samples of every forward of the denoiser; more than `room` of them do not fit."""

    def __init__(self, patch: pytest.MonkeyPatch, room: int | None = None) -> None:
        self.seen: list[int] = []
        self.room = room
        load = Subject.load

        def watched(*args: Any, **kwargs: Any) -> Subject:
            subject = load(*args, **kwargs)
            uncompiled(subject.model.denoiser).register_forward_pre_hook(self._look, with_kwargs=True)
            return subject

        patch.setattr(Subject, "load", watched)

    def _look(self, module: Any, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        rows = len(args[0]) if args else len(kwargs.get("sample", kwargs.get("hidden_states")))
        self.seen.append(rows)
        if self.room is not None and rows > self.room:
            raise torch.OutOfMemoryError("made up")


@pytest.mark.parametrize(("method", "doubled"), [("tinyfusion", 1), ("masks", 2)])  # masks: under guidance
def test_parts_learn_what_the_whole_batch_does(
    method: str, doubled: int, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = learned(method, home, tmp_path / "whole", 64)
    sizes = Sizes(monkeypatch)
    parts = learned(method, home, tmp_path / "parts", 2)
    assert max(sizes.seen) == 2 * doubled and moved(whole) and alike(parts, whole)


@pytest.mark.parametrize(("method", "doubled"), [("tinyfusion", 1), ("masks", 2)])
def test_where_memory_runs_out_parts_are_halved_and_the_step_is_made_again(
    method: str, doubled: int, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = learned(method, home, tmp_path / "whole", 64)
    sizes, progress = Sizes(monkeypatch, room=doubled), small.Watched()
    parts = learned(method, home, tmp_path / "parts", 64, progress)
    assert "cpu: out of memory; going on with 1 samples at once" in progress.said and max(sizes.seen) > doubled
    assert sizes.seen.count(max(sizes.seen)) == 1 and alike(parts, whole)  # it does not try again what did not fit


@pytest.mark.parametrize(
    ("by_block", "advice"), [(False, "Set by_block=true"), (True, "Or take a larger device")], ids=["whole", "by_block"]
)
def test_a_single_sample_that_does_not_fit_is_the_end(
    by_block: bool, advice: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Sizes(monkeypatch, room=0)
    with pytest.raises(UserError, match=f"cpu: out of memory with a single sample to learn from.*{advice}") as error:
        learned("tinyfusion", home, tmp_path / "run", 64, by_block=by_block)
    assert ("by_block" in str(error.value)) is not by_block


def test_other_errors_are_no_reason_to_halve(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(Lessons, "samples", broken)
    with pytest.raises(RuntimeError, match="something else"):
        learned("tinyfusion", home, tmp_path / "run", 64)


def test_blocks_that_are_computed_again_learn_the_same_gates(home: Path, tmp_path: Path) -> None:
    """Bit for bit, under low-rank weights that learn too."""
    whole = learned("tinyfusion", home, tmp_path / "whole", 64)
    again = learned("tinyfusion", home, tmp_path / "again", 64, by_block=True)
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], v) for k, v in again.items())


@pytest.mark.parametrize("method", ["tinyfusion", "masks"])
def test_blocks_that_diffusers_cannot_compute_again_are_refused_before_anything(
    method: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = Sizes(monkeypatch)
    from diffusers import DiTTransformer2DModel, UNet2DConditionModel

    for kind in (DiTTransformer2DModel, UNet2DConditionModel):
        monkeypatch.setattr(kind, "_supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match=r"by_block: diffusers cannot compute blocks of \w+ again\. Leave it out"):
        learned(method, home, tmp_path / "run", 64, by_block=True)
    assert not sizes.seen
