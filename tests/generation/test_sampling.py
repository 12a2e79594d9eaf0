# SPDX-License-Identifier: Apache-2.0
"""Folders of samples: the same noise for every model, and the same bytes however the drawing went."""

import dataclasses
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig

from tests.adapters.backbone_cases import spied_forward
from tests.generation.folders import SETTINGS, contents, draw, prompt_set
from tests.tiny.stable_diffusion_3 import tiny_stable_diffusion_3
from tests.tiny.wan import tiny_wan
from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.processes import fork_server, run_ranks
from trl_sipo.adapters import adapter_for
from trl_sipo.errors import ConfigurationError, DatasetError, NumericalError, StorageError
from trl_sipo.generation.identity import read_prompts, write_folder
from trl_sipo.generation.media_files import open_sample
from trl_sipo.generation.prompt_sets import PromptRecord
from trl_sipo.generation.sampling import SamplingSettings, draw_samples, read_samples, sample_seed

UNGUIDED = dataclasses.replace(SETTINGS, guidance_scale=1.0)  # the denoiser then sees each sample once
NUM_SAMPLES = 4 * 3


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    draw(str(folder))
    return folder


# ------------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("build", [tiny_stable_diffusion, tiny_stable_diffusion_3], ids=["noise", "flow"])
def test_every_model_starts_from_the_same_noise_whatever_the_batch(build, tmp_path):
    def first_latents(folder: str, seed: int, batch_size: int, prompts: list[PromptRecord]) -> torch.Tensor:
        pipeline = build(seed=seed)
        denoiser = adapter_for(pipeline).denoiser
        with spied_forward(denoiser) as calls:
            settings = dataclasses.replace(UNGUIDED, height=32, width=32)
            draw_samples(pipeline, prompts, tmp_path / folder, settings, batch_size=batch_size)
        argument = "sample" if "sample" in calls[0] else "hidden_states"
        return torch.cat([call[argument] for call in calls[::2]])  # two steps

    prompts = prompt_set()
    one_by_one = first_latents("a", 0, 1, prompts)
    assert one_by_one.shape[0] == NUM_SAMPLES == len({tuple(noise.flatten().tolist()) for noise in one_by_one})
    assert torch.equal(first_latents("b", 1, 5, prompts), one_by_one)
    # Nor does it depend on the other prompts, or their order.
    assert torch.equal(first_latents("c", 1, 2, prompts[::-1][:2]), torch.cat([one_by_one[9:], one_by_one[6:9]]))


def test_the_noise_depends_on_seed_prompt_and_index():
    seeds = [sample_seed(*key) for key in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (0, "aa", 0))]
    assert len(set(seeds)) == len(seeds) and sample_seed(0, "a", 0) == seeds[0]


# --------------------------------------------------------------------------------------------------- stopped runs


def test_a_killed_run_goes_on_to_the_same_bytes(undisturbed, tmp_path):
    folder = tmp_path / "killed"
    process = fork_server().Process(target=draw, args=(str(folder),))
    process.start()
    end = time.monotonic() + 120
    while len(list(folder.glob("*/[!.]*.png"))) < 3 and time.monotonic() < end:
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    written = {path: path.stat().st_ino for path in folder.glob("*/[!.]*.png")}
    assert 3 <= len(written) < NUM_SAMPLES
    draw(str(folder))
    assert contents(folder) == contents(undisturbed)
    assert all(path.stat().st_ino == inode for path, inode in written.items()), "what was there is kept"


def test_any_missing_samples_are_drawn_again_to_the_same_bytes(undisturbed, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(undisturbed, folder)
    for name in ("p-0/001.png", "p-3/002.png"):  # of batches of two, one and the other half
        (folder / name).unlink()
    (folder / "p-0" / ".001.png.77.tmp").write_bytes(b"torn")
    counts = draw_samples(tiny_stable_diffusion(), prompt_set(), folder, SETTINGS, batch_size=2)
    assert counts == (2, NUM_SAMPLES - 2, 0)
    assert contents(folder) == contents(undisturbed)


def test_ctrl_c_leaves_whole_files_alone(undisturbed, tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where this was started in background
    pipeline, calls = tiny_stable_diffusion(), []

    def interrupt(*_):
        calls.append(0)
        if len(calls) == 5:  # two steps, and batches of two: in the third batch
            signal.raise_signal(signal.SIGINT)

    handle = pipeline.unet.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw_samples(pipeline, prompt_set(), tmp_path, SETTINGS, batch_size=2)
    signal.signal(signal.SIGINT, before)
    whole = contents(undisturbed)
    left = contents(tmp_path)
    assert left.items() <= whole.items() and len(left) == 2 + 4
    handle.remove()
    assert draw_samples(pipeline, prompt_set(), tmp_path, SETTINGS, batch_size=2) == (NUM_SAMPLES - 4, 4, 0)
    assert contents(tmp_path) == whole


def test_two_processes_draw_what_one_draws(undisturbed, tmp_path):
    run_ranks(draw, str(tmp_path / "two"), directory=tmp_path)
    assert contents(tmp_path / "two") == contents(undisturbed)


def test_a_full_disk_is_one_clear_error(undisturbed, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, before[1]))  # room for the settings, not for a picture
    try:
        with pytest.raises(StorageError, match=r"000\.png' cannot be written"):
            draw(str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob("*/*"))
    draw(str(tmp_path))
    assert contents(tmp_path) == contents(undisturbed)


# ------------------------------------------------------------------------------------------------ other samples


def _trained() -> object:
    pipeline = tiny_stable_diffusion()
    with torch.no_grad():
        pipeline.unet.conv_out.weight += 1e-4
    return pipeline


def _with_lora(scale: float = 1.0) -> object:
    pipeline = tiny_stable_diffusion()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipeline.unet.set_adapters("default", scale)
    return pipeline


OTHERS = {
    "seed": (lambda: draw_more(seed=6), r"settings\.seed: 5 there, 6 now"),
    "steps": (lambda: draw_more(num_inference_steps=3), r"num_inference_steps: 2 there, 3 now"),
    "guidance": (lambda: draw_more(guidance_scale=2.0), r"guidance_scale: 7\.5 there, 2\.0 now"),
    "number": (lambda: draw_more(samples_per_prompt=4), "samples_per_prompt: 3 there, 4 now"),
    "size": (lambda: draw_more(height=64), "height: 32 there, 64 now"),
    "weights": (lambda: (_trained(), prompt_set(), SETTINGS), r"model\.weights\.unet"),
    "lora": (lambda: (_with_lora(), prompt_set(), SETTINGS), r"model\.weights\.unet"),
    "sampler": (
        lambda: (tiny_stable_diffusion(scheduler="PNDM"), prompt_set(), SETTINGS),
        r"model\.scheduler\.class: 'DDIMScheduler' there, 'PNDMScheduler' now",
    ),
    "prompts": (lambda: (tiny_stable_diffusion(), prompt_set(3), SETTINGS), r"prompts\.number: 4 there, 3 now"),
    "text": (
        lambda: (tiny_stable_diffusion(), [*prompt_set(3), PromptRecord("p-3", "a dog")], SETTINGS),
        r"prompts\.fingerprint",
    ),
}


def draw_more(**changes):
    return tiny_stable_diffusion(), prompt_set(), dataclasses.replace(SETTINGS, **changes)


@pytest.mark.parametrize("case", OTHERS)
def test_a_folder_of_other_samples_is_refused_with_what_differs(case, undisturbed):
    arguments, message = OTHERS[case]
    model, prompts, settings = arguments()
    before = contents(undisturbed)
    with pytest.raises(ConfigurationError, match=message):
        draw_samples(model, prompts, undisturbed, settings)
    assert contents(undisturbed) == before


def test_how_a_lora_acts_counts(tmp_path):
    draw_samples(_with_lora(), prompt_set(1), tmp_path, SETTINGS)
    switched_off = _with_lora()
    switched_off.unet.disable_adapters()
    for other in (_with_lora(scale=0.5), switched_off):
        with pytest.raises(ConfigurationError, match=r"model\.weights\.unet"):
            draw_samples(other, prompt_set(1), tmp_path, SETTINGS)
    assert draw_samples(_with_lora(), prompt_set(1), tmp_path, SETTINGS, name="another").kept == 3


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="holds 'thesis.txt', and does not say that it holds samples"):
        draw(str(tmp_path))


def test_samples_that_nothing_is_said_of_are_not_believed(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "copy")
    (tmp_path / "copy" / "settings.json").unlink()
    with pytest.raises(ConfigurationError, match="does not say that it holds samples"):
        draw(str(tmp_path / "copy"))
    for number in range(4):
        shutil.rmtree(tmp_path / "copy" / f"p-{number}")
    draw(str(tmp_path / "copy"))  # as one that was killed after its first file
    assert contents(tmp_path / "copy") == contents(undisturbed)


# ----------------------------------------------------------------------------------------------------- bad samples


def _broken() -> object:
    """NaN for one of the prompts only: that of the second number."""
    pipeline = tiny_stable_diffusion()
    decode = pipeline.vae.decoder.forward

    def forward(latents, *arguments, **options):
        pixels = decode(latents, *arguments, **options)
        pixels[-1, :, :4] = float("nan")
        return pixels

    pipeline.vae.decoder.forward = forward
    return pipeline


def test_nan_is_an_error_and_what_was_drawn_before_is_kept(tmp_path):
    with pytest.raises(NumericalError, match=r"Sample 2 of the prompt 'p-0' has NaN or infinity"):
        draw_samples(_broken(), prompt_set(1), tmp_path, SETTINGS, batch_size=3)
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["000.png", "001.png"]


def test_nan_is_counted_where_it_is_asked_for(tmp_path, capsys):
    counts = draw_samples(_broken(), prompt_set(1), tmp_path, SETTINGS, batch_size=2, keep_nonfinite=True)
    assert counts == (3, 0, 2)  # the last of each batch
    black = [np.asarray(sample.open())[:4].max() == 0 for sample in read_samples(tmp_path)]
    assert black == [False, True, True]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["../up"], "cannot be that of a folder"),
        ([".hidden"], "cannot be that of a folder"),
        (["a" * 300], "cannot be that of a folder"),
        ([""], "cannot be that of a folder"),
        (["cat", "Cat"], "are the same folder's"),
        ([], "no prompts"),
    ],
)
def test_prompts_need_names_of_folders(ids, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        draw_samples(tiny_stable_diffusion(), [PromptRecord(name, "a cat") for name in ids], tmp_path, SETTINGS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_inference_steps": 0},
        {"samples_per_prompt": 0},
        {"height": 32.5},
        {"frame_rate": 0.0},
        {"guidance_scale": float("nan")},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        SamplingSettings(**wrong)


# ------------------------------------------------------------------------------------------------ what is drawn


def test_samples_are_those_of_the_pipeline(tmp_path):
    pipeline = tiny_stable_diffusion()
    draw_samples(pipeline, prompt_set(1), tmp_path, SETTINGS)
    for sample in read_samples(tmp_path):
        generator = torch.Generator().manual_seed(sample_seed(5, "p-0", sample.index))
        expected = pipeline("a cat ", num_inference_steps=2, generator=generator, output_type="np").images[0]
        assert sample.path == tmp_path / "p-0" / f"{sample.index:03d}.png"
        assert np.abs(np.asarray(sample.open()) - 255 * expected).max() <= 0.5 + 1e-3


def test_records_and_indices_come_back(undisturbed):
    samples = list(read_samples(undisturbed))
    assert [(sample.record, sample.index) for sample in samples] == [
        (record, index) for record in prompt_set() for index in range(3)
    ]


def test_prompts_with_separators_of_lines_come_back(tmp_path):
    prompts = [PromptRecord("p-0", "one\u2028two\u2029three\x85four\nfive\x1csix", category="a\u2028b")]
    write_folder(tmp_path, {}, prompts)
    assert read_prompts(tmp_path) == prompts


@pytest.mark.parametrize("link", ["p-1", "p-1/001.png"])
def test_links_lead_out_of_no_folder(link, undisturbed, tmp_path):
    """Neither are pictures from elsewhere read as samples, nor samples written there."""
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(undisturbed, folder := tmp_path / "copy")
    shutil.move(folder / link, target := tmp_path / "elsewhere" / Path(link).name)
    (folder / link).symlink_to(target)
    with pytest.raises(DatasetError, match="leads out of the folder"):
        read_samples(folder)
    if link == "p-1":
        (target / "001.png").unlink()
        with pytest.raises(ConfigurationError, match="leads out of the folder"):
            draw(str(folder))
        assert not (target / "001.png").exists()
    (folder / link).unlink()
    shutil.move(target, folder / link)
    (tmp_path / "link").symlink_to(folder)
    if link != "p-1":
        assert len(list(read_samples(tmp_path / "link"))) == 12, "the folder itself may be a link"


def test_a_folder_without_prompts_is_not_read(undisturbed, tmp_path):
    shutil.copy(undisturbed / "settings.json", tmp_path)
    (tmp_path / "prompts.jsonl").touch()
    with pytest.raises(DatasetError, match="cannot be read: .* holds no prompts"):
        read_samples(tmp_path)


def test_a_folder_that_is_not_finished_is_not_read(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "copy")
    (tmp_path / "copy/p-1/001.png").unlink()
    with pytest.raises(DatasetError, match=r"1 of 12 samples are missing .* 001\.png of p-1"):
        read_samples(tmp_path / "copy")
    with pytest.raises(DatasetError, match="is no folder of samples"):
        read_samples(tmp_path / "none")


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("prompts.jsonl", '"p-1"', '"../../etc"'),
        ("prompts.jsonl", '"p-1"', "7"),
        ("prompts.jsonl", '"a cat "', "7"),
        ("prompts.jsonl", '"p-1"', '"p-0"'),
        ("prompts.jsonl", '"prompt"', '"promt"'),
        ("prompts.jsonl", "{", "["),
        ("settings.json", '"samples_per_prompt": 3', '"samples_per_prompt": -3'),
        ("settings.json", '"seed"', '"sed"'),
        ("settings.json", '"format": 1', '"format": 2'),
        ("settings.json", "{", ""),
    ],
)
def test_a_folder_that_was_tampered_with_is_not_read(file, old, new, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "copy")
    path = tmp_path / "copy" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(DatasetError, match="copy"):
        read_samples(tmp_path / "copy")


def test_videos_are_drawn_and_read_and_resumed_to_the_same_bytes(tmp_path):
    settings = SamplingSettings(
        num_inference_steps=2, height=16, width=32, num_frames=5, samples_per_prompt=2, frame_rate=8
    )
    pipeline, prompts = tiny_wan(), prompt_set(2)
    assert draw_samples(pipeline, prompts, tmp_path / "a", settings, batch_size=2).drawn == 4
    assert draw_samples(pipeline, prompts, tmp_path / "b", settings, batch_size=2).drawn == 4
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    sample = next(read_samples(tmp_path / "a"))
    video = sample.open()
    assert sample.path.name == "000.mp4" and video.dtype == np.uint8 and video.shape == (5, 16, 32, 3)
    generator = torch.Generator().manual_seed(sample_seed(0, "p-0", 0))
    drawn = adapter_for(pipeline).sample(
        prompts[0].prompt, 16, 32, num_frames=5, num_inference_steps=2, generator=generator
    )
    expected = ((drawn + 1) * 127.5).permute(1, 2, 3, 0).numpy()
    assert np.abs(video - expected).mean() < 3  # noise of a model with random weights, next to lossless
    with pytest.raises(DatasetError, match="is broken|does not open"):
        sample.path.write_bytes(sample.path.read_bytes()[:200])
        open_sample(sample.path)


def test_a_video_model_draws_images(tmp_path):
    settings = SamplingSettings(num_inference_steps=2, height=16, width=16, num_frames=1)
    draw_samples(tiny_wan(), prompt_set(1), tmp_path, settings)
    assert next(read_samples(tmp_path)).open().size == (16, 16)


def test_what_is_not_given_is_the_pipelines_own():
    resolved = SamplingSettings(seed=3).resolved(adapter_for(tiny_wan()))
    assert dataclasses.asdict(resolved) == {
        "num_inference_steps": 50,
        "guidance_scale": 5.0,
        "height": 480,
        "width": 832,
        "num_frames": 81,
        "frame_rate": 16.0,
        "samples_per_prompt": 1,
        "seed": 3,
    }
    with pytest.raises(ConfigurationError, match="num_frames 2, but StableDiffusionPipeline draws images"):
        SamplingSettings(num_frames=2).resolved(adapter_for(tiny_stable_diffusion()))


def test_a_model_in_training_is_left_as_it_was(tmp_path):
    pipeline = tiny_stable_diffusion()
    pipeline.unet.train()
    pipeline.unet.conv_in.eval()
    modes = [module.training for module in pipeline.unet.modules()]
    pipeline.set_progress_bar_config(desc="mine")
    draw_samples(pipeline, prompt_set(1), tmp_path, SETTINGS)
    assert [module.training for module in pipeline.unet.modules()] == modes
    assert pipeline._progress_bar_config == {"disable": False, "desc": "mine"}
