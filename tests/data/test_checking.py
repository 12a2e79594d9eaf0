# SPDX-License-Identifier: Apache-2.0
"""Rows looked at one by one, judgements found by their contents, and what their agreement says."""

import json
import tracemalloc

import numpy as np
import pytest
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from torch.utils.data import DataLoader

from tests.data.clips import MPEG4, damaged, write_frames, write_video
from tests.data.pictures import canonical, encoded, pick_a_pic, picture
from trl_sipo.data.checking.check import CheckOptions, check_data
from trl_sipo.data.checking.judgements import Count, Judgements, find_repeats, find_triples
from trl_sipo.data.checking.noise import flips_from_agreement, flips_from_cycles, noise_report, share, suggestion
from trl_sipo.data.checking.rows import RowCheck, is_of_videos, media_hash
from trl_sipo.data.formats import FORMATS
from trl_sipo.data.row_selection import listed_rows, row_key, without_rows
from trl_sipo.errors import DatasetError

QUIET = CheckOptions(show_progress=False)


def judgements(*rows):
    """From (prompt, first, second, label)."""
    columns = [np.array(column) for column in zip(*rows, strict=True)] if rows else [np.zeros(0, dtype=int)] * 4
    return Judgements(np.arange(len(rows)), *columns[:3], columns[3].astype(float))


# --- judgements


def test_repeats_and_contradictions_by_hand():
    nobody = float("nan")
    found = find_repeats(
        judgements(
            (1, 10, 20, 1.0),  # 0
            (1, 20, 10, 0.0),  # 1: the same, the arms exchanged
            (2, 10, 20, 0.0),  # 2: another prompt
            (1, 10, 20, 0.3),  # 3: contradicts 0 and 1
            (1, 10, 20, 0.5),  # 4: a tie repeats, but contradicts nothing
            (3, 10, 20, 1.0),  # 5
            (3, 20, 10, 0.9),  # 6: contradicts 5
            (3, 30, 30, 1.0),  # 7: identical arms
            (3, 30, 40, nobody),  # 8
            (3, 40, 30, 1.0),  # 9: repeats 8
        )
    )
    assert found.rows.tolist() == [1, 3, 4, 6, 9] and found.num_pairs == 3
    assert found.contradictory_rows.tolist() == [0, 1, 3, 5, 6] and found.num_contradictory_pairs == 2
    assert found.agreement == Count(1, 2)  # rows 0 and 1, 5 and 6; row 3 has no other to be compared with


@pytest.mark.parametrize(
    ("last", "expected"),
    [(1.0, Count(0, 1)), (0.0, Count(1, 1)), (0.5, Count(0, 0))],
    ids=["transitive", "cyclic", "tie"],
)
def test_triples_by_hand(last, expected):
    """A over B, B over C; then A over C, C over A, neither."""
    for a, b, c in ((1, 2, 3), (3, 1, 2), (2, 3, 1), (3, 2, 1)):
        assert find_triples(judgements((7, a, b, 1.0), (7, b, c, 1.0), (7, a, c, last))) == expected
        assert find_triples(judgements((7, b, a, 0.0), (7, b, c, 1.0), (7, c, a, 1 - last))) == expected


def test_triples_do_not_cross_prompts_and_go_by_majorities():
    assert find_triples(judgements((1, 1, 2, 1.0), (1, 2, 3, 1.0), (2, 1, 3, 1.0))) == Count(0, 0)
    votes = [(1, 1, 2, 1.0), (1, 2, 3, 1.0), (1, 1, 3, 0.0), (1, 1, 3, 1.0), (1, 1, 3, 1.0)]
    assert find_triples(judgements(*votes)) == Count(0, 1)
    assert find_triples(judgements(*votes[:4])) == Count(0, 0)  # one vote each: no side


def test_triples_share_no_judgement():
    """Of the four triples of four arms, any two share a pair; triples of different arms never do."""
    pairs = [(1, a, b, 1.0) for a in range(4) for b in range(a + 1, 4)]
    assert find_triples(judgements(*pairs)) == Count(0, 1)
    lines = [(0, 1, 2), (3, 4, 5), (6, 7, 8)]
    apart = [(1, *pair, 1.0) for a, b, c in lines for pair in ((a, b), (b, c), (a, c))]
    assert find_triples(judgements(*apart)) == Count(0, 3)


def test_nothing_to_compare():
    found = find_repeats(judgements())
    assert (len(found.rows), found.num_pairs, found.agreement) == (0, 0, Count(0, 0))
    assert find_triples(judgements()) == Count(0, 0)


# --- noise


@pytest.mark.parametrize("flips", [0.0, 0.1, 0.25, 0.4, 0.5])
def test_flips_are_recovered_from_expected_shares(flips):
    assert flips_from_agreement((1 - flips) ** 2 + flips**2) == pytest.approx(flips, abs=1e-7)
    assert flips_from_cycles(flips * (1 - flips)) == pytest.approx(flips, abs=1e-7)


def test_a_rate_of_flips_is_recovered_from_judgements():
    """2,000 prompts with three arms in a known order, each pair judged twice, 20 % of the labels turned."""
    generator = np.random.default_rng(4)
    rows = []
    for prompt in range(2000):
        for low, high in ((1, 2), (2, 3), (1, 3)):
            for _ in range(2):
                rows.append((prompt, low + 3 * prompt, high + 3 * prompt, float(generator.random() > 0.2)))
    both = judgements(*rows)
    once = both.where(np.arange(len(rows)) % 2 == 0)
    report = noise_report(find_repeats(both).agreement, find_triples(once), None)
    assert report["agreement_of_repeats"]["total"] == 6000 and report["cyclic_triples"]["total"] == 2000
    for name in ("flips_from_repeats", "flips_from_triples"):
        assert report[name]["low"] < 0.2 < report[name]["high"] and abs(report[name]["value"] - 0.2) < 0.02
    assert "positive `poly_alpha`" in report["suggestion"]


def test_intervals_by_hand():
    """Wilson: p = 8/10 gives 0.4902 to 0.9433."""
    found = share(Count(8, 10))
    assert (round(found.low, 4), round(found.high, 4)) == (0.4902, 0.9433)
    assert share(Count(0, 5)).low == 0 and share(Count(5, 5)).high == 1 and share(Count(0, 0)) is None


@pytest.mark.parametrize(
    ("agreeing", "cyclic", "text"),
    [
        (None, None, "Nothing"),
        (Count(20, 29), None, "Nothing"),
        (Count(1000, 1000), None, "near 0"),
        (Count(700, 1000), Count(0, 1000), "positive"),  # the worse of the two counts
        (None, Count(200, 1000), "positive"),
        (Count(45, 50), None, "neither"),
    ],
)
def test_suggestions(agreeing, cyclic, text):
    found = suggestion(*(None if count is None else share(count) for count in (agreeing, cyclic)))
    assert text in found and ("rule of thumb" in found) is (text != "Nothing")


# --- rows


def test_contents_are_told_apart_and_found_again(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        picture(seed).save(tmp_path / f"{name}.png")
    one, again, other = (media_hash(str(tmp_path / f"{name}.png")) for name in "abc")
    assert one == again == media_hash((tmp_path / "a.png").read_bytes()) == media_hash({"bytes": encoded(picture(0))})
    assert one != other and media_hash(str(tmp_path)) != one
    frames = [str(tmp_path / f"{name}.png") for name in "ac"]
    assert media_hash(frames) != media_hash(frames[::-1])


def test_the_same_pixels_are_one_image_however_they_are_stored(tmp_path):
    check = RowCheck(FORMATS["canonical"])
    picture(0).save(tmp_path / "a.webp", lossless=True)
    row = {"prompt": "p", "chosen": encoded(picture(0)), "rejected": str(tmp_path / "a.webp"), "label": 1.0}
    first, second = check(0, row).arms
    assert first.content == second.content and first.size == (40, 30)


def test_all_that_is_wrong_with_a_row_is_said():
    check = RowCheck(FORMATS["canonical"])
    found = check(3, {"prompt": " ", "chosen": b"no image", "rejected": encoded(picture(0))[:300], "label": 7.0})
    texts = ("prompt is empty", "label is the share", "column 'chosen'", "column 'rejected'")
    assert len(found.problems) == 4 and found.arms is None
    assert all(text in problem for text, problem in zip(texts, found.problems, strict=True))


def test_what_is_a_video(tmp_path):
    video = write_video(tmp_path / "a.mp4", 3)
    (tmp_path / "frames").mkdir()
    picture(0).save(tmp_path / "a.png")
    videos = [str(video), video.read_bytes(), "gone.mp4", str(tmp_path / "frames"), ["a.png"], np.zeros((2, 4, 4, 3))]
    assert all(map(is_of_videos, videos))
    assert not any(map(is_of_videos, [str(tmp_path / "a.png"), encoded(picture(0)), "gone.png", None, picture(0)]))


# --- the walk


def test_a_set_with_everything_wrong():
    """Pick-a-Pic with a broken image, a truncated one, a repeat, a contradiction and identical arms."""
    rows = list(pick_a_pic())
    rows[0]["jpg_1"] = b"no image"
    rows[1]["jpg_0"] = rows[1]["jpg_0"][:500]
    rows[3]["jpg_1"] = rows[3]["jpg_0"]
    rows += [rows[4], {**rows[5], "label_0": 1.0}, {**rows[4], "caption": ""}]
    found = check_data(Dataset.from_list(rows), QUIET)
    counts = {name.removeprefix("num_"): found.report[name] for name in found.report if name.startswith("num_")}
    assert counts == {
        "rows": 9, "bad": 3, "ties": 1, "unlabelled": 1, "pairs": 4, "identical_arms": 1, "repeated_pairs": 2,
        "repeats": 2, "contradictory_pairs": 1, "unequal_sizes": 0,
    }  # fmt: skip
    listed = {name: [each.row for each in rows] for name, rows in found.listed.items()}
    assert listed == {"bad_rows": [0, 1, 8], "identical_arms": [3], "repeats": [6, 7], "contradictory": [5, 7]}
    reasons = {listed.row: listed.reason for listed in found.listed["bad_rows"]}
    assert "jpg_1" in reasons[0] and "does not open" in reasons[1] and "prompt is empty" in reasons[8]
    assert found.report["sizes"] == {"40x30": 12} and found.report["prompts"]["num_distinct"] == 4
    assert found.report["first_preferred"]["hits"] == 3


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"limit": 7}, {"num_shown": 2}], ids=str)
def test_workers_and_limits(options):
    dataset = canonical(9, label=[1.0, 0.2, 0.5] * 3)
    plain = check_data(dataset.select(range(options.get("limit", 9))), QUIET)
    found = check_data(dataset, CheckOptions(show_progress=False, **options))
    assert found.report == plain.report
    assert len(found.shown) == min(options.get("num_shown", 24), found.report["num_rows"])
    assert max(arm.thumbnail.width for row in found.shown for arm in row.arms) == 160


def test_a_stream_gives_the_same_report():
    dataset = canonical(9, label=[1.0, 0.2, 0.5] * 3)
    assert check_data(dataset.to_iterable_dataset(), QUIET).report == check_data(dataset, QUIET).report


def test_videos(tmp_path):
    paths = [str(write_video(tmp_path / f"{n}.mp4", n, first=n, rate=rate)) for n, rate in ((9, 24), (12, 24), (5, 8))]
    broken = tmp_path / "cut.mp4"
    broken.write_bytes((tmp_path / "12.mp4").read_bytes()[:-200])
    columns = {"prompt": ["a", "b", "c"], "chosen": [paths[0]] * 3, "rejected": [paths[1], paths[2], str(broken)]}
    found = check_data(Dataset.from_dict(columns), QUIET)
    assert (found.report["kind"], found.report["num_bad"], found.report["num_unequal_lengths"]) == ("videos", 1, 2)
    assert (found.report["shortest_frames"], found.report["longest_frames"]) == (5, 12)
    assert found.report["frame_rates"] == {"24.0": 3, "8.0": 1}
    enough = check_data(Dataset.from_dict(columns), CheckOptions(num_frames=9, show_progress=False))
    assert [listed.row for listed in enough.listed["bad_rows"]] == [1, 2]
    assert "5.mp4" in enough.listed["bad_rows"][0].reason


def test_damage_within_a_video_is_found_by_decoding_it(tmp_path):
    frames = [picture(seed, 64, 48) for seed in range(20)]
    whole, broken = (write_frames(tmp_path / name, frames, codec=MPEG4) for name in ("a.mp4", "b.mp4"))
    columns = {"prompt": ["a"], "chosen": [str(whole)], "rejected": [str(damaged(broken, 0.55, 0.6))]}
    assert check_data(Dataset.from_dict(columns), QUIET).report["num_bad"] == 0
    closely = check_data(Dataset.from_dict(columns), CheckOptions(decode_videos=True, show_progress=False))
    assert "is damaged" in closely.listed["bad_rows"][0].reason


def test_latents():
    latents = np.zeros((3, 4, 2, 2), dtype=np.float32).tolist()
    columns = {"prompt": list("abc"), "chosen_latents": latents, "rejected_latents": [latents[0], latents[1], [[1.0]]]}
    rows = [{name: values[index] for name, values in columns.items()} for index in range(3)]
    check = RowCheck(FORMATS["latents"])
    problems = [check(index, {**row, "label": 1.0}).problems for index, row in enumerate(rows)]
    assert [bool(found) for found in problems] == [False, False, True]
    found = check_data(Dataset.from_list(rows[:2]), QUIET)
    assert (found.report["kind"], found.report["num_identical_arms"], found.shown) == ("latents", 2, [])


def test_lists_can_be_skipped_and_leave_nothing_of_an_earlier_check(tmp_path):
    rows = list(pick_a_pic())
    rows[2]["jpg_0"] = b""
    found = check_data(Dataset.from_list(rows), QUIET)
    assert [path.name for path in found.write(tmp_path)] == ["report.json", "bad_rows.jsonl"]
    assert list(listed_rows(tmp_path / "bad_rows.jsonl")) == [2]
    assert json.loads((tmp_path / "report.json").read_text()) == found.report
    check_data(pick_a_pic(), QUIET).write(tmp_path)
    assert not (tmp_path / "bad_rows.jsonl").exists()


@pytest.mark.parametrize("name", ["bad_rows", "identical_arms", "contradictory"])
def test_workers_on_a_stream_leave_out_the_listed_rows_alone(tmp_path, name):
    """Each worker counts the rows of its own shards from 0, so that only contents can tell them."""
    rows = list(canonical(12, label=[1.0] * 12))
    rows[5]["chosen"] = {"bytes": b"no image", "path": None}
    rows[7]["rejected"] = rows[7]["chosen"]
    rows[10] = {**rows[2], "label": 0.0}
    features = canonical(1, label=[1.0]).features
    dataset = Dataset.from_list(rows, features=features)
    check_data(dataset, QUIET).write(tmp_path)
    listed = listed_rows(tmp_path / f"{name}.jsonl")
    assert list(listed) == {"bad_rows": [5], "identical_arms": [7], "contradictory": [2, 10]}[name]
    left = sorted(set(range(12)) - set(listed))
    stream = without_rows(dataset.to_iterable_dataset(num_shards=4), listed).remove_columns(["chosen", "rejected"])
    prompts = [row["prompt"] for row in DataLoader(stream, batch_size=None, num_workers=2)]
    assert sorted(prompts) == sorted(dataset.select(left)["prompt"][:])
    assert without_rows(dataset, listed)["prompt"][:] == dataset.select(left)["prompt"][:]


def test_keys_find_what_a_stream_makes_in_the_process():
    def rows():
        for number in range(4):
            yield {"prompt": f"p{number}", "chosen": picture(number), "rejected": picture(2)}

    stream = IterableDataset.from_generator(rows)
    listed = {row.row: row.key for row in check_data(stream, QUIET).listed["identical_arms"]}
    assert list(listed) == [2] and [row["prompt"] for row in without_rows(stream, listed)] == ["p0", "p1", "p3"]
    fmt, frames = FORMATS["canonical"], np.zeros((9, 20, 20, 3), dtype=np.uint8)
    other = frames.copy()
    other[4, 10, 10] = 1
    pairs = [{"prompt": "a", "chosen": array, "rejected": b"x", "label": 1} for array in (frames, other)]
    assert row_key(fmt, pairs[0]) != row_key(fmt, pairs[1])


def test_arms_of_different_rates_are_bad_rows_as_in_training(tmp_path):
    first, second = write_video(tmp_path / "a.mp4", 9, rate=24), write_video(tmp_path / "b.mp4", 9, rate=30)
    columns = {"prompt": ["a", "b"], "chosen": [str(first)] * 2, "rejected": [str(first), str(second)]}
    (bad,) = check_data(Dataset.from_dict(columns), CheckOptions(num_frames=5, show_progress=False)).listed["bad_rows"]
    assert bad.row == 1 and "24 frames per second and the rejected one 30" in bad.reason
    options = CheckOptions(num_frames=2, frame_rate=8, show_progress=False)
    assert not check_data(Dataset.from_dict(columns), options).listed["bad_rows"]


def test_a_broken_frame_of_a_list_is_a_bad_row(tmp_path):
    features = Features({"prompt": Value("string"), "chosen": List(Image()), "rejected": List(Image())})
    frames = [{"bytes": encoded(picture(number)), "path": None} for number in range(3)]
    broken = [{"bytes": b"no image", "path": None}, frames[0]]
    columns = {"prompt": ["a", "b"], "chosen": [frames, broken], "rejected": [frames[:2], frames]}
    dataset = Dataset.from_dict(columns, features=features)
    found = check_data(dataset, QUIET)
    (bad,) = found.listed["bad_rows"]
    assert found.report["kind"] == "videos" and bad.row == 1 and "frame 0: not an image" in bad.reason
    assert without_rows(dataset, {1: bad.key})["prompt"][:] == ["a"]


def test_a_list_of_other_data_is_refused(tmp_path):
    rows = list(pick_a_pic())
    rows[2]["jpg_0"] = b""
    check_data(Dataset.from_list(rows), QUIET).write(tmp_path)
    with pytest.raises(DatasetError, match="row 2 is to be skipped, but another row stands there"):
        without_rows(pick_a_pic(), listed_rows(tmp_path / "bad_rows.jsonl"))


def test_keys_go_by_contents_and_names_of_files():
    fmt = FORMATS["canonical"]
    row = {"prompt": "a", "chosen": "/here/0/1.png", "rejected": b"x", "label": 1.0}
    same = {"prompt": "a", "chosen": {"bytes": None, "path": "/there/0/1.png"}, "rejected": b"x", "label": 1.0}
    others = [{"prompt": "x/a"}, {"chosen": "/here/0/2.png"}, {"rejected": b"y"}, {"label": 0.0}, {"label": None}]
    others += [{"rejected": [b"x", b""]}, {"chosen": "/here/1/1.png"}]
    assert row_key(fmt, row) == row_key(fmt, same) == row_key(fmt, {**row, "label": 1})
    assert len(row_key(fmt, row)) == 16 and len({row_key(fmt, {**row, **other}) for other in [{}, *others]}) == 8


def test_an_empty_set_is_refused():
    for dataset in (canonical(1).select([]), canonical(1).to_iterable_dataset().filter(lambda _: False)):
        with pytest.raises(DatasetError, match="no rows|empty"):
            check_data(dataset, QUIET)


def test_memory_does_not_grow_with_the_pictures():
    """Ten times the pairs: what is kept is some hundred bytes a row, not the row's 7 KB."""
    peaks = []
    for count in (100, 1000):
        arms = [encoded(picture(seed % 50)) for seed in range(50)]
        dataset = Dataset.from_dict(
            {
                "prompt": [f"prompt {n}" for n in range(count)],
                "chosen": [arms[n % 50] for n in range(count)],
                "rejected": [arms[(n + 1) % 50] for n in range(count)],
            }
        )
        tracemalloc.start()
        check_data(dataset, CheckOptions(show_progress=False, num_shown=4))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 900 * 500
