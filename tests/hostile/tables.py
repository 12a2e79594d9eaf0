# SPDX-License-Identifier: Apache-2.0
"""Tables of whatever kind: a case writes one, and gives its path."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.pictures import encoded, picture
from tests.hostile.cases import Case
from tests.hostile.media import good_image

ROW = {"prompt": "a cat", "chosen": "good.png", "rejected": "other.png"}
_DEEP = "[" * 100_000 + "]" * 100_000
_LONG = "x" * 5000 + ".png"
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


def _object(form: str) -> Any:
    """A table whose arms are objects, in which `{path}` is that of a picture elsewhere."""

    def write(folder: Path) -> Path:
        path = str(folder.parent.resolve() / good_image(folder.parent, "secret.png"))
        arm = form.replace("{path}", path)
        return _table("train.jsonl", f'{{"prompt": "a cat", "chosen": {arm}, "rejected": {arm}}}')(folder)

    return write


def _address_that_is_there(folder: Path) -> Path:
    """A path that passes for an address, and leads out through a folder that is there."""
    (folder / "a:").mkdir()
    good_image(folder.parent, "secret.png")
    return _table("train.jsonl", _lines({**ROW, "chosen": "a://../../secret.png"}))(folder)


def _behind_a_link(folder: Path) -> Path:
    (folder.parent / "elsewhere" / "below").mkdir(parents=True)
    good_image(folder.parent / "elsewhere", "secret.png")
    (folder / "link").symlink_to(folder.parent / "elsewhere" / "below")
    return _table("train.jsonl", _lines(ROW, {**ROW, "chosen": "link/../secret.png"}))(folder)


_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def _typed(columns: dict[str, tuple[pa.DataType, Any, dict[str, Any]]]) -> Any:
    """A Parquet file of one row, which says to `datasets` what its columns are; `{path}` is a picture elsewhere."""

    def write(folder: Path) -> Path:
        secret = str(folder.parent / good_image(folder.parent, "secret.png"))
        arrays = {name: pa.array([_named(value, secret)], kind) for name, (kind, value, _) in columns.items()}
        features = {name: feature for name, (*_, feature) in columns.items()}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        pq.write_table(pa.table(arrays).replace_schema_metadata(metadata), folder / "train.parquet")
        return folder / "train.parquet"

    return write


def _named(value: Any, path: str) -> Any:
    if isinstance(value, list):
        return [_named(part, path) for part in value]
    return {**value, "path": value["path"].format(path=path)} if isinstance(value, dict) else value


def _beside_images(write: Any) -> Any:
    """Such a file beside the picture that it names."""
    return lambda folder: (good_image(folder), write(folder))[1]


_FETCHED = {"bytes": None, "path": "http://127.0.0.1:9/a.png"}
_SECRET = {"bytes": None, "path": "{path}"}
_TEXT = (pa.string(), "a cat", {"dtype": "string", "_type": "Value"})
_GOOD = (pa.string(), "good.png", {"dtype": "string", "_type": "Value"})
_AN_IMAGE = (_IMAGE, _SECRET, {"_type": "Image"})
_AN_ADDRESS = (_IMAGE, _FETCHED, {"_type": "Image"})
_FRAMES = (pa.list_(_IMAGE), [_SECRET] * 3, {"feature": {"_type": "Image"}, "_type": "List"})


def _arms_of(arm: Any, **others: Any) -> Any:
    """Such a file with both arms of one kind."""
    return _typed({"prompt": _TEXT, "chosen": arm, "rejected": arm, **others})


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


def _folder(*lines: str, name: str = "metadata.jsonl") -> Any:
    """Folders `chosen`, `rejected` and their metadata."""

    def write(folder: Path) -> Path:
        for arm in ("chosen", "rejected"):
            (folder / arm).mkdir()
            good_image(folder / arm)
        (folder / name).write_text("\n".join(lines))
        return folder

    return write


def _video_dpo(path: Any) -> Any:
    """The two tables of VideoDPO, of which one names a clip so."""

    def write(folder: Path) -> Path:
        (folder / "metadata.json").write_text(json.dumps([{"basic": {"clip_path": path}}]))
        (folder / "pair.json").write_text(json.dumps([{"frame_caption": "a cat", "video1": 0, "video2": 0}]))
        return folder

    return write


def _saved(state: str | dict[str, Any]) -> Any:
    """A folder of `save_to_disk` with this state, or with these changes of it."""

    def write(folder: Path) -> Path:
        datasets.Dataset.from_list([{**ROW, "rejected": ROW["chosen"]}]).save_to_disk(folder / "saved")
        path = folder / "saved" / "state.json"
        path.write_text(state if isinstance(state, str) else json.dumps({**json.loads(path.read_text()), **state}))
        return path.parent

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


def _piped(folder: Path) -> Path:
    saved = _saved({})(folder)
    file = next(saved.glob("*.arrow"))
    file.unlink()
    os.mkfifo(file)
    return saved


def _arrow_file(name: str) -> Any:
    """A saved dataset whose rows are said to be in this file, which is there, or in the pipe `{pipe}`."""

    def write(folder: Path) -> Path:
        saved = _saved({})(folder)
        moved = next(saved.glob("*.arrow")).rename(folder.parent / "secret.arrow")
        if "{pipe}" in name:
            os.mkfifo(folder.parent / "pipe")
        named = name.format(elsewhere=folder.parent.resolve(), pipe=folder.parent.resolve() / "pipe")
        state = json.loads((saved / "state.json").read_text())
        (saved / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": named}]}))
        assert moved.is_file()
        return saved

    return write


def _saved_splits(name: str) -> Any:
    """A saved dataset of splits, one of which is said to be this folder."""

    def write(folder: Path) -> Path:
        _saved({})(folder.parent)
        rows = datasets.Dataset.from_list([{**ROW, "rejected": ROW["chosen"]}])
        datasets.DatasetDict(train=rows).save_to_disk(folder / "splits")
        named = name.format(elsewhere=folder.parent.resolve())
        (folder / "splits" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", named]}))
        return folder / "splits"

    return write


_ARMS = {"chosen": ["good.png"], "rejected": ["other.png"]}
_OUT = "leads out of"
_DEEP_LINE = json.dumps(ROW)[:-1] + ', "more": ' + _DEEP + "}"

TABLES = [
    Case("a path with `..` that leads out of the table's folder", _path("../secret.png"), _OUT),
    Case("an absolute path to elsewhere", _path("{elsewhere}/secret.png"), _OUT),
    Case("`..` behind a link that leads elsewhere", _behind_a_link, _OUT),
    Case("such a path in a Parquet file, beside empty bytes", _arms_of(_AN_IMAGE), _OUT),
    Case("such a path in an object", _object('{"path": "{path}"}'), _OUT),
    Case("such a path in an object, in the place of bytes", _object('{"bytes": "{path}", "path": null}'), _OUT),
    Case("such paths in lists of images", _arms_of(_FRAMES), _OUT),
    Case("such a path that passes for an address", _address_that_is_there, "is an address, and nothing is downloaded"),
    Case(
        "prompts that are said to be images at an address",
        _arms_of(_GOOD, prompt=_AN_ADDRESS),
        "expected a string or a conversation",
    ),
    Case(
        "images at an address, in a column that nobody asked for",
        _beside_images(_arms_of(_GOOD, more=_AN_ADDRESS)),
        taken="read: what is not needed is not opened",
    ),
    Case(
        "such images beside the columns of HPDv3",
        _beside_images(_typed({"prompt": _TEXT, "path1": _GOOD, "path2": _GOOD, "more": _AN_ADDRESS})),
        taken="read: what is not needed is not opened",
    ),
    Case("a path longer than any can be", _table("train.jsonl", _lines({**ROW, "chosen": _LONG})), "there is no file"),
    Case(
        "an object with a path, beside bytes that are null",
        _table("train.jsonl", _lines({**ROW, "chosen": {"bytes": None, "path": "good.png"}})),
        taken="read",
    ),
    Case("an object with a number for bytes", _object('{"bytes": 5, "path": null}'), "expected an image"),
    Case("an object with a number for a path", _object('{"bytes": null, "path": 0}'), "expected an image"),
    Case("a path with `..` that stays inside", _path("../data/good.png"), taken="read"),
    Case("a line of JSON of 10 MB", _table("train.jsonl", _lines({**ROW, "note": "x" * 10_000_000})), taken="read"),
    Case(
        "a line of JSON that is 100,000 lists deep",
        _table("train.jsonl", _DEEP_LINE),
        "lie more than 100 deep within one another",
    ),
    Case(
        "a line of JSON with 100,000 escaped quotation marks",
        _table("train.jsonl", "[" * 101 + '\\"' * 100_000),
        "lie more than 100 deep within one another",
    ),
    Case("a label of 19 digits", _table("train.jsonl", _lines({**ROW, "label": 2**60 + 1})), "a number in [0, 1]"),
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
    Case(
        "a CSV with two columns of one name",
        _table("train.csv", "prompt,chosen,rejected,chosen\na,good.png,other.png,third.png\n"),
        "'chosen' stands twice",
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
    Case(
        "metadata with a number of 5,000 digits",
        _folder('{"id": ' + "1" * 5000 + ', "prompt": "a"}'),
        "integer string conversion",
    ),
    Case(
        "metadata with a label of 30 digits",
        _folder('{"id": "good", "prompt": "a", "label": ' + "1" * 30 + "}"),
        "cannot be read as a table",
    ),
    Case(
        "metadata (CSV) with two columns of one name",
        _folder("id,prompt,prompt", "good,a,b", name="metadata.csv"),
        "'prompt' stands twice",
    ),
    Case(
        "HPDv2 with a number for ranks",
        _table("train.jsonl", _lines({"prompt": "a cat", "image_path": ["good.png", "other.png"], "rank": 5})),
        "one number per image is needed",
    ),
    Case(
        "HPDv3 with an object for a path",
        _table(
            "train.jsonl", _lines({"prompt": "a cat", "path1": {"path": "good.png"}, "path2": {"path": "good.png"}})
        ),
        "expected a path",
    ),
    Case("VideoDPO with a number for a path", _video_dpo(5), "pair 0: TypeError"),
    Case(
        "a saved dataset with a transform",
        _beside_images(_saved({"_format_type": "custom", "_format_kwargs": {"transform": "os.system"}})),
        taken="read: a format that was saved is not used",
    ),
    Case("a saved dataset with a named pipe", _piped, "is no file"),
    Case("a saved dataset whose rows are in `../../secret.arrow`", _arrow_file("../../secret.arrow"), _OUT),
    Case("a saved dataset whose rows are in a file elsewhere", _arrow_file("{elsewhere}/secret.arrow"), _OUT),
    Case("a saved dataset whose rows are in a named pipe elsewhere", _arrow_file("{pipe}"), _OUT),
    Case("a saved dataset with a split in `../../saved`", _saved_splits("../../saved"), _OUT),
    Case("a saved dataset with a split in a folder elsewhere", _saved_splits("{elsewhere}/saved"), _OUT),
    Case("a saved dataset with a split in `..`", _saved_splits(".."), _OUT),
    Case("a saved dataset whose state is a list", _saved("[]"), "cannot be read"),
    Case("a saved dataset whose state is 100,000 lists deep", _saved(_DEEP), "cannot be read"),
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
