# SPDX-License-Identifier: Apache-2.0
"""From a study to a server that runs until it is told to stop."""

import logging
import signal
import sys
import threading
from dataclasses import dataclass

from trl_sipo.annotation.application import Application, Limits
from trl_sipo.annotation.hosts import is_loopback, is_name
from trl_sipo.annotation.records import Rater
from trl_sipo.annotation.server import AnnotationServer, TransportLimits
from trl_sipo.annotation.sessions import Sessions, read_key
from trl_sipo.annotation.store import Store
from trl_sipo.errors import ConfigurationError

try:
    import resource
except ImportError:  # Windows, which does not count them
    resource = None

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8420
_HIGHEST_PORT = 65535
_FILES_PER_CONNECTION = 4  # itself, two of its thread's database, a sample
_FILES_BESIDES = 256
_EVERY_ADDRESS = ("0.0.0.0", "::")


@dataclass(frozen=True)
class Address:
    """Where to listen, and under which names to be asked for.

    Args:
        host: An address or a name of this machine.
        port: 0 takes a free one.
        names: Under which it is reached beside that, as through a proxy.
    """

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    names: tuple[str, ...] = ()


def check_address(address: Address) -> None:
    """Raise [`ConfigurationError`] on a host, a port or names that cannot be."""
    if not address.host:
        raise ConfigurationError("`--host` is empty. Give an address; 0.0.0.0 means all of this machine.")
    if not 0 <= address.port <= _HIGHEST_PORT:
        raise ConfigurationError(f"`--port` must be from 0 (a free one) to {_HIGHEST_PORT}, got {address.port}.")
    for name in address.names:
        if not name or not name.isascii() or any(mark in name for mark in "/:@ "):
            raise ConfigurationError(
                f"`--allowed_host` takes the name alone, such as study.example.org, without port and https://; got "
                f"{name!r}."
            )


def make_server(
    store: Store,
    address: Address,
    *,
    limits: Limits | None = None,
    transport: TransportLimits | None = None,
) -> AnnotationServer:
    """A server of a study, which listens already, and answers as soon as it is run.

    Args:
        limits, transport: What is allowed; as good for a study of some hundred raters, if not given.

    Raises:
        ConfigurationError: It cannot listen there.
        StorageError: The study cannot be written, or the key of the sessions neither be read nor written.
    """
    store.check_writable()
    key = read_key(store.path.parent)
    server = _listening(address, transport)
    _allow_files(server.limits.connections)
    names = (*address.names, address.host) if is_name(address.host) else address.names
    host_names = frozenset(name.lower() for name in names)
    server.application = Application(store, Sessions(key), server.port, host_names=host_names, limits=limits)
    return server


def _allow_files(connections: int) -> None:
    """Let this process open the files that so many connections need, as far as the system lets it."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES_PER_CONNECTION * connections + _FILES_BESIDES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_listening(address: Address) -> None:
    """Raise [`ConfigurationError`] where a server could not listen now: for what takes long before it is one."""
    _listening(address, None).server_close()


def _listening(address: Address, transport: TransportLimits | None) -> AnnotationServer:
    check_address(address)
    try:
        return AnnotationServer(address.host, address.port, transport)
    except OSError as error:
        raise ConfigurationError(
            f"Cannot listen on {address.host} port {address.port}: {error.strerror or error}. Give another `--port` "
            "(0 takes a free one), and a `--host` of this machine."
        ) from error


def url_of(host: str, port: int) -> str:
    """What to type into a browser on this machine."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{shown}]:{port}/" if ":" in shown else f"http://{shown}:{port}/"


def warning_of(host: str) -> str | None:
    """What to say of a host that others can reach."""
    if is_loopback(host):
        return None
    who = "every network that this machine is in" if host in _EVERY_ADDRESS else f"whoever can reach {host}"
    return (
        f"WARNING: open to {who}, without encryption: invitations, pictures and answers can be read on the way. "
        "Better: listen on 127.0.0.1, behind a proxy that speaks HTTPS (`--allowed_host NAME`) or `ssh -L`."
    )


def run_until_stopped(server: AnnotationServer) -> bool:
    """Answer requests until SIGTERM or Ctrl-C; then finish those that were begun.

    A second Ctrl-C does not wait for them. Only the main thread may call this.

    Returns:
        Whether all that was begun was finished in time.
    """
    stop = threading.Event()

    def serve() -> None:
        try:
            server.serve_forever(poll_interval=0.1)
        finally:
            stop.set()

    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    thread = threading.Thread(target=serve, name="annotation server", daemon=True)
    try:
        thread.start()
        stop.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    server.shutdown()
    thread.join()
    return server.finish()


def progress_of(store: Store) -> list[tuple[Rater, int, int]]:
    """Of each rater how many pairs are decided, and how many there are."""
    return [(rater, *store.progress(rater.rater_id)) for rater in store.raters()]


def log_to_terminal(*, requests: bool) -> None:
    """Print what the server logs: sign-ins and what goes wrong; of each request a line too, if `requests`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    package = logging.getLogger("trl_sipo.annotation")
    package.addHandler(handler)
    package.setLevel(logging.DEBUG if requests else logging.INFO)
    package.propagate = False
