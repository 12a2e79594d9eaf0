# SPDX-License-Identifier: Apache-2.0
"""Studies on disk, servers of them that run, and clients: plain ones, as of no browser."""

import http.client
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trl_sipo.annotation.records import Comparison, Study
from trl_sipo.annotation.server import AnnotationServer
from trl_sipo.annotation.serving import Address, make_server
from trl_sipo.annotation.store import MEDIA_FOLDER, STUDY_FILE, Store

FIRST_MODEL, SECOND_MODEL = "secret-base-model", "secret-tuned-model"
PROMPT = 'a red <img src=x onerror="alert(1)"> sneaker'


def make_study(folder: Path, *, num_pairs: int = 3, raters: Sequence[str] = ("anna", "ben"), **fields: Any):
    """A study of small pictures of one colour each.

    Returns:
        The store, and the tokens by the raters' names.
    """
    (folder / MEDIA_FOLDER).mkdir(parents=True)
    store = Store.create(folder / STUDY_FILE, Study(**{"title": "Sneakers", "seed": 3, **fields}))
    store.add_pairs([_pair(folder / MEDIA_FOLDER, number) for number in range(num_pairs)])
    return store, {name: store.invite(name, 1) for name in raters}


def _pair(media: Path, number: int) -> Comparison:
    names = [f"{number:02d}{arm}.png" for arm in "ab"]
    for arm, name in enumerate(names):
        (media / name).write_bytes(png((40 * number, 250 * arm, 90)))
    return Comparison(
        pair_id=f"pair-{number}",
        prompt_id=f"prompt-{number}",
        prompt=f"{PROMPT} {number}",
        category="Objects" if number % 2 else "",
        first_model=FIRST_MODEL,
        second_model=SECOND_MODEL,
        first_media=names[0],
        second_media=names[1],
        is_gold=number == 1,
    )


def png(colour: tuple[int, int, int]) -> bytes:
    """A small picture."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), colour, dtype=np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


@contextmanager
def running(store: Store, **options: Any) -> Iterator[AnnotationServer]:
    """A server on a free port, in threads of this process."""
    server = make_server(store, options.pop("address", Address(port=0)), **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.finish(seconds=5)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what threads will have done soon; an error if they have not after half a minute."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


@dataclass
class Answer:
    """What a server said."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        """Its content."""
        return json.loads(self.content)


@dataclass
class Client:
    """Somebody with cookies, who sends what a page would send."""

    server: AnnotationServer
    cookie: str = ""
    csrf: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def host(self) -> str:
        """What the server is asked for as."""
        return f"127.0.0.1:{self.server.port}"

    def get(self, path: str, **headers: str) -> Answer:
        """Ask for a page, a list or a file."""
        return self.ask("GET", path, None, headers)

    def post(self, path: str, value: Any, **headers: str) -> Answer:
        """Send JSON, with what a page sends along; headers of these names come instead of them, None: not at all."""
        own = {"Content-Type": "application/json", "Origin": f"http://{self.host}", "X-CSRF-Token": self.csrf}
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        given = {name.replace("_", "-"): text for name, text in headers.items()}
        return self.ask("POST", path, content, {**own, **given})

    def ask(self, method: str, path: str, content: bytes | None, headers: dict[str, str | None]) -> Answer:
        """Any request, on a connection of its own."""
        own = {"Host": self.host, "Cookie": self.cookie or None, **self.headers}
        sent = {name: text for name, text in {**own, **headers}.items() if text is not None}
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=20)
        try:
            connection.request(method, path, content, sent)
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    def sign_in(self, token: str) -> "Client":
        """As who has this token."""
        answer = self.post("/api/sign-in", {"token": token})
        assert answer.status == 200, answer
        self.cookie = answer.headers["Set-Cookie"].partition(";")[0]
        self.csrf = self.study()["csrf_token"]
        return self

    def study(self) -> Any:
        """All that a page is told."""
        return self.get("/api/study").json

    def answer(self, assignment: str, choice: str = "left", request_id: str = "request-1", **fields: Any) -> Answer:
        """Vote."""
        value = {"assignment": assignment, "choice": choice, "seconds": 2.5, "request_id": request_id, **fields}
        return self.post("/api/answer", value)
