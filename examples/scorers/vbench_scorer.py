# SPDX-License-Identifier: Apache-2.0
"""A dimension of VBench as a scorer. It runs in VBench's environment, in which trl_sipo need not be installed.

    pip install vbench        # https://github.com/Vchitect/VBench, in an environment of its own
    cp <trl_sipo>/rewards/outside/serve.py examples/scorers/vbench_scorer.py .
    python serve.py vbench_scorer:VBenchDimension --options '{"dimension": "motion_smoothness"}' --http 8000

Written from VBench's code of March 2026; **it has not been run here**, where neither VBench nor a GPU is. VBench is
made for its own prompts and five videos of each: scores of other prompts do not compare with its leaderboard.
"""

import json
import tempfile
from pathlib import Path

# The dimensions that VBench's README names for videos of one's own: the others need its prompts and what they hold. Of
# one video `dynamic_degree` is 0 or 1, `imaging_quality` 0 to 100 (only its mean is divided by 100), the rest 0 to 1.
DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)


class VBenchDimension:
    """One number per video. VBench loads its models for every batch: let it be large."""

    def __init__(self, dimension="motion_smoothness", device="cuda", full_info="VBench_full_info.json"):
        if dimension not in DIMENSIONS:
            raise ValueError(f"{dimension!r} takes no videos of one's own; known are {', '.join(DIMENSIONS)}")
        self.dimension, self.device, self.full_info = dimension, device, full_info
        self.info = {
            "name": f"vbench_{dimension}",
            "convention": f"VBench's {dimension} of one video, mode custom_input",
            "licence": "Apache-2.0; its models have licences of their own",
            "media": ["video"],
            "batch_size": 256,
        }

    def score(self, paths, prompts):
        """The dimension's number for each video file."""
        from vbench import VBench

        with tempfile.TemporaryDirectory() as folder:
            videos, output = Path(folder, "videos"), Path(folder, "output")
            videos.mkdir()
            names = [f"{number:05d}.mp4" for number in range(len(paths))]
            for number, path in enumerate(paths):
                (videos / names[number]).symlink_to(Path(path).resolve())
            VBench(self.device, self.full_info, str(output)).evaluate(
                videos_path=str(videos),
                name="scored",
                prompt_list={name: prompts[number] for number, name in enumerate(names)},
                dimension_list=[self.dimension],
                mode="custom_input",
            )
            _, results = json.loads((output / "scored_eval_results.json").read_text())[self.dimension]
        found = {Path(result["video_path"]).name: float(result["video_results"]) for result in results}
        return [found[name] for name in names]
