"""What a method may choose from: every choice has a stock config where one is asked for, and saves what it says."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lissom.core import surgery
from lissom.core.candidate import Cut
from lissom.core.errors import UserError
from lissom.prune import _spaces
from lissom.prune._task import gathered
from lissom.tests.prune import given
from lissom.workflow._gauge import Gauge

PLAIN = [*(name for name in given.TINY if name != "pixel"), *given.CONFIGS]


@pytest.mark.parametrize("name", PLAIN)
def test_every_choice_has_a_stock_config_and_saves_exactly_the_sum(name: str) -> None:
    job, rng = given.whole(name, plain=True), random.Random(name)
    denoiser, total = job.gauge.denoiser, job.gauge.params
    picks = [(rng.choice(job.spaces), share) for share in ((0.8,) if ":" in name else (0.3, 0.6, 0.9))]
    picks += [(max(job.spaces, key=lambda space: space.most), 1.0)]
    for space, share in picks:
        chosen = given.some_choice(space, rng, share)
        small = given.stock_model(denoiser, gathered(chosen[0], chosen[1:]))
        assert not isinstance(small, str), small
        assert total - surgery.parameters(small) == sum(option.saved for option in chosen)


@pytest.mark.parametrize("name", ["sd, two stages", "sd3, dual attention", "dit", "flux"])
def test_macs_add_up_too(name: str) -> None:
    job, rng = given.whole(name, plain=True, of="macs"), random.Random(name)
    for space in (max(job.spaces, key=lambda space: space.most), rng.choice(job.spaces)):
        chosen = given.some_choice(space, rng, 0.7)
        small = given.stock_model(job.gauge.denoiser, gathered(chosen[0], chosen[1:]))
        left = Gauge(small, latent=job.gauge.latent).macs
        assert job.gauge.macs - left == sum(option.saved for option in chosen)


@pytest.mark.parametrize("of", ["params", "macs"])
@pytest.mark.parametrize("name", [*given.TINY, "config:sd15", "config:sdxl"])
def test_any_layer_saves_exactly_the_sum(name: str, of: str) -> None:
    job, rng = given.whole(name, of=of), random.Random(name)
    (space,) = job.spaces
    for share in (0.5, 1.0):
        chosen = given.some_choice(space, rng, share)
        left = job.gauge.after(gathered(chosen[0], chosen[1:]))[("params", "macs").index(of)]
        assert job.total - left == sum(option.saved for option in chosen)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", given.TINY)
def test_a_denoiser_without_all_that_may_go_still_runs(name: str, plain: bool) -> None:
    job = given.whole(name, plain)
    space = max(job.spaces, key=lambda space: space.most)
    cuts = gathered(space.base, [site[0] for site in space.sites])
    whole = _answer(job.gauge)
    with surgery.applied(job.gauge.denoiser, cuts):
        small = _answer(job.gauge)
    assert small.shape == whole.shape and bool(torch.isfinite(small).all())
    assert torch.equal(_answer(job.gauge), whole)


def _answer(gauge: Gauge) -> torch.Tensor:
    with torch.no_grad():
        return gauge.denoiser(**gauge.probe(), return_dict=False)[0]


def test_sdxl_may_lose_pairs_in_all_stages_times_three_middles() -> None:
    job = given.whole("config:sdxl", plain=True)
    assert len(job.spaces) == 2**3 * 3
    whole = next(space for space in job.spaces if not space.base.cuts)
    assert len(whole.sites) == 60  # of the 70 blocks, the middle's ten go with those of the attention that they are tied to
    assert sum(len(option.cuts) == 2 for site in whole.sites for option in site) == 10
    assert given.whole("config:sd15", plain=True).spaces[-1].base.cuts  # the last one has all of them


@pytest.mark.parametrize("name", ["dit", "sd3", "sd3, dual attention"])
def test_of_a_list_that_needs_a_block_one_stays_whichever(name: str) -> None:
    job = given.whole(name, plain=True)
    addresses = {layer.address for layer in job.layers}
    kept = [addresses - {cut.address for site in space.sites for o in site for cut in o.cuts} for space in job.spaces]
    assert sorted(kept, key=sorted) == [{a} for a in sorted(addresses)]


def test_a_block_that_may_not_be_cut_is_the_one_that_stays() -> None:
    job = given.job("sd3", keep=1.0, require_plain_load=True, exclude=("transformer_blocks.1",))
    (space,) = job.spaces
    assert [o.cuts[0].address[-1] for (o,) in space.sites] == ["0", "2", "3"]
    (space,) = given.job("sd3", keep=1.0, require_plain_load=True, include=("*.3",)).spaces
    assert [o.cuts[0].address[-1] for (o,) in space.sites] == ["3"]
    assert space.most == given.job("sd3", keep=1.0, include=("*.2",)).spaces[0].most  # block 2 is the last one then


def test_the_first_block_of_a_dit_stays_where_the_others_embed_otherwise() -> None:
    def offered(name: str) -> set[str]:
        spaces = given.whole(name, plain=True).spaces
        return {cut.address for space in spaces for site in space.sites for o in site for cut in o.cuts}

    assert offered("dit") == {f"transformer_blocks.{i}" for i in range(4)}
    assert offered("dit, trained") == {f"transformer_blocks.{i}" for i in (1, 2, 3)}
    assert offered("dit, half trained") == offered("dit, trained")  # block 1 alone could stand in for block 0, but may go too


@pytest.mark.parametrize(
    ("name", "exclude"),
    [
        ("config:sdxl", ("mid_block.attentions.0.transformer_blocks.3", "up_blocks.0.*")),
        ("config:sd15", ("mid_block.resnets.1", "*.attentions.1*", "up_blocks.3.resnets.1")),
        ("xl, one block", ("down_blocks.2.attentions.0*",)),
        ("xl", ("mid_block.*",)),
    ],
)
def test_what_is_excluded_is_in_no_choice(name: str, exclude: tuple[str, ...]) -> None:
    job = given.job(name, keep=1.0, require_plain_load=True, exclude=exclude)
    denoiser = job.gauge.denoiser
    forbidden = surgery.matching(exclude, [layer.address for layer in job.gauge.known])
    modules = {address: id(denoiser.get_submodule(address)) for address in forbidden}
    for space in job.spaces:
        with surgery.applied(denoiser, gathered(space.base, [site[0] for site in space.sites])):
            left = {id(module) for module in denoiser.modules()}
        assert not [a for a, module in modules.items() if module not in left]


def test_other_u_nets_have_no_cut_that_a_stock_config_expresses() -> None:
    assert given.job("pixel", keep=0.9).spaces[0].most > 0
    with pytest.raises(
        UserError, match=r"keep=0\.9: cannot be reached; .* a stock config can express hold 0\.0%.* keep is 1\.$"
    ):
        given.job("pixel", keep=0.9, require_plain_load=True)


def test_a_denoiser_with_cuts_that_no_config_has_cannot_be_asked_for_more() -> None:
    denoiser = given.gauge("sd").denoiser
    refused = pytest.raises(UserError, match=r"even before it is cut: up_blocks\.0\.resnets\.0 is left out alone")
    with surgery.applied(denoiser, [Cut(address="up_blocks.0.resnets.0", what="remove")]), refused:
        _spaces.plain_only(denoiser, (), lambda cuts: 1.0)


# Of SD 1.5's 859,520,964 parameters: ResNets of equal channels 168,399,360, attentions 31.1 % (the fact sheet, 1.3 and 7.1).
SAFE = ("*attentions*", "down_blocks.0.resnets.*", "down_blocks.[12].resnets.1", "down_blocks.3.*", "mid_block.*")


def test_sd15_names_the_smallest_keep_that_can_be_reached() -> None:
    with pytest.raises(
        UserError, match=r"keep=0\.4: .* hold 50\.7% of the params of config:sd15, so that the smallest keep"
    ) as e:
        given.job("config:sd15", keep=0.4, include=SAFE)
    smallest = float(str(e.value).rstrip(".").split()[-1])
    assert given.job("config:sd15", keep=smallest, include=SAFE).spaces
    with pytest.raises(UserError):
        given.job("config:sd15", keep=smallest - 1e-4, include=SAFE)
    channel_changing = (
        given.whole("config:sd15").spaces[0].most - given.job("config:sd15", keep=1.0, include=SAFE).spaces[0].most
    )
    assert channel_changing / 859_520_964 == pytest.approx(0.403, abs=5e-4)  # their branches; the shortcuts stay


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01])
def test_keep_is_a_share(keep: float) -> None:
    with pytest.raises(ValueError, match="must be above 0 and at most 1"):
        given.job("sd", keep=keep)


def test_a_pattern_or_a_unit_that_matches_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="pattern 'middle.*' matches no layer"):
        given.job("sd", include=("middle.*",))
    with pytest.raises(UserError, match="units: 'atention'.*Did you mean 'attention'"):
        given.job("sd", units=("atention",))


def test_a_denoiser_without_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(given.gauge("sd"), "known", [])
    with pytest.raises(UserError, match="sd: UNet2DConditionModel has no layer that can be cut"):
        given.job("sd", keep=0.99)


def test_savings_are_measured_once_where_the_table_does_not_tell() -> None:
    asked: list[tuple[Cut, ...]] = []

    def measured(cuts: tuple[Cut, ...]) -> float:
        asked.append(cuts)
        return 7.0

    saves: Callable[[Any], float] = _spaces.per_layer({"a": 1.0, "b": 2.5}, torch.nn.Module(), measured)
    empty = (Cut(address="a", what="replace", value="empty"),)
    assert saves((_spaces.remove("a"), _spaces.remove("b"))) == 3.5 and not asked
    assert saves(empty) == saves(empty) == 7.0 and asked == [empty]
