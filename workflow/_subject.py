"""The model of a run, ready to be sampled and scored: pipeline, conditions, sampler, features, references."""

import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..core import models
from ..core.candidate import SamplingPlan, Scheduler, Step, canonical
from ..core.conditions import NOTES, UNCONDITIONAL, Conditions
from ..core.conditions import read as read_conditions
from ..core.errors import UserError, one_line
from ..core.methods import suggest
from ..core.models import Model
from ._evaluator import Evaluator, chosen, default_reference, features_for, hashes
from ._others import lend
from ._teacher import Teacher, taught
from .context import Context

if TYPE_CHECKING:
    from ..core.sampling import Sampler
    from ..evaluate._extractor import Features
    from ..evaluate._scorer import View
    from ..evaluate._statistics import Statistics


STAND_IN = {"prompt": "", "class_labels": 0}


@dataclass
class Subject:
    """Everything about the model that does not depend on a plan."""

    model: Model
    conditions: Conditions
    call: dict[str, Any]
    sampler: "Sampler"
    context: Context
    _extractors: "dict[str, Features]" = field(default_factory=dict)
    _references: "dict[tuple[str, str, str], Statistics]" = field(default_factory=dict)

    @classmethod
    def load(cls, ref: str, context: Context, scheduler: str | None = None, *, painting: bool = True) -> "Subject":
        """Load and check; raises UserError before any image is made.

        painting: images will be made, so that a pipeline that needs prompts must have some.
        """
        from ..core.driving import Memo
        from ..core.driving.memo_files import Files
        from ..core.sampling import Sampler

        recipe, options = context.recipe, context.options
        model = models.load(
            context.path(ref),
            device=options.device,
            dtype=options.dtype,
            offload=options.offload,
            trust_remote_code=options.trust_remote_code,
        )
        if (
            ref == recipe.model and recipe.model_hash and recipe.model_hash != model.fingerprint
        ):  # later stages have other models
            raise UserError(
                f"{ref}: its weights have the hash {model.fingerprint[:16]}…, the recipe is for {recipe.model_hash[:16]}…. "
                "Use the revision that the recipe names, or remove model_hash from it."
            )
        if scheduler is not None:
            swap_scheduler(model.pipe, scheduler)
        conditions = conditions_of(model, recipe.prompts and context.file(recipe.prompts), painting)
        call = {**call_defaults(model), **recipe.call}
        accepted = inspect.signature(type(model.pipe).__call__).parameters
        for key in call:
            if key not in accepted:
                raise UserError(f"call.{key}: {type(model.pipe).__name__} takes no such argument.{suggest(key, accepted)}")
        model.others = lend(model, context)
        memo = Memo(options.memo_mib * 2**20, Files(Path(options.memo_dir)) if options.memo_dir else None)
        known = canonical([model.fingerprint, hashes(model)]) if model.others else model.fingerprint
        sampler = Sampler(model.pipe, conditions, chunk=options.chunk, call=call, memo=memo, fingerprint=known)
        return cls(model, conditions, call, sampler, context)

    @property
    def features(self) -> "Features":
        """The extractor that metrics without one of their own use; commands that score nothing need none."""
        return self._extractor(self._features_name(""))

    @property
    def extractors(self) -> "list[Features]":
        """All that the recipe's metrics look through."""
        from ..core import methods
        from ..evaluate._scorer import PAINTED

        names = [n for n in self.context.recipe.evaluate.metrics if methods.load("evaluate", n).needs & PAINTED]
        return [self._extractor(name) for name in dict.fromkeys(self._features_name(n) for n in names)]

    def _extractor(self, name: str) -> "Features":
        """Loaded once, whatever number of metrics look through it."""
        from ..evaluate import _features

        if name not in self._extractors:
            self._extractors[name] = _features.load(name, device=self.model.device)
        return self._extractors[name]

    def _features_name(self, metric: str) -> str:
        given = chosen(self.context.recipe.evaluate.features, metric)
        return features_for(given and self.context.path(given), self.model)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """What the pipeline says of its arguments (a text where a number belongs, an unknown class), as one sentence."""
        try:
            yield
        except (TypeError, ValueError, LookupError) as e:
            raise UserError(
                f"{self.model.ref}: {type(self.model.pipe).__name__} refuses what it is given ({type(e).__name__}: {one_line(e)}). "
                f"Check --prompts and --call, or the recipe's prompts and call."
            ) from e

    def check_solver(self) -> None:
        """Refuse schedulers and pipelines that cannot follow any plan."""
        from ..core import driving

        pipe = self.model.pipe
        middle = max(1, pipe.scheduler.config.get("num_train_timesteps", 1000) // 2)
        driving.check(pipe, SamplingPlan(scheduler=Scheduler.of(pipe.scheduler), steps=(Step(timestep=middle),)))

    def check_steps(self, steps: int, name: str = "--steps") -> None:
        """Refuse more steps than the scheduler has timesteps. name: of what the user said."""
        scheduler = self.model.pipe.scheduler
        most = scheduler.config.get("num_train_timesteps")
        if most is not None and steps > most:
            raise UserError(
                f"{name} {steps}: {type(scheduler).__name__} was trained with {most} timesteps; give at most that many."
            )

    @property
    def default_steps(self) -> int:
        """Steps of the pipeline's own call where none are asked for."""
        return default_steps(type(self.model.pipe))

    @property
    def reference(self) -> str:
        """The name of what images are compared with, where a metric has none of its own."""
        return self._reference_name("")

    def _reference_name(self, metric: str) -> str:
        given = chosen(self.context.recipe.evaluate.reference, metric)
        return default_reference(given and self.context.path(given), self.model)

    @property
    def has_teacher(self) -> bool:
        """Whether any of the recipe's metrics compares with the model's own many-step images."""
        from ..core import methods

        asked = self.context.recipe.evaluate.metrics
        compared = [name for name in asked if methods.load("evaluate", name).needs & {"reference", "kept"}]
        return any(self._reference_name(name) == "teacher" for name in compared)

    @property
    def shared_reference(self) -> bool:
        """Whether search and report have to use the same reference images (given statistics cannot be split)."""
        return self.reference.endswith(".safetensors") or (self.reference.startswith("zoo:") and "/" in self.reference)

    def evaluator(self, role: Literal["search", "report"], cache: Path) -> Evaluator:
        """An evaluator whose reference images belong to `role` (search or report)."""
        return Evaluator(self.model, self.sampler, self.conditions, self.views(role, cache), self.call)

    def views(
        self, role: Literal["search", "report"], cache: Path, metrics: Sequence[str] | None = None
    ) -> "dict[str, View | None]":
        """What each metric looks through and compares with; the recipe's metrics where none are named.

        Reference statistics that have to be made are made once and kept in `cache`.
        """
        from ..core import methods
        from ..evaluate._scorer import PAINTED, View

        asked = list(dict.fromkeys(self.context.recipe.evaluate.metrics if metrics is None else metrics))
        needs = {name: methods.load("evaluate", name).needs for name in asked}
        features = {name: self._extractor(self._features_name(name)) for name in asked if needs[name] & PAINTED}
        sources = {name: self._reference_name(name) for name in features if needs[name] & {"reference", "kept"}}
        pupils = list(dict.fromkeys(features[name] for name, source in sources.items() if source == "teacher"))
        own = taught(Teacher(self.model, self.conditions, self.sampler, self.context), role, cache, pupils) if pupils else {}
        found: dict[str, View | None] = {}
        for name in asked:
            reference = None
            if name in sources:
                seen = features[name]
                reference = own[seen.hash] if sources[name] == "teacher" else self._given(sources[name], seen, role, cache)
            found[name] = View(features[name], reference) if name in features else None
        return found

    def _given(self, source: str, features: "Features", role: Literal["search", "report"], cache: Path) -> "Statistics":
        """Reference statistics that somebody named, read or made once."""
        from ..evaluate import _reference

        key = (role, source, features.hash)
        if key not in self._references:
            self._references[key] = _reference.load(source, features, role, cache).statistics
            made, warn = self._references[key].provenance, self.context.progress.warn
            if made.skipped:
                warn(f"{source}: {len(made.skipped)} files cannot be read as images, e.g. {made.skipped[0]}")
            if made.converted:
                warn(
                    f"{source}: images were converted to 8-bit RGB ({', '.join(f'{n} {kind}' for kind, n in made.converted.items())})"
                )
        return self._references[key]


def default_steps(pipeline: Any) -> int:
    """Steps of a pipeline class's own call where none are asked for."""
    return int(inspect.signature(pipeline.__call__).parameters["num_inference_steps"].default)


def swap_scheduler(pipe: Any, name: str) -> None:
    """Give the pipeline another diffusers scheduler, configured from its own."""
    import diffusers

    kind = getattr(diffusers, name, None)
    if kind is None or not name.endswith("Scheduler"):
        known = [n for n in dir(diffusers) if n.endswith("Scheduler")]
        raise UserError(f"scheduler {name}: diffusers has no such class.{suggest(name, known)}")
    try:
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    except (ImportError, TypeError, ValueError) as e:  # one that needs a package, or other settings than these
        raise UserError(f"scheduler {name}: cannot be used with this model ({one_line(e)}). Choose another one.") from e


def conditions_of(model: Model, prompts: str | None, painting: bool = True) -> Conditions:
    """The given prompts, else the model's own; UserError where they do not fit the pipeline, or it needs some and has none.

    Where nothing is painted, a stand-in will do: what a pipeline is made of does not depend on its prompts.
    """
    name, accepted = type(model.pipe).__name__, inspect.signature(type(model.pipe).__call__).parameters
    needed = next((k for k in ("prompt", "class_labels", "image") if k in accepted), None)
    found = read_conditions(Path(prompts)) if prompts is not None else model.conditions
    if found is None:
        if needed is None:
            return UNCONDITIONAL
        if not painting and needed in STAND_IN:
            return Conditions([{needed: STAND_IN[needed]}], "stand-in")
        raise UserError(
            f"{model.ref}: {name} needs a {needed} for every image. Give --prompts FILE: "
            "a .txt with one prompt a line, or a .jsonl of call arguments."
        )
    given = [key for key in found.row(0) if key not in NOTES]
    if wrong := next((key for key in given if key not in accepted), None):
        raise UserError(
            f"{found.source}: {name} takes no {wrong!r}; it is told what to paint by {needed or 'nothing'}. "
            f'Write a .jsonl file with one {{"{needed}": …}} a line.{suggest(wrong, accepted)}'
            if needed
            else f"{found.source}: {name} takes no {wrong!r}, it paints without being told what. Leave the prompts out."
        )
    if needed is not None and needed not in given and not any(key.endswith("_embeds") for key in given):
        raise UserError(f"{found.source}: {name} needs a {needed} for every image, the rows hold {', '.join(found.row(0))}.")
    return found


def call_defaults(model: Model) -> dict[str, Any]:
    """Call arguments that the model's folder asks for (call.json), e.g. guidance_scale 1 for the zoo."""
    path = model.folder / "call.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as e:
        raise UserError(f"{path}: not a JSON object of call arguments ({one_line(e)}). Mend or remove it.") from e
