# SPDX-License-Identifier: Apache-2.0
"""When do detected boxes show what a prompt asks for? The rules of GenEval, apart from any detector.

They are those of Ghosh, Hajishirzi and Schmidt (arXiv:2310.11513) and of their published evaluation: objects by their
scores, exact counts, colours and places of the surest boxes. What differs is listed in `docs/source/prompts.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import torch
from PIL import Image
from torch import Tensor

from trl_sipo.errors import ConfigurationError
from trl_sipo.rewards.colours import ColourClassifier
from trl_sipo.rewards.detectors import Detections
from trl_sipo.rewards.requirements import CATEGORIES, RequiredObject, Requirement, plural, with_article


@dataclass(frozen=True)
class DetectionRules:
    """When a detection is believed. The values are GenEval's, but for `max_overlap`.

    Attributes:
        threshold: A box below this score is none.
        counting_threshold: The same where the prompt names a number.
        max_overlap: Of two boxes of one name that overlap by more (intersection over union), the weaker is dropped.
            GenEval drops none (1.0): its detector finds nothing twice.
        max_objects: Of each name, at most so many boxes are counted, the surest first.
        position_margin: By how much the centres of two boxes have to be apart, across or down, to be left of or above
            one another, in units of their widths or heights added up.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_overlap: float = 0.5
    max_objects: int = 16
    position_margin: float = 0.1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "max_objects" and not 0 <= value <= 1:
                raise ConfigurationError(f"`{name}` of the verifier must be from 0 to 1, got {value}.")
        if self.max_objects < 1:
            raise ConfigurationError(f"`max_objects` of the verifier must be at least 1, got {self.max_objects}.")


@dataclass(frozen=True)
class Part:
    """One thing that a prompt asks for, and whether it is there.

    Attributes:
        asked: Such as "two clocks", "apple is red" or "dog left of cat".
        found: The same of what is seen, such as "3 clocks".
        satisfied: Whether they agree.
    """

    asked: str
    found: str
    satisfied: bool


@dataclass(frozen=True)
class Verdict:
    """What was found of a prompt in an image."""

    prompt: str
    category: str
    parts: tuple[Part, ...]

    @property
    def is_correct(self) -> bool:
        """Whether all that is asked for is there."""
        return all(part.satisfied for part in self.parts)

    @property
    def share(self) -> float:
        """Share of the parts that are there, in [0, 1]."""
        return fmean(part.satisfied for part in self.parts)


def category_accuracies(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Share of correct images per category, and "overall", the mean of these: each category counts the same.

    Raises:
        ConfigurationError: There are no verdicts.
    """
    by_category = {
        category: [verdict.is_correct for verdict in verdicts if verdict.category == category]
        for category in CATEGORIES
    }
    accuracies = {category: fmean(correct) for category, correct in by_category.items() if correct}
    if not accuracies:
        raise ConfigurationError("no images were verified, so there are no accuracies")
    return {**accuracies, "overall": fmean(accuracies.values())}


def non_maximum_suppression(boxes: Tensor, scores: Tensor, max_overlap: float) -> Tensor:
    """Which boxes are left when, from the surest on, each drops those that overlap it by more than `max_overlap`.

    Args:
        boxes: (n, 4): left, top, right, bottom.
        scores: (n,).
        max_overlap: Intersection over union, in [0, 1].

    Returns:
        Indices of the boxes that are left, int64 (m,), the surest first.
    """
    order = scores.argsort(descending=True, stable=True)
    overlaps = overlap(boxes[order])
    dropped = torch.zeros(len(order), dtype=torch.bool)
    for rank in range(len(order)):
        if not dropped[rank]:
            dropped[rank + 1 :] |= overlaps[rank, rank + 1 :] > max_overlap
    return order[~dropped]


def overlap(boxes: Tensor) -> Tensor:
    """Intersection over union of all pairs of boxes, (n, 4) -> (n, n); 0 of boxes without an area."""
    starts = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    ends = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    intersection = (ends - starts).clamp(min=0).prod(2)
    areas = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
    union = areas[:, None] + areas[None] - intersection
    return intersection / union.clamp(min=torch.finfo(boxes.dtype).tiny)


def relations(box: Tensor, other: Tensor, margin: float) -> set[str]:
    """Where a box is, seen from another one; up to two of `RELATIONS`, or none where they are as good as one place.

    GenEval's rule: the offset of the centres, less `margin` times both widths (or heights), in units of the distance
    of the centres, has to be more than a half to a side. So things on a diagonal are both above and to the left.

    Args:
        box, other: (4,): left, top, right, bottom.
        margin: `DetectionRules.position_margin`.
    """
    offset = (box[:2] + box[2:] - other[:2] - other[2:]) / 2
    sizes = (box[2:] - box[:2]) + (other[2:] - other[:2])
    clear = (offset.abs() - margin * sizes.abs()).clamp(min=0) * offset.sign()
    if clear.abs().max() < 1e-3:  # of a pixel
        return set()
    across, down = (clear / offset.norm()).tolist()
    sides = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, holds in sides.items() if holds}


def believed_boxes(detections: Detections, threshold: float, rules: DetectionRules) -> dict[str, Tensor]:
    """The boxes of each name that are sure enough and no double, (n, 4), the surest first; no name without any."""
    found = {}
    for name in dict.fromkeys(detections.labels):
        is_named = torch.tensor([label == name for label in detections.labels])
        chosen = is_named & (detections.scores > threshold)
        boxes, scores = detections.boxes[chosen], detections.scores[chosen]
        kept = non_maximum_suppression(boxes, scores, rules.max_overlap)[: rules.max_objects]
        if len(kept):
            found[name] = boxes[kept]
    return found


def verify(
    image: Image.Image,
    prompt: str,
    requirement: Requirement,
    detections: Detections,
    colours: ColourClassifier,
    rules: DetectionRules,
) -> Verdict:
    """Hold what was detected against what is required.

    An object asked for once may be there more often; a number has to be met exactly. Colours and places are those of
    the surest boxes, as many as are asked for, and each of these has to agree.
    """
    is_counting = any(required.count > 1 for required in requirement.objects)
    threshold = rules.counting_threshold if is_counting else rules.threshold
    found = believed_boxes(detections, threshold, rules)
    boxes = [found.get(required.name, torch.zeros(0, 4)) for required in requirement.objects]
    parts = []
    for required, places in zip(requirement.objects, boxes, strict=True):
        parts.append(_count_part(required, len(places)))
        if required.colour is not None:
            parts.append(_colour_part(required, image, places, colours))
    if requirement.relation is not None:
        parts.append(_position_part(requirement, boxes, rules.position_margin))
    return Verdict(prompt, requirement.category, tuple(parts))


def _count_part(required: RequiredObject, number: int) -> Part:
    asked = with_article(required.name) if required.count == 1 else f"{required.count} {plural(required.name)}"
    noun = required.name if number == 1 else plural(required.name)
    satisfied = number == required.count if required.count > 1 else number >= 1
    return Part(asked, f"{number} {noun}", satisfied)


def _colour_part(required: RequiredObject, image: Image.Image, places: Tensor, colours: ColourClassifier) -> Part:
    pictures = [cut_out(image, box) for box in places[: required.count]]
    seen = colours.classify(pictures, required.name) if pictures else []
    satisfied = len(seen) == required.count and all(colour == required.colour for colour in seen)
    return Part(
        f"{required.name} is {required.colour}", ", ".join(str(colour) for colour in seen) or "none", satisfied
    )


def _position_part(requirement: Requirement, boxes: Sequence[Tensor], margin: float) -> Part:
    (first, second), (places, others) = requirement.objects, boxes
    asked = f"{first.name} {requirement.relation} {second.name}"
    if len(places) < first.count or len(others) < second.count:
        return Part(asked, "not both", False)
    seen = [relations(box, other, margin) for box in places[: first.count] for other in others[: second.count]]
    found = ", ".join(" and ".join(sorted(sides)) or "one place" for sides in seen)
    return Part(asked, found, all(requirement.relation in sides for sides in seen))


def cut_out(image: Image.Image, box: Tensor) -> Image.Image:
    """The picture within a box, of at least one pixel, without what of the box is beyond the image."""
    left, top, right, bottom = box.round().int().tolist()
    left, top = min(max(left, 0), image.width - 1), min(max(top, 0), image.height - 1)
    return image.crop((left, top, max(min(right, image.width), left + 1), max(min(bottom, image.height), top + 1)))
