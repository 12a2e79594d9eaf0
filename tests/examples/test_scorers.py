# SPDX-License-Identifier: Apache-2.0
"""The example scorers, against stand-ins of what they ask: a chat server, and the part of VBench that they call."""

import json
import math
import shlex
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trl_sipo.errors import RewardError
from trl_sipo.rewards import outside
from trl_sipo.rewards.outside import open_scorer

ROOT = Path(__file__).resolve().parents[2]
SERVE = Path(outside.__file__).with_name("serve.py")

# What it calls of VBench, and the file that this writes, whose order is that of the folder.
STAND_IN = """
import json, os
class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.output_path = output_path
        os.makedirs(output_path)
    def evaluate(self, videos_path, name, prompt_list, dimension_list, mode):
        assert mode == "custom_input" and sorted(prompt_list) == sorted(os.listdir(videos_path))
        results = [
            {"video_path": os.path.join(videos_path, file), "video_results": len(prompt_list[file])}
            for file in sorted(prompt_list, reverse=True)
        ]
        assert all(open(result["video_path"], "rb").read(8)[4:] == b"ftyp" for result in results)
        with open(os.path.join(self.output_path, name + "_eval_results.json"), "w") as file:
            json.dump({dimension_list[0]: [0.0, results]}, file)
"""


def command(target: str, options: dict) -> str:
    """The command of an example scorer."""
    words = [sys.executable, str(SERVE), f"examples.scorers.{target}", "--stdio", "--options", json.dumps(options)]
    return f"process:{shlex.join(words)}"


class Chat(BaseHTTPRequestHandler):
    """Says yes as surely as the question is long, and writes it in two ways."""

    def do_POST(self):  # noqa: N802
        """Answer a question with log-probabilities."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        image, text = body["messages"][0]["content"]
        assert image["image_url"]["url"].startswith("data:image/png;base64,") and body["logprobs"]
        words = ["Yes", " yes", "No", "Maybe"] if "cat" in text["text"] else ["Maybe"]
        tokens = [{"token": word, "logprob": math.log(0.2)} for word in words]
        content = json.dumps({"choices": [{"logprobs": {"content": [{"top_logprobs": tokens}]}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Nothing is said."""


def test_the_vision_language_model_answers_yes_or_no(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Chat) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        with open_scorer(command("vlm_scorer:YesNoScore", {"url": url}), cwd=str(ROOT)) as scorer:
            assert scorer.info.name == "yes_no_Qwen2.5-VL-7B-Instruct" and "P(yes)" in scorer.info.convention
            scores = scorer.score([Image.new("RGB", (8, 8))] * 3, ["a cat", "two cats", "a cat"])
            assert scores.tolist() == pytest.approx([2 / 3] * 3)
            with pytest.raises(RewardError, match=r"no yes or no among \['Maybe'\]"):
                scorer.score([Image.new("RGB", (8, 8))], ["a dog"])
        server.shutdown()
        thread.join()


class Redirecting(BaseHTTPRequestHandler):
    """Sends whoever asks to the same server by another name, and keeps what came."""

    seen: list[tuple[str, str | None]]

    def do_POST(self):  # noqa: N802
        """Say where else to ask."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append(("asked", self.headers["Authorization"]))
        self.send_response(302)
        self.send_header("Location", f"http://localhost:{self.server.server_address[1]}/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):  # noqa: N802
        """What is asked elsewhere."""
        self.seen.append(("elsewhere", self.headers["Authorization"]))
        self.send_error(404)

    def log_message(self, *_):
        """Nothing is said."""


def test_the_key_of_the_vision_language_model_goes_to_its_server_alone(monkeypatch):
    monkeypatch.setenv("VLM_API_KEY", "sk-secret")
    seen: list[tuple[str, str | None]] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Redirecting,), {"seen": seen})) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        with open_scorer(command("vlm_scorer:YesNoScore", {"url": url}), cwd=str(ROOT)) as scorer:
            with pytest.raises(RewardError, match="HTTPError"):
                scorer.score([Image.new("RGB", (8, 8))], ["a cat"])
        server.shutdown()
        thread.join()
    assert seen[0] == ("asked", "Bearer sk-secret") and ("elsewhere", "Bearer sk-secret") not in seen


def test_a_dimension_of_vbench_is_given_its_videos_and_read_by_their_names(tmp_path):
    (tmp_path / "vbench.py").write_text(STAND_IN)
    videos = [np.full((2, 16, 16, 3), 50 * number, np.uint8) for number in range(3)]
    options = {"cwd": str(ROOT), "environment": {"PYTHONPATH": str(tmp_path)}}
    with open_scorer(command("vbench_scorer:VBenchDimension", {}), **options) as scorer:
        assert scorer.info.media == {"video"} and scorer.batch_size == 256
        assert scorer.score(videos, ["a", "abc", "ab"]).tolist() == [1.0, 3.0, 2.0]
    with pytest.raises(RewardError, match="'color' takes no videos of one's own"):
        open_scorer(command("vbench_scorer:VBenchDimension", {"dimension": "color"}), retries=0, **options)
