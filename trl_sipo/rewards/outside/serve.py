# SPDX-License-Identifier: Apache-2.0
"""Make a scorer of a Python function, behind HTTP or as a process.

    python -m trl_sipo.rewards.outside.serve my_scorer:score --http 8000
    python -m trl_sipo.rewards.outside.serve my_scorer:score --stdio

`score(paths, prompts)` gets the paths of image files (PNG) or video files (MP4), and gives one number for each. With
`--decode` it gets PIL images and uint8 arrays (frames, height, width, 3) instead. If it is a class, it is called once,
and its method `score` is used, or itself.

This file needs the standard library alone, of Python 3.7 or newer, so that it runs in an environment in which trl_sipo
is not installed, by its path: `python .../serve.py my_scorer:score --stdio`.
"""

import argparse
import base64
import binascii
import importlib
import inspect
import json
import os
import sys
import tempfile
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

VERSION = 1
MAX_REQUEST_BYTES = 2**29
_FORMATS = {"image": "png", "video": "mp4"}


class BadRequest(Exception):
    """The message is not one of the protocol: to send it again would not help."""


def main(argv=None):
    """Serve until the input ends, or until Ctrl-C."""
    arguments = make_parser().parse_args(argv)
    # Of a module beside the user, as with `python -m`; never of those beside this file.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [os.getcwd(), *(entry for entry in sys.path if os.path.abspath(entry or ".") != here)]
    if arguments.stdio:
        lines, answers = private_streams()
        serve_lines(Scorer(arguments), lines, answers)
    else:
        serve_http(Scorer(arguments), arguments.host, arguments.http)


def private_streams():
    """Standard input and output as files that the function, and what it starts, can neither read nor print to."""
    lines, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return lines, answers


def make_parser():
    """The options."""
    parser = argparse.ArgumentParser(description="Make a scorer of a Python function.")
    add = parser.add_argument
    add("target", metavar="MODULE:CALLABLE", help="function (media, prompts) -> numbers, or a class that makes one")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--http", type=int, metavar="PORT", help="listen on this port; 0 takes a free one")
    way.add_argument("--stdio", action="store_true", help="JSON lines on standard input and output")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine alone)")
    add("--decode", action="store_true", help="give the function images and arrays, not paths of files")
    add("--options", type=json.loads, default={}, metavar="JSON", help="arguments of a class")
    add("--name", help="of the scores, in tables (default: that of the function)")
    add("--convention", help="what the number is, as a formula")
    add("--licence", help="of weights and code")
    add("--lower_is_better", action="store_true", help="a smaller number is a better sample")
    add("--media", nargs="+", choices=sorted(_FORMATS), help="what it scores (default: image)")
    add("--batch_size", type=int, help="samples that it takes at once")
    add("--identity", help="changes whenever the scores do, such as a version")
    return parser


class Scorer:
    """A function and what is said of it."""

    def __init__(self, arguments):
        self.score, stated = load(arguments.target, arguments.options)
        self.decode = arguments.decode
        given = {
            "name": arguments.name or stated.get("name") or arguments.target.rpartition(":")[2].lower(),
            "convention": arguments.convention or stated.get("convention") or f"what {arguments.target} gives",
            "licence": arguments.licence or stated.get("licence") or "not stated",
            "higher_is_better": not arguments.lower_is_better and stated.get("higher_is_better", True),
            "media": arguments.media or sorted(stated.get("media", ["image"])),
            "batch_size": arguments.batch_size or stated.get("batch_size"),
            "identity": arguments.identity or stated.get("identity"),
        }
        self.info = {name: value for name, value in given.items() if value is not None}
        self._lock = threading.Lock()

    def answer(self, message, *, by_path):
        """The answer to a message; the function is called by one request at a time."""
        number = message.get("id") if isinstance(message, dict) else None
        if not isinstance(message, dict) or message.get("version") != VERSION:
            raise BadRequest(f"no message of version {VERSION} of the protocol")
        if message.get("method") == "info":
            return {"version": VERSION, "id": number, "info": self.info}
        if message.get("method") != "score":
            raise BadRequest(f"unknown method {message.get('method')!r}: known are 'info' and 'score'")
        samples = message.get("samples")
        if not isinstance(samples, list) or not all(isinstance(sample, dict) for sample in samples):
            raise BadRequest("`samples` must be a list of objects")
        with tempfile.TemporaryDirectory(prefix="scorer-") as folder:
            media = [self._medium(sample, folder, i, by_path) for i, sample in enumerate(samples)]
            with self._lock:
                scores = self.score(media, [sample["prompt"] for sample in samples])
        scores = [float(score) for score in (scores.tolist() if hasattr(scores, "tolist") else scores)]
        return {"version": VERSION, "id": number, "scores": scores}

    def _medium(self, sample, folder, number, by_path):
        path = read_path(sample) if by_path else write_data(sample, folder, number)
        return decode(path, sample["kind"]) if self.decode else path


def load(target, options):
    """The function that scores, and what it says of itself: its attribute `info`, a dict or an object."""
    module, _, name = target.partition(":")
    if not name:
        raise SystemExit(f"{target!r} is no MODULE:CALLABLE")
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    if inspect.isclass(found):
        found = found(**options)
    info = getattr(found, "info", None)
    stated = info if isinstance(info, dict) else dict(vars(info)) if hasattr(info, "__dict__") else {}
    if callable(getattr(found, "identity", None)):
        stated = {**stated, "identity": found.identity()}
    return getattr(found, "score", found), stated


def read_path(sample):
    """The path of a sample of a process."""
    if check_sample(sample) and isinstance(sample.get("path"), str) and os.path.isfile(sample["path"]):
        return sample["path"]
    raise BadRequest(f"a sample needs the `path` of a file; got {sample.get('path')!r}")


def write_data(sample, folder, number):
    """The path of a file with the data of a sample that came by HTTP, which may name no files of this machine."""
    check_sample(sample)
    suffix = _FORMATS[sample["kind"]]
    if sample.get("format") != suffix or not isinstance(sample.get("data"), str):
        raise BadRequest(f"a sample of the kind {sample['kind']!r} needs `format` {suffix!r} and `data`")
    try:
        content = base64.b64decode(sample["data"], validate=True)
    except binascii.Error as error:
        raise BadRequest(f"`data` is no base64: {error}") from error
    path = os.path.join(folder, f"{number:05d}.{suffix}")
    with open(path, "wb") as file:
        file.write(content)
    return path


def check_sample(sample):
    """True; an error unless a sample has a kind and a prompt."""
    if sample.get("kind") not in _FORMATS or not isinstance(sample.get("prompt"), str):
        raise BadRequest("a sample needs `kind`, which is 'image' or 'video', and the text `prompt`")
    return True


def decode(path, kind):
    """A PIL image, or the frames of a video as a uint8 array.

    Of the protocol's formats alone: of others, some run programs (EPS) or name more files to read (playlists).
    """
    if kind == "image":
        from PIL import Image

        with Image.open(path, formats=["PNG"]) as image:
            return image.convert("RGB")
    import av
    import numpy

    with av.open(path, format="mp4") as container:
        return numpy.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def report(number, error):
    """The message that says what went wrong. The traceback is for whoever runs the scorer."""
    if not isinstance(error, BadRequest):
        traceback.print_exception(type(error), error, error.__traceback__, file=sys.stderr)
    return {"version": VERSION, "id": number, "error": {"message": f"{type(error).__name__}: {error}"}}


def serve_lines(scorer, lines, answers):
    """Answer each line, until there are no more."""
    for line in lines:
        number = None
        try:
            message = json.loads(line)
            number = message.get("id") if isinstance(message, dict) else None
            answer = scorer.answer(message, by_path=True)
        except Exception as error:  # whatever the function raises
            answer = report(number, error)
        content = memoryview(json.dumps(answer).encode() + b"\n")
        while content:
            content = content[answers.write(content) :]


def serve_http(scorer, host, port):
    """Answer POST requests until Ctrl-C."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802 - the name that http.server wants
            number = None
            try:
                # A page in a browser could send other types here from anywhere.
                if self.headers.get_content_type() != "application/json":
                    raise BadRequest("Content-Type must be application/json")
                message = json.loads(self.rfile.read(self._length()))
                number = message.get("id") if isinstance(message, dict) else None
                status, answer = 200, scorer.answer(message, by_path=False)
            except (BadRequest, json.JSONDecodeError) as error:
                status, answer = 400, report(number, BadRequest(str(error)))
            except (ValueError, TypeError) as error:  # of the function: the same samples will not do the next time
                status, answer = 422, report(number, error)
            except Exception as error:
                status, answer = 500, report(number, error)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _length(self):
            length = self.headers.get("Content-Length", "")
            if not length.isdigit() or int(length) > MAX_REQUEST_BYTES:
                raise BadRequest(f"Content-Length must be a number of bytes up to {MAX_REQUEST_BYTES}, got {length!r}")
            return int(length)

    with ThreadingHTTPServer((host, port), Handler) as server:
        print(f"Listening on http://{host}:{server.server_address[1]}/", file=sys.stderr, flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
