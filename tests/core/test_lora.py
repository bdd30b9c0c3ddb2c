"""LoRA on pruned models: trained, saved and loaded as on any other, and the parent's own, by the names in lissom.json."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from lissom.core import artifact, export, models, surgery
from lissom.core.artifact import renamed
from lissom.core.candidate import Cut
from lissom.core.models import Model
from lissom.tests.core import cutting, tiny
from lissom.tests.core.cutting import keep, output, remove
from safetensors.torch import load_file
from torch import Tensor

peft = pytest.importorskip("peft")

CUTS: dict[str, list[Cut]] = {
    "stock": [keep("down_blocks.1", 0), keep("up_blocks.1", 0, 2)],
    "remote_code": remove(
        "down_blocks.0.attentions.0", "up_blocks.1.resnets.0", "mid_block.attentions.0.transformer_blocks.0.attn2"
    ),
}
PLACES = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"]


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "parent"
    pipe = tiny.sd()
    pipe.register_modules(unet=cutting.sd())
    pipe.save_pretrained(folder)
    return folder


def opened(folder: Path) -> Model:
    return models.load(str(folder), device="cpu")


def pruned(parent: Path, cuts: Sequence[Cut], folder: Path) -> dict[str, str | None]:
    """A pruned model's folder; returns its names."""
    model = opened(parent)
    plan = export.structure(model.denoiser, cuts)
    export._write(model, plan, folder, None, None, "5GB")
    card = artifact.Manifest(
        parent="here",
        model_hash="0",
        stage="0",
        opens=plan.opens,
        component="unet",
        names=plan.names,  # type: ignore[arg-type]
    )
    artifact.save(folder, card, None)
    read = artifact.manifest(folder)
    assert read is not None
    return read.names


def trained(unet: Any) -> dict[str, Tensor]:
    """Two steps of LoRA training; returns its weights."""
    unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=PLACES, init_lora_weights="gaussian"))
    learning = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.1)
    for _ in range(2):
        unet(**cutting.inputs(unet)).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found: dict[str, Tensor] = peft.utils.get_peft_model_state_dict(unet)
    return found


@pytest.mark.parametrize("opens", CUTS)
def test_a_lora_is_trained_on_a_pruned_model_saved_and_loaded(parent: Path, tmp_path: Path, opens: str) -> None:
    pruned(parent, CUTS[opens], tmp_path / "made")
    model = opened(tmp_path / "made")
    plain = output(model.denoiser)
    torch.manual_seed(0)
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=trained(model.denoiser))
    fresh = opened(tmp_path / "made")
    assert torch.equal(output(fresh.denoiser), plain)
    fresh.pipe.load_lora_weights(tmp_path / "lora")
    assert torch.equal(output(fresh.denoiser), output(model.denoiser))
    assert not torch.allclose(output(fresh.denoiser), plain, atol=1e-3)
    fresh.pipe.unload_lora_weights()
    assert torch.equal(output(fresh.denoiser), plain)


@pytest.mark.parametrize("opens", CUTS)
def test_a_lora_of_the_parent_is_carried_over_by_names(
    parent: Path, tmp_path: Path, opens: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What was cut goes, what moved is renamed: then the pruned model with it is the parent with it, cut."""
    model = opened(parent)
    torch.manual_seed(0)
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=trained(model.denoiser))
    names = pruned(parent, CUTS[opens], tmp_path / "made")
    state = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    moved = {
        f"unet.{new}": tensor for key, tensor in state.items() if (new := renamed(key.removeprefix("unet."), names)) is not None
    }
    with surgery.applied(model.denoiser, CUTS[opens]):
        wanted = output(model.denoiser)
        weights = sum(".lora_A." in name or ".lora_B." in name for name, _ in model.denoiser.named_parameters())
    assert 0 < len(moved) == weights < len(state)

    made = opened(tmp_path / "made")
    plain = output(made.denoiser)
    with caplog.at_level("WARNING"):
        made.pipe.load_lora_weights(moved)
    assert "unexpected keys" not in caplog.text and "missing keys" not in caplog.text
    torch.testing.assert_close(output(made.denoiser), wanted, rtol=0, atol=1e-6)
    assert not torch.allclose(wanted, plain, atol=1e-3)
    held = {k for k in made.denoiser.state_dict() if ".lora_" in k}
    assert len(held) == len(moved)

    caplog.clear()
    raw = opened(tmp_path / "made").pipe  # as it is, it does not fit
    if opens == "stock":
        with pytest.raises(RuntimeError, match="size mismatch"):
            raw.load_lora_weights(state)
    else:
        with caplog.at_level("WARNING"):
            raw.load_lora_weights(state)
        assert "unexpected keys" in caplog.text
