# SPDX-License-Identifier: Apache-2.0
"""The page of a study in a real browser, and the commands that serve it as real processes."""

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import expect

ROOT = Path(__file__).resolve().parents[2]
SECONDS_TO_START = 120  # on a machine with much else to do
expect.set_options(timeout=30_000)  # for the same reason, in place of five seconds
# Lines that a browser itself writes when a server is away, or says no.
_OF_THE_NETWORK = "Failed to load resource"


def failures_of(context: Any) -> list[str]:
    """What went wrong in a context, but for requests that were refused or found no server."""
    return [failure for failure in context.failures if _OF_THE_NETWORK not in failure]


def free_port() -> int:
    """A port that nobody listens on, for a server that comes back under the same address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class ServerProcess:
    """A command that serves."""

    process: subprocess.Popen
    link: str

    def stop(self, number: int = signal.SIGTERM) -> str:
        """Send a signal, wait for the end, and return what it printed since it began to listen."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=SECONDS_TO_START)[0]


@contextmanager
def serving(*words: str | Path) -> Iterator[ServerProcess]:
    """`trl-sipo <words>` as a process of its own, from when it listens; killed at the end if it still runs."""
    command = [sys.executable, "-m", "trl_sipo.cli.main", *map(str, words)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if "Ctrl-C" in line:
                break
        found = re.search(r"http://127\.0\.0\.1:\d+/(#token=\w+)?", "".join(said))
        assert found, "".join(said)
        yield ServerProcess(process, found[0])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class RaterPage:
    """The page of one rater, and what they do on it."""

    def __init__(self, context: Any, link: str):
        self.page = context.new_page()
        self.page.goto(link)

    def locate(self, selector: str) -> Any:
        """An element."""
        return self.page.locator(selector)

    def begin(self) -> "RaterPage":
        """Read the guidelines, and go on to the pairs."""
        self.locate("#start-button").click()
        return self.ready()

    def ready(self) -> "RaterPage":
        """Wait until a pair is shown, and takes an answer."""
        expect(self.locate("#arms")).to_have_attribute("aria-busy", "false")
        expect(self.locate("#answers")).to_have_attribute("aria-busy", "false")
        return self

    def press(self, key: str) -> "RaterPage":
        """Press a key once both samples are there."""
        self.ready()
        self.page.keyboard.press(key)
        return self

    def click(self, button: str) -> "RaterPage":
        """Press a button once both samples are there."""
        self.ready()
        self.locate(f"#{button}").click()
        return self

    def is_at(self, pair: int) -> "RaterPage":
        """Wait until this pair, from 1, is the one that is shown."""
        expect(self.locate("#position-text")).to_have_text(f"· pair {pair}")
        return self.ready()

    def has_answered(self, done: int, total: int) -> "RaterPage":
        """Wait until the server has so many answers."""
        expect(self.locate("#progress-text")).to_have_text(f"{done} of {total} answered")
        return self

    def says(self, text: str) -> "RaterPage":
        """Wait for the line that says what is saved."""
        expect(self.locate("#status")).to_have_text(text)
        return self

    def is_done(self) -> "RaterPage":
        """Wait for the last page."""
        expect(self.locate("#finished-title")).to_have_text("All done")
        return self
