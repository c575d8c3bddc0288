// One panel: a title, what was computed and how, the figure, and ways to take it along.

import { announce, el, fill, quiet } from "./dom.js";
import { ApiError, ask, cancel, estimate, isAbort, known, url } from "./api.js";
import { cli, python } from "./commands.js";
import { bytes, seconds, tokensOf } from "./format.js";
import { palette } from "./theme.js";

const AUTOMATIC = 12; // seconds that a query may take without being asked for by hand
const CONFIG = { displayModeBar: false, responsive: false, displaylogo: false, doubleClick: false };

const panels = new Set();
let count = 0;

export function isDark() {
  return document.documentElement.dataset.theme === "dark";
}

/** After a change of colours, or of the page's width. */
export function redrawAll() {
  for (const panel of panels) panel.redraw();
}

export class Panel {
  /**
   * @param {object} about
   *   id, title, and help: a sentence on how to read the figure.
   *   span: columns of 12. heading: level of the title.
   */
  constructor({ id, title, help = "", span = 12 }) {
    count += 1;
    this.id = id;
    this.key = null;
    this.controls = el("div", { class: "panel-controls" });
    this.meta = el("p", { class: "meta", data: { role: "meta" } });
    this.actions = el("div", { class: "actions", role: "group", "aria-label": `Take along: ${title}` });
    this.code = el("div", { class: "code", hidden: true });
    this.notice = el("div", { class: "notice", hidden: true });
    this.plot = el("div", { class: "plot", role: "img", "aria-label": title });
    this.after = el("div", { class: "after" });
    this.heading = el("h3", { id: `panel-${id}-title` }, title);
    this.element = el("section", { class: "panel", id: `panel-${id}`, data: { panel: id, state: "idle" }, style: { "--span": span }, "aria-labelledby": `panel-${id}-title` },
      el("header", {}, this.heading, el("div", { class: "under" }, this.meta, this.actions)),
      help ? el("p", { class: "help" }, help) : null,
      this.controls, this.code, this.notice, this.plot, this.after);
    this.title = title;
    this.width = 0;
    this.resets = 0;
    new ResizeObserver(quiet(60, () => {
      const width = this.plot.clientWidth;
      if (width && Math.abs(width - this.width) > 4) this.redraw();
    })).observe(this.plot);
    panels.add(this);
  }

  dispose() {
    this.stop();
    panels.delete(this);
    if (this.drawn) Plotly.purge(this.plot);
  }

  stop() {
    this.aborter?.abort();
    this.aborter = null;
  }

  setTitle(title) {
    this.title = title;
    this.heading.textContent = title;
    this.plot.setAttribute("aria-label", title);
  }

  /**
   * Show what some queries answer.
   *
   * @param {object} how
   *   store: name. requests: [{query, params}], the first of which the panel is about.
   *   draw: (results, env) -> {data, layout}; or null, and `done` fills `after`.
   *   done: (results, panel) -> void, called after each drawing of new results.
   *   cheap: no estimate is needed. click: (point) -> void. zoom: (range or null) -> void.
   */
  show({ store, requests, draw = null, done = null, cheap = false, click = null, zoom = null }) {
    Object.assign(this, { draw, done, click, zoom });
    const key = JSON.stringify([store, requests]);
    if (key === this.key && this.results) {
      this.redraw();
      this.done?.(this.results, this);
      return;
    }
    if (key === this.key && (this.aborter || this.element.dataset.state === "waiting" || this.element.dataset.state === "cancelled")) return;
    this.key = key;
    this.store = store;
    this.requests = requests;
    this.fetch(cheap);
  }

  /** Say that there is nothing to draw, and why. */
  empty(text) {
    this.stop();
    this.key = null;
    this.results = null;
    this.clear();
    this.set("empty");
    this.note(el("p", {}, text));
    fill(this.meta);
    fill(this.actions);
  }

  async fetch(cheap) {
    this.stop();
    const aborter = new AbortController();
    this.aborter = aborter;
    const { signal } = aborter;
    const { store, requests } = this;
    this.set("loading");
    const slow = setTimeout(() => this.note(el("p", { class: "busy" }, "Computing…")), 250);
    try {
      const mine = requests.filter(({ query, params }) => !known(store, query, params));
      if (!cheap && mine.length) {
        const cost = await this.cost(mine, signal);
        if (cost.seconds > AUTOMATIC) {
          clearTimeout(slow);
          this.aborter = null;
          this.offer(cost);
          return;
        }
      }
      const answers = await Promise.all(requests.map((r) => ask(store, r.query, r.params, { signal, onJob: (job) => { clearTimeout(slow); this.progress(job); } })));
      clearTimeout(slow);
      if (this.aborter !== aborter) return;
      this.aborter = null;
      this.results = answers.map((a) => a.result);
      this.answers = answers;
      this.describe();
      this.note(null);
      this.set("done");
      this.redraw();
      this.done?.(this.results, this);
    } catch (error) {
      clearTimeout(slow);
      if (isAbort(error) || this.aborter !== aborter) return;
      this.aborter = null;
      this.results = null;
      this.fail(error);
    }
  }

  async cost(requests, signal) {
    const found = await Promise.all(requests.map(({ query, params }) => estimate(this.store, query, params, { signal })));
    return { seconds: found.reduce((s, e) => s + (e.seconds ?? 0), 0), nbytes: found.reduce((s, e) => s + (e.nbytes ?? 0), 0) };
  }

  offer(cost) {
    this.clear();
    this.set("waiting");
    fill(this.meta);
    fill(this.actions);
    this.note(
      el("p", {}, `This reads ${bytes(cost.nbytes)}, which takes about ${seconds(cost.seconds)}.`),
      el("button", { type: "button", class: "primary", data: { action: "compute" }, onclick: () => this.fetch(true) }, "Compute"),
    );
  }

  progress(job) {
    const share = Math.round(100 * (job.progress ?? 0));
    const fresh = this.element.dataset.state !== "job";
    if (fresh) {
      this.set("job");
      this.bar = el("progress", { max: 100, value: share, "aria-label": `Progress of ${this.title}` });
      this.said = el("span", { class: "job-text" });
      this.note(el("div", { class: "job" }, this.bar, this.said,
        el("button", { type: "button", data: { action: "cancel" }, onclick: () => this.cancel() }, "Cancel")));
      announce(`${this.title}: computing`);
    }
    this.job = job.id ? job : null;
    this.bar.value = share;
    const left = job.estimate?.seconds ? `of about ${seconds(job.estimate.seconds)}` : "";
    const size = job.estimate?.nbytes ? `, reads ${bytes(job.estimate.nbytes)}` : "";
    this.said.textContent = job.busy ? "The server is busy: waiting for a turn" : job.state === "queued" ? "Queued" : `${share}% · ${seconds(job.elapsed)} ${left}${size}`;
  }

  async cancel() {
    const job = this.job;
    this.stop();
    if (job) await cancel(job);
    this.clear();
    this.set("cancelled");
    fill(this.actions);
    fill(this.meta);
    this.note(el("p", {}, "Cancelled."), el("button", { type: "button", data: { action: "compute" }, onclick: () => this.fetch(true) }, "Compute again"));
    announce(`${this.title}: cancelled`);
  }

  fail(error) {
    if (error.code === "cancelled") {
      this.job = null;
      this.cancel();
      return;
    }
    this.clear();
    this.set("error");
    fill(this.actions);
    fill(this.meta);
    const text = error instanceof ApiError ? error.message : `The page failed: ${error.message}`;
    this.note(el("p", { class: "error-text" }, text), el("button", { type: "button", data: { action: "retry" }, onclick: () => this.fetch(true) }, "Try again"));
    announce(`${this.title}: ${text}`);
    if (!(error instanceof ApiError)) console.error(error);
  }

  set(state) {
    this.element.dataset.state = state;
    this.element.setAttribute("aria-busy", state === "loading" || state === "job");
  }

  note(...children) {
    fill(this.notice, ...children);
    this.notice.hidden = !children.some(Boolean);
  }

  clear() {
    if (this.drawn) Plotly.purge(this.plot);
    this.drawn = false;
    this.plot.replaceChildren();
    this.plot.style.removeProperty("height");
    this.after.replaceChildren();
    this.code.hidden = true;
  }

  /** Draw the results at hand again: for another width, other colours, another option. */
  redraw() {
    if (!this.results || !this.draw) return;
    const width = this.plot.clientWidth;
    if (!width) return;
    this.width = width;
    const figure = this.draw(this.results, { width, dark: isDark() });
    this.figure = figure;
    this.plot.style.height = `${figure.layout.height}px`;
    const first = !this.drawn;
    this.drawn = true;
    // The same view until other results come, so that a zoom outlives a slider's move.
    const uirevision = `${this.key} ${this.resets}`;
    Plotly.react(this.plot, figure.data, { ...figure.layout, width, autosize: false, uirevision }, CONFIG);
    if (first) this.listen();
  }

  listen() {
    this.plot.on("plotly_click", ({ points }) => this.click?.(points[0]));
    this.plot.on("plotly_relayout", (change) => {
      const [low, high] = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
      if (low !== undefined && this.zoom) this.zoom([low, high]);
    });
    this.plot.on("plotly_doubleclick", () => {
      if (this.zoom) this.zoom(null);
      else {
        this.resets += 1;
        this.redraw();
      }
    });
  }

  describe() {
    const attrs = this.results[0].attrs;
    const [{ seconds: took, cache }] = this.answers;
    const source = attrs.source ?? "";
    fill(this.meta,
      el("span", { class: `badge ${source}`, data: { source }, title: source === "sketch" ? "From statistics made while the dump was written: nothing was read" : "The data were read" }, source),
      el("span", { data: { tokens: attrs.tokens_used } }, tokensOf(attrs)),
      Number.isFinite(took) ? el("span", { data: { seconds: took }, title: cache === "hit" ? "When it was computed; this time it came from the cache" : "" }, `${seconds(took)}${cache === "hit" ? ", cached" : ""}`) : null);
    const [{ query, params }] = this.requests;
    const link = (format) => el("a", { href: url(`stores/${this.store}/${query}`, { ...params, format }), download: `${this.store}-${this.id}.${format}`, data: { action: format } }, format.toUpperCase());
    fill(this.actions,
      link("json"), link("csv"),
      this.draw ? el("button", { type: "button", data: { action: "png" }, onclick: () => this.picture() }, "PNG") : null,
      el("button", { type: "button", data: { action: "python" }, "aria-label": "copy as Python", onclick: () => this.copy("Python", python) }, "Python"),
      el("button", { type: "button", data: { action: "cli" }, "aria-label": "copy as command line", onclick: () => this.copy("command line", cli) }, "CLI"));
  }

  commands(make) {
    return this.requests.map(({ query, params }, i) => make(this.results[i]?.attrs.store ?? `${this.store}.zarr`, query, params)).join("\n\n");
  }

  async copy(kind, make) {
    const text = this.commands(make);
    if (!this.code.hidden && this.code.dataset.kind === kind) {
      this.code.hidden = true;
      return;
    }
    const said = el("p", { class: "help" }, `As ${kind}`);
    this.code.dataset.kind = kind;
    fill(this.code, said, el("pre", { tabIndex: 0 }, text));
    this.code.hidden = false;
    try {
      await navigator.clipboard.writeText(text);
      said.textContent = `Copied as ${kind}`;
    } catch {
      said.textContent = `As ${kind}; copy it from here`;
    }
    announce(said.textContent);
  }

  picture() {
    const { data, layout } = this.figure;
    const colours = palette(isDark());
    const title = { text: this.title, x: 0.01, xanchor: "left", y: 0.985, yanchor: "top", font: { size: 13 } };
    const margin = { ...layout.margin, t: (layout.margin?.t ?? 26) + 26 };
    const whole = { ...layout, title, margin, height: layout.height + 26, width: this.width, paper_bgcolor: colours.paper };
    Plotly.downloadImage({ data, layout: whole }, { format: "png", scale: 2, width: this.width, height: whole.height, filename: `${this.store}-${this.id}` });
  }
}
