// What an update changed: tokens, positions, entropies, push against result, over-confidence, classes, collapse.
import uPlot from "uplot";
import { element, button, choice, shown, visible, inert, finite, table } from "tilt/parts";
import { paint } from "tilt/colour";

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export async function changesView(app) {
  const { state, source, run } = app;
  const full = app.steps.filter((s) => s.channels);
  if (!full.length) return element("p", { class: "quiet", text: "No stored step has token channels (rollouts_every above 0 stores them)." });
  const step = full.some((s) => String(s.step) === state.step) ? state.step : String(full.at(-1).step);
  let found;
  try { found = await source.changed(run, step); } catch (error) { return element("p", { class: "quiet", text: inert(error.message) }); }
  const view = element("div", { class: "changes" }, element("div", { class: "bar" }, element("h2", { text: "What this update changed" }),
    choice("Step", full.map((s) => [String(s.step), `step ${s.step}`]), step, (v) => app.go({ step: v })), found.count !== undefined ? element("span", { class: "quiet", text: `${found.count.toLocaleString("en")} sampled tokens` }) : null));
  if (found.missing?.length) view.append(element("p", { class: "quiet", text: `Not shown: ${[found.missing].flat().join("; ")}.` }));
  if (found.begins?.step !== null && found.begins) view.append(element("p", { class: "warn", role: "note" }, element("b", { text: `Answers come apart from step ${found.begins.step} on` }), `, ${found.begins.position === null ? "" : `at token ${found.begins.position} in the median; `}${shown(100 * found.begins.share, 3)} % of them. One ${inert(found.begins.text, 300)} `,
    button("show it", () => app.go({ view: "rollouts", step: String(found.begins.step), step_at: String(found.begins.step), row: String(found.begins.row), token: found.begins.position === null ? null : String(found.begins.position) }), { class: "link" })));
  if (found.begins?.endless) view.append(element("p", { class: "warn", role: "note", text: `From step ${found.begins.endless.step} on ${shown(100 * found.begins.endless.share, 3)} % of the answers find no end.` }));
  if (!found.tokens) return view;
  view.append(...changedParts(app, found, (row, position) => app.go({ view: "rollouts", step, step_at: step, row: String(row), token: position === null ? null : String(position) })));
  return view;
}

export function changedParts(app, found, jump) {
  const cards = [];
  const card = (title, about, ...inner) => cards.push(element("section", { class: "panel" }, element("h3", { text: title }), about ? element("p", { class: "quiet", text: about }) : null, inner));
  const lines = (list) => table([{ text: "token" }, { text: "class" }, { text: "times", class: "n" }, { text: "Σ Δ", class: "n" }, { text: "Σ push", class: "n" }, { text: "Σ result", class: "n" }],
    list.slice(0, 15).map((t) => [element("code", { text: visible(t.token) || "∅" }), t.class, t.count, shown(t.delta), shown(t.push), shown(t.result)]));
  const by = { delta_ref: "Σ Δ against the reference", push: "Σ push", result: "Σ result", delta: "Σ Δ" }[found.tokens.by] ?? "";
  card("Tokens gained", by, found.tokens.gained.length ? lines(found.tokens.gained) : "none");
  card("Tokens lost", by, found.tokens.lost.length ? lines(found.tokens.lost) : "none");
  if (found.positions.length) card("By position in the answer", "means; a change is usually in few places", profile(app, found.positions));
  if (found.collapse.length) card("Collapse", `${found.flags ?? found.collapse.length} flags`, element("ul", { class: "flags" }, found.collapse.slice(0, 30).map((f) =>
    element("li", {}, button(`answer ${f.row}${f.position !== null ? `, token ${f.position}` : ""}`, () => jump(f.row, f.position), { class: "link" }), element("b", { text: ` ${f.name} ` }), inert(f.text, 300)))));
  else card("Collapse", null, "No answer repeats itself to its end, none lacks its stop.");
  if (found.scatter.push.length) card("push × result", `what was asked, and what came of it; ${finite(found.scatter.as_asked) ? `${shown(100 * found.scatter.as_asked, 3)} % moved as asked` : ""}${found.scatter.cut ? "; a part of the tokens is drawn" : ""}`, cloud(found.scatter));
  if (found.confident.bands.length) card("Over-confidence", `${found.confident.count} tokens above ${found.confident.above}, ${shown(found.confident.pushed_further)} of them pushed further up`,
    table([{ text: "probability", class: "n" }, ...["tokens", "pushed ↑", "↓", "looked", "rose", "crossed", "mean p", "after"].map((text) => ({ text, class: "n" }))],
      found.confident.bands.map((b) => [`${b.from}\u2009–\u2009${b.to}`, b.count, b.pushed_up, b.pushed_down, b.looked, b.rose, b.crossed, shown(b.mean_before, 5), shown(b.mean_after, 5)])),
    element("p", { class: "quiet", text: "looked: known after the step as well; crossed: of these now above their band" }),
    element("p", { class: "quiet", text: "the chance that one of n answers leaves the top choice, 1 − pⁿ" }),
    table([{ text: "p" }, ...[4, 16, 64].map((n) => ({ text: `n = ${n}`, class: "n" }))], [0.9, 0.99, 0.999].map((p) => [p, ...[4, 16, 64].map((n) => shown(found.confident.leaving.find((l) => l.p === p && l.n === n)?.chance))])));
  if (found.parts?.lines.length > 1) card("The reward and its parts", "over the answers of this step; a reward that goes with the length is a reward for length",
    table([{ text: "" }, { text: "weight", class: "n" }, { text: "mean", class: "n" }, { text: "std", class: "n" }, ...found.parts.lines.map((l) => ({ text: inert(l.name, 16), class: "n" }))],
      found.parts.lines.map((l, i) => [inert(l.name, 30), l.weight === null ? "" : shown(l.weight), shown(l.mean), shown(l.std), ...found.parts.together[i].map((v, j) => i === j ? "" : related(v))]), { class: "together" }));
  if (found.classes.length) card("By class of token", null, table([{ text: "class" }, { text: "tokens", class: "n" }, { text: "Σ |push|", class: "n" }, { text: "Σ Δ", class: "n" }, { text: "Σ KL", class: "n" }], found.classes.map((c) => [c.class, c.count, shown(c.push), shown(c.delta), shown(c.kl)])));
  if (found.entropy.percentiles.length) card("Entropy", `the fifth of the tokens with the highest entropy holds ${pc(found.entropy.top20_share_of_kl)} of Σ KL and ${pc(found.entropy.top20_share_of_push)} of Σ |push|`,
    table([{ text: "percentile" }, { text: "nats", class: "n" }], found.entropy.percentiles.map(([q, v]) => [q, shown(v)])));
  return [element("div", { class: "panels" }, cards)];
}

// A correlation, coloured like any channel.
function related(value) {
  const node = element("td", { class: "n", text: finite(value) ? value.toFixed(2).replace("-", "−") : "–" });
  paint(node, finite(value) ? value : null, { kind: "diverging", largest: 3 });
  return node;
}

const pc = (v) => finite(v) ? `${shown(100 * v, 3)} %` : "–";

function profile(app, positions) {
  const box = element("div", {});
  const names = ["kl", "delta", "push", "entropy"].filter((n) => positions.some((p) => finite(p[n])));
  const pickNow = app.state.profile && names.includes(app.state.profile) ? app.state.profile : names[0];
  box.append(element("div", { class: "bar" }, names.map((n) => button({ kl: "KL", delta: "Δ", push: "push", entropy: "entropy" }[n], () => app.go({ profile: n }), { "aria-pressed": n === pickNow }))));
  const x = positions.map((p) => (p.from + p.to - 1) / 2), y = positions.map((p) => finite(p[pickNow]) ? p[pickNow] : null);
  requestAnimationFrame(() => {
    if (!box.isConnected) return;
    const chart = new uPlot({ width: Math.max(240, box.clientWidth), height: 180, scales: { x: { time: false } }, cursor: {},
      axes: [{ stroke: () => css("--quiet"), grid: { stroke: () => css("--grid") }, size: 26 }, { stroke: () => css("--quiet"), grid: { stroke: () => css("--grid") }, size: (_, labels) => Math.max(44, 18 + 7.4 * Math.max(0, ...(labels ?? []).map((l) => l.length))), values: (_, vs) => vs.map((v) => shown(v, 2)) }],
      series: [{ label: "position" }, { label: pickNow, stroke: () => css("--line-1"), width: 1.5, points: { show: true, size: 4 }, value: (_, v) => shown(v) }] }, [x, y], box);
    app.onleave(() => chart.destroy());
  });
  return box;
}

function cloud(points) {
  const canvas = element("canvas", { class: "cloud", role: "img", "aria-label": "push against result, one dot a token" });
  const note = element("p", { class: "quiet", text: "→ push, ↑ result; orange: moved as asked, blue: against it" });
  const known = points.push.map((p, i) => [p, points.result[i], points.token[i]]).filter(([p, r]) => finite(p) && finite(r));
  const largest = (k) => Math.max(1e-12, ...known.map((e) => Math.abs(e[k])));
  const mx = largest(0), my = largest(1), log = (v, m) => Math.sign(v) * Math.log1p((20 * Math.abs(v)) / m) / Math.log(21);
  const spot = (e, w, h) => [w / 2 + log(e[0], mx) * (w / 2 - 8), h / 2 - log(e[1], my) * (h / 2 - 8)];
  const draw = () => {
    const w = canvas.clientWidth, h = canvas.clientHeight, scale = devicePixelRatio || 1, c = canvas.getContext("2d");
    if (!w) return;
    canvas.width = w * scale; canvas.height = h * scale; c.scale(scale, scale);
    c.fillStyle = css("--grid"); c.fillRect(0, h / 2, w, 1); c.fillRect(w / 2, 0, 1, h);
    c.globalAlpha = 0.55;
    for (const e of known) { const [x, y] = spot(e, w, h); c.fillStyle = css(e[0] * e[1] >= 0 ? "--up" : "--down"); c.beginPath(); c.arc(x, y, 2.5, 0, 7); c.fill(); }
  };
  canvas.addEventListener("mousemove", (event) => {
    const w = canvas.clientWidth, h = canvas.clientHeight;
    let best = null, near = 100;
    for (const e of known) { const [x, y] = spot(e, w, h), d = (x - event.offsetX) ** 2 + (y - event.offsetY) ** 2; if (d < near) { near = d; best = e; } }
    note.textContent = best ? `${visible(best[2])}: push ${shown(best[0])}, result ${shown(best[1])}` : "→ push, ↑ result; orange: moved as asked, blue: against it";
  });
  new ResizeObserver(draw).observe(canvas);
  return [canvas, note];
}
