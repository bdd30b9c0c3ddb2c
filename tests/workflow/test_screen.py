"""Teacher-trajectory error on tiny pipelines: zero for the teacher's own plan, and more the further a plan is from it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from lissom.core.candidate import Cut, SamplingPlan, Scheduler, Seeds, Step
from lissom.core.driving import Memo
from lissom.core.recipe import parse
from lissom.core.sampling import Sampler
from lissom.core.stages import SearchStage
from lissom.tests.core import tiny
from lissom.tests.core.test_sampling import CONDITIONS, PROMPTS
from lissom.tests.workflow import small
from lissom.workflow._judges import judges
from lissom.workflow._screen import METRIC, Screen, error
from lissom.workflow._subject import Subject
from lissom.workflow._teacher import Teacher
from lissom.workflow.context import Context, Options, Silent

SEEDS = Seeds(role="search", base=4, count=6)
STEPS = 20


def screen(family: str, folder: Path, *, steps: int = STEPS, seed: int = 0, **options: Any) -> Screen:
    pipe = tiny.shared(family)
    skipped = ("prompt", "class_labels", "batch_size", "output_type")
    call = {k: v for k, v in tiny.FAMILIES[family][1](1).items() if k not in skipped}
    conditions = CONDITIONS.get(family, PROMPTS)
    sampler = Sampler(pipe, conditions, call=call, **({"chunk": 4, "memo": Memo(), "fingerprint": "weights"} | options))
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    model: Any = SimpleNamespace(pipe=pipe, denoiser=denoiser, fingerprint="weights", device="cpu", dtype="float32", ref=family)
    context = Context(parse(small.text(), "r.yaml"), folder, Options(device="cpu"), Silent())
    return Screen(Teacher(model, conditions, sampler, context), steps, folder)


def stock(family: str, steps: int = STEPS) -> SamplingPlan:
    """The plan of the pipeline's own run: the timesteps that its scheduler sets."""
    scheduler = type(tiny.shared(family).scheduler).from_config(tiny.shared(family).scheduler.config)
    scheduler.set_timesteps(steps)
    times = [float(t) for t in scheduler.timesteps]
    return SamplingPlan(scheduler=Scheduler.of(scheduler), steps=tuple(Step(timestep=t) for t in times))


def value(found: Any) -> float:
    (measured,) = found.measurements
    assert (measured.metric, measured.direction, measured.n, measured.settings["steps"]) == (METRIC, "lower", 6, STEPS)
    return float(measured.value)


@pytest.mark.parametrize("family", ["sd", "dit", "ddim"])
def test_the_teachers_own_plan_has_none(family: str, tmp_path: Path) -> None:
    own, whole = screen(family, tmp_path), stock(family)
    assert value(own.score(whole, SEEDS)) < 1e-9
    sparse = [whole.model_copy(update={"steps": whole.steps[::k]}) for k in (2, 10)]
    near, far = (value(own.score(plan, SEEDS)) for plan in sparse)
    assert 1e-9 < near < far


def test_layers_left_out_count(tmp_path: Path) -> None:
    own, whole, layer = screen("ddim", tmp_path), stock("ddim"), "mid_block.attentions.0"
    skipping = whole.model_copy(update={"steps": tuple(s.model_copy(update={"skip": (layer,)}) for s in whole.steps)})
    skipped, cut = own.score(skipping, SEEDS), own.score(whole, SEEDS, cuts=(Cut(address=layer, what="remove"),))
    assert value(skipped) > 1e-8 and value(cut) == pytest.approx(value(skipped), rel=1e-9)
    assert value(own.score(whole, SEEDS)) < 1e-9  # the model is whole again


def test_the_teacher_paints_once(tmp_path: Path) -> None:
    own, plan = screen("ddim", tmp_path), stock("ddim", 2)
    first = own.score(plan, SEEDS)
    assert own.teacher.sampler.calls == 2 * STEPS + 2 * 2 and (first.calls, first.plain_calls) == (4, 4)
    again = screen("ddim", tmp_path)
    assert value(again.score(plan, SEEDS)) == value(first) and again.teacher.sampler.calls == 4
    (path,) = tmp_path.glob("teacher-latents-*.safetensors")
    path.write_bytes(path.read_bytes()[:-9])  # torn
    torn = screen("ddim", tmp_path)
    assert value(torn.score(plan, SEEDS)) == value(first) and torn.teacher.sampler.calls == 2 * STEPS + 4
    other = screen("ddim", tmp_path, steps=10)
    other.latents(SEEDS)
    assert other.teacher.sampler.calls == 20 and len(list(tmp_path.glob("teacher-latents-*"))) == 2


def test_identity(tmp_path: Path) -> None:
    own = screen("ddim", tmp_path)
    assert own.id == screen("ddim", tmp_path).id
    assert len({own.id, screen("ddim", tmp_path, steps=9).id, screen("ddim", tmp_path, chunk=3).id}) == 3


def test_unit() -> None:
    teacher = torch.randn((4000, 3), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert error(teacher, teacher) == 0
    assert error(teacher.roll(1, 0), teacher) == pytest.approx(2, rel=0.05)
    assert error(teacher.mean(0).expand_as(teacher), teacher) == pytest.approx(1, rel=0.01)
    assert error(7 * teacher + 3, 7 * teacher) == pytest.approx(9 / 49, rel=0.05)


def test_a_search_has_a_judge_of_it(tmp_path: Path) -> None:
    evaluate = {"samples": 8, "teacher_steps": 5}
    context = Context(parse(small.text(evaluate=evaluate, screen=0.5), "r.yaml"), tmp_path, Options(device="cpu"), Silent())
    stage = context.recipe.stages[0]
    assert isinstance(stage, SearchStage)
    subject = Subject.load("zoo:fashion", context)
    found = judges(stage, subject, tmp_path)
    assert set(found) == {"search", "rescore", "report", "screen"} and len({j.id for j in found.values()}) == 3
    assert len(list(tmp_path.glob("teacher-latents-*"))) == 1  # made before any candidate
    plan = SamplingPlan(
        scheduler=Scheduler.of(DDIMScheduler.from_config(subject.model.pipe.scheduler.config)), steps=(Step(timestep=999),)
    )
    before = subject.sampler.calls
    score = found["screen"].score(plan, Seeds(role="search", base=0, count=4), cuts=())
    assert subject.sampler.calls == before + 1 and 0 < score.measurements[0].value < 10
    plain = SearchStage.model_validate({**stage.plain(), "screen": None})
    assert set(judges(plain, subject, tmp_path)) == {"search", "rescore", "report"}


def test_half_samples_are_taken_for_control_only(tmp_path: Path) -> None:
    context = Context(parse(small.text(control=True), "r.yaml"), tmp_path, Options(device="cpu"), Silent())
    stage = context.recipe.stages[0]
    assert isinstance(stage, SearchStage)
    subject = Subject.load("zoo:fashion", context)
    plan = SamplingPlan(scheduler=Scheduler.of(subject.model.pipe.scheduler), steps=(Step(timestep=999),))
    for control, count in ((True, 40), (False, 0)):
        found = judges(stage.model_copy(update={"control": control}), subject, tmp_path)
        score = found["search"].score(plan, Seeds(role="search", base=0, count=8))
        assert [len(m.replicates) for m in score.measurements] == [count, count]
