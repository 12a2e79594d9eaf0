# SPDX-License-Identifier: Apache-2.0
"""Who is signed in: cookies that carry the rater and a signature, so that a restart of the server ends no session."""

import base64
import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from trl_sipo.errors import ConfigurationError, StorageError

KEY_FILE = "server.key"
LIFETIME = 30 * 24 * 3600  # seconds, after which a rater signs in again
_KEY_BYTES = 32
_PARTS = 5


class Sessions:
    """Signed sessions of raters.

    A session is the text `rater.expires.nonce.invitation.signature`. Nothing of it is kept here: whoever has the key
    can check it. The invitation is a keyed digest of the one by which the rater signed in: a new one ends the session.
    The signature is an HMAC-SHA256; a session's CSRF token is another one, of the same text for another purpose.

    Args:
        key: Secret bytes, of `read_key`.
        clock: Seconds since the epoch.
    """

    def __init__(self, key: bytes, *, clock: Callable[[], float] = time.time):
        self._key, self._clock = key, clock
        # Cookies are shared by all ports of a host: two studies at once must not overwrite each other's.
        self.cookie_name = f"study_{self._signature('name', '')[:8]}"

    def open(self, rater_id: int | str, invitation: str) -> str:
        """A new session, as the value of its cookie.

        Args:
            rater_id: Whose.
            invitation: Digest of the rater's token, see [`Store.invitation`].
        """
        rater = base64.urlsafe_b64encode(str(rater_id).encode()).decode().rstrip("=")
        mark = self._signature("invitation", invitation)
        text = f"{rater}.{int(self._clock()) + LIFETIME}.{secrets.token_urlsafe(12)}.{mark}"
        return f"{text}.{self._signature('session', text)}"

    def rater_id(self, session: str) -> str | None:
        """Whose session it is; None when it is forged, broken or too old."""
        text, _, signature = session.rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._signature("session", text).encode()):
            return None
        parts = text.split(".")
        if len(parts) != _PARTS - 1 or int(parts[1]) < self._clock():
            return None
        return base64.urlsafe_b64decode(parts[0] + "=" * (-len(parts[0]) % 4)).decode()

    def is_of_invitation(self, session: str, invitation: str) -> bool:
        """Whether a session, which is known to be none that is forged, was opened by this invitation."""
        mark = session.split(".")[_PARTS - 2]
        return hmac.compare_digest(mark.encode(), self._signature("invitation", invitation).encode())

    def csrf_token(self, session: str) -> str:
        """What a page of this session must send along with what it changes."""
        return self._signature("csrf", session)

    def is_csrf_token(self, session: str, token: str) -> bool:
        """Whether a token is the session's, in a time that does not tell how much of it is right."""
        return hmac.compare_digest(token.encode(), self.csrf_token(session).encode())

    def _signature(self, purpose: str, text: str) -> str:
        digest = hmac.new(self._key, f"{purpose}:{text}".encode(), hashlib.sha256).digest()
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def read_key(folder: Path) -> bytes:
    """The key of a study's sessions; made at the first call, for the user's eyes alone, and whole or not there.

    To end all sessions, delete the file while the server is down.

    Raises:
        ConfigurationError: The file is not a key.
        StorageError: It can be neither read nor written.
    """
    path = folder / KEY_FILE
    try:
        if not path.exists():
            _write_key(path)
        key = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path} cannot be read or written: {error.strerror}.") from error
    if len(key) != _KEY_BYTES:
        raise ConfigurationError(
            f"{path} holds {len(key)} bytes, and a key has {_KEY_BYTES}: delete it, and the raters sign in again."
        )
    return key


def _write_key(path: Path) -> None:
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        pass  # another server of the same study was first: its key is the key
    finally:
        os.unlink(temporary)
