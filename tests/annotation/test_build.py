# SPDX-License-Identifier: Apache-2.0
"""Building: the pairs that were asked for, files that tell nothing, and errors before anything is written."""

import errno
import io
import shutil
import stat
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.annotation.studies import MODELS, SIZE, model_folders, picture
from tests.data.clips import write_frames
from tests.generation.folders import prompt_set
from tests.tiny_models import tiny_stable_diffusion
from trl_sipo.annotation import tasks
from trl_sipo.annotation.media import (
    Medium,
    common_length,
    degraded,
    encode,
    filled_up,
    read_medium,
    without_filling,
)
from trl_sipo.annotation.records import GOLD, SAMPLE, Study
from trl_sipo.annotation.sources import model_folders as named_folders
from trl_sipo.annotation.store import Store
from trl_sipo.annotation.tasks import BuildSettings, build_study, plan_study
from trl_sipo.errors import DatasetError, StorageError, StudyError
from trl_sipo.generation.sampling import SamplingSettings, draw_samples

ODD = ("libx264", "yuv444p", {"crf": "4"})  # a codec for frames of any size


def settings(**options):
    study = {name: options.pop(name) for name in ("tasks_per_rater", "seed") if name in options}
    return BuildSettings(Study("Which is better?", **study), **{"groups": 2, "raters_per_group": 2, **options})


def built(root, folders, *, prompts=True, **options):
    plan = plan_study(folders, settings(**options), root / "prompts.csv" if prompts else None)
    invitations = build_study(plan, root / "study", show_progress=False)
    return Store.open(root / "study"), invitations


def files_of(store):
    return {path.name: path for path in store.media_folder.iterdir()}


def test_every_pair_of_models_is_compared_and_the_pictures_are_the_samples(tmp_path):
    folders = model_folders(tmp_path, models=(*MODELS, "third"))
    store, invitations = built(tmp_path, folders, num_gold=2, num_mirrored=1)
    pairs = [pair for pair in store.pairs() if not pair.is_gold]
    couples = [("base", "tuned"), ("base", "third"), ("tuned", "third")]
    assert sorted((pair.prompt_id, *pair.models) for pair in pairs) == sorted(
        (str(number), *couple) for number in range(4) for couple in couples
    )
    for pair in pairs:
        assert pair.prompt == f"prompt {pair.prompt_id}" and pair.category in ("food", "animals")
        for model, name in zip(pair.models, (pair.first_media, pair.second_media), strict=True):
            source = Image.open(folders[model] / f"{pair.prompt_id}.png")
            assert Image.open(store.media_folder / name).tobytes() == source.tobytes()
    assert [(invitation.name, invitation.group) for invitation in invitations] == [
        ("rater-01", 1), ("rater-02", 2), ("rater-03", 1), ("rater-04", 2)
    ]  # fmt: skip
    for invitation in invitations:
        rater = store.rater_of(invitation.token)
        assert rater.name == invitation.name and len(store.assignments(rater.rater_id)) == 12 + 2 + 1
    assert store.study().categories == ("food", "animals")


def test_against_one_model_and_a_part_of_the_prompts(tmp_path):
    folders = model_folders(tmp_path, 6, models=(*MODELS, "third"))
    store, _ = built(tmp_path, folders, against="third", max_prompts=3, gold=None, num_mirrored=0)
    pairs = store.pairs()
    assert {pair.models for pair in pairs} == {("third", "base"), ("third", "tuned")} and len(pairs) == 6
    assert len({pair.prompt_id for pair in pairs}) == 3


def test_a_model_whose_samples_come_again_and_again_is_told_of(tmp_path):
    """With each two of three models every sample comes twice; with one against two, only its own do."""
    folders, prompts = model_folders(tmp_path, 4, models=(*MODELS, "third")), tmp_path / "prompts.csv"
    (note,) = plan_study(folders, settings(against="third"), prompts).notes
    assert "samples of third come again" in note
    assert not plan_study(folders, settings(), prompts).notes
    assert not plan_study({name: folders[name] for name in MODELS}, settings(against="base"), prompts).notes


def test_nothing_of_a_file_tells_its_model(tmp_path):
    """Beside the picture: name, length, dates, and what a PNG may hold. The sources differ in all of these."""
    folders = model_folders(tmp_path, 5)
    for path in folders["tuned"].iterdir():
        exif = Image.Exif()
        exif[0x0131] = "tuned model"
        Image.open(path).save(path, exif=exif)
    lengths = {model: sum(path.stat().st_size for path in folder.iterdir()) for model, folder in folders.items()}
    assert lengths["tuned"] > 10 * lengths["base"]
    store, _ = built(tmp_path, folders, num_gold=2)
    files = files_of(store)
    assert len(files) == 5 * 2 + 2 * 2 and set(files) == {
        name for pair in store.pairs() for name in (pair.first_media, pair.second_media)
    }
    for pair in store.pairs():
        stats = [files[name].stat() for name in (pair.first_media, pair.second_media)]
        assert stats[0].st_size == stats[1].st_size and stats[0].st_mtime == stats[1].st_mtime == 0
    for name, path in files.items():
        stem = path.stem
        assert len(stem) == 32 and set(stem) <= set("0123456789abcdef") and path.suffix == ".png"
        image = Image.open(io.BytesIO(path.read_bytes()))
        image.load()
        assert image.mode == "RGB" and image.info == {} and not image.getexif(), name
        assert all(word not in path.read_bytes() for word in (b"tuned", b"base", b"Exif"))
    assert stat.S_IMODE(store.path.parent.stat().st_mode) == 0o700


def test_a_filled_up_file_is_the_same_picture_and_can_be_emptied_again(tmp_path):
    contents = [encode(read_medium(path, is_video=False), tmp_path / "scratch") for path in _two_pictures(tmp_path)]
    length = common_length(contents)
    for content in contents:
        filled = filled_up(content, length)
        assert len(filled) == length and without_filling(filled) == content == without_filling(content)
        image = Image.open(io.BytesIO(filled))
        image.verify()
        assert Image.open(io.BytesIO(filled)).tobytes() == Image.open(io.BytesIO(content)).tobytes()
    assert length % 4096 == 0 and length - max(map(len, contents)) < 2 * 4096


def _two_pictures(folder):
    paths = [folder / "rough.png", folder / "smooth.png"]
    for path in paths:
        picture(1, smooth="smooth" in path.name).save(path)
    return paths


def test_gold_is_a_sample_beside_itself_made_worse(tmp_path):
    folders = model_folders(tmp_path)
    store, _ = built(tmp_path, folders, num_gold=3, num_mirrored=0)
    gold = [pair for pair in store.pairs() if pair.is_gold]
    assert len(gold) == 3
    for pair in gold:
        source = np.asarray(Image.open(folders[pair.first_model] / f"{pair.prompt_id}.png"), dtype=float)
        better, worse = (
            np.asarray(Image.open(store.media_folder / name), dtype=float)
            for name in (pair.first_media, pair.second_media)
        )
        assert np.array_equal(better, source) and abs(worse - source).mean() > 20
    for rater in store.raters():
        assert sum(task.kind == GOLD for task in store.tasks(rater.rater_id)) == 3


def test_degrading_blurs_and_adds_noise():
    edge = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    edge[:, :, 32:] = 255
    worse = degraded(Medium(edge), np.random.default_rng(0)).frames[0].astype(float)
    assert worse.shape == (64, 64, 3) and worse[:, 5:20].std() > 15  # noise where it was flat
    columns = worse.mean((0, 2))
    assert 40 < columns[31] < 125 and 130 < columns[32] < 215  # no edge any more


def test_gold_of_a_folder(tmp_path):
    folders = model_folders(tmp_path / "models")
    gold = tmp_path / "gold"
    for number, name in enumerate(("better", "worse")):
        (gold / name).mkdir(parents=True)
        picture(number).save(gold / name / "g.png")
    with pytest.raises(StudyError, match="does not tell the prompts"):
        plan_study(folders, settings(gold=str(gold)), tmp_path / "models/prompts.csv")
    (gold / "metadata.csv").write_text("file_name,prompt\ng.png,a known one\n")
    store, _ = built(tmp_path / "models", folders, gold=str(gold))
    (pair,) = [pair for pair in store.pairs() if pair.is_gold]
    assert pair.prompt == "a known one" and pair.models == ("better", "worse")
    assert Image.open(store.media_folder / pair.first_media).tobytes() == picture(0).tobytes()
    shutil.rmtree(gold / "worse")
    with pytest.raises(StudyError, match="no folder 'worse'"):
        plan_study(folders, settings(gold=str(gold)), tmp_path / "models/prompts.csv")


def test_folders_of_samples_tell_their_prompts_themselves(tmp_path):
    """As `trl-sipo evaluate` writes them; its whole output is taken, and the first sample of each prompt."""
    model = tiny_stable_diffusion()
    for name, seed in (("base", 1), ("tuned", 2)):
        sampling = SamplingSettings(num_inference_steps=1, samples_per_prompt=2, seed=seed)
        draw_samples(model, prompt_set(3), tmp_path / "run/samples" / name, sampling, show_progress=False)
    folders = named_folders([str(tmp_path / "run")])
    assert list(folders) == ["base", "tuned"]
    plan = plan_study(folders, settings(samples_per_prompt=2, gold=None, num_mirrored=0))
    assert len(plan.pairs) == 6 and len(plan_study(folders, settings(gold=None)).pairs) == 3
    build_study(plan, tmp_path / "study", show_progress=False)
    pairs = Store.open(tmp_path / "study").pairs()
    assert {pair.prompt_id for pair in pairs} == {"p-0", "p-1", "p-2"} and pairs[0].category == "cats"
    with pytest.raises(StudyError, match="`samples_per_prompt`=3"):
        plan_study(folders, settings(samples_per_prompt=3))


def moving(number, *, num_frames=6, size=(SIZE + 1, SIZE)):
    frames = [Image.new("RGB", size, (40 * number, 20 * index, 90)) for index in range(num_frames)]
    return frames


def test_videos_have_one_length_rate_codec_and_size(tmp_path):
    for number, model in enumerate(MODELS):
        for name in ("a", "b"):
            suffix = ".mp4" if number else ".gif"
            path = tmp_path / model / f"{name}{suffix}"
            write_frames(path, moving(number + 1), rate=8 if number else 10, codec=ODD if number else None)
    (tmp_path / "prompts.csv").write_text("id,prompt\na,a cat\nb,a dog\n")
    folders = {model: tmp_path / model for model in MODELS}
    with pytest.raises(StudyError, match="10 frames per second and 'tuned' 8"):
        built(tmp_path, folders)
    assert not (tmp_path / "study").exists() and sorted(p.name for p in tmp_path.iterdir()) == [
        "base", "prompts.csv", "tuned"
    ]  # fmt: skip
    for options, words in (({"num_frames": 5}, "6 frames and 'tuned' 5"), ({"size": (SIZE, SIZE)}, "49 x 48 pixels")):
        for path in (tmp_path / "tuned").iterdir():
            write_frames(path, moving(2, **options), rate=10, codec=ODD)
        with pytest.raises(StudyError, match=words):
            built(tmp_path, folders)
    for path in (tmp_path / "tuned").iterdir():
        write_frames(path, moving(2), rate=10, codec=ODD)
    store, _ = built(tmp_path, folders, num_gold=1, num_mirrored=0)
    files = files_of(store)
    for pair in store.pairs():
        assert pair.is_video
        media = [read_medium(files[name], is_video=True) for name in (pair.first_media, pair.second_media)]
        assert {(m.frames.shape, m.rate) for m in media} == {((6, SIZE, SIZE + 2, 3), 10)}  # an even width
        sizes = {files[name].stat().st_size for name in (pair.first_media, pair.second_media)}
        assert len(sizes) == 1
    (pair, *_) = store.pairs()
    shown = read_medium(files[pair.second_media], is_video=True).frames.astype(int)
    assert abs(shown[3, 5, 5] - (80, 60, 90)).max() <= 6
    for path in files.values():
        with av.open(str(path)) as opened:
            stream = opened.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert "creation_time" not in opened.metadata
        content = path.read_bytes()
        assert content.index(b"moov") < content.index(b"mdat") and path.suffix == ".mp4"
        assert len(without_filling(content)) < len(content)


def replace_picture(folder, name, **options):
    Image.new("RGB", **{"size": (SIZE, SIZE), **options}).save(folder / name)


def break_picture(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    "damage, error, words",
    [
        (lambda f: (f / "2.png").unlink(), StudyError, "1 of 4 samples of 'base' have no partner of 'tuned'"),
        (lambda f: picture(9).save(f / "9.png"), StudyError, "1 files of .* have no prompt, such as '9'"),
        (lambda f: replace_picture(f, "1.png", size=(SIZE, 32)), StudyError, "48 x 48.*48 x 32.*different sizes"),
        (lambda f: (f / "1.png").write_text("no picture"), DatasetError, "not an image"),
        (lambda f: picture(1).save(f / "2.jpg"), StudyError, "two files of one name"),
        (lambda f: shutil.rmtree(f), StudyError, "no folder"),
        (lambda f: [path.unlink() for path in f.iterdir()], StudyError, "holds no images"),
        (lambda f: (f / "2.png").rename(f / "2.gif"), StudyError, "one is a video, the other an image"),
    ],
    ids=["missing", "unknown", "size", "no picture", "twice", "no folder", "empty", "kinds"],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path, damage, error, words):
    folders = model_folders(tmp_path)
    damage(folders["tuned"])
    with pytest.raises(error, match=words):
        specs = [f"{name}={folder}" for name, folder in folders.items()]
        plan_study(named_folders(specs), settings(), tmp_path / "prompts.csv")
    assert not (tmp_path / "study").exists()


def test_a_broken_picture_leaves_nothing_behind(tmp_path):
    folders = model_folders(tmp_path)
    break_picture(folders["tuned"], "3.png")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DatasetError, match="3.png"):
        built(tmp_path, folders)
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    folders = model_folders(tmp_path)
    before, synced, sync = sorted(tmp_path.iterdir()), [], tasks.os.fsync

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(tasks.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device.*Nothing is left"):
        built(tmp_path, folders)
    assert sorted(tmp_path.iterdir()) == before


def test_an_interruption_leaves_nothing_behind(tmp_path, monkeypatch):
    folders = model_folders(tmp_path)
    before = sorted(tmp_path.iterdir())

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks.os, "utime", interrupted)
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path, folders)
    assert sorted(tmp_path.iterdir()) == before


def test_a_study_is_never_written_over_something(tmp_path):
    folders = model_folders(tmp_path)
    (tmp_path / "study").mkdir()
    with pytest.raises(StudyError, match="not overwritten"):
        built(tmp_path, folders)
    assert list((tmp_path / "study").iterdir()) == []


def test_links_out_of_a_folder_are_refused(tmp_path):
    folders = model_folders(tmp_path)
    secret = tmp_path / "secret.png"
    picture(3).save(secret)
    (folders["tuned"] / "1.png").unlink()
    (folders["tuned"] / "1.png").symlink_to(secret)
    with pytest.raises(StudyError, match="leads out of its folder"):
        plan_study(folders, settings(), tmp_path / "prompts.csv")


def test_tables_may_name_files_or_give_ids(tmp_path):
    folders = model_folders(tmp_path, 2)
    for folder in folders.values():
        (folder / "0.png").rename(folder / "version 1.5.png")
    for name, rows in (
        ("metadata.csv", "file_name,prompt\nfolder/version 1.5.png,a cat\n1.png,a dog\n"),
        ("metadata.jsonl", '{"id": "version 1.5", "caption": "a cat"}\n{"id": 1, "caption": "a dog", "tag": "x"}\n'),
    ):
        (folders["tuned"] / name).write_text(rows)
        plan = plan_study(folders, settings(gold=None))
        assert sorted(pair.samples[0].prompt for pair in plan.pairs) == ["a cat", "a dog"]
        (folders["tuned"] / name).unlink()
    (tmp_path / "bad.csv").write_text("file_name,prompt\n1.png,a dog\n1.png,a cat\n")
    with pytest.raises(StudyError, match="row 1: '1' has another prompt"):
        plan_study(folders, settings(), tmp_path / "bad.csv")
    (tmp_path / "bad.csv").write_text("name,text of it\n1,a dog\n")
    with pytest.raises(StudyError, match="expected a column of file_name"):
        plan_study(folders, settings(), tmp_path / "bad.csv")


def test_prompts_that_differ_are_no_pairs(tmp_path):
    model = tiny_stable_diffusion()
    for number, name in enumerate(MODELS):
        prompts = [type(record)(record.prompt_id, f"{record.prompt} {number}") for record in prompt_set(2)]
        draw_samples(model, prompts, tmp_path / name, SamplingSettings(num_inference_steps=1), show_progress=False)
    with pytest.raises(StudyError, match="was drawn for"):
        plan_study({name: tmp_path / name for name in MODELS}, settings())


def test_a_mixture_of_jpeg_and_png_is_told(tmp_path):
    folders = model_folders(tmp_path)
    for path in list(folders["tuned"].iterdir()):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    (note,) = plan_study(folders, settings(), tmp_path / "prompts.csv").notes
    assert "tuned" in note and "JPEG" in note


@pytest.mark.parametrize(
    "options, words",
    [
        ({"groups": 0}, "`groups` must be at least 1"),
        ({"raters_per_group": 0}, "`raters_per_group`"),
        ({"against": "nobody"}, "none of the models base, tuned"),
        ({"tasks_per_rater": 5}, "from 1 to 4"),
        ({"num_mirrored": 3}, "from 0 to 2"),
        ({"gold": None, "num_gold": 2}, "`num_gold`=2"),
    ],
)
def test_numbers_that_do_not_fit_are_told(tmp_path, options, words):
    with pytest.raises(StudyError, match=words):
        plan_study(model_folders(tmp_path), settings(**options), tmp_path / "prompts.csv")


@pytest.mark.parametrize(
    "specs, words",
    [(["a=x", "a=y"], "given twice"), (["only=."], "at least two"), (["a\x1b=.", "b=."], "printable")],
)
def test_names_of_models_are_checked(specs, words):
    specs = [spec.replace("=x", "=.").replace("=y", "=.") for spec in specs]
    with pytest.raises(StudyError, match=words):
        named_folders(specs)


def test_a_folder_may_have_an_equals_sign_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("lr=1e-5", "lr=1e-6"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert list(named_folders(["runs/lr=1e-5", "runs/lr=1e-6"])) == ["lr=1e-5", "lr=1e-6"]
    assert named_folders(["a=runs/lr=1e-5", "b=runs/lr=1e-6"])["a"] == Path("runs/lr=1e-5")


def test_sides_are_drawn_for_every_rater(tmp_path):
    store, _ = built(tmp_path, model_folders(tmp_path, 8), groups=1, raters_per_group=6, gold=None, num_mirrored=0)
    sides = {
        rater.rater_id: {task.pair_id: task.is_flipped for task in store.tasks(rater.rater_id) if task.kind == SAMPLE}
        for rater in store.raters()
    }
    assert all(sum(flips.values()) == 4 for flips in sides.values())
    assert all(sum(flips[pair] for flips in sides.values()) == 3 for pair in sides[1])


def test_without_a_seed_no_two_studies_have_the_same_sides(tmp_path):
    """The command draws one, so that nobody who has the program can work out the sides."""
    from trl_sipo.scripts.study_build import build_settings, make_parser

    arguments = ["--models", "a", "b", "--output", "s"]
    seeds = {build_settings(make_parser().parse_args(arguments)).study.seed for _ in range(20)}
    assert len(seeds) == 20
    assert build_settings(make_parser().parse_args([*arguments, "--seed", "7"])).study.seed == 7
