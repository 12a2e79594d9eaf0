# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import pytest
import torch

from trl_sipo.data.seeding import mix_seed, seeded_generator


def test_value_is_the_same_in_another_process():
    # PYTHONHASHSEED differs between processes; the seed must not depend on it.
    code = "from trl_sipo.data.seeding import mix_seed; print(mix_seed(3, 1, 4))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(printed) == mix_seed(3, 1, 4)


def test_values_are_63_bits_and_spread_over_the_low_32():
    seeds = {mix_seed(0, epoch, index) for epoch in range(20) for index in range(500)}
    assert len(seeds) == 10_000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    assert len({seed % 2**32 for seed in seeds}) > 9_990  # all that a CPU generator keeps


def test_order_number_and_sign_of_the_integers_matter():
    seeds = [mix_seed(1, 2), mix_seed(2, 1), mix_seed(12), mix_seed(1, 2, 0), mix_seed(-1, 2), mix_seed(1, 2 + 2**64)]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("integers", [(), (1.5,), ("1",), (None,)])
def test_only_integers(integers):
    with pytest.raises(TypeError):
        mix_seed(*integers)


def test_integers_of_other_libraries():
    assert mix_seed(torch.tensor(7), True) == mix_seed(7, 1)


def test_generator_repeats_itself():
    first, second = (torch.rand(4, generator=seeded_generator(5, 6)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.rand(4, generator=seeded_generator(5, 7)))
