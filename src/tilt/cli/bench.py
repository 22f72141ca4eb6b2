"""`tilt bench`: what the words name, the table, the JSON object."""

from __future__ import annotations

import json as json_text
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from tilt.cli.recipes import split
from tilt.cli.show import _print, _table
from tilt.config import gather, parse
from tilt.errors import UsageError
from tilt.recipes import bench
from tilt.recipes.rl_settings import Config
from tilt.runs.text import number

MAKING = [field.name for field in fields(bench.Shape)]
ASKING = [field.name for field in fields(bench.Lengths)]


def show_bench(words: Sequence[str], options: Mapping[str, int | None], steps: int, json: bool) -> None:
    """Bench a recipe's file, a model, or a shape of random weights; a table, or one JSON object."""
    files, rest = split(words)
    models = [word for word in rest if "=" not in word and not word.startswith("--")]
    given = {name: value for name, value in options.items() if value is not None}
    with bench.scratch() as folder:
        if files:
            _refuse(given, models, f"{files[-1]} says what is run: change it by settings, such as prompts=8 sampling.max_tokens=64")
            found = bench.bench(_recipe(files, rest), folder, steps=steps)
        else:
            lengths = bench.Lengths(**{name: value for name, value in given.items() if name in ASKING})
            shape = {name: value for name, value in given.items() if name in MAKING}
            settings = gather([], [word for word in rest if word not in models]).values
            if models:
                _refuse(shape, models[1:], f"{models[0]} has the shape that it has: leave {', '.join(shape) or 'the other words'} out")
                config = bench.of_model(folder, models[0], lengths, settings)
            else:
                config = bench.of_shape(folder, bench.Shape(**shape), lengths, settings)
            found = bench.bench(config, folder, steps=steps, prompt=lengths.prompt)
    if json:
        print(json_text.dumps(asdict(found)))
    else:
        _print(*_tables(found))


def _refuse(options: Mapping[str, int], words: Sequence[str], why: str) -> None:
    if options or words:
        flags = ["--" + name.replace("_", "-") for name in options]
        raise UsageError(f"{', '.join([*flags, *words])} has no effect: {why}")


def _recipe(files: Sequence[Path], overrides: Sequence[str]) -> Config:
    from tilt.cli.recipes import _recipe as named

    document = gather(files, overrides)
    name = named("run", document, files)
    if name != "rl":
        raise UsageError(f"{files[-1]} is of the recipe {name}, and bench measures the steps of rl: name such a file, or a model")
    return parse(document.values, Config, document.origins)


def _tables(found: bench.Found) -> list[object]:
    work, can = found.workload, found.machine
    phases = [[name, f"{seconds:.3f} s", f"{seconds / found.step:.0%}"] for name, seconds in found.phases.items()]
    halves = [
        ["prefill", f"{found.prefill.tokens_per_second:,.0f}", f"{found.prefill.seconds:.3f} s", f"{found.prefill.share:.0%} of the matrix product"],
        ["decode", f"{found.decode.tokens_per_second:,.0f}", f"{found.decode.seconds:.3f} s", f"{found.decode.share:.0%} of the bandwidth"],
        ["training", f"{found.training.tokens_per_second:,.0f}", f"{found.training.seconds:.3f} s", f"{found.training.share:.0%} of the matrix product (MFU)"],
    ]  # fmt: skip
    return [
        f"workload   {work['model']}, {work['parameters'] / 1e6:.2f}M parameters, {work['algorithm']}: {work['prompts']} prompts of {work['prompt']} tokens × "
        f"{work['samples']} answers of {work['new']}",
        f"machine    {can.device}, {can.threads} threads: {can.flops / 1e9:,.0f} GFLOP/s in {can.dtype} matrix products, {can.bandwidth / 1e9:.1f} GB/s (measured)",
        "",
        _table(["alone", "tokens/s", "seconds", "reached"], halves, right=(1, 2)),
        "",
        _table(
            ["phase", "seconds", "share"], [*phases, ["whole step", f"{found.step:.3f} s", f"{number(found.steps)} steps"]], right=(1, 2)
        ),
        "",
        f"keeping    {1000 * found.keeping.record:.1f} ms a step for journal and rollouts; a checkpoint stops training for {1000 * found.keeping.copy:.0f} ms "
        f"and is written in {found.keeping.write:.2f} s meanwhile: {found.keeping.share:.1%} of the time",
        f"memory     {found.peak / 2**20:,.0f} MiB at the peak of a step, {found.loaded / 2**20:,.0f} MiB of it before the first",
    ]
