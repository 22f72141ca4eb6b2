// Colours of channels: blue below, orange above, by the symmetric logarithm; a scale is fixed for all panes that are compared.
import { finite, shown, element } from "tilt/parts";

export function scaleOf(kind, lists) {
  let largest = 0;
  for (const values of lists) for (const value of values ?? []) {
    const v = kind === "ratio" && finite(value) ? Math.log(Math.max(value, 1e-6)) : value;
    if (finite(v)) largest = Math.max(largest, Math.abs(v));
  }
  return { kind, largest: kind === "clip" ? 1 : largest || 1 };
}

// Where a value lies on its scale, −1 to 1: sign(x) · log(1 + 20 |x| / largest) / log 21.
export function place(value, scale) {
  if (!finite(value)) return 0;
  if (scale.kind === "clip") return value === 2 ? 0.35 : value;
  const v = scale.kind === "ratio" ? Math.log(Math.max(value, 1e-6)) : value;
  return Math.sign(v) * Math.min(1, Math.log1p((20 * Math.abs(v)) / scale.largest) / Math.log(21));
}

export function paint(node, value, scale) {
  node.classList.remove("up", "down", "odd", "none");
  node.style.removeProperty("--strength");
  if (value === null || value === undefined || value === "nan") { node.classList.add("none"); return; }
  if (!finite(value)) { node.classList.add("odd"); return; }
  const at = place(value, scale);
  node.style.setProperty("--strength", Math.abs(at).toFixed(3));
  if (Math.abs(at) > 0.02) node.classList.add(at > 0 && scale.kind !== "sequential" ? "up" : at < 0 && scale.kind !== "sequential" ? "down" : "much");
}

export function legend(title, scale, unit) {
  const unlog = (p) => { const v = Math.sign(p) * (scale.largest * (Math.pow(21, Math.abs(p)) - 1)) / 20; return scale.kind === "ratio" ? Math.exp(v) : v; };
  const marks = scale.kind === "clip" ? [[-1, "low"], [0, "inside"], [0.35, "outside, no effect"], [1, "high"]]
    : (scale.kind === "sequential" ? [0, 0.25, 0.5, 0.75, 1] : [-1, -0.5, 0, 0.5, 1]).map((p) => [p, shown(unlog(p), 2)]);
  return element("div", { class: "legend", role: "img", "aria-label": `Scale of ${title}, ${marks[0][1]} to ${marks.at(-1)[1]} ${unit ?? ""}` },
    element("span", { class: "quiet", text: `${title}${unit ? ", " + unit : ""}` }),
    marks.map(([p, text]) => {
      const swatch = element("span", { class: "swatch", text });
      swatch.style.setProperty("--strength", Math.abs(p));
      if (p !== 0) swatch.classList.add(scale.kind === "sequential" ? "much" : p > 0 ? "up" : "down");
      return swatch;
    }));
}
