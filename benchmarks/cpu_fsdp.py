# SPDX-License-Identifier: Apache-2.0
"""FSDP2 through Accelerate on CPUs, for tests and measurements.

Accelerate makes DDP of FSDP where the processes have no GPU, with one `elif`. Here its state is told otherwise, and
all that follows is its own code, transformers' and torch's.
"""

import os
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

# As `accelerate launch --config_file examples/accelerate_configs/fsdp2.yaml` sets it.
LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}


def offer_fsdp_on_cpus() -> None:
    """Let this process ask for FSDP2 and get it."""
    os.environ.update(LAUNCHED)
    make_state = AcceleratorState.__init__

    def with_fsdp(state: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        make_state(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            state.fsdp_plugin, state.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if state.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(state.mixed_precision)

    AcceleratorState.__init__ = with_fsdp
