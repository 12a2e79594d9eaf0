# SPDX-License-Identifier: Apache-2.0
"""The examples train as the trainers' own tests do: one thread, no network."""

from tests.trainer.conftest import _modules_out_of_the_collectors_way, _one_quiet_thread

__all__ = ["_modules_out_of_the_collectors_way", "_one_quiet_thread"]
