"""Masked feature distillation of a shallow DiT: outliers wherever they are, labels that are dropped for both alike."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lissom.core.conditions import Conditions
from lissom.core.denoiser_calls import Calls
from lissom.core.noising import Noising
from lissom.core.sampling import Sampler
from lissom.distill import _sites
from lissom.distill._loop import Trainer
from lissom.distill._samples import Noised
from lissom.distill._seen import Pairing, Seen, Site
from lissom.tests.core import tiny
from lissom.tests.distill.learning import term, trainer
from lissom.tests.prune.given import DENOISERS
from torch import Tensor

A = Site("a", "x")
NULL = 1000  # the label of none, of 1000 classes


def hidden(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", ["each", "either"])
@pytest.mark.parametrize("where", ["student", "teacher", "both", "both, elsewhere"])
@pytest.mark.parametrize("size", [1e3, -6e4])
def test_an_outlier_moves_its_own_sample_a_little_and_no_other(where: str, mask: str, dtype: torch.dtype, size: float) -> None:
    """5.5, item 11: no NaN, no gradient where the student's own lies out, in half precision too; others are as they were."""
    student, teacher = hidden(0, dtype), hidden(1, dtype)
    before = per_sample(student, teacher, mask)
    if where != "teacher":
        student[0, 2, 3] = size
    if where != "student":
        teacher[0, 2, 3 if where == "both" else 4] = size
    student.requires_grad_()
    after = per_sample(student, teacher, mask)
    assert after[1:] == before[1:] and abs(after[0]) < 4 * before[0]
    loss = term("masked_features", sites=(A,), mask=mask)(seen(student, teacher))
    loss.backward()
    assert loss.item() == pytest.approx(sum(after) / 3, rel=1e-5)
    assert student.grad is not None and bool(loss.isfinite()) and bool(student.grad.isfinite().all())
    assert float(student.grad.abs().max()) < 1.0
    if where != "teacher":
        assert student.grad[0, 2, 3] == 0
    if mask == "either" and where != "student":
        assert student.grad[0, 2, 3 if where == "both" else 4] == 0


def seen(student: Tensor, teacher: Tensor) -> Seen:
    return Seen(torch.zeros(1), torch.zeros(1), torch.zeros(1), {A: (student, teacher)})


def per_sample(student: Tensor, teacher: Tensor, mask: str) -> list[float]:
    one = term("masked_features", sites=(A,), mask=mask)
    return [one(seen(student[i : i + 1], teacher[i : i + 1])).item() for i in range(len(student))]


def test_how_far_out_counts_by_all_tokens_and_channels_of_a_sample() -> None:
    """A channel that is large everywhere lies out, though not among its own numbers; so does a token."""
    for at in ((slice(None), 3), (2, slice(None))):
        student, teacher = torch.randn(2, 30, 40, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 30, 40)
        teacher[(0, *at)] = 50.0 + torch.randn(teacher[(0, *at)].shape, generator=torch.Generator().manual_seed(1))
        one = term("masked_features", sites=(A,), sigmas=2.0)(seen(student, teacher)).item()
        assert one == pytest.approx(term("masked_features", sites=(A,))(seen(student, torch.zeros(2, 30, 40))).item(), rel=1e-6)


def shallow(folder: Path) -> tuple[Trainer, Pairing]:
    """A DiT of four blocks with labels under guidance, and a student of the first and the last, as the workflow pairs them."""
    teacher = DENOISERS["dit, trained"]()
    student = type(teacher).from_config({**teacher.config, "num_layers": 2}).eval()
    before = {name: name.replace("blocks.1", "blocks.3") for name, _ in student.named_modules()}
    weights = {name: name.replace("blocks.1.", "blocks.3.") for name in student.state_dict()}
    student.load_state_dict({name: teacher.state_dict()[there] for name, there in weights.items()})
    pair = Pairing(student, teacher, before)
    pipe = tiny.dit()
    pipe.register_modules(transformer=teacher)
    rows = Conditions([{"class_labels": i} for i in (3, 5, 7)], "here")
    calls = Calls(Sampler(pipe, rows, chunk=4, call={"guidance_scale": 3.0}), 0)
    clean = torch.randn(3, *calls.shape, generator=torch.Generator().manual_seed(0))
    noised = Noised(lambda images: clean[images], range(3), calls, Noising.of(pipe.scheduler), 0, "cpu")
    sites = tuple(_sites.carried(pair))
    assert [site.teacher for site in sites] == ["transformer_blocks.2", "transformer_blocks.3"]
    terms = [term("task", 0.1), term("output", 0.9), term("masked_features", 1e-2, sites)]  # the paper's weights
    folder.mkdir(exist_ok=True)
    return trainer(folder, noised, terms, pair, iterations=8, batch=8, learning_rate=1e-4), pair


def test_both_models_are_told_the_same_labels_dropped_or_not(tmp_path: Path) -> None:
    """5.5, item 11: a label is dropped once, in the sample. Neither model drops any itself, as a DiT in training mode would."""
    made, pair = shallow(tmp_path)
    told: dict[str, list[list[int]]] = {"student": [], "teacher": []}

    def listen(name: str, denoiser: Any) -> list[Any]:
        embed = denoiser.transformer_blocks[0].norm1.emb.class_embedder
        assert embed.dropout_prob > 0 and embed.num_classes == NULL
        return [embed.embedding_table.register_forward_pre_hook(lambda _, args: told[name].append(args[0].tolist()))]

    hooks = listen("student", pair.student) + listen("teacher", pair.teacher)
    made.scales()
    made.run()
    for hook in hooks:
        hook.remove()
    assert told["student"] == told["teacher"] and len(told["student"]) == 2 * 9  # its embedder is asked at the end again
    assert told["student"][::2] == told["student"][1::2]
    flat = [label for batch in told["student"][2::2] for label in batch]
    assert set(flat) == {3, 5, 7, NULL} and 16 < flat.count(NULL) < 48  # of 64: one of the two rows of guidance
    # What the test is worth: had one of them been in training mode, it would have dropped labels of its own.
    emb: Any = pair.student.get_submodule("transformer_blocks.0.norm1.emb").train()
    torch.manual_seed(0)
    own: list[list[int]] = []
    hook = emb.class_embedder.embedding_table.register_forward_pre_hook(lambda _, args: own.append(args[0].tolist()))
    with torch.no_grad():
        for _ in range(20):
            pair.student(**made.samples(range(8), 0).kwargs)
    hook.remove()
    assert any(batch != told["student"][0] for batch in own)


def test_a_student_learns_from_a_teacher_with_massive_activations(tmp_path: Path) -> None:
    """5.5, item 11: a channel of 1e3 that a removed block made; each step is a number, and features do not drown the rest."""
    made, pair = shallow(tmp_path)
    layer: Any = pair.teacher.get_submodule("transformer_blocks.1")

    def injected(module: Any, args: Any, output: Tensor) -> Tensor:
        return output + 1e3 * torch.eye(output.shape[-1])[5]

    hook = layer.register_forward_hook(injected)
    scales = made.scales()
    outcome = made.run()
    sample = made._seen(pair.student, list(range(4)))
    sites = made.terms[-1].sites
    hook.remove()
    assert sample.features[sites[0]][1][..., 5].min() > 900
    assert outcome.iteration == 8 and outcome.restarts == 0
    assert all(bool(p.isfinite().all()) for p in pair.student.parameters())
    assert scales["masked_features"] < 10.0
    assert term("masked_features", sites=sites, mask="none", decay=False)(sample).item() > 1e4
