// The desk of a person who compares answers: one item at a time, by keys, blind.
import { element, button, inert, say } from "tilt/parts";

let state = null, began = 0, places = [], marked = false, busy = false;

async function ask(path, options = {}) {
  const answer = await fetch(path, { credentials: "same-origin", ...options });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error);
  return body;
}

async function send(label) {
  if (busy) return;
  busy = true;
  try {
    state = await ask("/api/label", { method: "POST", headers: { "Content-Type": "application/json", "X-Tilt": state.secret }, body: JSON.stringify({ ...label, seconds: (performance.now() - began) / 1000 }) });
    fresh();
  } catch (error) { say(error.message); document.getElementById("main").prepend(element("p", { class: "warn", role: "alert", text: inert(error.message) })); }
  busy = false;
}

function fresh() { began = performance.now(); places = state.show ? state.show.answers.map(() => null) : []; draw(); }
const give = (value) => state.show && send({ item: state.show.item, value });
const undo = () => state.can_undo && send({ undo: true });

function draw() {
  const { show, task } = state;
  document.getElementById("header").replaceChildren(...[element("span", { class: "brand", text: "tilt label" }), element("span", { text: state.annotator }),
    element("progress", { max: state.all, value: state.done, "aria-label": "labelled" }), element("span", { class: "quiet", text: `${state.done} of ${state.all}` }), element("span", { class: "space" }),
    button("undo (u)", undo, { disabled: !state.can_undo }), show && show.answers.length === 2 ? button("mark differences (d)", () => { marked = !marked; draw(); }, { "aria-pressed": marked }) : null].filter(Boolean));
  const main = document.getElementById("main");
  document.documentElement.dataset.item = show ? String(show.item) : "end";
  if (!show) { main.replaceChildren(element("h1", { text: "All labelled. Thank you." }), element("p", { class: "quiet", text: "preferences.jsonl is written; this page can be closed." })); return; }
  const differs = marked ? differences(show.answers) : null;
  const names = show.answers.map((_, k) => String.fromCharCode(65 + k));
  main.replaceChildren(element("div", { class: "desk" }, state.guide ? element("details", { open: state.done === 0 }, element("summary", { text: "Guide" }), element("pre", { text: inert(state.guide, 20000) })) : null,
    element("h1", { class: "visually-hidden", text: `Item ${show.item + 1}` }), element("section", { class: "panel", "aria-label": "Prompt" }, element("pre", { tabindex: "0", text: inert(show.prompt, 50000) })),
    element("div", { class: "answers" }, show.answers.map((text, k) => element("section", { class: "panel", "aria-label": `Answer ${names[k]}` }, element("h2", { text: `Answer ${names[k]}` }),
      element("pre", { tabindex: "0" }, differs ? differs[k].map(([word, other]) => other ? element("mark", { text: inert(word) }) : inert(word)) : inert(text, 50000) || "(nothing)"),
      task === "pair" ? button(`${names[k]} is better (${k + 1})`, () => give(k === 0 ? "left" : "right"), { class: "choose" }) : numbers(k, names[k])))),
    element("div", { class: "bar" }, task === "pair" ? button("tie (0)", () => give("tie")) : button("store (Enter)", store, { disabled: places.includes(null) }), button("skip (s)", () => give("skip")),
      element("span", { class: "quiet", text: task === "pair" ? "← → choose as well" : task === "rank" ? "places from 1, the best; the same place for a tie" : "" }))));
  say(`item ${show.item + 1}`);
}

function numbers(k, name) {
  const [low, high] = state.task === "rank" ? [1, state.show.answers.length] : state.scores;
  return element("div", { class: "bar", role: "group", "aria-label": `${state.task === "rank" ? "Place" : "Score"} of answer ${name}` },
    Array.from({ length: high - low + 1 }, (_, i) => button(String(low + i), () => { places[k] = low + i; draw(); }, { "aria-pressed": places[k] === low + i })));
}

const store = () => { if (!places.includes(null)) give(places); };

// Words that only one of two answers has in this place: the rest of a longest common subsequence.
function differences([a, b]) {
  const split = (t) => t.match(/\s+|[^\s]+/g) ?? [];
  const x = split(a).slice(0, 1500), y = split(b).slice(0, 1500);
  const best = Array.from({ length: x.length + 1 }, () => new Uint16Array(y.length + 1));
  for (let i = x.length - 1; i >= 0; i--) for (let j = y.length - 1; j >= 0; j--) best[i][j] = x[i] === y[j] ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]);
  const left = [], right = [];
  let i = 0, j = 0;
  while (i < x.length || j < y.length) {
    if (i < x.length && j < y.length && x[i] === y[j]) { left.push([x[i++], false]); right.push([y[j++], false]); }
    else if (j >= y.length || (i < x.length && best[i + 1][j] >= best[i][j + 1])) left.push([x[i++], true]);
    else right.push([y[j++], true]);
  }
  return [left, right];
}

function onkey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || !state) return;
  const { task, show } = state, key = event.key;
  let act = { u: undo, s: () => give("skip"), d: () => { marked = !marked; draw(); } }[key];
  if (show && task === "pair") act ??= { 1: () => give("left"), 2: () => give("right"), 0: () => give("tie"), ArrowLeft: () => give("left"), ArrowRight: () => give("right") }[key];
  if (show && task !== "pair") {
    if (key === "Enter" && event.target.nodeName !== "BUTTON") act ??= store;
    if (/^[1-9]$/.test(key)) act ??= () => { const at = places.indexOf(null), high = task === "rank" ? show.answers.length : state.scores[1]; if (at >= 0 && Number(key) <= high) { places[at] = Number(key); draw(); } };
    if (key === "Backspace") act ??= () => { const at = places.findLastIndex((p) => p !== null); if (at >= 0) { places[at] = null; draw(); } };
  }
  if (act) { event.preventDefault(); act(); }
}

export async function start() {
  try { state = await ask("/api/state"); fresh(); } catch (error) { document.getElementById("main").replaceChildren(element("p", { class: "warn", text: inert(error.message) })); return; }
  addEventListener("keydown", onkey);
}
