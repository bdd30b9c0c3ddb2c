"""docs/families.md has a row for every pipeline of the diffusers that it was made with. Nothing is run here."""

from pathlib import Path

import diffusers
import lissom
import pytest
from lissom.benchmarks import families
from lissom.benchmarks._families_found import TASKS, pipelines

PAGE = (Path(lissom.__file__).parent / "docs" / "families.md").read_text(encoding="utf-8")


def test_every_pipeline_has_its_row() -> None:
    if families.version(PAGE) != diffusers.__version__:
        pytest.skip(f"the page is of diffusers {families.version(PAGE)}, installed is {diffusers.__version__}")
    here, found = families.names(PAGE), {p.name for p in pipelines()}
    assert not found - here, "run python -m lissom.benchmarks.families"
    assert not here - found, "rows of pipelines that are not there"


def test_what_a_pipeline_makes_is_read_from_its_call() -> None:
    tasks = {p.name: p.task for p in pipelines()}
    assert set(tasks.values()) == set(TASKS)
    assert {
        tasks[f"{name}Pipeline"]
        for name in ("StableDiffusion", "Flux2Klein", "StableDiffusionControlNet", "SanaControlNet", "HunyuanDiTControlNet")
    } == {"text to image"}
    assert tasks["DiTPipeline"] == "class to image" and tasks["DDPMPipeline"] == "unconditional"
    assert tasks["KandinskyV22Pipeline"] == "embeddings to image" and tasks["KandinskyPriorPipeline"] == "text to embeddings"
    assert tasks["FluxFillPipeline"] == tasks["StableDiffusionControlNetImg2ImgPipeline"] == "image to image"
    assert tasks["WanPipeline"] == tasks["HeliosPipeline"] == "video" and tasks["StableAudioPipeline"] == "audio"
