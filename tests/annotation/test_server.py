# SPDX-License-Identifier: Apache-2.0
"""A study over HTTP: who gets what, what is stored when, and how the server ends."""

import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.annotation.served import FIRST_MODEL, PROMPT, SECOND_MODEL, Client, make_study, running
from trl_sipo.annotation.application import Limits
from trl_sipo.annotation.pages import PAGES
from trl_sipo.annotation.serving import Address, make_server, url_of, warning_of
from trl_sipo.annotation.store import STUDY_FILE, Store
from trl_sipo.errors import ConfigurationError, StorageError


@pytest.fixture
def study(tmp_path):
    return make_study(tmp_path / "study")


@pytest.fixture
def server(study):
    with running(study[0]) as running_server:
        yield running_server


@pytest.fixture
def anna(server, study):
    return Client(server).sign_in(study[1]["anna"])


@pytest.fixture
def ben(server, study):
    return Client(server).sign_in(study[1]["ben"])


def test_a_rater_gets_their_pairs_in_their_order_and_an_empty_list_of_choices(study, anna):
    told = anna.study()
    rater = study[0].rater_of(study[1]["anna"])
    assert [task["id"] for task in told["tasks"]] == [a.assignment_id for a in study[0].assignments(rater.rater_id)]
    assert told["title"] == "Sneakers" and told["choices"] == {} and told["rater"] == "anna"
    assert {task["prompt"] for task in told["tasks"]} == {f"{PROMPT} {number}" for number in range(3)}


def test_an_acknowledged_answer_is_in_the_file(study, anna):
    first, second, _ = anna.study()["tasks"]
    assert anna.answer(first["id"], "left", "request-1").json == {"saved": "request-1"}
    assert anna.answer(second["id"], "tie", "request-2").status == 200
    stored = [(answer.assignment_id, answer.choice, answer.seconds) for answer in Store.open(study[0].path).answers()]
    assert stored == [(first["id"], "left", 2.5), (second["id"], "tie", 2.5)]
    assert anna.get("/api/choices").json["choices"] == {first["id"]: "left", second["id"]: "tie"}


def test_an_answer_that_is_sent_again_is_stored_once_and_a_changed_one_is_added(study, anna):
    task = anna.study()["tasks"][0]["id"]
    for _ in range(3):
        assert anna.answer(task, "left", "request-1").status == 200
    assert anna.answer(task, "right", "request-2").status == 200
    assert [answer.choice for answer in study[0].answers()] == ["left", "right"]
    assert anna.study()["choices"] == {task: "right"}


def test_one_id_for_two_answers_is_refused(study, anna):
    first, second, _ = anna.study()["tasks"]
    anna.answer(first["id"], "left", "request-1")
    assert anna.answer(second["id"], "left", "request-1").status == 409
    assert len(study[0].answers()) == 1


@pytest.mark.parametrize(
    "field, value",
    [
        ("choice", "best"), ("choice", None), ("choice", ["left"]), ("choice", {"left": 1}),
        ("seconds", -1), ("seconds", 1e9), ("seconds", True), ("seconds", "3"), ("seconds", None),
        ("request_id", ""), ("request_id", "short"), ("request_id", "x" * 65), ("request_id", "a b c d e f g"),
        ("request_id", 12345678), ("request_id", None),
    ],
)  # fmt: skip
def test_answers_that_make_no_sense_are_refused(study, anna, field, value):
    task = anna.study()["tasks"][0]["id"]
    assert anna.answer(task, **{field: value}).status == 400
    assert study[0].answers() == []


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(study, anna, number):
    text = '{"assignment": "%s", "choice": "left", "seconds": %s, "request_id": "request-1"}'
    assert anna.post("/api/answer", (text % (anna.study()["tasks"][0]["id"], number)).encode()).status == 400
    assert study[0].answers() == []


def test_a_study_without_ties_takes_none(tmp_path):
    store, tokens = make_study(tmp_path / "study", allows_tie=False)
    with running(store) as server:
        anna = Client(server).sign_in(tokens["anna"])
        task = anna.study()["tasks"][0]["id"]
        assert not anna.study()["allows_tie"]
        assert (anna.answer(task, "tie").status, anna.answer(task, "skip").status) == (400, 200)


def test_the_samples_are_those_of_the_assignment(study, anna):
    rater = study[0].rater_of(study[1]["anna"])
    for assignment in study[0].assignments(rater.rater_id):
        for side, name in (("left", assignment.left_media), ("right", assignment.right_media)):
            content = anna.get(f"/media/{assignment.assignment_id}/{side}").content
            assert content == (study[0].media_folder / name).read_bytes()


def test_nothing_that_a_rater_receives_tells_models_or_what_a_pair_is_for(study, anna):
    """Names of models, of files, of pairs, of gold: in no answer, be it a page, a list, a file or an error."""
    tasks = [task["id"] for task in anna.study()["tasks"]]
    paths = ["/api/study", "/api/choices", "/api/none", "/media/none/left", *PAGES]
    paths += [f"/media/{task}/{side}" for task in tasks for side in ("left", "right", "middle")]
    answers = [anna.get(path) for path in paths] + [anna.answer(tasks[0]), anna.answer("none")]
    for answer in answers:
        said = answer.content.lower() + repr(answer.headers).lower().encode()
        for secret in (FIRST_MODEL, SECOND_MODEL, "gold", "mirror", "flipped", "00a.png", "00b.png", "pair-0"):
            assert secret.encode() not in said
    assert set(anna.study()["tasks"][0]) == {"id", "prompt", "category", "is_video"}
    assert anna.study()["names"] is None


def test_headers_of_samples_are_the_same_for_both_sides_and_all_pairs(anna):
    tasks = [task["id"] for task in anna.study()["tasks"]]
    found = [anna.get(f"/media/{task}/{side}").headers for task in tasks for side in ("left", "right")]
    for headers in found:
        headers.pop("Content-Length")  # of these pictures; `trl-sipo study build` makes those of a pair equal
    assert all(headers == found[0] for headers in found)
    assert found[0]["Content-Type"] == "application/octet-stream" and found[0]["Cache-Control"] == "no-store"
    assert not {"Last-Modified", "ETag", "Content-Disposition", "Date", "Server"} & set(found[0])


def test_what_is_anothers_is_answered_as_what_is_not_there(study, anna, ben):
    bens = ben.study()["tasks"][0]["id"]
    missing = "f" * len(bens)
    for side in ("left", "right"):
        theirs, none = anna.get(f"/media/{bens}/{side}"), anna.get(f"/media/{missing}/{side}")
        assert theirs == none and theirs.status == 404
    assert anna.answer(bens) == anna.answer(missing) and anna.answer(bens).status == 404
    ben.answer(bens, "right")
    assert anna.study()["choices"] == {} and anna.get("/api/choices").json["choices"] == {}
    assert [answer.rater.name for answer in study[0].answers()] == ["ben"]


def test_names_are_shown_where_a_study_is_not_blind(tmp_path):
    store, tokens = make_study(tmp_path / "study", is_blind=False)
    with running(store) as server:
        anna = Client(server).sign_in(tokens["anna"])
        told = anna.study()
        names = store.model_names(1)
    wanted = [list(names[task["id"]]) for task in told["tasks"]]
    assert told["names"] == wanted and set(wanted[0]) == {FIRST_MODEL, SECOND_MODEL}


def test_a_session_outlives_the_server(study):
    store, tokens = study
    with running(store) as server:
        anna = Client(server).sign_in(tokens["anna"])
    with running(store) as server:
        anna.server = server
        assert anna.answer(anna.study()["tasks"][0]["id"]).status == 200


def test_a_rater_who_is_invited_while_it_runs_can_take_part(study, server):
    token = study[0].invite("cora", 2)
    assert len(Client(server).sign_in(token).study()["tasks"]) == 3


def test_signing_out_takes_the_cookie_back(anna):
    answer = anna.post("/api/sign-out", {})
    assert answer.status == 200 and "Max-Age=0" in answer.headers["Set-Cookie"]


def test_many_raters_answer_at_once(tmp_path):
    names = [f"rater-{number}" for number in range(8)]
    store, tokens = make_study(tmp_path / "study", raters=names, num_pairs=6)

    def vote(name):
        rater = Client(server).sign_in(tokens[name])
        for number, task in enumerate(rater.study()["tasks"]):
            assert rater.get(f"/media/{task['id']}/left").status == 200
            assert rater.answer(task["id"], "right", f"request-{number}").status == 200

    with running(store) as server, ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(vote, names))
    assert all(store.progress(rater.rater_id) == (6, 6) for rater in store.raters())


def test_an_answer_that_cannot_be_stored_is_not_acknowledged(study, anna):
    task = anna.study()["tasks"][0]["id"]
    path = study[0].path
    path.rename(path.with_suffix(".away"))
    failed = anna.answer(task)
    assert failed.status == 503 and int(failed.headers["Retry-After"]) >= 1
    path.with_suffix(".away").rename(path)
    assert anna.answer(task).status == 200


def test_answers_too_often_are_told_when_to_come_again(study):
    store, tokens = study
    with running(store, limits=Limits(answers=(2, 0.01))) as server:
        anna = Client(server).sign_in(tokens["anna"])
        tasks = [task["id"] for task in anna.study()["tasks"]]
        answers = [anna.answer(task, request_id=f"request-{task}") for task in tasks]
        other = Client(server).sign_in(tokens["ben"])
        assert other.answer(other.study()["tasks"][0]["id"]).status == 200
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert 1 <= int(answers[2].headers["Retry-After"]) <= 101
    assert len(store.answers()) == 3


def test_a_file_that_is_being_sent_is_sent_to_its_end(tmp_path):
    store, tokens = make_study(tmp_path / "study")
    large = bytes(range(256)) * 2**16
    for file in store.media_folder.iterdir():
        file.write_bytes(large)
    with running(store) as server:
        anna = Client(server).sign_in(tokens["anna"])
        path = f"/media/{anna.study()['tasks'][0]['id']}/left"
        request = f"GET {path} HTTP/1.1\r\nHost: {anna.host}\r\nCookie: {anna.cookie}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(request.encode())
            received = bytearray(connection.recv(1000))
            server.shutdown()
            ending = threading.Thread(target=server.finish)
            ending.start()
            while part := connection.recv(2**20):
                received += part
            ending.join()
    assert received.endswith(large) and received.startswith(b"HTTP/1.1 200 OK")


def test_connections_that_wait_do_not_hold_up_the_end(study, server):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode())
        assert connection.recv(100)
        server.shutdown()
        assert server.finish()


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none_is_refused(study, port):
    with pytest.raises(ConfigurationError, match="--port"):
        make_server(study[0], Address(port=port))


@pytest.mark.parametrize("name", ["https://a.example", "a.example:80", "", "a b", "ä.example"])
def test_a_name_of_the_server_is_a_name(study, name):
    with pytest.raises(ConfigurationError, match="--allowed_host"):
        make_server(study[0], Address(port=0, names=(name,)))


def test_a_host_that_is_none_is_refused(study):
    """To the system it means every address."""
    with pytest.raises(ConfigurationError, match="`--host` is empty"):
        make_server(study[0], Address("", 0))


def test_a_port_that_is_taken_is_said(study, server):
    with pytest.raises(ConfigurationError, match=f"Cannot listen on 127.0.0.1 port {server.port}"):
        make_server(study[0], Address(port=server.port))


def test_it_listens_on_addresses_of_the_sixth_version_too(study):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no ::1")
    with running(study[0], address=Address("::1", 0)) as server:
        with socket.create_connection(("::1", server.port)) as connection:
            connection.sendall(f"GET / HTTP/1.1\r\nHost: [::1]:{server.port}\r\n\r\n".encode())
            assert connection.recv(15) == b"HTTP/1.1 200 OK"


def test_an_address_that_others_reach_is_warned_of():
    assert warning_of("127.0.0.1") is None and warning_of("localhost") is None and warning_of("::1") is None
    assert "WARNING" in warning_of("0.0.0.0") and "192.0.2.7" in warning_of("192.0.2.7")
    assert url_of("0.0.0.0", 80) == "http://127.0.0.1:80/" and url_of("::1", 80) == "http://[::1]:80/"


def test_the_key_of_sessions_is_its_owners_alone(study, server):
    key = study[0].path.parent / "server.key"
    assert key.stat().st_mode & 0o777 == 0o600 and len(key.read_bytes()) == 32
    assert sorted(path.name for path in key.parent.iterdir() if "sqlite-" not in path.name) == [
        "media", "server.key", STUDY_FILE,
    ]  # fmt: skip


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_study_that_cannot_be_written_is_not_served(study):
    """Else raters would answer, and nothing would ever be saved."""
    with running(study[0]):
        pass  # the key is there
    files = [path for path in study[0].path.parent.iterdir() if path.is_file()]
    for path in files:
        path.chmod(0o400)
    with pytest.raises(StorageError, match="cannot be written"):
        make_server(Store.open(study[0].path), Address(port=0))


def test_a_broken_key_is_said(study):
    (study[0].path.parent / "server.key").write_bytes(b"short")
    with pytest.raises(ConfigurationError, match="holds 5 bytes"):
        make_server(study[0], Address(port=0))
