"""CLIP-like models by open_clip: a folder as it writes them, a published tag, or an architecture with a local file.

Shapes: B images or texts, S x S pixels, D features, N images whose features are known, C classes.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..core.errors import UserError, one_line
from ..core.methods import suggest
from ._download import has_tokenizer, hub_file, hub_tokenizer
from ._extractor import BATCH, LARGE, Normalised, exact, local_weights, read_json, sha256, weights_in

WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
CONFIG = "open_clip_config.json"


class OpenClip(Normalised):
    """Image and text towers, computed in float32. Features are not normalised, whatever the model's own habit."""

    has_text = True

    def __init__(
        self, name: str, config: dict[str, Any], weights: Path, tokens: Any, preprocess: dict[str, Any], device: str
    ) -> None:
        """config: open_clip's config of the model. tokens: texts -> token ids (B, context). preprocess: with mean and std."""
        self.name, self.hash, self._tokens = name, sha256(weights), tokens
        self._model = _build(config, weights).eval().requires_grad_(False).to(device)
        self.size = _square(self._model.visual.image_size)
        self.batch = LARGE if self.size >= 224 else BATCH
        self.dim = int(config["embed_dim"])
        self._place(device, *_normalisation(preprocess))

    def _see(self, images: Tensor) -> Tensor:
        return self._model.encode_image(images, normalize=False)  # CoCa would normalise by default

    def encode_text(self, texts: list[str]) -> Tensor:
        parts = [torch.zeros((0, self.dim))]
        with torch.no_grad(), exact(self.device):
            for start in range(0, len(texts), self.batch):
                ids = self._tokens(texts[start : start + self.batch]).to(self.device)
                parts.append(self._model.encode_text(ids, normalize=False).float().cpu())
        return torch.cat(parts)

    def truncated(self, texts: list[str]) -> int:
        t = self._tokens
        if hasattr(t, "encode"):  # CLIP's own tokenizer adds a start and an end
            lengths = [len(t.encode(text)) + 2 for text in texts]
        else:
            own = t.tokenizer_mode == "clips"  # open_clip adds the three special tokens itself
            rows = [
                t.tokenizer(t.clean_fn(text), truncation=False, add_special_tokens=not own, verbose=False) for text in texts
            ]
            lengths = [len(row.input_ids) + 3 * own for row in rows]
        return sum(length > t.context_length for length in lengths)

    def probabilities(self, features: Tensor, classes: Tensor | None = None) -> Tensor:
        """Softmax over the classes of the cosine times the model's own temperature (Radford et al., 2103.00020, Sec. 3.1.2)."""
        if classes is None:
            if not self.classes:
                return super().probabilities(features)
            classes = self.encode_text([row["caption"] for row in self.classes])
        scale = self._model.logit_scale.detach().exp().cpu()
        return (scale * normalize(features.float()) @ normalize(classes.float()).T).softmax(1)


def from_folder(name: str, folder: Path, device: str, weights: Path | None = None) -> OpenClip:
    """A folder with a config, weights and, where the config says so, a tokenizer (open_clip's schema local-dir:).

    weights: another file than the one that open_clip takes first. Raises UserError if the folder is not such a model.
    """
    if weights is None or weights.name in WEIGHTS:
        weights = weights or weights_in(folder, WEIGHTS)
    else:
        name = f"{name}/{weights.name}"
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG}: holds no open_clip config.")
    model = config.get("model_cfg", {})
    found = _make(str(folder), name, model, weights, config.get("preprocess_cfg", {}), folder, False, device)
    if (folder / "classes.json").is_file():
        found.classes, found.has_probabilities = read_json(folder / "classes.json"), True
    return found


def named(where: str, device: str) -> OpenClip:
    """ARCH/TAG: weights that open_clip knows, from the model hub. ARCH/FILE.safetensors: weights on this machine.

    Raises UserError for names that open_clip does not know, MissingOffline for files that are neither here nor to be had.
    """
    import open_clip

    arch, _, what = where.partition("/")
    known = open_clip.list_models()
    if arch not in known:
        raise UserError(
            f"features 'clip:{where}': open_clip has no architecture {arch!r}. "
            f"Give clip:ARCH/TAG, such as clip:ViT-B-32/openai.{suggest(arch, known)}"
        )
    quick = f"{arch}-quickgelu" if f"{arch}-quickgelu" in known else arch
    config = open_clip.get_model_config(arch)
    if "/" in what or "." in what:
        return _from_file(arch, quick, what, config, device)
    return _from_tag(arch, quick, what, config, device)


def _from_tag(arch: str, quick: str, what: str, config: dict[str, Any], device: str) -> OpenClip:
    import open_clip

    asked, tag = f"features 'clip:{arch}/{what}'", what.lower().replace("-", "_")  # as open_clip reads tags
    tags = open_clip.list_pretrained_tags_by_model(arch)
    own = f"clip:{arch}/FILE.safetensors with a file of yours"
    if tag not in tags:
        there = f"there are {', '.join(tags)}" if tags else "none were published"
        raise UserError(f"{asked}: {arch} has no weights {what!r}; {there}. Or give {own}.{suggest(tag, tags)}")
    published = open_clip.get_pretrained_cfg(arch, tag)
    if published.get("quick_gelu"):  # OpenAI's ViT-B-32 is not open_clip's ViT-B-32, which only warns
        config["quick_gelu"] = True
        own = f"clip:{quick}/FILE.safetensors with a file of yours"
    repo, _, file = published.get("hf_hub", "").rpartition("/")
    if not repo or file:  # a repository alone may hold safetensors; a named file is a pickle
        others = [t for t in tags if t != tag]
        choose = f"Choose another tag ({', '.join(others)})" if others else "Choose another architecture"
        raise UserError(
            f"{asked}: published as a pickle ({file or published.get('url')}), which is never read. "
            f"{choose}, or convert it to safetensors and give {own}."
        )
    weights = hub_file(asked, repo, WEIGHTS[0], f"or give {own}")
    return _make(asked, f"clip:{arch}/{tag}", config, weights, published, None, True, device)


def _from_file(arch: str, quick: str, what: str, config: dict[str, Any], device: str) -> OpenClip:
    import open_clip

    name = f"clip:{arch}/{what}"
    weights = local_weights(name, what)
    folder = weights.parent
    published = [open_clip.get_pretrained_cfg(arch, tag) for tag in open_clip.list_pretrained_tags_by_model(arch)]
    if (folder / CONFIG).is_file():
        beside = read_json(folder / CONFIG)
        preprocess = beside.get("preprocess_cfg", {})
        config["quick_gelu"] = config.get("quick_gelu", False) or beside.get("model_cfg", {}).get("quick_gelu", False)
    else:
        constants = [{"mean": p["mean"], "std": p["std"]} for p in published]
        preprocess = constants[0] if constants and all(c == constants[0] for c in constants) else {}
        if not config.get("quick_gelu") and any(p.get("quick_gelu") for p in published):
            print(f"{name}: read with GELU; name {quick} if it was trained with QuickGELU, as OpenAI's were", file=sys.stderr)
    return _make(f"features {name!r}", f"clip:{arch}/{weights.name}", config, weights, preprocess, folder, True, device)


def _make(
    asked: str,
    name: str,
    config: dict[str, Any],
    weights: Path,
    preprocess: dict[str, Any],
    folder: Path | None,
    hub: bool,
    device: str,
) -> OpenClip:
    """folder: where a tokenizer may be. hub: whether the tokenizer and the shape of a text tower may come from the hub."""
    try:
        text = config["text_cfg"]
        if tower := text.get("hf_model_name"):
            if not hub:
                raise UserError(f"{asked}: its text tower {tower!r} would come from a hub.")
            instead = "or choose an architecture with open_clip's own text tower, such as ViT-B-32"
            text["hf_model_name"] = str(hub_file(asked, tower, "config.json", instead).parent)
        return OpenClip(name, config, weights, _tokenizer(asked, text, folder, hub), preprocess, device)
    except UserError:
        raise
    except Exception as e:  # open_clip checks little: a wrong config ends in any kind of error
        raise UserError(f"{asked}: open_clip cannot build this model ({type(e).__name__}: {one_line(e)}).") from e


def _build(config: dict[str, Any], weights: Path) -> Any:
    """The model itself. open_clip's own factory would do, but it may prefer a pickle and sets up the root logger."""
    from open_clip.coca_model import CoCa
    from open_clip.factory import load_checkpoint
    from open_clip.model import CLIP, CustomTextCLIP

    config = {k: dict(v) if isinstance(v, dict) else v for k, v in config.items()}
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False  # the weights are in the file
    foreign = "hf_model_name" in config["text_cfg"]
    if foreign:
        config["text_cfg"]["hf_model_pretrained"] = False  # likewise
    custom = config.pop("custom_text", False) or foreign
    kind = CLIP if not custom else CoCa if "multimodal_cfg" in config else CustomTextCLIP
    model = kind(**config)
    load_checkpoint(model, str(weights), strict=True)
    return model


def _tokenizer(asked: str, text: dict[str, Any], folder: Path | None, hub: bool) -> Any:
    """Texts -> token ids (B, context): CLIP's own, or that of the folder, or that of the hub."""
    from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer

    context = text.get("context_length", DEFAULT_CONTEXT_LENGTH)
    options = text.get("tokenizer_kwargs", {})
    if not (repo := text.get("hf_tokenizer_name")):
        return SimpleTokenizer(context_length=context, **options)
    if folder is None or not has_tokenizer(folder):
        if not hub:
            raise UserError(f"{asked}: its tokenizer is missing: put its tokenizer.json and tokenizer_config.json there.")
        folder = hub_tokenizer(asked, repo)
    return HFTokenizer(str(folder), context_length=context, tokenizer_mode=text.get("tokenizer_mode"), **options)


def _normalisation(preprocess: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixels in 0..1 per channel; OpenAI's where nothing else is said, as in open_clip."""
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    return tuple(preprocess.get("mean") or OPENAI_DATASET_MEAN), tuple(preprocess.get("std") or OPENAI_DATASET_STD)


def _square(size: int | tuple[int, int]) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"images must be square, this model wants {size}")
    return sides.pop()
