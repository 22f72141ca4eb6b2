// What the run is: its objective, settings, versions, what its numbers are not; and in a report before and after, and samples.
import { element, inert, shown, table, finite } from "tilt/parts";
import { report } from "tilt/data";

export function aboutView(app) {
  const { header } = app;
  const more = report();
  const panel = (title, ...inner) => element("section", { class: "panel wide" }, element("h3", { text: title }), inner);
  const list = [];
  if (more?.before_after?.length) list.push(beforeAfter(more.before_after));
  if (header.objective) list.push(panel("Objective", element("pre", { text: inert(header.objective, 100000) })));
  list.push(panel("What these numbers are, and are not", element("ul", {}, header.notes.map((n) => element("li", { text: n })))));
  if (header.imported) list.push(panel("Import", element("pre", { text: inert(JSON.stringify(header.imported, null, 1), 20000) })));
  if (header.config) list.push(panel("Settings", element("pre", { text: inert(header.config, 100000) })));
  const versions = Object.entries(header.versions ?? {});
  if (versions.length) list.push(panel("Versions", table([{ text: "package" }, { text: "version" }], versions.map(([k, v]) => [inert(k), inert(String(v))]))));
  if (more?.samples) list.push(panel("Samples", element("pre", { text: inert(more.samples, 60000) })));
  return element("div", { class: "about" }, element("h2", { text: header.name }), element("div", { class: "panels" }, list));
}

export function beforeAfter(rows) {
  return element("section", { class: "panel wide" }, element("h3", { text: "Before and after, on held-out prompts" }),
    table([{ text: "measure" }, { text: "before", class: "n" }, { text: "after", class: "n" }, { text: "change", class: "n" }],
      rows.map((r) => [inert(r.name), plus(r.before, r.before_ci), plus(r.after, r.after_ci), finite(r.before) && finite(r.after) ? shown(r.after - r.before) : "–"])));
}

const plus = (value, ci) => `${shown(value)}${finite(ci) ? ` ± ${shown(ci, 2)}` : ""}`;
