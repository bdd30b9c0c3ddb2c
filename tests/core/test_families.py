"""More families along a plan: the golden oracle, the planned steps, stock's bits, control windows, experts, and the sampler."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from lissom.core.candidate import SamplingPlan, Scheduler, Seeds, Step
from lissom.core.conditions import NOTES, UNCONDITIONAL, Conditions
from lissom.core.driving import Memo, Run, follow, watch
from lissom.core.driving.drive import drive
from lissom.core.driving.steering import Call, Next
from lissom.core.sampling import Sampler
from lissom.tests.core import tiny, tiny_families
from lissom.tests.core.test_driving import TIMES, X0, Oracle, plan_for
from lissom.tests.core.tiny_families import FAMILIES, shared
from PIL import Image

SOLVERS = [
    *((family, "own") for family in FAMILIES),
    *((family, "ddim") for family in ("pixart-sigma", "pixart-alpha", "img2img-sdxl", "inpaint-sdxl")),
    *((family, "dpm") for family in ("kandinsky", "controlnet", "ldm", "img2img", "inpaint")),
    *((family, "euler") for family in ("controlnet", "inpaint")),
    *((family, "dpm flow") for family in ("wan", "ltx")),
]
VIDEO = ("wan", "wan-2.2", "ltx")
FROM_IMAGES = [name for name in FAMILIES if name.startswith(("img2img", "inpaint"))]


@pytest.mark.parametrize(("family", "solver"), SOLVERS)
def test_oracle(family: str, solver: str) -> None:
    """If and only if times, input scaling, guidance and prediction type all agree, eps is constant and the end is x0."""
    pipe, oracle = shared(family), Oracle()
    state = Run(plan_for(pipe, solver))
    with drive(pipe, state, [oracle]):
        pipe(**FAMILIES[family][1](2), generator=tiny.generators(2))
    state.verify()
    assert oracle.drift < 3e-5
    assert state.last is not None and (state.last - X0).abs().max() < 5e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_steps_are_the_plans_whatever_the_pipeline_is_asked(family: str) -> None:
    pipe = shared(family)
    plan, results = plan_for(pipe), []
    for asked in (5, 50, 2):
        shown: list[float] = []

        def log(call: Call, following: Next, shown: list[float] = shown) -> Any:
            if call.run.ordinal == 0:  # guidance may call the denoiser twice in a step
                shown.append(call.run.step.timestep)
            return following(call)

        state = Run(plan)
        with drive(pipe, state, [log]):
            pipe(**FAMILIES[family][1](2), generator=tiny.generators(2), num_inference_steps=asked)
        assert tuple(shown) == TIMES and state.evals == state.steps == 5
        results.append(state.last)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in FROM_IMAGES])
def test_uniform_plan_equals_the_stock_run(family: str) -> None:
    pipe, arguments = shared(family), FAMILIES[family][1](2)
    with watch(pipe) as stock:
        pipe(**arguments, generator=tiny.generators(2), num_inference_steps=6)
        times, sigmas = pipe.scheduler.timesteps.tolist(), getattr(pipe.scheduler, "sigmas", [None] * 7)
    flow = "Flow" in type(pipe.scheduler).__name__ or pipe.scheduler.config.get("use_flow_sigmas")
    steps = tuple(Step(timestep=t, sigma=float(s) if flow else None) for t, s in zip(times, sigmas, strict=False))
    with follow(pipe, SamplingPlan(scheduler=Scheduler.of(pipe.scheduler), steps=steps)) as followed:
        pipe(**arguments, generator=tiny.generators(2), num_inference_steps=6)
    assert stock.evals == 6
    assert torch.equal(followed.last, stock.last)


@pytest.mark.parametrize("family", FROM_IMAGES)
def test_the_strength_of_an_image_is_the_plans_first_timestep(family: str) -> None:
    pipe, results = shared(family), []
    for strength in (0.2, 0.9):
        with follow(pipe, plan_for(pipe, times=(600.0, 333.0, 17.0))) as run:
            pipe(**FAMILIES[family][1](1) | {"strength": strength}, generator=tiny.generators(1))
        results.append(run.last)
    assert torch.equal(results[0], results[1]) and "get_timesteps" not in vars(pipe)


@pytest.mark.parametrize("k", [4, 2])
def test_a_control_window_is_a_share_of_the_planned_steps(k: int) -> None:
    pipe, controlled = shared("controlnet"), []

    def look(call: Call, following: Next) -> Any:
        controlled.append(bool(call.kwargs["mid_block_additional_residual"].abs().max() > 0))
        return following(call)

    with drive(pipe, Run(plan_for(pipe, times=TIMES[:k])), [look]):
        pipe(**FAMILIES["controlnet"][1](1), generator=tiny.generators(1), num_inference_steps=50)  # control_guidance_end=0.5
    assert controlled == [True] * (k // 2) + [False] * (k // 2)


def test_the_second_expert_takes_over_below_its_boundary() -> None:
    pipe, called = shared("wan-2.2"), []

    def look(call: Call, following: Next) -> Any:
        called.append((call.run.step.timestep, call.name))
        return following(call)

    with drive(pipe, Run(plan_for(pipe)), [look]):
        pipe(**FAMILIES["wan-2.2"][1](1), generator=tiny.generators(1))
    first = [t for t, name in called if name == "transformer"]
    assert first == [901, 901, 640, 640]  # guidance: two calls a step
    assert [t for t, name in called if name == "transformer_2"] == [333, 333, 120, 120, 17, 17]


# --- through the sampler -------------------------------------------------------------------------------------------------

SEEDS = Seeds(role="search", base=4, count=3)
PER_IMAGE = ("prompt", "image", "mask_image", "image_embeds", "negative_image_embeds")


def sampler(family: str, pipe: Any = None, **options: Any) -> Sampler:
    """What differs from image to image comes as rows, the rest in the call."""
    whole = FAMILIES[family][1](3)
    rows = [{k: _entry(v, i) for k, v in whole.items() if k in PER_IMAGE} for i in range(3)]
    call = {k: v for k, v in whole.items() if k not in (*PER_IMAGE, "output_type")}
    return Sampler(pipe or shared(family), Conditions(rows, "rows"), **({"call": call} | options))


def _entry(values: Any, i: int) -> Any:
    return values[i : i + 1] if isinstance(values, torch.Tensor) else values[i]


def latents(sampler: Sampler, plan: SamplingPlan | None, **options: Any) -> torch.Tensor:
    return torch.cat([b.latents for b in sampler.images(plan, SEEDS, output="latents", **options) if b.latents is not None])


def pixels(sampler: Sampler, plan: SamplingPlan | None, **options: Any) -> torch.Tensor:
    return torch.cat([b.pixels for b in sampler.images(plan, SEEDS, **options) if b.pixels is not None])


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_equal_singles(family: str) -> None:
    together, alone = (latents(sampler(family, chunk=chunk), plan_for(shared(family))) for chunk in (3, 1))
    assert len(together) == 3
    assert (together - alone).abs().max() <= 1e-5 * alone.abs().max()
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("ldm", *VIDEO)])
def test_pixels(family: str) -> None:
    made = pixels(sampler(family), plan_for(shared(family)))
    assert made.dtype == torch.uint8 and made.shape[::3] == (3, 3) and made.float().std() > 0


@pytest.mark.parametrize("family", VIDEO)
@pytest.mark.parametrize("form", ["pt", "np", "pil"])
def test_a_video_is_scored_by_its_middle_frame(family: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """(B, F, C, H, W) tensors, (B, F, H, W, C) arrays and lists of lists of PIL images: frame F // 2."""
    pipe, plan = shared(family), plan_for(shared(family))
    seen: list[Any] = []
    stock = type(pipe.video_processor).postprocess_video

    def decode(self: Any, video: Any, output_type: str, **options: Any) -> Any:
        seen.append(stock(self, video, output_type="pt"))
        return stock(self, video, output_type=form, **options)

    monkeypatch.setattr(type(pipe.video_processor), "postprocess_video", decode)
    made = pixels(sampler(family, chunk=2), plan)
    whole = torch.cat(seen)  # (B, F, C, H, W)
    assert len(seen) == 2 and whole.shape[:3] == (3, 5, 3)
    assert torch.equal(made, (whole[:, 2].movedim(1, -1) * 255).round().to(torch.uint8))


def test_videos_without_rows_are_asked_for_by_number() -> None:
    pipe = shared("wan")
    embeds, none = pipe.encode_prompt("a shoe", max_sequence_length=8)
    call = {k: v for k, v in FAMILIES["wan"][1](1).items() if k not in ("prompt", "output_type")}
    call |= {"prompt_embeds": embeds, "negative_prompt_embeds": none}
    assert len(latents(Sampler(pipe, UNCONDITIONAL, call=call), plan_for(pipe))) == 3


def test_image_embeddings_in_the_call_of_one_row_or_of_one_for_each_image() -> None:
    """Kandinsky's decoder: as rows of the conditions, or in the call."""
    pipe, plan = shared("kandinsky"), plan_for(shared("kandinsky"))
    whole = {k: v for k, v in FAMILIES["kandinsky"][1](3).items() if k != "output_type"}
    as_rows = latents(sampler("kandinsky"), plan)
    assert torch.equal(as_rows, latents(Sampler(pipe, UNCONDITIONAL, call=whole), plan))
    one = whole | {k: whole[k][:1] for k in ("image_embeds", "negative_image_embeds")}
    shares = latents(Sampler(pipe, UNCONDITIONAL, call=one), plan)
    torch.testing.assert_close(shares[0], as_rows[0], rtol=1e-5, atol=1e-5)
    assert (shares[1] - as_rows[1]).abs().max() > 1e-3


def test_a_control_image_in_the_call_holds_for_every_image() -> None:
    pipe, plan = shared("controlnet"), plan_for(shared("controlnet"))
    pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "navy")]
    results = []
    for picture in pictures:
        rows = Conditions([{"prompt": text, "image": picture} for text in ("a shoe", "a bag", "coat")], "rows")
        prompts = Conditions([{"prompt": row["prompt"]} for row in rows.rows], "prompts")
        per_image, in_call = Sampler(pipe, rows), Sampler(pipe, prompts, call={"image": picture})
        results.append(latents(per_image, plan))
        assert torch.equal(results[-1], latents(in_call, plan))
        assert in_call._context([1]) == Sampler(pipe, prompts, call={"image": picture.copy()})._context([1])
    assert not torch.equal(*results)


def test_the_memo_tells_pictures_and_tensors_apart() -> None:
    pipe, memo, plan = shared("img2img"), Memo(), plan_for(shared("img2img"))
    for seed, served in ((0, 0), (0, 5), (1, 0)):
        picture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        rows = Conditions([{"prompt": "a shoe", "image": picture}], "rows")
        maker = Sampler(pipe, rows, memo=memo, fingerprint="w")
        latents(maker, plan)
        assert maker.served == served


def test_files_of_pictures_in_rows(tmp_path: Any) -> None:
    from lissom.core.conditions import read

    for i, shade in enumerate((20, 120, 220)):
        Image.new("RGB", (8, 8), (shade, 90, 255 - shade)).save(tmp_path / f"{i}.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "mask.png")
    lines = [f'{{"prompt": "a shoe", "image": "{i}.png", "mask_image": "mask.png", "label": {i}}}' for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    conditions = read(tmp_path / "rows.jsonl")
    assert set(conditions.arguments(range(1))) == {"prompt", "image", "mask_image"} and "label" in NOTES
    pipe = shared("inpaint")
    call = {"strength": 0.6, **tiny.size()}
    together, alone = (latents(Sampler(pipe, conditions, call=call, chunk=chunk), plan_for(pipe)) for chunk in (3, 1))
    assert (together - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_ldm_offers_no_latents_of_its_own() -> None:
    """Its source knows no output_type="latent", so that the last sample of the scheduler is what is shown."""
    pipe = shared("ldm")
    assert isinstance(pipe.scheduler, DDIMScheduler)
    shown = latents(sampler("ldm"), plan_for(pipe))
    assert shown.shape == (3, 4, tiny_families.SIDE, tiny_families.SIDE)
