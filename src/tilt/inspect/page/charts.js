// The overview: curves with one cursor, alerts as flags, a second run laid over the first.
import uPlot from "uplot";
import { element, button, choice, shown, inert, say } from "tilt/parts";

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
  const named = () => [...curves.columns.keys()].filter((n) => curves.columns.get(n).some((v) => typeof v === "number"));
  const names = named();
  const wanted = GROUPS.map(([title, list, band]) => [title, list.filter((n) => names.includes(n)), band]).filter(([, list]) => list.length);
  for (const name of (state.more ?? "").split("|").filter((n) => names.includes(n))) wanted.push([name, [name]]);
  const sync = uPlot.sync("tilt");
  const flags = (header.alerts ?? []).filter((a) => a.step !== null);

  for (const [title, list, band] of wanted) {
    const box = element("figure", { class: "chart" });
    const lines = [];
    for (const name of list) lines.push({ name, from: curves });
    if (other) for (const name of list) if (other.curves.columns.has(name)) lines.push({ name, from: other.curves, second: true });
    const banded = band && names.includes(band);
    const numbers = () => {
      const read = lines.map((l) => l.from.of(l.name)), steps = [...new Set(read.flatMap((c) => c.steps))].sort((a, b) => a - b);
      const index = new Map(steps.map((s, i) => [s, i]));
      const aligned = (curve) => { const row = Array(steps.length).fill(null); curve.steps.forEach((x, i) => { if (index.has(x)) row[index.get(x)] = curve.values[i]; }); return row; };
      const rows = read.map(aligned);
      if (!banded) return [steps, ...rows];
      const spread = aligned(curves.of(band)), edge = (sign) => rows[0].map((m, i) => m === null || spread[i] === null ? null : m + sign * spread[i]);
      return [steps, ...rows, edge(-1), edge(1)];
    };
    const data = numbers(), [steps] = data;
    if (!steps.length) continue;
    const series = [{ label: "step" }, ...lines.map((l, i) => ({
      label: l.second ? `${l.name} · ${app.otherName}` : l.name, stroke: () => css(INK[list.indexOf(l.name) % INK.length]), width: 1.5, spanGaps: true,
      dash: l.second ? [4, 3] : undefined, alpha: l.second ? 0.7 : 1, points: { show: l.name.startsWith("eval/") || steps.length < 3, size: 5 }, value: (_, v) => shown(v),
    }))];
    const bands = [];
    if (banded) {
      const edge = (label) => ({ label, stroke: "transparent", points: { show: false }, value: (_, v) => shown(v) });
      series.push(edge("mean − std"), edge("mean + std"));
      bands.push({ series: [series.length - 1, series.length - 2], fill: () => css("--band") });
    }
    box.append(element("figcaption", { text: title }));
    const chart = new uPlot({
      width: 360, height: 168, series, bands, cursor: { sync: { key: sync.key }, drag: { x: true, y: false } },
      scales: { x: { time: false }, y: { range: span } }, legend: { live: true },
      axes: [{ stroke: () => css("--quiet"), grid: { stroke: () => css("--grid") }, size: 26 }, { stroke: () => css("--quiet"), grid: { stroke: () => css("--grid") }, size: (_, labels) => Math.max(44, 18 + 7.4 * Math.max(0, ...(labels ?? []).map((l) => l.length))), values: (_, vs) => vs.map((v) => shown(v, 3)) }],
      hooks: { draw: [(u) => drawFlags(u, flags)] },
    }, data, box);
    // A double click zooms out; so a click waits until it is none.
    let click;
    chart.over.addEventListener("dblclick", () => clearTimeout(click));
    chart.over.addEventListener("click", () => {
      const at = chart.cursor.idx, step = chart.data[0][at];
      clearTimeout(click);
      if (step !== undefined && chart.select.width === 0) click = setTimeout(() => { if (box.isConnected) app.go({ view: "rollouts", step: String(nearest(app.steps, step)), row: "0" }); }, 300);
    });
    charts.push({ chart, box, numbers });
    place.append(box);
  }
  const stack = stacked(app, names, sync);
  if (stack) { charts.push(stack); place.insertBefore(stack.box, place.children[1] ?? null); }
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
  // What came since is drawn into the charts that stand, and a zoom stays; false where other charts or flags are wanted.
  app.grow = () => {
    if (named().length !== names.length || (app.header.alerts ?? []).filter((a) => a.step !== null).length !== flags.length) return false;
    for (const { chart, numbers } of charts) {
      const { min, max } = chart.scales.x, zoomed = min > chart.data[0][0] || max < chart.data[0].at(-1);
      chart.setData(numbers(), !zoomed);
      if (zoomed) chart.setScale("x", { min, max });
    }
    return true;
  };
  app.onleave(() => { app.grow = null; watch.disconnect(); charts.forEach(({ chart }) => chart.destroy()); });
  say(`${charts.length} charts`);
  return view;
}

// Each part of the reward times its weight, one on the other: what is earned above zero, what is paid below.
function stacked(app, names, sync) {
  const parts = Object.entries(app.header.parts ?? {}).filter(([name, weight]) => weight !== 0 && names.includes(`reward/${name}`));
  if (parts.length < 2) return null;
  let worth = [];
  const numbers = () => {
    const read = parts.map(([name, weight]) => { const c = app.curves.of(`reward/${name}`); return new Map(c.steps.map((s, i) => [s, c.values[i] === null ? null : c.values[i] * weight])); });
    const steps = [...new Set(read.flatMap((m) => [...m.keys()]))].sort((a, b) => a - b);
    const above = steps.map(() => 0), below = steps.map(() => 0);
    worth = read.map((curve) => steps.map((s) => curve.get(s) ?? null));
    const rows = worth.flatMap((values) => {
      const high = [], low = [];
      values.forEach((v, i) => {
        const pile = v < 0 ? below : above, ends = v === null ? [null, null] : [pile[i], pile[i] += v];
        high.push(v < 0 ? ends[0] : ends[1]); low.push(v < 0 ? ends[1] : ends[0]);
      });
      return [high, low];
    });
    return [steps, ...rows];
  };
  const box = element("figure", { class: "chart stacked" }, element("figcaption", { text: "Parts of the reward, times their weights" }));
  const series = [{ label: "step" }], bands = [];
  parts.forEach(([name, weight], k) => {
    const ink = `--part-${(k % 6) + 1}`;
    series.push({ label: `${weight !== 1 ? `${shown(weight)} × ` : ""}${inert(name, 30)}`, stroke: () => css(ink), width: 1.5, spanGaps: true, value: (_, v, s, i) => shown(worth[k]?.[i]) },
      { label: "", stroke: "transparent", points: { show: false }, class: "ghost", spanGaps: true });
    bands.push({ series: [2 * k + 1, 2 * k + 2], fill: () => css(`${ink}-wash`) });
  });
  const chart = new uPlot({
    width: 360, height: 168, series, bands, cursor: { sync: { key: sync.key }, drag: { x: true, y: false } }, scales: { x: { time: false }, y: { range: span } }, legend: { live: true },
    axes: [{ stroke: () => css("--quiet"), grid: { stroke: () => css("--grid") }, size: 26 }, { stroke: () => css("--quiet"), grid: { stroke: () => css("--grid") }, size: 50, values: (_, vs) => vs.map((v) => shown(v, 3)) }],
  }, numbers(), box);
  return { chart, box, numbers };
}

// The range of an axis: a curve that never moves is given room, one that is nothing lies between 0 and 1.
function span(u, low, high) {
  if (low === null || low === undefined) return [0, 1];
  if (low === high) return low === 0 ? [0, 1] : [low - Math.abs(low) / 10, high + Math.abs(high) / 10];
  return uPlot.rangeNum(low, high, 0.1, true);
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

// A strip under the text: one bar a token from `base` on (1 for ratios), drawn on a canvas; a second channel as a line.
export function strip(title, values, at, pick, { second = null, base = 0 } = {}) {
  const canvas = element("canvas", { class: "strip", role: "img", "aria-label": `${title} by position` });
  const draw = () => {
    const width = canvas.clientWidth, height = canvas.clientHeight, scale = devicePixelRatio || 1;
    if (!width) return;
    canvas.width = width * scale; canvas.height = height * scale;
    const c = canvas.getContext("2d");
    c.scale(scale, scale);
    const up = css("--up"), down = css("--down"), known = [...values, ...(second ?? [])].filter((v) => typeof v === "number");
    const high = known.reduce((a, b) => Math.max(a, b), base), low = known.reduce((a, b) => Math.min(a, b), base), span = high - low || 1;
    const y = (v) => 4 + ((high - v) / span) * (height - 8), step = width / Math.max(1, values.length);
    c.fillStyle = css("--grid"); c.fillRect(0, y(base), width, 1);
    values.forEach((v, i) => {
      if (typeof v !== "number") return;
      c.fillStyle = v >= base ? up : down;
      c.fillRect(i * step, Math.min(y(v), y(base)), Math.max(0.75, step - (step > 3 ? 1 : 0)), Math.max(1, Math.abs(y(v) - y(base))));
    });
    if (second) { c.strokeStyle = css("--line-2"); c.lineWidth = 1.5; c.beginPath(); second.forEach((v, i) => { if (typeof v === "number") c.lineTo((i + 0.5) * step, y(v)); }); c.stroke(); }
    if (at !== null) { c.strokeStyle = css("--ink"); c.strokeRect(at * step, 1, Math.max(2, step), height - 2); }
  };
  canvas.addEventListener("click", (e) => pick(Math.min(values.length - 1, Math.floor((e.offsetX / canvas.clientWidth) * values.length))));
  new ResizeObserver(draw).observe(canvas);
  return canvas;
}
