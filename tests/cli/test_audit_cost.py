# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo audit cost` on tiny models without weights: tables, files, advice, and what it refuses."""

import json
import shutil

import pytest

from tests.tiny.wan import tiny_wan
from tests.tiny_models import tiny_stable_diffusion
from trl_sipo.cli.main import main
from trl_sipo.cost import measuring
from trl_sipo.cost.models import find_model
from trl_sipo.scripts.audit_cost import make_parser
from trl_sipo.scripts.cost_plan import Around, make_plan, parse_command, size_of


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny pipelines, saved; of their weights nothing is left."""
    folder = tmp_path_factory.mktemp("models")
    for name, make in (("sd", tiny_stable_diffusion), ("wan", tiny_wan)):
        make().save_pretrained(folder / name)
        for weights in (folder / name).rglob("*.safetensors"):
            weights.unlink()
    return folder


def _argv(model, *own, method="sipo", training=()):
    lora = ["--use_peft", "true", "--lora_r", "4", "--max_steps", "20", "--per_device_train_batch_size", "1"]
    own = own or ("--gpu", "A100-80GB", "--gpu", "T4")
    return ["audit", "cost", *own, method, "--model_name_or_path", str(model), *lora, *training]


def _report(argv, folder):
    assert main([*argv[:2], "--output", str(folder), *argv[2:]]) == 0
    return json.loads((folder / "cost.json").read_text())


def test_tables_and_files(models, tmp_path, capsys):
    own = ("--gpu", "A100-80GB", "--gpu", "T4", "--num_processes", "2", "--price", "1.5", "--num_pairs", "100")
    report = _report(_argv(models / "sd", *own), tmp_path)
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("Computed: ", "Assumed of GPUs", "Measured: nothing", "No GPU was"))
    assert "20 steps of 2 pairs on 2 GPUs (DDP)" in printed and "T4-16GB has no bfloat16: set fp16." in printed
    here, a100, t4 = report["devices"]
    assert here["step_seconds"] is None and here["fits"]
    assert 0 < a100["step_seconds"]["low"] < a100["step_seconds"]["high"] and a100["fits"] and t4["fits"]
    assert a100["run_seconds"]["low"] == pytest.approx(20 * a100["step_seconds"]["low"])
    assert a100["gpu_hours"]["high"] == pytest.approx(2 * a100["run_seconds"]["high"] / 3600)
    assert (
        "price" in printed and report["price"] == 1.5 and report["command"].startswith("trl-sipo audit cost --output")
    )
    assert report["disk"]["cache of latents"] == 100 * 2 * report["computed"]["latents"] * 2
    assert report["computed"]["trained"] > 0 and report["plan"]["processes"] == 2
    assert (tmp_path / "cost.png").read_bytes()[:4] == b"\x89PNG" and "What it costs on" in (
        tmp_path / "cost.html"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("method", "training", "samples", "has_reference"),
    [
        ("dpo", ("--precompute_ref_log_probs", "true"), 2, False),
        ("kto", ("--per_device_train_batch_size", "3"), 3, True),
        ("sft", (), 1, False),
        ("d3po", ("--guidance_scale", "5"), 4, True),
    ],
)
def test_each_method_has_its_own_passes(method, training, samples, has_reference, models):
    """As the command plans them; what a pass costs is counted elsewhere."""
    argv = _argv(models / "sd", method=method, training=training)
    command = parse_command(method, argv[argv.index(method) + 1 :])
    plan = make_plan(command, find_model(str(models / "sd"), size_of(command)), Around()).step
    assert plan.samples == samples and plan.has_reference == has_reference
    assert plan.encodes == (method != "d3po")


def test_clips_and_settings_of_a_file(models, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "resolution: [32, 32]\nnum_frames: 5\nframe_rate: 8\nfp16: true\nbf16: false\nsave_steps: 5\n"
        "save_total_limit: 2\nsample_prompts: [a, b]\nsample_every_steps: 10\noptim: adamw_bnb_8bit\n"
    )
    report = _report(_argv(models / "wan", "--gpu", "T4", training=("--config", str(config))), tmp_path)
    plan = report["plan"]
    assert plan["step"]["precision"] == "float16" and plan["optimizer"] == "8 bits"
    assert plan["disk"]["checkpoints"] == 3 and plan["disk"]["grids"] == 2 and plan["disk"]["grid_samples"] == 4
    assert plan["grid_samples"] == 3 * 2 * 25 * 2  # base and two grids, two prompts, guidance
    assert report["devices"][1]["run_seconds"]["low"] > 20 * report["devices"][1]["step_seconds"]["low"]


@pytest.mark.slow
def test_a_published_model_that_does_not_fit_is_told_how(tmp_path, capsys):
    """All weights of Stable Diffusion 1.5 on a T4; nothing is downloaded."""
    argv = ["audit", "cost", "--gpu", "T4", "--cached", "--output", str(tmp_path), "dpo", "--fp16", "true"]
    argv += ["--model_name_or_path", "stable-diffusion-v1-5/stable-diffusion-v1-5", "--max_steps", "10"]
    assert main([*argv, "--resolution", "256", "--per_device_train_batch_size", "1"]) == 0
    assert "To fit on T4-16GB: an optimiser of 8 bits (`optim` adamw_bnb_8bit)." in capsys.readouterr().out
    row = json.loads((tmp_path / "cost.json").read_text())["devices"][1]
    assert not row["fits"] and sum(row["memory_with_changes"].values()) <= row["room"] < sum(row["memory"].values())


def test_this_machine_is_measured(models, tmp_path, capsys, monkeypatch):
    """By products and copies that are small, which changes the rates and nothing else."""
    monkeypatch.setitem(measuring._MATRIX_SIDE, "cpu", 256)
    monkeypatch.setitem(measuring._COPIED, "cpu", 2**22)
    report = _report(_argv(models / "sd", "--gpu", "T4", "--measure", training=("--resolution", "32")), tmp_path)
    measured, here = report["measured"], report["devices"][0]
    assert measured["calibration"] > 0 and measured["single"] > 0 and measured["bandwidth"] > 0
    assert here["step_seconds"]["high"] == pytest.approx(here["step_seconds"]["low"] * 1.25**2, rel=0.01)
    assert "GFLOP/s in float32" in capsys.readouterr().out


def test_stored_predictions_take_their_place_on_the_disk(models):
    options = ("--precompute_ref_log_probs", "true", "--precompute_ref_predictions", "true", "--proximal_kappa", "0.5")
    for training, is_stored in ((options, True), (options[:2], False)):
        argv = _argv(models / "sd", method="dpo", training=training)
        command = parse_command("dpo", argv[argv.index("dpo") + 1 :])
        disk = make_plan(command, find_model(str(models / "sd"), size_of(command)), Around()).disk
        assert disk.reference_draws == 8 and disk.stores_predictions is is_stored


MISTAKES = {
    "gpu": (("--gpu", "A100"), (), "Several GPUs are called 'A100': one of A100-40GB, A100-80GB"),
    "processes": (("--num_processes", "0"), (), "`--num_processes` must be at least 1"),
    "huge": (("--num_pairs", "9" * 40), (), "`--num_pairs` must be at least 1 (and at most 10^12)"),
    "price": (("--price", "nan"), (), "`--price` must be a positive number"),
    "setting": ((), ("--clip_rnage", "0.1"), "clip_rnage"),
    "size": ((), ("--resolution", "33"), "Nearest valid"),
    "length": ((), ("--max_steps", "-1"), "--num_pairs"),
    "sharded": (
        ("--num_processes", "2", "--strategy", "FSDP2"),
        ("--precompute_ref_log_probs", "true"),
        "refuses `precompute_ref_log_probs` under FSDP2",
    ),
    "lora": ((), ("--lora_r", "0"), "`lora_r` must be at least 1"),
    "targets": ((), ("--lora_target_modules", "nothing"), "Look at `resolution`"),
    "batch": ((), ("--per_device_train_batch_size", "1000000000000000"), "cannot be made, even without data"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_exit_with_2(case, models, capsys):
    own, training, message = MISTAKES[case]
    try:
        code = main(_argv(models / "sd", *own, training=training))
    except SystemExit as exit_:
        code = exit_.code
    errors = capsys.readouterr().err
    assert code == 2 and message in errors and "Traceback" not in errors


HOSTILE = {
    "layers": ("unet/config.json", {"layers_per_block": 10**9}, "no model has so many layers"),
    "encoder": ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "no model has so many layers"),
    "channels": ("unet/config.json", {"block_out_channels": [10**9, 10**9]}, "configuration of unet"),
    "words": ("model_index.json", {"scheduler": ["diffusers", "DDIMScheduler", "x"]}, "takes library and class"),
    "class": ("model_index.json", {"scheduler": ["diffusers", ["a"]]}, "takes library and class"),
    "library": ("model_index.json", {"scheduler": ["\x1b[2J", "Foo"]}, "which is not known"),
    "memory": ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**15}, "scheduler of"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_configurations_that_make_no_sense_are_refused(case, models, tmp_path, capsys):
    """At once: none is built layer by layer until the memory is full."""
    file, values, message = HOSTILE[case]
    shutil.copytree(models / "sd", tmp_path / "sd")
    content = json.loads((tmp_path / "sd" / file).read_text())
    (tmp_path / "sd" / file).write_text(json.dumps(content | values))
    assert main(_argv(tmp_path / "sd")) == 2
    errors = capsys.readouterr().err
    assert message in errors and "Traceback" not in errors and "\x1b[2J" not in errors


def test_no_such_model(capsys):
    assert main(_argv("./nothing")) == 2
    assert "There is no folder './nothing'" in capsys.readouterr().err


def test_own_options_come_before_the_method():
    options = make_parser().parse_args(["--price", "2", "sipo", "--config", "x.yaml", "--price", "3"])
    assert options.price == 2 and options.training == ["--config", "x.yaml", "--price", "3"]
