// One answer: its tokens coloured by a channel, everything known of the token under the pointer, its siblings, its prompt over the steps.
import { element, button, choice, shown, inert, visible, finite, say, table, download } from "tilt/parts";
import { scaleOf, paint, legend } from "tilt/colour";
import { strip, nearest } from "tilt/charts";

const CHUNK = 600;

// The text of tokens for people: a token that ends inside a character is drawn as its bytes.
export function tokenText(r, t) {
  return r.tokens[t] !== null && r.tokens[t] !== undefined ? visible(r.tokens[t]) : r.bytes?.[t] ? `⟨${r.bytes[t]}⟩` : "";
}

// A long answer is drawn in chunks, each a block of its own that is laid out only near the screen. `renew` changes what is pinned or marked without drawing anew.
export function tokensView(app, r, { channel, scale, pinned = null, threshold = null, mark = null, folded = 0, onpick = () => {} }) {
  const values = r.channels[channel] ?? [];
  const box = element("div", { class: `tokens${app.state.ids === "1" ? " with-ids" : ""}`, lang: "und", dir: "auto" });
  if (!r.tokens.length) {
    box.append(element("span", { class: "plain", text: inert(r.completion, 200000) || "(nothing)" }));
    box.renew = () => {};
    return box;
  }
  const token = (t) => {
    const node = element("span", { class: "token", "data-t": t });
    node.textContent = tokenText(r, t) || "∅";
    if (!tokenText(r, t)) node.classList.add("empty");
    if (app.state.ids === "1") node.append(element("sub", { text: r.ids[t] ?? "" }));
    if (r.mask[t] === 0) node.classList.add("given");
    paint(node, values[t], scale);
    const clip = r.channels.clip?.[t];
    if (clip === 1 || clip === -1) node.classList.add("clipped");
    if (t === mark) node.classList.add("parting");
    dress(node, t);
    return node;
  };
  const dress = (node, t) => {
    node.classList.toggle("pinned", t === pinned);
    node.classList.toggle("over", threshold !== null && finite(values[t]) && Math.abs(values[t]) >= threshold);
  };
  const nodes = [], first = Math.min(folded, r.tokens.length);
  if (first) { nodes.length = first; box.append(element("span", { class: "folded", text: `${first} tokens the same`, title: inert(r.tokens.slice(0, first).map((t) => t ?? "").join(""), 2000) })); }
  const more = () => {
    const from = nodes.length, end = Math.min(r.tokens.length, from + CHUNK);
    for (let t = from; t < end; t++) nodes.push(token(t));
    const part = r.tokens.length > CHUNK ? element("div", { class: "chunk" }) : box;
    part.append(...nodes.slice(from));
    if (part !== box) box.append(part);
    if (pinned !== null && pinned >= from && pinned < end && box.isConnected) box.reveal();
    if (end < r.tokens.length) setTimeout(more);
  };
  box.renew = (now) => { ({ pinned, threshold } = now); nodes.forEach(dress); };
  // Chunks that were not on screen yet have a guessed height: what they turn out to be moves the token, so it is looked for again in the frames after.
  box.reveal = (again = 6) => {
    const node = nodes[pinned];
    if (!node) return;
    const inner = box.getBoundingClientRect(), at = node.getBoundingClientRect();
    if (at.top < inner.top || at.bottom > inner.bottom) node.scrollIntoView({ block: "nearest", inline: "nearest" });
    if (r.tokens.length > CHUNK && again) requestAnimationFrame(() => { if (box.isConnected && nodes[pinned] === node) box.reveal(again - 1); });
  };
  more();
  const at = (e) => { const node = e.target.closest?.(".token"); return node ? Number(node.dataset.t) : null; };
  box.addEventListener("mouseover", (e) => { const t = at(e); if (t !== null) app.hover(e, r, t); });
  box.addEventListener("scroll", () => { box.dataset.at = String(box.scrollTop); }, { passive: true });
  box.addEventListener("mouseleave", () => app.unhover());
  box.addEventListener("click", (e) => { const t = at(e); if (t !== null) onpick(t); });
  return box;
}

// Everything known of one token.
export function tokenCard(app, r, t) {
  const rows = Object.entries(app.header.channels).filter(([name]) => r.channels[name]).map(([name, { title }]) => [title, shown(r.channels[name][t], 4)]);
  const top = r.top?.policy?.[t];
  return element("div", { class: "card" },
    element("div", { class: "card-head" }, element("b", { text: tokenText(r, t) || "(no text)" }), element("span", { class: "quiet", text: ` place ${t}${r.ids[t] !== undefined ? ` · id ${r.ids[t]}` : ""}${r.mask[t] === 0 ? " · not sampled" : ""}` })),
    element("div", { class: "card-grid" }, rows.flatMap(([k, v]) => [element("span", { class: "quiet", text: k }), element("span", { text: v })])),
    top ? table([{ text: "instead" }, { text: "policy", class: "n" }, { text: "reference", class: "n" }], top.map(([text, log], k) => [visible(text), percent(log), percent(r.top.reference?.[t]?.[k]?.[1])]), { class: "tops" }) : null);
}

const percent = (log) => finite(log) ? `${shown(100 * Math.exp(log), 3)} %` : "–";

export async function rolloutView(app, step, row) {
  const { source, run, state, header } = app;
  let r;
  try { r = await source.rollout(run, step, row); } catch (error) { return element("div", { class: "rollout" }, element("p", { class: "quiet", text: inert(error.message) })); }
  const names = Object.keys(header.channels).filter((n) => r.channels[n]);
  const channel = names.includes(state.channel) ? state.channel : names.includes("delta_ref") && r.channels.delta_ref.some(finite) ? "delta_ref" : names[0] ?? "";
  const about = header.channels[channel] ?? { title: "no channel", kind: "diverging", unit: "" };
  const paired = r.role === "chosen" || r.role === "rejected";
  const group = state.side === "group" || (paired && state.side === undefined) ? await source.siblings(run, step, row) : null;
  const scale = scaleOf(about.kind, [r, ...group?.rows ?? []].map((one) => one.channels[channel]));
  const values = r.channels[channel] ?? [];
  // the threshold is a share of the largest value; of the entropy, whose upper fifth holds the tokens that decide, a share of the tokens below it
  const ranked = channel === "entropy", share = Number(state.threshold ?? (ranked ? 0.8 : 0.5));
  const threshold = ranked ? quantile(values.filter(finite), share) : values.reduce((most, v) => finite(v) ? Math.max(most, Math.abs(v)) : most, 0) * share;
  app.current = { r, channel, names, threshold };
  const pinned = state.token !== undefined ? Number(state.token) : null;
  const view = element("div", { class: "rollout" });

  const parts = Object.entries(r.parts);
  const clipped = r.channels.clip ? r.channels.clip.filter((c) => c === 1 || c === -1).length : null;
  view.append(
    element("div", { class: "bar facts" },
      element("h2", { text: `step ${step}, answer ${row}${r.role ? `, ${r.role}` : ""}` }),
      element("span", {}, element("b", { text: `reward ${shown(r.reward)}` }), r.reckoned ? ` ${inert(r.reckoned, 400)}` : ""),
      finite(r.margin) ? element("span", { class: r.margin > 0 ? "" : "warn", text: `margin ${shown(r.margin)}${r.margin > 0 ? "" : r.margin < 0 ? ", the wrong way round" : ", a tie"}` }) : null,
      paired || r.advantage === null ? null : element("span", { text: `A ${shown(r.advantage)}` }), element("span", { text: [`${r.length} tokens`, r.finish ?? (r.truncated ? "cut" : "")].filter(Boolean).join(", ") }),
      r.channels.kl ? element("span", { text: `KL ${shown(sum(r.channels.kl))}` }) : null,
      clipped !== null ? element("span", { text: `clipped ${clipped}/${r.tokens.length}` }) : null,
      r.push_score !== null && r.push_score !== undefined ? element("span", { text: `push of the score ${shown(r.push_score)}` }) : null,
      finite(r.group_mean) ? element("span", { class: "quiet", text: `group ${shown(r.group_mean)} ± ${shown(r.group_std)}` }) : null,
      r.dropped ? element("span", { class: "warn", text: `left out: ${r.dropped}` }) : null,
      button("copy as JSON", async () => { try { await navigator.clipboard.writeText(JSON.stringify(r)); say("copied"); } catch { download(`rollout-${step}-${row}.json`, "application/json", JSON.stringify(r)); } })),
    element("details", { class: "prompt", open: state.prompt === "1" || r.prompt.length < 300 }, element("summary", { text: "prompt" }), element("pre", { text: inert(r.prompt, 50000) })));
  if (parts.length || Object.keys(r.checker ?? {}).length) {
    const checks = Object.entries(r.checker ?? {});
    if (checks.length) view.append(element("details", { class: "checks", open: true }, element("summary", { text: "why this reward" }),
      table([{ text: "rule" }, { text: "score", class: "n" }, { text: "read in the answer" }, { text: "asked for" }, { text: "reason" }],
        checks.map(([name, c]) => [inert(name), shown(r.parts[name]), inert(String(c?.extracted ?? "–")), inert(String(c?.gold ?? "–")), inert(String(c?.reason ?? ""))]))));
  }
  if (names.length) view.append(element("div", { class: "bar channels", role: "radiogroup", "aria-label": "Channel" }, names.map((name, i) =>
    button(`${i < 9 ? `${i + 1} ` : ""}${header.channels[name].title}`, () => app.go({ channel: name }), { role: "radio", "aria-checked": name === channel, class: name === channel ? "on" : "", title: header.channels[name].about }))),
    element("div", { class: "bar" }, legend(group ? `${about.title}, one scale` : about.title, scale, about.unit), element("label", { class: "quiet" }, "threshold ",
      element("input", { type: "range", min: "0", max: "1", step: "0.05", value: share, "aria-label": ranked ? "Threshold as a share of the tokens below it" : "Threshold as a share of the largest", onchange: (e) => app.go({ threshold: e.target.value }) }), ` ${shown(threshold, 2)}${ranked ? `, the upper ${Math.round(100 * (1 - share))} %` : ""}`),
      button("← p", () => app.nextToken(-1), { title: "previous token over the threshold" }), button("n →", () => app.nextToken(1), { title: "next token over the threshold" }),
      button("ids", () => app.go({ ids: state.ids === "1" ? null : "1" }), { "aria-pressed": state.ids === "1" })));
  else {
    const full = app.steps.filter((s) => s.channels), closest = full.length && !full.some((s) => s.step === step) ? nearest(full, step) : null;
    view.append(element("p", { class: "quiet" }, closest === null ? "No channels are stored for this answer." : "This step is stored without channels; the nearest with them is ",
      closest === null ? null : button(`step ${closest}`, () => app.go({ step: String(closest), step_at: null, row: null, token: null }), { class: "link" })));
  }
  const key = JSON.stringify([run, step, row, channel, scale, state.ids]);
  if (app.kept?.r === r && app.kept.key === key) app.kept.box.renew({ pinned, threshold });
  else app.kept = { r, key, box: tokensView(app, r, { channel, scale, pinned, threshold, onpick: (t) => app.go({ token: String(t) === app.state.token ? null : String(t) }) }) };
  view.append(app.kept.box);
  if (values.length) {
    const both = channel === "value" || channel === "return";
    view.append(strip(both ? "value and return" : about.title, both ? r.channels.value ?? values : values, pinned, (t) => app.go({ token: String(t) }), { second: both ? r.channels.return ?? null : null, base: about.kind === "ratio" ? 1 : 0 }));
  }
  if (pinned !== null && pinned < r.tokens.length) view.append(element("section", { class: "pinned-card", "aria-label": "Pinned token" }, tokenCard(app, r, pinned)));
  const tabs = element("div", { class: "bar" }, button(paired ? "pair (g)" : "group (g)", () => app.toggleGroup(), { "aria-pressed": Boolean(group) }),
    button("same prompt over the steps (s)", () => app.go({ side: state.side === "same" ? null : "same" }), { "aria-pressed": state.side === "same" }));
  view.append(tabs);
  app.current.grouped = Boolean(group);
  if (group) view.append(groupView(app, group, channel, scale, paired));
  if (state.side === "same") view.append(await sameView(app, step, row));
  return view;
}

// The value below which a share of the values lies (type 1).
function quantile(values, share) {
  const sorted = Float64Array.from(values).sort();
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.max(0, Math.ceil(share * sorted.length)))] : 0;
}

const sum = (values) => values.reduce((a, v) => a + (finite(v) ? v : 0), 0);

// The answers to one prompt, on the scale of the answer above them.
function groupView(app, { rows, divergence }, channel, scale, paired) {
  // of a pair the beginning that both share is folded; the margin is decided after it
  const shared = paired ? Math.min(...divergence.filter((d) => d !== null && d !== undefined), ...rows.map((r) => r.tokens.length)) : 0;
  const folded = app.state.prefix === "1" || shared < 6 || !Number.isFinite(shared) ? 0 : shared;
  return element("section", { class: "group", "aria-label": paired ? "The pair" : "Answers to the same prompt" },
    shared >= 6 && Number.isFinite(shared) ? element("div", { class: "bar" }, button(folded ? "show what both begin with" : "fold what both begin with", () => app.go({ prefix: folded ? "1" : null }))) : null,
    element("div", { class: "siblings" }, rows.map((r, k) => element("article", { class: k === 0 ? "chosen" : "" },
      element("div", { class: "bar" }, button(`answer ${r.row}${r.role ? `, ${r.role}` : ""}`, () => app.pick(r.step, r.row), { class: "link" }), element("b", { text: shown(r.reward) }), paired || r.advantage === null ? null : element("span", { class: "quiet", text: `A ${shown(r.advantage, 2)}` }),
        element("span", { class: "quiet", text: k === 0 ? "" : divergence[k] === null ? "the same" : `parts at ${divergence[k]}` })),
      tokensView(app, r, { channel, scale, mark: divergence[k], folded, onpick: (t) => app.pick(r.step, r.row, { token: String(t) }) })))));
}

async function sameView(app, step, row) {
  const { rows } = await app.source.same(app.run, step, row);
  const steps = [...new Set(rows.map((r) => r.step))];
  let at = Math.max(0, steps.indexOf(Number(step)));
  const list = element("div", { class: "same-list" });
  const slider = element("input", { type: "range", min: "0", max: String(steps.length - 1), value: String(at), "aria-label": "Step", oninput: (e) => { at = Number(e.target.value); draw(); } });
  const label = element("output", {});
  const draw = () => {
    label.textContent = `step ${steps[at]}`;
    list.replaceChildren(...rows.filter((r) => r.step === steps[at]).map((r) => element("div", { class: "same" }, button(`answer ${r.row}`, () => app.pick(r.step, r.row), { class: "link" }), element("b", { text: shown(r.reward) }), element("span", { text: inert(r.completion) || "(nothing)" }))));
  };
  draw();
  return element("section", { "aria-label": "The same prompt over the steps" }, element("p", { class: "quiet", text: `asked at ${steps.length} of the stored steps` }), steps.length > 1 ? element("div", { class: "bar" }, slider, label) : label, list);
}
