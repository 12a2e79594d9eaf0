# SPDX-License-Identifier: Apache-2.0
"""What SECURITY.md promises: no code of others, no secrets written down, nothing written elsewhere."""

import ast
import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from tests.docs.pages import ROOT, read
from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.cached import Encoded
from tests.trainer.runs import DPO, make_config, make_trainer, preference_pairs
from trl_sipo.adapters import load_pipeline
from trl_sipo.adapters.lora import LORA_FILE_NAME, read_lora_file
from trl_sipo.adapters.weightless import ENCODER_NAMES, weightless_component
from trl_sipo.cli.main import main
from trl_sipo.errors import BackboneError, ConfigurationError
from trl_sipo.printing import printable
from trl_sipo.scripts.train import continuing_command
from trl_sipo.trainer.checkpoint_files import MANIFEST_FILE

SECRET = "hf_thisIsASecretThatNobodyMaySee"


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


@pytest.fixture
def bomb(tmp_path):
    """A pickle that goes off, and whether it has."""
    file = tmp_path / "gone_off"
    with pytest.raises(FileExistsError):  # it does go off
        pickle.loads(pickle.dumps(Bomb(tmp_path)))
    return Bomb(file), file.exists


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved pipeline, of which tests change copies."""
    folder = tmp_path_factory.mktemp("model")
    tiny_stable_diffusion().save_pretrained(folder)
    return folder


# --------------------------------------------------------------------------------------------------- code of others


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"])
def test_weights_that_are_pickles_are_not_read(part, model, bomb, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / f"{part}.safetensors").unlink()
    name = "pytorch_model.bin" if part.startswith("text") else "diffusion_pytorch_model.bin"
    torch.save({"weight": bomb[0]}, (tmp_path / "model" / part).parent / name)
    with pytest.raises(BackboneError, match="(?s)does not load.*safetensors files alone"):
        load_pipeline(str(tmp_path / "model"))
    assert not bomb[1]()


def test_weights_that_are_pickles_are_read_when_asked_for(model, bomb, tmp_path):
    """As `weights_only`, which does not run what a pickle says."""
    unet = shutil.copytree(model, tmp_path / "model") / "unet" / "diffusion_pytorch_model"
    torch.save(load_file(unet.with_suffix(".safetensors")), unet.with_suffix(".bin"))
    unet.with_suffix(".safetensors").unlink()
    pipeline = load_pipeline(str(tmp_path / "model"), use_safetensors=None)
    expected = load_pipeline(str(model)).unet.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in pipeline.unet.state_dict().items())
    torch.save({"weight": bomb[0]}, unet.with_suffix(".bin"))
    with pytest.raises(BackboneError):
        load_pipeline(str(tmp_path / "model"), use_safetensors=None)
    assert not bomb[1]()


def with_code(model, folder):
    """A model that brings its own class, which makes a folder when it is imported."""
    shutil.copytree(model, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["its_own_unet", "UNet2DConditionModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    code = f"import os\nos.mkdir({str(folder.parent / 'run')!r})\nfrom diffusers import UNet2DConditionModel\n"
    for place in (folder, folder / "unet"):
        (place / "its_own_unet.py").write_text(code)
    return folder


def test_code_of_a_model_is_not_run(model, tmp_path):
    folder = with_code(model, tmp_path / "model")
    with pytest.raises(BackboneError, match="trust_remote_code"):
        load_pipeline(str(folder))
    assert not (tmp_path / "run").exists()


def test_trust_remote_code_is_off_and_reaches_the_loader(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        "trl_sipo.trainer.model_preparation.load_pipeline",
        lambda name, **options: given.append(options) or tiny_stable_diffusion(),
    )
    for options in ({}, {"trust_remote_code": True}):
        make_trainer(DPO, tmp_path, model="some/model", **options)
    assert [options.get("trust_remote_code", False) for options in given] == [False, True]


def test_a_model_names_classes_of_known_libraries_alone(model):
    with pytest.raises(BackboneError, match="library 'os'"):
        weightless_component(str(model), "unet", ["os", "system"], {})


def changed(file, **values):
    """A JSON file of a model with other values."""
    return file, lambda content: json.dumps({**json.loads(content), **values}).encode()


BROKEN_MODELS = {
    "code for a pipeline": changed("model_index.json", _class_name=["pipeline", "StableDiffusionPipeline"]),
    "a number for a component": changed("model_index.json", vae=5),
    "a component of no class": changed("model_index.json", vae=["diffusers", "__name__"]),
    "a component of three words": changed("model_index.json", vae=["diffusers", "AutoencoderKL", "x"]),
    "a function of another library": changed("model_index.json", scheduler=["os", "system"]),
    "a function in place of a VAE": changed("model_index.json", vae=["os", "system"]),
    "an index that is 100,000 lists deep": ("model_index.json", lambda content: b"[" * 100_000),
    "a configuration that is 100,000 lists deep": ("vae/config.json", lambda content: b"[" * 100_000),
    "a configuration of other types": changed("vae/config.json", block_out_channels="x"),
    "a text encoder of other types": changed("text_encoder/config.json", hidden_size="x"),
    "attention that is fetched": changed("text_encoder/config.json", _attn_implementation="some/kernel"),
    "a scheduler of other types": changed("scheduler/scheduler_config.json", num_train_timesteps="x"),
    "weights that are cut off": ("text_encoder/model.safetensors", lambda content: content[:-100]),
    "weights with a header of 16 EB": ("unet/diffusion_pytorch_model.safetensors", lambda content: b"\xff" * 100),
}


@pytest.mark.parametrize("damage", BROKEN_MODELS.values(), ids=BROKEN_MODELS)
def test_a_broken_model_is_refused(damage, model, tmp_path):
    file, change = damage
    path = shutil.copytree(model, tmp_path / "model") / file
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(BackboneError, match=re.escape(repr(str(tmp_path / "model")))):
        load_pipeline(str(tmp_path / "model"))
    if file.startswith(("model_index", "vae")):  # what is read where encoders are not needed
        with pytest.raises(BackboneError, match=re.escape(repr(str(tmp_path / "model")))):
            load_pipeline(str(tmp_path / "model"), weightless=ENCODER_NAMES)


@pytest.mark.parametrize("metadata", ["[1]", "5", "[" * 100_000, "1" * 5000])
def test_the_metadata_of_a_lora_is_checked(metadata, tmp_path):
    save_file({"unet.x": torch.zeros(1)}, tmp_path / LORA_FILE_NAME, metadata={"lora_adapter_metadata": metadata})
    with pytest.raises(BackboneError, match="cannot be read as a LoRA file"):
        read_lora_file(tmp_path / LORA_FILE_NAME, "unet", {}, LoraConfig())


STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a token in its settings and in the environment; tests resume copies of it."""
    folder = tmp_path_factory.mktemp("run")
    options = {"save_strategy": "steps", "save_steps": 2, "hub_token": SECRET, "report_to": ["tensorboard"]}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "WANDB_API_KEY"):
            patch.setenv(name, SECRET)
        trainer = make_trainer(DPO, folder, **options)
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
    assert trainer.args.hub_token == SECRET  # pushing needs it
    return folder


@pytest.mark.parametrize("name", STATE)
def test_checkpoints_are_not_unpickled(name, run, bomb, tmp_path):
    checkpoint = shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    torch.save({"state": bomb[0]}, checkpoint / name)
    (checkpoint / MANIFEST_FILE).unlink()  # who puts a bomb there can mend the manifest too
    with pytest.raises(ConfigurationError, match=f"{name} is damaged.*asks for `.*mkdir`.* nothing of it was run"):
        make_trainer(DPO, tmp_path / "again").train(resume_from_checkpoint=str(checkpoint))
    assert not bomb[1]()


def test_arguments_are_never_read_back(run, bomb, tmp_path):
    checkpoint = shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    torch.save(bomb[0], checkpoint / "training_args.bin")
    (checkpoint / MANIFEST_FILE).unlink()
    make_trainer(DPO, tmp_path / "again").train(resume_from_checkpoint=str(checkpoint))
    assert not bomb[1]()


def test_we_unpickle_nothing_ourselves():
    """`torch.load` is safe only where it says so, for PyTorch's default has changed once."""
    sources = {path: read(path) for path in (ROOT / "trl_sipo").rglob("*.py")}
    for path, text in sources.items():
        text = text.replace("from pickle import UnpicklingError\n", "")  # what `torch.load` raises
        assert not re.search(r"^\s*(import|from) (pickle|dill|joblib|cloudpickle|marshal|shelve)\b", text, re.M), path
        assert not re.search(r"\b(eval|exec)\(|yaml\.(unsafe_|full_)?load\(|allow_pickle=True|shell=True", text) or (
            ".eval()" in text and not re.search(r"(?<!\.)\b(eval|exec)\(", text)
        ), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path


# ------------------------------------------------------------------------------------------------------------ tokens


def test_tokens_are_written_nowhere(run):
    files = [path for path in run.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"training_args.bin", "README.md", "trainer_state.json"} <= names and any("tfevents" in n for n in names)
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_arguments_show_no_tokens(tmp_path):
    args = make_config(DPO, tmp_path, hub_token=SECRET)
    for shown in (str(args), repr(args), args.to_json_string(), str(args.to_dict()), str(args.to_sanitized_dict())):
        assert SECRET not in shown
    assert pickle.loads(pickle.dumps(args)).hub_token is None and args.hub_token == SECRET


def test_a_token_for_loading_is_refused_and_not_repeated(tmp_path):
    for options in ({"token": SECRET}, {"use_auth_token": SECRET}):
        with pytest.raises(ConfigurationError, match="HF_TOKEN") as found:
            make_config(DPO, tmp_path, model_init_kwargs=options)
        assert SECRET not in str(found.value)
    assert make_config(DPO, tmp_path, model_init_kwargs={"token": True}).model_init_kwargs == {"token": True}


def test_secrets_are_refused_at_any_depth(tmp_path):
    for options in ({"vae": {"token": SECRET}}, {"variant": SECRET}, {"proxies": {"https": "http://me:secret@host"}}):
        with pytest.raises(ConfigurationError, match="HF_TOKEN") as found:
            make_config(DPO, tmp_path, model_init_kwargs=options)
        assert SECRET not in str(found.value) and "me:secret" not in str(found.value)
    with pytest.raises(ConfigurationError, match="must be a dict"):
        make_config(DPO, tmp_path, model_init_kwargs=[SECRET])
    assert make_config(DPO, tmp_path, model_init_kwargs={"proxies": {"https": "http://host"}}).model_init_kwargs


NAMED = ["--model_name_or_path", "some/model", "--dataset_name", "nowhere.csv"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--hub_tokn", SECRET, *NAMED],
        [f"--hf_token={SECRET}", *NAMED],
        [*NAMED[:-1], f"{SECRET}.csv"],
        [*NAMED[:-1], "https://me:secret@host/pairs.csv"],
        ["--config", "tokens.yaml"],
    ],
    ids=["mistyped", "set", "in a name", "in an address", "in a file"],
)
def test_errors_show_no_tokens(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokens.yaml").write_text(f"hub_tokn: {SECRET}\n")
    assert main(["dpo", *argv]) == 2
    printed = capsys.readouterr().err
    assert "***" in printed and SECRET not in printed and "me:secret" not in printed


@pytest.mark.parametrize("command", ["dpo --max_steps", "encode --height", "data check --num_workers", "demo --steps"])
def test_options_that_take_no_token_do_not_repeat_it(command, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), SECRET, *(["--output", "cache"] if "encode" in command else [])])
    printed = capsys.readouterr().err
    assert command.split()[-1] in printed and SECRET not in printed


def test_variables_with_tokens_are_left_out_of_errors(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "of-no-form-that-is-known")
    assert printable("key of-no-form-that-is-known!") == "key ***!"


def test_the_command_that_continues_shows_no_token():
    """It is printed when a run is stopped, where logs are kept."""
    for option in (["--hub_token", SECRET], [f"--hub_token={SECRET}"], ["--hub-token", "of no known form"]):
        command = continuing_command(["trl-sipo", "dpo", *option, "--seed", "1"])
        assert SECRET not in command and "known" not in command
        assert "***" in command and command.endswith("--seed 1 --resume_from_checkpoint true")


def test_errors_do_not_steer_the_terminal(tmp_path, capsys):
    """Whoever sends a folder names the files in it."""
    (tmp_path / "a\x1b[31m\u202e\rb.csv").write_text("prompt,chosen,rejected\na,b,c,d\n")
    assert main(["data", "check", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert r"a\x1b[31m\u202e\rb.csv" in printed and not set("\x1b\u202e") & set(printed)


CONFIGURATIONS = {
    "no UTF-8": (b"a: \xe9\n", "not valid YAML"),
    "a thousand lists deep": (b"a: " + b"[" * 5000, "not valid YAML"),
    "a number of 5,000 digits": (b"seed: " + b"1" * 5000, "not valid YAML"),
    "references to references": (
        b"a0: &a0 [x]\n"
        + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 9)),
        "more than 100000 values",
    ),
    "a function": (b"a: !!python/object/apply:os.mkdir [gone_off]", "not valid YAML"),
    "a key twice": (b"seed: 1\nbeta: 2\nseed: 3\n", "the key 'seed' stands twice, in lines 1 and 3"),
    "a key twice in a group": (b"model_init_kwargs: {a: 1, 'a': 2}\n", "the key 'a' stands twice, in lines 1 and 1"),
    "a number for a name": (b"model_name_or_path: 5\ndataset_name: '5'", "must be a text"),
    "a list of options": (b"model_init_kwargs: [a]\nmodel_name_or_path: a/b\ndataset_name: c", "must be a dict"),
}


@pytest.mark.parametrize(("content", "message"), CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_hostile_configuration_is_refused(content, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_bytes(content)
    assert main(["dpo", "--config", "run.yaml"]) == 2
    assert message in capsys.readouterr().err and os.listdir(tmp_path) == ["run.yaml"]


def test_commands_show_no_tokens(model, tmp_path, monkeypatch, capfd):
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    preference_pairs(4).to_parquet(tmp_path / "pairs.parquet")
    Encoded(
        model, tmp_path / "pairs.parquet", tmp_path / "cache", {"height": 32, "width": 32, "num_frames": 1}
    ).encode()
    assert main(["env"]) == 0
    assert main(["dpo", "--model_name_or_path", "nowhere/nothing", "--dataset_name", str(tmp_path / "none.csv")]) == 2
    printed = capfd.readouterr()
    assert printed.err and SECRET not in printed.out + printed.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


# ----------------------------------------------------------------------------------------------------------- writing

_WRITTEN: list[str] = []
_IS_WATCHED = False


def _watch(event, arguments):
    """Notes what is opened for writing, or made."""
    if not _IS_WATCHED:
        return
    if event == "open" and isinstance(arguments[0], str | bytes) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        _WRITTEN.append(os.path.abspath(os.fsdecode(arguments[0])))
    # Of what is relative to an open folder, as when a tree is removed, the folder was seen.
    elif event in ("os.mkdir", "os.remove", "os.rmdir") and arguments[-1] == -1:
        _WRITTEN.append(os.path.abspath(os.fsdecode(arguments[0])))
    elif event == "os.rename":
        _WRITTEN.extend(os.path.abspath(os.fsdecode(path)) for path in arguments[:2])


@pytest.fixture
def written(monkeypatch):
    """Paths that are opened for writing while the test runs."""
    sys.addaudithook(_watch)  # for good: it cannot be taken away, and looks at one name from then on
    _WRITTEN.clear()
    monkeypatch.setattr(sys.modules[__name__], "_IS_WATCHED", True)
    return _WRITTEN


def test_files_are_written_where_they_were_asked_for(model, tmp_path, monkeypatch, written):
    pairs, out = tmp_path / "data" / "pairs.parquet", tmp_path / "out"
    pairs.parent.mkdir()
    preference_pairs(4).to_parquet(pairs)
    for name in ("work", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf" / "datasets"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    written.clear()
    assert main(["data", "check", str(pairs), "--output", str(out / "check")]) == 0
    size = {"height": 32, "width": 32, "num_frames": 1}
    Encoded(model, pairs, out / "cache", size).encode()
    training = [
        "dpo",
        "--model_name_or_path",
        str(model),
        "--use_cpu",
        "true",
        "--max_steps",
        "2",
        "--save_steps",
        "1",
    ]
    training += ["--use_peft", "true", "--report_to", "none", "--precompute_ref_log_probs", "true"]
    training += ["--sample_prompts", "a cat", "--sample_every_steps", "1", "--sample_num_inference_steps", "1"]
    assert main([*training, "--dataset_name", str(pairs), "--output_dir", str(out / "run")]) == 0
    allowed = (out, tmp_path / "hf")
    temporary = ("/dev/", "/tmp/tmp", "/proc/")
    strange = [path for path in written if not any(Path(path).is_relative_to(folder) for folder in allowed)]
    assert len(written) > 20
    assert not [path for path in strange if not path.startswith(temporary) and "__pycache__" not in path]
    assert not list((tmp_path / "work").iterdir()) and not list((tmp_path / "home").iterdir())
    assert sorted(path.name for path in pairs.parent.iterdir()) == ["pairs.parquet"]


def test_a_prompt_does_not_end_the_code_of_a_card(tmp_path):
    """Sample prompts may come from anywhere, and a card is read, and copied from, by others."""
    prompt = 'a "cat"\n```\n<script>alert(1)</script>"); import os'
    trainer = make_trainer(DPO, tmp_path, sample_prompts=[prompt], sample_every_steps=1)
    trainer.create_model_card()
    code = (tmp_path / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```\n")[0]
    call = next(node for node in ast.walk(ast.parse(code)) if getattr(getattr(node, "func", None), "id", "") == "pipe")
    assert ast.literal_eval(call.args[0]) == prompt


def test_a_path_that_is_too_long_is_no_path(capsys):
    assert main(["data", "check", "a" * 5000 + ".csv"]) == 2
    assert "there is no file or folder" in capsys.readouterr().err


def test_the_policy_is_found():
    text = " ".join(read(ROOT / "SECURITY.md").split())
    assert "private security advisory" in text and "SECURITY.md" in read(ROOT / "README.md")
    assert "@" not in text  # there is no address to write to
