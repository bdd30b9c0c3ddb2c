"""Arguments of denoiser calls for any conditions: what the pipeline itself would have given."""

from typing import Any

import pytest
import torch
from lissom.core.conditions import UNCONDITIONAL, Conditions
from lissom.core.denoiser_calls import Calls, _tensors
from lissom.core.errors import UserError
from lissom.core.sampling import Sampler
from lissom.tests.core import tiny

PROMPTS = Conditions([{"prompt": "a dog"}, {"prompt": "a cat"}], "here")
LABELS = Conditions([{"class_labels": 1}, {"class_labels": 2}], "here")
FAMILIES = {
    "sd": PROMPTS, "sdxl": PROMPTS, "sd3": PROMPTS, "flux": PROMPTS, "dit": LABELS, "ddpm": UNCONDITIONAL,
}  # fmt: skip


def calls(family: str, **call: Any) -> Calls:
    return Calls(Sampler(getattr(tiny, family)(), FAMILIES[family], chunk=4, call=call), 0)


def seen(pipe: Any, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the pipeline's first denoiser call."""
    found: list[dict[str, Any]] = []

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        found.append(dict(kwargs))

    hook = getattr(pipe, name).register_forward_pre_hook(keep, with_kwargs=True)
    pipe(**arguments)
    hook.remove()
    return found[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_denoiser_takes_them(family: str) -> None:
    made = calls(family)
    pipe = made.sampler.pipe
    shown, n = torch.randn(3, *made.shape), len(FAMILIES[family])
    kwargs = made([0, n - 1, 0], [0, made.rows - 1, 0], shown, torch.tensor([10, 500, 900]))
    out = (getattr(pipe, "unet", None) or pipe.transformer)(**kwargs, return_dict=False)[0]
    assert len(out) == 3 and bool(torch.isfinite(out).all())


def test_both_rows_of_guidance_are_the_pipelines_own() -> None:
    made = calls("sd", guidance_scale=5.0)
    assert made.rows == 2
    kwargs = made([1, 1, 0], [0, 1, 1], torch.zeros(3, *made.shape), torch.tensor([1, 1, 1]))["encoder_hidden_states"]
    given = seen(tiny.sd(), "unet", {"prompt": ["a dog", "a cat"], "guidance_scale": 5.0, "num_inference_steps": 1})
    without, dog, cat = (given["encoder_hidden_states"][i] for i in (0, 2, 3))
    torch.testing.assert_close(kwargs, torch.stack([without, cat, dog]))


def test_levels_are_told_as_the_pipeline_tells_them() -> None:
    flux = calls("flux")
    kwargs = flux([0, 1], [0, 0], torch.zeros(2, *flux.shape), torch.tensor([250.0, 1000.0]))
    torch.testing.assert_close(kwargs["timestep"], torch.tensor([0.25, 1.0]))  # FLUX is given t / 1000
    sd = calls("sd")
    assert sd([0], [0], torch.zeros(1, *sd.shape), torch.tensor([7]))["timestep"].tolist() == [7]


def test_positions_of_tokens_are_no_rows_of_images() -> None:
    """FLUX has as many ids as tokens, whatever the number of images: also where both numbers are equal."""
    flux = calls("flux")
    tokens = flux.shape[0]
    kwargs = flux([0, 1], [0, 0], torch.zeros(2, *flux.shape), torch.tensor([1.0, 1.0]))
    assert kwargs["img_ids"].shape == (tokens, 3) and kwargs["pooled_projections"].shape[0] == 2


def test_a_text_is_encoded_once_and_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    made = calls("sd")
    asked: list[list[int]] = []
    record = made._record
    monkeypatch.setattr(made, "_record", lambda rows: asked.append(list(rows)) or record(rows))
    one = torch.zeros(1, *made.shape)
    for _ in range(2):
        made([0], [0], one, torch.tensor([1]))
    assert asked == [[0]]
    monkeypatch.setattr("lissom.core.denoiser_calls.CACHE", 0)
    made([1], [0], one, torch.tensor([1]))
    made([0], [0], one, torch.tensor([1]))
    assert asked == [[0], [1], [0]] and made._size == sum(t.numel() * t.element_size() for t in _all(made._kept))


def _all(kept: Any) -> list[torch.Tensor]:
    return [tensor for rows in kept.values() for row in rows for _, tensor in _tensors(row)]


def test_a_pipeline_with_a_controlnet_is_refused() -> None:
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
    from PIL import Image

    plain = tiny.sd()
    pipe = StableDiffusionControlNetPipeline(**plain.components, controlnet=ControlNetModel.from_unet(plain.unet))
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(UserError, match="down_block_additional_residuals, which belongs to one noised sample"):
        Calls(Sampler(pipe, Conditions([{"prompt": "a", "image": picture}], "here")), 0)
