"""Hostile files, each through the command line: its exit code, and what is said of it. Together with test_bad_input.py the fault suite."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from tilt.cli.main import main
from tilt.data.tokenizers import characters
from tilt.models import adapters, loading, saving

TINY = ["model.width=16", "model.layers=1", "model.heads=2", "model.vocabulary=280", "model.context=64", "threads=1"]
ROW = {"prompt": "a", "completion": "b"}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "good.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+1=", "completion": f"{i + 1}"}) + "\n" for i in range(20)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TILT_DATA", raising=False)
    monkeypatch.setenv("TILT_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], place: Path) -> Callable[..., None]:
    def check(words: list[str], code: int, *parts: str) -> None:
        found = main(words)
        shown = capsys.readouterr().err
        assert found == code, shown
        assert (
            shown.startswith("error: ") and len(shown.splitlines()) <= 24 and "Traceback" not in shown and "not a known kind" not in shown
        )
        assert not [part for part in parts if part not in shown], shown
        assert not list(place.glob("runs/*"))

    return check


def put(place: Path, name: str, content: bytes | str) -> str:
    (place / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return name


# ------------------------------------------------------------------------------------------------ data files


def parquet(table: Any) -> bytes:
    out = pa.BufferOutputStream()
    pq.write_table(table, out)
    return out.getvalue().to_pybytes()


GOOD = json.dumps(ROW)
PAIRS = parquet(pa.table({"prompt": ["a"], "completion": ["b"]}))


@pytest.mark.parametrize("name, content, parts", [
    ("a.jsonl", "[" * 100_000, ["a.jsonl: line 1: brackets within brackets"]),
    ("a.json", "[" * 100_000, ["a.json: brackets within brackets"]),
    ("a.jsonl", '{"prompt": ' + "9" * 5000 + ', "completion": "b"}', ["line 1: a whole number of thousands of digits"]),
    ("a.json", '[{"prompt": ' + "9" * 5000 + "}]", ["a whole number of thousands of digits"]),
    ("a.jsonl", f'{GOOD}\n{{"prompt": "cut \\ud83d", "completion": "b"}}', ["line 2 holds half of a character, \\ud83d", "leave it out"]),
    ("a.jsonl", f'{GOOD}\n{{"prompt": "a", "prompt": "b", "completion": "c"}}', ["line 2: 'prompt' is set twice in one object"]),
    ("a.json", '[{"prompt": {"x": 1, "x": 2}, "completion": "c"}]', ["'x' is set twice"]),
    ("a.jsonl", b'{"prompt": "\xff", "completion": "b"}', ["a.jsonl is not UTF-8 text: byte 0xff at 12", "save it as UTF-8"]),
    ("a.jsonl", GOOD.encode("utf-16"), ["is not UTF-8 text"]),
    ("a.jsonl", f"{GOOD}\n[1, 2]\n", ["line 2 is list, not an object"]),
    ("a.jsonl", '{"prompt": "a"}\n{"completion": "b"}\n', ["row 0 has no 'completion'; other rows have it"]),
    ("a.json", f"[{GOOD}, 3]", ["row 1 is int, not an object"]),
    ("a.json", f"[{GOOD}", ["broken JSON at line 1"]),
    ("a.jsonl", '{"prompt": 1, "completion": [1]}', ["row 0, completion: a turn is int, not an object"]),
    ("a.jsonl", '{"prompt": true, "completion": "b"}', ["column 'prompt' is bool, not text"]),
    ("a.jsonl", '{"prompt": {"role": "king", "content": "x"}, "completion": "b"}', ["unknown role 'king'", "known roles"]),
    ("a.jsonl", '{"prompt": [{"role": "user"}], "completion": "b"}', ["a turn needs role and content"]),
    ("a.jsonl", '{"prompt": [], "completion": "b"}', ["expected a list of turns"]),
    ("a.jsonl", '{"messages": "[{\\"role\\": "}', ["broken JSON in a conversation"]),
    ("a.jsonl", '{"messages": "' + "[" * 50_000 + '"}', ["JSON in a conversation with thousands"]),
    ("a.jsonl", '{"messages": [{"role": "assistant", "tool_calls": 3}]}', ["tool_calls is int, not a list"]),
    ("a.jsonl", '{"messages": [{"role": "assistant", "tool_calls": ["x"]}]}', ["a tool call is str, not an object"]),
    ("a.jsonl", '{"messages": [{"role": "user", "content": [{"type": "image", "image": "../../etc/passwd"}]}]}', ["part of type 'image'; only text is read"]),
    ("a.jsonl", '{"prompt": "a", "completion": "b", "tools": "{"}', ["broken JSON in tools"]),
    ("a.jsonl", '{"prompt": "a", "completion": "b", "tools": {"a": 1}}', ["tools must be a list of objects"]),
    ("a.jsonl", '{"instruction": "a", "output": "b", "history": [["a"]]}', ["history must be a list of pairs"]),
    ("a.jsonl", '{"instruction": "a", "output": "b", "history": "ab"}', ["history must be a list of pairs"]),
    ("a.jsonl", '{"instruction": "a", "output": "b", "system": [1]}', ["column 'system' is list, not text"]),
    ("a.jsonl", '{"prompt": "a", "completion": "b", "label": "maybe"}', ["label must be true or false, got 'maybe'"]),
    ("a.jsonl", '{"prompt": "a", "completion": "b", "ranked_answers": "abc"}', ["'ranked_answers', which is a name that Tilt gives itself"]),
    ("a.jsonl", '{"prompt": "a", "completion": "b", "prompt_turns": 3}', ["'prompt_turns', which is a name that Tilt gives itself"]),
    ("a.csv", "prompt,completion\na,b\nc\n", ["line 3 has 1 cells, the header has 2"]),
    ("a.csv", "prompt,prompt\na,b\n", ["two columns have one name"]),
    ("a.csv", 'prompt,completion\n"a,b\n', ["broken csv at line"]),
    ("a.csv", "prompt,completion\n", ["is empty: no rows"]),
    ("a.parquet", b"PAR1 and nothing more PAR1", ["a.parquet is not a readable parquet file"]),
    ("a.parquet", PAIRS[: len(PAIRS) // 2], ["a.parquet is not a readable parquet file"]),
    ("a.parquet", parquet(pa.table({"prompt": [b"\xff"], "completion": ["b"]})), ["column 'prompt' is bytes, not text"]),
    ("a.jsonl.gz", b"\x1f\x8b no gzip", ["is not a whole gzip file"]),
    ("a.jsonl.gz", gzip.compress(GOOD.encode(), mtime=0)[:-9], ["is not a whole gzip file"]),
    ("a.jsonl.gz", gzip.compress(b" " * 2**27, mtime=0), ["unpacks to more than 300 times its size"]),
    ("a.dat", GOOD, ["cannot tell the format from the ending '.dat'"]),
    ("a.txt", "\n \n", ["is empty: it holds only blanks"]),
])  # fmt: skip
def test_data_files(refused: Callable[..., None], place: Path, name: str, content: bytes | str, parts: list[str]) -> None:
    refused(["data", "show", put(place, name, content), "--as", "sft"], 3, *parts)


@pytest.mark.parametrize("source, parts", [
    ("x" * 5000 + ".jsonl", ["cannot read xxx", "name too long"]),
    ("a\0.jsonl", ["cannot hold a NUL"]),
    ("~nobody-at-all/x.jsonl", ["no such file"]),
    ("gsm8k/../../etc/passwd", ["gsm8k has no file '../../etc/passwd'"]),
    ("hf:../../etc", ["expected hf:org/name"]),
    ("hf:a/b:../../x@train", ["'../../x' cannot be part of a hub name"]),
    ("hf:a/b@../..", ["'../..' cannot be part of a hub name"]),
    ("hf:a", ["expected hf:org/name"]),
])  # fmt: skip
def test_names_of_data(refused: Callable[..., None], source: str, parts: list[str]) -> None:
    refused(["data", "show", source], 3, *parts)


def test_folders_of_data(refused: Callable[..., None], place: Path) -> None:
    (place / "mixed").mkdir()
    refused(["data", "show", "mixed"], 3, "holds no data file")
    put(place, "mixed/a.jsonl", GOOD)
    put(place, "mixed/b.csv", "a,b\n1,2\n")
    refused(["data", "show", "mixed"], 3, "mixes .csv and .jsonl files")


# ------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize("name, content, parts", [
    ("a.yaml", "a: " + "[" * 5000, ["a.yaml: not valid YAML here: brackets within brackets"]),
    ("a.yaml", "a: " + "[" * 150 + "]" * 150, ["more than 100 deep"]),
    ("a.yaml", "a: &a [*a]", ["an alias that contains itself"]),
    ("a.yaml", "\n".join(["a: &a [x, x, x, x, x, x, x, x, x]"] + [f"{n}: &{n} [{', '.join(['*' + p] * 9)}]" for p, n in zip("abcdefg", "bcdefgh", strict=True)]), ["more than 100000 values"]),
    ("a.yaml", "steps: 99999999999999999999", ["a.yaml:1", "a whole number of more than 18 digits"]),
    ("a.yaml", "steps: 0x" + "f" * 9000, ["a whole number of more than 18 digits"]),
    ("a.yaml", "steps: " + "9" * 9000, ["not valid here"]),
    ("a.yaml", "steps: 1\nsteps: 2", ["`steps` is set twice (first on line 1)"]),
    ("a.yaml", "a: !!python/object/apply:os.system [true]", ["the tag tag:yaml.org,2002:python/object/apply:os.system"]),
    ("a.yaml", "? [a, b]\n: 3", ["a key must be one word"]),
    ("a.yaml", "- a\n- b", ["expected `key: value` lines, got list"]),
    ("a.yaml", "a: {b", ["a.yaml:1", "not valid YAML"]),
    ("a.yaml", b"a: \xff", ["cannot be read as UTF-8 text"]),
    ("a.yaml", "a: \x00", ["not valid YAML"]),
    ("a.toml", "a = " + "[" * 5000, ["a.toml: not valid TOML"]),
    ("a.toml", "a = " + "9" * 9000, ["a.toml: not valid TOML"]),
    ("a.toml", "steps = 99999999999999999999", ["more than 18 digits"]),
    ("a.toml", "a = 1\na = 2", ["a.toml: not valid TOML"]),
    ("a.json", '{"steps": 1, "steps": 2}', ["`steps` is set twice"]),
    ("a.yaml", "recipe: sft\nmodel: {width: 16, heads: 2}\ndata: good.jsonl\nname: ../../x\n", ["`../../x` cannot name a run"]),
    ("a.yaml", "recipe: sft\nmodel: {width: 16, heads: 2}\ndata: good.jsonl\nname: /tmp/x\n", ["`/tmp/x` cannot name a run"]),
    ("a.yaml", f"recipe: sft\nmodel: {{width: 16, heads: 2}}\ndata: good.jsonl\nname: {'x' * 300}\n", ["cannot name a run"]),
])  # fmt: skip
def test_recipe_files(refused: Callable[..., None], place: Path, name: str, content: bytes | str, parts: list[str]) -> None:
    refused(["run", put(place, name, content)], 2, *parts)
    if "cannot name a run" in parts[0]:
        refused(["run", name, "--dry-run"], 2, *parts)
        refused(["run", name, "--overwrite"], 2, *parts)


@pytest.mark.parametrize("words, parts", [
    (["x" * 5000 + ".yaml"], ["cannot be read", "name too long"]),
    (["recipe=sft", "steps=0x" + "f" * 9000], ["more than 18 digits"]),
    (["recipe=sft", "--steps"], ["has no value"]),
    (["recipe=sft", "a..b=1"], ["a key is one or more names joined by dots"]),
    (["recipe=" + "x" * 2000], ["unknown recipe"]),
])  # fmt: skip
def test_words(refused: Callable[..., None], words: list[str], parts: list[str]) -> None:
    refused(["run", *words], 2, *parts)


def test_an_empty_word_is_no_command(refused: Callable[..., None]) -> None:
    refused([""], 2, "No such command")


def test_a_name_that_no_file_can_have_is_refused(refused: Callable[..., None]) -> None:
    refused(["replay", "x" * 5000], 2, "cannot be the name of a file")


# ------------------------------------------------------------------------------------------------ chat templates


@pytest.mark.parametrize("template, code, parts", [
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", 2, ["the chat template takes more than seconds", "template: tilt"]),
    ("{{ 'a' * 10 ** 10 }}{{ messages }}", 2, ["the chat template takes more than seconds"]),
    ("{{ 2 ** (2 ** 40) }}", 2, ["the chat template takes more than seconds"]),
    ("{% set x = namespace(a='a') %}{% for i in range(60) %}{% set x.a = x.a ~ x.a %}{% endfor %}", 2, ["the chat template takes more than seconds"]),
    ("{{ 'a' * 2000000 }}", 2, ["the chat template takes more than seconds"]),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", 3, ["the chat template refuses", "unsafe"]),
    ("{{ messages.append(1) }}", 3, ["the chat template refuses", "unsafe"]),
    ("{% include '/etc/passwd' %}", 3, ["the chat template refuses"]),
    ("{% for i in range(10 ** 9) %}{% endfor %}", 3, ["the chat template refuses", "Range too big"]),
    ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", 3, ["the chat template refuses", "recursion"]),
    ("{% for m in messages %}", 3, ["the chat template refuses", "endfor"]),
    ("{{ raise_exception('only users') }}", 3, ["the chat template refuses", "only users"]),
])  # fmt: skip
def test_templates(refused: Callable[..., None], place: Path, template: str, code: int, parts: list[str]) -> None:
    put(place, "a.json", json.dumps({"data": {"source": "good.jsonl", "template": template}, "steps": 1}))
    refused(["sft", "a.json", *TINY], code, *parts)


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint, an adapter for it, and a process that would run code if it were unpickled."""
    root = tmp_path_factory.mktemp("models")
    words = characters("0123456789+=? abcdefghijklmnopqrstuvwxyz")
    saving.save(loading.tiny(vocabulary=len(words), width=16, layers=1, heads=2, context=64), words, root / "lm")
    lm = adapters.add_lora(loading.tiny(vocabulary=len(words), width=16, layers=1, heads=2, context=64), 2, 4.0)
    adapters.save_adapter(lm, root / "adapter", base=str(root / "lm"))
    return root


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, ("UNPICKLED", "w")


def edit(file: str, **values: Any) -> Callable[[Path], None]:
    """Other values in a JSON file; None takes one out."""

    def change(folder: Path) -> None:
        found = json.loads((folder / file).read_text()) | values
        (folder / file).write_text(json.dumps({k: v for k, v in found.items() if v is not None}))

    return change


def written(file: str, content: bytes | str) -> Callable[[Path], None]:
    return lambda folder: put(folder, file, content) and None


def pickled(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            file.unlink()
        (folder / name).write_bytes(pickle.dumps(Evil()))

    return change


def index(**weight_map: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map or 3}))

    return change


def cut(file: str, keep: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: int(keep * len(data))])

    return change


def other_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: x[..., :3].contiguous() for name, x in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("change, parts", [
    (pickled("pytorch_model.bin"), ["its weights are pickled (pytorch_model.bin)", "convert it once", "save_pretrained"]),
    (pickled("model.pt"), ["its weights are pickled (model.pt)"]),
    (index(a="../lm/model.safetensors"), ["names '../lm/model.safetensors', which is no safetensors file of this folder"]),
    (index(a="/etc/passwd"), ["names '/etc/passwd'"]),
    (index(a="evil.bin"), ["names 'evil.bin'"]),
    (index(a="b.safetensors"), ["b.safetensors is missing"]),
    (index(), ["has no weight_map"]),
    (edit("config.json", vocab_size=10**9, hidden_size=10**6), ["config.json describes", "GiB in float32, and this machine has"]),
    (edit("config.json", intermediate_size=10**9), ["config.json describes"]),
    (edit("config.json", num_hidden_layers=10**9), ["asks for num_hidden_layers = 1,000,000,000; at most 4,096"]),
    (edit("config.json", hidden_size="wide"), ["cannot be read"]),
    (edit("config.json", hidden_size=-1), ["cannot be read"]),
    (edit("config.json", num_attention_heads=0), ["cannot be read"]),
    (edit("config.json", model_type="nothing"), ["cannot be read"]),
    (edit("config.json", model_type=None), ["cannot be read"]),
    (edit("config.json", auto_map={"AutoModelForCausalLM": "evil.Model"}), ["brings Python code of its own"]),
    (edit("config.json", attn_implementation="someone/kernel"), ["wants the kernel 'someone/kernel'"]),
    (edit("config.json", transformers_weights="adapter_model.bin"), ["names the weights 'adapter_model.bin': only safetensors"]),
    (edit("config.json", transformers_weights="../x.safetensors"), ["cannot be read"]),
    (written("config.json", "{"), ["cannot be read: config.json"]),
    (written("config.json", "[]"), ["config.json holds list, not an object"]),
    (written("config.json", "[" * 100_000), ["cannot be read: config.json"]),
    (cut("model.safetensors", 0.5), ["is not a whole safetensors file"]),
    (cut("model.safetensors", 0.0001), ["is not a whole safetensors file"]),
    (written("model.safetensors", (2**62).to_bytes(8, "little") + b"{}"), ["is not a whole safetensors file"]),
    (other_shape, ["model"]),
    (written("tokenizer.json", "{"), ["tokenizer"]),
    (written("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'), ["tokenizer"]),
    (edit("tokenizer_config.json", eos_token=None), ["no end token (eos_token)"]),
    (edit("tokenizer_config.json", eos_token=""), ["no end token"]),
    (lambda folder: (folder / "tokenizer.json").unlink(), ["tokenizer"]),
])  # fmt: skip
def test_checkpoints(refused: Callable[..., None], place: Path, model: Path, change: Callable[[Path], None], parts: list[str]) -> None:
    refused_unread(refused, place, model / "lm", change, parts)


def refused_unread(refused: Callable[..., None], place: Path, good: Path, change: Callable[[Path], None], parts: list[str]) -> None:
    """Nothing of a bad folder is run or unpickled, and it is refused before its memory is taken."""
    shutil.copytree(good, place / "m")
    change(place / "m")
    refused(["sft", "model=m", "data=good.jsonl", "steps=1"], 2, *parts)
    assert not (place / "UNPICKLED").exists()


@pytest.mark.parametrize("change, parts", [
    (pickled("adapter_model.bin"), ["its weights are pickled (adapter_model.bin)"]),
    (edit("adapter_config.json", r=10**9), ["has the rank 1000000000, and its weights have at most 2"]),
    (edit("adapter_config.json", r="2"), ["has the rank '2'"]),
    (edit("adapter_config.json", rank_pattern={"q_proj": 10**9}), ["has the rank 1000000000"]),
    (edit("adapter_config.json", peft_type="IA3"), ["is of type 'IA3'; only LORA"]),
    (edit("adapter_config.json", base_model_name_or_path=None), ["names no base model"]),
    (edit("adapter_config.json", base_model_name_or_path="./nowhere"), ["there is no such folder"]),
    (cut("adapter_model.safetensors", 0.5), ["is not a whole safetensors file"]),
    (written("adapter_config.json", "3"), ["adapter_config.json holds int, not an object"]),
])  # fmt: skip
def test_adapters(refused: Callable[..., None], place: Path, model: Path, change: Callable[[Path], None], parts: list[str]) -> None:
    refused_unread(refused, place, model / "adapter", change, parts)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "~nobody-at-all/x", "../../../../nowhere"])
def test_names_of_models(refused: Callable[..., None], name: str) -> None:
    refused(["generate", name, "--prompt", "a"], 2, "model ")


# ------------------------------------------------------------------------------------------------ run directories


@pytest.fixture
def run(place: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A folder of a run with what its readers ask for."""
    folder = place / "old" / "run"
    (folder / "rollouts").mkdir(parents=True)
    (folder / "env.json").write_text("{}")
    return folder


def stored(folder: Path, metadata: dict[str, str], **columns: Any) -> None:
    good = {
        "ids": [[1, 2]],
        "mask": [[1, 1]],
        "group_id": [0],
        "completion": ["a"],
        "reward": [1.0],
        "old_logprobs": [[-1.0, -1.0]],
    } | columns
    table = pa.table({k: v for k, v in good.items() if v is not None}).replace_schema_metadata(metadata)
    pq.write_table(table, folder / "rollouts" / "step_000001.parquet")


NOW = {"schema_version": "1"}


@pytest.mark.parametrize("metadata, columns, parts", [
    ({"schema_version": "99"}, {}, ["has schema version 99; this tilt reads up to", "upgrade it"]),
    ({"schema_version": "new"}, {}, ["its metadata name no schema_version"]),
    ({}, {}, ["its metadata name no schema_version"]),
    (NOW, {"ids": None}, ["row 0 is no rollout: `ids` and `mask`"]),
    (NOW, {"mask": [[1]]}, ["row 0 is no rollout: `ids` and `mask` must be lists of one length"]),
    (NOW, {"mask": [[1, 7]]}, ["the mask of 0 and 1"]),
    (NOW, {"mask": [[0, 0]]}, ["holds no sampled token"]),
    (NOW, {"reward": None}, ["a number or null `reward`"]),
    (NOW, {"group_id": ["a"]}, ["a whole number `group_id`"]),
    (NOW, {"old_logprobs": [[-1.0]]}, ["`old_logprobs` must hold one number for each of its 2 tokens"]),
])  # fmt: skip
def test_stored_rollouts(
    refused: Callable[..., None], run: Path, metadata: dict[str, str], columns: dict[str, Any], parts: list[str]
) -> None:
    stored(run, metadata, **columns)
    refused(["trace", "grpo", "--run", str(run)], 3, *parts)


def test_rollouts_that_are_no_file(refused: Callable[..., None], run: Path) -> None:
    refused(["trace", "grpo", "--run", str(run)], 3, "holds no rollouts")
    (run / "rollouts" / "step_000001.parquet").write_bytes(b"PAR1")
    (run / "rollouts" / "step_last.parquet").write_bytes(b"")
    refused(["trace", "grpo", "--run", str(run)], 3, "is not a readable parquet file")


@pytest.mark.parametrize("file, content", [
    ("env.json", "[1, 2]"), ("env.json", "[" * 100_000), ("env.json", '{"process": -1, "host": "x"}'), ("env.json", '{"process": ' + "9" * 300 + "}"),
    ("metrics.jsonl", "{\n"), ("metrics.jsonl", '{"loss": 1}\n'), ("metrics.jsonl", '{"step": 1, "reward": "much"}\n'), ("metrics.jsonl", "3\n"),
    ("config.yaml", "model: " + "[" * 5000), ("log.txt", b"\xff\x00"),
])  # fmt: skip
def test_a_damaged_run_does_not_hide_the_others(
    place: Path, run: Path, capsys: pytest.CaptureFixture[str], file: str, content: bytes | str
) -> None:
    put(run, file, content)
    (place / "old" / "good").mkdir()
    (place / "old" / "good" / "env.json").write_text("{}")
    (place / "old" / "good" / "metrics.jsonl").write_text('{"step": 7, "reward": 0.5}\n')
    assert main(["runs", "--root", "old", "--json"]) == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert set(found) == {"good", "run"} and found["good"]["step"] == 7 and found["good"]["reward"] == 0.5
