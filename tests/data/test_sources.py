"""Rows from every file format, and errors that name the file, the line and the mend."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tilt.data.sources import load
from tilt.errors import DataError, UsageError

ROWS = [{"prompt": "a, b", "completion": "c\nd"}, {"prompt": "é“”", "completion": "2"}]


def lines(rows: list[dict[str, str]]) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def csv_of(rows: list[dict[str, str]]) -> str:
    return "prompt,completion\n" + "".join(f'"{row["prompt"]}","{row["completion"]}"\r\n' for row in rows)


FORMATS = {
    "list.json": json.dumps(ROWS, indent=1),
    "lines.json": lines(ROWS),
    "rows.jsonl": lines(ROWS) + "\n\n",
    "bom.jsonl": "\ufeff" + lines(ROWS),
    "rows.csv": csv_of(ROWS),
    "bom.csv": "\ufeff" + csv_of(ROWS),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("packed", [False, True])
def test_every_text_format_gives_the_same_rows(tmp_path: Path, name: str, packed: bool) -> None:
    data = FORMATS[name].encode()
    path = tmp_path / (name + ".gz" if packed else name)
    path.write_bytes(gzip.compress(data) if packed else data)
    source = load(str(path))
    assert source.rows == ROWS
    assert source.columns == ["prompt", "completion"]
    assert source.files == (path,)


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert load(str(tmp_path / "rows.parquet")).rows == ROWS


def test_a_text_file_is_one_row_or_a_row_a_line(tmp_path: Path) -> None:
    path = tmp_path / "poem.txt"
    path.write_text("one\u2028still one\r\n\ntwo", newline="")
    assert load(str(path)).rows == [{"text": "one\u2028still one\r\n\ntwo"}]
    assert load(str(path), lines=True).rows == [{"text": "one\u2028still one"}, {"text": "two"}]


def test_a_line_separator_inside_a_csv_cell_does_not_end_the_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\na\u2028b,c\n")
    assert load(str(path)).rows == [{"prompt": "a\u2028b", "completion": "c"}]


def test_a_folder_is_its_files_by_name(tmp_path: Path) -> None:
    for name, row in (("b.jsonl", ROWS[1]), ("a.jsonl", ROWS[0])):
        (tmp_path / name).write_text(json.dumps(row))
    (tmp_path / "SOURCE.json").write_text("{}")
    (tmp_path / "LICENSE").write_text("MIT")
    assert load(str(tmp_path)).rows == ROWS
    assert load(str(tmp_path), limit=1).rows == ROWS[:1]
    (tmp_path / "c.csv").write_text("prompt\nx\n")
    with pytest.raises(DataError, match=r"mixes \.csv and \.jsonl"):
        load(str(tmp_path))


def test_columns_rename_and_a_missing_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "q", "id": 1, "prompt": "shadowed"}')
    assert load(str(path), columns={"prompt": "question"}).rows == [{"id": 1, "prompt": "q"}]
    with pytest.raises(DataError, match=r"no column 'questoin'; did you mean 'question'") as caught:
        load(str(path), columns={"prompt": "questoin"})
    assert "question, id, prompt" in str(caught.value)


BROKEN = {
    "three.jsonl": ('{"a": 1}\n{"a": 2}\n{"a": oops}\n', ["broken JSON at line 3", '{"a": oops}', "^"]),
    "torn.jsonl": ('{"a": 1}\n{"a": "hal', ["line 2", '{"a": "hal']),
    "lines.json": ('{"a": 1}\n{"a": 2}\n{"a" 3}\n', ["broken JSON at line 3", '{"a" 3}']),
    "list.json": ('[\n{"a": 1},\n{"a": 2,}\n]', ["broken JSON at line 3", '{"a": 2,}']),
    "object.json": ('{"a": 1,\n "b" 2}', ["broken JSON at line 2", '"b" 2']),
    "number.jsonl": ('{"a": 1}\n\n7\n', ["line 3 is int, not an object"]),
    "strings.json": ('["x"]', ["row 0 is str, not an object"]),
    "ragged.csv": ("a,b\n1,2\n1,2,3\n", ["line 3 has 3 cells, the header has 2", "double quotes"]),
    "twice.csv": ("a,a\n1,2\n", ["two columns have one name"]),
    "zero.jsonl": ("", ["is empty"]),
    "blank.txt": (" \n\n", ["is empty"]),
    "none.json": ("[]", ["is empty"]),
    "header.csv": ("a,b\n", ["is empty"]),
    "rows.parquet": ("not parquet", ["not a readable parquet"]),
    "rows.xml": ("<a/>", ["cannot tell the format", ".jsonl"]),
    "bad.jsonl.gz": ("no gzip", ["not a whole gzip"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_its_place(tmp_path: Path, name: str) -> None:
    content, said = BROKEN[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        load(str(tmp_path / name))
    assert name in str(caught.value)
    for words in said:
        assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 4


def test_the_caret_stands_under_the_error_in_a_long_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "' + "x" * 500 + '", oops}')
    with pytest.raises(DataError) as caught:
        load(str(tmp_path / "a.jsonl"))
    _, shown, caret = str(caught.value).splitlines()
    assert shown[caret.index("^")] == "o" and len(shown) < 120


def test_bytes_that_are_not_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"not UTF-8 text: byte 0xe9 at 3"):
        load(str(tmp_path / "a.txt"))


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"no such file.*tran\.jsonl\n.*nearest there: .*train\.jsonl"):
        load(str(tmp_path / "tran.jsonl"))
    with pytest.raises(DataError, match=r"the folder .*nowhere does not exist"):
        load(str(tmp_path / "nowhere" / "deep" / "train.jsonl"))


def test_an_unknown_set_lists_the_known() -> None:
    with pytest.raises(DataError, match=r"no data set is called 'gsm8': did you mean 'gsm8k'\?\n.*hh-rlhf"):
        load("gsm8")


def test_an_absent_set_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILT_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("TILT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"tilt data get names") as caught:
        load("names")
    assert "TILT_DATA" in str(caught.value)
    with pytest.raises(DataError, match=r"names has no file 'nams': did you mean 'names.txt'"):
        load("names/nams")


@pytest.mark.parametrize("root", ["TILT_DATA", "TILT_CACHE"])
def test_a_set_is_found_under_both_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str) -> None:
    monkeypatch.setenv("TILT_DATA", str(tmp_path / "TILT_DATA"))
    monkeypatch.setenv("TILT_CACHE", str(tmp_path / "TILT_CACHE"))
    (tmp_path / root / "names").mkdir(parents=True)
    (tmp_path / root / "names" / "names.txt").write_text("emma\nava")
    assert load("names").rows == [{"text": "emma"}, {"text": "ava"}]


@pytest.mark.parametrize("spec", ["hf:nothing", "hf:a/", "hf:a/b/c"])
def test_a_hub_name_needs_two_parts(spec: str) -> None:
    with pytest.raises(DataError, match=r"expected hf:org/name"):
        load(spec)


def test_a_hub_set_offline_is_a_plain_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=r"cannot fetch hf:org/none:main@test from the hub \(HF_HUB_OFFLINE is set"):
        load("hf:org/none:main@test")


def test_a_hub_set_is_read_from_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    for config in ("main", "other"):
        for split in ("train", "test"):
            (tmp_path / config / split).mkdir(parents=True)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": config + split}]), tmp_path / config / split / "0000.parquet")
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: asked.update(name=name, **how) or str(tmp_path))
    assert load("hf:org/set:other@test").rows == [{"text": "othertest"}]
    assert asked["name"] == "org/set" and asked["repo_type"] == "dataset"
    with pytest.raises(DataError, match=r"which config\? main, other"):
        load("hf:org/set")
    with pytest.raises(DataError, match=r"no parquet files for config 'main', split 'dev'"):
        load("hf:org/set:main@dev")


def test_a_limit_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="limit"):
        load(str(tmp_path), limit=0)
