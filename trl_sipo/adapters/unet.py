# SPDX-License-Identifier: Apache-2.0
"""What the U-Net backbones share: which U-Nets take nothing that text-to-image training cannot give."""

from typing import Any

from trl_sipo.errors import BackboneError

# Options of the UNet by which it takes inputs beside the latents, the timestep and the prompt's tokens.
_INPUT_OPTIONS = {
    "class_embed_type": "class conditioning",
    "num_class_embeds": "class conditioning",
    "time_cond_proj_dim": "an embedded guidance scale (a distilled model, such as LCM)",
    "addition_embed_type": "the added conditioning of another kind of model",
    "encoder_hid_dim_type": "projected conditioning (such as an IP-Adapter)",
}


def check_text_to_image_unet(pipeline: Any, addition_embed_type: str | None) -> None:
    """Refuse U-Nets that need further inputs, or whose channels are not those of the VAE's latents.

    Args:
        pipeline: with a `unet` and a `vae`.
        addition_embed_type: the added conditioning that the adapter feeds, by diffusers' name; None for none.

    Raises:
        BackboneError: naming the option, what it means and the way out.
    """
    unet, vae = pipeline.unet.config, pipeline.vae.config
    for option, meaning in _INPUT_OPTIONS.items():
        fed = addition_embed_type if option == "addition_embed_type" else None
        if unet.get(option) != fed:
            raise BackboneError(
                f"The UNet has {option}={unet.get(option)!r}, not {fed!r}: it takes {meaning}, which this adapter "
                "does not feed. Use a plain text-to-image checkpoint."
            )
    for side, channels in (("takes", unet.in_channels), ("gives", unet.out_channels)):
        if channels != vae.latent_channels:
            raise BackboneError(
                f"The UNet {side} {channels} channels but the VAE's latents have {vae.latent_channels}: an "
                "inpainting, image-conditioned or learned-variance model. Use a plain text-to-image checkpoint."
            )


def default_unet_size(pipeline: Any) -> tuple[int, int]:
    """Height and width in pixels of what the pipeline draws by default, from the UNet's `sample_size`."""
    sample_size = pipeline.unet.config.sample_size
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    return height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor
