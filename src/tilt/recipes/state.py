"""What a run must not forget between two steps: named parts that say what they hold and take it up again, and what must be the same when they do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tilt.errors import DataError, UsageError
from tilt.models.saving import check_tokenizer, copied, fingerprint, snapshot
from tilt.optim.optimizers import Optimizer
from tilt.runs.files import flush

FOLDER = "trainer"
SCHEMA_VERSION = 1
Row = TypeVar("Row")
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Part:
    """One thing to remember: what it holds now, as plain numbers (what JSON can say, floats exactly) and as tensors, and how it takes them up again."""

    numbers: Callable[[], Any] = dict
    tensors: Callable[[], Tensors] = dict
    restore: Callable[[Any, Tensors], None] = lambda numbers, tensors: None


@dataclass
class State:
    """The parts of a run by name; `given` are fingerprints of what the run was given and never changes (data, frozen models), which must be the same when it
    is resumed; `memory` holds plain values of the loop itself; `published` is the model and tokenizer that every checkpoint holds as an ordinary folder."""

    parts: dict[str, Part] = field(default_factory=dict)
    given: dict[str, str] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    published: tuple[Any, Any] | None = None
    beside: Callable[[], Callable[[Path], None]] = lambda: lambda place: None

    def add(self, **parts: Part | None) -> None:
        """Remember these too; None is nothing to remember."""
        self.parts |= {name: part for name, part in parts.items() if part is not None}

    def publish(self, model: Any, tokenizer: Any, beside: Callable[[], Callable[[Path], None]] | None = None) -> None:
        """Write this model into every checkpoint as an ordinary folder, and beside it what `beside` copies when it is called, and writes later."""
        check_tokenizer(model, tokenizer)
        self.published = (model, tokenizer)
        if beside is not None:
            self.beside = beside

    def taken(self, prepare: Callable[[], None] = lambda: None) -> Callable[[Path], None]:
        """A copy of everything as it is now, as a function that writes it into a folder, in a thread if need be.

        `prepare` is called when the state has been copied and before the published model is, which it may change.
        """
        numbers = json.dumps(
            {
                "schema_version": SCHEMA_VERSION, "given": self.given, "memory": self.memory,
                "parts": {name: part.numbers() for name, part in self.parts.items()},
            },
            indent=1,
        )  # fmt: skip
        tensors = copied({f"{name}/{key}": value for name, part in self.parts.items() for key, value in part.tensors().items()})
        prepare()
        write = snapshot(*self.published) if self.published is not None else lambda place: None
        more = self.beside()

        def put(place: Path) -> None:
            write(place)
            more(place)
            known = _folder(place)
            own = {name: value for name, value in tensors.items() if not _same(value, known, name.partition("/")[2])}
            (place / FOLDER).mkdir()
            (place / FOLDER / "state.json").write_text(numbers + "\n", encoding="utf-8")
            save_file(own, place / FOLDER / "state.safetensors")
            flush(place / FOLDER)

        return put

    def take_up(self, place: Path) -> None:
        """Every part as the checkpoint has it; a checkpoint of other data, other frozen models or other parts is refused."""
        record = read_numbers(place)
        for what, mark in self.given.items():
            if record["given"].get(what, mark) != mark:
                raise UsageError(
                    f"{place}: the {what} changed since the run began, so it would not be the same run\n"
                    "  put back what was there, or start a new run from its weights: --init-from"
                )
        if record["parts"].keys() != self.parts.keys():
            odd = ", ".join(sorted(record["parts"].keys() ^ self.parts.keys()))
            raise UsageError(
                f"{place}: only one of the checkpoint and this configuration has: {odd}\n  use --init-from for its weights alone"
            )
        try:
            tensors = load_file(place / FOLDER / "state.safetensors")
        except (OSError, SafetensorError) as error:
            raise DataError(f"{place / FOLDER / 'state.safetensors'} cannot be read: {error}") from None
        known = _folder(place)
        for name, part in self.parts.items():
            wanted = part.tensors()
            own = {key.partition("/")[2]: value for key, value in tensors.items() if key.startswith(f"{name}/")}
            absent = [key for key in wanted if key not in own and key in known]
            part.restore(record["parts"][name], own | {key: _read(known[key], key) for key in absent})
        self.memory = record["memory"]


def read_numbers(place: Path) -> dict[str, Any]:
    """The plain numbers of a checkpoint's state."""
    file = place / FOLDER / "state.json"
    try:
        found = dict(json.loads(file.read_text(encoding="utf-8")))
        version = int(found["schema_version"])
    except FileNotFoundError:
        raise UsageError(f"{place} holds a model and no trainer's state, so nothing can be resumed from it; use --init-from") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None
    if version > SCHEMA_VERSION:
        raise UsageError(f"{file} has schema version {version}; this tilt reads up to {SCHEMA_VERSION}: upgrade it")
    return found


def _folder(place: Path) -> dict[str, Path]:
    """The tensors of an ordinary model folder, and the file of each."""
    found: dict[str, Path] = {}
    for file in sorted(place.glob("*.safetensors")):
        with safe_open(file, framework="pt") as content:
            found |= dict.fromkeys(content.keys(), file)
    return found


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as content:
        tensor: Tensor = content.get_tensor(name)
        return tensor


def _same(value: Tensor, known: Mapping[str, Path], name: str) -> bool:
    """Whether the model's own folder already holds this tensor, to the bit."""
    if name not in known:
        return False
    other = _read(known[name], name)
    return other.dtype == value.dtype and torch.equal(
        other.view(torch.uint8) if other.ndim else other, value.view(torch.uint8) if value.ndim else value
    )


def weights(module: nn.Module) -> Part:
    """The trained parameters of a module; the others must be what they were."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    mark = fingerprint(nn.ParameterList(p for p in module.parameters() if not p.requires_grad))

    def restore(numbers: Any, tensors: Tensors) -> None:
        if numbers["frozen"] != mark:
            raise UsageError("the weights under the adapter are not those that the run began with; put the model back, or use --init-from")
        put(trained, tensors)

    return Part(lambda: {"frozen": mark}, lambda: {name: p.detach() for name, p in trained.items()}, restore)


@torch.no_grad()
def put(into: Mapping[str, Tensor], tensors: Tensors) -> None:
    """Copy tensors into those of the same names and shapes; a missing one is an error."""
    for name, tensor in into.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise DataError(f"the checkpoint has no {name} of shape {list(tensor.shape)}: it is of another model")
        tensor.copy_(tensors[name])


def optimizing(optimizer: Optimizer | None) -> Part | None:
    """The averages of an optimizer and how many steps it took."""
    if optimizer is None:
        return None

    def tensors() -> Tensors:
        return {f"{i}.{name}": value for i, own in optimizer.inner.state_dict()["state"].items() for name, value in own.items()}

    def restore(numbers: Any, found: Tensors) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in found.items():
            number, _, key = name.partition(".")
            state.setdefault(int(number), {})[key] = value
        optimizer.inner.load_state_dict({"state": state, "param_groups": optimizer.inner.state_dict()["param_groups"]})
        optimizer.steps = int(numbers)

    return Part(lambda: optimizer.steps, tensors, restore)


def attributes(owner: Any, *names: str) -> Part:
    """Plain attributes of an object: numbers, texts, lists of them."""

    def restore(numbers: Any, tensors: Tensors) -> None:
        for name in names:
            setattr(owner, name, numbers[name])

    return Part(lambda: {name: getattr(owner, name) for name in names}, restore=restore)


def tensors_of(named: Callable[[], Mapping[str, Tensor]]) -> Part:
    """Tensors that are filled in place."""
    return Part(tensors=named, restore=lambda numbers, found: put(named(), found))


def scalars(row: Any) -> dict[str, Any]:
    """Every plain value of nested dataclasses by its path: Objective(penalty=K3(beta=.1), …) → {"penalty.beta": .1, …}."""
    found: dict[str, Any] = {}
    for f in fields(row):
        value = getattr(row, f.name)
        if is_dataclass(value):
            found |= {f"{f.name}.{key}": inner for key, inner in scalars(value).items()}
        elif value is None or isinstance(value, bool | int | float | str):
            found[f.name] = value
    return found


def with_scalars(row: Row, values: Mapping[str, Any]) -> Row:
    """The row with these plain values at their paths; what is as it was stays the same object."""
    plain: Any = row
    changes: dict[str, Any] = {}
    for f in fields(plain):
        value = getattr(plain, f.name)
        inside = {key.partition(".")[2]: v for key, v in values.items() if key.partition(".")[0] == f.name and "." in key}
        if is_dataclass(value) and inside:
            made = with_scalars(value, inside)
            changes |= {} if made == value else {f.name: made}
        elif f.name in values and values[f.name] != value:
            changes[f.name] = values[f.name]
    return replace(plain, **changes) if changes else row


@dataclass
class Held(Generic[Row]):
    """The row of the step to come, which a controller or what it remembers may move."""

    row: Row

    @property
    def part(self) -> Part:
        """Its plain values."""

        def restore(numbers: Any, tensors: Tensors) -> None:
            self.row = with_scalars(self.row, numbers)

        return Part(lambda: scalars(self.row), restore=restore)


def digest(items: Iterable[object]) -> str:
    """SHA-256 over what things say of themselves, in order."""
    found = hashlib.sha256()
    for item in items:
        found.update(repr(item).encode("utf-8", "surrogatepass") + b"\0")
    return found.hexdigest()
