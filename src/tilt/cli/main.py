"""The command `tilt`: names, help, exit codes. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from tilt import __version__
from tilt.errors import TiltError, UsageError

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RECIPE.yaml …] [key.sub=value …]", help="recipe files, later ones win; then settings", show_default=False),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="check everything, show examples and sizes, train nothing")]
Quiet = Annotated[bool, typer.Option("--quiet", help="nothing on the terminal but errors; the files are complete")]
Resume = Annotated[
    bool, typer.Option("--resume", help="go on with the run of this name or folder from its last whole checkpoint, or from that of step=N")
]
InitFrom = Annotated[str, typer.Option("--init-from", metavar="RUN|FOLDER", help="start from these weights alone")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="delete the run that has this name")]
Help = Annotated[bool, typer.Option("--help", help="this page: every setting with its default")]

CLICK: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")  # typer brings its own copy of click

app = typer.Typer(name="tilt", add_completion=True, rich_markup_mode=None, pretty_exceptions_enable=False)
data = typer.Typer(help="look at data, fetch public sets", rich_markup_mode=None)
app.add_typer(data, name="data")

EPILOG = (
    "`tilt ppo`, `grpo`, `rloo`, `gspo`, `reinforce-pp` … are `tilt rl` with that algorithm, `tilt ipo`, `kto`, `simpo`, `orpo` … are `tilt dpo` "
    "(`tilt algorithms` lists them). "
    "Settings: `tilt sft --help`. Exit codes: 0 done, 1 failed, 2 usage, 3 data, 4 not a number, 130 interrupted."
)
FREE = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.callback(epilog=EPILOG, invoke_without_command=True)
def tilt(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="show the version")] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="show the full trace of an error; works in any place")] = False,
) -> None:
    """Reinforcement learning for language models: SFT, reward models, PPO, GRPO, DPO and their families."""
    if version:
        print(f"tilt {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def _recipe(command: str, help: str) -> None:
    """Register a recipe as a command that takes any setting."""

    @app.command(command, help=help, context_settings=FREE, add_help_option=False)
    def _run(
        words: Words = None, dry_run: DryRun = False, quiet: Quiet = False, overwrite: Overwrite = False, resume: Resume = False,
        init_from: InitFrom = "", help: Help = False,
    ) -> None:  # fmt: skip
        from tilt.cli import recipes

        if command == "label" and words and not help:
            from tilt.cli import annotate

            if annotate.for_people(words):
                annotate.run(words)
                return
        if help:
            from tilt.cli.show import show_settings

            show_settings(command)
            return
        recipes.run(command, words or [], recipes.Switches(dry_run, quiet, overwrite, resume, init_from))


_recipe("quickstart", "offline, minutes on two cores: a verifiable task with GRPO, and SFT → reward model → PPO")
_recipe("run", "any recipe from its file")
_recipe("pretrain", "next-token training on text")
_recipe("sft", "supervised fine-tuning on answers")
_recipe("rm", "a reward model from preferences")
_recipe("prm", "a process reward model from answers whose steps are labelled")
_recipe("dpo", "preference optimisation without a reward model: DPO and its family")
_recipe("rl", "reinforcement learning with any algorithm of the table, or one of your own")
_recipe("rank", "preference data from a model's own answers, ranked by a reward")
_recipe("label", "preference data: `tilt label MODEL PROMPTS` compared by people on a page; with settings by a judge, both ways round")
_recipe("rlhf", "SFT → reward model → RL in one directory")


@app.command()
def algorithms(
    name: Annotated[str, typer.Argument(help="an algorithm, or file.py:NAME")] = "",
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OTHER] [slot.key=value …]",
            help="a second one, to compare; slots to change, as in surrogate.high=0.28",
            show_default=False,
        ),
    ] = None,
) -> None:
    """The table of algorithms; with a name its card: formulas, models, what it is unbiased for; with two names where their cards differ."""
    from tilt.cli import show

    show.show_algorithms(name, changes or [])


@app.command()
def view(
    paths: Annotated[
        list[str], typer.Argument(metavar="RUN …", help="runs, folders that hold runs, comparisons (.json), logs of other trainers")
    ],
    compare: Annotated[list[str] | None, typer.Option(help="another run, to lay over the first")] = None,
    text: Annotated[bool, typer.Option("--text", help="on this terminal instead of a page")] = False,
    step: Annotated[int | None, typer.Option(help="with --text: which stored step; by default the last", min=0)] = None,
    sort: Annotated[str, typer.Option(help="with --text: kl, reward, adv, push, length, delta, entropy or clipped, largest first")] = "",
    rising: Annotated[bool, typer.Option("--rising", help="with --text: smallest first")] = False,
    channel: Annotated[str, typer.Option(help="with --text: what colours the tokens: delta_ref, push, entropy …")] = "",
    search: Annotated[str, typer.Option(help="with --text: answers that hold this text")] = "",
    rows: Annotated[int, typer.Option(help="with --text: how many answers", min=1)] = 8,
    port: Annotated[
        int | None, typer.Option(help="a port of this machine; by default 8077 or the next that is free", min=0, max=65535)
    ] = None,
    host: Annotated[str, typer.Option(help="another address than this machine's own; the page's address then holds a token")] = "127.0.0.1",
    no_browser: Annotated[bool, typer.Option("--no-browser", help="only print the address")] = False,
) -> None:
    """Runs in the browser: curves, answers, and every token's story, live; `--text` on the terminal."""
    from tilt.cli import view as viewing

    if text:
        from rich.console import Console

        from tilt.inspect.terminal import show

        console = Console(highlight=False, markup=False)
        show(viewing.only(paths), console, step=step, sort=sort, channel=channel, rows=rows, search=search, rising=rising)
        return
    viewing.view([*paths, *(compare or [])], host=host, port=port, browser=not no_browser)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="a run (its last checkpoint; RUN:120 that of step 120), a checkpoint's folder or a hub name")],
    b: Annotated[str, typer.Argument(help="the other one, usually the trained one")],
    reference: Annotated[str, typer.Option(help="a third one to measure b against")] = "",
    texts: Annotated[
        str, typer.Option(help="answers to read: a run (its last stored step, else its held-out data) or a file; by default those of b")
    ] = "",
    prompts: Annotated[int, typer.Option(help="how many texts at most", min=1)] = 200,
    generate: Annotated[int, typer.Option(help="answers of both to so many of the prompts, side by side", min=0)] = 0,
    max_tokens: Annotated[int, typer.Option(help="longest generated answer", min=1)] = 128,
    seed: Annotated[int, typer.Option(help="of the generated answers", min=0)] = 0,
    out: Annotated[str, typer.Option(help="a .json file for tilt view")] = "",
    json: Annotated[bool, typer.Option("--json", help="everything as one JSON object")] = False,
) -> None:
    """What training changed between two checkpoints: the same texts under both, token by token."""
    from tilt.cli.compare import show_comparison

    show_comparison(a, b, reference, texts, prompts, out, generate, max_tokens, seed, json)


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="a run's folder")],
    out: Annotated[str, typer.Option(help="the file; by default report.html in the run's folder")] = "",
) -> None:
    """A run as one HTML file of at most 10 MB that needs no network."""
    from pathlib import Path

    from tilt.cli import view as viewing
    from tilt.inspect.report import write_report

    book = viewing.only([run])
    place = Path(out) if out else book.path / "report.html"
    print(f"{place}  {write_report(book, place) / 1e6:.1f} MB")


@app.command("plot")
def plot_(
    runs: Annotated[list[str], typer.Argument(metavar="RUN …", help="one run or several, laid over each other")],
    out: Annotated[str, typer.Option(help="the picture: .png, .svg or .pdf")] = "curves.png",
    metrics: Annotated[str, typer.Option(help="names with commas between; by default the main ones")] = "",
) -> None:
    """The main curves of runs as a small picture (pip install tilt-rl[plot])."""
    from tilt.cli.plot import plot

    print(plot(runs, out, [name.strip() for name in metrics.split(",") if name.strip()]))


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="a file or folder that another trainer wrote")],
    out: Annotated[str, typer.Option(help="the run directory to write; by default a temporary one")] = "",
    format: Annotated[str, typer.Option(help="trl, prime-rl, tinker, board, verl, jsonl or metrics; by default it is recognised")] = "",
) -> None:
    """The log of TRL, prime-rl, verl, Tinker, RLLoggingBoard, JSON lines or a table of metrics as a run directory."""
    from tilt.cli.imports import bring

    bring(source, out, format)


@app.command()
def trace(
    words: Annotated[
        list[str], typer.Argument(metavar="NAME … [slot.key=value …]", help="algorithms, side by side where several; then slots to change")
    ],
    run: Annotated[str, typer.Option(help="a run's folder: one of its stored batches instead of the fixture")] = "",
    step: Annotated[int | None, typer.Option(help="which stored step; by default the last", min=0)] = None,
    group: Annotated[int, typer.Option(help="which prompt's answers to show", min=0)] = 0,
    json: Annotated[bool, typer.Option("--json", help="everything as one JSON object")] = False,
) -> None:
    """One step, every number beside its formula, the function that computed it, and its source."""
    from tilt.cli.trace import show_trace

    show_trace(words, run, step, group, json)


@app.command()
def audit(
    name: Annotated[str, typer.Argument(help="an algorithm, a recipe's file, or file.py:NAME")] = "",
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="[slot.key=value …]", help="slots to change, as in credit.scale=none", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="as one JSON object, a list with --all")] = False,
    everything: Annotated[bool, typer.Option("--all", help="every row of the table")] = False,
) -> None:
    """What a row's expected gradient is, by exact enumeration: bias, variance, invariances, a verdict. Exit code 1 where it is mistaken."""
    from tilt.cli.audit import show_audit

    raise typer.Exit(show_audit(name, changes or [], json, everything))


@data.command("show")
def data_show(
    source: Annotated[str, typer.Argument(metavar="FILE", help="a file, a folder, or the name of a public set")],
    tokenizer: Annotated[str, typer.Option(help="a model folder: examples are shown token by token")] = "",
    want: Annotated[
        str, typer.Option("--as", help="text, prompt, sft, preference, unpaired or stepwise; by default the fullest reading")
    ] = "",
    examples: Annotated[int, typer.Option(help="how many examples", min=0)] = 3,
) -> None:
    """Columns, detected type, counts, lengths, and three examples."""
    from tilt.cli import show

    show.show_data(source, tokenizer, want, examples)


@data.command("get")
def data_get(name: Annotated[str, typer.Argument(help="the name of a public set; without one they are listed")] = "") -> None:
    """Fetch a public data set from its source: the licence is shown, the checksum verified."""
    from tilt.cli import show

    show.get_data(name)


@app.command()
def classic(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ENV [key=value …] | eval RUN", help="an environment, then settings; or a saved agent to judge", show_default=False
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="value-iteration, policy-iteration, q-learning, sarsa, expected-sarsa, double-q; dqn, reinforce, a2c, ppo, ppo-kl, trpo"
        ),
    ] = "",
    name: Annotated[str, typer.Option(help="the run's name; without one it is made up")] = "",
    root: Annotated[str, typer.Option(help="the folder with the runs")] = "runs",
    episodes: Annotated[int, typer.Option(help="episodes of the evaluation", min=1)] = 100,
    stochastic: Annotated[bool, typer.Option("--stochastic", help="evaluate with drawn actions, not the likeliest")] = False,
    quiet: Quiet = False,
) -> None:
    """Classic reinforcement learning: grids and control tasks, from value iteration to PPO; the agent is saved."""
    from tilt.cli import classic as commands

    commands.run(words or [], commands.Choices(method, name, root, episodes, stochastic, quiet))


@app.command()
def runs(
    root: Annotated[str, typer.Option(help="the folder with the runs")] = "runs",
    json: Annotated[bool, typer.Option("--json", help="as one JSON list")] = False,
) -> None:
    """List the runs: status, algorithm, model, step, last reward, age."""
    from tilt.cli import show

    show.show_runs(root, json)


@app.command()
def replay(
    run: Annotated[str, typer.Argument(help="a run's folder; of a pipeline, all its stages")],
    steps: Annotated[str, typer.Argument(metavar="STEP|FIRST:LAST|all", help="which steps to do again")] = "all",
    json: Annotated[bool, typer.Option("--json", help="as one JSON list")] = False,
) -> None:
    """Do steps of a run again, from the nearest checkpoint before and with the stored rewards: the same bits? Exit code 1 where they are not."""
    from tilt.cli.replay import show_replay

    raise typer.Exit(show_replay(run, steps, json))


@app.command()
def env() -> None:
    """Versions, devices, memory, threads and caches, fit to be pasted in an issue."""
    from tilt.cli import show

    show.show_environment()


@app.command()
def bench(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL | RECIPE.yaml …] [key=value …]",
            help="a model or a recipe of rl, then settings of rl; by default a model of 1 M random weights",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[int | None, typer.Option(help="tokens of a prompt, by default 64", min=1)] = None,
    new: Annotated[int | None, typer.Option(help="tokens of an answer, 64", min=1)] = None,
    samples: Annotated[int | None, typer.Option(help="answers to a prompt, 8", min=1)] = None,
    answers: Annotated[int | None, typer.Option(help="answers a step, 64", min=1)] = None,
    width: Annotated[int | None, typer.Option(help="of the random model, 128", min=1)] = None,
    layers: Annotated[int | None, typer.Option(help="of the random model, 4", min=1)] = None,
    heads: Annotated[int | None, typer.Option(help="of the random model, 4", min=1)] = None,
    kv_heads: Annotated[int | None, typer.Option(help="its heads of keys, 2", min=1)] = None,
    inner: Annotated[int | None, typer.Option(help="width of its feed-forward layers, 384", min=1)] = None,
    vocabulary: Annotated[int | None, typer.Option(help="of the random model, 1024", min=1)] = None,
    steps: Annotated[int, typer.Option(help="whole steps to take the median of, after one to warm up", min=1)] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads, 0 = all cores", min=0)] = 0,
    json: Annotated[bool, typer.Option("--json", help="as one JSON object")] = False,
) -> None:
    """Tokens a second, shares of the machine's measured peaks, memory and the phases of whole steps, on the real code."""
    from tilt.cli.bench import show_bench

    asked = {"prompt": prompt, "new": new, "samples": samples, "answers": answers}
    made = {"width": width, "layers": layers, "heads": heads, "kv_heads": kv_heads, "inner": inner, "vocabulary": vocabulary}
    show_bench([*(words or []), *([f"threads={threads}"] if threads else [])], asked | made, steps, json)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="a checkpoint folder, a run folder, or a hub name")],
    prompt: Annotated[list[str], typer.Option("--prompt", help="the prompt; may be repeated")],
    samples: Annotated[int, typer.Option("-n", "--samples", help="answers to each prompt", min=1)] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy", min=0.0)] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="longest answer", min=1)] = 128,
    seed: Annotated[int, typer.Option(help="the same seed gives the same answers", min=0)] = 0,
    json: Annotated[bool, typer.Option("--json", help="one JSON object a line")] = False,
) -> None:
    """Answer prompts."""
    from tilt.cli import talk

    talk.generate(model, prompt, samples, temperature, max_tokens, seed, json)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="a checkpoint folder, a run folder, or a hub name")],
    temperature: Annotated[float, typer.Option(help="0 is greedy", min=0.0)] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="longest answer", min=1)] = 256,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Talk to a model. /reset forgets, /temp 0.7 changes the temperature, /quit ends."""
    from tilt.cli import talk

    talk.chat(model, temperature, max_tokens, seed)


def _known() -> list[str]:
    return list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def _dispatch(words: list[str]) -> int:
    """Run a command and return its exit code; the name of an algorithm is `tilt rl`, `sft`, `dpo` or `rm` with it; anything else names the nearest command."""
    command = words[0] if words else ""
    if not command or command.startswith("-") or command in _known():
        return app(words, standalone_mode=False) or 0  # typer turns an interrupt into 130
    from tilt.cli import recipes
    from tilt.cli.show import show_settings
    from tilt.objectives import ALGORITHMS, PREFERENCES
    from tilt.parity import PAIR_PRESETS, PRESETS

    algorithm = command.replace("-", "_")
    recipe = recipes.trainer(algorithm)
    if not recipe:
        from tilt.config import hint

        raise UsageError(
            f"tilt has no command `{command}`: {hint(command, [*_known(), *(a.replace('_', '-') for a in (*ALGORITHMS, *PRESETS, *PREFERENCES, *PAIR_PRESETS))])}"
        )
    if "--help" in words[1:]:
        show_settings(recipe)
        return 0
    switches, rest = recipes.switches(words[1:])
    recipes.run(recipe, rest, switches, [f"algorithm={algorithm}"])
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `tilt` with these arguments; the exit code. Errors go to stderr, short; `--traceback` in any place shows all."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    full = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    try:
        code = _dispatch(words)
    except CLICK as error:
        return _fail(
            f"{error.format_message()}\n`{' '.join(['tilt', *(w for w in words[:1] if w and w[0] != '-'), '--help'])}` shows the options",
            2,
            full,
        )
    except TiltError as error:
        return _fail(str(error), error.exit_code, full)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            return _fail(f"{str(error.filename)[:80]}…: this cannot be the name of a file", 2, full)
        from traceback import extract_tb

        last = extract_tb(error.__traceback__)[-1]
        return _fail(
            f"{type(error).__name__}: {error}\n  at {last.filename}:{last.lineno}\n  this is not a known kind of mistake; --traceback shows all of it",
            1,
            full,
        )
    if code == 130:
        print("\ninterrupted", file=sys.stderr)
    return code


def _fail(message: str, code: int, full: bool) -> int:
    from tilt.runs.secrets import masked
    from tilt.runs.text import inert

    if full:
        import traceback

        print(masked(traceback.format_exc()), file=sys.stderr, end="")
    lines = inert(masked(message), newline="\n").split("\n")
    shown = lines if len(lines) <= 40 else [*lines[:38], f"… and {len(lines) - 38} more lines"]
    print("error: " + "\n".join(shown), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
