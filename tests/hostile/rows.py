# SPDX-License-Identifier: Apache-2.0
"""Prompts, labels and latents of whatever kind. A case gives the cell itself."""

from typing import Any

from tests.hostile.cases import Case


def _cell(value: Any) -> Any:
    return lambda folder: value


def _nested(*numbers: Any) -> list[Any]:
    """Latents of 1 x 2 x 2 numbers, of which these are the last."""
    return [[[0.0, 0.0], [0.0, *numbers]]]


AS_IT_IS = "as it is; errors and reports show such characters escaped"

PROMPTS = [
    Case("no text", _cell(""), "the prompt is empty"),
    Case("blanks and line ends alone", _cell(" \t\n\u2003"), "the prompt is empty"),
    Case("null", _cell(None), "expected a string or a conversation, found NoneType"),
    Case("a number", _cell(7), "expected a string or a conversation, found int"),
    Case("bytes", _cell(b"a cat"), "expected a string or a conversation, found bytes"),
    Case("a conversation without a user", _cell([{"role": "assistant", "content": "a"}]), "the prompt is empty"),
    Case(
        "an image within a conversation",
        _cell([{"role": "user", "content": [{"type": "image"}]}]),
        "prompts are text only",
    ),
    Case("half of a character (a lone surrogate)", _cell("a cat \ud83d"), "has half of a character at position 6"),
    Case("a million characters", _cell("cat " * 250_000), "the prompt has 1000000 characters"),
    Case("a zero byte", _cell("a\0cat"), taken="as it is"),
    Case("control characters", _cell("a \x07\x1b[31m\x7fcat"), taken=AS_IT_IS),
    Case("marks that turn the direction of writing", _cell("a \u202ecat\u202c"), taken=AS_IT_IS),
    Case("HTML", _cell("<script>alert(1)</script>"), taken="as it is; reports show it as text"),
    Case("a thousand combining accents", _cell("a cat" + "\u0301" * 1000), taken="as it is"),
    Case(
        "ten thousand letters without a blank", _cell("a" * 10_000), taken="as it is; text encoders read its beginning"
    ),
]

LABELS = [
    Case("1.5", _cell(1.5), "a number in [0, 1]"),
    Case("-1", _cell(-1.0), "a number in [0, 1]"),
    Case("infinity", _cell(float("inf")), "a number in [0, 1]"),
    Case("a word", _cell("first"), "a number in [0, 1]"),
    Case("a whole number of 400 digits", _cell(10**400), "a number in [0, 1]"),
    Case("NaN", _cell(float("nan")), taken="dropped and counted, as a row that nobody has judged"),
    Case("null", _cell(None), taken="dropped and counted, as a row that nobody has judged"),
]

LATENTS = [
    Case("NaN", _cell(_nested(float("nan"))), "hold values that are not finite"),
    Case("infinity", _cell(_nested(float("inf"))), "hold values that are not finite"),
    Case("beyond float32", _cell(_nested(1e300)), "hold values that are not finite"),
    Case("a whole number of 400 digits", _cell(_nested(10**400)), "are no regular array of numbers"),
    Case("rows of unequal length", _cell(_nested()), "are no regular array of numbers"),
    Case("words", _cell([[["a", "b"], ["c", "d"]]]), "are no regular array of numbers"),
    Case("none", _cell([]), "are empty"),
    Case("null", _cell(None), "are empty, or hold values that are not finite"),
    Case("arms of unequal shape", _cell([[[0.0] * 4] * 4]), "differ in shape"),
]
