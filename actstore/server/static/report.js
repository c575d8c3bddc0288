// The report: figures of results that the page carries with it. It asks nobody for anything.

import { cli, python } from "./commands.js";
import { explore } from "./cosines.js";
import { add, el, fill, quiet } from "./dom.js";
import { cosineDensity } from "./fig-similarity.js";
import { FIGURES } from "./figures.js";
import { bytes, integer, number, tokensOf } from "./format.js";
import { colourKey, snippet, token } from "./texts.js";

const CONFIG = { displayModeBar: false, displaylogo: false };
const report = JSON.parse(document.getElementById("report").textContent);
const root = document.getElementById("root");
const drawn = [];

function dark() {
  return document.documentElement.dataset.theme === "dark";
}

function paint(theme) {
  document.documentElement.dataset.theme = theme;
  for (const draw of drawn) draw();
}

const preferred = matchMedia("(prefers-color-scheme: dark)");
document.documentElement.dataset.theme = preferred.matches ? "dark" : "light";
preferred.addEventListener("change", () => paint(preferred.matches ? "dark" : "light"));

function card() {
  const { store } = report;
  const rows = [
    ["model", [store.model.name, store.model.class].filter(Boolean).join(", ")], ["tokens", `${integer(store.tokens)} of ${integer(store.sequences)} sequences`],
    ["size", bytes(store.nbytes)], ["stages", store.stages.map((s) => `${s.name} (${s.layers.length} × ${integer(s.width)}, ${s.dtype})`).join("; ")],
    ["store", `${store.name}, ${store.id}`], ["selection", report.selection], ["made by", `actstore ${report.version}: ${report.command}`],
  ];
  return el("dl", { class: "card", id: "card" }, rows.map(([k, v]) => [el("dt", {}, k), el("dd", {}, v)]));
}

function how(panel) {
  if (!panel.requests.length) return null;
  const lines = (make) => panel.requests.map(({ query, params }) => make(report.folder, query, params)).join("\n\n");
  return el("details", { class: "how" }, el("summary", {}, "How this was made"), el("div", { class: "code" }, el("pre", {}, lines(python)), el("pre", {}, lines(cli))));
}

function meta(results) {
  const attrs = results[0]?.attrs;
  if (!attrs) return null;
  return el("p", { class: "meta" }, el("span", { class: `badge ${attrs.source}` }, attrs.source), el("span", {}, tokensOf(attrs)));
}

function tops(contexts) {
  const most = Math.max(...contexts.map((c) => Math.abs(c.value)), 0);
  return [el("ol", { class: "tops" }, contexts.map((c) => el("li", { data: { token: c.token } }, el("span", { class: "top-value" }, number(c.value, 4)), snippet(c.tokens, most, c.position)))), colourKey(most)];
}

function passage(tokens) {
  const most = Math.max(...tokens.map((t) => Math.abs(t.value ?? 0)), 0);
  return [el("div", { class: "text" }, tokens.map((t) => token(t.text, t.value, most))), colourKey(most)];
}

function show(panel) {
  const results = panel.results.map((i) => report.results[i]);
  const plot = el("div", { class: "plot", role: "img", "aria-label": panel.title });
  const after = el("div", { class: "after" });
  const section = el("section", { class: "panel", id: `panel-${panel.id}`, data: { panel: panel.id, state: "done" }, style: { "--span": panel.span } },
    el("header", {}, el("h3", {}, panel.title), meta(results)), panel.help ? el("p", { class: "help" }, panel.help) : null, panel.note ? el("p", { class: "notice" }, panel.note) : null, plot, after, how(panel));
  if (panel.contexts) add(after, tops(panel.contexts));
  if (panel.passage) add(after, passage(panel.passage));
  if (!panel.figure) return section;
  const options = panel.options ?? {};
  const view = { quantile: 0.5, dimension: "match" };
  const texts = new Map(panel.texts ?? []);
  const make = panel.figure === "cosineDensity"
    ? (env) => cosineDensity(results, view, env)
    : (env) => FIGURES[panel.figure](panel.several ? results : results[0], { ...options, texts }, env);
  const draw = () => {
    const width = plot.clientWidth;
    if (!width) return;
    const { data, layout } = make({ width, dark: dark() });
    plot.style.height = `${layout.height}px`;
    Plotly.react(plot, data, { ...layout, width, autosize: false, uirevision: width }, CONFIG);
  };
  drawn.push(draw);
  if (panel.figure === "cosineDensity") explore({ after, redraw: draw }, results, view);
  let last = 0;
  new ResizeObserver(quiet(60, () => {
    if (Math.abs(plot.clientWidth - last) > 4) {
      last = plot.clientWidth;
      draw();
    }
  })).observe(plot);
  return section;
}

fill(root,
  el("div", { class: "report-head" }, el("h1", {}, report.title), el("button", { type: "button", id: "theme", "aria-label": "Light or dark", onclick: () => paint(dark() ? "light" : "dark") }, "◐")),
  el("p", { class: "lead" }, `Activations of ${report.store.model.name || "a model"}, and every figure with the line that makes it.`), card(),
  report.sections.map(({ title, panels }) => [el("h2", { class: "chapter" }, title), el("div", { class: "panels" }, panels.map(show))]));
for (const draw of drawn) draw();
document.body.dataset.ready = "true";
