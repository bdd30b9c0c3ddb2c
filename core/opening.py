"""Opening a diffusers folder, a cut one too: its own class is built from our code, never from the folder's."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import artifact
from .errors import UserError

DENOISERS = ("unet", "transformer", "transformer_2", "prior", "decoder")  # component names that diffusers uses


def open_pipeline(folder: Path, dtype: Any, trust_remote_code: bool) -> Any:
    """The pipeline in a folder that `models.check_folder` accepted. Raises what diffusers raises."""
    import diffusers

    from .weights import variant_of  # imports torch, which listing recipes does not need

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    common: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
    variants = {n: variant_of(folder / n) for n, entry in index.items() if isinstance(entry, list) and (folder / n).is_dir()}
    made = artifact.manifest(folder)
    if made is None or made.opens != "remote_code":
        common["variant"] = next(filter(None, variants.values()), None)
        return diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=trust_remote_code, **common)
    if made.component not in DENOISERS:
        raise UserError(
            f"{folder / artifact.MANIFEST}: {made.component!r} is no denoiser of a pipeline. Fetch the folder again."
        )
    denoiser = open_cut(folder / made.component, variant=variants.pop(made.component), **common)
    common["variant"] = next(filter(None, variants.values()), None)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as view:  # Windows keeps files that are mapped
        # diffusers checks the index against the class that is given: the same folder, seen without code of its own.
        for path in folder.iterdir():
            if path.name not in ("model_index.json", made.component):
                _show(path, Path(view) / path.name)
        index[made.component] = ["diffusers", type(denoiser).__mro__[1].__name__]
        (Path(view) / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        opened = diffusers.DiffusionPipeline.from_pretrained(view, **common, **{made.component: denoiser})
    return opened


def open_cut(folder: Path, **options: Any) -> Any:
    """The denoiser of an artifact whose cuts no stock config expresses. options: of diffusers' `from_pretrained`."""
    import diffusers

    from .standins import pruned

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = str(config.get("_class_name", "")).removeprefix("Pruned")
    base = getattr(diffusers, name, None)
    if not isinstance(base, type) or not issubclass(base, diffusers.ModelMixin):
        raise UserError(f"{folder / 'config.json'}: {name!r} is not a model class of diffusers. Fetch the folder again.")
    return pruned(base).from_pretrained(folder, **options)


def own_code(folder: Path, index: Mapping[str, Any]) -> Path | None:
    """The code file that a pruned model brings along for programs other than lissom, which does without; None: there is none.

    index: the content of model_index.json, which must name that file.
    """
    made = artifact.manifest(folder)
    if made is None or made.opens != "remote_code" or made.component not in DENOISERS:
        return None
    entry = index.get(made.component)
    return folder / made.component / f"{entry[0]}.py" if isinstance(entry, list) and entry else None


def place(source: Path, target: Path) -> None:
    """Weights are linked: writers replace them. Small files are copied: writers open them and would change the source too."""
    target.parent.mkdir(parents=True, exist_ok=True)
    real = source.resolve()  # a hub's snapshot is made of links into its cache
    if source.suffix == ".safetensors":
        try:
            return os.link(real, target)
        except OSError:  # another disk, or one without hard links
            pass
    shutil.copyfile(real, target)


def _show(source: Path, target: Path) -> None:
    """Let a file or folder be seen at another place: a symbolic link, for which Windows wants a privilege, or `place`."""
    try:
        return target.symlink_to(source.resolve())
    except (OSError, NotImplementedError):
        pass
    for path in (p for p in (source, *source.rglob("*")) if p.is_file()):
        place(path, target / path.relative_to(source))


def builds_on(folder: Path) -> artifact.Manifest | None:
    """The manifest of a pruned model's folder; None for any other."""
    made = artifact.manifest(folder)
    return made if made is not None and made.opens else None
