# SPDX-License-Identifier: Apache-2.0
"""A scorer that misbehaves as its first argument says; the second is a file in which it counts its starts."""

import json
import os
import subprocess
import sys
import time

MODE, COUNTER = sys.argv[1:3]
INFO = {"name": MODE, "convention": "1", "licence": "MIT"}


def count_starts() -> int:
    """How often it was started, this time included."""
    with open(COUNTER, "a") as file:
        file.write(f"{os.getpid()}\n")
    with open(COUNTER) as file:
        return len(file.readlines())


def say(message: dict) -> None:
    """Write a message."""
    print(json.dumps({"version": 1, **message}), flush=True)


def scores(message: dict) -> dict:
    """A proper answer."""
    return {"id": message["id"], "scores": [1.0] * len(message["samples"])}


def crash() -> None:
    """With something to say."""
    print("CUDA error: out of memory", file=sys.stderr, flush=True)
    os._exit(3)


def answer(message: dict, starts: int) -> None:
    """Answer a request for scores, or not."""
    good = scores(message)
    wrong = {
        "too_few": {**good, "scores": good["scores"][1:]},
        "too_many": {**good, "scores": [*good["scores"], 0.0]},
        "nan": {**good, "scores": [float("nan"), *good["scores"][1:]]},
        "infinite": {**good, "scores": [1e39, *good["scores"][1:]]},
        "text": {**good, "scores": ["high", *good["scores"][1:]]},
        "no_list": {**good, "scores": {"a": 1}},
        "other_version": {**good, "version": 2},
        "other_id": {**good, "id": 99},
        "error": {"id": message["id"], "error": {"message": "the model is not there"}},
    }
    if MODE in wrong:
        say(wrong[MODE])
    elif MODE == "garbage":
        print("Downloading: 100%", flush=True)
        say(good)
    elif MODE == "endless":
        while True:
            sys.stdout.write("x" * 2**20)
    elif MODE == "crashes" or (MODE == "crashes_once" and starts == 1):
        crash()
    elif MODE == "slow" or (MODE == "slow_once" and starts == 1):
        time.sleep(60)
    elif MODE == "drips":
        for _ in range(600):
            print(" ", end="", flush=True)
            time.sleep(0.1)
    else:
        say(good)


def main() -> None:
    """Answer until the input ends, or for longer."""
    starts = count_starts()
    if MODE == "does_not_start":
        crash()
    if MODE == "with_child":
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
        with open(COUNTER, "a") as file:
            file.write(f"{child.pid}\n")
    for line in sys.stdin:
        message = json.loads(line)
        if message["method"] == "info":
            wrong = {
                "no_info": {},
                "no_name": {"info": {**INFO, "name": ""}},
                "media": {"info": {**INFO, "media": "x"}},
            }
            say({"id": message["id"], **wrong.get(MODE, {"info": INFO})})
            if MODE == "does_not_read":
                time.sleep(60)
        else:
            answer(message, starts)
    if MODE == "does_not_end":
        time.sleep(60)


main()
