"""Where student and teacher are watched: the papers' sites, found through the names that a pruning keeps."""

import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from lissom.core import export, stock, surgery
from lissom.core.artifact import renamed
from lissom.core.candidate import Cut
from lissom.core.errors import UserError
from lissom.distill import _sites
from lissom.distill._seen import Pairing, Site, watching
from lissom.prune import slim_unet
from lissom.prune._task import Task
from lissom.tests.core import tiny
from lissom.tests.prune import given


def pairing(teacher: Any, cuts: tuple[Cut, ...]) -> Pairing:
    """A teacher and what its cuts make of it, as the stages that save and load them pair them."""
    names = export.structure(teacher, cuts).names
    with surgery.applied(teacher, cuts):
        found = stock.express(teacher)
        assert isinstance(found, stock.Stock)
        student = found.model
    there = {address for address, _ in student.named_modules()}
    origin = {new: a for a, _ in teacher.named_modules() if (new := renamed(a, names)) in there and new is not None}
    return Pairing(student, teacher, origin)


def slim(name: str, preset: str) -> Pairing:
    teacher = given.gauge(name).denoiser
    task = Task(teacher, (), (), 0.0, given.added)
    return pairing(teacher, slim_unet.prune(task, slim_unet.Config(preset=preset), random.Random(0)).cuts)


@pytest.mark.parametrize("preset", ["bk-base", "bk-small"])
def test_the_eight_stages_of_bk_sdm(preset: str) -> None:
    """Outputs of all down and up stages; the middle is not among them even where it is still there."""
    found = _sites.stages(slim("config:sd15", preset))
    assert found == [Site(f"{side}_blocks.{k}", f"{side}_blocks.{k}") for side in ("down", "up") for k in range(4)]


def test_the_six_stages_of_bk_sdm_tiny() -> None:
    """Its last down stage ends before the downsampler that the teacher's has: there the last attention is compared."""
    assert _sites.stages(slim("config:sd15", "bk-tiny")) == [
        Site("down_blocks.0", "down_blocks.0"),
        Site("down_blocks.1", "down_blocks.1"),
        Site("down_blocks.2.attentions.0", "down_blocks.2.attentions.1"),
        Site("up_blocks.0", "up_blocks.1"),
        Site("up_blocks.1", "up_blocks.2"),
        Site("up_blocks.2", "up_blocks.3"),
    ]


def test_koala_compares_the_first_blocks_of_each_transformer() -> None:
    found = _sites.self_attentions(slim("config:sdxl", "koala-700m"))
    inner = [s for s in found if s.student.startswith("down_blocks.2.attentions.0.")]
    assert [s.student for s in inner] == [f"down_blocks.2.attentions.0.transformer_blocks.{k}.attn1" for k in range(5)]
    assert all(s.teacher == s.student for s in inner)
    renumbered = [s for s in found if s.student.startswith("up_blocks.0.attentions.1.")]
    assert {s.teacher.split(".transformer")[0] for s in renumbered} == {"up_blocks.0.attentions.2"}  # BK: pairs 0 and 2 stay
    assert not any("mid_block" in s.student for s in found)


def test_blocks_of_a_transformer_by_their_old_numbers() -> None:
    pair = pairing(given.gauge("config:dit-xl").denoiser, (Cut(address="transformer_blocks.5", what="remove"),))
    found = _sites.stages(pair)
    assert [s.teacher for s in found] == [f"transformer_blocks.{k}" for k in range(28) if k != 5]
    assert [s.student for s in found] == [f"transformer_blocks.{k}" for k in range(27)] and found == _sites.layers(pair)


def test_layers_of_a_unet() -> None:
    unet = tiny.unet()
    found = _sites.layers(pairing(unet, ()))
    kinds = {s.student.split(".")[-2] for s in found}
    assert kinds == {"resnets", "attentions"} and all(s.student == s.teacher for s in found)


def test_a_stage_that_the_teacher_lacks_is_named() -> None:
    pair = slim("config:sd15", "bk-base")
    other = Pairing(pair.student, pair.teacher, {k: v for k, v in pair.origin.items() if not k.startswith("up_blocks.3")})
    with pytest.raises(UserError, match=r"up_blocks.3: the teacher has no counterpart of this layer"):
        _sites.stages(other)


def test_what_has_no_self_attention_says_so() -> None:
    pair = pairing(tiny.flux().transformer, ())
    with pytest.raises(UserError, match="FluxTransformer2DModel: the student has no self attention layer to compare"):
        _sites.self_attentions(pair)


def test_watching_takes_the_picture_not_the_text_and_lets_go() -> None:
    """Blocks of SD3 answer with text and image, stages of a U-Net with their skip connections beside."""
    transformer = tiny.sd3().transformer
    image, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 64)
    with watching(transformer, ["transformer_blocks.0", "transformer_blocks.1"]) as found:
        transformer(
            hidden_states=image, encoder_hidden_states=text, pooled_projections=torch.randn(2, 64), timestep=torch.ones(2)
        )
    assert {tuple(v.shape) for v in found.values()} == {(2, 64, 32)}
    unet = tiny.unet()
    with watching(unet, ["down_blocks.0"]) as found:
        unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 5, 32))
    assert isinstance(found["down_blocks.0"], torch.Tensor)
    found.clear()
    unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 5, 32))
    assert not found


def test_gradient_checkpointing_runs_a_layer_twice_and_changes_no_gradient() -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        unet = tiny.unet()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        g = torch.Generator().manual_seed(0)
        with watching(unet, ["down_blocks.0", "up_blocks.0"]) as seen:
            out = unet(torch.randn(1, 4, 8, 8, generator=g), 1, torch.randn(1, 5, 32, generator=g)).sample
            features = dict(seen)
        (out.square().mean() + sum(f.square().mean() for f in features.values())).backward()
        found.append({k: p.grad.clone() for k, p in unet.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


@pytest.mark.parametrize(
    ("gone", "want"),
    [
        (
            range(0, 28, 2),
            [*((k, 2 * k + 2) for k in range(13)), (13, 27)],
        ),  # the odd blocks stayed: each gets the input it knows
        (range(1, 28, 2), [(k, 2 * k + 1) for k in range(14)]),  # the even ones: the paper's map
        ([1, 2, 5, 26, 27], [(0, 2), (1, 3), (2, 5), (3, 6), *((k, k + 3) for k in range(4, 22)), (22, 27)]),
    ],
)
def test_a_block_answers_for_those_after_it_that_are_gone(gone: Iterable[int], want: list[tuple[int, int]]) -> None:
    cuts = tuple(Cut(address=f"transformer_blocks.{k}", what="remove") for k in gone)
    found = _sites.carried(pairing(given.gauge("config:dit-xl").denoiser, cuts))
    assert [(int(s.student.rpartition(".")[2]), int(s.teacher.rpartition(".")[2])) for s in found] == want


def test_blocks_answer_within_their_own_list() -> None:
    cuts = tuple(Cut(address=a, what="remove") for a in ("transformer_blocks.2", "single_transformer_blocks.0"))
    found = _sites.carried(pairing(given.DENOISERS["flux"](), cuts))
    pairs = [(s.student, s.teacher) for s in found]
    assert ("transformer_blocks.1", "transformer_blocks.2") in pairs
    assert ("single_transformer_blocks.0", "single_transformer_blocks.1") in pairs and len(pairs) == 5
