"""Diff-Pruning: which timesteps count, what goes first, how far, in what the target is set, and when it says something."""

import functools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from lissom.core import surgery
from lissom.core.candidate import Cut
from lissom.core.errors import UserError
from lissom.core.widths import Width
from lissom.prune import diff_pruning, magnitude_widths, masks, random_widths
from lissom.prune._task import Pruned, Task
from lissom.prune._widths import many_shapes
from lissom.tests.core import cutting
from lissom.tests.prune import given
from lissom.workflow._gauge import Gauge
from lissom.workflow._widths import saves, space
from torch import nn

METHODS: dict[str, Any] = {m.__name__.rpartition(".")[2]: m for m in (diff_pruning, magnitude_widths, random_widths)}


def task(name: str = "sd", keep: float = 0.8, of: str = "params", losses: Any = None, method: str = "diff_pruning") -> Task:
    job = given.whole(name, of=of, method=method)
    asked = given.ask(job, keep)
    return replace(asked, gradients=given.gradients(job.gauge.denoiser, losses)) if losses else asked


def run(asked: Task, method: str = "diff_pruning", **settings: Any) -> Pruned:
    module = METHODS[method]
    result: Pruned = module.prune(
        asked,
        module.Config.model_validate({"stride": 1, **settings} if method == "diff_pruning" else settings),
        random.Random(0),
    )
    return result


def left(result: Pruned, widths: tuple[Width, ...]) -> dict[str, float]:
    """Share of each width that stays."""
    found = {width.address: 1.0 for width in widths}
    counts = {width.address: width.count for width in widths}
    for cut in result.cuts:
        assert isinstance(cut.value, tuple)
        found[cut.address] = len(cut.value) / counts[cut.address]
    return found


@pytest.mark.parametrize(
    ("losses", "threshold", "added", "visited"),
    [
        ((1.0, 0.5, 0.2, 0.06, 0.04, 0.9), 0.05, 4, 5),  # ends at the first below, which is seen and not added
        ((1.0, 0.5, 0.2, 0.06, 0.05, 0.9), 0.05, 6, 6),  # at the threshold counts
        ((1.0, 0.5, 1e-9, 0.3), 0.0, 4, 4),  # all
        ((1.0, 2.0, 0.9, 3.0), 0.5, 2, 3),  # of the largest so far
        ((1.0, 0.99, 0.98), 1.0, 1, 2),
    ],
)  # fmt: skip
def test_steps_count_while_their_loss_is_a_share_of_the_largest(
    losses: tuple[float, ...], threshold: float, added: int, visited: int
) -> None:
    said: list[str] = []
    asked = replace(task(losses=losses), say=said.append)
    result = run(asked, threshold=threshold)
    assert said == [f"{added} of {visited} visited timesteps count; the largest loss is {max(losses[:visited]):.4g}"]
    assert bool(result.warnings) == (added == 1)


def test_what_does_not_count_changes_no_choice() -> None:
    """The step that ends the visits is tested before its gradient is taken."""
    one, other = (run(task(losses=losses), threshold=0.1) for losses in ((1.0, 0.5), (1.0, 0.5, 0.01, 7.0)))
    assert one.cuts == other.cuts and one.scores == other.scores
    assert run(task(losses=(1.0, 0.5, 0.2)), threshold=0.1).scores != one.scores


def test_a_stride_visits_fewer_steps() -> None:
    said: list[str] = []
    run(replace(task(losses=(1.0,) * 40), say=said.append), stride=10)
    assert said[0].startswith("4 of 4 visited")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [0.9, 0.8, 0.7])
def test_locally_every_layer_keeps_the_same_share(method: str, keep: float) -> None:
    """To within one head, unit or group of each."""
    asked = task(keep=keep, method=method)
    shares = left(run(asked, method), asked.widths)
    gone = {width: 1 - shares[width.address] for width in asked.widths}
    least = min(gone.values())
    assert all(share - least <= 1 / len(width.groups) + max(1 / len(w.groups) for w in gone) for width, share in gone.items())
    fine = [share for width, share in gone.items() if width.what == "keep_units"]
    assert (
        max(fine) - min(fine) <= 0.08
    )  # but for what was given back, since a larger step of another layer went beyond the target


@pytest.mark.parametrize("method", ["diff_pruning", "magnitude_widths"])
def test_of_each_width_the_least_go(method: str) -> None:
    from lissom.prune._coupled import importances, magnitude, taylor

    asked = task(method=method)
    scorer = taylor() if method == "diff_pruning" else magnitude(2)
    result, cut = run(asked, method), 0
    with asked.gradients(1, lambda losses: losses[-1] >= 0.05 * max(losses)):
        scores = {w.address: importances(asked.denoiser, w, scorer).tolist() for w in asked.widths}
    for each in result.cuts:
        (width,) = (w for w in asked.widths if w.address == each.address)
        assert isinstance(each.value, tuple)
        stay = {i // width.granule for i in each.value}
        go = set(range(len(width.groups))) - stay
        assert max(scores[width.address][k] for k in go) <= min(scores[width.address][k] for k in stay)
        assert result.scores[width.address] == pytest.approx(sum(scores[width.address]) / len(width.groups))
        cut += 1
    assert cut > 10


def test_globally_what_is_worth_least_goes_wherever_it_is() -> None:
    """Of two feed-forwards, one with hardly any weights: locally both lose half, globally it alone."""
    unet = cutting.sd()
    small, large = (f"down_blocks.{k}.attentions.0.transformer_blocks.0.ff" for k in (0, 1))
    with torch.no_grad():
        for p in unet.get_submodule(small).parameters():
            p.mul_(1e-4)
    gauge = Gauge(unet)
    pair = (Width(small, "keep_units", 32, 1), Width(large, "keep_units", 64, 1))
    priced = saves(gauge, "params")
    spaces = (space(pair, priced),)
    of_small = space(pair[:1], priced).most
    asked = Task(unet, (), spaces, 0.9 * of_small, given.added, widths=pair, saves=priced, gradients=given.gradients(unet))
    for method in ("diff_pruning", "magnitude_widths"):
        assert [cut.address for cut in run(asked, method, scope="global").cuts] == [small]
        assert [cut.address for cut in run(asked, method).cuts] == [small, large]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scope", ["local", "global"])
def test_something_of_every_layer_stays_even_at_the_end(method: str, scope: str) -> None:
    """And with `least`, that much of it."""
    job = given.whole("sd", method=method)
    smallest = 1 - job.spaces[0].most / job.total
    asked = given.ask(job, smallest)
    result = run(asked, method, scope=scope)
    assert len(result.cuts) == len(asked.widths)
    for cut, width in zip(result.cuts, asked.widths, strict=True):
        assert isinstance(cut.value, tuple) and len(cut.value) == width.granule
    half = run(given.ask(job, 0.8), method, scope=scope, least=0.5)
    assert all(share >= 0.5 for share in left(half, asked.widths).values())


def test_what_is_allowed_is_all_that_goes() -> None:
    for what in ("heads", "units", "channels"):
        asked = given.ask(given.job("sd", "diff_pruning", keep=1.0, what=(what,)), 0.97)
        assert {cut.what for cut in run(asked, what=[what]).cuts} == {f"keep_{what}"}
    assert {cut.what for cut in run(task()).cuts} == {"keep_heads", "keep_units", "keep_channels"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "of"), [("dit", "macs"), ("flux", "params"), ("sd3, dual attention", "params")])
def test_modulations_go_where_they_are_asked_for_alone(name: str, of: str, method: str) -> None:
    usual = given.whole(name, of=of, method=method)
    assert {width.what for width in usual.widths} == {"keep_heads", "keep_units"}
    settings: Any = {"what": ("modulation", "units"), "least": 0.25}
    job = given.job(name, method, keep=1.0, of=of, **settings)
    assert {width for width in usual.widths if width.what == "keep_units"} < set(job.widths) and {
        layer.kind for layer in job.layers
    } >= {"norm"}
    most = job.spaces[0].most / job.total
    cuts = run(given.ask(job, 1 - most / 10), method, **settings).cuts
    assert {cut.what for cut in cuts} == {"keep_units", "keep_modulation"}
    assert job.gauge.after(cuts)[of == "macs"] <= (1 - most / 10) * job.total
    counts = {(width.address, width.what): width.count for width in job.widths}
    assert all(len(cut.value or ()) >= 0.25 * counts[cut.address, cut.what] for cut in cuts)
    with surgery.applied(job.gauge.denoiser, cuts), torch.no_grad():
        assert bool(torch.isfinite(job.gauge.denoiser(**job.gauge.probe(), return_dict=False)[0]).all())


@pytest.mark.parametrize("method", METHODS)
def test_what_stays_is_rounded_for_fast_kernels_but_heads_are_not(method: str) -> None:
    asked = task("zoo:fashion", 0.8, method=method)
    for cut in run(asked, method, round_to=8).cuts:
        (width,) = (w for w in asked.widths if w.address == cut.address)
        assert isinstance(cut.value, tuple)
        assert cut.what == "keep_heads" or len(cut.value) % 8 == 0
        assert len(cut.value) % width.granule == 0
    with surgery.applied(asked.denoiser, run(asked, method, round_to=8).cuts):
        assert surgery.parameters(asked.denoiser) <= 0.8 * given.whole("zoo:fashion").gauge.params


@pytest.mark.parametrize("method", [*METHODS, "masks"])
def test_blocks_come_in_few_shapes_where_that_is_asked_for_and_many_are_warned_of(method: str) -> None:
    """torch.compile makes 8 versions of a class of blocks."""
    job = given.whole("zoo:fashion-dit", method=method)
    asked = given.ask(job, 0.9)

    def cut(**settings: Any) -> tuple[tuple[Cut, ...], tuple[str, ...]]:
        if method == "masks":
            drawn = random.Random(0)
            scores = {w: [drawn.gauss(0, 1) for _ in w.groups] for w in job.widths}
            cuts = masks.chosen(asked, job.widths, scores, masks.Config(**settings))
            return cuts, many_shapes(asked, cuts)
        found = run(asked, method, scope="global", **settings)
        return found.cuts, found.warnings

    def shapes(cuts: tuple[Cut, ...]) -> int:
        left = {(c.address, c.what): len(c.value or ()) for c in cuts}
        blocks: dict[str, list[int]] = {}
        for w in job.widths:
            blocks.setdefault(w.address.rpartition(".")[0], []).append(left.get((w.address, w.what), w.count))
        return len({tuple(counts) for counts in blocks.values()})

    free, said = cut()
    many = [
        one for one in said if f"BasicTransformerBlocks come in {shapes(free)} different widths" in one and "shapes=8" in one
    ]
    assert bool(many) == (shapes(free) > 8)
    assert many or method == "random_widths"  # scores of one kind everywhere empty whole layers, one after the other
    few, said = cut(shapes=3)
    assert shapes(few) <= 3 and not any("different widths" in one for one in said)
    assert job.gauge.params_saved(few) >= asked.need
    assert job.gauge.params_saved(few) <= 2 * asked.need  # no more than raising some makes necessary


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"least": 0.95}, r"with what=heads, units, channels, least=0\.95 .* only \d+% of what has to go can go. Allow more"),
        ({"round_to": 64}, r"round_to=64 only \d+%"),
    ],
)
def test_settings_that_leave_too_little_are_refused_before_gradients_are_taken(settings: dict[str, Any], says: str) -> None:
    asked = replace(task(keep=0.6), gradients=lambda *_: pytest.fail("gradients were taken"))
    with pytest.raises(UserError, match=f"diff_pruning: .*{says}"):
        run(asked, **settings)


@pytest.mark.parametrize("name", ["dit", "pixel", "sd, no pairs to spare"])
def test_macs_are_counted_by_us_attention_included(name: str) -> None:
    """6.5, item 11. What a single cut saves is read off its layer; it is what a count of the smaller model gives."""
    gauge = given.gauge(name)
    priced = saves(gauge, "macs")
    for width in given.whole(name, method="random_widths").widths:
        (cut,) = space([width], lambda cuts: 1.0).sites[0][0].cuts
        assert priced((cut,)) == pytest.approx(gauge.macs - gauge.after((cut,))[1], abs=1)
    asked = task(name, 0.8, of="macs")
    assert gauge.after(run(asked).cuts)[1] <= 0.8 * gauge.macs


@pytest.mark.parametrize("name", ["pixart", "dit", "sana", "wan"])
def test_of_transformers_inner_widths_alone_are_cut(name: str) -> None:
    """6.5, item 12."""
    denoiser = cutting.shared(name)
    from lissom.core.widths import widths

    found = tuple(width for width in widths(denoiser) if width.what != "keep_modulation")
    params = functools.partial(freed, denoiser)
    asked = Task(denoiser, (), (), 0.5 * params(tuple(space(found, params).sites[k][0].cuts[0] for k in range(len(found)))),
                 given.added, widths=found, saves=params, gradients=given.gradients(denoiser))  # fmt: skip
    before, result = cutting.output(denoiser), run(asked)
    with surgery.applied(denoiser, result.cuts):
        after = cutting.output(denoiser)
    assert after.shape == before.shape and not torch.equal(after, before) and bool(torch.isfinite(after).all())
    assert {cut.what for cut in result.cuts} <= {"keep_heads", "keep_units"}


def freed(denoiser: Any, cuts: Any) -> float:
    whole = surgery.parameters(denoiser)
    with surgery.applied(denoiser, cuts):
        return float(whole - surgery.parameters(denoiser))


def test_scores_that_are_no_numbers_stay_as_long_as_anything_else_can_go() -> None:
    unet = given.gauge("sd").denoiser
    broken = "down_blocks.0.attentions.0.transformer_blocks.0.ff"
    plain = task(keep=0.8)
    weight = unet.get_submodule(broken).net[2].weight
    whole = weight.detach().clone()
    with torch.no_grad():
        weight[:, 3] = float("nan")
    try:
        result = run(plain)
    finally:
        with torch.no_grad():
            weight.copy_(whole)
    (cut,) = (c for c in result.cuts if c.address == broken)
    assert isinstance(cut.value, tuple) and 3 in cut.value and broken not in result.scores


def test_a_structure_has_no_magnitudes_but_chance() -> None:
    job = given.job("config:sd15", "magnitude_widths", keep=0.7)
    with pytest.raises(UserError, match="magnitude_widths: the weights are not there .* or random_widths"):
        run(given.ask(job), "magnitude_widths")
    cuts = run(given.ask(given.job("config:sd15", "random_widths", keep=0.7)), "random_widths", round_to=8).cuts
    params = given.gauge("config:sd15").params
    assert 0.69 * params < params - given.gauge("config:sd15").params_saved(cuts) <= 0.7 * params


def test_a_task_without_widths_or_gradients_says_what_the_method_lacks() -> None:
    bare = Task(nn.Module(), (), (), 1.0, given.added)
    with pytest.raises(UserError, match="does not say `narrows = True`"):
        run(bare)
    with pytest.raises(UserError, match='does not say `calibrated = "gradients"`'), bare.gradients(1, lambda losses: True):
        pass
