# SPDX-License-Identifier: Apache-2.0
"""Tiny open-vocabulary detectors with random weights, built in process."""

import torch
from transformers import (
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    Owlv2Config,
    Owlv2ForObjectDetection,
    SwinConfig,
)

from tests.tiny_models import tiny_clip_tokenizer
from trl_sipo.rewards.detectors import GroundingDinoDetector, Owlv2Detector
from trl_sipo.rewards.requirements import OBJECTS

OWLV2_SIDE = 48
# Where BERT's vocabulary has [CLS], [SEP], "." and "?": the model knows the ends of names by these numbers.
_MARKS = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 1012: ".", 1029: "?"}


def tiny_owlv2(seed: int = 0) -> Owlv2Detector:
    """OWLv2 with 36 boxes for images of 48x48."""
    tokenizer = tiny_clip_tokenizer(max_length=32)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**tower, **marks, "vocab_size": len(tokenizer), "max_position_embeddings": 32}
    vision = {**tower, "image_size": OWLV2_SIDE, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = Owlv2Config(text_config=text, vision_config=vision, projection_dim=16)
        model = Owlv2ForObjectDetection(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)  # or all boxes would be alike
        for layer in (model.class_head.logit_shift, model.class_head.logit_scale):
            layer.weight.data /= 10  # or sigmoids would be 0 and 1
    return Owlv2Detector(model.eval(), tokenizer)


def tiny_bert_tokenizer() -> BertTokenizer:
    """One that knows the words of all objects, and has its marks at BERT's numbers."""
    words = sorted({word for name in OBJECTS for word in name.split()} - {"toothbrush"})
    pieces = [_MARKS.get(number, f"[unused{number}]") for number in range(1030)]
    vocabulary = [*pieces, "tooth", "##brush", *words]  # one name of two pieces
    return BertTokenizer(vocab={piece: number for number, piece in enumerate(vocabulary)}, do_lower_case=True)


def tiny_grounding_dino(seed: int = 0) -> GroundingDinoDetector:
    """Grounding DINO with 12 boxes for images whose shorter side becomes 96."""
    tokenizer = tiny_bert_tokenizer()
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_indices=[2, 3, 4]
    )
    text = {
        "model_type": "bert",
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    layers = {"layers": 2, "ffn_dim": 16, "attention_heads": 2, "n_points": 2}
    sizes = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in layers.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = GroundingDinoConfig(backbone_config=backbone, text_config=text, d_model=32, num_queries=12, **sizes)
        model = GroundingDinoForObjectDetection(config)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    image_processor = GroundingDinoImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 160})
    return GroundingDinoDetector(model.eval(), tokenizer, image_processor)
