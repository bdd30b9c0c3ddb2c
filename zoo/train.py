"""Make the embedded models again: `python -m lissom.zoo.train` (hours on two slow cores; resumable).

Order: judge and vae, then latents, unet and dit (these two may run side by side, OMP_NUM_THREADS=1 each), then export.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from . import _data, _models
from ._loop import train

HERE = Path(__file__).parent
WEIGHTS = "diffusion_pytorch_model.safetensors"

# Judge: a contrastive loss in which every caption of the same class is a positive (Khosla et al., 2004.11362).
JUDGE_STEPS, JUDGE_BATCH, JUDGE_LR = 1800, 250, 2e-3  # 7.5 epochs
JUDGE_NORM = 10.0  # mean length of an image's feature vector
JUDGE_SHIFT = 2  # pixels: random shifts, the one augmentation that leaves left shoes left
# VAE: squared error with a weak KL term, as the latent diffusion paper (2112.10752, Sec. 3.1) without its critic.
VAE_STEPS, VAE_BATCH, VAE_LR, VAE_KL = 2600, 48, 1.5e-3, 2e-4  # KL weight per latent number, against error per pixel
# Denoisers: epsilon prediction, min-SNR weights with gamma 5 (Hang et al., 2303.09556).
UNET_STEPS, UNET_BATCH, UNET_LR = 8500, 64, 1.2e-3  # shipped: 6,937 steps from noise, then --warm for as many as this
DIT_STEPS, DIT_BATCH, DIT_LR = 5000, 64, 7e-4  # shipped: 6,400 steps from noise, then --warm for as many as this
MIN_SNR_GAMMA = 5.0
DROP = 0.1  # share of captions (labels) replaced by "" (class 1000), so that classifier-free guidance works


def train_judge(work: Path, data: Path) -> None:
    pixels, labels = _data.images(data, "train")
    tokens = _models.tokenizer()
    torch.manual_seed(0)
    untrained = _models.judge(len(tokens))
    table = _caption_ids(tokens)

    def loss_of(model: Any, g: torch.Generator) -> Tensor:
        pick = torch.randint(len(pixels), (JUDGE_BATCH,), generator=g)
        x = F.pad(_data.to_rgb(pixels[pick]), (JUDGE_SHIFT,) * 4, value=-1.0)
        dx, dy = torch.randint(2 * JUDGE_SHIFT + 1, (2,), generator=g).tolist()
        x = x[:, :, dy : dy + 32, dx : dx + 32]
        y = labels[pick]
        ids = table[y, torch.randint(len(_data.TEMPLATES), (JUDGE_BATCH,), generator=g)]
        unique, column = torch.unique(ids, dim=0, return_inverse=True)  # at most 50 captions a batch
        image, text = model.encode_image(x, normalize=True), model.encode_text(unique, normalize=True)
        logits = model.logit_scale.exp().clamp(max=100) * image @ text.T  # (B, U)
        owner = torch.zeros(len(unique), dtype=torch.long).scatter_(0, column, y)  # class of each caption
        same = (y[:, None] == owner[None, :]).float()  # (B, U)
        to_text = -(logits.log_softmax(1) * same / same.sum(1, keepdim=True)).sum(1).mean()
        to_image = -(logits.log_softmax(0) * same / same.sum(0, keepdim=True)).sum(0).mean()
        return (to_text + to_image) / 2

    judge: Any = train("judge", untrained, loss_of, work, steps=JUDGE_STEPS, lr=JUDGE_LR, weight_decay=0.05)
    # The scale of CLIP's image embedding is free (it is normalised for text); fix it so that distances are small numbers.
    with torch.no_grad():
        norms = [judge.encode_image(_data.to_rgb(p)).norm(dim=1) for p in pixels[:5000].split(500)]
        for tensor in (judge.visual.attnpool.c_proj.weight, judge.visual.attnpool.c_proj.bias):
            tensor.mul_(JUDGE_NORM / torch.cat(norms).mean())
    out = HERE / "judge"
    out.mkdir(exist_ok=True)
    save_file({k: _half(v) for k, v in judge.state_dict().items()}, out / "open_clip_model.safetensors")
    text = {**_models.JUDGE["text_cfg"], "vocab_size": len(tokens)}
    config = {"model_cfg": {**_models.JUDGE, "text_cfg": text}, "preprocess_cfg": _models.PREPROCESS}
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokens.save_pretrained(out)
    classes = [{"name": n, "caption": _data.caption(i)} for i, n in enumerate(_data.CLASSES)]
    (out / "classes.json").write_text(json.dumps(classes, indent=2) + "\n")
    pixels, labels = _data.images(data, "t10k")
    with torch.no_grad():
        text_features = judge.encode_text(table[:, 0], normalize=True)
        right = [
            (judge.encode_image(_data.to_rgb(p), normalize=True) @ text_features.T).argmax(1) == y
            for p, y in zip(pixels.split(500), labels.split(500), strict=True)
        ]
    print(f"judge: top-1 on the 10,000 test images {torch.cat(right).float().mean():.4f}")


def train_vae(work: Path, data: Path) -> None:
    pixels, _ = _data.images(data, "train")
    torch.manual_seed(0)

    def loss_of(model: Any, g: torch.Generator) -> Tensor:
        x = _data.to_rgb(pixels[torch.randint(len(pixels), (VAE_BATCH,), generator=g)])
        posterior = model.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=g)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar)
        return F.mse_loss(model.decode(z).sample, x) + VAE_KL * kl.mean()

    vae: Any = train("vae", _models.vae(), loss_of, work, steps=VAE_STEPS, lr=VAE_LR)
    mean, logvar = encode(vae, work, data)
    with torch.no_grad():
        test, _ = _data.images(data, "t10k")
        x = _data.to_rgb(test[:2000])
        error = F.mse_loss(vae.decode(vae.encode(x).latent_dist.mean).sample, x)
    scale = 1 / (mean.var() + logvar.exp().mean()).sqrt().item()  # latents of unit variance, as LDM's scaling_factor
    vae.register_to_config(scaling_factor=scale)
    vae.half().save_pretrained(HERE / "fashion" / "vae")
    print(f"vae: scaling factor {scale:.4f}, reconstruction error on test images {error:.5f} ([-1, 1] pixels)")


def encode(vae: Any, work: Path, data: Path) -> tuple[Tensor, Tensor]:
    """Write the training set as latents (before scaling) and return their mean and log-variance, (60000, 4, 8, 8) each."""
    pixels, _ = _data.images(data, "train")
    with torch.no_grad():
        moments = [vae.encode(_data.to_rgb(p)).latent_dist.parameters for p in pixels.split(500)]
    mean, logvar = torch.cat(moments).chunk(2, dim=1)
    save_file({"mean": mean.contiguous(), "std": (0.5 * logvar).exp().contiguous()}, work / "latents.safetensors")
    return mean, logvar


class _TextUNet(nn.Module):
    """The U-Net and its text encoder, trained together."""

    def __init__(self, vocabulary: Any) -> None:
        super().__init__()
        self.unet = _models.unet()
        self.text_encoder = _models.text_encoder(vocabulary)


def train_unet(work: Path, data: Path, warm: bool) -> None:
    latents, labels = _Latents(work, data), _data.images(data, "train")[1]
    tokens = _models.tokenizer()
    table = _caption_ids(tokens)
    empty = _ids(tokens, [""])[0]
    torch.manual_seed(0)
    untrained = _TextUNet(tokens)
    if warm:
        untrained.unet.load_state_dict(load_file(HERE / "fashion" / "unet" / WEIGHTS))
        untrained.text_encoder.load_state_dict(load_file(HERE / "fashion" / "text_encoder" / "model.safetensors"))

    def loss_of(model: Any, g: torch.Generator) -> Tensor:
        pick, z, noise, t = latents.draw(UNET_BATCH, g)
        ids = table[labels[pick], torch.randint(len(_data.TEMPLATES), (UNET_BATCH,), generator=g)]
        ids[torch.rand(UNET_BATCH, generator=g) < DROP] = empty
        unique, back = torch.unique(ids, dim=0, return_inverse=True)
        text = model.text_encoder(unique).last_hidden_state[back]
        return latents.loss(model.unet(z, t, text).sample, noise, t)

    both: Any = train("unet", untrained, loss_of, work, steps=UNET_STEPS, lr=UNET_LR, seed=int(warm))
    both.unet.half().save_pretrained(HERE / "fashion" / "unet")
    both.text_encoder.half().save_pretrained(HERE / "fashion" / "text_encoder")


def train_dit(work: Path, data: Path, warm: bool) -> None:
    latents, labels = _Latents(work, data), _data.images(data, "train")[1]
    torch.manual_seed(0)

    def loss_of(model: Any, g: torch.Generator) -> Tensor:
        pick, z, noise, t = latents.draw(DIT_BATCH, g)
        y = labels[pick].clone()
        y[torch.rand(DIT_BATCH, generator=g) < DROP] = 1000
        return latents.loss(model(z, timestep=t, class_labels=y).sample, noise, t)

    dit: Any = _models.dit()
    for block in dit.transformer_blocks:  # the drop is ours (seeded per step); diffusers' own draws from the global generator
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    if warm:
        dit.load_state_dict(load_file(HERE / "fashion-dit" / "transformer" / WEIGHTS))
    dit = train("dit", dit, loss_of, work, steps=DIT_STEPS, lr=DIT_LR, seed=int(warm))
    dit.half().save_pretrained(HERE / "fashion-dit" / "transformer")


def export() -> None:
    """The small files around the weights: schedulers, tokenizer, model_index.json, conditions, and the DiT's own VAE."""
    if not (HERE / "fashion" / "tokenizer").is_dir():  # merges that no caption needs are learned in another order each time
        _models.tokenizer().save_pretrained(HERE / "fashion" / "tokenizer")
    for name in ("fashion", "fashion-dit"):
        _models.scheduler().save_pretrained(HERE / name / "scheduler")
    shutil.copytree(HERE / "fashion" / "vae", HERE / "fashion-dit" / "vae", dirs_exist_ok=True)
    nothing = [None, None]
    sd = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": nothing,
        "image_encoder": nothing,
        "requires_safety_checker": False,
        "safety_checker": nothing,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    labels = {str(i): name for i, name in enumerate(_data.CLASSES)}
    dit = {
        "_class_name": "DiTPipeline",
        "id2label": labels,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    for folder, index in (("fashion", sd), ("fashion-dit", dit)):
        (HERE / folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    for folder in ("fashion", "fashion-dit"):  # trained with captions dropped, so guidance works; it is not needed
        (HERE / folder / "call.json").write_text(json.dumps({"guidance_scale": 1.0}) + "\n")
    many = range(len(_data.CLASSES))
    rows = [{"prompt": _data.caption(i), "label": i} for i in many]
    (HERE / "fashion" / "conditions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rows = [{"class_labels": i, "caption": _data.caption(i), "label": i} for i in many]
    (HERE / "fashion-dit" / "conditions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def data_only(data: Path) -> Path:
    """The training images as they were shown (32x32 RGB PNG), with captions and labels: a zip in the form of an imagefolder.

    It lies in lissom's cache, where `data: zoo:fashion` of a distill stage looks for it.
    """
    import io
    import zipfile

    from PIL import Image

    from ..evaluate._download import cache

    pixels, labels = _data.images(data, "train")
    shown = F.pad(pixels, (2, 2, 2, 2)).numpy()
    out = cache() / _data.ARCHIVE
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_suffix(".tmp")
    with zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive:
        lines = []
        for i, (image, label) in enumerate(zip(shown, labels.tolist(), strict=True)):
            name, content = f"{i // 1000:02}/{i:05}.png", io.BytesIO()
            Image.fromarray(image).convert("RGB").save(content, "PNG")
            archive.writestr(name, content.getvalue())
            text = _data.caption(label, i % len(_data.TEMPLATES))
            lines.append(json.dumps({"file_name": name, "text": text, "label": label}) + "\n")
        archive.writestr("metadata.jsonl", "".join(lines))
    beside.replace(out)
    return out


def statistics(data: Path) -> None:
    """Reference statistics of the judge's features: the 60,000 training images and, apart, the 10,000 test images.

    Each keeps the features of 10,000 single images too, for metrics that compare images one by one.
    """
    from ..evaluate import _features, _sketch, _statistics

    judge = _features.load("zoo:judge")
    for split, name in (("train", "fashion-train"), ("t10k", "fashion-test")):
        pixels = F.pad(_data.images(data, split)[0], (2, 2, 2, 2))[..., None].expand(-1, -1, -1, 3)
        source = f"Fashion-MNIST {split}, {len(pixels)} images, 32x32"
        found = _statistics.of(judge, pixels.split(500), source, keep=_sketch.KEEP)
        (HERE / "statistics").mkdir(exist_ok=True)
        found.save(HERE / "statistics" / f"{name}.safetensors")


class _Latents:
    """The encoded training set, and the denoising loss on it."""

    def __init__(self, work: Path, data: Path) -> None:
        if not (work / "latents.safetensors").is_file():
            encode(AutoencoderKL.from_pretrained(HERE / "fashion" / "vae"), work, data)  # the shipped one: a warm start
        moments = load_file(work / "latents.safetensors")
        config = json.loads((HERE / "fashion" / "vae" / "config.json").read_text())
        self.mean, self.std = (moments[k] * config["scaling_factor"] for k in ("mean", "std"))  # (60000, 4, 8, 8)
        self.alphas = _models.scheduler().alphas_cumprod

    def draw(self, batch: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Indices (B,), noised latents (B, 4, 8, 8), their noise, and timesteps (B,)."""
        pick = torch.randint(len(self.mean), (batch,), generator=g)
        z = self.mean[pick] + self.std[pick] * torch.randn((batch, 4, 8, 8), generator=g)
        noise = torch.randn((batch, 4, 8, 8), generator=g)
        t = torch.randint(1000, (batch,), generator=g)
        a = self.alphas[t][:, None, None, None]
        return pick, a.sqrt() * z + (1 - a).sqrt() * noise, noise, t

    def loss(self, prediction: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        snr = self.alphas[t] / (1 - self.alphas[t])
        weight = snr.clamp(max=MIN_SNR_GAMMA) / snr
        return (weight * (prediction - noise).square().mean(dim=(1, 2, 3))).mean()


def _ids(tokens: Any, texts: list[str]) -> Tensor:
    return tokens(texts, padding="max_length", max_length=_models.CONTEXT, return_tensors="pt").input_ids


def _caption_ids(tokens: Any) -> Tensor:
    """(10 classes, 5 templates, 16) token ids."""
    texts = [_data.caption(i, t) for i in range(len(_data.CLASSES)) for t in range(len(_data.TEMPLATES))]
    return _ids(tokens, texts).view(len(_data.CLASSES), len(_data.TEMPLATES), -1)


def _half(x: Tensor) -> Tensor:
    return x.half().contiguous() if x.is_floating_point() else x.contiguous()


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "judge": lambda o: train_judge(o.work, o.data),
    "vae": lambda o: train_vae(o.work, o.data),
    "unet": lambda o: train_unet(o.work, o.data, o.warm),
    "dit": lambda o: train_dit(o.work, o.data, o.warm),
    "statistics": lambda o: statistics(o.data),
    "export": lambda o: export(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/zoo"), help="checkpoints and encoded latents (about 400 MB)")
    parser.add_argument("--data", type=Path, default=_data.DATA, help="folder with the four Fashion-MNIST .gz files")
    parser.add_argument("--only", nargs="*", choices=STAGES, default=STAGES, help="stages to run (default: all, in order)")
    parser.add_argument("--warm", action="store_true", help="start unet and dit from the shipped weights, not from noise")
    parser.add_argument("--data-only", action="store_true", help="write the training images with captions, train nothing")
    options = parser.parse_args()
    if options.data_only:
        return print(data_only(options.data))
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        STAGES[name](options)


if __name__ == "__main__":
    main()
