// Two checkpoints on the same texts: what changed most, token by token.
import { element, button, choice, shown, visible, inert, finite, table } from "tilt/parts";
import { scaleOf, legend } from "tilt/colour";
import { tokensView, tokenText } from "tilt/rollout";
import { strip } from "tilt/charts";
import { changedParts } from "tilt/changes";

const CHANNELS = { delta: ["Δ = log b − log a", "diverging", "nats"], kl: ["KL(b ‖ a), exact", "sequential", "nats"], a_logprobs: ["log a", "sequential", "nats"], b_logprobs: ["log b", "sequential", "nats"],
  a_entropy: ["entropy of a", "sequential", "nats"], b_entropy: ["entropy of b", "sequential", "nats"], a_rank: ["rank in a", "sequential", ""], b_rank: ["rank in b", "sequential", ""], argmax_changed: ["top choice changed", "sequential", ""] };

export async function compareView(app) {
  const { source, state, comparisons } = app;
  if (!comparisons.length) return element("p", { class: "quiet" }, "No comparison is open. ", element("code", { text: "tilt compare A B --out c.json" }), " makes one, ", element("code", { text: "tilt view RUN c.json" }), " shows it.");
  const number = comparisons.some((c) => String(c.id) === state.comparison) ? state.comparison : String(comparisons[0].id);
  const found = await source.comparison(number);
  const names = Object.keys(CHANNELS).filter((n) => found.texts.some((t) => t.channels?.[n]));
  const channel = names.includes(state.channel) ? state.channel : names[0];
  const [title, kind, unit] = CHANNELS[channel] ?? ["", "diverging", ""];
  const scale = scaleOf(kind, found.texts.map((t) => t.channels[channel]));
  const at = Math.min(found.texts.length - 1, Number(state.text ?? found.ranked[0]?.text ?? 0));
  const text = found.texts[at], pinned = state.token !== undefined ? Number(state.token) : null;
  const view = element("div", { class: "compare" }, element("div", { class: "bar" }, element("h2", { text: `${inert(found.a)} → ${inert(found.b)}` }),
    comparisons.length > 1 ? choice("Comparison", comparisons.map((c) => [String(c.id), c.name]), number, (v) => app.go({ comparison: v, text: null, token: null })) : null),
    (found.notes ?? []).map((n) => element("p", { class: "quiet", text: inert(n, 500) })),
    element("dl", { class: "summary" }, Object.entries(found.summary ?? {}).flatMap(([k, v]) => [element("dt", { text: k.replaceAll("_", " ") }), element("dd", { text: shown(v) })])));
  const ranked = element("section", { class: "panel" }, element("h3", { text: "What changed most" }), found.ranked.length ? element("ol", { class: "ranked" }, found.ranked.slice(0, 40).map((r) =>
    element("li", {}, button(`text ${r.text}, token ${r.position}`, () => app.go({ text: String(r.text), token: String(r.position) }), { class: "link" }), ` ${shown(r.score)} nats `, element("code", { text: tokenText(found.texts[r.text], r.position) || "∅" }), element("span", { class: "quiet", text: ` ${inert(r.reason ?? "", 300)}` })))) : "Nothing changed: every probability is the same.");
  const as = text ? { ...text, mask: text.mask ?? [], ids: text.ids ?? [], bytes: text.bytes ?? [], step: 0, row: at } : null;
  const reading = element("section", { class: "panel wide" }, element("div", { class: "bar" }, element("h3", { text: `text ${at}` }),
    button("←", () => app.go({ text: String(Math.max(0, at - 1)), token: null }), { "aria-label": "previous text" }), button("→", () => app.go({ text: String(Math.min(found.texts.length - 1, at + 1)), token: null }), { "aria-label": "next text" }),
    names.map((n, i) => button(`${i < 9 ? `${i + 1} ` : ""}${CHANNELS[n][0]}`, () => app.go({ channel: n }), { "aria-pressed": n === channel }))), legend(title, scale, unit));
  if (as) {
    app.current = { r: as, channel, names };
    reading.append(element("pre", { class: "prompt", text: inert(as.prompt ?? "", 20000) }), tokensView({ ...app, hover: (e, r, t) => app.hoverNode(e, card(as, t, names)) , unhover: app.unhover, state }, as, { channel, scale, pinned, onpick: (t) => app.go({ token: String(t) }) }),
      strip(title, as.channels[channel] ?? [], pinned, (t) => app.go({ token: String(t) })));
    if (pinned !== null && pinned < as.tokens.length) reading.append(card(as, pinned, names));
  }
  view.append(element("div", { class: "panels" }, ranked, reading));
  if (found.flips) view.append(element("section", { class: "panel" }, element("h3", { text: "Right and wrong" }), element("p", { text: `${found.flips.gained.length} answers became right, ${found.flips.lost.length} became wrong; both right ${found.flips.both}, neither ${found.flips.neither}; exact McNemar p = ${shown(found.flips.p)}` }),
    element("ul", {}, [...found.flips.gained.slice(0, 10).map((f) => ["✗→✓", f]), ...found.flips.lost.slice(0, 10).map((f) => ["✓→✗", f])].map(([mark, f]) => element("li", {}, `${mark} `, inert(f.prompt ?? String(f), 200), f.a !== undefined ? element("span", { class: "quiet", text: `  ${inert(f.a, 200)} → ${inert(f.b, 200)}` }) : null)))));
  if (found.generations?.length) view.append(element("section", { class: "panel" }, element("h3", { text: "Answers side by side" }), table([{ text: "prompt" }, { text: inert(found.a) }, { text: inert(found.b) }], found.generations.slice(0, 30).map((g) => [inert(g.prompt, 300), inert(g.a, 600), inert(g.b, 600)]))));
  view.append(...changedParts(app, found.changed, (row, position) => app.go({ text: String(row), token: position === null ? null : String(position) })));
  return view;
}

function card(r, t, names) {
  const tops = ["a", "b"].filter((w) => r.top?.[w]?.[t]);
  return element("div", { class: "card" }, element("div", { class: "card-head" }, element("b", { text: tokenText(r, t) || "∅" }), element("span", { class: "quiet", text: ` place ${t}` })),
    element("div", { class: "card-grid" }, names.flatMap((n) => [element("span", { class: "quiet", text: CHANNELS[n][0] }), element("span", { text: shown(r.channels[n]?.[t], 4) })])),
    tops.length ? element("div", { class: "bar top-pair" }, tops.map((w) => table([{ text: `likeliest in ${w}` }, { text: "p", class: "n" }], r.top[w][t].map(([text, log]) => [visible(text), finite(log) ? `${shown(100 * Math.exp(log), 3)} %` : "–"])))) : null);
}
