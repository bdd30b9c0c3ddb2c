"""The sums of losses that papers recover quality with. Weights are the papers' where a text that we could read has them."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Preset:
    """A paper's sum of losses."""

    losses: dict[str, float]  # a file in distill/ -> its weight
    paper: str
    says: str  # in a line
    settings: dict[str, object] = field(default_factory=dict)  # of the stage, where the paper's differ from the stage's own


PRESETS = {
    # Weights 1, AdamW at a constant 5e-5, clipping at 1 and an EMA are the published code's (arXiv 2305.15798).
    "bk": Preset(
        {"task": 1.0, "output": 1.0, "features": 1.0},
        "https://arxiv.org/abs/2305.15798",
        "BK-SDM: task, output and stage features, equal weights",
    ),
    # BK-SDM's sum with normalised features; the paper's weights are not in the texts that we could read.
    "laptop": Preset(
        {"task": 1.0, "output": 1.0, "normalized_features": 1.0},
        "https://arxiv.org/abs/2404.11098",
        "LAPTOP-Diff: as bk, features normalised by the teacher's",
    ),
    # Task, output and self-attention features; the paper's weights are not in the texts that we could read.
    "koala": Preset(
        {"task": 1.0, "output": 1.0, "self_attention": 1.0},
        "https://arxiv.org/abs/2312.04005",
        "KOALA: as bk, the features those of self-attention",
    ),
    # Output 0.9, task 0.1 and masked features at 1e-2, falling to zero, are the paper's (arXiv 2412.01199, Sec. 3.4, Table 6).
    "tinyfusion": Preset(
        {"output": 0.9, "task": 0.1, "masked_features": 0.01},
        "https://arxiv.org/abs/2412.01199",
        "TinyFusion: output 0.9, task 0.1, hidden states without outliers, fading out",
    ),
}
