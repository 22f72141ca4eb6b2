// The list of rollouts: filters, sorts, and only the rows on screen in the document.
import { element, button, choice, shown, inert, finite, say } from "tilt/parts";

const HEIGHT = 46;
const SORTS = [["", "as stored"], ["reward", "reward"], ["margin", "margin of the pair"], ["advantage", "advantage"], ["kl", "KL"], ["delta_max", "max |Δ|"], ["push", "push"], ["length", "length"], ["entropy", "entropy"], ["clipped", "clipped"], ["repetition", "repetition"]];
export const FILTERS = [
  ["reward", "reward"], ["advantage", "advantage"], ["length", "length"], ["clipped", "clipped tokens"], ["kl", "KL"], ["margin", "margin"],
];

// The answers of some steps as flat columns.
export class Listing {
  constructor(source, run) { Object.assign(this, { source, run, steps: new Map(), found: null }); }

  async load(steps, progress) {
    const missing = steps.filter((s) => !this.steps.has(s));
    for (let i = 0; i < missing.length; i += 8) {
      const some = missing.slice(i, i + 8);
      for (const [step, rows] of Object.entries(await this.source.rows(this.run, some))) this.steps.set(Number(step), rows);
      if (missing.length > 8) { progress?.(i + some.length, missing.length); await new Promise((done) => setTimeout(done)); }
    }
  }

  // Entries [step, place] that pass the filters, sorted. Numbers are compared column by column, so that 100,000 rows take a fraction of a second.
  select(steps, state, searched) {
    const filters = FILTERS.flatMap(([name]) => [["min", 1], ["max", -1]].filter(([end]) => state[`${name}_${end}`] !== undefined && state[`${name}_${end}`] !== "")
      .map(([end, sign]) => [name, sign, Number(state[`${name}_${end}`])])).filter(([, , limit]) => Number.isFinite(limit));
    const part = state.part && state.part_min !== undefined && state.part_min !== "" ? [state.part, Number(state.part_min)] : null;
    const hits = searched ? new Set(searched.map(([s, r]) => `${s}/${r}`)) : null;
    const entries = [];
    for (const step of steps) {
      const rows = this.steps.get(step);
      if (!rows || rows.error) continue;
      for (let i = 0; i < rows.row.length; i++) {
        let good = true;
        for (const [name, sign, limit] of filters) { const v = rows[name][i]; if (!finite(v) || sign * v < sign * limit) { good = false; break; } }
        if (!good) continue;
        if (state.group && String(rows.group[i]) !== state.group) continue;
        if (state.split && rows.split[i] !== state.split) continue;
        if (state.role && rows.role[i] !== state.role) continue;
        if (state.truncated === "1" && !rows.truncated[i]) continue;
        if (state.truncated === "0" && rows.truncated[i]) continue;
        if (state.dropped === "1" && !rows.dropped[i]) continue;
        if (state.dropped === "0" && rows.dropped[i]) continue;
        if (state.odd === "1" && !rows.odd[i]) continue;
        if (part) { const v = rows.parts[part[0]]?.[i]; if (!finite(v) || v < part[1]) continue; }
        if (hits && !hits.has(`${step}/${rows.row[i]}`)) continue;
        entries.push([step, i]);
      }
    }
    const by = state.sort;
    if (by) {
      const worth = Float64Array.from(entries, ([s, i]) => { const v = this.steps.get(s)[by]?.[i]; return finite(v) ? v : state.order === "up" ? Infinity : -Infinity; });
      const order = Uint32Array.from(entries.keys()).sort((a, b) => (state.order === "up" ? worth[a] - worth[b] : worth[b] - worth[a]) || a - b);
      return Array.from(order, (k) => entries[k]);
    }
    return entries;
  }
}

export function listView(app, listing, entries, total) {
  const { state } = app;
  const values = entries.map(([s, i]) => listing.steps.get(s).reward[i]).filter(finite);
  let low = Infinity, high = -Infinity;
  for (const v of values) { if (v < low) low = v; if (v > high) high = v; }
  const inner = element("div", { class: "rows-inner" });
  const box = element("div", { class: "rows", tabindex: "0", role: "listbox", "aria-label": "Answers" }, inner);
  // browsers limit an element's height: beyond 300,000 rows places are scaled
  const full = Math.min(entries.length * HEIGHT, 8_000_000), squeeze = entries.length * HEIGHT > full ? full / (entries.length * HEIGHT) : 1;
  inner.style.height = `${full}px`;
  let drawn = "";

  const draw = () => {
    const first = Math.max(0, Math.floor(box.scrollTop / squeeze / HEIGHT) - 4), last = Math.min(entries.length, first + Math.ceil(box.clientHeight / HEIGHT) + 10);
    const now = `${first}-${last}-${state.step_at}-${state.row}`;
    if (now === drawn) return;
    drawn = now;
    inner.replaceChildren(...entries.slice(first, last).map((entry, k) => line(entry, first + k)));
  };
  const line = ([step, i], number) => {
    const rows = listing.steps.get(step), reward = rows.reward[i];
    const chosen = String(step) === state.step_at && String(rows.row[i]) === state.row;
    const share = finite(reward) && high > low ? (reward - low) / (high - low) : finite(reward) ? 1 : 0;
    const made = element("div", { class: `row${chosen ? " chosen" : ""}${rows.dropped[i] ? " dropped" : ""}`, role: "option", "aria-selected": chosen, id: `row-${step}-${rows.row[i]}`,
      onclick: () => app.pick(step, rows.row[i]) },
      element("span", { class: "bar-box", "aria-hidden": "true" }, element("span", { class: "fill", style: { width: `${Math.round(share * 100)}%` } })),
      element("span", { class: "reward", text: shown(reward) }),
      element("span", { class: "text", text: inert(rows.completion[i]) || "(nothing)" }),
      element("span", { class: "marks quiet", text: [state.step === "all" ? `step ${step}` : "", rows.role[i] ?? "", `${rows.length[i]} tok`, finite(rows.advantage[i]) && !rows.role[i] ? `A ${shown(rows.advantage[i], 2)}` : "",
        finite(rows.kl[i]) ? `KL ${shown(rows.kl[i], 2)}` : "", finite(rows.margin?.[i]) ? `margin ${shown(rows.margin[i], 2)}` : "", rows.clipped[i] ? `${rows.clipped[i]} clipped` : "", rows.truncated[i] ? "cut" : "", rows.dropped[i] ?? "", rows.odd[i] ? "suspect" : ""].filter(Boolean).join(" · ") }));
    made.style.transform = `translateY(${number * HEIGHT * squeeze - (squeeze < 1 ? 0 : 0)}px)`;
    return made;
  };
  box.addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
  const watch = new ResizeObserver(() => { drawn = ""; draw(); });
  watch.observe(box);
  app.onleave(() => watch.disconnect());
  const reveal = () => {
    const at = entries.findIndex(([s, i]) => String(s) === state.step_at && String(listing.steps.get(s).row[i]) === state.row);
    if (at < 0) return;
    const top = at * HEIGHT * squeeze;
    if (top < box.scrollTop || top + HEIGHT > box.scrollTop + box.clientHeight) box.scrollTop = Math.max(0, top - box.clientHeight / 3);
    drawn = ""; draw();
    box.setAttribute("aria-activedescendant", `row-${state.step_at}-${state.row}`);
  };
  const count = element("div", { class: "quiet count", text: `${entries.length.toLocaleString("en")} of ${total.toLocaleString("en")} answers` });
  say(count.textContent);
  return { node: element("div", { class: "list" }, count, box), reveal, redraw: () => { drawn = ""; draw(); } };
}

const entryOf = ({ step, rows, channels }) => [String(step), `step ${step}${channels ? " ◆" : ""} (${rows})`];

// New steps join the choice that stands, while a field is written in and the list must not be drawn anew.
export function addSteps(steps) {
  const select = document.querySelector(".filters select");
  if (!select) return;
  const known = new Set([...select.options].map((o) => o.value));
  for (const [value, text] of steps.map(entryOf)) if (!known.has(value)) select.append(element("option", { value, text }));
}

export function filterBar(app, listing) {
  const { state } = app;
  const set = (name) => (value) => app.go({ [name]: value === "" ? null : value });
  const limit = (name, end, label) => element("input", { type: "number", step: "any", "aria-label": `${label}, ${end === "min" ? "at least" : "at most"}`, placeholder: end === "min" ? "≥" : "≤", value: state[`${name}_${end}`] ?? "",
    onchange: (e) => app.go({ [`${name}_${end}`]: e.target.value === "" ? null : e.target.value }) });
  const some = [...listing.steps.values()].filter((r) => !r.error);
  const parts = [...new Set(some.flatMap((r) => Object.keys(r.parts ?? {})))];
  const groups = state.step === "all" ? [] : [...new Set((listing.steps.get(Number(state.step)) ?? { group: [] }).group ?? [])];
  const splits = [...new Set(some.flatMap((r) => r.split ?? []))].filter(Boolean);
  const roles = [...new Set(some.flatMap((r) => r.role ?? []))].filter(Boolean);
  const active = ["group", "split", "role", "truncated", "dropped", "odd", "q", "part", "part_min", ...FILTERS.flatMap(([n]) => [`${n}_min`, `${n}_max`])].filter((n) => state[n] !== undefined);
  return element("div", { class: "filters", role: "search" },
    element("div", { class: "bar" },
      choice("Step", [["all", "all steps"], ...app.steps.map(entryOf)], state.step, (v) => app.go({ step: v, row: "0", group: null })),
      element("input", { type: "search", id: "search", placeholder: "text~  ( / )", "aria-label": "Text in prompt or answer", value: state.q ?? "", onchange: (e) => app.go({ q: e.target.value || null }),
        onkeydown: (e) => { if (e.key === "Enter") document.querySelector(".rows").focus({ preventScroll: true }); } }),
      choice("Sort by", SORTS.filter(([name]) => name !== "margin" || roles.length || state.sort === "margin"), state.sort ?? "", set("sort")),
      button(state.order === "up" ? "↑" : "↓", () => app.go({ order: state.order === "up" ? null : "up" }), { "aria-label": state.order === "up" ? "rising" : "falling", class: "small" }),
      button("suspects", () => app.go({ odd: state.odd === "1" ? null : "1" }), { "aria-pressed": state.odd === "1", title: "among the best tenth and odd: far from the reference, repetitive, cut or very short" })),
    element("details", { open: active.some((n) => n !== "q" && n !== "odd") }, element("summary", { text: `filters${active.length ? ` (${active.length})` : ""}` }),
      element("div", { class: "grid" },
        FILTERS.filter(([name]) => name !== "margin" || roles.length || state.margin_min !== undefined || state.margin_max !== undefined).map(([name, label]) => element("div", { class: "pair" }, element("span", { class: "quiet", text: label }), limit(name, "min", label), limit(name, "max", label))),
        groups.length > 1 ? element("div", { class: "pair" }, element("span", { class: "quiet", text: "group" }), choice("Group", [["", "all"], ...groups.map((g) => [String(g), String(g)])], state.group ?? "", set("group"))) : null,
        splits.length > 1 ? element("div", { class: "pair" }, element("span", { class: "quiet", text: "split" }), choice("Split", [["", "all"], ...splits.map((g) => [g, g])], state.split ?? "", set("split"))) : null,
        roles.length ? element("div", { class: "pair" }, element("span", { class: "quiet", text: "role" }), choice("Role", [["", "all"], ...roles.map((g) => [g, g])], state.role ?? "", set("role"))) : null,
        element("div", { class: "pair" }, element("span", { class: "quiet", text: "truncated" }), choice("Truncated", [["", "all"], ["1", "cut"], ["0", "ended"]], state.truncated ?? "", set("truncated"))),
        element("div", { class: "pair" }, element("span", { class: "quiet", text: "dropped" }), choice("Dropped", [["", "all"], ["1", "dropped"], ["0", "trained"]], state.dropped ?? "", set("dropped"))),
        parts.length ? element("div", { class: "pair" }, choice("Component", [["", "component"], ...parts.map((p) => [p, p])], state.part ?? "", set("part")),
          element("input", { type: "number", step: "any", placeholder: "≥", "aria-label": "Component, at least", value: state.part_min ?? "", onchange: (e) => app.go({ part_min: e.target.value === "" ? null : e.target.value }) })) : null,
        active.length ? button("clear", () => app.go(Object.fromEntries(active.map((n) => [n, null])))) : null)));
}
