# SPDX-License-Identifier: Apache-2.0
"""What a pipeline takes where its user gives nothing, read from the signature of its `__call__`."""

import inspect
from typing import Any


def call_default(pipeline: Any, name: str) -> Any:
    """The default of an argument of `pipeline(...)`, such as `"height"` or `"frame_rate"`."""
    return inspect.signature(type(pipeline).__call__).parameters[name].default
