# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo audit weights`, end to end on tiny pipelines read from disk."""

import json
import sys
from pathlib import Path

import datasets
import PIL.Image
import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.data.clips import write_video
from tests.oracles import sd15_profile
from tests.tiny.hunyuan_video15 import tiny_hunyuan_video15
from tests.tiny.stable_diffusion_3 import tiny_stable_diffusion_3
from tests.tiny.wan import tiny_wan, tiny_wan_experts
from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import preference_pairs
from trl_sipo import DiffusionSIPOConfig, DiffusionSIPOTrainer
from trl_sipo.adapters import adapter_for
from trl_sipo.adapters.stable_diffusion import StableDiffusionAdapter
from trl_sipo.adapters.stable_diffusion_3 import StableDiffusion3Adapter
from trl_sipo.cli.main import main
from trl_sipo.core.parameterization import prediction_target
from trl_sipo.core.precision import per_sample
from trl_sipo.scripts.audit import AUDITS
from trl_sipo.scripts.audit_inputs import load_adapter
from trl_sipo.scripts.audit_weights import make_parser

LEVELS = 5
MODELS = {
    "epsilon": tiny_stable_diffusion,
    "v_prediction": lambda: tiny_stable_diffusion("v_prediction", rescale_betas_zero_snr=True),
    "sd3": tiny_stable_diffusion_3,
    "wan": tiny_wan,
    "wan_experts": tiny_wan_experts,
    "hunyuan_video15": tiny_hunyuan_video15,
}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Pipelines, and pairs of images, of clips and of latents that are zeros, on disk."""
    folder = tmp_path_factory.mktemp("material")
    for name, build in MODELS.items():
        build().save_pretrained(folder / name)
    for name in ("images", "clips", "latents"):
        (folder / name).mkdir()
    preference_pairs(6).to_parquet(folder / "images" / "train.parquet")
    videos = [str(write_video(folder / "clips" / f"{i}.mp4", 9, size=(32, 32), first=3 * i)) for i in range(4)]
    clips = {"prompt": ["a red cat", "two dogs"], "chosen": videos[:2], "rejected": videos[2:]}
    datasets.Dataset.from_dict(clips).to_parquet(folder / "clips" / "train.parquet")
    zeros = torch.zeros(3, 4, 8, 8).tolist()
    latents = {"prompt": ["a", "b", "c"], "chosen_latents": zeros, "rejected_latents": zeros}
    datasets.Dataset.from_dict(latents).to_parquet(folder / "latents" / "train.parquet")
    return folder


def _argv(material, model, data="images", *, num_pairs=2, num_levels=LEVELS):
    paths = ["--model_name_or_path", str(material / model), "--dataset_name", str(material / data)]
    numbers = ["--num_pairs", str(num_pairs), "--num_levels", str(num_levels), "--on_policy", "0"]
    return ["audit", "weights", *paths, *numbers]


def _report(argv, folder):
    assert main([*argv, "--output", str(folder)]) == 0
    return json.loads((folder / "weights.json").read_text())


def _rows(printed):
    """The printed table, as numbers."""
    lines = [line.replace("infinite", "inf").replace("%", "").split() for line in printed.splitlines()]
    return [[float(word) for word in words] for words in lines if len(words) == 8 and words[0][:2] in ("0.", "1.")]


@pytest.mark.parametrize(
    ("model", "data", "options", "shown"),
    [
        ("epsilon", "images", (), "epsilon, diffusion over 1000 timesteps"),
        ("v_prediction", "images", ("--resolution", "16", "32"), "v_prediction, diffusion over 1000 timesteps"),
        pytest.param(
            "sd3",
            "images",
            (),
            "flow_prediction, rectified flow, shift 3 (of the times that are drawn: 3)",
            marks=pytest.mark.slow,
        ),
        ("sd3", "images", ("--timestep_shift", "1"), "shift 3 (of the times that are drawn: 1)"),
        pytest.param(
            "wan", "images", ("--resolution", "32"), "flow_prediction, rectified flow", marks=pytest.mark.slow
        ),
        pytest.param(
            "wan",
            "clips",
            ("--resolution", "32", "--num_frames", "5"),
            "32x32, 5 frames; 2 pairs",
            marks=pytest.mark.slow,
        ),
        ("wan_experts", "clips", ("--resolution", "32", "--num_frames", "5"), "32x32, 5 frames; 2 pairs"),
    ],
)
def test_the_table_the_region_and_the_files(model, data, options, shown, material, tmp_path, capsys):
    report = _report([*_argv(material, model, data), *options], tmp_path)
    printed = capsys.readouterr().out
    assert shown in printed and "Masked: " in printed and "`sipo/masked_fraction`" in printed
    rows, levels = _rows(printed), report["levels"]
    assert len(rows) == len(levels) == LEVELS
    unit = "timestep" if "timestep" in printed.splitlines()[0] else "sigma"
    for row, level in zip(rows, levels, strict=True):
        time, position, log_snr, error, chosen, rejected, pair, masked = row
        assert time == pytest.approx(level["time"], abs=1e-3) and position == pytest.approx(level[unit], abs=1e-4)
        assert log_snr == pytest.approx(level["log_snr"], abs=0.01)
        assert error > 0 and 0 <= pair <= min(chosen, rejected) + 1e-4 and max(chosen, rejected) <= 1
        assert masked == pytest.approx(100 * level["masked_share"], abs=1)
        if level["masked_share"] in (0, 1):
            assert level["masked_share"] == (level["median_pair_weight"] < 0.9)
    share = sum(level["masked_share"] for level in levels) / LEVELS
    assert report["masked_share"] == pytest.approx(share) and share > 0
    assert (tmp_path / "weights.png").read_bytes()[:4] == b"\x89PNG"
    assert report["command"].startswith("trl-sipo audit weights --model_name_or_path")


@pytest.mark.parametrize(
    ("model", "adapter_class", "unit", "low", "high"),
    [
        ("epsilon", StableDiffusionAdapter, "timestep", 62, 73),  # the exact cut is at 66..68; 50 levels are 20 apart
        ("sd3", StableDiffusion3Adapter, "sigma", 0.245, 0.275),  # 0.259 at shift 3
    ],
)
def test_a_known_error_masks_the_known_region(
    model, adapter_class, unit, low, high, material, tmp_path, monkeypatch, capsys
):
    """The error of SD1.5 as published, in place of the denoiser's: on zeros, the noise is x_t / sigma_t."""

    def forward(self, denoiser, noisy_latents, level, conditioning, extra=None):
        noise = noisy_latents / per_sample(level.sigma_t, noisy_latents)
        target = prediction_target(torch.zeros_like(noise), noise, level, self.prediction_type)
        error = torch.from_numpy(sd15_profile.epsilon_error_at_log_snr(level.log_snr.double().numpy())).float()
        if self.prediction_type == "flow_prediction":
            error = error / level.alpha_t**2
        return target + per_sample(error.sqrt(), target)

    monkeypatch.setattr(adapter_class, "forward", forward)
    report = _report(_argv(material, model, "latents", num_levels=50), tmp_path)
    region = report["masked_regions"][0]
    assert region["time"][0] == 0 and low <= region[unit][1] <= high
    assert f"{unit} <= " in report["reading"][0] and report["reading"][0] in capsys.readouterr().out
    if model == "epsilon":
        assert len(report["masked_regions"]) == 1 and "Fig. 4" in report["reading"][-1]
        assert report["masked_share"] == pytest.approx(0.06)  # three of the fifty levels lie below the cut


@pytest.mark.slow
@pytest.mark.parametrize("model", ["v_prediction", "sd3"])
def test_the_share_is_that_of_a_trainer(model, material, tmp_path):
    """The trainer evaluates the same pairs at the same levels, with other noise."""
    report = _report(_argv(material, model, num_pairs=6, num_levels=50), tmp_path)
    settings = {"eval_noise_levels": 50, "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1}
    trainer = DiffusionSIPOTrainer(
        str(material / model),
        args=DiffusionSIPOConfig(tmp_path / "run", **settings),
        train_dataset=preference_pairs(6),
        eval_dataset=preference_pairs(6),
        peft_config=LoraConfig(r=2),
    )
    logged = trainer.evaluate()["eval_sipo/masked_fraction"]
    assert report["masked_share"] == pytest.approx(logged, abs=0.03) and 0.1 < logged < 0.3


@pytest.mark.parametrize(("error", "words"), [(0.0, "Masked: no level"), (1e3, "Masked: every timestep")])
def test_nothing_and_everything(error, words, material, tmp_path, monkeypatch):
    def forward(self, denoiser, noisy_latents, level, conditioning, extra=None):
        return noisy_latents / per_sample(level.sigma_t, noisy_latents) + error**0.5

    monkeypatch.setattr(StableDiffusionAdapter, "forward", forward)
    # From a grid as fine as the timesteps each has a predecessor.
    report = _report([*_argv(material, "epsilon", "latents"), "--importance_steps", "1000"], tmp_path)
    assert report["reading"][0].startswith(words)
    assert report["masked_share"] == (1 if error else 0)
    assert ("mask_threshold" in report["reading"][-1]) == bool(error)


@pytest.mark.parametrize(
    "model",
    ["epsilon", *(pytest.param(name, marks=pytest.mark.slow) for name in ("wan_experts", "sd3", "hunyuan_video15"))],
)
def test_a_lora_is_measured(model, material, tmp_path):
    """Also of two denoisers, and of a pipeline without methods for a LoRA."""
    adapter = adapter_for(MODELS[model]())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"target_modules": adapter.lora_target_modules, "init_lora_weights": False}
        options["target_modules"] = (
            options["target_modules"]
            if isinstance(options["target_modules"], str)
            else list(options["target_modules"])
        )
        denoiser = get_peft_model(adapter.denoiser, LoraConfig(r=4, lora_alpha=16, **options))
    adapter.save_lora(denoiser, tmp_path / "lora")
    argv = [*_argv(material, model), "--resolution", "32"]
    plain, again = _report(argv, tmp_path / "plain"), _report(argv, tmp_path / "again")
    tuned = _report([*argv, "--lora", str(tmp_path / "lora")], tmp_path / "tuned")
    errors = [[level["chosen_error"] for level in report["levels"]] for report in (plain, tuned, again)]
    assert errors[0] == errors[2]
    assert all(abs(one - other) > 1e-5 for one, other in zip(*errors[:2], strict=True))


def _one_expert(folder):
    """Wan 2.2 A14B as it is when only the expert of the noisier levels is loaded."""
    pipeline = tiny_wan_experts()
    pipeline.register_modules(transformer_2=None)
    pipeline.save_pretrained(folder)
    return adapter_for(pipeline).time_range


def test_one_expert_is_measured_on_its_levels(material, tmp_path, capsys):
    low, high = _one_expert(tmp_path / "one")
    assert 0 < low < high == 1
    argv = [*_argv(material, "wan"), "--model_name_or_path", str(tmp_path / "one"), "--resolution", "32"]
    assert main(argv) == 2
    assert f"the other takes [{low:.4f}, 1.0000]. Set `timestep_range`" in capsys.readouterr().err
    low = round(low, 4)
    report = _report([*argv, "--timestep_range", str(low), "1"], tmp_path / "report")
    assert [level["time"] for level in report["levels"]] == pytest.approx(
        [low + (high - low) * (i + 0.5) / LEVELS for i in range(LEVELS)]
    )
    assert report["settings"]["timestep_range"] == [low, high]


def _group(report, name):
    (row,) = [row for row in report["groups"] if row["name"] == name]
    return row


def _rows_of(folder, chosen, **columns):
    """Pairs of some images and a picture each, in a folder of their own."""
    rows = {"prompt": [row["prompt"] for row in preference_pairs(6)][: len(chosen)], "chosen": chosen}
    rows["rejected"] = [row["rejected"] for row in preference_pairs(6)][: len(chosen)]
    folder.mkdir()
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "chosen": datasets.Image(),
            "rejected": datasets.Image(),
            **dict.fromkeys(columns, datasets.Value("string")),
        }
    )
    datasets.Dataset.from_dict({**rows, **columns}, features=features).to_parquet(folder / "train.parquet")
    return folder


def test_own_samples_are_the_scale(material, tmp_path, capsys):
    """Data that the model drew itself is exactly on policy, and the samples stay for the next run."""
    drawing = ["--on_policy", "4", "--num_inference_steps", "2"]
    argv = [*_argv(material, "epsilon", num_pairs=4), *drawing]
    first = _report(argv, tmp_path / "first")
    samples = sorted((tmp_path / "first" / "own_samples").rglob("*.png"))
    assert len(samples) == 4 and _group(first, "own samples")["samples"] == 4
    assert _group(first, "chosen")["error_excess"]["estimate"] != 0
    written = [path.stat().st_mtime_ns for path in samples]
    assert _report(argv, tmp_path / "first")["groups"] == first["groups"]
    assert [path.stat().st_mtime_ns for path in samples] == written

    assert {path.parent.name for path in samples} == {"pair_0", "pair_1", "pair_3", "pair_4"}  # evenly spaced over six

    own = _rows_of(tmp_path / "own", [PIL.Image.open(samples[0]).copy()])
    one = [*_argv(material, "epsilon", num_pairs=1), "--on_policy", "1", "--num_inference_steps", "2"]
    alone = _report([*one, "--dataset_name", str(own)], tmp_path / "alone")
    assert _group(alone, "chosen")["error_excess"]["estimate"] == pytest.approx(0, abs=1e-6)
    assert abs(_group(alone, "rejected")["error_excess"]["estimate"]) > 1e-5
    assert "beside that on its own samples of the same prompts: +0%" in capsys.readouterr().out


def test_sources_are_told_apart(material, tmp_path, capsys):
    """A part that is what the other is not: the shares of the parts make up that of the whole."""
    pictures, hostile = [row["chosen"] for row in preference_pairs(6)], "\x1b[2Jnew"
    data = _rows_of(tmp_path / "data", pictures, source=["old", hostile] * 3, camera=["one"] * 6)
    argv = [*_argv(material, "epsilon", num_pairs=6, num_levels=4), "--dataset_name", str(data)]
    report = _report([*argv, "--on_policy", "2", "--num_inference_steps", "1"], tmp_path / "report")
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "error on 'chosen, \\x1b[2Jnew'" in printed
    parts = [_group(report, f"chosen, {source}") for source in ("old", hostile)]
    assert [part["samples"] for part in parts] == [3, 3]
    means = [part["mean_weight"] for part in parts]
    assert sum(means) / 2 == pytest.approx(_group(report, "chosen")["mean_weight"]) and means[0] != means[1]
    assert [row["name"] for row in report["groups"]][:2] == ["chosen", "rejected"]


@pytest.mark.slow
def test_the_table_of_clip_ranges_is_that_of_runs(material, tmp_path):
    """Each row's masked share is what the audit finds with these settings alone."""
    argv = _argv(material, "epsilon", num_pairs=3)
    rows = {row["clip_range"]: row for row in _report(argv, tmp_path / "all")["clip_ranges"]}
    assert set(rows) == {0.05, 0.1, 0.2, 0.3, 0.4, 0.5}
    report = _report([*argv, "--clip_range", "0.3"], tmp_path / "one")
    assert report["masked_share"] == pytest.approx(rows[0.3]["masked"]["estimate"], abs=1e-6)
    assert 1 <= rows[0.3]["sipo_factor"] <= 1.3 and 0.7 <= rows[0.3]["dpo_cm_factor"] <= 1
    assert rows[0.3]["clipped_by_dpo_cm"] == 0  # what it would clip is masked
    masked = [rows[clip_range]["masked"]["estimate"] for clip_range in sorted(rows)]
    assert masked == sorted(masked, reverse=True) and masked[0] > masked[-1]


@pytest.mark.parametrize("model", ["epsilon", pytest.param("wan_experts", marks=pytest.mark.slow)])
def test_an_adapter_is_measured_beside_the_model(model, material, tmp_path, capsys):
    """To the bit what two audits find, one of the model and one of it with the LoRA."""
    pipeline = adapter_for(MODELS[model]())
    targets = pipeline.lora_target_modules
    targets = targets if isinstance(targets, str) else list(targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False)
        pipeline.save_lora(get_peft_model(pipeline.denoiser, config), tmp_path / "lora")
    argv = [*_argv(material, model), "--resolution", "32"]
    both = _report([*argv, "--adapter", str(tmp_path / "lora")], tmp_path / "both")
    printed = capsys.readouterr().out
    plain, tuned = (
        _report(argv, tmp_path / "plain"),
        _report([*argv, "--lora", str(tmp_path / "lora")], tmp_path / "x"),
    )
    assert both["levels"] == plain["levels"] and both["adapter"]["levels"] == tuned["levels"]
    assert both["adapter"]["levels"] != both["levels"] and "With the adapter" in printed
    assert main([*argv, "--adapter", str(tmp_path / "lora"), "--lora", str(tmp_path / "lora")]) == 2
    assert "would act together" in capsys.readouterr().err


@pytest.mark.slow
def test_a_tuned_pipeline_is_measured_beside_the_model(material, tmp_path, capsys):
    pipeline = MODELS["epsilon"]()
    with torch.no_grad():
        pipeline.unet.conv_in.weight.mul_(1.5)
    pipeline.save_pretrained(tmp_path / "tuned")
    both = _report([*_argv(material, "epsilon"), "--adapter", str(tmp_path / "tuned")], tmp_path / "both")
    argv = [*_argv(material, "epsilon"), "--model_name_or_path", str(tmp_path / "tuned")]
    alone = _report(argv, tmp_path / "alone")
    assert both["adapter"]["levels"] == alone["levels"] != both["levels"]
    assert main([*_argv(material, "epsilon"), "--adapter", str(material / "v_prediction")]) == 2
    assert "one was not tuned from the other" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder in which nobody can write")
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(material, capsys):
    assert main([*_argv(material, "epsilon"), "--output", "/proc/self"]) == 2
    errors = capsys.readouterr().err
    assert "nothing can be written there" in errors and "Encoding" not in errors


def test_own_clips(material, tmp_path):
    argv = [*_argv(material, "wan", "clips"), "--resolution", "32", "--num_frames", "5"]
    report = _report([*argv, "--on_policy", "1", "--num_inference_steps", "2"], tmp_path)
    assert _group(report, "own samples")["samples"] == 1
    assert _group(report, "chosen")["error_excess"]["estimate"] is not None
    assert len(list((tmp_path / "own_samples").rglob("*.mp4"))) == 1


@pytest.mark.slow
def test_a_cache_says_its_size_itself(material, tmp_path, capsys):
    """The same numbers as of the images, in the precision of the cache; and no sources, which it does not keep."""
    model = ["--model_name_or_path", str(material / "epsilon")]
    encoding = ["--resolution", "16", "--dtype", "float32", "--output", str(tmp_path / "cache")]
    assert main(["encode", *model, "--dataset_name", str(material / "images"), *encoding]) == 0
    argv = _argv(material, "epsilon")
    cached = _report([*argv, "--dataset_name", str(tmp_path / "cache")], tmp_path / "cached")
    images = _report([*argv, "--resolution", "16"], tmp_path / "images")
    assert cached["settings"]["height"] == 16
    errors = [[row["chosen_error"] for row in report["levels"]] for report in (cached, images)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)
    capsys.readouterr()
    assert main([*argv, "--dataset_name", str(tmp_path / "cache"), "--source_column", "source"]) == 2
    assert "a cache keeps none" in capsys.readouterr().err
    assert main([*argv, "--dataset_name", str(tmp_path / "cache"), "--resolution", "32"]) == 2
    assert "was encoded with resolution" in capsys.readouterr().err


def test_without_matplotlib_there_are_numbers(material, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report = _report(_argv(material, "epsilon"), tmp_path)
    assert report["levels"] and "pip install trl-sipo[plots]" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights.html", "weights.json"]


def test_a_range_of_levels(material, tmp_path, monkeypatch, capsys):
    """The parts of a range make up the whole of it, not of the schedule."""

    def forward(self, denoiser, noisy_latents, level, conditioning, extra=None):
        return noisy_latents / per_sample(level.sigma_t, noisy_latents) + 1e2

    monkeypatch.setattr(StableDiffusionAdapter, "forward", forward)
    report = _report(
        [*_argv(material, "epsilon", "latents", num_levels=10), "--timestep_range", "0.2", "0.6"], tmp_path
    )
    times = [level["time"] for level in report["levels"]]
    assert times == pytest.approx([0.2 + 0.04 * (i + 0.5) for i in range(10)])
    (region,) = report["masked_regions"]
    assert region["time"] == [0.2, 0.6] and region["words"] == "200 <= timestep <= 600"
    printed = capsys.readouterr().out
    assert "i.e. 100.0% of uniformly drawn times (ends known to 0.04 in time)" in printed
    assert "times from 0.2 to 0.6 of the schedule" in printed


def test_the_vae_stays_in_float32_as_in_training(material):
    adapter = load_adapter(make_parser().parse_args([*_argv(material, "epsilon")[2:], "--dtype", "bfloat16"]))
    dtypes = {name: getattr(adapter.pipeline, name).dtype for name in ("unet", "text_encoder", "vae")}
    assert dtypes == {"unet": torch.bfloat16, "text_encoder": torch.bfloat16, "vae": torch.float32}


@pytest.mark.parametrize(
    ("model", "level", "output"), [("epsilon", "timestep 50", True), ("sd3", "sigma 0.1364", False)]
)
def test_a_model_that_gives_no_numbers_is_an_error(model, level, output, material, tmp_path, capsys):
    pipeline = MODELS[model]()
    with torch.no_grad():
        next(adapter_for(pipeline).denoiser.parameters()).fill_(float("nan"))
    pipeline.save_pretrained(tmp_path / "nan")
    options = ["--output", str(tmp_path / "out")] if output else []
    argv = _argv(material, model, num_levels=10)
    assert main([*argv, "--model_name_or_path", str(tmp_path / "nan"), *options]) == 2
    printed = capsys.readouterr()
    assert "Masked" not in printed.out and f"pair 0 at {level} (10 of 10" in printed.err
    assert "not finite" in printed.err and not list((tmp_path / "out").glob("*"))


MISTAKES = {
    "model": (["--model_name_or_path", "./nothing"], "./nothing"),
    "data": (["--dataset_name", "./nowhere"], "./nowhere"),
    "split": (["--dataset_split", "trian"], "trian"),
    "pairs": (["--num_pairs", "7"], "has 6 pairs"),
    "no_pairs": (["--num_pairs", "0"], "`num_pairs` must be at least 1"),
    "levels": (["--num_levels", "1"], "`num_levels` must be at least 2"),
    "resolution": (["--resolution", "33"], "Nearest valid"),
    "frames": (["--num_frames", "5"], "num_frames 5"),
    "steps": (["--importance_steps", "2000"], "num_steps=2000"),
    "clip_range": (["--clip_range", "1.5"], "clip_range"),
    "threshold": (["--mask_threshold", "1"], "mask_threshold"),
    "range": (["--timestep_range", "0.9", "0.1"], "`timestep_range` must be two increasing fractions"),
    "shift": (["--timestep_shift", "3"], "timestep_shift"),
    "no_lora": (["--lora", "./no_lora"], "There is no LoRA './no_lora'"),
    "no_adapter": (["--adapter", "./no_lora"], "There is no LoRA './no_lora'"),
    "no_column": (["--source_column", "camera"], "it has prompt, chosen, rejected"),
    "samples": (["--on_policy", "9"], "must lie between 0 and `--num_pairs 2`"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_exit_with_2_in_one_line(case, material, capsys):
    options, message = MISTAKES[case]
    code = main([*_argv(material, "epsilon"), *options])
    errors = capsys.readouterr().err
    (line,) = [line for line in errors.splitlines() if line.startswith("trl-sipo audit: ")]
    assert code == 2 and "Traceback" not in errors and message in errors[errors.index(line) :]


def test_latents_of_another_model(material, capsys):
    assert main(_argv(material, "wan", "latents")) == 2
    assert "holds latents of the shape (4, 8, 8)" in capsys.readouterr().err


def test_a_lora_of_another_model(material, tmp_path, capsys):
    adapter = adapter_for(tiny_stable_diffusion_3())
    denoiser = get_peft_model(adapter.denoiser, LoraConfig(r=2, target_modules=["to_q"]))
    adapter.save_lora(denoiser, tmp_path)
    assert main([*_argv(material, "epsilon"), "--lora", str(tmp_path)]) == 2
    assert "is not one of a StableDiffusionPipeline" in capsys.readouterr().err


def test_options_are_strict_and_listed(capsys):
    with pytest.raises(SystemExit) as exit_:
        make_parser().parse_args(["--model", "x"])
    assert exit_.value.code == 2 and "--model_name_or_path" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        main(["audit", "weights", "--help"])
    assert exit_.value.code == 0 and "--importance_steps" in capsys.readouterr().out


def test_audits_are_listed(capsys):
    assert main(["audit"]) == main(["audit", "--help"]) == 0
    printed = capsys.readouterr().out
    assert {"weights", "beta", "data"} <= set(AUDITS) and all(f"  {name} " in printed for name in AUDITS)
    assert main(["audit", "wights"]) == 2
    assert "known are weights" in capsys.readouterr().err


@pytest.mark.slow
def test_data_of_another_layout(material, tmp_path, capsys):
    """HPDv3, whose paths are relative to another folder than its table's."""
    (tmp_path / "media").mkdir()
    records = []
    for number, row in enumerate(preference_pairs(2)):
        paths = {name: f"{number}_{arm}.png" for name, arm in (("path1", "chosen"), ("path2", "rejected"))}
        row["chosen"].save(tmp_path / "media" / paths["path1"])
        row["rejected"].save(tmp_path / "media" / paths["path2"])
        records.append({"prompt": row["prompt"], **paths})
    (tmp_path / "train.json").write_text(json.dumps(records))
    argv = ["audit", "weights", "--model_name_or_path", str(material / "epsilon"), "--dataset_name", str(tmp_path)]
    argv += ["--dataset_media_folder", str(tmp_path / "media"), "--dataset_format", "hpdv3", "--num_pairs", "2"]
    assert main([*argv, "--num_levels", str(LEVELS)]) == 0
    assert "Masked: " in capsys.readouterr().out
