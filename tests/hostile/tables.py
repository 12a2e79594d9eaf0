# SPDX-License-Identifier: Apache-2.0
"""Tables of whatever kind: a case writes one, and gives its path."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.pictures import encoded, picture
from tests.hostile.cases import Case
from tests.hostile.media import good_image

ROW = {"prompt": "a cat", "chosen": "good.png", "rejected": "other.png"}
_DEEP = "[" * 100_000 + "]" * 100_000
_TWICE = '{"prompt": "a cat", "chosen": "good.png", "rejected": "other.png", "chosen": "third.png"}'


def _table(name: str, content: Any) -> Any:
    """A table beside two pictures."""

    def write(folder: Path) -> Path:
        good_image(folder)
        good_image(folder, "other.png")
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def _lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _path(path: str) -> Any:
    """A table whose second row names a picture that is there, by this path."""

    def write(folder: Path) -> Path:
        good_image(folder.parent, "secret.png")
        named = path.replace("{elsewhere}", str(folder.parent.resolve()))
        return _table("train.jsonl", _lines(ROW, {**ROW, "chosen": named}))(folder)

    return write


def _behind_a_link(folder: Path) -> Path:
    (folder.parent / "elsewhere" / "below").mkdir(parents=True)
    good_image(folder.parent / "elsewhere", "secret.png")
    (folder / "link").symlink_to(folder.parent / "elsewhere" / "below")
    return _table("train.jsonl", _lines(ROW, {**ROW, "chosen": "link/../secret.png"}))(folder)


def _struct(folder: Path) -> Path:
    """As `datasets` stores an image: a place for bytes, which is empty, and a path."""
    secret = good_image(folder.parent, "secret.png")
    image = {"bytes": None, "path": str(folder.parent / secret)}
    table = pa.table({"prompt": ["a cat"], "chosen": [image], "rejected": [image]})
    kind = {name: {"_type": "Image"} for name in ("chosen", "rejected")}
    features = {"prompt": {"dtype": "string", "_type": "Value"}, **kind}
    pq.write_table(
        table.cast(_typed_struct(table.schema)).replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        ),
        folder / "train.parquet",
    )
    return folder / "train.parquet"


def _typed_struct(schema: pa.Schema) -> pa.Schema:
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.schema([(field.name, field.type if field.name == "prompt" else image) for field in schema])


def _parquet(columns: dict[str, Any], keep: float = 1.0) -> Any:
    def write(folder: Path) -> Path:
        pq.write_table(pa.table(columns), folder / "train.parquet", compression="none")
        content = (folder / "train.parquet").read_bytes()
        (folder / "train.parquet").write_bytes(content[: int(len(content) * keep)])
        return folder / "train.parquet"

    return write


def _no_text() -> pa.Array:
    """A column of strings that are no UTF-8."""
    return pa.array([b"\xff\xfe cat"]).view(pa.string())


def _folder(*lines: str) -> Any:
    """Folders `chosen`, `rejected` and their metadata."""

    def write(folder: Path) -> Path:
        for arm in ("chosen", "rejected"):
            (folder / arm).mkdir()
            good_image(folder / arm)
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        return folder

    return write


def _member(name: str, kind: bytes = tarfile.REGTYPE, says: int = 0, key: str = "0") -> Any:
    """A shard with a whole row of this key, and one member more."""

    def write(folder: Path) -> Path:
        files = {f"jpg_{arm}.jpg": encoded(picture(arm), "JPEG") for arm in (0, 1)}
        with tarfile.open(folder / "train.tar", "w") as tar:
            for file, content in {"original_prompt.txt": b"a cat", "label_0.txt": b"1", **files}.items():
                entry = tarfile.TarInfo(f"{key}.{file}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.size = kind, "/etc/passwd", says
            tar.addfile(entry)
        return folder / "train.tar"

    return write


_ARMS = {"chosen": ["good.png"], "rejected": ["other.png"]}
_OUT = "leads out of"
_DEEP_LINE = json.dumps(ROW)[:-1] + ', "more": ' + _DEEP + "}"

TABLES = [
    Case("a path with `..` that leads out of the table's folder", _path("../secret.png"), _OUT),
    Case("an absolute path to elsewhere", _path("{elsewhere}/secret.png"), _OUT),
    Case("`..` behind a link that leads elsewhere", _behind_a_link, _OUT),
    Case("such a path in a Parquet file, beside empty bytes", _struct, _OUT),
    Case("a path with `..` that stays inside", _path("../data/good.png"), taken="read"),
    Case("a line of JSON of 10 MB", _table("train.jsonl", _lines({**ROW, "note": "x" * 10_000_000})), taken="read"),
    Case(
        "a line of JSON that is 100,000 lists deep",
        _table("train.jsonl", _DEEP_LINE),
        "lie more than 100 deep within one another",
    ),
    Case("a JSON list so deep", _table("train.json", f"[{_DEEP_LINE}]"), "lie more than 100 deep within one another"),
    Case("a key that stands twice in a line of JSON", _table("train.jsonl", _TWICE), "was specified twice"),
    Case("a key that stands twice in a JSON list", _table("train.json", f"[{_TWICE}]"), "'chosen' stands twice"),
    Case("JSON cut off in the middle of a row", _table("train.jsonl", _lines(ROW, ROW)[:-20]), "JSON parse error"),
    Case(
        "a JSON list that is cut off",
        _table("train.json", json.dumps([ROW, ROW])[:-20]),
        "the list is broken or cut off",
    ),
    Case(
        "JSON that is no UTF-8",
        _table("train.jsonl", _lines(ROW).replace("cat", "\xe9").encode("latin-1")),
        "is no UTF-8 text",
    ),
    Case(
        "half of a character in JSON",
        _table("train.jsonl", _lines({**ROW, "prompt": "\ud83d"})),
        "surrogate pair in string is invalid",
    ),
    Case(
        "a CSV with more cells than its header",
        _table("train.csv", "prompt,chosen,rejected\na,b,c,d\n"),
        "more cells than the header",
    ),
    Case(
        "a CSV with a quotation mark that never ends",
        _table("train.csv", 'prompt,chosen,rejected\n"a,b,c\n'),
        "EOF inside string",
    ),
    Case("no bytes", _table("train.jsonl", b""), "holds no rows"),
    Case("Parquet that is cut off", _parquet({"prompt": ["a cat"], **_ARMS}, keep=0.6), "cannot read"),
    Case(
        "Parquet of other columns",
        _parquet({"text": ["a cat"], "picture": ["good.png"]}),
        "no preference data that is known here",
    ),
    Case(
        "Parquet with arms that are numbers",
        _parquet({"prompt": ["a cat"], "chosen": [1], "rejected": [2]}),
        "expected an image",
    ),
    Case("Parquet with text that is no UTF-8", _parquet({"prompt": _no_text(), **_ARMS}), "is no UTF-8"),
    Case(
        "metadata of folders with `..` in an id",
        _folder('{"id": "../chosen/good.png", "prompt": "a"}'),
        taken="its last part is the id: it is looked up among the files of the folders",
    ),
    Case(
        "metadata that names an id twice",
        _folder(*['{"id": "good", "prompt": "a"}'] * 2),
        "names an id more than once",
    ),
    Case(
        "metadata with a key that stands twice",
        _folder('{"id": "good", "prompt": "a", "prompt": "b"}'),
        "'prompt' stands twice",
    ),
    Case(
        "metadata that is 100,000 lists deep",
        _folder('{"id": "good", "prompt": ' + _DEEP + "}"),
        "lie more than 100 deep within one another",
    ),
    Case("a tar shard with a symbolic link", _member("1.jpg_0.jpg", tarfile.SYMTYPE), "is a link"),
    Case("a tar shard with a hard link", _member("1.jpg_0.jpg", tarfile.LNKTYPE), "is a link"),
    Case("a tar shard with a device", _member("1.jpg_0.jpg", tarfile.CHRTYPE), "is a device or pipe"),
    Case(
        "a file in a tar shard that says it has 8 GB",
        _member("1.jpg_0.jpg", says=8_000_000_000),
        "more than 2147483647",
    ),
    Case("a tar shard that is cut off", lambda folder: _cut(_member("1/")(folder)), "is cut off"),
    Case(
        "files in a tar shard named `../../0.jpg_0.jpg`",
        _member("folder", tarfile.DIRTYPE, key="../../0"),
        taken="read: names say which files are one row, and lead nowhere",
    ),
    Case(
        "files in a tar shard named `/etc/0.jpg_0.jpg`",
        _member("folder", tarfile.DIRTYPE, key="/etc/0"),
        taken="read: names say which files are one row, and lead nowhere",
    ),
]


def _cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:3000])
    return path
