// The overview: curves with one cursor, alerts as flags, a second run laid over the first.
import uPlot from "uplot";
import { element, button, choice, shown, say } from "tilt/parts";

const GROUPS = [
  ["Reward", ["reward", "objective/scores", "eval/reward"], "objective/scores_std"],
  ["Evaluation", ["eval/accuracy", "eval/margin", "eval/loss", "eval/nll"]],
  ["Accuracy", ["accuracy"]],
  ["KL to the reference, nats", ["kl", "eval/kl", "policy/kl_reference"]],
  ["Entropy, nats", ["entropy"]],
  ["Length", ["length/mean"]],
  ["Truncated, share", ["length/truncated"]],
  ["Clipped, share", ["policy/clipfrac_low", "policy/clipfrac_high"]],
  ["Margin", ["margin", "rewards/chosen", "rewards/rejected"]],
  ["Gradient norm", ["grad_norm", "critic/grad_norm"]],
  ["Sampler against learner", ["sampler/logprob_gap_mean", "sampler/probability_gap_mean"]],
  ["Loss", ["loss", "loss/policy_avg", "loss/value_avg"]],
  ["Groups alike, share", ["groups/zero_variance"]],
];
const INK = ["--line-1", "--line-2", "--line-3"];

export function overview(app) {
  const { curves, other, header, state } = app;
  const place = element("div", { class: "charts" });
  const charts = [];
  const names = [...curves.columns.keys()].filter((n) => curves.columns.get(n).some((v) => typeof v === "number"));
  const wanted = GROUPS.map(([title, list, band]) => [title, list.filter((n) => names.includes(n)), band]).filter(([, list]) => list.length);
  for (const name of (state.more ?? "").split("|").filter((n) => names.includes(n))) wanted.push([name, [name]]);
  const sync = uPlot.sync("tilt");
  const flags = (header.alerts ?? []).filter((a) => a.step !== null);

  for (const [title, list, band] of wanted) {
    const box = element("figure", { class: "chart" });
    const lines = [];
    for (const name of list) lines.push({ name, from: curves });
    if (other) for (const name of list) if (other.curves.columns.has(name)) lines.push({ name, from: other.curves, second: true });
    const steps = [...new Set(lines.flatMap((l) => l.from.of(l.name).steps))].sort((a, b) => a - b);
    if (!steps.length) continue;
    const index = new Map(steps.map((s, i) => [s, i]));
    const aligned = (from, name) => { const { steps: s, values } = from.of(name), row = Array(steps.length).fill(null); s.forEach((x, i) => { row[index.get(x)] = values[i]; }); return row; };
    const data = [steps, ...lines.map((l) => aligned(l.from, l.name))];
    const series = [{ label: "step" }, ...lines.map((l, i) => ({
      label: l.second ? `${l.name} · ${app.otherName}` : l.name, stroke: () => css(INK[list.indexOf(l.name) % INK.length]), width: 1.5, spanGaps: true,
      dash: l.second ? [4, 3] : undefined, alpha: l.second ? 0.7 : 1, points: { show: l.name.startsWith("eval/") || steps.length < 3, size: 5 }, value: (_, v) => shown(v),
    }))];
    const bands = [];
    if (band && names.includes(band)) {
      const mean = aligned(curves, list[0]), spread = aligned(curves, band);
      data.push(mean.map((m, i) => m === null || spread[i] === null ? null : m - spread[i]), mean.map((m, i) => m === null || spread[i] === null ? null : m + spread[i]));
      const edge = (label) => ({ label, stroke: "transparent", points: { show: false }, value: (_, v) => shown(v) });
      series.push(edge("mean − std"), edge("mean + std"));
      bands.push({ series: [series.length - 1, series.length - 2], fill: () => css("--band") });
    }
    box.append(element("figcaption", { text: title }));
    const chart = new uPlot({
      width: 360, height: 168, series, bands, cursor: { sync: { key: sync.key }, drag: { x: true, y: false } },
      scales: { x: { time: false } }, legend: { live: true },
      axes: [{ stroke: () => css("--quiet"), grid: { stroke: () => css("--grid") }, size: 26 }, { stroke: () => css("--quiet"), grid: { stroke: () => css("--grid") }, size: 58, values: (_, vs) => vs.map((v) => shown(v, 3)) }],
      hooks: { draw: [(u) => drawFlags(u, flags)] },
    }, data, box);
    chart.over.addEventListener("click", () => {
      const at = chart.cursor.idx;
      if (at !== null && at !== undefined && chart.select.width === 0) app.go({ view: "rollouts", step: String(nearest(app.steps, steps[at])), row: "0" });
    });
    charts.push({ chart, box });
    place.append(box);
  }
  const more = choice("Add a metric", [["", "add a metric …"], ...names.filter((n) => !wanted.some(([, l]) => l.includes(n))).map((n) => [n, n])], "", (name) => {
    if (name) app.go({ more: [state.more, name].filter(Boolean).join("|") });
  });
  const list = flags.length ? element("section", { class: "alerts" }, element("h2", { text: "Alerts" }), element("ul", {}, flags.map((a) =>
    element("li", {}, button(`⚑ step ${a.step}`, () => app.go({ view: "rollouts", step: String(nearest(app.steps, a.step)), row: "0" }), { class: "link" }), element("b", { text: ` ${a.name} ` }), a.text)))) : null;
  const view = element("div", { class: "overview" }, element("div", { class: "bar" }, element("h2", { text: "Curves" }), more, state.more ? button("clear added", () => app.go({ more: null })) : null,
    element("span", { class: "quiet", text: "click a step to read its answers; drag to zoom, double-click to zoom out" })), list, place);
  const fit = () => charts.forEach(({ chart, box }) => { const w = Math.max(220, box.clientWidth - 2); if (Math.abs(chart.width - w) > 2) chart.setSize({ width: w, height: 168 }); });
  requestAnimationFrame(fit);
  const watch = new ResizeObserver(() => requestAnimationFrame(fit));
  watch.observe(place);
  app.onleave(() => { watch.disconnect(); charts.forEach(({ chart }) => chart.destroy()); });
  say(`${charts.length} charts`);
  return view;
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function drawFlags(u, flags) {
  const c = u.ctx;
  c.save();
  c.fillStyle = css("--flag");
  for (const flag of flags) {
    const x = u.valToPos(flag.step, "x", true);
    if (x < u.bbox.left || x > u.bbox.left + u.bbox.width) continue;
    c.fillRect(x - 0.5, u.bbox.top, 1, u.bbox.height);
    c.beginPath(); c.moveTo(x, u.bbox.top); c.lineTo(x + 8, u.bbox.top + 4); c.lineTo(x, u.bbox.top + 8); c.fill();
  }
  c.restore();
}

export function nearest(steps, wanted) {
  let best = steps[0]?.step ?? wanted;
  for (const { step } of steps) if (Math.abs(step - wanted) < Math.abs(best - wanted)) best = step;
  return best;
}

// A strip under the text: one bar a token, drawn on a canvas; a second channel as a line.
export function strip(title, values, at, pick, second = null) {
  const canvas = element("canvas", { class: "strip", role: "img", "aria-label": `${title} by position` });
  const draw = () => {
    const width = canvas.clientWidth, height = canvas.clientHeight, scale = devicePixelRatio || 1;
    if (!width) return;
    canvas.width = width * scale; canvas.height = height * scale;
    const c = canvas.getContext("2d");
    c.scale(scale, scale);
    const known = [...values, ...(second ?? [])].filter((v) => typeof v === "number");
    const high = Math.max(0, ...known), low = Math.min(0, ...known), span = high - low || 1;
    const y = (v) => 4 + ((high - v) / span) * (height - 8), step = width / Math.max(1, values.length);
    c.fillStyle = css("--grid"); c.fillRect(0, y(0), width, 1);
    values.forEach((v, i) => {
      if (typeof v !== "number") return;
      c.fillStyle = css(v >= 0 ? "--up" : "--down");
      c.fillRect(i * step, Math.min(y(v), y(0)), Math.max(0.75, step - (step > 3 ? 1 : 0)), Math.max(1, Math.abs(y(v) - y(0))));
    });
    if (second) { c.strokeStyle = css("--line-2"); c.lineWidth = 1.5; c.beginPath(); second.forEach((v, i) => { if (typeof v === "number") c.lineTo((i + 0.5) * step, y(v)); }); c.stroke(); }
    if (at !== null) { c.strokeStyle = css("--ink"); c.strokeRect(at * step, 1, Math.max(2, step), height - 2); }
  };
  canvas.addEventListener("click", (e) => pick(Math.min(values.length - 1, Math.floor((e.offsetX / canvas.clientWidth) * values.length))));
  new ResizeObserver(draw).observe(canvas);
  return canvas;
}
