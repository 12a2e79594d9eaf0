# SPDX-License-Identifier: Apache-2.0
"""What `accelerate launch` added to the environment of this process, told from what was exported before it.

Where it is told of several processes and has no launcher for them, as on CPUs, it starts one, and nothing says so but
an address that it writes for them to meet at. The same variables are left over in shells and set by platforms, and
mean nothing then. Every process keeps the environment that it was started with, and the launcher waits for us: so the
two can be compared.
"""

from collections.abc import Mapping

import psutil

# Set by `accelerate launch` in whatever it starts, and by hardly anybody else.
_MARK = "ACCELERATE_DYNAMO_MODE"


def environment_before_launch() -> Mapping[str, str] | None:
    """The environment that `accelerate launch` itself was started in.

    `None`: it did not start this process, or the system does not tell.
    """
    try:
        own, *others = [process.environ() for process in _up_to_launcher()]
    except (psutil.Error, OSError):  # of another user, or gone
        return None
    return others[-1] if _MARK in own and others and _MARK not in others[-1] else None


def _up_to_launcher() -> list[psutil.Process]:
    """This process and its parents, up to the first whose environment lacks the mark: a shell may be between."""
    processes = [psutil.Process()]
    while _MARK in processes[-1].environ() and (parent := processes[-1].parent()) is not None:
        processes.append(parent)
    return processes
