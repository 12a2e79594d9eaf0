# SPDX-License-Identifier: Apache-2.0
import pickle
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Array3D, Dataset, Features, Image, IterableDataset, Value, load_dataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from tests.data.pictures import canonical, encoded, pick_a_pic, picture
from trl_sipo.data.collator import DataCollatorForDiffusionPreference
from trl_sipo.data.images import open_image
from trl_sipo.data.preference_dataset import PreferenceDataset, StreamingPreferenceDataset, pair_fingerprint
from trl_sipo.data.transforms import PairedTransform
from trl_sipo.errors import ConfigurationError, DatasetError

CENTRE = PairedTransform(16)
RANDOM = PairedTransform(16, center_crop=False, random_flip=True)


def loader(dataset: Any, **options: Any) -> DataLoader:
    return DataLoader(dataset, collate_fn=DataCollatorForDiffusionPreference(), **options)


def by_prompt(batches: Iterable[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Both arms of every pair, by its prompt; no prompt twice."""
    arms: dict[str, torch.Tensor] = {}
    for batch in batches:
        pairs = torch.stack([batch["chosen_pixels"], batch["rejected_pixels"]], dim=1)
        for prompt, pair in zip(batch["prompt"], pairs, strict=True):
            assert prompt not in arms
            arms[prompt] = pair
    return arms


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for prompt, pair in first.items():
        assert torch.equal(pair, second[prompt]), prompt


def test_items():
    dataset = PreferenceDataset(canonical(3), transform=PairedTransform(30))
    assert len(dataset) == 3
    item = dataset[1]
    assert item.keys() == {"prompt", "chosen_pixels", "rejected_pixels", "pair_index"}
    assert (item["prompt"], item["pair_index"]) == ("prompt 1", 1)
    expected = PairedTransform(30)(picture(2), picture(3))
    assert torch.equal(item["chosen_pixels"], expected[0])
    assert torch.equal(item["rejected_pixels"], expected[1])
    assert dataset[-1]["pair_index"] == 2
    with pytest.raises(IndexError):
        dataset[3]


def test_pick_a_pic_is_swapped_and_ties_left_out():
    source = pick_a_pic()
    dataset = PreferenceDataset(source, transform=CENTRE)
    assert (len(dataset), dataset.num_ties, dataset.num_unlabelled) == (4, 1, 1)
    assert [dataset[index]["prompt"] for index in range(4)] == [f"caption {row}" for row in (0, 1, 4, 5)]
    assert [dataset[index]["pair_index"] for index in range(4)] == [0, 1, 2, 3]
    for index, (row, preferred, other) in enumerate(
        [(0, "jpg_0", "jpg_1"), (1, "jpg_1", "jpg_0"), (4, "jpg_0", "jpg_1"), (5, "jpg_1", "jpg_0")]
    ):
        expected = CENTRE(open_image(source[row][preferred]), open_image(source[row][other]))
        assert torch.equal(dataset[index]["chosen_pixels"], expected[0])
        assert torch.equal(dataset[index]["rejected_pixels"], expected[1])


def test_every_way_of_storing_images_gives_the_same_items(tmp_path):
    arms: dict[str, dict[str, list[Any]]] = {"pil": canonical(2)[:]}
    for kind in ("path", "bytes", "dict"):
        arms[kind] = {"prompt": ["prompt 0", "prompt 1"], "chosen": [], "rejected": []}
    for seed in range(4):
        path = tmp_path / f"{seed}.png"
        picture(seed).save(path)
        column = "rejected" if seed % 2 else "chosen"
        arms["path"][column].append(str(path))
        arms["bytes"][column].append(path.read_bytes())
        arms["dict"][column].append({"bytes": path.read_bytes(), "path": None})
    datasets = {kind: Dataset.from_dict(columns) for kind, columns in arms.items()}
    datasets["undecoded"] = datasets["pil"].cast_column("chosen", Image(decode=False))
    datasets["image of path"] = datasets["path"].cast_column("chosen", Image()).cast_column("rejected", Image())
    datasets["torch format"] = datasets["pil"].with_format("torch")
    parquet = tmp_path / "pairs.parquet"
    datasets["pil"].to_parquet(str(parquet))
    datasets["parquet"] = load_dataset("parquet", data_files=str(parquet), split="train")
    expected = by_prompt(loader(PreferenceDataset(canonical(2), transform=CENTRE)))
    for dataset in datasets.values():
        assert_same(by_prompt(loader(PreferenceDataset(dataset, transform=CENTRE))), expected)


def test_workers_batch_size_order_and_processes_change_nothing():
    dataset = PreferenceDataset(canonical(11), transform=RANDOM, seed=3)
    dataset.set_epoch(2)
    expected = by_prompt(loader(dataset, batch_size=1))
    backwards = torch.utils.data.Subset(dataset, list(range(10, -1, -1)))
    halves = [torch.utils.data.Subset(dataset, range(start, 11, 2)) for start in (0, 1)]
    assert_same(by_prompt(loader(dataset, batch_size=4, num_workers=2)), expected)
    assert_same(by_prompt(loader(dataset, batch_size=3, num_workers=1)), expected)
    assert_same(by_prompt(loader(backwards, batch_size=5)), expected)
    assert_same({**by_prompt(loader(halves[0])), **by_prompt(loader(halves[1]))}, expected)
    assert_same(by_prompt(loader(pickle.loads(pickle.dumps(dataset)), batch_size=11)), expected)


def test_epochs_seeds_and_pairs_differ_and_come_back():
    same = canonical(1)
    dataset = PreferenceDataset(
        Dataset.from_dict({name: same[name][:] * 8 for name in same.column_names}), None, RANDOM
    )

    def crops(epoch: int) -> list[bytes]:
        dataset.set_epoch(epoch)
        return [dataset[index]["chosen_pixels"].numpy().tobytes() for index in range(8)]

    first, second = crops(0), crops(1)
    assert len(set(first + second)) == 16
    assert crops(0) == first
    dataset.seed = 1
    assert not set(crops(0)) & set(first)


def test_the_epoch_reaches_persistent_workers():
    dataset = PreferenceDataset(canonical(4), transform=RANDOM)
    expected = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        expected.append(by_prompt(loader(dataset)))
    batches = loader(dataset, num_workers=2, persistent_workers=True)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        assert_same(by_prompt(batches), expected[epoch])


def test_global_random_state_is_neither_used_nor_touched():
    dataset = PreferenceDataset(canonical(1), transform=RANDOM)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = dataset[0]["chosen_pixels"]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(dataset[0]["chosen_pixels"], first)


def test_a_broken_image_is_named_by_its_row_in_the_file():
    columns = pick_a_pic()[:]
    columns["jpg_1"][4] = columns["jpg_1"][4][:-300]
    dataset = PreferenceDataset(Dataset.from_dict(columns), transform=CENTRE)
    assert dataset[1]["prompt"] == "caption 1"
    with pytest.raises(DatasetError, match="row 4, the rejected image: the image does not open"):
        dataset[2]


def test_an_empty_prompt_is_named_on_access():
    dataset = canonical(2).remove_columns("prompt").add_column("prompt", ["a cat", ""])
    with pytest.raises(DatasetError, match="row 1, column 'prompt': the prompt is empty"):
        PreferenceDataset(dataset, transform=CENTRE)[1]


def test_images_need_a_transform():
    with pytest.raises(ConfigurationError, match="PairedTransform"):
        PreferenceDataset(canonical(1))
    with pytest.raises(ConfigurationError, match="PairedTransform"):
        StreamingPreferenceDataset(canonical(1).to_iterable_dataset())


def latent_columns(chosen: Any, rejected: Any) -> dict[str, Any]:
    return {
        "prompt": [f"p{index}" for index in range(len(chosen))],
        "chosen_latents": chosen,
        "rejected_latents": rejected,
    }


@pytest.mark.parametrize("declared", [True, False])
def test_latents_come_back_exactly(declared):
    values = np.random.default_rng(0).standard_normal((2, 3, 4, 5, 6)).astype(np.float32)
    array = Array3D((4, 5, 6), "float32")
    features = Features({"prompt": Value("string"), "chosen_latents": array, "rejected_latents": array})
    source = Dataset.from_dict(latent_columns(values[0].tolist(), values[1].tolist()), features if declared else None)
    dataset = PreferenceDataset(source)
    item = dataset[2]
    assert item.keys() == {"prompt", "chosen_latents", "rejected_latents", "pair_index"}
    assert item["chosen_latents"].dtype == torch.float32
    assert torch.equal(item["chosen_latents"], torch.from_numpy(values[0, 2]))
    assert torch.equal(item["rejected_latents"], torch.from_numpy(values[1, 2]))
    streamed = list(StreamingPreferenceDataset(source.to_iterable_dataset()))
    assert torch.equal(streamed[2]["rejected_latents"], item["rejected_latents"])


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        ([[[1.0, 2.0]]], [[[1.0]]], r"row 0: .*differ in shape, \(1, 2\) and \(1, 1\)"),
        ([[[1.0, float("nan")]]], [[[1.0, 2.0]]], "chosen latents are empty, or hold values that are not finite"),
        ([[[1.0, 2.0], [1.0]]], [[[1.0, 2.0]]], "chosen latents are no regular array"),
        ([[]], [[1.0]], "chosen latents are empty"),
    ],
)
def test_latents_that_are_no_pair_are_named(chosen, rejected, message):
    dataset = PreferenceDataset(Dataset.from_dict(latent_columns(chosen, rejected)))
    with pytest.raises(DatasetError, match=message):
        dataset[0]


# --- streams


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_streaming_equals_map_style(num_workers):
    source = pick_a_pic()
    expected = by_prompt(loader(PreferenceDataset(source, transform=CENTRE)))
    stream = StreamingPreferenceDataset(source.to_iterable_dataset(num_shards=3), transform=CENTRE)
    for _ in range(2):  # the counts are of one pass
        assert_same(by_prompt(loader(stream, batch_size=2, num_workers=num_workers)), expected)
        assert (stream.num_ties, stream.num_unlabelled) == (1, 1)


def test_streams_of_files_on_disk(tmp_path):
    dataset = canonical(6, label=[1.0, 0.0, 0.5, 1.0, 1.0, 0.0])
    for part in range(2):
        dataset.shard(2, part).to_parquet(str(tmp_path / f"{part}.parquet"))
    rows = load_dataset("parquet", data_files=str(tmp_path / "*.parquet"), split="train", streaming=True)
    stream = StreamingPreferenceDataset(rows, transform=CENTRE)
    expected = by_prompt(loader(PreferenceDataset(dataset, transform=CENTRE)))
    assert_same(by_prompt(loader(stream, num_workers=2)), expected)


def test_more_workers_than_shards_repeat_nothing():
    stream = StreamingPreferenceDataset(canonical(5).to_iterable_dataset(), transform=CENTRE)
    assert len(by_prompt(loader(stream, num_workers=2))) == 5


def test_counts_of_a_pass_with_more_workers_do_not_linger():
    stream = StreamingPreferenceDataset(pick_a_pic().to_iterable_dataset(num_shards=6), transform=CENTRE)
    for num_workers in (2, 0, 1):
        list(loader(stream, num_workers=num_workers))
        assert (stream.num_ties, stream.num_unlabelled) == (1, 1)


def test_streamed_crops_do_not_depend_on_workers_or_processes():
    rows = canonical(8).to_iterable_dataset(num_shards=4)
    stream = StreamingPreferenceDataset(rows, transform=RANDOM, seed=1)
    stream.set_epoch(1)
    expected = by_prompt(loader(stream))
    assert_same(by_prompt(loader(stream, num_workers=2, batch_size=3)), expected)
    across_processes: dict[str, torch.Tensor] = {}
    for rank in range(2):
        part = StreamingPreferenceDataset(split_dataset_by_node(rows, rank, 2), transform=RANDOM, seed=1)
        part.set_epoch(1)
        arms = by_prompt(loader(part, num_workers=rank))
        assert len(arms) == 4 and not arms.keys() & across_processes.keys()
        across_processes.update(arms)
    assert_same(across_processes, expected)
    stream.set_epoch(2)
    later = by_prompt(loader(stream))
    assert all(not torch.equal(later[prompt], pair) for prompt, pair in expected.items())


def test_pair_index_of_a_stream_identifies_the_pair():
    rows = canonical(6)
    orders = [rows.to_iterable_dataset(), rows.select([5, 3, 1, 0, 2, 4]).to_iterable_dataset(num_shards=2)]
    found = [
        {item["prompt"]: item["pair_index"] for item in StreamingPreferenceDataset(order, transform=CENTRE)}
        for order in orders
    ]
    assert found[0] == found[1]
    assert len(set(found[0].values())) == 6
    assert all(0 <= index < 2**63 for index in found[0].values())


def test_fingerprints_tell_where_the_prompt_ends():
    first = pair_fingerprint({"prompt": "ab", "chosen": b"c", "rejected": b""})
    assert first != pair_fingerprint({"prompt": "a", "chosen": b"bc", "rejected": b""})
    assert first != pair_fingerprint({"prompt": "ab", "chosen": b"", "rejected": b"c"})
    assert first == pair_fingerprint({"prompt": "ab", "chosen": {"bytes": b"c", "path": "x"}, "rejected": bytearray()})


def test_a_shuffled_stream_has_an_order_for_each_epoch():
    rows = canonical(12).to_iterable_dataset(num_shards=3).shuffle(seed=0, buffer_size=12)
    stream = StreamingPreferenceDataset(rows, transform=CENTRE)
    orders = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        orders.append([item["prompt"] for item in stream])
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_streams_without_declared_columns():
    def rows() -> Iterable[dict[str, Any]]:
        for seed in range(3):
            yield {"prompt": f"prompt {seed}", "chosen": picture(2 * seed), "rejected": encoded(picture(2 * seed + 1))}

    stream = IterableDataset.from_generator(rows)
    assert stream.features is None
    expected = by_prompt(loader(PreferenceDataset(canonical(3), transform=CENTRE)))
    assert_same(by_prompt(loader(StreamingPreferenceDataset(stream, transform=CENTRE))), expected)


def test_a_broken_row_of_a_stream_is_named():
    columns = pick_a_pic()[:]
    columns["jpg_1"][4] = b"broken"
    stream = StreamingPreferenceDataset(Dataset.from_dict(columns).to_iterable_dataset(), transform=CENTRE)
    with pytest.raises(DatasetError, match="row 4, the rejected image: not an image"):
        list(stream)
    columns["label_0"][1] = 2.0
    stream = StreamingPreferenceDataset(Dataset.from_dict(columns).to_iterable_dataset(), transform=CENTRE)
    with pytest.raises(DatasetError, match="row 1, column 'label_0'.*found 2.0"):
        list(stream)


def test_an_empty_stream_is_an_error():
    with pytest.raises(DatasetError, match="the stream has no rows"):
        StreamingPreferenceDataset(IterableDataset.from_generator(lambda: iter(())), transform=CENTRE)
