# SPDX-License-Identifier: Apache-2.0
"""The command line: in process for what it says, in a second process for what it does."""

import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import predict, preference_pairs
from trl_sipo import __version__
from trl_sipo.cli.main import COMMANDS, main
from trl_sipo.scripts.train import ModelArguments, continuing_command, lora_config, parse, quantization_config
from trl_sipo.trainer.checkpoint_files import MANIFEST_FILE, checkpoint_to_resume
from trl_sipo.trainer.preemption import PreemptionCallback

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tiny pipeline and preference pairs as Parquet, on disk."""
    folder = tmp_path_factory.mktemp("material")
    tiny_stable_diffusion().save_pretrained(folder / "base")
    (folder / "pairs").mkdir()
    preference_pairs(8).to_parquet(folder / "pairs" / "train.parquet")
    preference_pairs(4, seed=3).to_parquet(folder / "pairs" / "test.parquet")
    return folder


def _settings(material, **options):
    return {
        "model_name_or_path": str(material / "base"),
        "dataset_name": str(material / "pairs"),
        "use_peft": True,
        "lora_r": 4,
        "lora_alpha": 8,
        "learning_rate": "1e-2",  # what YAML makes of 1e-2
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "max_steps": 9,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        **options,
    }


def _config(material, folder, **options):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(folder / "out"), **_settings(material, **options)}))
    return str(path)


def _command(*argv):
    return [sys.executable, "-m", "trl_sipo.cli.main", *argv]


def test_sipo_trains_in_a_process_of_its_own(material, tmp_path):
    config = _config(material, tmp_path, eval_strategy="steps", eval_steps=2, beta=100.0)
    done = subprocess.run(
        _command("sipo", "--config", config, "--max_steps", "2", "--timestep_range", "0.06", "1.0"),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=ENVIRONMENT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for part in ("SIPO on StableDiffusion", "beta = 100 ", "[0.06, 1.0]", "eval_rewards/margins", "Model saved"):
        assert part in done.stdout, part
    assert "torchvision" not in done.stderr
    assert "2/2" in done.stderr  # the progress bar, and the command line over the file

    base, trained = (DiffusionPipeline.from_pretrained(material / "base") for _ in range(2))
    trained.load_lora_weights(tmp_path / "out")
    assert not torch.allclose(predict(base), predict(trained), atol=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "SIPO" in card and str(material) not in card


def test_an_interrupted_run_says_so(material, tmp_path):
    process = subprocess.Popen(
        _command("dpo", "--config", _config(material, tmp_path, max_steps=1_000_000)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=ENVIRONMENT,
        # A shell's background job ignores interrupts, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        for line in process.stdout:
            if "'loss'" in line:  # it trains
                break
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "trl-sipo dpo: interrupted." in errors and "Traceback" not in errors


def test_a_mistake_in_a_process_of_its_own_is_one_line(material, tmp_path):
    config = _config(material, tmp_path, learning_rat=1e-4)
    command = _command("sipo", "--config", config)
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "learning_rat" in done.stderr.strip().splitlines()[-1]


MISTAKES = {
    "unknown_key": ({"learning_rat": 1.0}, [], "learning_rat"),
    "unknown_option": ({}, ["--learning_rat", "1"], "learning_rat"),
    "language_model_key": ({"max_length": 10}, [], "max_length"),
    "beta": ({}, ["--beta", "0"], "beta"),
    "clip_range": ({"clip_range": 1.5}, [], "clip_range"),
    "alpha": ({"poly_alpha": -2.0}, [], "poly_alpha"),
    "no_model": ({"model_name_or_path": None}, [], "model_name_or_path"),
    "no_data": ({"dataset_name": None}, [], "dataset_name"),
    "data_not_there": ({"dataset_name": "./nowhere"}, [], "./nowhere"),
    "split_not_there": ({"dataset_train_split": "trian"}, [], "trian"),
    "no_test_split": ({"eval_strategy": "steps", "dataset_test_split": "held_out"}, [], "held_out"),
    "model_not_there": ({"model_name_or_path": "./nothing"}, [], "./nothing"),
    "lora_without_peft": ({"use_peft": False}, [], "use_peft"),
    "no_checkpoint": ({"resume_from_checkpoint": True}, [], "no checkpoint"),
    "no_last_checkpoint": ({}, ["--resume_from_checkpoint", "latest"], "no checkpoint"),
    "checkpoint_not_there": ({"resume_from_checkpoint": "./checkpoint-5"}, [], "./checkpoint-5"),
    "no_such_target": ({"lora_target_modules": "to_qq"}, [], "['to_qq']"),
    "default_targets": ({"lora_target_modules": "to_qq"}, [], "['to_k', 'to_q', 'to_v', 'to_out.0']"),
    "lora_r": ({}, ["--lora_r", "0"], "`lora_r` must be at least 1, got 0"),
    "lora_alpha": ({"lora_alpha": -1}, [], "`lora_alpha` must be at least 1, got -1"),
    "lora_dropout": ({"lora_dropout": 1.0}, [], "`lora_dropout`"),
    "unknown_tracker": ({"report_to": "wandbb"}, [], "Unknown tracker 'wandbb'"),
    "dtype": ({"dtype": "int8"}, [], "int8"),
    "half_precision_full": ({"use_peft": False, "lora_r": 8, "dtype": "bfloat16"}, [], "float32"),
    "resolution": ({"resolution": 33}, [], "multiple"),
    "stream_without_steps": ({"dataset_streaming": True, "max_steps": -1}, [], "max_steps"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_of_the_user_exit_with_2(case, material, tmp_path, capsys):
    options, argv, message = MISTAKES[case]
    code = main(["sipo", "--config", _config(material, tmp_path, **options), *argv])
    errors = capsys.readouterr().err
    assert code == 2 and "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("trl-sipo sipo: ")]
    assert message in errors[errors.index(line) :]


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard", "trackio", "mlflow"])
def test_a_tracker_whose_package_is_missing(tracker, material, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(f"transformers.integrations.integration_utils.is_{tracker}_available", lambda: False)
    assert main(["dpo", "--config", _config(material, tmp_path), "--report_to", tracker]) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors and f"pip install {tracker}" in errors.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("a: [1", "not valid YAML"), ("- 1\n- 2", "mapping"), ("", "mapping")],
    ids=["missing", "broken", "list", "empty"],
)
def test_configuration_files(content, message, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    assert main(["dpo", "--config", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_a_configuration_file_that_is_not_named(capsys):
    assert main(["dpo", "--config"]) == 2
    assert "--config" in capsys.readouterr().err


def test_values_that_are_no_numbers_exit_with_2(material, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["sipo", "--config", _config(material, tmp_path), "--beta", "high"])
    assert exit_.value.code == 2 and "--beta" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--config", "--config="])
def test_a_file_and_overrides(flag, material, tmp_path):
    """The command line wins over the file, the file over the defaults."""
    prompts = {"sample_prompts": ["a cat", "a dog"], "sample_every_steps": 5}
    path = _config(material, tmp_path, beta=7.0, timestep_range=[0.1, 0.9], **prompts)
    argv = [flag + path] if flag.endswith("=") else [flag, path]
    data, training, model = parse("sipo", [*argv, "--clip_range", "0.2", "--beta", "9", "--no_mask"])
    assert (training.beta, training.clip_range, training.mask) == (9.0, 0.2, False)
    assert training.timestep_range == [0.1, 0.9] and training.sample_prompts == ["a cat", "a dog"]
    assert training.learning_rate == 0.01 and training.objective == "sipo"
    assert data.dataset_name == str(material / "pairs") and data.dataset_train_split == "train"
    assert model.lora_r == 4


@pytest.mark.parametrize(
    ("command", "config_class"),
    [("dpo", "DiffusionDPOConfig"), ("sipo", "DiffusionSIPOConfig"), ("poly-dpo", "DiffusionPolyDPOConfig")],
)
def test_commands_and_their_configurations(command, config_class, material, tmp_path):
    _, training, _ = parse(command, ["--config", _config(material, tmp_path)])
    assert type(training).__name__ == config_class


def test_the_loras_settings_arrive(material, tmp_path):
    arguments = ["--lora_target_modules", "to_q", "to_k", "--use_rslora", "--lora_dropout", "0.1"]
    _, _, model = parse("dpo", ["--config", _config(material, tmp_path), *arguments])
    config = lora_config(model)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (4, 8, 0.1, True)
    assert config.target_modules == {"to_q", "to_k"}
    assert lora_config(type(model)()) is None


@pytest.mark.parametrize(
    ("written", "targets"),
    [
        ("to_q", {"to_q"}),
        ("attn2.to_q", {"attn2.to_q"}),
        (["to_q", "to_k"], {"to_q", "to_k"}),
        ("all-linear", "all-linear"),
        (r".*attn\d\.to_q", r".*attn\d\.to_q"),
        ([".*to_q"], ".*to_q"),
    ],
)
def test_targets_in_a_file_may_be_a_name_or_several_or_an_expression(written, targets, material, tmp_path):
    _, _, model = parse("dpo", ["--config", _config(material, tmp_path, lora_target_modules=written)])
    assert lora_config(model).target_modules == targets


@pytest.mark.parametrize(("half", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), (None, "float32")])
def test_four_bits_are_computed_in_the_precision_of_training(half, dtype, material):
    pytest.importorskip("bitsandbytes")
    training = SimpleNamespace(bf16=half == "bf16", fp16=half == "fp16")
    model = ModelArguments(model_name_or_path=str(material / "base"), use_peft=True, load_in_4bit=True)
    options = quantization_config(training, model).quant_kwargs
    assert str(options["bnb_4bit_compute_dtype"]) == f"torch.{dtype}"


def test_continuing_from_the_last_checkpoint(material, tmp_path):
    argv = ["--config", _config(material, tmp_path, save_strategy="steps", save_steps=1)]
    assert main(["dpo", *argv, "--max_steps", "2"]) == 0
    _, training, _ = parse("dpo", [*argv, "--resume_from_checkpoint", "true"])
    assert checkpoint_to_resume(training.output_dir, "true") == str(tmp_path / "out" / "checkpoint-2")
    assert main(["dpo", *argv, "--max_steps", "3", "--resume_from_checkpoint", "latest"]) == 0
    assert (tmp_path / "out" / "checkpoint-3").is_dir()


@pytest.mark.parametrize("state", [None, '{"global_step": 10, "log_hi'], ids=["missing", "cut_off"])
def test_a_checkpoint_that_was_not_finished_is_passed_over(state, material, tmp_path, capsys, caplog):
    """Of an earlier version, killed while saving: transformers writes trainer_state.json last."""
    argv = ["--config", _config(material, tmp_path, save_strategy="steps", save_steps=1)]
    assert main(["dpo", *argv, "--max_steps", "1"]) == 0
    unfinished = tmp_path / "out" / "checkpoint-10"  # by number the last, by name not
    shutil.copytree(tmp_path / "out" / "checkpoint-1", unfinished)
    for name in ("trainer_state.json", MANIFEST_FILE):
        (unfinished / name).unlink()
    if state is not None:
        (unfinished / "trainer_state.json").write_text(state)
    assert main(["dpo", *argv, "--max_steps", "2", "--resume_from_checkpoint", "true"]) == 0
    assert f"Passed over the checkpoint {unfinished}" in caplog.text
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
    assert main(["dpo", *argv, "--max_steps", "2", "--resume_from_checkpoint", str(unfinished)]) == 2
    assert "trainer_state.json" in capsys.readouterr().err


def test_sigterm_ends_with_a_status_of_its_own_and_the_command_that_continues(material, tmp_path, monkeypatch, capsys):
    def send(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    argv = ["--config", _config(material, tmp_path, save_strategy="steps", save_steps=100, max_steps=3)]
    with monkeypatch.context() as patch:
        patch.setattr(PreemptionCallback, "on_step_begin", send)
        with pytest.raises(SystemExit) as stop:
            main(["dpo", *argv, "--resume_from_checkpoint", "auto"])
    assert stop.value.code == 75
    said = capsys.readouterr().err
    assert f"after step 2 and saved {tmp_path / 'out' / 'checkpoint-2'}" in said
    command = shlex.split(said.strip().splitlines()[-1])
    assert command == ["trl-sipo", "dpo", *argv, "--resume_from_checkpoint", "true"]
    assert main(command[1:]) == 0 and (tmp_path / "out" / "checkpoint-3").is_dir()


@pytest.mark.parametrize(
    ("words", "launcher", "expected"),
    [
        ("trl-sipo sipo --beta 1", "", "trl-sipo sipo --beta 1 --resume_from_checkpoint true"),
        ("a --resume_from_checkpoint x --beta 1", "", "a --beta 1 --resume_from_checkpoint true"),
        ("a.py --resume_from_checkpoint=x", "python ", "python a.py --resume_from_checkpoint true"),
    ],
)
def test_the_command_that_continues(words, launcher, expected):
    assert continuing_command(words.split(), launcher) == expected


def test_all_weights_and_a_stream(material, tmp_path, capsys):
    config = _config(
        material, tmp_path, use_peft=False, lora_r=8, dataset_streaming=True, max_steps=2, report_to="tensorboard",
        dtype="float32", learning_rate=1e-4,
    )  # fmt: skip
    assert main(["poly-dpo", "--config", config]) == 0
    assert "Poly-DPO" in capsys.readouterr().out
    assert DiffusionPipeline.from_pretrained(tmp_path / "out").unet.config.cross_attention_dim == 16


def test_the_script_for_accelerate(material, tmp_path, monkeypatch, capsys):
    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        monkeypatch.delitem(sys.modules, "trl_sipo.scripts.train", raising=False)
        runpy.run_module("trl_sipo.scripts.train", run_name="__main__")

    run("dpo", "--config", _config(material, tmp_path, max_steps=1))
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
    with pytest.raises(SystemExit) as exit_:
        run("dpo", "--config", _config(material, tmp_path, beta=0.0))
    assert exit_.value.code == 2 and "beta" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="usage"):
        run("ppo")


def test_help_and_version(capsys):
    assert main(["--help"]) == main([]) == main(["-h"]) == 0
    listed = capsys.readouterr().out
    assert all(command in listed for command in COMMANDS)
    assert main(["--version"]) == 0 and capsys.readouterr().out.strip() == __version__


def test_an_unknown_command(capsys):
    assert main(["ppo"]) == 2
    assert "ppo" in capsys.readouterr().err


def test_options_are_listed(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["sipo", "--help"])
    listed = capsys.readouterr().out
    assert exit_.value.code == 0
    for option in ("--clip_range", "--dataset_name", "--lora_r", "--beta", "--mask_threshold"):
        assert option in listed


def test_help_is_fast():
    """Seconds of processor time; the whole of torch takes several."""
    before = os.times()
    subprocess.run(_command("--help"), check=True, capture_output=True, env=ENVIRONMENT)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 1.0


def test_the_environment_is_listed(capsys):
    assert main(["env"]) == 0
    listed = capsys.readouterr().out
    assert "torch" in listed and "trl-sipo" in listed and "accelerator" in listed
