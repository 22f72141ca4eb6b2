"""Measure and write docs/comparisons.md: `python docs/make_comparisons.py [SECTION …]`; three seeds, one thread, tens of minutes on two cores.

Each section's figures are kept in docs/data/comparisons.json, so that one can be measured again alone; with no new measurement
(`python docs/make_comparisons.py none`) the page is only written again.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from tilt.data.packing import pack
from tilt.data.rollouts import Prompt, Sampling
from tilt.data.tokenizers import characters
from tilt.models.policy import Policy
from tilt.objectives import ALGORITHMS
from tilt.objectives.card import models
from tilt.oracle.expectation import Situation, expect
from tilt.oracle.token_mdp import TokenMDP
from tilt.recipes import opening, quickstart, reward_model, rl, sft
from tilt.sampling.sampler import Sampler
from tilt.tasks import arithmetic, manners

DOCS = Path(__file__).parent
DATA = DOCS / "data" / "comparisons.json"
SEEDS = (0, 1, 2)
Figures = dict[str, Any]


def shared(folder: Path, seed: int) -> dict[str, Any]:
    return {"seed": seed, "threads": 1, "quiet": True, "root": folder / f"seed{seed}"}


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation over the seeds."""
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def lines(result: Any) -> list[dict[str, float]]:
    return [json.loads(line) for line in result.directory.metrics.read_text().splitlines()]


def column(result: Any, key: str) -> list[float]:
    return [line[key] for line in lines(result) if key in line]


# ------------------------------------------------------------------------------- PPO, RLOO, GRPO on manners


def polite(folder: Path, seed: int) -> tuple[dict[str, Any], str, str]:
    """Data, SFT model and reward model of the manners task, small."""
    task = manners.Manners()
    files = {part: task.demonstrations(held_out=part == "held") for part in ("train", "held")}
    shown = {
        "source": write(folder / "shown.jsonl", files["train"]),
        "eval": write(folder / "shown_held.jsonl", files["held"]),
        "template": "text",
    }
    asked = {name: [{"prompt": p} for p in task.prompts(held_out=name == "held")] for name in ("train", "held")}
    prompts = {
        "source": write(folder / "asked.jsonl", asked["train"]),
        "eval": write(folder / "asked_held.jsonl", asked["held"]),
        "template": "text",
    }
    paired = {name: task.pairs(held_out=name == "held") for name in ("train", "held")}
    pairs = {
        "source": write(folder / "pairs.jsonl", paired["train"]),
        "eval": write(folder / "pairs_held.jsonl", paired["held"]),
        "template": "text",
    }
    model = {"width": 64, "layers": 2, "heads": 4, "context": 64, "vocabulary": 640}
    start = sft.run(
        sft.Config.model_validate(shared(folder, seed) | {"name": "sft", "model": model, "data": shown} | quickstart.MANNERS_SFT)
    )
    judge = {"name": "rm", "model": str(start.checkpoint), "data": pairs} | quickstart.MANNERS_RM
    scored = reward_model.run(reward_model.Config.model_validate(shared(folder, seed) | judge))
    return prompts, str(start.checkpoint), str(scored.checkpoint)


STRENGTHS = (0.05, 0.2, 0.5)


def frontier(folder: Path) -> Figures:
    """Reward and divergence of held-out answers after the same number of steps, by algorithm and strength of the tie; models held and step time."""
    found: Figures = {"reward": {}, "kl": {}, "seconds": {}, "models": {}}
    for seed in SEEDS:
        data, start, judge = polite(folder / str(seed), seed)
        for name in ("ppo", "rloo", "grpo"):
            found["models"][name] = models(ALGORITHMS[name])
            for strength in STRENGTHS:
                tie = {"penalty": {"beta": strength}} if name == "grpo" else {"credit": {"kl": strength}}
                settings = quickstart.MANNERS_PPO | {"algorithm": name, "objective": tie, "steps": 40, "save": False, "rollouts_every": 0}
                settings |= {"eval": {"prompts": 72, "samples": 4}, "critic_lr": 1e-3 if name == "ppo" else None}
                given = {"name": f"{name}{strength}", "model": start, "data": data, "reward": {"model": judge, "name": "reward_model"}}
                result = rl.run(rl.Config.model_validate(shared(folder, seed) | given | settings))
                key = f"{name} {strength:g}"
                found["reward"].setdefault(key, []).append(result.after["reward"] - result.before["reward"])
                found["kl"].setdefault(key, []).append(result.after["kl"])
                found["seconds"].setdefault(name, []).append(statistics.median(column(result, "time/step")))
    return found


def frontier_page(found: Figures) -> list[str]:
    trained = ("policy", "critic")
    weights = {name: sum(4 if part in trained else 1 for part in parts) for name, parts in found["models"].items()}
    base = statistics.median(found["seconds"]["rloo"])
    held = [
        f"| {name} | {len(parts)}: {', '.join(parts)} | {weights[name]} | {statistics.median(found['seconds'][name]) / base:.2f} |"
        for name, parts in found["models"].items()
    ]
    reached = [f"| {key} | {spread(found['reward'][key])} | {spread(found['kl'][key], 2)} |" for key in found["reward"]]
    return [
        "The manners task of the quickstart: 64 prompts × 4 answers a step, 40 steps, the same SFT and reward model for all three.",
        "A model that is held costs its weights; one that is trained costs four times that (gradient and two averages of Adam).", "",
        "| algorithm | models held | memory, in weights of one model | median step time, of RLOO's |", "|---|---|---|---|", *held, "",
        "Where each ends, by the strength of its tie to the reference (`kl` of the reward for PPO and RLOO, `beta` of k3 in the loss for GRPO, whose advantages "
        "are divided by the group's deviation, so that equal numbers are not equal ties):", "",
        "| algorithm, strength | rise of the reward | sequence KL to the reference, nats |", "|---|---|---|", *reached,
    ]  # fmt: skip


# ------------------------------------------------------------------------------- the variance of the gradient


WORTH = (-0.5, 1.0, 0.2)
"""What each token of the MDP earns."""


def variance(folder: Path) -> Figures:
    """Exact, by enumeration: the variance of one answer's gradient with and without a baseline."""
    found: Figures = {}
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        mdp = TokenMDP.of(lambda prompt, answer: 0.0, prompts=1, steps=lambda prompt, answer: [WORTH[token] for token in answer])
        policy = torch.randn(mdp.prompts, len(mdp.prefixes), mdp.vocabulary, generator=generator, dtype=torch.float64)
        for name, row, samples in (
            ("return, no baseline", "reinforce", 2), ("reward to go, no baseline", "reinforce_rtg", 2), ("reward to go less the exact critic", "reinforce_baseline", 2),
            ("leave one out, 2 answers", "rloo", 2),
        ):  # fmt: skip
            found.setdefault(name, []).append(expect(ALGORITHMS[row], Situation.of(mdp, samples, policy)).noise)
    return found


def variance_page(found: Figures) -> list[str]:
    rows = [
        f"| {name} | {spread(values)} | {statistics.fmean(values) / statistics.fmean(next(iter(found.values()))):.2f} |"
        for name, values in found.items()
    ]
    return [
        "A token MDP with three tokens and answers of one to three: every batch of two answers is listed, so these are no samples (`tilt.oracle`); each token earns at once. Three random policies.",
        "", "| gradient from | total variance | of the first |", "|---|---|---|", *rows,
    ]  # fmt: skip


# ------------------------------------------------------------------------------- addition: SFT against GRPO, and three sizes


def sums(folder: Path, limit: int) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Training data with a <= b, held-out problems of the same kind, and problems with a > b, a kind that training never shows."""
    task = arithmetic.Addition(limit=limit)

    def ordered(row: Mapping[str, Any]) -> bool:
        first, second = row["prompt"].rstrip("=").split("+")
        return int(first) <= int(second)

    inside, outside = (
        [row for row in task.rows(held_out=True) if ordered(row)],
        [row for row in task.rows(held_out=True) if not ordered(row)],
    )
    train = write(folder / "train.jsonl", [row for row in task.rows(held_out=False) if ordered(row)])
    characters(arithmetic.ALPHABET).save_pretrained(folder / "tokenizer")
    return {"source": train, "eval": write(folder / "held.jsonl", inside), "template": "text"}, inside, outside


def adder(folder: Path, seed: int, data: Mapping[str, Any], width: int, stop_at: float | None, **more: Any) -> Any:
    settings = quickstart.ADDITION_SFT | {"batch": 128, "steps": 500, "stop_at": stop_at, "reward": {"exact": {"answer": "answer"}}} | more
    model = {"width": width, "layers": 2, "heads": 4, "context": 32, "tokenizer": str(folder / "tokenizer")}
    return sft.run(sft.Config.model_validate(shared(folder, seed) | {"model": model, "data": dict(data)} | settings))


def reinforced(folder: Path, seed: int, data: Mapping[str, Any], start: str, steps: int) -> Any:
    settings = quickstart.ADDITION_GRPO | {"steps": steps, "prompts": 32, "eval": {"prompts": 200, "samples": 2}, "rollouts_every": 0}
    given = {"model": start, "data": dict(data), "reward": {"exact": {"answer": "answer"}}}
    return rl.run(rl.Config.model_validate(shared(folder, seed) | given | settings))


def probe(checkpoint: Path, rows: Sequence[Mapping[str, Any]], samples: int = 8) -> tuple[float, float, float]:
    """Accuracy of sampled answers, entropy of the policy (nats a token), and different answers among `samples` to a prompt."""
    lm, tokenizer, _ = opening.language_model(str(checkpoint), None, list, 0)
    settings = Sampling(max_tokens=5, stop_ids=(tokenizer.eos_token_id,))
    asked = [Prompt(tuple(tokenizer.encode(row["prompt"], add_special_tokens=False)), i, row) for i, row in enumerate(rows[:100])]
    rollouts = Sampler(lm, tokenizer, settings).evaluate(asked, samples, step=0)
    texts = [tokenizer.decode(list(r.tokens), skip_special_tokens=True) for r in rollouts]
    right = statistics.fmean(float(text == r.prompt.columns["answer"]) for text, r in zip(texts, rollouts, strict=True))
    with torch.no_grad():
        entropy = float(Policy(lm)(pack(rollouts), entropy=True).entropy.mean())
    return right, entropy, statistics.fmean(len(set(texts[i : i + samples])) for i in range(0, len(texts), samples))


def generalise(folder: Path) -> Figures:
    found: Figures = {}
    for seed in SEEDS:
        place = folder / str(seed)
        data, inside, outside = sums(place, 40)
        start = adder(place, seed, data, 96, 0.45)
        longer = adder(place, seed, data, 96, None, model=str(start.checkpoint), steps=120)
        better = reinforced(place, seed, data, str(start.checkpoint), 60)
        for name, result in (("start: SFT to 0.45", start), ("SFT goes on", longer), ("GRPO from rewards", better)):
            measured = [*probe(result.checkpoint, inside), *probe(result.checkpoint, outside)]
            found.setdefault(name, []).append(measured)
    return found


def generalise_page(found: Figures) -> list[str]:
    rows = [
        f"| {name} | " + " | ".join(spread([seed[i] for seed in values]) for i in (0, 3, 1, 2)) + " |" for name, values in found.items()
    ]  # fmt: skip
    return [
        "Addition below 40, trained on problems with the smaller number first. In distribution: held-out problems of that kind. Out of it: the larger number first.",
        "From one SFT model, 120 more steps of SFT (15,360 demonstrations) against 60 steps of GRPO (15,360 answers, rewards only).", "",
        "| | accuracy in distribution | out of distribution | entropy, nats a token | different answers of 8 |", "|---|---|---|---|---|", *rows,
    ]  # fmt: skip


WIDTHS = (48, 96, 160)


def sizes(folder: Path) -> Figures:
    found: Figures = {}
    for seed in SEEDS:
        for width in WIDTHS:
            place = folder / f"{seed}-{width}"
            data, _, _ = sums(place, 40)
            start = adder(place, seed, data, width, 0.35)
            result = reinforced(place, seed, data, str(start.checkpoint), 40)
            found.setdefault(str(width), []).append([result.before["reward"], result.after["reward"], column(start, "step")[-1]])
    return found


def sizes_page(found: Figures) -> list[str]:
    rows = [f"| {width} | " + " | ".join(spread([seed[i] for seed in values]) for i in (2, 0, 1)) + " |" for width, values in found.items()]
    return [
        "The same 40 steps of GRPO after SFT to an accuracy of 0.35 (or 500 steps of it), for three widths of the model.", "",
        "| width | steps of SFT | accuracy before GRPO | after |", "|---|---|---|---|", *rows,
    ]  # fmt: skip


# ------------------------------------------------------------------------------- GRPO and GSPO by length

LETTERS, LENGTHS = "abcd", (2, 8, 32)


def repeated(completions: list[str], prompts: list[str], **columns: object) -> list[float]:
    """The share of positions that hold the prompt's letter."""
    return [text.count(prompt[-1]) / max(1, len(text)) for text, prompt in zip(completions, prompts, strict=True)]


def stability(folder: Path) -> Figures:
    characters(LETTERS).save_pretrained(folder / "tokenizer")
    asked = write(folder / "asked.jsonl", [{"prompt": a + b} for a in LETTERS for b in LETTERS])
    found: Figures = {}
    for seed in SEEDS:
        for name in ("grpo", "gspo"):
            for length in LENGTHS:
                settings = {
                    "algorithm": name, "objective": {"penalty": "none"}, "model": {"width": 32, "layers": 2, "heads": 2, "context": 40, "tokenizer": str(folder / "tokenizer")},
                    "data": {"source": asked, "template": "text", "held_out": 0}, "reward": repeated, "steps": 60, "prompts": 16, "samples": 8, "passes": 2, "minibatches": 2,
                    "sampling": {"max_tokens": length}, "optimizer": {"lr": 3e-3, "warmup": 3}, "rollouts_every": 0, "save": False,
                }  # fmt: skip
                result = rl.run(rl.Config.model_validate(shared(folder, seed) | settings))
                rewards = column(result, "reward")
                falls = [a - b for a, b in pairwise(rewards)]
                measured = [
                    statistics.fmean(rewards[-5:]),
                    max(falls),
                    statistics.fmean(column(result, "policy/approxkl_avg")),
                    statistics.fmean(column(result, "policy/clipfrac_avg")),
                ]
                found.setdefault(f"{name} {length}", []).append(measured)
    return found


def stability_page(found: Figures) -> list[str]:
    rows = [f"| {key} | " + " | ".join(spread([seed[i] for seed in values]) for i in range(4)) + " |" for key, values in found.items()]
    return [
        "Repeat the prompt's letter, answers cut at 2, 8 and 32 tokens; two passes in two minibatches, lr 3e-3, 60 steps, no KL term.", "",
        "| algorithm, length | reward at the end | greatest fall in one step | approxkl | clip fraction |", "|---|---|---|---|---|", *rows,
    ]  # fmt: skip


# ------------------------------------------------------------------------------- the page

SECTIONS: dict[str, tuple[str, Callable[[Path], Figures], Callable[[Figures], list[str]]]] = {
    "frontier": ("PPO, RLOO and GRPO: models, step time, and the frontier of reward and KL", frontier, frontier_page),
    "variance": ("The variance of the gradient with and without a critic", variance, variance_page),
    "generalise": ("SFT against GRPO, in and out of distribution", generalise, generalise_page),
    "stability": ("GRPO against GSPO by length", stability, stability_page),
    "sizes": ("The same RL on three sizes", sizes, sizes_page),
}


def written(found: Mapping[str, Figures]) -> str:
    """The page from the kept figures."""
    parts = [
        "# Comparisons", "", "Mean ± standard deviation over three seeds, on tiny models and tasks that the package makes up, one thread: directions, not",
        "verdicts on large models. `python docs/make_comparisons.py` measures all of it again.",
    ]  # fmt: skip
    for name, (title, _, tell) in SECTIONS.items():
        if name in found:
            parts += ["", f"## {title}", "", *tell(found[name])]
    return "\n".join([*parts, ""])


def main(wanted: Sequence[str]) -> None:
    found = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {}
    for name, (_, measure, _) in SECTIONS.items():
        if not wanted or name in wanted:
            with tempfile.TemporaryDirectory() as folder:
                found[name] = measure(Path(folder))
            DATA.parent.mkdir(exist_ok=True)
            DATA.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"{name}: measured")
    (DOCS / "comparisons.md").write_text(written(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
