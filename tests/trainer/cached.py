# SPDX-License-Identifier: Apache-2.0
"""A saved tiny pipeline, pairs of its size on disk, and the cache of both."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig

from tests.adapters.backbone_cases import BackboneCase
from tests.trainer.media import pairs_for
from tests.trainer.runs import DPO, Method, make_config
from trl_sipo.data.loading import load_preference_dataset
from trl_sipo.scripts.encode import run


@dataclass(frozen=True)
class Encoded:
    """Paths of a model, of pairs, and of the cache that the one made of the others."""

    model: Path
    pairs: Path
    cache: Path
    size: dict[str, int]

    def argv(self, cache: Path | None = None, *options: Any) -> list[str]:
        """What `trl-sipo encode` is given."""
        paths = ["--model_name_or_path", self.model, "--dataset_name", self.pairs, "--output", cache or self.cache]
        size = ["--resolution", self.size["height"], self.size["width"], "--num_frames", self.size["num_frames"]]
        return list(map(str, [*paths, *size, "--num_workers", 0, "--device", "cpu", *options]))

    def encode(self, *options: Any, cache: Path | None = None) -> Path:
        """Run the command; returns the folder of the cache."""
        run("encode", self.argv(cache, *options))
        return cache or self.cache

    def trainer(
        self,
        folder: Path,
        data: Path,
        *,
        method: Method = DPO,
        is_lora: bool = True,
        model: str | None = None,
        **options: Any,
    ) -> Any:
        """A trainer on the model's path, of the cache or of the pairs that it was made of."""
        settings = {
            "resolution": [self.size["height"], self.size["width"]],
            "num_frames": self.size["num_frames"],
            "max_steps": 2,
            "learning_rate": 1e-2 if is_lora else 1e-3,
            **options,
        }
        return method.trainer_class(
            model or str(self.model),
            args=make_config(method, folder, **settings),
            train_dataset=load_preference_dataset(data),
            **({"peft_config": LoraConfig(r=4, lora_alpha=10)} if is_lora else {}),
        )


def saved(case: BackboneCase, folder: Path, count: int = 4) -> Encoded:
    """Save the pipeline and the pairs of a case; nothing is encoded yet."""
    case.build().save_pretrained(folder / "model")
    pairs_for(case, folder, count).to_parquet(folder / "pairs.parquet")
    return Encoded(folder / "model", folder / "pairs.parquet", folder / "cache", case.size)
