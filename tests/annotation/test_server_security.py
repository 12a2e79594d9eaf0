# SPDX-License-Identifier: Apache-2.0
"""What others try: other sites, other names, forged sessions, paths, floods, and requests without end."""

import base64
import http.client
import json
import logging
import os
import resource
import socket
import struct
import time

import pytest

from tests.annotation.served import Client, make_study, running, wait_until
from trl_sipo.annotation.application import Limits
from trl_sipo.annotation.hosts import is_allowed_host, is_same_origin
from trl_sipo.annotation.messages import SECURITY_HEADERS
from trl_sipo.annotation.rate_limits import RateLimit, address_key
from trl_sipo.annotation.server import TransportLimits
from trl_sipo.annotation.serving import Address
from trl_sipo.annotation.sessions import LIFETIME, Sessions
from trl_sipo.annotation.store import Store

QUICK = TransportLimits(idle_seconds=0.4, read_seconds=0.4, answer_seconds=0.4, slowest_reader=2**30)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("served") / "study")


@pytest.fixture(scope="module")
def server(study):
    """Shared: its limits of attempts are wide, so that one test does not use them up for the next."""
    wide = (10_000, 100.0)
    with running(study[0], limits=Limits(sign_ins=wide, answers=wide, reads=wide)) as running_server:
        yield running_server


@pytest.fixture
def anna(server, study):
    return Client(server).sign_in(study[1]["anna"])


def raw(server, request: bytes) -> bytes:
    """All that comes back for some bytes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(request)
        received = b""
        while part := _received(connection):
            received += part
            if b"Connection: close" not in received and b"\r\n\r\n" in received:
                break
    return received


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(2**16)
    except ConnectionResetError:
        return b""


def first_task(client: Client) -> str:
    return client.study()["tasks"][0]["id"]


# ------------------------------------------------------------------------------------------------ other sites


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1:1", "192.0.2.1:{port}", "", "[::1",
             "127.0.0.1:{port}@evil.example", "localhost.evil.example:{port}", "127.0.0.1.evil.example:{port}"],
)  # fmt: skip
def test_other_names_are_not_answered_to(anna, host):
    """A page whose own name was pointed at this machine reads nothing (DNS rebinding)."""
    answer = anna.get("/api/study", Host=host.format(port=anna.server.port))
    assert answer.status == 421 and b"tasks" not in answer.content


def test_no_name_at_all_is_refused(server):
    assert b" 421 " in raw(server, b"GET / HTTP/1.1\r\n\r\n").splitlines()[0]
    assert b" 421 " in raw(server, b"GET /\r\n\r\n").splitlines()[0]


@pytest.mark.parametrize("host", ["localhost:{port}", "LOCALHOST:{port}", "[::1]:{port}", "127.0.0.1:{port}"])
def test_names_of_this_machine_are_answered_to(server, host):
    assert Client(server).get("/", Host=host.format(port=server.port)).status == 200


def test_a_given_name_is_answered_to_whatever_its_port(study):
    with running(study[0], address=Address(port=0, names=("Study.Example",))) as server:
        statuses = [
            Client(server).get("/", Host=host).status
            for host in ("study.example", "study.example:443", "STUDY.example.", "other.example")
        ]
    assert statuses == [200, 200, 200, 421]


def test_an_address_counts_if_the_connection_came_in_by_it():
    assert is_allowed_host("192.0.2.7:80", "192.0.2.7", 80, ())
    assert is_allowed_host("192.0.2.7", "::ffff:192.0.2.7", 80, ())
    assert not is_allowed_host("192.0.2.7:80", "127.0.0.1", 80, ())
    assert not is_allowed_host("127.0.0.1:80", "192.0.2.7", 80, ())


@pytest.mark.parametrize(
    "origin", [None, "null", "", "http://evil.example", "http://127.0.0.1:1", "http://127.0.0.1:{port}.evil.example",
               "http://evil.example/http://127.0.0.1:{port}", "ftp://127.0.0.1:{port}", "127.0.0.1:{port}",
               "http://user@127.0.0.1:{port}", "http://127.0.0.1:{port}/", "http://[::1"],
)  # fmt: skip
def test_pages_of_other_sites_change_nothing(study, anna, origin):
    sent = {"Origin": origin and origin.format(port=anna.server.port)}
    before = len(study[0].answers())
    value = {"assignment": first_task(anna), "choice": "left", "seconds": 1, "request_id": "request-evil"}
    assert anna.post("/api/answer", value, **sent).status == 403
    assert anna.post("/api/sign-in", {"token": study[1]["ben"]}, **sent).status == 403
    assert len(study[0].answers()) == before


def test_an_origin_is_the_same_with_and_without_encryption():
    assert is_same_origin("https://study.example", "study.example") and is_same_origin(
        "http://A.example:8", "a.example:8"
    )


@pytest.mark.parametrize("token", [None, "", "x" * 43, "é", "another's"])
def test_answers_need_the_pages_own_token(study, server, anna, token):
    other = Client(server).sign_in(study[1]["anna"])  # the same rater in another session
    given = other.csrf if token == "another's" else token
    before = len(study[0].answers())
    value = {"assignment": first_task(anna), "choice": "left", "seconds": 1, "request_id": "request-forged"}
    sent = given.encode().decode("latin-1") if given else given
    assert anna.post("/api/answer", value, X_CSRF_Token=sent).status == 403
    assert len(study[0].answers()) == before


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_what_a_form_could_send_is_refused(anna, kind):
    value = {"assignment": first_task(anna), "choice": "left", "seconds": 1, "request_id": "request-form"}
    assert anna.post("/api/answer", value, Content_Type=kind).status == 415


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"1", b"\xff", b"[" * 4000, b'{"token": ' + b"9" * 5000 + b"}"])
def test_bodies_that_are_no_object_are_refused(server, body):
    assert Client(server).post("/api/sign-in", body).status in (400, 401)


def test_methods_that_are_not_for_a_path_are_refused(server, anna):
    assert anna.get("/api/answer").status == 405
    assert anna.post("/", {}).status == 405
    assert anna.ask("PUT", "/api/answer", b"{}", {}).status == 501
    assert b" 501 " in raw(server, b"TRACE / HTTP/1.1\r\nHost: localhost\r\nCookie: secret\r\n\r\n").splitlines()[0]


# ------------------------------------------------------------------------------------------------ sessions


def test_cookies_are_out_of_reach_of_scripts_and_other_sites(study, server):
    client = Client(server)
    plain = client.post("/api/sign-in", {"token": study[1]["anna"]}).headers["Set-Cookie"]
    assert {"HttpOnly", "SameSite=Strict", "Path=/", f"Max-Age={LIFETIME}"} <= set(plain.split("; "))
    assert "Secure" not in plain and study[1]["anna"] not in plain
    encrypted = client.post("/api/sign-in", {"token": study[1]["anna"]}, Origin=f"https://{client.host}")
    assert encrypted.headers["Set-Cookie"].endswith("; Secure")


def test_without_a_session_nothing_is_told(server, anna):
    task = first_task(anna)
    stranger = Client(server)
    for path in ("/api/study", "/api/choices", f"/media/{task}/left", "/media/none/left"):
        assert stranger.get(path).status == 401
    assert stranger.answer(task).status == 401 and stranger.post("/api/sign-out", {}).status == 401
    assert stranger.get(f"/media/{task}/left") == stranger.get("/media/none/left")


def test_sessions_cannot_be_forged(study, server, anna):
    name, _, session = anna.cookie.partition("=")
    rater, expires, nonce, invitation, signature = session.split(".")
    other = base64.urlsafe_b64encode(b"2").decode().rstrip("=")
    late = str(int(expires) + 10**6)
    own_key = Sessions(bytes(32)).open(2, study[0].invitation(2))
    forged = [
        "", ".", "....", "é", f"{other}.{expires}.{nonce}.{invitation}.{signature}",
        f"{rater}.{late}.{nonce}.{invitation}.{signature}", f"{rater}.{expires}.{nonce}.{invitation}.",
        f"{rater}.{expires}.{nonce}.{invitation}", f"{rater}.{expires}.x.{invitation}.{signature}",
        f"{rater}.{expires}.{nonce}.x.{signature}", f"{rater}.{expires}.{nonce}.{signature}", own_key,
        f"{session}x", session[:-1],
    ]  # fmt: skip
    for value in forged:
        assert Client(server, cookie=f"{name}={value}".encode().decode("latin-1")).get("/api/study").status == 401, (
            value
        )


def test_sessions_end():
    now = [1000.0]
    sessions = Sessions(b"k" * 32, clock=lambda: now[0])
    session = sessions.open(7, "invitation")
    assert sessions.rater_id(session) == "7"
    now[0] += LIFETIME + 1
    assert sessions.rater_id(session) is None


def test_a_new_invitation_ends_the_sessions_of_the_earlier_one(tmp_path):
    """Whoever has got hold of a rater's token is locked out by another; nobody else is."""
    store, tokens = make_study(tmp_path / "study")
    with running(store) as server:
        stranger, ben = Client(server).sign_in(tokens["anna"]), Client(server).sign_in(tokens["ben"])
        task, token = first_task(stranger), Store.open(store.path).renew_token("anna")  # by another process
        assert [stranger.get(path).status for path in ("/api/study", f"/media/{task}/left")] == [401, 401]
        assert stranger.answer(task).status == 401 and store.answers() == []
        anna = Client(server).sign_in(token)
        assert anna.answer(task).status == 200 and ben.get("/api/study").status == 200
        assert anna.post("/api/sign-in", {"token": tokens["anna"]}).status == 401


def test_two_studies_on_one_machine_have_cookies_of_their_own():
    assert Sessions(b"a" * 32).cookie_name != Sessions(b"b" * 32).cookie_name


def test_a_session_of_another_study_is_none(tmp_path, anna):
    store, _ = make_study(tmp_path / "other")
    with running(store) as server:
        name = server.application.sessions.cookie_name
        assert Client(server, cookie=f"{name}={anna.cookie.partition('=')[2]}").get("/api/study").status == 401


def test_guessing_invitations_is_slowed_down(study):
    with running(study[0], limits=Limits(sign_ins=(3, 0.001))) as server:
        client = Client(server)
        good = {"token": study[1]["anna"]}
        wrong = [{"token": "0" * 32}, {"token": ""}, {"token": 5}, {"token": "1" * 32}]
        statuses = [client.post("/api/sign-in", value).status for value in (good, good, *wrong, good)]
        refused = client.post("/api/sign-in", good)
        elsewhere = _sign_in_from("127.0.0.2", client, good)
    assert statuses == [200, 200, 401, 401, 401, 429, 429]
    assert refused.status == 429 and 1 <= int(refused.headers["Retry-After"]) <= 1001
    assert elsewhere == 200


def _sign_in_from(address: str, client: Client, value: dict) -> int:
    source = (address, 0)
    connection = http.client.HTTPConnection("127.0.0.1", client.server.port, timeout=20, source_address=source)
    headers = {"Host": client.host, "Origin": f"http://{client.host}", "Content-Type": "application/json"}
    connection.request("POST", "/api/sign-in", json.dumps(value), headers)
    status = connection.getresponse().status
    connection.close()
    return status


def test_reading_too_often_is_told_when_to_come_again(study):
    with running(study[0], limits=Limits(reads=(2, 0.01))) as server:
        client = Client(server).sign_in(study[1]["anna"])
        answers = [client.get("/api/choices") for _ in range(2)]
    assert [answer.status for answer in answers] == [200, 429] and int(answers[1].headers["Retry-After"]) >= 1


# ------------------------------------------------------------------------------------------------ paths and headers


@pytest.mark.parametrize(
    "path", ["/study.sqlite", "/../study.sqlite", "/media/../study.sqlite", "/media/%2e%2e/left", "/server.key",
             "/media/..%2fstudy/left", "/media/{task}/../../study.sqlite", "/media/{task}/left/..", "/%61pp.js",
             "/media/{task}/%6ceft", "/media/{task}/left/", "/media/{task}/LEFT", "/media/{task}//left", "/media/",
             "//media/{task}/left/x", "/media/{task}%00/left", "/media/{task}/left%0d%0aSet-Cookie:%20a=b",
             "/app.js/", "/assets/app.js", "/api/", "/api/study/", f"/media/{'a' * 65}/left"],
)  # fmt: skip
def test_paths_lead_nowhere_else(study, anna, path):
    found = anna.get(path.format(task=first_task(anna)))
    assert (found.status, found.json) == (404, {"error": "There is nothing here."})
    assert found == anna.get("/nothing")


def test_the_whole_address_is_no_path(anna):
    assert anna.get(f"http://{anna.host}/api/study").status == 400


def test_links_out_of_the_media_folder_are_not_followed(tmp_path, caplog):
    store, tokens = make_study(tmp_path / "study")
    (tmp_path / "secret").write_bytes(b"secret")
    for file in store.media_folder.iterdir():
        file.unlink()
        file.symlink_to(tmp_path / "secret")
    with running(store) as server:
        anna = Client(server).sign_in(tokens["anna"])
        answer = anna.get(f"/media/{first_task(anna)}/left")
    assert answer.status == 404 and "leads out of its folder" in caplog.text


def test_every_answer_carries_the_headers_of_safety(anna):
    task = first_task(anna)
    answers = [
        anna.get(path) for path in ("/", "/app.js", "/api/study", f"/media/{task}/left", "/none", "/api/answer")
    ]
    answers += [anna.post("/api/answer", {}), anna.post("/api/answer", b"{"), anna.get("/", Host="evil.example")]
    answers += [anna.ask("POST", "/", b"x" * 10**4, {}), anna.ask("PATCH", "/", b"", {})]
    assert {answer.status for answer in answers} == {200, 400, 404, 405, 413, 421, 501}
    for answer in answers:
        assert SECURITY_HEADERS.items() <= answer.headers.items()
    policy = SECURITY_HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy


def test_nothing_of_a_request_comes_back(server):
    """Neither in headers (line breaks) nor in texts (markup)."""
    mark = "<script>x</script>"
    requests = [
        f"GET /{mark} HTTP/1.1\r\nHost: localhost:{server.port}\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: {mark}\r\n\r\n",
        f"{mark} / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        f"GET / {mark}\r\n\r\n",
        f"GET /\x0dSet-Cookie:{mark} HTTP/1.1\r\nHost: localhost:{server.port}\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: localhost:{server.port}\r\n{mark}: {mark}\r\nCookie: a={mark}\r\n\r\n",
    ]
    for request in requests:
        answer = raw(server, request.encode())
        assert answer.startswith(b"HTTP/1.1 ") and b"<script>x" not in answer and b"Set-Cookie" not in answer


def test_logs_hold_neither_tokens_nor_cookies(study, server, caplog):
    caplog.set_level(logging.DEBUG, logger="trl_sipo.annotation")
    token = study[1]["anna"]
    client = Client(server).sign_in(token)
    client.answer(first_task(client))
    client.get(f"/{token}")
    client.get(f"/?token={token}")
    client.get("/", Host=f"{token[:4]}\x1b[2J.example")
    Client(server, cookie=client.cookie).post("/api/sign-in", {"token": token + "0"})
    assert "POST /api/sign-in 401" in caplog.text and "(no such path)" in caplog.text and "signed in" in caplog.text
    for secret in (token, client.cookie.partition("=")[2], client.csrf, first_task(client), "\x1b"):
        assert secret not in caplog.text


# ------------------------------------------------------------------------------------------------ requests without end


def test_requests_that_are_too_long_are_refused(anna, server):
    assert anna.ask("POST", "/api/answer", b"x" * 8193, {}).status == 413
    assert b" 431 " in raw(server, b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 4000).splitlines()[0]
    assert b" 431 " in raw(server, b"GET /" + b"a" * 20000).splitlines()[0]
    head = f"POST /api/answer HTTP/1.1\r\nHost: {anna.host}\r\nContent-Length: ".encode()
    for length in (b"99999999999999999999", b"8193", b"1000000000"):
        assert b" 413 " in raw(server, head + length + b"\r\n\r\n").splitlines()[0]


@pytest.mark.parametrize(
    "lines", [["Transfer-Encoding: chunked"], ["Content-Length: 5", "Content-Length: 6"], ["Content-Length: -1"],
              ["Content-Length: +5"], ["Content-Length: 5, 5"], ["Content-Length: \u00b2"], ["Host: evil.example"],
              ["Content-Length: 4", "Transfer-Encoding: identity"], ["Expect: 100-continue"],
              ["Content-Length : 5"], ["Transfer-Encoding : chunked"], ["Accept: a", " Content-Length: 5"],
              ["no header"]],
)  # fmt: skip
def test_requests_that_can_be_read_in_two_ways_are_refused(server, lines):
    """By which one request is smuggled past a proxy within another."""
    head = [
        "POST /api/sign-in HTTP/1.1",
        f"Host: localhost:{server.port}",
        *lines,
        "",
        "GET /api/study HTTP/1.1",
        "",
        "",
    ]
    answer = raw(server, "\r\n".join(head).encode("latin-1"))
    assert answer.split()[1] in (b"400", b"417") and answer.count(b"HTTP/1.1 ") == 1 and b"Connection: close" in answer


def test_a_page_is_not_asked_for_with_a_body(server):
    request = f"GET / HTTP/1.1\r\nHost: localhost:{server.port}\r\nContent-Length: 20\r\n\r\nGET /x HTTP/1.1\r\n\r\n"
    answer = raw(server, request.encode())
    assert b" 400 " in answer.splitlines()[0] and answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    "beginning", ["", "GET / HT", "GET / HTTP/1.1\r\nA: ", "POST / HTTP/1.1\r\nContent-Length: 50\r\n\r\n"]
)
def test_slow_requests_are_cut_off(study, beginning):
    """Byte after byte, each of them in time, and never the whole (slowloris)."""
    with running(study[0], transport=QUICK) as server:
        head = beginning.replace("\r\nC", f"\r\nHost: localhost:{server.port}\r\nC").encode()
        with socket.create_connection(("127.0.0.1", server.port), timeout=0.05) as connection:
            connection.sendall(head)
            end = time.monotonic() + 30
            while _is_open(connection):
                assert time.monotonic() < end, "it is still listened to"
                if beginning:
                    connection.sendall(b"a")
        assert Client(server).get("/").status == 200


def _is_open(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) != b""
    except TimeoutError:
        return True
    except (ConnectionResetError, BrokenPipeError):
        return False


def test_answers_that_nobody_takes_are_given_up(tmp_path):
    store, tokens = make_study(tmp_path / "study")
    for file in store.media_folder.iterdir():
        os.truncate(file, 2**25)
    with running(store, transport=QUICK) as server:
        anna = Client(server).sign_in(tokens["anna"])
        request = f"GET /media/{first_task(anna)}/left HTTP/1.1\r\nHost: {anna.host}\r\nCookie: {anna.cookie}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(request.encode())
            assert connection.recv(12) == b"HTTP/1.1 200"
            wait_until(lambda: not server.num_connections)
            received = 0
            while part := _received(connection):
                received += len(part)
    assert received < 2**25


def test_a_request_that_is_too_long_and_gone_is_nothing_to_log(server, caplog):
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closed by a reset
            connection.sendall(b"GET /" + b"a" * 20000)
    wait_until(lambda: not server.num_connections)
    assert Client(server).get("/").status == 200 and "A connection failed" not in caplog.text


def test_many_connections_find_files_to_open(study):
    """Each costs several; systems let a process have 256 or 1024 of them, unless it asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 100, hard))
    held = []
    try:
        with running(study[0]) as server:
            anna = Client(server).sign_in(study[1]["anna"])
            request = f"GET /api/choices HTTP/1.1\r\nHost: {anna.host}\r\nCookie: {anna.cookie}\r\n\r\n".encode()
            for _ in range(60):
                held.append(socket.create_connection(("127.0.0.1", server.port), timeout=20))
                held[-1].sendall(request)
                assert held[-1].recv(15) == b"HTTP/1.1 200 OK"
    finally:
        for connection in held:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_are_counted(study):
    few = TransportLimits(connections=3, connections_per_address=2)
    with running(study[0], transport=few) as server:
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        wait_until(lambda: server.num_connections == 2)
        with socket.create_connection(("127.0.0.1", server.port)) as refused:
            assert refused.recv(2**16).startswith(b"HTTP/1.1 503 ") and refused.recv(1) == b""
        with socket.create_connection(("127.0.0.1", server.port), source_address=("127.0.0.2", 0)) as other:
            other.sendall(f"GET / HTTP/1.1\r\nHost: localhost:{server.port}\r\n\r\n".encode())
            assert other.recv(15) == b"HTTP/1.1 200 OK"
        for connection in held:
            connection.close()
        wait_until(lambda: not server.num_connections)
        assert Client(server).get("/").status == 200


def test_a_limit_counts_and_fills_up_again():
    now = [0.0]
    limit = RateLimit(2, 0.5, clock=lambda: now[0])
    assert [limit.take("a"), limit.take("a"), limit.take("a"), limit.take("b")] == [0.0, 0.0, 2.0, 0.0]
    now[0] = 1.0
    assert limit.take("a") == 1.0
    now[0] = 2.0
    assert limit.take("a") == 0.0 and limit.take("a") == 2.0
    now[0] = 1000.0
    assert [limit.take("a"), limit.take("a")] == [0.0, 0.0] and limit.take("a") > 0
    limit.give_back("a")
    assert limit.take("a") == 0.0


def test_a_limit_forgets_the_oldest():
    limit = RateLimit(1, 0.001, max_keys=3, clock=lambda: 0.0)
    for key in range(1000):
        assert limit.take(key) == 0.0
    assert len(limit._buckets) == 3 and limit.take(999) > 0


def test_addresses_of_one_network_are_one():
    assert address_key("2001:db8::1") == address_key("2001:db8::ffff:1") != address_key("2001:db8:0:1::1")
    assert address_key("::ffff:192.0.2.1") == address_key("192.0.2.1") != address_key("192.0.2.2")
    assert address_key("fe80::1%eth0") == address_key("fe80::2")
