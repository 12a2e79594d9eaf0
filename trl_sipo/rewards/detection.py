# SPDX-License-Identifier: Apache-2.0
"""Does an image show what its prompt asks for? A reward by the rules of GenEval on a detector of another kind.

GenEval has Mask2Former find the objects; here it is OWLv2 or Grounding DINO, so **these numbers cannot be compared
with published ones**, and the rewards have names of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict
from typing import Final

import torch
from PIL import Image
from torch import Tensor

from trl_sipo.errors import ConfigurationError, DatasetError
from trl_sipo.rewards.base import Media, RewardInfo
from trl_sipo.rewards.batched import BatchedReward
from trl_sipo.rewards.colours import ClipColours, ColourClassifier, HsvColours
from trl_sipo.rewards.detection_rules import DetectionRules, Verdict, verify
from trl_sipo.rewards.detectors import Detector, GroundingDinoDetector, Owlv2Detector
from trl_sipo.rewards.media import check_samples, to_rgb
from trl_sipo.rewards.requirements import OBJECTS, parse

#: Each detector and its published weights.
DETECTORS: Final = {
    "owlv2": (Owlv2Detector, "google/owlv2-base-patch16-ensemble"),
    "grounding_dino": (GroundingDinoDetector, "IDEA-Research/grounding-dino-base"),
}
#: By which GenEval tells colours.
CLIP_MODEL: Final = "openai/clip-vit-large-patch14"


class DetectionVerifier(BatchedReward):
    """Whether an image shows what its prompt asks for: 1 or 0, or the share of what it asks for.

    Prompts are those of the grammar of `trl_sipo.rewards.requirements`.

    Args:
        detector: Finds the objects.
        colours: Names their colours.
        rules: When a detection is believed.
        vocabulary: Names that the detector chooses from, beside those of the prompt, so that a teddy bear is not
            taken for a bear. GenEval's detector always chooses among these 80.
        partial: Score by the share of parts that are there, rather than by whether all of them are.
        batch_size: Images at once.
    """

    def __init__(
        self,
        detector: Detector,
        colours: ColourClassifier,
        *,
        rules: DetectionRules | None = None,
        vocabulary: Sequence[str] = OBJECTS,
        partial: bool = False,
        batch_size: int = 8,
    ) -> None:
        rules = rules or DetectionRules()
        scored = "share of what the prompt asks for" if partial else "1 if all that the prompt asks for"
        convention = (
            f"{scored} is seen by {detector.name}{'' if partial else ', else 0'} (GenEval's rules, not its detector)"
        )
        settings = {
            "detector": {"name": detector.name, **detector.settings},
            "colours": type(colours).__name__,
            "rules": asdict(rules),
            "vocabulary": list(vocabulary),
            "partial": partial,
        }
        super().__init__(
            RewardInfo(f"{detector.name}_verifier", convention, detector.licence),
            models=[part.model for part in (detector, colours) if hasattr(part, "model")],
            tokenizer=detector.tokenizer,
            settings=settings,
            batch_size=batch_size,
        )
        self.detector, self.colours, self.rules = detector, colours, rules
        self.vocabulary, self.partial = tuple(vocabulary), partial

    def score(self, media: Sequence[Media], prompts: Sequence[str]) -> Tensor:
        """See `trl_sipo.rewards.base.Reward`.

        Raises:
            DatasetError: A prompt that is not of the grammar, before anything is computed; or a video.
        """
        for prompt in prompts:
            parse(prompt)
        return super().score(media, prompts)

    def score_images(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """See `BatchedReward.score_images`."""
        verdicts = self._verdicts(images, prompts)
        return torch.tensor([verdict.share if self.partial else float(verdict.is_correct) for verdict in verdicts])

    def details(self, media: Sequence[Media], prompts: Sequence[str]) -> list[Verdict]:
        """What was found of each prompt in its image; `category_accuracies` makes a table of them.

        Raises:
            DatasetError: As `score`.
        """
        check_samples(media, prompts, name=self.info.name)
        for prompt in prompts:
            parse(prompt)
        verdicts: list[Verdict] = []
        for start in range(0, len(media), self.batch_size):
            batch = slice(start, start + self.batch_size)
            images = [image_only(medium, name=self.info.name) for medium in media[batch]]
            verdicts += self._verdicts(images, prompts[batch])
        return verdicts

    @torch.inference_mode()
    def _verdicts(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Verdict]:
        """Of one batch of RGB images; those whose detector chooses among the same names go through it together."""
        requirements = [parse(prompt) for prompt in prompts]
        groups: dict[tuple[str, ...], list[int]] = {}
        for index, requirement in enumerate(requirements):
            names = dict.fromkeys([*self.vocabulary, *(required.name for required in requirement.objects)])
            groups.setdefault(tuple(names), []).append(index)
        verdicts: dict[int, Verdict] = {}
        for names, indices in groups.items():
            detections = self.detector.detect([images[index] for index in indices], names)
            for index, found in zip(indices, detections, strict=True):
                arguments = (images[index], prompts[index], requirements[index], found)
                verdicts[index] = verify(*arguments, self.colours, self.rules)
        return [verdicts[index] for index in range(len(images))]


def image_only(medium: Media, *, name: str) -> Image.Image:
    """An image as RGB.

    Raises:
        DatasetError: It is a video.
    """
    if not isinstance(medium, Image.Image):
        raise DatasetError(f"{name} looks at images, and got a video. Give one of its frames as an image.")
    return to_rgb(medium)


def load_detection_verifier(
    detector: str,
    model: str | None = None,
    *,
    colours: str = "clip",
    clip_model: str = CLIP_MODEL,
    device: str = "cpu",
    threshold: float = DetectionRules.threshold,
    counting_threshold: float = 0.3,
    max_overlap: float = DetectionRules.max_overlap,
    vocabulary: Sequence[str] = OBJECTS,
    partial: bool = False,
    batch_size: int = 8,
) -> DetectionVerifier:
    """A `DetectionVerifier` on published weights.

    Args:
        detector: A key of `DETECTORS`.
        model: Hub id or folder of its weights; None: those in `DETECTORS`.
        colours: "clip", as GenEval does it, or "hsv", without weights; see `trl_sipo.rewards.colours`.
        clip_model: Hub id or folder of that CLIP.
        device: As torch names it.
        threshold, max_overlap: See `DetectionRules`.
        counting_threshold: See `DetectionRules`. GenEval's 0.9 is for a softmax over known classes; the sigmoids of
            open-vocabulary detectors seldom get there, and next to no number would be right.
        vocabulary, partial, batch_size: See `DetectionVerifier`.

    Raises:
        ConfigurationError: An unknown name, a number out of range, or weights that are not there.
    """
    if detector not in DETECTORS:
        raise ConfigurationError(f"detector={detector!r} is not known; there are {', '.join(DETECTORS)}.")
    if colours not in ("clip", "hsv"):
        raise ConfigurationError(f"colours={colours!r} is not known; there are 'clip' and 'hsv'.")
    rules = DetectionRules(threshold=threshold, counting_threshold=counting_threshold, max_overlap=max_overlap)
    kind, published = DETECTORS[detector]
    return DetectionVerifier(
        kind.from_pretrained(model or published, device=device),
        ClipColours.from_pretrained(clip_model, device=device) if colours == "clip" else HsvColours(),
        rules=rules,
        vocabulary=vocabulary,
        partial=partial,
        batch_size=batch_size,
    )


owlv2_verifier = functools.partial(load_detection_verifier, "owlv2")
grounding_dino_verifier = functools.partial(load_detection_verifier, "grounding_dino")
