# SPDX-License-Identifier: Apache-2.0
"""HunyuanVideo."""

from tests.adapters.backbone_cases import BackboneCase, sampler_level_of_call
from tests.tiny.hunyuan_video import tiny_hunyuan_video

CASES = (
    BackboneCase(
        name="hunyuanvideo",
        build=tiny_hunyuan_video,
        latents_argument="hidden_states",
        call_options={"height": 16, "width": 32, "num_frames": 5},
        media_shape=(3, 5, 16, 32),
        linear_targets=("to_q", "ff.net.2"),
        level_of_call=sampler_level_of_call,
        not_as_in_bfloat16=("timestep",),
        masks={"encoder_hidden_states": "encoder_attention_mask"},
    ),
)
