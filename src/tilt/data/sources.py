"""Rows from files: json, jsonl, csv, parquet, txt (each also .gz, but parquet), folders, named public sets and hub data sets."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tilt.data import public
from tilt.errors import DataError, UsageError

Row = dict[str, Any]
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
MOST_GROWTH, SMALL = 300, 2**26
HALVES = re.compile(r"\\u[dD][89a-fA-F]")  # the escape of half a surrogate pair; two together are one character
NOT_DATA = ("SOURCE.json", "dataset_info.json", "dataset_infos.json")


@dataclass(frozen=True)
class Source:
    """Rows as they stand in the files, not yet interpreted, and where they came from."""

    name: str
    rows: list[Row]
    files: tuple[Path, ...]

    @property
    def columns(self) -> list[str]:
        """Every column that some row has, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))


def load(spec: str, *, columns: Mapping[str, str] | None = None, limit: int | None = None, lines: bool = False) -> Source:
    """Read `file.jsonl`, `folder/`, `gsm8k`, `gsm8k/test` or `hf:org/name[:config][@split]`.

    `columns` {new: old} renames; `limit` keeps the first rows; `lines` makes each line of a text file a row (else the file is one).
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, got {limit}")
    if "\0" in spec:
        raise DataError(f"a file's name cannot hold a NUL character: {spec[:200]!r}")
    rows: list[Row] = []
    try:
        paths, by_line = _resolve(spec)
        for path in paths:
            rows += _read(path, by_line or lines)
            if limit is not None and len(rows) >= limit:
                rows = rows[:limit]
                break
    except OSError as error:
        raise DataError(f"cannot read {spec[:200]}: {error.strerror or error}") from None
    if not rows:
        raise DataError(f"{spec} is empty: no rows in {', '.join(str(path) for path in paths)}")
    return Source(spec, rename(rows, columns or {}, spec), tuple(paths))


def rename(rows: Sequence[Row], columns: Mapping[str, str], source: str = "data") -> list[Row]:
    """Rows whose column `old` is called `new` for each {new: old}; a column that no row has is an error."""
    if not columns:
        return list(rows)
    found = list(dict.fromkeys(name for row in rows for name in row))
    missing = [old for old in columns.values() if old not in found]
    if missing:
        close = get_close_matches(missing[0], found, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DataError(f"columns: {source} has no column {missing[0]!r}{hint}\n  it has: {', '.join(found)}")
    gone = set(columns.values())
    return [
        {
            **{k: v for k, v in row.items() if k not in gone and k not in columns},
            **{new: row[old] for new, old in columns.items() if old in row},
        }
        for row in rows
    ]


def _resolve(spec: str) -> tuple[list[Path], bool]:
    """The files that a spec names, and whether each line of them is a row."""
    if spec.startswith("hf:"):
        return _hub(spec), False
    path = Path(os.path.expanduser(spec))
    if path.is_dir():
        return _folder(path), False
    if path.exists():
        return [path], False
    name, _, file = spec.partition("/")
    if name in public.SETS:
        return [public.find(name, file)], public.SETS[name].lines
    if path.suffix or "/" in spec:
        raise DataError(_missing(path))
    public.lookup(spec)
    raise AssertionError("unreachable: an unknown set is an error")


def _missing(path: Path) -> str:
    """What to say of a file that is not there: the nearest name beside it, or the first folder that is missing."""
    if not path.parent.is_dir():
        folder = path.parent
        while not folder.parent.is_dir():
            folder = folder.parent
        return f"no such file: {path}\n  the folder {folder} does not exist"
    names = sorted(p.name for p in path.parent.iterdir() if p.is_dir() or _kind(p) in SUFFIXES)
    close = get_close_matches(path.name, names, n=1, cutoff=0.4)
    hint = f"\n  nearest there: {path.parent / close[0]}" if close else ""
    return f"no such file: {path}{hint}"


def _folder(folder: Path) -> list[Path]:
    """The data files of a folder, by name; they must be of one kind."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and _kind(p) in SUFFIXES and p.name not in NOT_DATA and p.name[0] != ".")
    if not files:
        raise DataError(f"{folder}/ holds no data file\n  known endings: {' '.join(SUFFIXES)} (also .gz)")
    kinds = sorted({_kind(p) for p in files})
    if len(kinds) > 1:
        raise DataError(f"{folder}/ mixes {' and '.join(kinds)} files: name one of {', '.join(p.name for p in files)}")
    return files


def _kind(path: Path) -> str:
    """The ending that tells the format: `a.jsonl.gz` → `.jsonl`."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _read(path: Path, lines: bool) -> list[Row]:
    kind = _kind(path)
    if kind not in SUFFIXES:
        raise DataError(
            f"{path}: cannot tell the format from the ending {kind or '(none)'!r}\n  known endings: {' '.join(SUFFIXES)} (also .gz)"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes)")
    if kind == ".parquet":
        return _parquet(path)
    text = _text(path)
    if not text.strip():
        raise DataError(f"{path} is empty: it holds only blanks")
    if kind == ".csv":
        return _csv(path, text)
    if kind == ".txt":
        return [{"text": line.rstrip("\r")} for line in text.split("\n") if line.strip()] if lines else [{"text": text}]
    return _json(path, text, by_line=kind == ".jsonl")


def _text(path: Path) -> str:
    try:
        return (_unpacked(path) if path.suffix == ".gz" else path.read_bytes()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.object[error.start]:#04x} at {error.start}\n  save it as UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file: {error}") from None


def _unpacked(path: Path) -> bytes:
    """The content of a .gz file. Text packs to a tenth or a fiftieth of its size; what grows far beyond that was made to fill the memory."""
    most = max(SMALL, MOST_GROWTH * path.stat().st_size)
    with gzip.open(path) as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise DataError(f"{path} unpacks to more than {MOST_GROWTH} times its size: no text does\n  unpack it and look at it")
    return data


def _json(path: Path, text: str, by_line: bool) -> list[Row]:
    """One object a line, or in a `.json` file also one list of objects."""
    if not by_line:
        try:
            whole = json.loads(text, object_pairs_hook=_once)
            return _objects(path, whole if isinstance(whole, list) else [whole], text)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data" or text.lstrip()[0] == "[":  # else one object a line: the first was read, more follow
                raise DataError(_broken(path, text.split("\n")[error.lineno - 1], error.lineno, error)) from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: {_unfit(error)}") from None
    numbered = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    return _objects(path, [_parse(path, line, n) for n, line in numbered], text, [n for n, _ in numbered])


def _parse(path: Path, line: str, number: int) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise DataError(_broken(path, line, number, error)) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: line {number}: {_unfit(error)}") from None


def _once(pairs: list[tuple[str, Any]]) -> Row:
    """An object whose keys are all different."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is set twice in one object; keep one")
    return found


def _unfit(error: Exception) -> str:
    """What JSON can spell and Tilt does not read."""
    if isinstance(error, RecursionError):
        return "brackets within brackets within brackets, hundreds of them"
    return "a whole number of thousands of digits" if "digits" in str(error) else str(error)


def _broken(path: Path, line: str, number: int, error: json.JSONDecodeError) -> str:
    """`data.jsonl: broken JSON at line 3, column 9: …`, the line around that place, and a caret under it."""
    column = min(error.colno - 1, len(line))
    first = max(0, column - 60)
    shown = line[first : column + 40].replace("\t", " ")
    return f"{path}: broken JSON at line {number}, column {error.colno}: {error.msg}\n  {shown}\n  {' ' * (column - first)}^"


def _objects(path: Path, values: Any, text: str, numbers: Sequence[int] | None = None) -> list[Row]:
    halves = HALVES.search(text) is not None
    for i, value in enumerate(values):
        where = f"line {numbers[i]}" if numbers else f"row {i}"
        if not isinstance(value, dict):
            raise DataError(f"{path}: {where} is {type(value).__name__}, not an object with columns: {json.dumps(value)[:80]}")
        if halves and (half := re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False))):
            raise DataError(
                f"{path}: {where} holds half of a character, \\u{ord(half[0]):04x}: a text was cut within it\n  leave it out, or write the whole character"
            )
    return list(values)


def _csv(path: Path, text: str) -> list[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader)
        if len(set(header)) < len(header):
            raise DataError(f"{path}: two columns have one name: {', '.join(header)}")
        rows = []
        for cells in reader:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{path}: line {reader.line_num} has {len(cells)} cells, the header has {len(header)} ({', '.join(header)})\n"
                    f"  {','.join(cells)[:100]}\n  put text with commas or line breaks in double quotes"
                )
            if cells:
                rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}: broken csv at line {reader.line_num}: {error}") from None
    return rows


def _parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_table(path).to_pylist())
    # damaged pages, texts that are not UTF-8, dates beyond Python's
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise DataError(f"{path} is not a readable parquet file: {(str(error) or type(error).__name__).splitlines()[0][:200]}") from None


def _hub(spec: str) -> list[Path]:
    """The parquet files of `hf:org/name[:config][@split]`, from the hub or its local cache; split `train` by default."""
    name, _, split = spec.removeprefix("hf:").partition("@")
    name, _, config = name.partition(":")
    if name.count("/") != 1 or not all(name.split("/")):
        raise DataError(f"{spec}: expected hf:org/name[:config][@split], for example hf:openai/gsm8k:main@test")
    if odd := next((part for part in (*name.split("/"), config, split) if part and not re.fullmatch(r"\w[\w.+-]*", part)), None):
        raise DataError(f"{spec}: {odd!r} cannot be part of a hub name: letters, digits, `_`, `-`, `+` and `.` only")
    from huggingface_hub import snapshot_download

    split = split or "train"
    try:
        pattern = f"{config or '*'}/{split}/*.parquet"
        folder = Path(snapshot_download(name, repo_type="dataset", revision="refs/convert/parquet", allow_patterns=[pattern]))
    except Exception as error:  # the hub client raises many kinds: offline, not found, gated, time-out
        offline = " (HF_HUB_OFFLINE is set: only what is in the local cache can be read)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise DataError(f"cannot fetch {spec} from the hub{offline}\n  {type(error).__name__}: {str(error).splitlines()[0]}") from None
    files = sorted(folder.glob(pattern))
    configs = sorted({path.parent.parent.name for path in files})
    if not files:
        raise DataError(
            f"{spec}: the data set has no parquet files for config {config or '(any)'!r}, split {split!r}\n  name them: hf:{name}:config@split"
        )
    if len(configs) > 1:
        raise DataError(f"{spec}: which config? {', '.join(configs)}\n  for example hf:{name}:{configs[0]}@{split}")
    return files
