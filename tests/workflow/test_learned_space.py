"""Searches of heads, units and depth blocks that start from learned scores: what opens them, what they cost, what is refused."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from lissom.core.candidate import Candidate, Cut
from lissom.core.errors import UserError
from lissom.core.recipe import build, parse
from lissom.core.stages import SearchStage
from lissom.search._space import toggled
from lissom.tests.workflow import small
from lissom.workflow import _learned
from lissom.workflow._plans import Plans, plans_of
from lissom.workflow._subject import Subject
from lissom.workflow.context import Context, Options, Silent
from lissom.workflow.run import run
from safetensors import safe_open

MODEL = "zoo:fashion-dit"
QUICK: dict[str, Any] = {"measure": False, "latency_batches": []}
MASKS = {"prune": "masks", "keep": 0.9, "iterations": 2, "batch": 2, "images": 2, "solver_steps": 2, **QUICK}
DEPTH = {
    "prune": "tinyfusion",
    "structure": "1:2",
    "iterations": 3,
    "batch": 4,
    "images": 6,
    "data_steps": 2,
    "rank": 2,
    **QUICK,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of runs that learned."""
    home, found = tmp_path_factory.mktemp("learned"), {}
    for name, stage in (("masks", MASKS), ("depth", DEPTH)):
        text = json.dumps({"lissom": 1, "model": MODEL, "stages": [stage]})
        context = Context(parse(text, "r"), home, Options(device="cpu"), Silent())
        run(context.recipe, text, home / name, context, resume=False, single=True)
        found[name] = str(home / name)
    return found


def stage_of(**stage: Any) -> SearchStage:
    found = build({"lissom": 1, "model": MODEL, "stages": [{"search": "random_search", "steps": 2, **stage}]}, "r").stages[0]
    assert isinstance(found, SearchStage)
    return found


def plans(home: Path, folder: Path | None = None, **stage: Any) -> Plans:
    given = {"search": "random_search", "steps": 2, **stage}
    context = Context(build({"lissom": 1, "model": MODEL, "stages": [given]}, "r"), home, Options(device="cpu"))
    return plans_of(Subject.load(MODEL, context), stage_of(**stage), folder)


def test_a_search_opens_with_what_the_scores_choose_and_saves_the_model(runs: dict[str, str], tmp_path: Path) -> None:
    space = ["timesteps", "masks", "depth"]
    recipe = small.text(MODEL, space=space, learned=list(runs.values()), budget={"macs": 0.7}, trials=8)
    progress = small.Watched()
    small.search(tmp_path / "run", recipe, progress=progress)
    found = small.report(tmp_path / "run")
    rows = {row["origin"]: row for row in found["candidates"]}
    opened = [
        f"learned {kind}, {keep} of the MACs" for keep in ("85%", "70%") for kind in ("masks", "depth", "masks and depth")
    ]
    assert set(opened) <= set(rows)
    for origin in opened:
        whats = {cut["what"] for cut in rows[origin]["cuts"]}
        assert ("remove" in whats) == ("depth" in origin) and bool(whats - {"remove"}) == ("masks" in origin)
        assert rows[origin]["macs_ratio"] <= float(origin.split()[-4].rstrip("%,")) / 100 + 1e-6
    assert found["space"] == space and "learned scores" in found["conditions"]
    assert found["winner"]["cuts"] and (tmp_path / "run" / "model" / "model_index.json").is_file()
    assert all(len(r["cuts"]) == len({(c["address"], c["what"]) for c in r["cuts"]}) for r in found["candidates"])


def test_the_least_open_heads_and_units_go_first_and_the_likeliest_blocks_stay(runs: dict[str, str], tmp_path: Path) -> None:
    found = plans(tmp_path, space=["timesteps", "masks", "depth"], learned=list(runs.values()))
    best = next(iter(found.fixed.values()))
    opened = dict(_learned.opening(found.learned, found.space, best, 0))
    with safe_open(f"{runs['masks']}/gates.safetensors", framework="pt") as file:
        gates = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert json.loads(file.metadata()["widths"])
    cuts = found.space.candidate(opened["learned masks, 80% of the MACs"]).cuts
    assert cuts
    for cut in cuts:
        scores = gates[f"{cut.address} {cut.what}"]
        assert isinstance(cut.value, tuple)
        gone = [i for i in range(len(scores)) if i not in cut.value]
        assert max(scores[i] for i in gone) <= min(scores[i] for i in cut.value)
    with safe_open(f"{runs['depth']}/gates.safetensors", framework="pt") as file:
        stays = json.loads(file.metadata()["stays"])
    assert sum(stays.values()) == pytest.approx(6.0)
    gone_blocks = [cut.address for cut in found.space.candidate(opened["learned depth, 60% of the MACs"]).cuts]
    assert max(stays[a] for a in gone_blocks) <= min(chance for a, chance in stays.items() if a not in gone_blocks)


def test_costs_are_those_of_the_cut_model(runs: dict[str, str], tmp_path: Path) -> None:
    found = plans(tmp_path, space=["timesteps", "masks", "depth"], learned=list(runs.values()), budget={"params": 0.9})
    best = next(iter(found.fixed.values()))
    gauge = found.weigh.gauge
    for name, genome in _learned.opening(found.learned, found.space, best, 0):
        candidate = found.space.candidate(genome)
        params, macs = gauge.after(candidate.cuts)
        shares = found.shares(candidate)
        assert shares["params"] == pytest.approx(params / gauge.params, abs=1e-9), name
        assert shares["macs"] == pytest.approx(macs / gauge.macs, abs=2e-3), name  # of guidance's halves too


def test_skipping_what_is_narrowed_gives_no_parameters_back(runs: dict[str, str], tmp_path: Path) -> None:
    """And saves the MACs that are left of it."""
    space = plans(
        tmp_path, space=["timesteps", "skips", "masks"], learned=runs["masks"], budget={"params": 0.8, "macs": 0.9}
    ).space
    narrow = space.recut(space.random_times(random.Random(0)), 0, 1)
    (choice,) = space.chosen(narrow)
    block = next(a for a in space.layers if choice.name.startswith(f"{a}."))
    both = toggled(narrow, 0, block)
    assert space.share(both, "params") == space.share(narrow, "params") < 1
    whole = toggled(space.random_times(random.Random(0)), 0, block)
    gained = space.share(narrow) - space.share(both)
    assert 0 < gained < 1 - space.share(whole)
    assert all(space.fits(space.fill(space.random_times(random.Random(k)), random.Random(k))) for k in range(5))


def test_what_is_removed_is_not_narrowed_and_what_is_narrowed_may_be_skipped(runs: dict[str, str], tmp_path: Path) -> None:
    space = plans(tmp_path, space=["timesteps", "skips", "masks", "depth"], learned=list(runs.values())).space
    names = {site[0].lost: i for i, site in enumerate(space.sites)}
    block, inside = names[frozenset({"transformer_blocks.3"})], names[frozenset({"transformer_blocks.3.attn1.keep_heads"})]
    plain = space.random_times(random.Random(0))
    both = space.recut(space.recut(plain, inside, 1), block, 1)
    assert [choice.name for choice in space.chosen(both)] == ["transformer_blocks.3"]
    narrow = space.recut(plain, inside, 1)
    assert "transformer_blocks.3" in space.left(narrow) and "transformer_blocks.3" not in space.left(both)
    assert space.genome(Candidate(plan=space.candidate(narrow).plan, cuts=space.candidate(narrow).cuts)) == narrow


def test_a_search_goes_on_when_the_run_it_learned_from_is_gone(runs: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(runs["depth"], tmp_path / "learned")
    first = plans(tmp_path, tmp_path, space=["timesteps", "depth"], learned="learned")
    shutil.rmtree(tmp_path / "learned")
    assert plans(tmp_path, tmp_path, space=["timesteps", "depth"], learned="learned").space.sites == first.space.sites
    with pytest.raises(UserError, match="learned: .*learned.* cannot be read"):
        plans(tmp_path, space=["timesteps", "depth"], learned="learned")


def test_scores_that_do_not_fit_are_not_kept(runs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="space: masks: nothing that"):
        plans(tmp_path, tmp_path, space=["timesteps", "masks"], learned=runs["depth"])
    assert not (tmp_path / "learned-scores.json").exists()


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"space": ["timesteps", "masks"]}, "space: masks: starts from learned scores. Name the run"),
        ({"learned": ["somewhere"]}, "learned: has no effect on this space"),
        ({"space": ["timesteps", "masks"], "learned": ["r"], "budget": {"latency": 0.8}}, "space: masks: how time shrinks"),
    ],
)
def test_what_does_not_fit_together_is_refused_at_once(stage: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        stage_of(**stage)


def test_scores_of_another_kind_or_model_are_refused(runs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="space: depth: nothing that .* holds are chances of blocks to stay"):
        plans(tmp_path, space=["timesteps", "depth"], learned=runs["masks"])
    with pytest.raises(UserError, match="space: masks: nothing that .* holds are gates of heads and units"):
        plans(tmp_path, space=["timesteps", "masks"], learned=runs["depth"])
    recipe = build({"lissom": 1, "model": "zoo:fashion", "stages": [{"search": "random_search"}]}, "r")
    context = Context(recipe, tmp_path, Options(device="cpu"))
    subject = Subject.load("zoo:fashion", context)
    for kind in ("masks", "depth"):
        with pytest.raises(UserError, match=f"learned: .*{kind}: learned of another model"):
            plans_of(subject, stage_of(space=["timesteps", kind], learned=runs[kind]))


def test_ladders_of_few_heads_have_every_rung_and_those_of_many_units_eighths() -> None:
    from lissom.core.widths import Width

    heads = _learned._ladder(Width("a", "keep_heads", 4, 1), [0.0, 3.0, -1.0, 2.0])
    assert [rung.cut.value for rung in heads] == [(0, 1, 3), (1, 3), (1,)] and [r.score for r in heads] == [-1.0, 0.0, 2.0]
    units = _learned._ladder(Width("f", "keep_units", 64, 1), [float(i) for i in range(64)])
    assert [len(rung.cut.value) for rung in units if isinstance(rung.cut.value, tuple)] == [56, 48, 40, 32, 24, 16, 8]
    assert units[0].cut == Cut(address="f", what="keep_units", value=tuple(range(8, 64))) and units[0].score == 3.5
    groups = _learned._ladder(Width("r", "keep_channels", 6, 3), [1.0, 0.0])
    assert [rung.cut.value for rung in groups] == [(0, 1, 2)]
