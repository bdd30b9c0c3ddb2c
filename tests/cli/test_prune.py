"""`lissom prune` and `lissom inspect`: structures without weights, sizes to the last digit, bad input in one sentence."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from lissom.core import export
from lissom.core.models import ZOO
from lissom.tests.cli.commands import lissom, nothing_left, refused
from lissom.tests.core import tiny

SMALL = ("--calibration", "2", "--no-measure", "--device", "cpu", "--set", "latency_batches=[]")


def dry(*words: Any) -> dict[str, Any]:
    ended = lissom("prune", *words, "--dry-run", "--json", "-q")
    assert ended.exit_code == 0, ended.output
    found: dict[str, Any] = json.loads(ended.stdout)["stages"][0]
    return found


def test_the_headline_of_the_fact_sheet(here: Path) -> None:
    found = dry("slim_unet", "config:sdxl", "--set", "preset=koala-700m")
    assert found["before"] == {"parameters": 2_567_463_684, "macs": found["before"]["macs"], "disk": 4 * 2_567_463_684}
    assert found["after"]["parameters"] == 782_822_724 and found["opens"] == "stock"
    assert found["after"]["macs"] / found["before"]["macs"] == pytest.approx(0.400, abs=5e-4)
    assert nothing_left(here)


def test_dry_run_for_people(here: Path) -> None:
    from diffusers import UNet2DConditionModel

    said = lissom("prune", "slim_unet", "zoo:fashion", "--set", "layers_per_block=1", "--save-dtype", "float16", "--dry-run")
    config = json.loads((ZOO / "fashion" / "unet" / "config.json").read_text()) | {"layers_per_block": 1}
    built = sum(p.numel() for p in UNet2DConditionModel.from_config(config).parameters())
    before = (ZOO / "fashion" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert f"2,833,252 -> {built:,} parameters; 33,590,400 -> " in said.stdout
    assert f"{before:,} -> {2 * built:,} bytes of denoiser weights; 8 cuts, opens in plain diffusers" in said.stdout
    assert nothing_left(here)
    bounded = lissom("prune", "laptop", "zoo:fashion-dit", "--keep", "0.5", "--dry-run").stdout
    assert "3,590,704 -> at most 1,795,352 parameters" in bounded and "12 cuts decide what goes: 96 denoiser calls" in bounded


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["laptop", "zoo:fashion", "--keep", "0"], "keep=0: must be above 0 and at most 1, the share of the params that is left"),
        (["laptop", "zoo:fashion", "--keep", "1.5"], "keep=1.5: must be above 0 and at most 1"),
        (["laptop", "zoo:fashion", "--keep", "nan"], "keep: input should be a finite number"),
        (["laptop", "zoo:fashion", "--keep", "0.05"], "keep=0.05: cannot be reached; the cuts hold 90.9% of the params"),
        (["laptop", "zoo:fashion", "--of", "money"], "of: input should be 'params', 'macs' or 'latency', got 'money'"),
        (["laptop", "zoo:fashion", "--include", "layers.*"], "pattern 'layers.*' matches no layer that can be cut"),
        (["laptop", "zoo:fashion", "--exclude", "*"], "include, exclude and units leave none of the"),
        (["laptop", "zoo:fashion", "--set", "units=[resnets]"], "units: 'resnets': zoo:fashion has none; there are attention"),
        (["laptop", "zoo:fashion", "--set", "solver=ilp"], "solver: input should be 'knapsack' or 'greedy', got 'ilp'"),
        (["laptop", "zoo:fashion", "--set", "shard_size=big"], "shard_size"),
        (["laptop", "zoo:fashion", "--save-dtype", "int8"], "save_dtype: input should be 'float32', 'float16' or 'bfloat16'"),
        (["laptop", "zoo:fashion", "--data", "nowhere"], "nowhere: no such folder or file"),
        (["laptop", "zoo:fashion", "--steps", "2000"], "--steps 2000: DDIMScheduler was trained with 1000 timesteps"),
        (["laptop", "config:sd15"], "config:sd15: a structure without weights cannot be run"),
        (["laptop", "config:sd16", "--dry-run"], "Did you mean 'sd15'"),
        (["magnitde", "zoo:fashion"], "no method 'magnitde' in prune/; there are diff_pruning, hand_map, laptop"),
        (["slim_unet", "zoo:fashion", "--keep", "0.5"], "slim_unet: brings its own structure, so that there is no keep to set"),
        (["slim_unet", "zoo:fashion", "--include", "up*"], "slim_unet: brings its own structure; units, include and exclude"),
        (["laptop", "zoo:fashion", "--set", "latency_batches=[0]"], "latency_batches.0: input should be greater than or equal to 1"),
        (["laptop", "zoo:fashion", "--offload", "sequential"], "--offload sequential: "),
        (["slim_unet", "zoo:fashion"], "slim_unet: say what stays: --set preset=NAME"),
        (["slim_unet", "zoo:fashion", "--set", "preset=koala-700m"], "preset koala-700m is for a U-Net of SDXL's shape"),
        (["slim_unet", "config:sdxl", "--set", "preset=bk-tiny", "--dry-run"], "is for a U-Net of Stable Diffusion 1 or 2's shape"),
        (["slim_unet", "zoo:fashion", "--set", "preset=koala"], "slim_unet: no preset 'koala'"),
        (["slim_unet", "zoo:fashion-dit", "--set", "preset=bk-base"], "DiTTransformer2DModel is no U-Net"),
        (["magnitude", "config:sd15", "--of", "latency", "--keep", "0.9", "--dry-run"], "its time cannot be measured"),
        (["random_cuts", "config:sd15", "--keep", "0.4", "--set", "shortcuts=false", "--dry-run"], "the cuts hold 50.7% of the params"),
        (["magnitude", "zoo:fashion", "--require-plain-load", "--keep", "0.1"], "the cuts that a stock config can express hold"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_cannot_be_is_refused_and_leaves_nothing(here: Path, words: list[str], says: str) -> None:
    own = [] if "--dry-run" in words else ["--out", "run"]
    said = refused("prune", *words, "--device", "cpu", *own)
    assert says in said and len(said.splitlines()) == 1, said
    assert nothing_left(here)


@pytest.mark.parametrize("harm", ["half", "garbage", "gone"])
def test_a_broken_weight_file(here: Path, harm: str) -> None:
    shutil.copytree(ZOO / "fashion-dit", here / "mine")
    file = here / "mine" / "transformer" / "diffusion_pytorch_model.safetensors"
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if harm == "half" else b"garbage" * 999)
    said = refused("prune", "magnitude", "./mine", "--out", "run", *SMALL)
    assert str(file.parent if harm == "gone" else file) in said and len(said.splitlines()) == 1, said
    assert nothing_left(here, "mine")


def test_code_that_comes_with_a_model_is_not_run(here: Path) -> None:
    shutil.copytree(ZOO / "fashion-dit", here / "mine")
    (here / "mine" / "transformer" / "model.py").write_text("raise SystemExit('ran')")
    assert "not run unless you pass --trust-remote-code" in refused("prune", "magnitude", "./mine", "--out", "run", *SMALL)
    assert nothing_left(here, "mine")


def test_a_denoiser_without_layers(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lissom.core import anatomy

    monkeypatch.setattr(anatomy, "layers", lambda denoiser: [])
    monkeypatch.setattr(anatomy, "traced", lambda denoiser, forward: [])
    tiny.ddim().save_pretrained(here / "mine")
    said = refused("prune", "magnitude", "./mine", "--out", "run", *SMALL)
    assert "UNet2DModel has no layer that can be cut" in said and nothing_left(here, "mine")


def test_json_is_the_report(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_verify", lambda *args, **kwargs: 0.0)
    ended = lissom("prune", "random_cuts", "zoo:fashion-dit", "--keep", "0.8", "--out", "run", "--json", "-q", *SMALL)
    assert ended.exit_code == 0 and json.loads(ended.stdout)["kind"] == "prune"
    assert "Speed not measured" in lissom("report", "run").stdout + (here / "run" / "report.md").read_text()
    assert lissom("inspect", "run").stdout.startswith(f"{here / 'run'}: DiTPipeline, DDIMScheduler")
    assert "quality" not in lissom("sample", "run", "--images", "2", "--steps", "2", "--out", "a.png").stderr


def test_help_shows_the_settings_of_the_method() -> None:
    said = lissom("prune", "laptop", "--help").stdout
    assert "--require-plain-load" in said and "solver = 'knapsack'" in said and "https://arxiv.org/abs/2404.11098" in said


def test_inspect_a_structure() -> None:
    said = lissom("inspect", "config:sd15").stdout
    assert "859,520,964 parameters" in said and "401,636,720,640 MACs per image and denoiser call" in said
    found = json.loads(lissom("inspect", "config:sd15", "--layers", "--json").stdout)
    site = next(x for x in found["layers"] if x["address"] == "up_blocks.0.resnets.0")
    assert (site["parameters"], site["parameters"] - site["freed"], site["removal"]) == (49_164_800, 3_278_080, "shortcut")
    assert site["opens"] == "remote_code" and len(found["together"]) > 4
    assert all(len({cut["address"] for cut in two}) == 2 for two in found["together"])
    middle = next(x for x in found["layers"] if x["address"] == "mid_block")
    assert middle["opens"] == "stock"


def test_inspect_a_loaded_model_lists_every_layer() -> None:
    said = lissom("inspect", "zoo:fashion-dit", "--layers", "--device", "cpu").stdout
    assert "transformer_blocks.11.ff" in said and "12 transformer_block  its absence leaves: input" in said
