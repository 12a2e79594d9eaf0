# SPDX-License-Identifier: Apache-2.0
"""Where weights of rewards come from, and that nothing of others runs."""

import os
import pickle
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.rewards.tiny import PROMPTS, bert_tokenizer, blip_configs, clip, pictures
from trl_sipo.errors import ConfigurationError
from trl_sipo.rewards.aesthetic import AestheticScore
from trl_sipo.rewards.clip_scores import CLIPScore, HPSv21, PickScore
from trl_sipo.rewards.image_reward import ImageReward, ImageRewardModel
from trl_sipo.rewards.open_clip import from_open_clip
from trl_sipo.rewards.registry import REWARDS, load_reward
from trl_sipo.rewards.weights import read_weights, weights_file


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture
def model(tmp_path):
    """A saved CLIP model with its tokenizer."""
    folder = tmp_path / "clip"
    for part in clip(seed=2, max_length=40):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub's cache: empty, and no network. Puts a copy of a folder into it under a repository's name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def put(folder, repository):
        place = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0123abc")
        return shutil.copytree(folder, place / "snapshots" / "0123abc")

    return put


def test_from_a_folder(model):
    parts = clip(seed=2, max_length=40)
    of_folder = load_reward("pickscore", model=str(model), device=torch.device("cpu"))
    assert torch.equal(
        of_folder.score(pictures(), PROMPTS), PickScore(parts[0], tokenizer=parts[1]).score(pictures(), PROMPTS)
    )
    other_tokenizer = CLIPScore(model=str(model), tokenizer=str(model))
    assert other_tokenizer.score(pictures(), PROMPTS).shape == (3,)


def test_models_that_are_pickles_are_not_read(model):
    """Not even those that are harmless."""
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match="CLIPModel in .* does not load: .*weights as safetensors"):
        PickScore(str(model))


@pytest.mark.parametrize("name", ["HPS_v2.1_compressed.pt", "ImageReward.pt", "head.pth"])
def test_pickles_run_nothing(name, model, tmp_path):
    with pytest.raises(FileExistsError):  # it does go off
        pickle.loads(pickle.dumps(Bomb(tmp_path)))
    torch.save({"state_dict": {"logit_scale": Bomb(tmp_path / "gone_off")}}, file := tmp_path / name)
    with pytest.raises(
        ConfigurationError, match=f"{name} is not read: its pickle asks for posix.mkdir.*as safetensors"
    ):
        if name.startswith("HPS"):
            HPSv21(str(file))
        elif name.startswith("Image"):
            ImageReward(str(file))
        else:
            AestheticScore(str(model), head=str(file))
    assert not (tmp_path / "gone_off").exists()


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_broken_files_are_named(content, suffix, tmp_path):
    (tmp_path / f"broken.{suffix}").write_bytes(content)
    with pytest.raises(ConfigurationError, match=rf"broken.{suffix} is not read: .+ Download it again"):
        read_weights(tmp_path / f"broken.{suffix}")


def test_files_with_broken_bytes_are_named(tmp_path):
    """Whatever the unpickler makes of them: most are still read, and the others end with one kind of error."""
    torch.save({"a": torch.ones(3, 2), "b": torch.zeros(2)}, file := tmp_path / "w.pt")
    torch.save({"a": torch.ones(3, 2)}, old := tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    generator, refused = random.Random(0), 0
    for content in (file.read_bytes(), old.read_bytes()):
        for _ in range(200):
            broken = bytearray(content)
            broken[generator.randrange(len(broken))] = generator.randrange(256)
            file.write_bytes(broken)
            try:
                read_weights(file)
            except ConfigurationError:
                refused += 1
    assert 50 < refused < 400


@pytest.mark.parametrize("value", [torch.ones(2, 3), torch.tensor(1.0), torch.ones(0, 3)])
def test_an_attention_that_is_no_three_matrices_is_refused(value):
    with pytest.raises(ConfigurationError, match="is no weight of an open_clip model"):
        from_open_clip({"transformer.resblocks.0.attn.in_proj_weight": value})


@pytest.mark.parametrize(
    "content", [[torch.ones(2)], {}, {"state_dict": 3}, {"w": torch.ones(2), "epoch": 3}, {1: torch.ones(2)}]
)
def test_files_without_weights_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ConfigurationError, match="w.pt holds no weights"):
        read_weights(tmp_path / "w.pt")


def test_where_a_file_is_looked_for(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    for name in (tmp_path, tmp_path / "w.safetensors"):
        assert torch.equal(read_weights(weights_file(str(name), "w.safetensors", revision=None))["w"], torch.ones(2))
    for name in (str(tmp_path / "other.pt"), "./nothing", "weights.pth", "~/nothing", "only_a_name"):
        with pytest.raises(ConfigurationError, match="expected a file of weights, or a folder with w.pt"):
            weights_file(name, "w.pt", revision=None)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", ["aesthetic", "clipscore", "hpsv2", "hpsv2.1", "image_reward", "pickscore"])
def test_without_a_network_it_says_what_to_download(name):
    with pytest.raises(ConfigurationError, match=r"the Hugging Face Hub did not give it.*hf download \w+/[\w.-]+"):
        load_reward(name)


@pytest.mark.usefixtures("hub")
def test_the_tokenizer_is_asked_for_too():
    wanted = {
        HPSv21: (clip()[0], "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        ImageReward: (ImageRewardModel(*blip_configs()), "google-bert/bert-base-uncased"),
    }
    for reward_class, (model, tokenizer) in wanted.items():
        with pytest.raises(ConfigurationError, match=f"hf download {tokenizer}"):
            reward_class(model)


def test_from_the_cache_of_the_hub(model, hub):
    snapshot = hub(model, "yuvalkirstain/PickScore_v1")
    assert load_reward("pickscore").score(pictures(), PROMPTS).shape == (3,)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match="does not load.*hf download yuvalkirstain/PickScore_v1"):
        load_reward("pickscore")


def test_the_one_default_without_safetensors_is_read_by_weights_only(model, hub, tmp_path):
    snapshot = hub(model, "openai/clip-vit-base-patch32")
    weights = load_file(snapshot / "model.safetensors")
    (snapshot / "model.safetensors").unlink()
    torch.save(weights, snapshot / "pytorch_model.bin")
    expected = CLIPScore(model=str(model)).score(pictures(), PROMPTS)
    assert torch.equal(CLIPScore().score(pictures(), PROMPTS), expected) and expected.max() > 0.1
    torch.save({**weights, "logit_scale": Bomb(tmp_path / "gone_off")}, snapshot / "pytorch_model.bin")
    with pytest.raises(ConfigurationError, match="does not load: its pickle asks for posix.mkdir"):
        CLIPScore()
    assert not (tmp_path / "gone_off").exists()


def test_bert_is_where_image_reward_looks(tmp_path):
    bert_tokenizer().save_pretrained(tmp_path / "bert")
    reward = ImageReward(ImageRewardModel(*blip_configs()), tokenizer=str(tmp_path / "bert"))
    assert reward.score(pictures(), PROMPTS).shape == (3,)
    assert set(REWARDS) >= {"aesthetic", "clipscore", "hpsv2", "hpsv2.1", "image_reward", "pickscore"}
