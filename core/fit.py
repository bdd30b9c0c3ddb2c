"""Whether two pipelines predict the same thing on the same latents, so that one may make steps of the other's trajectory."""

from typing import Any

from .driving.steering import denoisers

# What a denoiser is told and gives back: channels, size, text, classes, further embeddings. Depth and width may differ.
DENOISER = (
    "in_channels",
    "out_channels",
    "sample_size",
    "cross_attention_dim",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "joint_attention_dim",
    "pooled_projection_dim",
    "caption_channels",
    "class_embed_type",
    "num_class_embeds",
    "num_embeds_ada_norm",
    "projection_class_embeddings_input_dim",
    "addition_embed_type",
    "addition_time_embed_dim",
    "time_cond_proj_dim",
    "guidance_embeds",
)
LATENTS = ("latent_channels", "scaling_factor", "shift_factor", "latents_mean", "latents_std")  # of a VAE
SCHEDULE = ("prediction_type", "num_train_timesteps")
CLOSE = 1e-5  # of the cumulated alphas: what rounding may change


def misfit(own: Any, other: Any) -> str | None:
    """The first thing in which two diffusers pipelines differ that have to share a trajectory; None if they fit.

    T-Stitch (arXiv 2402.14167) needs one latent space, one noise schedule and one kind of prediction. Where texts are read
    alike is only seen by the width of their embeddings.

    >>> class Empty: scheduler = vae = None
    >>> misfit(Empty(), Empty()) is None
    True
    """
    ours, theirs = denoisers(own), denoisers(other)
    for name in theirs:
        if name not in ours:
            return f"it has a {name} beside, which would never be called"
    for name, module in ours.items():
        if name not in theirs:
            return f"it has no {name}"
        a, b = _config(module), _config(theirs[name])
        for key in DENOISER:
            if a.get(key) != b.get(key):
                return f"its {name} has {key} {_said(b.get(key))}, not {_said(a.get(key))}"
    a, b = _config(getattr(own, "vae", None)), _config(getattr(other, "vae", None))
    for key in LATENTS:
        if a.get(key) != b.get(key):
            return f"its VAE has {key} {_said(b.get(key))}, not {_said(a.get(key))}"
    return _schedules(own.scheduler, other.scheduler)


def _schedules(own: Any, other: Any) -> str | None:
    a, b = _config(own), _config(other)
    flows = [_flows(scheduler, config) for scheduler, config in ((own, a), (other, b))]
    if flows[0] != flows[1]:
        kinds = ["flow matching" if flow else "a schedule of variances" for flow in flows]
        return f"it was trained with {kinds[1]}, not with {kinds[0]}"
    for key in SCHEDULE if not flows[0] else SCHEDULE[1:]:
        if key in a and key in b and a[key] != b[key]:
            return f"its scheduler has {key} {_said(b[key])}, not {_said(a[key])}"
    if not flows[0] and float((own.alphas_cumprod.cpu() - other.alphas_cumprod.cpu()).abs().max()) > CLOSE:
        return "its noise schedule (betas) is another one"
    return None


def _flows(scheduler: Any, config: dict[str, Any]) -> bool:
    """Whether a scheduler is one of flow matching; several can be either."""
    return (
        "FlowMatch" in type(scheduler).__name__
        or bool(config.get("use_flow_sigmas"))
        or not hasattr(scheduler, "alphas_cumprod")
    )


def _config(part: Any) -> dict[str, Any]:
    return dict(getattr(part, "config", None) or {})


def _said(value: Any) -> str:
    return "none" if value is None else str(value)
