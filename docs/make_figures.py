"""Draw the figures of docs/figures from the library's own functions: `python docs/make_figures.py` (needs matplotlib, the extra `plot`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilt.distributions import k1, k2, k3
from tilt.objectives import Clip, Fidelity, Logistic

FOLDER = Path(__file__).with_name("figures")
BLUE, RED, GREEN, GREY, PURPLE, AMBER = "#2563eb", "#dc2626", "#059669", "#6b7280", "#9333ea", "#d97706"
CASES = (  # ratio, advantage: the six cases of the clip, numbered as they are drawn
    (0.6, 1.0), (1.0, 1.0), (1.5, 1.0), (0.6, -1.0), (1.0, -1.0), (1.5, -1.0),
)  # fmt: skip


def gain_and_slope(ratio: float, advantage: float, low: float = 0.2, high: float = 0.2) -> tuple[float, float]:
    """The clipped gain at a ratio, and its derivative by the ratio."""
    rho = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    gain = Clip(low, high)(rho, rho.log(), torch.tensor([advantage], dtype=torch.float64))
    gain.sum().backward()
    assert rho.grad is not None
    return gain.item(), rho.grad.item()


def loss_and_slope(
    link: Callable[[Tensor, Tensor], Tensor], margins: Sequence[float], probability: float = 1.0
) -> tuple[list[float], list[float]]:
    """A link's loss at these margins, and its derivative by the margin."""
    h = torch.tensor(margins, dtype=torch.float64, requires_grad=True)
    loss = link(h, torch.full_like(h, probability))
    loss.sum().backward()
    assert h.grad is not None
    return loss.tolist(), h.grad.tolist()


def estimates(x: Sequence[float]) -> dict[str, list[float]]:
    """k1, k2, k3 of a sampled action as functions of x = reference / policy."""
    u = -torch.tensor(x, dtype=torch.float64).log()
    return {"k1 = -ln x": k1(u).tolist(), "k2 = (ln x)² / 2": k2(u).tolist(), "k3 = x - ln x - 1": k3(u).tolist()}


def grid(low: float, high: float, count: int = 241) -> list[float]:
    return [low + (high - low) * i / (count - 1) for i in range(count)]


def clip_cases(plot: Any) -> Any:
    """The gain of PPO's clip over the ratio, for a good and a bad action, with the six cases and their slopes."""
    figure, axes = plot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, advantage, name in zip(axes, (1.0, -1.0), ("good action, Adv = 1", "bad action, Adv = -1"), strict=True):
        x = grid(0.3, 1.8)
        axis.plot(x, [r * advantage for r in x], color=GREY, linestyle=":", label="ratio × Adv")
        axis.plot(x, [gain_and_slope(r, advantage)[0] for r in x], color=BLUE, linewidth=2, label="clipped gain")
        for number, (ratio, sign) in enumerate(CASES, 1):
            if sign == advantage:
                gain, slope = gain_and_slope(ratio, sign)
                axis.plot([ratio], [gain], "o", color=RED if slope == 0 else GREEN)
                axis.annotate(
                    f"{number}: slope {slope:.0f}",
                    (ratio, gain),
                    textcoords="offset points",
                    xytext=(0, 9 if advantage > 0 else -16),
                    ha="center",
                )
        axis.set(title=name, xlabel="ratio policy / old", ylim=(0.1, 2.05) if advantage > 0 else (-2.05, -0.1))
        axis.legend(frameon=False, loc="lower right" if advantage > 0 else "lower left", fontsize=8)
    return figure


def smoothed_logistic(plot: Any) -> Any:
    """The loss of a pair over its margin when a share of the labels is wrong: the minimum moves from infinity to log((1 - a) / a)."""
    figure, axis = plot.subplots(figsize=(5.2, 3.4), layout="constrained")
    x = grid(-6, 6)
    for share, colour in zip((0.0, 0.1, 0.3, 0.5, 1.0), (BLUE, GREEN, AMBER, GREY, RED), strict=True):
        axis.plot(x, loss_and_slope(Logistic(share), x)[0], color=colour, label=f"smoothing {share:g}")
    axis.set(xlabel="margin h", ylabel="loss", ylim=(0, 6))
    axis.legend(frameon=False, fontsize=8)
    return figure


def fidelity(plot: Any) -> Any:
    """Fidelity against the logistic loss: bounded, and its gradient vanishes at both ends, so an outlier pulls at nothing."""
    figure, axes = plot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    x = grid(-8, 8)
    for link, name, colour in (
        (Logistic(), "logistic", BLUE),
        (Fidelity(), "fidelity", RED),
        (Fidelity(0.9), "fidelity, label 0.9", AMBER),
    ):
        loss, slope = loss_and_slope(link, x)
        axes[0].plot(x, loss, color=colour, label=name)
        axes[1].plot(x, slope, color=colour)
    axes[0].set(title="loss", xlabel="margin h", ylim=(0, 4))
    axes[1].set(title="gradient", xlabel="margin h")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def kl_estimates(plot: Any) -> Any:
    """What one sample says of KL(policy || reference): k1 may be negative, k2 and k3 are not, and all touch 0 where the policies agree."""
    figure, axis = plot.subplots(figsize=(5.2, 3.4), layout="constrained")
    x = grid(0.05, 3.5)
    for (name, values), colour in zip(estimates(x).items(), (GREY, GREEN, BLUE), strict=True):
        axis.plot(x, values, color=colour, label=name)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set(xlabel="x = reference / policy of the sampled action", ylim=(-1.5, 3))
    axis.legend(frameon=False, fontsize=8)
    return figure


Box = tuple[str, float, float, str]


def _flow(plot: Any, boxes: dict[str, Box], arrows: Sequence[tuple[str, str, str]], size: tuple[float, float]) -> Any:
    """Boxes (text, x, y, colour) in units of 1 × 1 and labelled arrows between them."""
    figure, axis = plot.subplots(figsize=size, layout="constrained")
    style = {"boxstyle": "round,pad=0.45", "facecolor": "white", "linewidth": 1.6}
    drawn = {
        name: axis.text(x, y, text, ha="center", va="center", fontsize=9, zorder=3, bbox=style | {"edgecolor": colour})
        for name, (text, x, y, colour) in boxes.items()
    }
    for start, end, label in arrows:
        (_, x0, y0, _), (_, x1, y1, _) = boxes[start], boxes[end]
        ends = {"patchA": drawn[start].get_bbox_patch(), "patchB": drawn[end].get_bbox_patch(), "shrinkA": 2, "shrinkB": 2}
        axis.annotate("", (x1, y1), (x0, y0), arrowprops=ends | {"arrowstyle": "->", "color": GREY, "linewidth": 1.1})
        axis.text((x0 + x1) / 2, (y0 + y1) / 2, label, ha="center", va="center", fontsize=7.5, color=GREY, backgroundcolor="white")
    xs, ys = [b[1] for b in boxes.values()], [b[2] for b in boxes.values()]
    axis.set(xlim=(min(xs) - 0.7, max(xs) + 0.7), ylim=(min(ys) - 0.45, max(ys) + 0.45))
    axis.axis("off")
    return figure


def flow_ppo(plot: Any) -> Any:
    """One step of PPO with four models: what flows where."""
    boxes: dict[str, Box] = {
        "prompts": ("prompts", 0, 2, GREY), "policy": ("policy\n(actor)", 1.3, 2, BLUE), "answers": ("answers, l_old", 2.6, 2, GREY),
        "reward": ("reward model\nfrozen", 3.9, 2.9, AMBER), "reference": ("reference\nfrozen", 3.9, 2, GREEN), "critic": ("critic", 3.9, 1.1, PURPLE),
        "shaped": ("r_t = score on the last\n- kl (l_old - l_ref)", 5.4, 2.45, GREY), "gae": ("GAE: advantages,\nreturns", 6.8, 1.75, GREY),
        "loss": ("clipped gain", 5.4, 0.35, BLUE), "value": ("value loss", 6.8, 0.35, PURPLE),
    }  # fmt: skip
    arrows = [
        ("prompts", "policy", ""), ("policy", "answers", "samples"), ("answers", "reward", ""), ("answers", "reference", ""), ("answers", "critic", ""),
        ("reward", "shaped", "R"), ("reference", "shaped", "l_ref"), ("shaped", "gae", "r"), ("critic", "gae", "V"), ("gae", "loss", "Adv"), ("gae", "value", "R_t"),
        ("loss", "policy", "gradient"), ("value", "critic", "gradient"),
    ]  # fmt: skip
    return _flow(plot, boxes, arrows, (10.5, 4.2))


def flow_grpo(plot: Any) -> Any:
    """One step of GRPO: no critic; the group is the baseline and the KL divergence stands in the loss."""
    boxes: dict[str, Box] = {
        "prompts": ("prompts", 0, 1.5, GREY), "policy": ("policy", 1.3, 1.5, BLUE), "answers": ("G answers to\neach prompt", 2.7, 1.5, GREY),
        "reward": ("reward model\nor rule", 4.1, 2.2, AMBER), "reference": ("reference\nfrozen", 4.1, 0.8, GREEN),
        "group": ("(R - mean) / std\nof the group", 5.6, 2.2, GREY), "loss": ("clipped gain\n- beta k3", 5.6, 0.8, BLUE),
    }  # fmt: skip
    arrows = [
        ("prompts", "policy", ""), ("policy", "answers", "samples"), ("answers", "reward", ""), ("answers", "reference", ""), ("reward", "group", "R"),
        ("group", "loss", "Adv"), ("reference", "loss", "l_ref"), ("loss", "policy", "gradient"),
    ]  # fmt: skip
    return _flow(plot, boxes, arrows, (9, 3.4))


def four_models(plot: Any) -> Any:
    """The four models of PPO: where each comes from, and which of them are trained."""
    boxes: dict[str, Box] = {
        "base": ("base model", 0, 1.5, GREY), "sft": ("SFT model", 1.5, 1.5, GREY), "policy": ("policy: trained", 3.4, 2.6, BLUE),
        "reference": ("reference: frozen", 3.4, 1.5, GREEN), "reward": ("reward model: frozen", 3.4, 0.4, AMBER), "critic": ("critic: trained", 5.3, 0.4, PURPLE),
    }  # fmt: skip
    arrows = [
        ("base", "sft", "demonstrations"), ("sft", "policy", "copy"), ("sft", "reference", "copy"), ("sft", "reward", "preferences"), ("reward", "critic", "copy"),
    ]  # fmt: skip
    return _flow(plot, boxes, arrows, (8.5, 3.4))


FIGURES = (clip_cases, smoothed_logistic, fidelity, kl_estimates, flow_ppo, flow_grpo, four_models)


def main() -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "tilt", "svg.fonttype": "none", "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False}
    )
    from matplotlib import pyplot

    FOLDER.mkdir(exist_ok=True)
    for draw in FIGURES:
        figure = draw(pyplot)
        figure.savefig(FOLDER / f"{draw.__name__}.svg", metadata={"Date": None})
        pyplot.close(figure)


if __name__ == "__main__":
    main()
