"""Small wrong versions of a source file: every place where one operator, constant, call or statement may be changed, and a fixed choice among them."""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "tilt"
TEXT = ("__init__.py", "card.py", "preference_card.py", "words.py", "sources.py", "pieces.py")
"""Files of `objectives` that hold words and names only."""

SHARES = {
    "detach": 1.0, "slice": 1.0, "minmax": 0.7, "where": 0.5, "boolean": 0.3, "statement": 0.3, "mean": 0.3, "sign": 0.25, "condition": 0.2,
    "comparison": 0.2, "drop": 0.2, "arithmetic": 0.15, "return": 0.15, "argument": 0.1, "constant": 0.1,
}  # fmt: skip
"""The part of each operator's mutants that a run tries."""


@dataclass(frozen=True)
class Mutant:
    """A file with one change: `before` → `after` inside `function`, the `nth` such change there."""

    file: str
    function: str
    operator: str
    before: str
    after: str
    nth: int
    line: int
    source: str

    @property
    def key(self) -> str:
        """What names the mutant, whatever line it moves to."""
        count = f" #{self.nth}" if self.nth > 1 else ""
        return f"{self.file}: {self.function}: {self.before} → {self.after}{count}"

    @property
    def chance(self) -> float:
        """A number in [0, 1) that depends on the key alone: the mutants below their operator's share are chosen."""
        return int.from_bytes(hashlib.blake2b(self.key.encode(), digest_size=8).digest(), "big") / 2**64

    @property
    def chosen(self) -> bool:
        return self.chance < SHARES[self.operator]


def targets() -> list[str]:
    """The files that are mutated, relative to src/tilt."""
    objectives = [p for p in sorted((SOURCE / "objectives").glob("*.py")) if p.name not in TEXT]
    return ["segments.py", "distributions.py", "data/packing.py", *(str(p.relative_to(SOURCE)) for p in objectives)]


def mutants(file: str, source: str | None = None) -> list[Mutant]:
    """Every mutant of a file, in the order of its lines, no two alike."""
    text = (SOURCE / file).read_text(encoding="utf-8") if source is None else source
    raw, tree = text.encode(), ast.parse(text)
    offsets = [0]
    for line in raw.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    seen: Counter[tuple[str, str, str]] = Counter()
    known, made = {text}, []
    for function, node, operator, after in changes(tree):
        start, end = offsets[node.lineno - 1] + node.col_offset, offsets[node.end_lineno - 1] + node.end_col_offset
        wrong = (raw[:start] + (after if isinstance(node, ast.stmt) else f"({after})").encode() + raw[end:]).decode()
        if wrong in known:
            continue
        known.add(wrong)
        before = ast.unparse(node)
        seen[function, before, after] += 1
        made.append(Mutant(file, function, operator, before, after, seen[function, before, after], node.lineno, wrong))
    return sorted(made, key=lambda m: m.line)


# ------------------------------------------------------------------------------------------------ where to change what

Change = tuple[str, str]


def changes(tree: ast.Module) -> Iterator[tuple[str, ast.expr | ast.stmt, str, str]]:
    """(function, node, operator, what stands there instead) for every change; nothing of text, types, assertions or what an error says."""

    def walk(node: ast.AST, path: tuple[str, ...], bound: set[str]) -> Iterator[tuple[str, ast.expr | ast.stmt, str, str]]:
        if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)):
            return
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            path, bound = (*path, node.name), {a.arg for a in node.args.args} if isinstance(node, ast.FunctionDef) else set()
        where = ".".join(path) or "module"
        if isinstance(node, ast.stmt):
            yield from ((where, node, operator, after) for operator, after in of_statement(node, bound))
            bound |= {t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)}
        if isinstance(node, ast.expr):
            yield from ((where, node, operator, after) for operator, after in of_expression(node))
        if isinstance(node, (ast.If, ast.IfExp)) and (test := ast.unparse(node.test)) != "TYPE_CHECKING":
            yield where, node.test, "condition", f"not ({test})"
        for child in inside(node):
            if not axis(node, child):
                yield from walk(child, path, bound)

    yield from walk(tree, (), set())


def inside(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a node that compute something: not its annotations, decorators and bases, nor aliases of types."""
    skipped = {"annotation", "returns", "decorator_list", "bases", "keywords" if isinstance(node, ast.ClassDef) else "", "args" if isinstance(node, ast.FunctionDef) else ""}  # fmt: skip
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript) and ast.unparse(node.value.value) in ("Float", "Int", "Bool", "Shaped", "dict", "tuple"):  # fmt: skip
        return
    if isinstance(node, ast.AnnAssign) and "Mapping[str, str]" in ast.unparse(node.annotation):
        return  # a table of words
    for field, value in ast.iter_fields(node):
        if field not in skipped:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield child
    if isinstance(node, ast.FunctionDef):
        yield from (default for default in [*node.args.defaults, *node.args.kw_defaults] if default is not None)


def axis(call: ast.AST, child: ast.AST) -> bool:
    """Whether a number names the only axis of a vector, which is 0 and -1: `x.cumsum(0)`, `x.index_add(0, …)`."""
    named = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in ("cumsum", "index_add", "index_copy", "scatter_reduce")  # fmt: skip
    return named and isinstance(child, ast.Constant) and child.value == 0


REMOVABLE = (ast.Expr, ast.AugAssign, ast.Continue)


def of_statement(node: ast.stmt, bound: set[str]) -> Iterator[Change]:
    """Removed statements, negated conditions, and returns of a part or of the opposite."""
    again = isinstance(node, ast.Assign) and all(isinstance(t, ast.Subscript) or (isinstance(t, ast.Name) and t.id in bound) for t in node.targets)  # fmt: skip
    if again or (isinstance(node, REMOVABLE) and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))):
        yield "statement", "pass"
    if isinstance(node, ast.Return) and node.value is not None:
        value = node.value
        if isinstance(value, (ast.BinOp, ast.UnaryOp)) or (isinstance(value, ast.Call) and not builds(value)):
            yield "sign", f"return -({ast.unparse(value)})"
        if isinstance(value, ast.BinOp):
            yield "return", f"return {ast.unparse(value.left)}"
            yield "return", f"return {ast.unparse(value.right)}"


def builds(call: ast.Call) -> bool:
    """Whether a call makes an object of a class of ours, by its name."""
    name = ast.unparse(call.func).split(".")[-1]
    return name[:1].isupper() or name in ("of", "frozenset", "replace", "take")


ARITHMETIC: dict[type, list[str]] = {ast.Add: ["-"], ast.Sub: ["+"], ast.Mult: ["/"], ast.Div: ["*"], ast.Pow: ["*"], ast.FloorDiv: ["*"], ast.Mod: ["*"], ast.MatMult: ["*"]}  # fmt: skip
COMPARISON: dict[type, list[str]] = {
    ast.Lt: ["<=", ">"], ast.LtE: ["<", ">="], ast.Gt: [">=", "<"], ast.GtE: [">", "<="], ast.Eq: ["!="], ast.NotEq: ["=="],
    ast.Is: ["is not"], ast.IsNot: ["is"], ast.In: ["not in"], ast.NotIn: ["in"],
}  # fmt: skip
OPPOSITE = {"min": "max", "minimum": "maximum", "amin": "amax", "group_min": "group_max", "argmin": "argmax"}
OPPOSITE |= {b: a for a, b in OPPOSITE.items()}
MEAN = {
    "sum": "mean",
    "mean": "sum",
    "segment_sum": "segment_mean",
    "segment_mean": "segment_sum",
    "group_sum": "group_mean",
    "group_mean": "group_sum",
}
DROPPED = {
    "exp", "log", "abs", "square", "sqrt", "rsqrt", "clamp", "relu", "sigmoid", "neg", "to", "float", "exp_", "expm1", "roll", "masked_fill", "log_softmax",
    "softmax", "index_copy", "cumsum", "logsumexp", "long", "sort",
}  # fmt: skip


def of_expression(node: ast.expr) -> Iterator[Change]:
    """What may stand in the place of an expression."""
    say = ast.unparse
    if isinstance(node, ast.BinOp) and not (textual(node.left) or textual(node.right)):
        for symbol in ARITHMETIC.get(type(node.op), []):
            yield "arithmetic", f"({say(node.left)}) {symbol} ({say(node.right)})"
        if isinstance(node.op, (ast.BitAnd, ast.BitOr)):
            yield "boolean", f"({say(node.left)}) {'|' if isinstance(node.op, ast.BitAnd) else '&'} ({say(node.right)})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not, ast.Invert)):
        yield "sign" if isinstance(node.op, ast.USub) else "boolean", say(node.operand)
    elif isinstance(node, ast.BoolOp):
        joint = " or " if isinstance(node.op, ast.And) else " and "
        yield "boolean", joint.join(f"({say(value)})" for value in node.values)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        for symbol in COMPARISON[type(node.ops[0])]:
            yield "comparison", f"({say(node.left)}) {symbol} ({say(node.comparators[0])})"
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            swapped = [*node.ops[:i], type(op)(), *node.ops[i + 1 :]]
            parts = [say(node.left)]
            for j, (each, right) in enumerate(zip(swapped, node.comparators, strict=True)):
                parts += [COMPARISON[type(each)][0] if j == i else SYMBOL[type(each)], f"({say(right)})"]
            yield "comparison", " ".join(parts)
    elif isinstance(node, ast.Constant):
        yield from (("constant", after) for after in of_constant(node.value))
    elif isinstance(node, ast.Call):
        yield from of_call(node)
    elif isinstance(node, ast.Slice):
        return
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        yield from (("slice", f"{say(node.value)}[{after}]") for after in of_slice(node.slice))


SYMBOL = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}


def textual(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def of_constant(value: object) -> Iterator[str]:
    if isinstance(value, bool):
        yield str(not value)
    elif isinstance(value, int):
        yield from (str(value + 1), str(value - 1))
    elif isinstance(value, float):
        yield repr(2 * value) if value else "1.0"


def of_call(node: ast.Call) -> Iterator[Change]:
    say, func, args = ast.unparse, node.func, node.args
    name = func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""
    whole = isinstance(func, ast.Attribute) and isinstance(func.value, (ast.Name, ast.Attribute, ast.Call, ast.Subscript))
    owner = (f"{say(func.value)}." if whole else f"({say(func.value)}).") if isinstance(func, ast.Attribute) else ""
    rest = ", ".join(map(say, [*args])) + "".join(f", {say(k)}" for k in node.keywords)
    method = isinstance(func, ast.Attribute) and say(func.value) not in ("torch", "np", "math", "torch.nn.functional", "F")
    if name == "detach":
        yield "detach", say(func.value)  # type: ignore[attr-defined]
    elif method and name in DROPPED:
        yield "drop", say(func.value)  # type: ignore[attr-defined]
    if name in OPPOSITE:
        yield "minmax", f"{owner}{OPPOSITE[name]}({rest.lstrip(', ')})"
    if name == "clamp" and len(node.keywords) == 1 and not args:
        other = "max" if node.keywords[0].arg == "min" else "min"
        yield "minmax", f"{owner}clamp({other}={say(node.keywords[0].value)})"
    if name in MEAN and not (name == "sum" and (args or node.keywords)):
        yield "mean", f"{owner}{MEAN[name]}({rest.lstrip(', ')})"
    if name == "where" and len(args) == 3:
        yield "where", f"{owner}where({say(args[0])}, {say(args[2])}, {say(args[1])})"
        yield "where", say(args[1])
    plain = not any(isinstance(a, ast.Starred) for a in args) and not builds(node) and not name.startswith("check")
    if plain and len(args) >= 2 and name not in ("where", "zip", "isinstance", "getattr", "hasattr", "max", "min", "maximum", "minimum"):
        swapped = [args[1], args[0], *args[2:]]
        yield "argument", f"{owner}{name}({', '.join(map(say, [*swapped, *node.keywords]))})"
        if not method and name != "range":
            yield "argument", say(args[0])
    elif (
        plain
        and len(args) == 1
        and not method
        and name not in ("len", "range", "list", "isinstance", "super", "enumerate", "int", "float", "map")
    ):
        yield "argument", say(args[0])


def of_slice(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Tuple):
        for i, part in enumerate(node.elts):
            parts = [ast.unparse(each) for each in node.elts]
            yield from (", ".join([*parts[:i], after, *parts[i + 1 :]]) for after in of_slice(part))
    if not isinstance(node, ast.Slice) or (node.lower is None and node.upper is None):
        return
    low, high = (None if part is None else ast.unparse(part) for part in (node.lower, node.upper))
    yield f"{f'({low}) + 1' if low else '1'}:{high or ''}"
    yield f"{low or ''}:{f'({high}) - 1' if high else '-1'}"
