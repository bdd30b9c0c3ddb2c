"""The pruned model's folder: saved and verified, with its line of descent, its card, and an upload where one was asked for."""

import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..core import artifact, export
from ..core.artifact import Ancestor, Artifact, Manifest
from ..core.candidate import Cut, SamplingPlan
from ..core.errors import MissingOffline, one_line
from ..core.files import write_text
from ..core.models import Model
from ..report import model_card
from ..report.prune_schema import PruneReport

if TYPE_CHECKING:
    from ..core.export import Saved
    from ._before_after import Quality

CARD = "README.md"


@dataclass(frozen=True)
class Made:
    """The saved model, and all that is known of it and its parent before the parent is let go."""

    folder: Path
    report: PruneReport  # measurements of the pruned model are missing
    quality: "Quality"
    plan: SamplingPlan | None  # the parent's, on the pruned model
    license: dict[str, str]  # lines of the parent's card
    origin: str


def save(
    model: Model,
    cuts: tuple[Cut, ...],
    probe: dict[str, Any],
    folder: Path,
    made_by: dict[str, Any],
    *,
    plain_only: bool = False,
    dtype: str | None = None,
    variant: str | None = None,
    shard: str = "5GB",
    trained: bool = False,
) -> "Saved":
    """Write folder/model and verify it in a fresh process. The manifest is completed when everything is measured.

    made_by: the stage as in the recipe, with the seed. The rest: see `export.save`.
    """
    parent = artifact.manifest(model.folder)
    parent = parent if parent is not None and parent.opens else None
    before = (*parent.chain, _ancestor(parent)) if parent else ()
    record = Manifest(
        parent=model.ref,
        model_hash=model.fingerprint,
        stage="not measured yet",
        made_by=made_by,
        versions={"lissom": __version__, **{name: version(name) for name in ("torch", "diffusers")}},
        cuts=cuts,
        license=license_of(model.folder).get("license", ""),
        chain=before,
        models=model.others,
    )
    return export.save(
        model,
        cuts,
        folder / artifact.MODEL,
        probe,
        manifest=record.plain(),
        plain_only=plain_only,
        dtype=dtype,
        variant=variant,
        shard=shard,
        trained=trained,
    )


def _ancestor(made: Manifest) -> Ancestor:
    """What a model's own manifest says of it, for those that are made from it."""
    return Ancestor(parent=made.parent, model_hash=made.model_hash, cuts=made.cuts, names=made.names)


def finish(folder: Path, report: PruneReport, made: Made, stage: str) -> Artifact:
    """Write card and manifests; the stage's own comes last, and says that it is complete. stage: its hash."""
    written = artifact.manifest(made.folder)
    assert written is not None  # by `save`
    measurements = next((s.measurements for s in report.scored if s.name == "after"), ())
    final = written.model_copy(update={"measurements": measurements, "stage": stage})
    write_text(made.folder / CARD, model_card.render(report, made.license, origin=made.origin))
    artifact.save(made.folder, final, made.plan)
    artifact.save(folder, final, made.plan)
    return Artifact(ref=str(folder), plan=made.plan)


def moved_plan(plan: SamplingPlan, names: dict[str, str | None]) -> SamplingPlan:
    """A plan of the parent on the smaller model: layers to skip or reuse under their new names, without those that are gone."""
    return plan.renamed(lambda address: artifact.renamed(address, names))


def license_of(folder: Path) -> dict[str, str]:
    """The licence lines of a model's card: license, license_name, license_link; nothing where the card says nothing."""
    path = folder / CARD
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    lines = (re.match(r"(license(?:_name|_link)?):\s*(\S.*)", line) for line in (head[1] if head else "").splitlines())
    return {m[1]: m[2].strip().strip("\"'") for m in lines if m}


def push(folder: Path, repository: str, progress: Any) -> None:
    """Upload the model, to a private repository where there is none yet. Only ever called when it was asked for."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True, private=True)
        api.upload_folder(folder_path=folder, repo_id=repository, ignore_patterns=[CARD, artifact.MANIFEST])
        for name in (CARD, artifact.MANIFEST):
            text = _public((folder / name).read_text(encoding="utf-8"), folder, repository)
            api.upload_file(path_or_fileobj=text.encode(), path_in_repo=name, repo_id=repository)
        seen = "private" if api.repo_info(repository).private else "PUBLIC, as it was before"
    except Exception as e:  # hub, HTTP and connection errors share no base class
        raise MissingOffline(
            f"--push-to-hub {repository}: the hub did not take it ({one_line(e)}). The model is complete in {folder}; "
            "log in with `hf auth login` and give the command again with --resume."
        ) from e
    progress.say(f"{repository}: uploaded ({seen})")


def _public(text: str, folder: Path, repository: str) -> str:
    """A text without this machine's paths: the model's folder becomes its repository, others their last part."""
    made = artifact.manifest(folder)
    assert made is not None
    places = {folder.as_posix(): repository, str(folder): repository, str(folder.resolve()): repository}
    local = [
        ref
        for ref in (made.parent, *(a.parent for a in made.chain), *(m.model for m in made.models.values()))
        if Path(ref).is_absolute() or Path(ref).is_dir()
    ]
    for old, new in {**places, **{ref: Path(ref).name for ref in local}}.items():
        text = text.replace(old, new)
    return text
