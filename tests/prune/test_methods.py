"""Contracts that every prune method keeps, run over every file found in prune/."""

import json
import random
import re
import sys
import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lissom.core import methods, surgery
from lissom.core.candidate import Cut
from lissom.prune._task import Option, Pruned, Space, Task, enough, gathered, needed, until_met, within
from lissom.tests.prune import given
from lissom.workflow._prune_job import Job

ALL = pytest.mark.parametrize("method", methods.names("prune"))
DEPTH = {name for name in methods.names("prune") if hasattr(methods.load("prune", name), "units")}  # test_depth is for these
LEARNED = {
    n for n in methods.names("prune") if methods.load("prune", n).calibrated in ("learned", "trajectories")
}  # as are theirs
LAYERS = [name for name in methods.names("prune") if name not in DEPTH | LEARNED]
OTHERS = pytest.mark.parametrize("method", LAYERS)
SETTINGS: dict[str, dict[str, Any]] = {"slim_unet": {"layers_per_block": 1}}  # a method without defaults needs some
NARROWS = {name for name in LAYERS if getattr(methods.load("prune", name), "narrows", False)}
TARGETED = [name for name in LAYERS if not hasattr(methods.load("prune", name), "own_target")]
EITHER = [(method, plain) for method in LAYERS for plain in (False, True) if not (plain and method in NARROWS)]
CHOSEN = [(method, plain) for method, plain in EITHER if method in TARGETED]


def whole(method: str, name: str = "sd", plain: bool = False, of: str = "params") -> Job:
    """With everything still to choose from that a method cuts: layers, or widths."""
    return given.whole(name, plain, of, *([method] if method in NARROWS else []))


def play(method: str, task: Task, seed: int = 0, **settings: Any) -> Pruned:
    module = methods.load("prune", method)
    config = module.Config.model_validate({**SETTINGS.get(method, {}), **settings})
    result: Pruned = module.prune(task, config, random.Random(seed))
    return result


@ALL
def test_names_its_paper_and_documents_every_knob(method: str) -> None:
    module = methods.load("prune", method)
    assert (
        module.__doc__
        and module.Config.__doc__
        and module.calibrated in (True, False, "latents", "gradients", "learned", "trajectories")
    )
    assert hasattr(module, "measure") == (module.calibrated == "latents")
    assert module.Config.model_config["frozen"] and module.Config.model_config["extra"] == "forbid"
    assert re.match(r"https://", module.Config.paper) or method.startswith("random_")
    assert set(module.Config.model_fields) <= set(methods.comments(module))
    with pytest.raises(ValueError, match="Extra inputs"):
        module.Config.model_validate({"no such knob": 1})


@OTHERS
def test_the_same_seed_makes_the_same_cuts_and_they_survive_json(method: str) -> None:
    task = given.ask(whole(method), keep=0.7)
    first, again = play(method, task), play(method, task)
    assert first == again
    assert tuple(Cut.model_validate(json.loads(json.dumps(cut.plain()))) for cut in first.cuts) == first.cuts
    assert len(set(first.cuts)) == len(first.cuts) > 0


@pytest.mark.parametrize(("method", "plain"), EITHER)
def test_the_denoiser_is_read_and_not_changed(method: str, plain: bool) -> None:
    job = whole(method, plain=plain)
    before = {k: (id(v), v._version) for k, v in job.gauge.denoiser.state_dict(keep_vars=True).items()}
    play(method, given.ask(job, keep=0.7))
    assert {k: (id(v), v._version) for k, v in job.gauge.denoiser.state_dict(keep_vars=True).items()} == before


@pytest.mark.parametrize(("method", "plain"), CHOSEN)
@pytest.mark.parametrize("name", ["sd", "xl", "pixel", "dit", "sd3", "flux", "zoo:fashion"])
def test_the_target_is_reached_by_cuts_that_run_and_none_is_idle(method: str, plain: bool, name: str) -> None:
    job = whole(method, name, plain)
    gauge, most = job.gauge, max(space.most for space in job.spaces)
    smallest = 1 - most / job.total
    for keep in (smallest, 0.4 + 0.6 * smallest):
        cuts = play(method, given.ask(job, keep)).cuts
        with surgery.applied(gauge.denoiser, cuts), torch.no_grad():
            left = surgery.parameters(gauge.denoiser)
            assert bool(torch.isfinite(gauge.denoiser(**gauge.probe(), return_dict=False)[0]).all())
        if plain:
            small = given.stock_model(gauge.denoiser, cuts)
            assert not isinstance(small, str), small
            left = surgery.parameters(small)
        assert left <= keep * job.total * (1 + 1e-9)
        if method in NARROWS:
            assert not idle(job, cuts, (1 - keep) * job.total)
        elif not plain:  # there each cut is a choice of its own
            saved = {option.cuts[0]: option.saved for (option,) in job.spaces[0].sites}
            assert not [c for c in cuts if enough(sum(saved[o] for o in cuts) - saved[c], (1 - keep) * job.total)]


def idle(job: Job, cuts: Sequence[Cut], need: float) -> list[str]:
    """Layers of which one more head, unit or group could stay."""
    saved = job.gauge.params_saved(cuts)
    found = []
    for width in job.widths:
        without = Cut.model_validate(
            {"address": width.address, "what": width.what, "value": tuple(range(width.granule, width.count))}
        )
        gone = any(cut.address == width.address for cut in cuts)
        if gone and enough(saved - job.gauge.params_saved([without]), need):
            found.append(width.address)
    return found


@pytest.mark.parametrize(("method", "plain"), CHOSEN)
def test_where_all_may_be_kept_nothing_is_cut(method: str, plain: bool) -> None:
    assert play(method, given.ask(whole(method, plain=plain), keep=1.0)).cuts == ()


@pytest.mark.parametrize("method", TARGETED)
def test_the_target_may_be_in_macs(method: str) -> None:
    job = whole(method, "dit", method not in NARROWS, "macs")
    cuts = play(method, given.ask(job, keep=0.6)).cuts
    assert job.gauge.after(cuts)[1] <= 0.6 * job.total


@pytest.mark.parametrize("method", sorted(set(TARGETED) - NARROWS))
def test_the_target_may_be_in_milliseconds(method: str) -> None:
    job = given.whole("dit", of="latency")
    (space,) = job.spaces
    saved = {option.cuts[0]: option.saved for (option,) in space.sites}
    cuts = play(method, given.ask(job, keep=0.7)).cuts
    assert sum(saved[cut] for cut in cuts) >= 0.3 * job.total * (1 - 1e-9)


@OTHERS
def test_a_copy_outside_the_package_is_a_method_too(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = methods.load("prune", method)
    theirs = types.ModuleType(f"mylab.{method}")
    theirs.__dict__.update({k: v for k, v in vars(ours).items() if not k.startswith("__")})
    monkeypatch.setitem(sys.modules, "mylab", types.ModuleType("mylab"))
    monkeypatch.setitem(sys.modules, f"mylab.{method}", theirs)
    assert given.job("sd", f"mylab.{method}", **SETTINGS.get(method, {})).module is theirs
    task = given.ask(whole(method), keep=0.7)
    assert play(f"mylab.{method}", task, **SETTINGS.get(method, {})) == play(method, task)


def test_random_cuts_differ_from_seed_to_seed_and_stay_near_the_target() -> None:
    for plain in (False, True):
        job = given.whole("xl", plain)
        need = 0.25 * job.total
        found = [play("random_cuts", given.ask(job, keep=0.75), seed).cuts for seed in range(12)]
        assert len(set(found)) > 8
        largest = max(option.saved for space in job.spaces for site in space.sites for option in site)
        for cuts in found:
            assert need <= job.gauge.params_saved(cuts) < need + largest


def options(*saved: float) -> list[Option]:
    return [Option((Cut(address=f"l{i}", what="remove"),), amount) for i, amount in enumerate(saved)]


NOTHING = Option((), 0.0)


@pytest.mark.parametrize("seed", range(20))
def test_options_are_taken_until_the_target_is_met_and_none_that_could_be_given_back(seed: int) -> None:
    rng = random.Random(seed)
    order = options(*(rng.uniform(0.1, 5) for _ in range(8)))
    base, total = Option((), rng.choice([0.0, 2.0])), sum(o.saved for o in order)
    need = rng.uniform(0, 1) * (total + base.saved)
    taken = until_met(order, base, need)
    saved = base.saved + sum(o.saved for o in taken)
    assert enough(saved, need) and not [o for o in taken if enough(saved - o.saved, need)]
    assert taken == [o for o in order if o in taken]
    assert set(needed(order, base, need)) <= set(order)


def test_a_target_that_fits_exactly_takes_no_more_for_the_rounding_of_a_share() -> None:
    need = (1 - 0.7) * 1000  # 300.00000000000006
    assert need > 300 and until_met(options(100, 200, 300), NOTHING, need) == options(100, 200)


def test_a_base_goes_beyond_the_target_only_where_no_other_does_not() -> None:
    small, fits, large = (Space((), Option(options(s)[0].cuts, s)) for s in (1.0, 4.0, 9.0))
    assert within([large, fits, small], 4.0) == [fits, small]
    assert within([large, fits], 2.0) == [fits]


def test_cuts_inside_a_removed_layer_are_left_out_and_none_is_there_twice() -> None:
    mid, inside, other = (Cut(address=a, what="remove") for a in ("mid", "mid.attentions.0", "midst"))
    assert gathered(Option((mid, other), 1.0), [Option((inside, other), 1.0)]) == (mid, other)
    assert Option((mid, Cut(address="a", what="replace", value="empty")), 1.0).name == "mid + a (replace)"
