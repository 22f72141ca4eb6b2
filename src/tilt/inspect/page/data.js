// Where the numbers come from: a server on this machine, or what was written into the page. Both answer the same questions.

class ServerSource {
  live = true;
  constructor() { this.kept = new Map(); }

  async get(path) {
    const answer = await fetch(path, { credentials: "same-origin" });
    const body = await answer.json();
    if (!answer.ok) throw new Error(body.error ?? `the server answered ${answer.status}`);
    return body;
  }

  listing() { return this.get("/api/runs"); }
  header(run) { return this.get(`/api/runs/${run}`); }
  metrics(run, after) { return this.get(`/api/runs/${run}/metrics?after=${after}`); }
  steps(run) { return this.get(`/api/runs/${run}/steps`); }
  async rows(run, steps) { return (await this.get(`/api/runs/${run}/rows?steps=${steps.join(",")}`)).steps; }
  rollout(run, step, row) { return this.keep(`/api/runs/${run}/rollouts/${step}/${row}`); }
  siblings(run, step, row) { return this.keep(`/api/runs/${run}/siblings/${step}/${row}`); }
  same(run, step, row) { return this.get(`/api/runs/${run}/same/${step}/${row}`); }
  search(run, text, steps) { return this.get(`/api/runs/${run}/search?q=${encodeURIComponent(text)}&steps=${steps.join(",")}`); }
  changed(run, step) { return this.keep(`/api/runs/${run}/changed/${step}`); }
  comparison(number) { return this.keep(`/api/comparisons/${number}`); }

  keep(path) {
    if (!this.kept.has(path)) {
      if (this.kept.size > 200) this.kept.delete(this.kept.keys().next().value);
      const asked = this.get(path);
      asked.catch(() => this.kept.delete(path));
      this.kept.set(path, asked);
    }
    return this.kept.get(path);
  }
}

class EmbeddedSource {
  live = false;
  constructor(data) { this.data = data; }

  async listing() { return this.data.runs; }
  async header(run) { return this.data.run[run]; }
  async metrics(run, after) { return after > 0 ? { next: after, step: [], time: [], columns: {} } : this.data.metrics[run]; }
  async steps(run) { return this.data.steps[run] ?? []; }
  async rows(run, steps) {
    const all = this.data.rows[run]?.steps ?? {};
    return Object.fromEntries(steps.filter((s) => all[s]).map((s) => [s, all[s]]));
  }
  async rollout(run, step, row) {
    const found = this.data.rollouts[run]?.[`${step}/${row}`];
    if (!found) throw new Error("The report keeps some answers in full, and this is not one of them; `tilt view` shows all.");
    return found;
  }
  async siblings(run, step, row) {
    const first = await this.rollout(run, step, row);
    const others = Object.values(this.data.rollouts[run]).filter((r) => r.step === first.step && r.group === first.group && r.row !== first.row);
    const rows = [first, ...others];
    return { rows, divergence: rows.map((other) => firstDifference(first, other)) };
  }
  async same(run, step, row) {
    const { key } = await this.rollout(run, step, row);
    const rows = [];
    for (const [number, s] of Object.entries(this.data.rows[run]?.steps ?? {}))
      s.key?.forEach((other, i) => { if (other === key) rows.push({ step: Number(number), row: i, reward: s.reward[i], advantage: s.advantage[i], length: s.length[i], completion: s.completion[i] }); });
    return { rows };
  }
  async search(run, text, steps) {
    const wanted = text.toLowerCase(), found = [];
    for (const step of steps) {
      const s = this.data.rows[run]?.steps[step];
      s?.completion.forEach((completion, i) => {
        const full = this.data.rollouts[run]?.[`${step}/${s.row[i]}`];
        const texts = [completion, s.prompts[s.prompt[i]], full?.completion ?? "", full?.prompt ?? ""];
        if (texts.some((t) => t.toLowerCase().includes(wanted))) found.push([step, s.row[i]]);
      });
    }
    return { found, more: false };
  }
  async changed(run, step) { return this.data.changed[run]?.[step] ?? { missing: ["not part of this report"] }; }
  async comparison(number) { return this.data.comparisons[number]; }
}

export function firstDifference(a, b) {
  const mine = a.ids.length && b.ids.length ? a.ids : a.tokens, other = a.ids.length && b.ids.length ? b.ids : b.tokens;
  const length = Math.min(mine.length, other.length);
  for (let i = 0; i < length; i++) if (mine[i] !== other[i]) return i;
  return mine.length === other.length ? null : length;
}

let written;

// What was written into the page, read once; null where a server answers.
function embedded() {
  if (written === undefined) written = JSON.parse(document.getElementById("embedded")?.textContent ?? "null");
  return written;
}

export function openSource() { return embedded() ? new EmbeddedSource(embedded()) : new ServerSource(); }

export function report() { return embedded()?.report ?? null; }

// Curves that grow: asks for what is new and joins it.
export class Curves {
  constructor(source, run) { Object.assign(this, { source, run, next: 0, step: [], time: [], columns: new Map() }); }

  async read() {
    const found = await this.source.metrics(this.run, this.next);
    if (found.reset) Object.assign(this, { step: [], time: [], columns: new Map() });
    const before = this.step.length;
    this.next = found.next;
    this.step.push(...found.step);
    this.time.push(...found.time);
    for (const [name, values] of Object.entries(found.columns)) {
      if (!this.columns.has(name)) this.columns.set(name, Array(before).fill(null));
      this.columns.get(name).push(...values);
    }
    for (const values of this.columns.values()) while (values.length < this.step.length) values.push(null);
    return found.step.length > 0 || Boolean(found.reset);
  }

  // A curve as numbers, one a step: where a step was written twice (a run that was taken up again) the later value stands.
  of(name) {
    const values = this.columns.get(name) ?? [], byStep = new Map();
    this.step.forEach((step, i) => { const v = values[i]; if (v !== null && v !== undefined) byStep.set(step, typeof v === "number" ? v : null); });
    const steps = [...byStep.keys()].sort((a, b) => a - b);
    return { steps, values: steps.map((s) => byStep.get(s)) };
  }
}
