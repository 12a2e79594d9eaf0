# SPDX-License-Identifier: Apache-2.0
"""Scorers behind HTTP: a real server of this machine, that also breaks off, stalls and answers nonsense."""

import base64
import http.client
import io
import json
import shlex
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from tests.trainer.processes import free_port
from trl_sipo.data.video import open_video
from trl_sipo.errors import ConfigurationError, RewardError
from trl_sipo.rewards import outside
from trl_sipo.rewards.outside import open_scorer, serve
from trl_sipo.rewards.registry import load_reward

ROOT = Path(__file__).resolve().parents[3]
SERVE = Path(outside.__file__).with_name("serve.py")
WHITE = Image.new("RGB", (8, 6), "white")
VIDEO = np.full((5, 16, 16, 3), 200, np.uint8)
INFO = {"name": "local", "convention": "1", "licence": "MIT", "media": ["image", "video"]}


class LocalServer:
    """Answers a message as the first of `plan` says, then as the next; properly when there is none left."""

    def __init__(self):
        self.plan: list[str] = []
        self.requests: list[tuple[str, dict, dict]] = []
        self.times: list[float] = []

    def note(self, path: str, headers: dict, message: dict) -> str:
        """Keep a request; gives what to do with it."""
        self.requests.append((path, headers, message))
        self.times.append(time.monotonic())
        return self.plan.pop(0) if self.plan else "good"

    @property
    def scored(self) -> list[dict]:
        """The messages that asked for scores."""
        return [message for _, _, message in self.requests if message["method"] == "score"]


def good_answer(message: dict) -> dict:
    """A proper answer."""
    answer = {"version": 1, "id": message["id"]}
    if message["method"] == "info":
        return {**answer, "info": INFO}
    return {**answer, "scores": [float(len(sample["prompt"])) for sample in message["samples"]]}


class Handler(BaseHTTPRequestHandler):
    """Answers one connection, as the server's plan says."""

    local: LocalServer

    def do_POST(self):  # noqa: N802
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        plan = self.local.note(self.path, dict(self.headers), message)
        getattr(self, plan.split()[0])(good_answer(message), *plan.split()[1:])

    def good(self, answer, status="200"):
        content = json.dumps(answer).encode() if isinstance(answer, dict) else answer
        self.send_response(int(status))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def dropped(self, _):
        self.connection.shutdown(socket.SHUT_RDWR)

    def broken_off(self, answer):
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])

    def status(self, _, number, text="why"):
        self.good({"version": 1, "id": 0, "error": {"message": text}}, number)

    def redirected(self, _):
        self.send_response(307)
        self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def slow(self, answer):
        time.sleep(2.0)
        self.good(answer)

    def drips(self, answer):
        self.send_response(200)
        self.end_headers()
        for _ in range(40):
            self.wfile.write(b" ")
            time.sleep(0.05)
        self.wfile.write(json.dumps(answer).encode())

    def drips_headers(self, _):
        self.connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
        self.trickle(b"a")

    def goes_on_continuing(self, _):
        self.trickle(b"HTTP/1.1 100 Continue\r\n\r\n")

    def drips_trailers(self, _):
        self.connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
        self.trickle(b"A: b\r\n")

    def trickle(self, piece):
        """For a minute, or until the client has gone."""
        for _ in range(1200):
            self.connection.sendall(piece)
            time.sleep(0.05)

    def too_many_headers(self, _):
        self.connection.sendall(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 10_000 + b"\r\n")

    def garbage(self, _):
        self.good(b"<html>Welcome to nginx</html>")

    def nan(self, answer):
        self.good({**answer, "scores": [float("nan")] * len(answer.get("scores", [0]))})

    def too_few(self, answer):
        self.good({**answer, "scores": answer["scores"][1:]})

    def nothing(self, _):
        self.good(b"")

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (BrokenPipeError, ConnectionResetError):  # the client had waited long enough
            self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def local():
    """A server, and the address of a scorer on it."""
    server = LocalServer()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"local": server})) as http_server:
        thread = threading.Thread(target=http_server.serve_forever, args=(0.01,))
        thread.start()
        server.url = f"http://127.0.0.1:{http_server.server_address[1]}/score?size=big"
        yield server
        http_server.shutdown()
        thread.join()


# --------------------------------------------------------------------------------------------------------- what works


def test_scores_come_in_batches_and_media_go_as_files_in_base64(local, tmp_path):
    scorer = open_scorer(local.url, batch_size=2, frame_rate=8, headers={"X-Lab": "7"})
    assert scorer.info.media == {"image", "video"} and scorer.info.name == "local"
    scores = scorer.score([WHITE, VIDEO, WHITE], ["a", "ab", "abc"])
    assert scores.dtype == torch.float32 and scores.tolist() == [1.0, 2.0, 3.0]
    assert [len(message["samples"]) for message in local.scored] == [2, 1]
    image, video = local.scored[0]["samples"]
    assert (image["kind"], image["format"], image["prompt"]) == ("image", "png", "a") and "path" not in image
    assert Image.open(io.BytesIO(base64.b64decode(image["data"]))).getcolors() == [(48, (255, 255, 255))]
    assert (video["kind"], video["format"]) == ("video", "mp4")
    frames = open_video(base64.b64decode(video["data"]))
    assert frames.rate == 8 and len(frames.timeline().starts) == 5
    path, headers, _ = local.requests[0]
    assert path == "/score?size=big" and headers["Content-Type"] == "application/json" and headers["X-Lab"] == "7"
    assert scorer.identity()["outside"] == local.url.partition("?")[0]


def test_a_token_comes_from_the_environment_and_is_nowhere_shown(local, monkeypatch):
    monkeypatch.setenv("SCORER_TOKEN", "sk-secret")
    local.plan = ["good", "status 500"]
    scorer = load_reward(f"{local.url}&key=sk-other", token_env="SCORER_TOKEN", retries=0)
    assert local.requests[0][1]["Authorization"] == "Bearer sk-secret"
    with pytest.raises(RewardError) as caught:
        scorer.score([WHITE], ["a"])
    assert "sk-" not in str(caught.value) and "sk-" not in json.dumps(scorer.identity())
    monkeypatch.delenv("SCORER_TOKEN")
    with pytest.raises(ConfigurationError, match="'SCORER_TOKEN', which is not set"):
        open_scorer(local.url, token_env="SCORER_TOKEN")


@pytest.mark.parametrize("ending", ["\n", "\r\nHost: other", "\N{EURO SIGN}"])
def test_a_token_that_cannot_be_sent_is_refused_without_being_shown(ending, local, monkeypatch):
    monkeypatch.setenv("SCORER_TOKEN", f"sk-secret{ending}")
    with pytest.raises(ConfigurationError, match="variable 'SCORER_TOKEN' .* cannot be sent") as caught:
        open_scorer(local.url, token_env="SCORER_TOKEN")
    assert "sk-" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="header 'X-Key' cannot be sent") as caught:
        open_scorer(local.url, headers={"X-Key": f"sk-secret{ending}"})
    assert "sk-" not in str(caught.value) and not local.requests


# ---------------------------------------------------------------------------------------------------------- no answer


@pytest.mark.parametrize("fault", ["dropped", "broken_off", "status 500", "status 503", "slow", "drips"])
def test_a_fault_that_may_pass_is_tried_again(fault, local):
    scorer = open_scorer(local.url, timeout=1.0, retries=1, backoff=0.05)
    local.plan = [fault]
    assert scorer.score([WHITE], ["ab"]).tolist() == [2.0]
    assert len(local.scored) == 2
    assert len({message["id"] for message in local.scored}) == 2


FAULTS = {
    "dropped": "the connection failed",
    "broken_off": "it broke off, [0-9]+ bytes before the end",
    "status 503 busy": "it answered with status 503: busy",
    "slow": "it did not answer within 1 s",
    "drips": "it did not answer within 1 s",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_is_an_error(fault, local):
    tries = 1 if fault in ("slow", "drips") else 3
    scorer = open_scorer(local.url, timeout=1.0, retries=tries - 1, backoff=0.01)
    local.plan = [fault] * 9
    times = "once" if tries == 1 else "3 times"
    with pytest.raises(RewardError, match=f"http://127.*/score was asked {times}: {FAULTS[fault]}"):
        scorer.score([WHITE], ["a"])
    assert len(local.scored) == tries


@pytest.mark.parametrize("fault", ["drips_headers", "goes_on_continuing", "drips_trailers"])
def test_an_answer_that_never_ends_is_cut_off_at_its_time(fault, local):
    scorer = open_scorer(local.url, timeout=0.5, retries=0)
    local.plan = [fault]
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"was asked once: it did not answer within 0\.5 s"):
        scorer.score([WHITE], ["a"])
    assert time.monotonic() - start < 30  # half of what the server would take: no test of how fast this machine is


def test_headers_without_end_are_no_answer(local):
    scorer = open_scorer(local.url, retries=0)
    local.plan = ["too_many_headers"]
    with pytest.raises(RewardError, match="the connection failed: HTTPException: got more than 100 headers"):
        scorer.score([WHITE], ["a"])


def test_pauses_between_tries_double(local):
    scorer = open_scorer(local.url, retries=2, backoff=0.2)
    local.plan = ["dropped", "dropped"]
    scorer.score([WHITE], ["a"])
    first, second = local.times[2] - local.times[1], local.times[3] - local.times[2]
    assert first >= 0.2 and second >= 0.4


def test_nobody_listening_is_an_error_that_says_where():
    address = f"http://127.0.0.1:{free_port()}/"
    with pytest.raises(RewardError, match=f"{address} was asked 2 times: the connection failed: ConnectionRefused"):
        open_scorer(address, retries=1, backoff=0.01)


# ----------------------------------------------------------------------------------------------------- wrong answers

WRONG = {
    "status 400 unknown": "it answered with status 400: unknown",
    "status 404": "it answered with status 404",
    "status 429": "it answered with status 429",
    "redirected": "it answered with status 307",
    "garbage": "no JSON came as an answer: '<html>Welcome",
    "nothing": "no JSON came as an answer",
    "nan": "score 0 of 2 is no finite number, but nan",
    "too_few": "gave 1 scores for 2 samples",
}


@pytest.mark.parametrize("plan", WRONG)
def test_a_wrong_answer_is_an_error_without_a_second_try(plan, local):
    scorer = open_scorer(local.url, retries=5, backoff=0)
    local.plan = [plan]
    with pytest.raises(RewardError, match=WRONG[plan]):
        scorer.score([WHITE, WHITE], ["a", "b"])
    assert len(local.scored) == 1
    assert scorer.score([WHITE], ["a"]).tolist() == [1.0], "it can be asked again"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://", "is no address"),
        ("http:///score", "is no address"),
        ("http://host:99999/", "cannot be read"),
        ("http://me:secret@host/", "holds a user or password"),
        ("http://me:secret@:80/", "holds a user or password"),
        ("http://me:secret@h\N{ADDRESSED TO THE SUBJECT}st/", "cannot be read"),
        ("http:///score?key=secret", "is no address"),
        ("http://host/score?key=secret key", "is no address.* with %XX for spaces"),
        ("http://host/sc\N{LATIN SMALL LETTER O WITH DIAERESIS}re?key=secret", "is no address.* with %XX"),
    ],
)
def test_what_is_no_address_is_refused(url, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        open_scorer(url)
    assert "secret" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ the reference server


@contextmanager
def serving(target: str, *options: str):
    """`serve.py` in a process of its own; gives host and port."""
    words = [sys.executable, str(SERVE), f"tests.rewards.outside.scorers:{target}", "--http", "0", *options]
    server = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        line = server.stderr.readline()
        assert line.startswith("Listening on http://127.0.0.1:"), line
        yield line.split("//")[1].strip().rstrip("/")
    finally:
        server.terminate()
        server.wait()
        server.stderr.close()


def post(address: str, body: bytes, **headers: str) -> tuple[int, dict]:
    """What a server says to a request."""
    connection = http.client.HTTPConnection(address, timeout=20)
    try:
        connection.request("POST", "/", body, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_the_reference_server_scores_over_http_as_over_streams():
    stdio = shlex.join([sys.executable, str(SERVE), "tests.rewards.outside.scorers:brightness", "--stdio", "--decode"])
    media = [Image.new("RGB", (5, 5), (40, 50, 60)), VIDEO, WHITE]
    with serving("brightness", "--decode", "--media", "image", "video") as address:
        with open_scorer(f"http://{address}/any", batch_size=2) as scorer:
            over_http = scorer.score(media, ["", "", ""])
    with open_scorer(f"process:{stdio} --media image video", cwd=str(ROOT)) as scorer:
        assert torch.equal(scorer.score(media, ["", "", ""]), over_http)
    assert over_http[[0, 2]].tolist() == [50.0, 255.0]


def test_the_reference_server_says_whose_fault_it_is():
    with serving("refuses") as address, open_scorer(f"http://{address}/", retries=2, backoff=0) as scorer:
        with pytest.raises(
            RewardError, match="failed: it answered with status 422: ValueError: the prompt is too long"
        ):
            scorer.score([WHITE], ["a"])
    with serving("breaks") as address, open_scorer(f"http://{address}/", retries=1, backoff=0) as scorer:
        with pytest.raises(RewardError, match="asked 2 times: it answered with status 500: MemoryError: no memory"):
            scorer.score([WHITE], ["a"])


def test_the_reference_server_reads_no_files_and_answers_no_pages_of_a_browser():
    sample = {"kind": "image", "prompt": "a"}
    with serving("size") as address:

        def ask(samples, **headers):
            message = {"version": 1, "id": 1, "method": "score", "samples": samples}
            return post(address, json.dumps(message).encode(), **headers)

        status, answer = ask([{**sample, "path": str(SERVE)}])
        assert status == 400 and "needs `format` 'png' and `data`" in answer["error"]["message"]
        good = [{**sample, "format": "png", "data": base64.b64encode(b"123").decode()}]
        assert ask(good) == (200, {"version": 1, "id": 1, "scores": [3.001]})
        status, answer = ask(good, **{"Content-Type": "text/plain"})
        assert status == 400 and "Content-Type" in answer["error"]["message"]
        for body, message in (
            (b"{", "Expecting"),
            (b"[]", "no message of version 1"),
            (b'{"version": 2, "id": 1, "method": "info"}', "no message of version 1"),
            (b'{"version": 1, "id": 1, "method": "shutdown"}', "unknown method 'shutdown'"),
            (b'{"version": 1, "id": 1, "method": "score", "samples": [{"kind": "sound"}]}', "needs `kind`"),
        ):
            status, answer = post(address, body)
            assert status == 400 and message in answer["error"]["message"]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
RAW_VIDEO = b"YUV4MPEG2 W16 H16 F8:1 C444\nFRAME\n" + bytes(3 * 16 * 16)


@pytest.mark.parametrize(("kind", "content"), [("image", EPS), ("video", RAW_VIDEO)])
def test_what_is_decoded_is_of_the_formats_of_the_protocol(kind, content, tmp_path):
    """Pillow would run Ghostscript on an EPS, and FFmpeg reads playlists, which name other files."""
    (tmp_path / "sample").write_bytes(content)
    with pytest.raises((UnidentifiedImageError, av.error.InvalidDataError)):
        serve.decode(str(tmp_path / "sample"), kind)


def test_what_a_scorer_says_of_itself_is_short_and_printable(local, monkeypatch):
    for field, value in (("name", "a" * 10_000), ("convention", "a\n\x1b[2J"), ("media", ["x"] * 10_000)):
        with monkeypatch.context() as patch:
            patch.setitem(INFO, field, value)
            with pytest.raises(RewardError, match=f"gave a wrong answer: `info.{field}` must be") as caught:
                open_scorer(local.url)
        assert len(str(caught.value)) < 600 and "\x1b" not in str(caught.value)
