// The page: state in the address, views, keys, and what is read again while a run goes on.
import { element, button, choice, shown, inert, finite, say, download } from "tilt/parts";
import { openSource, Curves, report } from "tilt/data";
import { overview } from "tilt/charts";
import { Listing, listView, filterBar, addSteps } from "tilt/listing";
import { rolloutView, tokenCard } from "tilt/rollout";
import { changesView } from "tilt/changes";
import { compareView } from "tilt/compare";
import { aboutView, beforeAfter } from "tilt/about";

const VIEWS = [["overview", "Overview", "o"], ["rollouts", "Rollouts", "r"], ["changed", "What changed", "c"], ["compare", "Compare", "m"], ["about", "About", "a"]];
const PRIVATE = new Set(["theme"]);
const KEYS = [["j k", "next, previous answer; ↓ ↑ in the list"], ["n p, → ←", "next, previous token over the threshold"], ["1 – 9", "channel"], ["/", "search"], ["g", "answers of the group"], ["s", "same prompt over the steps"], ["o r c m a", "overview, rollouts, what changed, compare, about"],
  ["t", "light, dark"], ["i", "token ids"], ["?", "these keys"], ["Esc", "close; let go of a token or filter"]];

export const app = {
  source: null, runs: [], comparisons: [], run: "0", header: null, steps: [], curves: null, other: null, otherName: "", state: {}, current: null, leaving: [], listing: null, entries: [], kept: null, grow: null, late: false,
  go, pick, hover, hoverNode, unhover, nextToken, toggleGroup, onleave: (act) => app.leaving.push(act),
};

function readState() {
  const pairs = new URLSearchParams(location.hash.slice(1));
  return Object.fromEntries(pairs);
}

function go(changes) {
  const next = { ...app.state };
  for (const [key, value] of Object.entries(changes)) if (value === null || value === undefined) delete next[key]; else next[key] = String(value);
  for (const key of PRIVATE) delete next[key];
  const hash = `#${new URLSearchParams(next)}`;
  if (hash === location.hash) return draw();
  const small = Object.keys(changes).every((k) => ["token", "row", "step_at", "threshold"].includes(k));
  history[small ? "replaceState" : "pushState"](null, "", hash);
  return draw();
}

// A pair stands side by side unless it is closed, other groups are opened.
function toggleGroup() {
  const { grouped, r } = app.current ?? {};
  return go({ side: !grouped ? "group" : r.role === "chosen" || r.role === "rejected" ? "none" : null });
}

function pick(step, row, more = {}) { return go({ step_at: String(step), row: String(row), token: null, ...more }); }

let drawing = 0;

// A redraw makes all elements anew: the one that stands for what had the keyboard's focus gets it again. A choice by the pointer does not hold it, so that the keys go on.
function keepFocus(redraw) {
  const node = document.activeElement, root = node?.closest("#header, #tabs, #main");
  if (!root || node === root || !node.matches(":focus-visible")) return redraw();
  const called = (n) => n.id || n.getAttribute("aria-label") || n.textContent;
  const all = [...root.querySelectorAll(node.localName)], at = all.indexOf(node), name = called(node), same = all.filter((n) => called(n) === name).indexOf(node);
  redraw();
  if (node.isConnected) return undefined;
  const now = [...root.querySelectorAll(node.localName)];
  (now.filter((n) => called(n) === name)[same] ?? (now.length === all.length ? now[at] : null))?.focus({ preventScroll: true });
  return undefined;
}

async function draw() {
  const turn = ++drawing, before = app.state;
  app.state = readState();
  const { state } = app;
  state.view ??= report() ? "about" : "overview";
  if (state.view === "about" && report() && !before.view) state.view = "overview";
  try {
    if (String(state.run ?? "0") !== app.run || !app.header) await openRun(String(state.run ?? "0"), turn);
    if (turn !== drawing) return;
    if (state.with !== undefined && state.with !== app.run) { if (app.other?.id !== state.with) await openOther(state.with); } else app.other = null;
  } catch (error) { fail(error); return; }
  if (turn !== drawing) return;
  keepFocus(drawHeader);
  const main = document.getElementById("main");
  const stay = before.view === state.view && before.run === state.run;
  let made;
  const left = app.leaving;
  app.leaving = [];
  try {
    if (state.view === "rollouts") made = await rolloutsPage(turn);
    else if (state.view === "changed") made = await changesView(app);
    else if (state.view === "compare") made = await compareView(app);
    else if (state.view === "about") made = aboutView(app);
    else made = element("div", {}, report()?.before_after?.length ? beforeAfter(report().before_after) : null, overview(app));
  } catch (error) { made = failure(error); }
  if (turn !== drawing || made === null) { app.leaving = [...left, ...app.leaving]; return; }
  for (const act of left) act();
  const scroll = stay ? window.scrollY : 0;
  keepFocus(() => { main.replaceChildren(made); window.scrollTo(0, scroll); made.dispatchEvent(new Event("shown")); });
  performance.mark("tilt-drawn");
  document.documentElement.dataset.drawn = String(turn);
}

function failure(error) { return element("p", { class: "warn", role: "alert", text: inert(String(error?.message ?? error)) }); }
function fail(error) { document.getElementById("main").replaceChildren(failure(error)); }

// Everything of a run is exchanged at once, when it is there: a view drawn meanwhile still finds the run before.
async function openRun(run, turn) {
  const curves = new Curves(app.source, run);
  const [header, steps] = await Promise.all([app.source.header(run), app.source.steps(run), curves.read()]);
  if (turn !== drawing) return;
  Object.assign(app, { run, curves, header, steps, entries: [], current: null, kept: null, listing: new Listing(app.source, run) });
  document.title = `${header.name} · tilt`;
}

async function openOther(run) {
  const curves = new Curves(app.source, run);
  await curves.read();
  app.other = { id: run, curves };
  app.otherName = app.runs[Number(run)]?.name ?? "other";
}

function statusMark() {
  const { header } = app, live = header.status === "running" && app.source.live;
  return element("span", { class: `status ${header.status}`, title: header.status }, element("i", { "aria-hidden": "true" }), `${live ? "live" : header.status}${header.step !== null ? ` · step ${header.step}${header.steps ? `/${header.steps}` : ""}` : ""}`);
}

function drawHeader() {
  const { header, state, runs } = app;
  const runChoice = runs.length > 1 ? choice("Run", runs.map((r) => [String(r.id), r.name]), app.run, (v) => go({ run: v, step: null, step_at: null, row: null, token: null, more: null, with: null })) : element("b", { text: header.name });
  const others = runs.filter((r) => String(r.id) !== app.run);
  document.getElementById("header").replaceChildren(...[
    element("span", { class: "brand", text: "tilt" }), runChoice,
    element("span", { class: "facts" }, [header.algorithm, header.model, header.task].filter(Boolean).map((t) => element("span", { text: inert(t, 60), title: inert(t, 500) }))),
    statusMark(),
    element("span", { class: "quiet", title: header.commit, text: [header.seed !== null && header.seed !== undefined ? `seed ${header.seed}` : "", (header.commit ?? "").slice(0, 7)].filter(Boolean).join(" · ") }),
    element("span", { class: "space" }),
    others.length ? choice("Compare with", [["", "compare with …"], ...others.map((r) => [String(r.id), r.name])], state.with ?? "", (v) => go({ with: v || null })) : null,
    button("save view", save, { title: "this view as one HTML file without scripts" }), button("◐", turnTheme, { "aria-label": "light or dark" }), button("?", help, { "aria-label": "keys" })].filter(Boolean));
  document.getElementById("tabs").replaceChildren(...VIEWS.filter(([name]) => name !== "compare" || app.comparisons.length || state.view === "compare").map(([name, title, key]) =>
    element("a", { href: `#${new URLSearchParams({ ...state, view: name })}`, "aria-current": state.view === name ? "page" : null, title: `key ${key}`, text: title })));
}

async function rolloutsPage(turn) {
  const { state, steps } = app;
  if (!steps.length) return element("p", { class: "quiet", text: "This run has stored no answers." });
  const known = steps.map((s) => s.step);
  if (state.step !== "all" && !known.includes(Number(state.step))) state.step = String((steps.filter((s) => s.channels).at(-1) ?? steps.at(-1)).step);
  const wanted = state.step === "all" ? known : [Number(state.step)];
  await app.listing.load(wanted, (done, all) => say(`${done} of ${all} steps read`));
  if (turn !== drawing) return null;
  const searched = state.q ? (await app.source.search(app.run, state.q, wanted)).found : null;
  if (turn !== drawing) return null;
  const entries = app.listing.select(wanted, state, searched);
  app.entries = entries;
  const total = wanted.reduce((n, s) => n + (app.listing.steps.get(s)?.row.length ?? 0), 0);
  const damaged = wanted.map((s) => app.listing.steps.get(s)?.error).filter(Boolean);
  if (state.step_at === undefined || state.row === undefined || !wanted.includes(Number(state.step_at)) || !app.listing.steps.get(Number(state.step_at))?.row.includes(Number(state.row))) {
    const first = entries[0];
    if (first) { state.step_at = String(first[0]); state.row = String(app.listing.steps.get(first[0]).row[first[1]]); }
  }
  app.late = false;
  const list = listView(app, app.listing, entries, total);
  const detail = state.row !== undefined && state.step_at !== undefined ? await rolloutView(app, Number(state.step_at), Number(state.row)) : element("p", { class: "quiet", text: "No answer passes the filters." });
  const page = element("div", { class: "rollouts" }, element("div", { class: "left" }, filterBar(app, app.listing), damaged.map((d) => element("p", { class: "warn", text: inert(d) })), list.node), detail);
  const scroll = document.querySelector(".rows")?.scrollTop ?? 0, tokens = app.kept?.box, read = Number(tokens?.dataset.at ?? 0);
  page.addEventListener("shown", () => {
    page.querySelector(".rows").scrollTop = scroll;
    list.redraw(); list.reveal();
    if (tokens) { tokens.scrollTop = read; tokens.reveal?.(); }
  });
  return page;
}

// --- the card at the pointer ------------------------------------------------------------------------------------------------

function hover(event, r, t) { hoverNode(event, tokenCard(app, r, t)); }

function hoverNode(event, node) {
  const box = document.getElementById("hover");
  box.replaceChildren(node);
  box.hidden = false;
  const rect = event.target.getBoundingClientRect(), width = box.offsetWidth, height = box.offsetHeight;
  box.style.left = `${Math.max(4, Math.min(rect.left, innerWidth - width - 8))}px`;
  box.style.top = `${rect.bottom + height + 8 > innerHeight ? Math.max(4, rect.top - height - 6) : rect.bottom + 6}px`;
}

function unhover() { document.getElementById("hover").hidden = true; }

function nextToken(direction) {
  if (!app.current) return;
  const { r, channel, threshold: limit } = app.current, values = r.channels[channel] ?? [];
  let t = app.state.token !== undefined ? Number(app.state.token) : direction > 0 ? -1 : values.length;
  for (t += direction; t >= 0 && t < values.length; t += direction) if (finite(values[t]) && Math.abs(values[t]) >= limit && limit > 0) return go({ token: String(t) });
  say("no further token over the threshold");
}

function move(by) {
  const { entries, state, listing } = app;
  if (!entries.length) return;
  const at = entries.findIndex(([s, i]) => String(s) === state.step_at && String(listing.steps.get(s).row[i]) === state.row);
  const [s, i] = entries[Math.max(0, Math.min(entries.length - 1, at + by))];
  pick(s, listing.steps.get(s).row[i]);
}

function onkey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.nodeName) && event.target.type !== "range";
  if (event.key === "Escape") {
    if (typing) {
      event.preventDefault();
      if (event.target.nodeName === "INPUT") event.target.value = event.target.defaultValue;
      event.target.blur();
    }
    else if (app.state.token !== undefined) go({ token: null });
    else if (app.state.q !== undefined) go({ q: null });
    unhover();
    return;
  }
  if (typing) return;
  const { state } = app, rollouts = state.view === "rollouts";
  const arrows = event.target.type !== "range" && (rollouts || state.view === "compare");
  const inList = rollouts && Boolean(event.target.closest?.(".rows"));
  const act = {
    ArrowDown: inList ? () => move(1) : undefined, ArrowUp: inList ? () => move(-1) : undefined,
    j: () => rollouts && move(1), k: () => rollouts && move(-1), n: () => nextToken(1), p: () => nextToken(-1), ArrowRight: () => arrows && nextToken(1), ArrowLeft: () => arrows && nextToken(-1),
    "/": () => { if (rollouts) document.getElementById("search")?.focus(); else go({ view: "rollouts" }).then?.(() => document.getElementById("search")?.focus()); },
    g: () => rollouts && app.toggleGroup(), s: () => rollouts && go({ side: state.side === "same" ? null : "same" }), i: () => go({ ids: state.ids === "1" ? null : "1" }),
    o: () => go({ view: "overview" }), r: () => go({ view: "rollouts" }), c: () => go({ view: "changed" }), m: () => go({ view: "compare" }), a: () => go({ view: "about" }), t: turnTheme, "?": help,
  }[event.key] ?? (/^[1-9]$/.test(event.key) && app.current && app.current.names[Number(event.key) - 1] ? () => go({ channel: app.current.names[Number(event.key) - 1] }) : null);
  if (act) { event.preventDefault(); act(); }
}

function help() {
  const box = document.getElementById("help");
  box.replaceChildren(element("h2", { text: "Keys" }), element("dl", { class: "keys" }, KEYS.flatMap(([k, t]) => [element("dt", {}, element("kbd", { text: k })), element("dd", { text: t })])), button("close", () => box.close()));
  box.showModal();
}

function turnTheme() {
  const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "light" : "dark";
  try { localStorage.setItem("tilt-theme", document.documentElement.dataset.theme); } catch { /* a page from a file may have no storage */ }
  draw();
}

// The view as it stands, without scripts: canvases become pictures, styles are written in.
function save() {
  const copy = document.documentElement.cloneNode(true);
  const drawn = document.querySelectorAll("canvas");
  copy.querySelectorAll("canvas").forEach((node, i) => { const picture = element("img", { src: drawn[i].toDataURL("image/png"), alt: drawn[i].getAttribute("aria-label") ?? "curve", style: { width: `${drawn[i].clientWidth}px`, height: `${drawn[i].clientHeight}px` } }); node.replaceWith(picture); });
  copy.querySelectorAll("script, link, noscript, dialog, #hover, meta[http-equiv]").forEach((node) => node.remove());
  const rules = [...document.styleSheets].flatMap((sheet) => { try { return [...sheet.cssRules].map((r) => r.cssText); } catch { return []; } }).join("\n");
  copy.querySelector("head").append(element("meta", { "http-equiv": "Content-Security-Policy", content: "default-src 'none'; style-src 'unsafe-inline'; img-src data:" }), element("style", { text: rules }));
  download(`tilt-${app.header.name.replaceAll(/[^\w.-]+/g, "-")}-${app.state.view}.html`, "text/html", `<!doctype html>\n${copy.outerHTML}`);
}

let turns = 0;

// Every two seconds what came since: curves, stored steps, the run laid over this one; every tenth second also whether another run began, or this one goes on.
async function follow() {
  if (!app.source.live || document.hidden || !app.header) return;
  const seldom = turns++ % 5 === 0;
  if (!seldom && app.header.status !== "running") return;
  try {
    if (seldom) await lookAround();
    const { run, other } = app;
    const [grown, header, steps, beside] = await Promise.all([app.curves.read(), app.source.header(run), app.source.steps(run), other?.curves.read()]);
    if (app.run !== run) return;
    app.late ||= steps.length !== app.steps.length;
    const ended = header.status !== app.header.status;
    Object.assign(app, { header, steps });
    document.querySelector("#header .status")?.replaceWith(statusMark());
    if (app.state.view === "overview") { if ((grown || beside || ended) && !app.grow?.()) draw(); }
    else if (app.late && app.state.view === "rollouts") { if (document.activeElement?.matches("select, input")) addSteps(app.steps); else draw(); }
  } catch { /* the server is gone, or the run is being moved: the next turn tells */ }
}

// Runs that began since join the choices of the header.
async function lookAround() {
  const { runs, comparisons } = await app.source.listing();
  if (runs.length === app.runs.length) return;
  say(`new: ${runs.slice(app.runs.length).map((r) => r.name).join(", ")}`);
  Object.assign(app, { runs, comparisons: comparisons ?? [] });
  keepFocus(drawHeader);
}

export async function start() {
  try { const theme = localStorage.getItem("tilt-theme"); if (theme) document.documentElement.dataset.theme = theme; } catch { /* no storage */ }
  app.source = openSource();
  try {
    const { runs, comparisons } = await app.source.listing();
    Object.assign(app, { runs, comparisons: comparisons ?? [] });
  } catch (error) { fail(error); return; }
  addEventListener("hashchange", draw);
  addEventListener("popstate", draw);
  addEventListener("keydown", onkey);
  addEventListener("scroll", unhover, { passive: true, capture: true });
  if (!app.runs.length && app.comparisons.length) { app.header = { name: "comparison", status: "finished", channels: {}, notes: [], alerts: [], step: null }; app.curves = new Curves(app.source, "0"); if (!readState().view) history.replaceState(null, "", "#view=compare"); }
  await draw();
  setInterval(follow, 2000);
}
