"""Gates learned in parts: the same gates whatever is computed at once, parts half as large where memory runs out, blocks computed again."""

import shutil
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


def learned(
    method: str, home: Path, out: Path, chunk: int, progress: Any = None, *, resume: bool = False, **stage: Any
) -> dict[str, torch.Tensor]:
    """The gates of a run that computes at most `chunk` samples at once."""
    options = Options(device="cpu", chunk=chunk)
    if method == "masks":
        test_masks.prune(out, test_masks.text(home, **{"batch": 3, **stage}), options, progress, resume=resume)
    else:
        test_tinyfusion.prune(out, test_tinyfusion.text(**stage), progress, options, resume=resume)
    return load_file(out / "gates.safetensors")


def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[k], v, rtol=1e-4, atol=1e-6) for k, v in other.items())


def moved(gates: dict[str, torch.Tensor]) -> bool:
    """Gates that learned anything differ from each other."""
    return any(float(values.std()) > 1e-5 for values in gates.values() if values.numel() > 1)


class Sizes:
    """Counts the samples of every forward of the denoiser; more than `room` of them do not fit, unless blocks are computed `again`."""

    def __init__(self, patch: pytest.MonkeyPatch, room: int | None = None, *, again: bool = False) -> None:
        self.seen: list[int] = []
        self.room, self.again = room, again
        load = Subject.load

        def watched(*args: Any, **kwargs: Any) -> Subject:
            subject = load(*args, **kwargs)
            uncompiled(subject.model.denoiser).register_forward_pre_hook(self._look, with_kwargs=True)
            return subject

        patch.setattr(Subject, "load", watched)

    def _look(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        rows = len(args[0]) if args else len(kwargs.get("sample", kwargs.get("hidden_states")))
        self.seen.append(rows)
        fits = self.again and any(getattr(m, "gradient_checkpointing", False) for m in module.modules())
        if self.room is not None and rows > self.room and not fits:
            raise torch.OutOfMemoryError("made up")


KINDS: dict[str, tuple[str, int, dict[str, Any]]] = {  # method, rows of the denoiser for one sample, settings
    "tinyfusion": ("tinyfusion", 1, {}),
    "masks": ("masks", 2, {}),  # under guidance
    "steps": ("masks", 2, {"objective": "steps"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_parts_learn_what_the_whole_batch_does(kind: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, doubled, settings = KINDS[kind]
    whole = learned(method, home, tmp_path / "whole", 64, **settings)
    sizes = Sizes(monkeypatch)
    parts = learned(method, home, tmp_path / "parts", 2, **settings)
    assert max(sizes.seen) == 2 * doubled and moved(whole) and alike(parts, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_where_memory_runs_out_parts_are_halved_and_the_step_is_made_again(
    kind: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, doubled, settings = KINDS[kind]
    whole = learned(method, home, tmp_path / "whole", 64, **settings)
    sizes, progress = Sizes(monkeypatch, room=doubled), small.Watched()
    parts = learned(method, home, tmp_path / "parts", 64, progress, **settings)
    assert "cpu: out of memory; learning goes on in parts of 1" in progress.warned and max(sizes.seen) > doubled
    assert sizes.seen.count(max(sizes.seen)) == 1 and alike(parts, whole)  # it does not try again what did not fit


@pytest.mark.parametrize("kind", ["tinyfusion", "masks"])
def test_blocks_are_computed_again_where_a_single_sample_does_not_fit(
    kind: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself, with the gates that the same parts learn with room enough, bit for bit; and no further."""
    method, _, settings = KINDS[kind]
    whole = learned(method, home, tmp_path / "whole", 1, **settings)
    progress = small.Watched()
    sizes = Sizes(monkeypatch, room=0, again=True)
    less = learned(method, home, tmp_path / "less", 1, progress, **settings)
    assert progress.warned[0] == "cpu: out of memory; learning goes on with blocks computed again in the backward pass"
    assert all(torch.equal(less[k], v) for k, v in whole.items()) and len(sizes.seen) > 2


@pytest.mark.parametrize(("kind", "settings"), [("tinyfusion", {}), ("tinyfusion", {"by_block": True}), ("steps", {})], ids=str)
def test_a_single_sample_that_does_not_fit_is_the_end(
    kind: str, settings: dict[str, Any], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Sizes(monkeypatch, room=0)
    method, _, own = KINDS[kind]
    with pytest.raises(UserError, match="cpu: out of memory with a single sample to learn from. Take a device with more of it"):
        learned(method, home, tmp_path / "run", 64, **own, **settings)
    assert (tmp_path / "run" / "recipe.yaml").is_file() and (tmp_path / "run" / "learning.pt").is_file()


@pytest.mark.parametrize("method", ["tinyfusion", "masks"])
def test_what_was_killed_for_lack_of_memory_goes_on_with_less(
    method: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what had found out how much fits does not try again, so that it goes on to the bit."""
    monkeypatch.setattr("lissom.prune._learning.SAVE_SECONDS", 0.0)
    whole = learned(method, home, tmp_path / "whole", 64)

    with pytest.raises(small.Killed):
        learned(method, home, tmp_path / "run", 64, small.Dying())
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    sizes = Sizes(monkeypatch)
    assert alike(learned(method, home, tmp_path / "run", 1, resume=True), whole) and sizes.seen
    once = max(sizes.seen)
    state = torch.load(tmp_path / "again" / "learning.pt", weights_only=True)
    state["state"]["chunk"] = 1
    torch.save(state, tmp_path / "again" / "learning.pt")
    sizes.seen.clear()
    learned(method, home, tmp_path / "again", 64, resume=True)
    assert max(sizes.seen) == once


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
