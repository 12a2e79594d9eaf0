# SPDX-License-Identifier: Apache-2.0
"""Settings in YAML: read by the safe loader, with numbers as people write them, and nothing dropped or blown up."""

import itertools
import re
from pathlib import Path
from typing import Any

import yaml

from trl_sipo.errors import ConfigurationError

_MOST_SETTINGS = 100_000


class _Loader(yaml.SafeLoader):
    """YAML's own, which of two values under one key would drop the first without a word, and take 1e-5 for a text."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Raise ValueError when a key stands twice; on the text as it is, before `<<` adds keys of other places."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    raise ValueError(f"the key {key.value!r:.80} stands twice, in lines {lines[name]} and {line}")
                lines[name] = line
        return node


# The numbers of YAML 1.2.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"), list("-+.0123456789")
)


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds.

    Raises:
        ConfigurationError: It cannot be read, is no YAML, has a key twice, or stands for more than settings can be.
    """
    try:
        return parse_yaml(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"The configuration file {str(path)!r} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"The configuration file {str(path)!r} is not valid YAML: {error}") from error


def parse_yaml(text: str) -> Any:
    """What a text of YAML holds.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: It is none; see [`read_yaml`].
    """
    content = _Loader(text).get_single_data()
    _check_size(content)
    return content


def _check_size(content: Any) -> None:
    """Raise ValueError when references to references (`*name`) stand for more than a file of settings can hold."""
    values = [content]
    for count in itertools.count():
        if not values:
            return
        if count > _MOST_SETTINGS:
            raise ValueError(f"it holds more than {_MOST_SETTINGS} values")
        value = values.pop()
        values.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
