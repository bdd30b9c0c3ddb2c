"""How close images are to those of the uncut model on the same seeds: what a cut or a shorter plan changed, image by image.

fidelity is the mean cosine distance between the features of both images; psnr and ssim (Wang et al., IEEE TIP 13 (2004),
600-612) compare pixels; latent_mse compares the latents before the decoder. Equal images score 0, 100 dB, 1 and 0. A low value is
no proof of worse pictures: a model may paint another, equally good image from the same noise. Distances such as fid tell that.
"""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from ._sample import Part, Sample, Score, mean_score

parts = {
    "fidelity": Part("lower", "cosine distance"),
    "ssim": Part("higher", featured=False),
    "psnr": Part("higher", "dB", featured=False),
    "latent_mse": Part("lower", featured=False),
}
needs = frozenset({"features", "base"})
EQUAL = 1e-10  # mean squared error below which pixels count as equal: 100 dB


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = "https://doi.org/10.1109/TIP.2003.819861"


def evaluate(sample: Sample, config: Config) -> dict[str, Score]:
    """Means over images of sample.features (N, D) against sample.base; latent_mse only where both latents have one shape."""
    from torch.nn.functional import cosine_similarity

    base = sample.base
    assert base is not None  # in `needs`
    each = {
        "fidelity": (1 - cosine_similarity(sample.features.double(), base.features.double())).clamp(min=0),
        "ssim": base.ssim,
        "psnr": -10 * base.squared_error.clamp(min=EQUAL).log10(),
    }
    if base.latent_squared_error is not None:
        each["latent_mse"] = base.latent_squared_error
    return {name: mean_score(values, sample.halves) for name, values in each.items()}
