// Small parts that every view is made of: elements, numbers, and text that cannot do anything.

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("aria-") && typeof value === "boolean") { made.setAttribute(key, String(value)); continue; }
    if (value === null || value === undefined || value === false) continue;
    if (key === "class") made.className = value;
    else if (key === "text") made.textContent = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "style") for (const [k, v] of Object.entries(value)) made.style.setProperty(k, v);
    else made.setAttribute(key, value === true ? "" : String(value));
  }
  for (const child of children.flat(2)) if (child !== null && child !== undefined && child !== false) made.append(child);
  return made;
}

const WORDS = { nan: "not a number", inf: "+∞", "-inf": "−∞" };

// A number for people: 3 digits, a real minus; null is a dash, what is not finite is said.
export function shown(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return WORDS[value] ?? value;
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value).replace("-", "−");
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(digits - 1) : Number(value.toPrecision(digits)).toString();
  return text.replace("-", "−").replace("e−", "e−").replace("e-", "e−");
}

export const finite = (value) => typeof value === "number" && Number.isFinite(value);

// A line may break before a space that is drawn.
const MARKS = { "\n": "↵\n", "\t": "⇥", "\r": "␍", " ": "\u200b\u2423" };
const HIDDEN = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

// Text with what is invisible or would move other text written out: U+202E → ⟨202E⟩.
export function inert(text, longest = 20000) {
  const kept = text.length > longest ? text.slice(0, longest) + ` … (${(text.length - longest).toLocaleString("en")} characters more)` : text;
  return kept.replace(HIDDEN, (c) => `⟨${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

// A token: white space visible, the rest inert.
export function visible(text, longest = 2000) {
  return inert(text, longest).replace(/[\n\t\r ]/g, (c) => MARKS[c]);
}

export function say(text) {
  document.getElementById("said").textContent = text;
}

export function button(text, act, attributes = {}) {
  return element("button", { type: "button", text, onclick: act, ...attributes });
}

export function choice(label, options, value, change) {
  const select = element("select", { "aria-label": label, onchange: () => change(select.value) },
    options.map(([key, text]) => element("option", { value: key, text, selected: key === value })));
  return select;
}

export function table(columns, rows, attributes = {}) {
  return element("table", attributes,
    element("thead", {}, element("tr", {}, columns.map((c) => element("th", { scope: "col", text: c.text ?? c, class: c.class })))),
    element("tbody", {}, rows.map((row) => element("tr", {}, row.map((cell, i) =>
      cell instanceof Node && cell.nodeName === "TD" ? cell : element("td", { class: columns[i]?.class }, cell instanceof Node ? cell : String(cell ?? "–")))))));
}

export function download(name, kind, text) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type: kind })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
