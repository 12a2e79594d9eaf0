# SPDX-License-Identifier: Apache-2.0
"""Reading media again where the file system fails, and telling that from media that are broken."""

import time
from collections.abc import Callable
from typing import Any

from trl_sipo.data.stored import access_error
from trl_sipo.errors import ConfigurationError, DatasetError, MediaAccessError

# A server that restarts, or a connection that is made anew, answers within these.
SECONDS_BETWEEN_ATTEMPTS = (1, 5, 25)


def attempt(read: Callable[[], Any], where: str) -> Any:
    """What `read` gives, after some attempts where the file system fails, or the error that says what is wrong.

    The error is returned: one that is raised in a data loader's worker comes out of it as the text of a traceback.
    """
    failure = None
    for seconds in (0, *SECONDS_BETWEEN_ATTEMPTS):
        time.sleep(seconds)
        try:
            return read()
        except MediaAccessError as error:
            failure = error
        except OSError as error:
            failure = access_error(error, where)
        except (DatasetError, ConfigurationError) as error:
            return error
    return failure


def is_broken(found: Any) -> bool:
    """Whether what `attempt` gave says that the row is at fault, and not the file system or a setting."""
    return isinstance(found, DatasetError) and not isinstance(found, MediaAccessError)
