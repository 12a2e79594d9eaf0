# SPDX-License-Identifier: Apache-2.0
"""Judges of a clip: what moves and in which colour, by the networks of `demo.verifier` on close-ups; and where to.

A close-up is one frame, moved and enlarged until the sprite fills it like a photograph. The direction needs no
training: it is the slope of the sprite's centre of mass over the frames.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trl_sipo.demo.verifier import SCORING_BATCH, Verifier
from trl_sipo.demo.video.sprites import DIRECTION_STEPS, SPRITE_SCALE, place

#: A clip moves where its speed, in pixels per frame, is at least this: half of the slowest real clips' speed.
MIN_SPEED = 0.8
#: Darkness below which a pixel is taken for background, of 1.
BACKGROUND = 0.05


def as_frames(clips: torch.Tensor) -> torch.Tensor:
    """Clips (N, 3, F, H, W) -> frames (N * F, 3, H, W), clip by clip."""
    return clips.transpose(1, 2).flatten(0, 1)


def centres(clips: torch.Tensor) -> torch.Tensor:
    """Centre of mass of what is not white, per frame.

    Args:
        clips: float (N, 3, F, H, W) in [-1, 1].

    Returns:
        float32 (N, F, 2), (x, y) in pixels from the centre of the picture; 0 for an empty frame.
    """
    darkness = ((1 - clips.float().clamp(-1, 1)).mean(1) / 2 - BACKGROUND).clamp(min=0)
    mass = darkness.sum((2, 3)).clamp(min=1e-6)
    places = torch.arange(clips.shape[-1]) - (clips.shape[-1] - 1) / 2
    return torch.stack([(darkness.sum(2) * places).sum(2) / mass, (darkness.sum(3) * places).sum(2) / mass], dim=2)


def velocities(clips: torch.Tensor) -> torch.Tensor:
    """Slope of the least-squares line through the centres, float32 (N, 2), (x, y) in pixels per frame."""
    times = torch.arange(clips.shape[2]) - (clips.shape[2] - 1) / 2
    return (centres(clips) * times[None, :, None]).sum(1) / times.square().sum()


def direction_log_probs(clips: torch.Tensor) -> torch.Tensor:
    """How well a clip's velocity fits each of the directions, as log-probabilities, float32 (N, 4).

    It is a soft form of `moves_towards`, by which clips that move the same way can be ranked.
    """
    return F.log_softmax(velocities(clips) @ torch.tensor(DIRECTION_STEPS).T, dim=1)


def moves_towards(clips: torch.Tensor, direction_ids: torch.Tensor) -> torch.Tensor:
    """Whether each clip moves as asked, bool (N,): fast enough, and at most half as fast to the side."""
    velocity, step = velocities(clips), torch.tensor(DIRECTION_STEPS)[direction_ids]
    along = (velocity * step).sum(1)
    across = (velocity * step.flip(1)).sum(1).abs()
    return (along >= MIN_SPEED) & (across <= along / 2)


def close_ups(clips: torch.Tensor) -> torch.Tensor:
    """Every frame, moved and enlarged until its sprite is as a photograph: (N * F, 3, 32, 32) in [-1, 1]."""
    return place(as_frames(clips.float().clamp(-1, 1)), -centres(clips).flatten(0, 1) / SPRITE_SCALE, 1 / SPRITE_SCALE)


def _over_frames(values: torch.Tensor, clips: torch.Tensor) -> torch.Tensor:
    """Mean over the frames of each clip: (N * F, ...) -> (N, ...)."""
    return values.unflatten(0, (-1, clips.shape[2])).mean(1)


@torch.no_grad()
def judge_clips(verifier: Verifier, clips: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Judge clips against what was asked for.

    Args:
        clips: float (N, 3, F, 32, 32) in [-1, 1]; values beyond are clipped.
        ids: class, colour and direction ids, int64 (N, 3).

    Returns:
        `class_correct`, `colour_correct`, `direction_correct`, `correct` (all three): bool (N,). `log_prob`: float32
        (N,), the sum of the log-probabilities of class and colour, each a mean over the frames, and of the direction.
    """
    parts = [[F.log_softmax(logits, 1) for logits in verifier(part)] for part in close_ups(clips).split(SCORING_BATCH)]
    class_log_probs, colour_log_probs = (_over_frames(torch.cat(p), clips) for p in zip(*parts, strict=True))
    class_ids, colour_ids, direction_ids = ids.unbind(1)
    correct = {
        "class_correct": class_log_probs.argmax(1) == class_ids,
        "colour_correct": colour_log_probs.argmax(1) == colour_ids,
        "direction_correct": moves_towards(clips, direction_ids),
    }
    rows = torch.arange(len(clips))
    return {
        **correct,
        "correct": torch.stack(list(correct.values())).all(0),
        "log_prob": class_log_probs[rows, class_ids]
        + colour_log_probs[rows, colour_ids]
        + direction_log_probs(clips)[rows, direction_ids],
    }


def clip_features(verifier: Verifier, clips: torch.Tensor) -> torch.Tensor:
    """What a Frechet distance compares, float32 (N, 82): the verifier's 80 features, mean over the frames, and the
    velocity in pixels per frame."""
    return torch.cat([_over_frames(verifier.features(close_ups(clips)), clips), velocities(clips)], dim=1)
