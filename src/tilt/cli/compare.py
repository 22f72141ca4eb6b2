"""`tilt compare`: what training changed between two checkpoints, on the same texts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tilt.cli.talk import folder_of
from tilt.data import formats, sources
from tilt.data.rendering import Renderer, renderer
from tilt.data.rollouts import Prompt, Rollout, Sampling
from tilt.errors import DataError, UsageError
from tilt.inspect.book import Book
from tilt.inspect.compared import compare, flips_of
from tilt.inspect.terminal import visible
from tilt.models import compat, loading
from tilt.models.policy import Policy
from tilt.recipes.scoring import scoring
from tilt.rewards.model import same_tokens
from tilt.runs import checkpoints
from tilt.runs.files import atomic_write
from tilt.sampling.sampler import Sampler

PLACE = re.compile(r"(.*):(\d+)")


def place_of(model: str) -> str:
    """A checkpoint's folder: RUN is its last one, RUN:120 that of step 120."""
    match = PLACE.fullmatch(model)
    if match and (Path(match[1]) / "checkpoints").is_dir():
        found = checkpoints.path_of(Path(match[1]) / "checkpoints", int(match[2]))
        if not found.is_dir():
            raise DataError(f"{match[1]} has no checkpoint of step {int(match[2])}")
        return str(found)
    return folder_of(model)


def show_comparison(
    a: str, b: str, reference: str, texts: str, prompts: int, out: str, generate: int, max_tokens: int, seed: int, as_json: bool
) -> None:
    """Compare, write the file where one is asked for, and tell the story in a few tables."""
    opened = [loading.load(place_of(name)) for name in (a, b, *([reference] if reference else []))]
    words = opened[0][1]
    for name, (_, tokenizer) in zip((b, reference), opened[1:], strict=False):
        if not same_tokens(tokenizer, words):
            raise UsageError(
                f"{name} reads other tokens than {a}, so they cannot be compared token by token\n  name checkpoints of one family"
            )
    policies = [Policy(lm).requires_grad_(False).eval() for lm, _ in opened]
    render = renderer(words, next((template for name in (b, a) if (template := _settings(name).get("data", {}).get("template"))), "auto"))
    rollouts, shown = answers(
        texts or next((name for name in (b, a) if Path(name).is_dir()), ""), render, prompts, compat.context_of(opened[0][0])
    )
    found = compare(
        policies[0], policies[1], rollouts, shown, words, names=(a, b), reference=(reference, policies[2]) if reference else None
    )
    if generate:
        spoken(found, opened, rollouts, render, generate, max_tokens, seed, b)
    if out:
        atomic_write(Path(out), json.dumps(found, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace"))
    if as_json:
        print(json.dumps(found, ensure_ascii=False, allow_nan=False))
        return
    tell(found, Console(highlight=False, markup=False))
    if out:
        print(f"tilt view {out}")


def answers(source: str, render: Renderer, count: int, context: int) -> tuple[list[Rollout], list[tuple[str, str]]]:
    """Given answers: the last stored step of a run, or rows of a file; at most `count`, each no longer than the context."""
    if not source:
        raise UsageError("no texts: name a file of prompts and completions, or a run: --texts")
    path = Path(source)
    rollouts: list[Rollout] = []
    shown: list[tuple[str, str]] = []
    if path.is_dir():
        book = Book(path)
        steps = [s["step"] for s in book.steps() if s["rows"]]
        if not steps:
            return _rows(_held_out(path), render, count, context)
        rows = book.rows(steps[-1])
        ids = rows.plain("ids")
        for i in range(min(rows.count, count)):
            if not ids[i]:
                continue
            prompt = (
                render.prompt({"prompt": rows.prompts[i]}, i)
                if not render.chat
                else Prompt(tuple(render.text(rows.prompts[i])) or (ids[i][0],), i)
            )
            rollouts.append(Rollout.demonstration(prompt, tuple(ids[i])))
            shown.append((rows.prompts[i], rows.completions[i]))
        return _fitting(rollouts, shown, context)
    return _rows(path, render, count, context)


def _held_out(run: Path) -> Path:
    """The held-out data that a run's settings name."""
    data = _settings(str(run)).get("data", {})
    found = data.get("eval") or data.get("source")
    if not found:
        raise DataError(f"{run} has stored no answers, and its settings name no data\n  name texts: --texts FILE")
    return Path(str(found))


def _settings(run: str) -> dict[str, Any]:
    """The settings of a run (RUN:120 too); nothing of what is none."""
    match = PLACE.fullmatch(run)
    try:
        found = yaml.safe_load((Path(match[1] if match else run) / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return {**found, "data": found["data"] if isinstance(found.get("data"), dict) else {}} if isinstance(found, dict) else {}


def _rows(path: Path, render: Renderer, count: int, context: int) -> tuple[list[Rollout], list[tuple[str, str]]]:
    rows = list(sources.load(str(path), limit=4 * count).rows)
    kind = next((want for want in formats.readings(rows) if want in ("preference", "sft")), None)
    if kind is None:
        raise DataError(
            f"{path} holds no answers: it needs a prompt with a completion, or with chosen and rejected\n  name other texts: --texts FILE"
        )
    made = formats.read(rows, want=kind, source=str(path)).rows
    rollouts = [
        r for i, row in enumerate(made[:count]) for r in (render.pair(row, i) if kind == "preference" else (render.demonstration(row, i),))
    ]
    decode = render.tokenizer.decode
    shown = [
        (str(r.prompt.columns.get("prompt", "")), str(decode(list(r.tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)))
        for r in rollouts
    ]
    return _fitting(rollouts, shown, context)


def _fitting(rollouts: list[Rollout], shown: list[tuple[str, str]], context: int) -> tuple[list[Rollout], list[tuple[str, str]]]:
    kept = [(r, s) for r, s in zip(rollouts, shown, strict=True) if len(r.prompt.tokens) + len(r.tokens) <= context]
    if not kept:
        raise DataError("none of the texts fits into the model's context")
    return [r for r, _ in kept], [s for _, s in kept]


def spoken(
    found: dict[str, Any], opened: list[Any], rollouts: list[Rollout], render: Renderer, count: int, max_tokens: int, seed: int, run: str
) -> None:
    """Answers of both to the same prompts with the same randomness; right and wrong where the run's own rules can tell."""
    asked = _asked(run, render, count) or list({r.prompt.tokens: r.prompt for r in rollouts}.values())[:count]
    asked = [Prompt(p.tokens, i, p.columns) for i, p in enumerate(asked)]
    sampling = Sampling(1.0, max_tokens, tuple(render.stop_ids))
    said = [
        Sampler(lm, words, sampling, seed=seed).evaluate(asked, 1, step=0, sampling=sampling, stream="compare") for lm, words in opened[:2]
    ]
    text = lambda r: str(render.tokenizer.decode(list(r.tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))
    titles = [str(p.columns.get("prompt") or render.tokenizer.decode(list(p.tokens), skip_special_tokens=True)) for p in asked]
    found["generations"] = [{"prompt": title, "a": text(x), "b": text(y)} for title, x, y in zip(titles, *said, strict=True)]
    reward = _rules(run)
    if reward is not None and all(r.prompt.columns for r in said[0]):
        judge = scoring(reward, render.tokenizer, torch.device("cpu"))
        marks = [[value >= 1 for value in judge(answers).total.tolist()] for answers in said]
        judge.close()
        found["flips"] = flips_of(
            titles,
            [(text(r), m) for r, m in zip(said[0], marks[0], strict=True)],
            [(text(r), m) for r, m in zip(said[1], marks[1], strict=True)],
        )


def _asked(run: str, render: Renderer, count: int) -> list[Prompt]:
    """The first held-out prompts of a run's settings, with all their columns; none where it is no run or its data are gone."""
    try:
        rows = sources.load(str(_held_out(Path(run))), limit=count).rows
        return render.prompts(formats.read(rows, want="prompt").rows)
    except (DataError, UsageError):
        return []


def _rules(run: str) -> Any:
    """The reward of a run's settings, where it is a rule that says right or wrong (exact, numeric, regex)."""
    reward = _settings(run).get("reward")
    return reward if isinstance(reward, dict) and {"exact", "numeric", "regex"} & set(reward) and len(reward) == 1 else None


def tell(found: dict[str, Any], console: Console) -> None:
    """The story: how far apart, where, in which tokens."""
    s = found["summary"]
    console.print(Text(visible(f"{found['a']} → {found['b']}"), style="bold"))
    if not found["ranked"]:
        console.print(Text(f"the same on {s['tokens']:,} tokens of {s['texts']} texts: no probability differs"))
        return
    console.print(Text(
        f"{s['tokens']:,} tokens of {s['texts']} texts: KL {s['mean_kl']:.3g} nats a token, {100 * s['share_of_kl_in_top_tenth_of_tokens']:.0f} % of it in a tenth of the tokens; "
        f"the top choice changed at {s['top_choice_changed']:,}, {s['unchanged_tokens']:,} are as they were; entropy {s['mean_entropy_a']:.3g} → {s['mean_entropy_b']:.3g}"
    ))  # fmt: skip
    most = Table("KL", "text", "place", "before it", "token", "what", title="What changed most", title_justify="left", box=None)
    for line in found["ranked"][:10]:
        text = found["texts"][line["text"]]
        tokens = [t if t is not None else "⟨" + str(h) + "⟩" for t, h in zip(text["tokens"], text["bytes"], strict=True)]
        t = line["position"]
        most.add_row(
            f"{line['score']:.3g}",
            str(line["text"]),
            str(t),
            visible("".join(tokens[max(0, t - 6) : t]))[-36:],
            visible(tokens[t] if t < len(tokens) else "") or "∅",
            line["reason"],
        )
    console.print(most)
    words = Table("gained", "times", "Σ Δ", "lost", "times", "Σ Δ", title="Tokens of these texts", title_justify="left", box=None)
    gained, lost = found["changed"]["tokens"]["gained"][:10], found["changed"]["tokens"]["lost"][:10]
    cell = lambda lines, i: (
        (visible(lines[i]["token"]), str(lines[i]["count"]), f"{lines[i]['delta']:.3g}") if i < len(lines) else ("", "", "")
    )
    for i in range(max(len(gained), len(lost))):
        words.add_row(*cell(gained, i), *cell(lost, i))
    console.print(words)
    if found["flips"]:
        f = found["flips"]
        console.print(
            Text(
                f"right and wrong: {len(f['gained'])} ✗→✓, {len(f['lost'])} ✓→✗, {f['both']} right in both, {f['neither']} in neither; exact McNemar p = {f['p']:.3g}"
            )
        )
    for line in found["generations"][:3]:
        console.print(Text(visible(f"  {line['prompt'][:80]}\n")[:-1]))
        console.print(Text(visible(f"    a: {line['a'][:100]}")))
        console.print(Text(visible(f"    b: {line['b'][:100]}")))
