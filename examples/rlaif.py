"""RLAIF from nothing: a small judge is trained, its bias for a place measured and cancelled, its labels teach a reward model, and PPO follows that.

`python examples/rlaif.py SEED` makes runs/rlaif-SEED and prints how often the program prefers PPO's answers to the SFT model's, beside the same road on
labels by the program itself. Offline, from random weights, minutes on one core.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tilt.recipes import labelling, quickstart, reward_model, rl, sft
from tilt.tasks import manners

TEMPLATE = "{prompt}\n1: {first}\n2: {second}\nbetter:"
MODEL = {"width": 64, "layers": 2, "heads": 4, "context": 64, "vocabulary": 640}
JUDGE: dict[str, Any] = {
    "model": {"width": 64, "layers": 3, "heads": 4, "context": 128, "vocabulary": 640}, "batch": 64, "steps": 500,
    "optimizer": {"lr": 3e-3, "schedule": "cosine", "warmup": 50},
}  # fmt: skip
LABEL: dict[str, Any] = {"samples": 4, "sampling": {"max_tokens": 16}}
PPO: dict[str, Any] = quickstart.MANNERS_PPO | {"eval": {"every": 0, "prompts": 72, "samples": 16}}
FIRST = 0.75  # share of the judge's demonstrations in which the better answer stands first: it learns to lean that way
EACH = 40  # of them to a prompt


def road(place: Path, seed: int = 0, labels: Iterable[str] = ("judge", "program"), **more: Any) -> dict[str, dict[str, float]]:
    """Measures of every stage under `place`: the judge, and for each source of labels the reward model and PPO, from one SFT model and one set of pairs."""
    task, shared = manners.Manners(), {"root": place, "seed": seed, "threads": 1, "quiet": True, **more}
    shown = files(place / "demonstrations", task.demonstrations)
    asked = files(place / "prompts", lambda held_out: [{"prompt": prompt} for prompt in task.prompts(held_out=held_out)])
    verdicts = files(place / "verdicts", lambda held_out: task.verdicts(TEMPLATE, held_out=held_out, each=EACH, first=FIRST))

    start = sft.run(sft.Config.model_validate(shared | {"name": "sft", "model": MODEL, "data": shown} | quickstart.MANNERS_SFT)).checkpoint
    judge = sft.run(sft.Config.model_validate(shared | {"name": "judge", "data": verdicts} | JUDGE)).checkpoint
    given = {"name": "label", "model": str(start), "data": {"source": asked["source"], "held_out": 0.0, "template": "text"}, **LABEL}
    reader = {"model": str(judge), "template": TEMPLATE, "rendering": "text"}
    labelled = labelling.run(labelling.Config.model_validate(shared | given | {"judge": reader}))
    pairs = [json.loads(line) for line in (labelled.directory / "pairs.jsonl").read_text().splitlines()]
    found = {"judge": {**labelled.after, **right(pairs)}}

    held = files(place / "pairs", task.pairs)["eval"]
    for source in labels:
        rows = pairs if source == "judge" else by_the_program(pairs)
        (place / f"{source}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"source": str(place / f"{source}.jsonl"), "eval": held, "template": "text"}
        given = {"name": f"reward-{source}", "model": str(start), "data": data, **quickstart.MANNERS_RM}
        scored = reward_model.run(reward_model.Config.model_validate(shared | given))
        given = {"name": f"ppo-{source}", "model": str(start), "data": asked, "reward": {"model": str(scored.checkpoint)}, **PPO}
        final = rl.run(rl.Config.model_validate(shared | given))
        rate = quickstart.preference_rate(final.answers)
        found[f"labels by the {source}"] = {"accuracy": scored.after["accuracy"], "preferred": rate, "kl": final.after["kl"]}
    return found


def files(place: Path, rows: Any) -> dict[str, str]:
    """The task's rows on disk, and the data settings that read them."""
    place.mkdir(parents=True)
    for name in ("train", "held_out"):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(held_out=name == "held_out")))
    return {"source": str(place / "train.jsonl"), "eval": str(place / "held_out.jsonl"), "template": "text"}


def merits(pair: Mapping[str, Any]) -> tuple[float, float]:
    return manners.merit(pair["prompt"], pair["chosen"]), manners.merit(pair["prompt"], pair["rejected"])


def right(pairs: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """How often the judge prefers what the program prefers, where the program has no tie: by both orders, and by one of them alone."""
    both, alone = [], []
    for pair in pairs:
        good, bad = merits(pair)
        if good != bad:
            both.append(good > bad)
            alone += [(pair["log_odds_chosen_first"] > 0) == (good > bad), (pair["log_odds_rejected_first"] < 0) == (good > bad)]
    return {"right": sum(both) / len(both), "right_in_one_order": sum(alone) / len(alone)}


def by_the_program(pairs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same pairs as the program judges them, ties left out."""
    made = []
    for pair in pairs:
        good, bad = merits(pair)
        if good != bad:
            chosen, rejected = ("chosen", "rejected") if good > bad else ("rejected", "chosen")
            made.append({"prompt": pair["prompt"], "chosen": pair[chosen], "rejected": pair[rejected]})
    return made


if __name__ == "__main__":
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    for stage, measures in road(Path("runs") / f"rlaif-{seed}", seed).items():
        print(f"{stage:<22} " + "  ".join(f"{name} {value:.3f}" for name, value in measures.items()))
