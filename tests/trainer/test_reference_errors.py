# SPDX-License-Identifier: Apache-2.0
"""The table of reference errors and its file: what is known stays, what is added is kept, and nothing is torn."""

import logging
import os
import time

import pytest
import torch
from safetensors.torch import load_file

from trl_sipo.errors import DatasetError
from trl_sipo.trainer import reference_errors
from trl_sipo.trainer.reference_errors import Bank, ReferenceErrors, read_errors, write_errors

NAN = float("nan")


def table(**rows):
    """`p7=[1, 2]`: the pair 7 with two draws, whose errors are 1, 1.5 and 2, 2.5; drawn from no real model."""
    ids = sorted(int(name[1:]) for name in rows)
    width = max(map(len, rows.values()))
    values = [[*rows[f"p{pair}"], *[NAN] * (width - len(rows[f"p{pair}"]))] for pair in ids]
    errors = torch.tensor(values)
    return ReferenceErrors(torch.tensor(ids), torch.stack([errors, errors + 0.5], dim=2))


def values(errors):
    return {
        pair: [draw for draw in row if draw == draw]
        for pair, row in zip(errors.ids.tolist(), errors.errors[..., 0].tolist(), strict=True)
    }


def bank(path, **options):
    return Bank(path, {"weights": "w"}, **{"is_written": True, **options})


def test_pairs_and_draws_of_both_are_there_and_the_first_one_wins():
    merged = table(p3=[1, 2], p9=[3]).merged(table(p3=[8, 8, 4], p1=[5], p9=[8]))
    assert values(merged) == {1: [5], 3: [1, 2, 4], 9: [3]} and merged.num_draws == 3
    assert values(ReferenceErrors.none().merged(merged)) == values(merged.merged(ReferenceErrors.none()))
    assert merged.num_known(torch.tensor([9, 2, 3, 1, 10])).tolist() == [1, 0, 3, 1, 0]
    assert ReferenceErrors.none().num_known(torch.tensor([4])).tolist() == [0]
    assert values(merged.first(2)) == {1: [5], 3: [1, 2], 9: [3]}


def test_look_up():
    big = 2**62 + 1  # beyond what float64 tells apart
    errors = ReferenceErrors(torch.tensor([5, big]), torch.arange(8.0).reshape(2, 2, 2))
    chosen, rejected = errors.look_up(torch.tensor([big, 5, big]), torch.tensor([0, 1, 1]))
    assert chosen.tolist() == [4, 2, 6] and rejected.tolist() == [5, 3, 7]
    assert errors.look_up(torch.tensor([big]), 1)[0].tolist() == [6]


@pytest.mark.parametrize(("pair", "draw"), [(6, 0), (4, 0), (99, 0), (5, 1)])
def test_what_is_missing_is_no_number(pair, draw):
    errors = table(p5=[1], p7=[1, 2])
    with pytest.raises(DatasetError, match=f"The pair {pair} was not among those .* shuffle a stream with a `seed`"):
        errors.look_up(torch.tensor([7, pair]), torch.tensor([1, draw]))


def test_a_file_returns_what_was_written(tmp_path):
    for name, written in {"whole": table(p0=[1, 2], p1=[3, 4]), "some": table(p1=[1], p5=[2, 3])}.items():
        write_errors(tmp_path / name, written, {"seed": 1})
        read = read_errors(tmp_path / name)
        assert values(read) == values(written) and torch.equal(read.ids, written.ids)
    assert load_file(tmp_path / "whole").keys() == {"errors"}  # the numbers of all pairs are their places
    assert sorted(path.name for path in tmp_path.iterdir()) == ["some", "whole"]


def test_what_cannot_be_read_is_said(tmp_path, caplog):
    write_errors(tmp_path / "bank", table(p1=[1], p5=[2]), {})
    (tmp_path / "bank").write_bytes((tmp_path / "bank").read_bytes()[:-3])
    with caplog.at_level(logging.WARNING):
        assert not len(read_errors(tmp_path / "bank").ids)
    assert "bank cannot be read" in caplog.text


def test_added_errors_are_written_from_time_to_time_and_in_the_end(tmp_path, monkeypatch):
    path = tmp_path / "bank"
    growing = bank(path)
    growing.add(torch.tensor([9, 2, 9]), torch.ones(3, 2, 2))
    assert not path.exists() and growing.num_missing(torch.tensor([2, 9, 4]), 2).tolist() == [0, 0, 2]
    monkeypatch.setattr(reference_errors, "SAVE_EVERY", 0.0)
    growing.add(torch.tensor([4, 2]), torch.full((2, 2, 2), 7.0))
    assert values(read_errors(path)) == {2: [1, 1], 4: [7, 7], 9: [1, 1]} and growing.num_added == 3
    # One draw more, of two of them; and a process that leaves the writing to another.
    more = torch.full((2, 3, 2), NAN)
    more[:, 2] = 5.0
    other = bank(path, is_written=False)
    for process in (other, growing):
        assert process.num_missing(torch.tensor([2, 4, 9]), 3).tolist() == [1, 1, 1]
        process.add(torch.tensor([2, 9]), more)
        assert values(process.errors) == {2: [1, 1, 5], 4: [7, 7], 9: [1, 1, 5]}
        assert (values(read_errors(path)) == values(process.errors)) == process.is_written


def test_two_runs_at_a_time_keep_what_both_found(tmp_path):
    runs = [bank(tmp_path / "bank") for _ in range(2)]
    for number, run in enumerate(runs):
        run.add(torch.tensor([number, 7]), torch.full((2, 1 + number, 2), float(number)))
        run.save()
    assert values(read_errors(tmp_path / "bank")) == {0: [0], 1: [1, 1], 7: [1, 1]}
    assert values(runs[0].errors) == {0: [0], 7: [0]}


def test_what_a_kill_left_is_removed_but_not_what_another_run_writes(tmp_path):
    abandoned, in_writing = tmp_path / ".bank.abandoned", tmp_path / ".bank.another"
    for file in (abandoned, in_writing):
        file.write_bytes(b"half")
    os.utime(abandoned, (time.time() - 7200,) * 2)
    write_errors(tmp_path / "bank", table(p0=[1]), {})
    assert {path.name for path in tmp_path.iterdir()} == {"bank", ".bank.another"}
