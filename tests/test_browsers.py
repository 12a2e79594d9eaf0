# SPDX-License-Identifier: Apache-2.0
"""The browser of the tests beside what other tests do to the process."""

import subprocess
import sys
from pathlib import Path

# In a process of its own: Playwright runs one at a time, and the tests share theirs.
_FORKS_BESIDE_A_BROWSER = """
import multiprocessing, os, time
from tests.browsers import chromium

def grandchild(numbers):
    for number in numbers:
        os.fstat(number)

def with_a_child_of_its_own():
    numbers = [os.dup(0) for _ in range(20)]  # some of them were the browser's
    process = multiprocessing.get_context("fork").Process(target=grandchild, args=(numbers,))
    process.start()
    process.join()
    os._exit(process.exitcode)

with chromium() as browser:
    page = browser.new_page()
    parent = multiprocessing.get_context("fork").Process(target=with_a_child_of_its_own)
    parent.start()
    parent.join()
    assert parent.exitcode == 0, "files of a forked process were closed in its own child"
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    child.start()
    page.set_content("<p>still there</p>")
    assert page.inner_text("p") == "still there"
assert child.is_alive(), "closing the browser waited for the child"
child.terminate()
child.join()
"""


def test_closing_does_not_wait_for_a_forked_process(browser):
    """A worker of a data loader that nobody has collected yet: it would wait for us, and we for it."""
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run(
        [sys.executable, "-c", _FORKS_BESIDE_A_BROWSER], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
