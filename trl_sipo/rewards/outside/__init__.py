# SPDX-License-Identifier: Apache-2.0
"""Scorers outside of this process, with an environment of their own: a command, or a server.

    protocol.py             the messages, whatever carries them; docs/source/outside_scorers.md describes them
    process_transport.py    JSON lines over the standard streams of a process
    http_transport.py       JSON in HTTP POST requests
    scorer.py               the `Reward` on top of either
    serve.py                makes a scorer of a Python function; one file, which needs the standard library alone

Nothing is imported here, so that `serve` starts in environments without torch.
"""

from typing import Any


def open_scorer(spec: str, **options: Any) -> Any:
    """The scorer that `spec` names: see [`trl_sipo.rewards.outside.scorer.open_scorer`]."""
    from trl_sipo.rewards.outside import scorer

    return scorer.open_scorer(spec, **options)
