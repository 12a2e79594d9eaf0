# SPDX-License-Identifier: Apache-2.0
"""A real browser without a screen: Chromium, driven by Playwright.

Playwright's own download is not used: the browser is the one of the system (Debian's package `chromium`), or the one
that TRL_SIPO_CHROMIUM names. A page may reach the machine itself and nothing else.
"""

import os
import shutil
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

# Names under which distributions install it.
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Nothing is looked up, updated or reported at the start; a sandbox needs rights that a container has not.
OPTIONS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--force-color-profile=srgb", "--hide-scrollbars",
)  # fmt: skip
# Widths and heights in CSS pixels.
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 375, "height": 740}
_HOSTS_OF_THIS_MACHINE = ("127.0.0.1", "localhost", None, "")


def find_chromium() -> str | None:
    """The browser's path, or None where there is none."""
    return os.environ.get("TRL_SIPO_CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)


@contextmanager
def chromium():
    """A running browser; each test opens contexts of its own, which share nothing."""
    from playwright.sync_api import sync_playwright

    before = _open_files()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=list(OPTIONS))
        _of_the_browser.update(_open_files() - before)
        yield browser
        _of_the_browser.clear()
        browser.close()


# File descriptors of a running browser: the pipes to its driver, and what waits for them.
_of_the_browser: set[int] = set()


def _open_files() -> set[int]:
    listed = map(int, os.listdir("/dev/fd"))
    return {number for number in listed if os.path.exists(f"/dev/fd/{number}")}  # without that of the list itself


def _close_inherited() -> None:
    """In a forked process: the driver ends when its pipe is closed, which needs all who hold it to close it."""
    while _of_the_browser:  # emptied: in this process the numbers will be those of other files
        with suppress(OSError):
            os.close(_of_the_browser.pop())


os.register_at_fork(after_in_child=_close_inherited)


@contextmanager
def open_context(browser, *, viewport=DESKTOP, dark=False, is_phone=False):
    """A context as of one person: cookies of its own, and no network but this machine.

    Yields:
        The context; `context.failures` lists errors of scripts, lines of the console that are errors, and addresses
        outside this machine that a page asked for.
    """
    context = browser.new_context(
        viewport=viewport, color_scheme="dark" if dark else "light", is_mobile=is_phone, has_touch=is_phone
    )
    context.failures = []

    def only_this_machine(route):
        address = urlsplit(route.request.url)
        if address.scheme in ("http", "https", "ws", "wss") and address.hostname not in _HOSTS_OF_THIS_MACHINE:
            context.failures.append(f"asked for {route.request.url}")
            route.abort()
        else:
            route.continue_()

    def watch(page):
        page.on("pageerror", lambda error: context.failures.append(str(error)))
        page.on("console", lambda line: line.type == "error" and context.failures.append(line.text))

    context.route("**/*", only_this_machine)
    context.on("page", watch)
    yield context
    context.close()
