"""Opening a diffusers folder, a cut one too: its own class is built from our code, never from the folder's."""

import json
import tempfile
from pathlib import Path
from typing import Any

from . import artifact


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
    denoiser = open_cut(folder / made.component, variant=variants.pop(made.component), **common)
    common["variant"] = next(filter(None, variants.values()), None)
    with tempfile.TemporaryDirectory() as view:
        # diffusers checks the index against the class that is given: the same folder, seen without code of its own.
        for path in folder.iterdir():
            if path.name not in ("model_index.json", made.component):
                (Path(view) / path.name).symlink_to(path.resolve())
        index[made.component] = ["diffusers", type(denoiser).__mro__[1].__name__]
        (Path(view) / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        opened = diffusers.DiffusionPipeline.from_pretrained(view, **common, **{made.component: denoiser})
    return opened


def open_cut(folder: Path, **options: Any) -> Any:
    """The denoiser of an artifact whose cuts no stock config expresses. options: of diffusers' `from_pretrained`."""
    import diffusers

    from .standins import pruned

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    base = getattr(diffusers, config["_class_name"].removeprefix("Pruned"))
    return pruned(base).from_pretrained(folder, **options)


def builds_on(folder: Path) -> artifact.Manifest | None:
    """The manifest of a pruned model's folder; None for any other."""
    made = artifact.manifest(folder)
    return made if made is not None and made.opens else None
