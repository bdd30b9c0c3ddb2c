"""Whether a statistics file holds together, and still fits the images that it was made from."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from .context import Progress, Silent
from .stats import Blocks

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluate._extractor import Features
    from ..evaluate._statistics import Statistics

SAMPLE = 64  # images that are extracted again
CLOSE = 1e-2  # how far their features may be from the kept ones, as a share of an image's largest
FEW = 100  # kept images from which on their mean says something about the mean of all
ERRORS = 6.0  # standard errors that it may be away: for one feature less often than once in 500 million files
ROUNDING = 2.0**-10  # of float16, as a share of the largest number, with room for the mean of many
NEGATIVE = -1e-10  # an eigenvalue that rounding leaves, as a share of the largest


def verify(
    path: Path,
    sources: Sequence[Path] = (),
    features: str | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`checked`: what was looked at; `problems`: sentences that begin with the file, none for a good one.

    sources: hash their images again and compare. features: also extract some images again and compare them with kept ones.
    Raises UserError for a file that is not there, and for sources or features that cannot be used.
    """
    from ..evaluate import _features, _workers
    from ..evaluate._images import Images
    from ..evaluate._statistics import Statistics

    if features is not None and not sources:
        raise UserError("--features: extracting again needs the images too. Name their folder or zip after the file.")
    if not path.is_file():
        raise UserError(f"{path}: no such statistics file.")
    result: dict[str, Any] = {"schema_version": 1, "kind": "verification", "file": str(path), "ok": False}
    checked = ["checksum"]
    try:
        statistics = Statistics.load(path)
    except UserError as e:  # damaged: that is the finding
        return result | {"checked": checked, "problems": [str(e)]}
    extractor = None
    if features is not None:
        extractor = _features.load(features, _workers.devices(device)[0])
        statistics.check(extractor)
        if not len(statistics.sketch):
            raise UserError(f"--features: {path} holds no features of single images that could be compared.")
    images = [Images(source) for source in sources]
    problems = _numbers(statistics, checked)
    if images:
        problems += _again(statistics, images, extractor, checked, progress or Silent())
    return result | {"ok": not problems, "checked": checked, "problems": [f"{path}: {problem}" for problem in problems]}


def _numbers(statistics: "Statistics", checked: list[str]) -> list[str]:
    """What is wrong with the tensors by themselves."""
    import torch

    n, dim, sketch = statistics.n, statistics.dim, statistics.sketch
    checked += ["shapes", "finite numbers", "covariance"]
    if statistics.m2.shape != (dim, dim) or (len(sketch) and sketch.rows.shape[1] != dim):
        shapes = f"{tuple(statistics.m2.shape)} and {tuple(sketch.rows.shape)}"
        return [f"{dim} means, but the other tensors have the shapes {shapes}. Build it again."]
    if not all(torch.isfinite(t).all() for t in (statistics.mean, statistics.m2, sketch.rows)):
        return ["not all of its numbers are finite. Build it again."]
    problems = []
    if n < 2 and not statistics.provenance.shards:
        problems.append(f"of {n} images; a covariance needs 2. Build it from more images.")
    elif dim:
        if not torch.allclose(statistics.m2, statistics.m2.T, rtol=1e-9, atol=0):
            problems.append("its covariance is not symmetric. Build it again.")
        values = torch.linalg.eigvalsh((statistics.m2 + statistics.m2.T) / 2)  # (D,), ascending
        if values[0] < NEGATIVE * dim * values[-1].abs():
            problems.append(
                f"its covariance has a negative eigenvalue, {values[0]:.3g} beside {values[-1]:.3g}. Build it again."
            )
    if len(sketch):
        checked.append("kept features")
        problems += _kept(statistics)
    return problems


def _kept(statistics: "Statistics") -> list[str]:
    """Whether the kept features can be a sample of what the mean was taken over."""
    n, count, limit = statistics.n, len(statistics.sketch), statistics.sketch.limit
    if count > min(n, limit):
        return [f"it keeps features of {count} images, but is of {n} and may keep {limit}. Build it again."]
    away = (statistics.kept.double().mean(0) - statistics.mean).abs()  # (D,)
    rounding = ROUNDING * statistics.kept.abs().max()
    if count == n:  # of all images, each different
        if (away > rounding).any():
            return [f"the mean of all its kept features is {away.max():.3g} away from its mean. Build it again."]
    elif count == limit and count >= FEW:  # fewer than the limit: copies of images, which count once here and often there
        error = (statistics.covariance.diagonal() / count).sqrt()
        if (excess := ((away - rounding) / error.clamp(min=1e-300)).max()) > ERRORS:
            away_by = f"the mean of its kept features is {excess:.1f} standard errors away from its mean"
            return [f"{away_by}: they are of other images, or very many images are copies. Build it again if there are none."]
    return []


def _again(
    statistics: "Statistics", images: Sequence[Any], extractor: "Features | None", checked: list[str], progress: Progress
) -> list[str]:
    """Whether these images are those of the file; with an extractor, also whether it still sees in them what was kept."""
    from ..evaluate._extraction import share
    from ..evaluate._sketch import key
    from ..evaluate._statistics import image_hash, sum_hashes

    p = statistics.provenance
    shards = [(int(i), int(n)) for i, _, n in (part.partition("/") for part in p.shards)] or [(1, 1)]
    parts = [part for shard in shards for part in share(images, shard, statistics.build.get("limit"))]
    wanted = statistics.sketch.keys[:SAMPLE].tolist() if extractor else []
    found: dict[int, Tensor] = {}
    content, n, skipped = "", 0, 0
    told = Blocks(progress, sum(len(names) for _, names in parts), "images to hash")
    for source, names in parts:
        for _, pixels, _ in source.pictures(names):
            told(1, True)
            if pixels is None:
                skipped += 1
                continue
            n, content = n + 1, sum_hashes([content, digest := image_hash(pixels)])
            if extractor and key(digest) in wanted:
                found[key(digest)] = pixels
    checked.append("images")
    named = " + ".join(str(source.source) for source in images)
    if n != statistics.n:
        unread = f" ({skipped} more cannot be read)" if skipped else ""
        return [f"of {statistics.n:,} images, {named} has {n:,}{unread}. Name the folder that it was built from."]
    if not p.source_hash:
        return ["does not know its images, as it was made from bare features; they cannot be compared."]
    if content != p.source_hash:
        return [f"{named} has as many images, but not the same ones. Build it again, or name what it was built from."]
    return _extracted(statistics, extractor, found, checked) if extractor else []


def _extracted(statistics: "Statistics", extractor: "Features", found: "dict[int, Tensor]", checked: list[str]) -> list[str]:
    """Whether images extracted again (by key) give the kept features."""
    import torch

    checked.append("features extracted again")
    rows = {k: row for k, row in zip(statistics.sketch.keys[:SAMPLE].tolist(), statistics.kept[:SAMPLE], strict=True)}
    missing = [k for k in rows if k not in found]
    if missing:
        return [f"{len(missing)} of its kept features are of images that are not there. Build it again."]
    keys = sorted(found)
    now = torch.cat([extractor.extract(found[k][None]) for k in keys])  # (SAMPLE, D)
    kept = torch.stack([rows[k] for k in keys])
    away = (now - kept).abs().amax(1) / kept.abs().amax(1).clamp(min=1e-12)
    if far := int((away > CLOSE).sum()):
        differ = (
            f"features extracted again differ from the kept ones for {far} of {len(keys)} images, by up to {away.max():.1%}"
        )
        return [f"{differ}. A library may have another version; build it again."]
    return []
