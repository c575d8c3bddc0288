// Neurons: a layer's neurons by any statistic, and one of them: its values and its tokens.

import { get, isAbort } from "./api.js";
import { Toolbar } from "./controls.js";
import { add, el, fill } from "./dom.js";
import { histograms, neuronScatter } from "./fig-distributions.js";
import { integer, number } from "./format.js";
import { Panel } from "./panel.js";
import { attrs, stages, take, values } from "./results.js";
import * as state from "./state.js";
import { colourKey, snippet } from "./texts.js";
import { pager } from "./widgets.js";

const COLUMNS = ["mean", "std", "skewness", "kurtosis", "min", "max", "zero_fraction", "positive_fraction"];
const SHAPE = ["score", "zeroed", "n_peaks", "position"];
const NAMES = { zero_fraction: "zeros", positive_fraction: "positive", score: "zeroness", position: "peak", n_peaks: "peaks" };
const PAGE = 25;
const [BEFORE, AFTER] = [11, 5];

export function neurons(context) {
  const bar = new Toolbar("Neurons");
  context.addFocus(bar);
  bar.number("neuron", "Neuron", { most: () => context.focus.width - 1, value: () => context.focus.neuron, width: "5.5em" });
  bar.select("nx", "Across", () => COLUMNS.map((c) => [c, NAMES[c] ?? c]), { value: () => state.get("nx", "mean") });
  bar.select("ny", "Up", () => COLUMNS.map((c) => [c, NAMES[c] ?? c]), { value: () => state.get("ny", "std") });
  bar.check("shape", "zeroness and peaks");
  const table = new Panel({ id: "neuron-table", title: "Neurons", span: 8 });
  const cloud = new Panel({ id: "neuron-scatter", title: "Two statistics", span: 4, help: "A point for each neuron; click to pick it." });
  const histogram = new Panel({ id: "neuron-histogram", title: "Values", span: 4 });
  const top = new Panel({ id: "neuron-top", title: "Largest at", span: 4 });
  const bottom = new Panel({ id: "neuron-bottom", title: "Smallest at", span: 4 });
  const panels = [table, cloud, histogram, top, bottom];

  return {
    element: el("div", {}, bar.element, el("div", { class: "panels" }, panels.map((p) => p.element))),
    panels,
    update() {
      bar.sync();
      const { store } = context;
      const { stage, layer, neuron } = context.focus;
      const name = context.label(stage, layer);
      const moments = { query: "moments", params: context.at() };
      const shape = state.flag("shape") ? ["zeroness", "peaks"].map((query) => ({ query, params: { ...context.at(), ...(query === "peaks" ? { height: 0.02 } : {}) } })) : [];
      table.setTitle(`Neurons of ${stage}, ${name}`);
      table.show({ store, requests: [moments, ...shape], done: drawTable });
      cloud.show({
        store, requests: [moments], draw: ([r], env) => neuronScatter(r, { x: state.get("nx", "mean"), y: state.get("ny", "std"), picked: neuron }, env),
        click: (point) => point.customdata !== undefined && state.set({ neuron: point.customdata }),
      });
      if (state.get("neuron") === "") return; // the table picks its first
      histogram.setTitle(`Values of neuron ${neuron}`);
      histogram.show({
        store, requests: [{ query: "histogram", params: { ...context.at(), neurons: String(neuron), per: "neuron", bins: 100, approximate: true } }],
        draw: ([r], env) => histograms(r, { along: "neuron", log: true, density: false }, env),
      });
      for (const [panel, largest] of [[top, true], [bottom, false]]) {
        panel.setTitle(`Neuron ${neuron} is ${largest ? "largest" : "smallest"} at`);
        panel.show({
          store, requests: [{ query: "top_tokens", params: { ...context.at(), neurons: String(neuron), k: 12, largest: largest ? null : false } }],
          done: (results) => drawTokens(panel, results[0], context, { stage, layer, neuron }),
        });
      }
    },
  };
}

/** The statistics of a layer as columns; those of further results beside. */
function columns(results) {
  const found = [];
  for (const result of results) {
    const { dataset, at } = stages(result)[0];
    for (const name of [...COLUMNS, ...SHAPE]) {
      if (name in dataset.variables) found.push({ name, label: NAMES[name] ?? name, about: attrs(result, name), list: take(dataset, name, { ...at, layer: 0 }) });
    }
  }
  return found;
}

function drawTable(results, panel) {
  const all = columns(results);
  const ids = values(stages(results[0])[0].dataset, "neuron");
  const text = state.get("sort", "-std");
  const down = text.startsWith("-");
  const key = all.find((c) => c.name === text.replace(/^-/, ""));
  const value = (i) => (key ? key.list[i] : ids[i]);
  const order = ids.map((_, i) => i).sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    return (down ? y - x : x - y) || ids[a] - ids[b];
  });
  if (state.get("neuron") === "") {
    queueMicrotask(() => state.set({ neuron: ids[order[0]] }, { replace: true }));
    return;
  }
  const offset = Math.min(Number(state.get("npage")) || 0, Math.max(0, ids.length - 1));
  const picked = Number.parseInt(state.get("neuron", "0"), 10);
  const sorter = (name, label, about) => {
    const on = (key?.name ?? "neuron") === name;
    return el("th", { scope: "col", "aria-sort": on ? (down ? "descending" : "ascending") : "none" },
      el("button", { type: "button", data: { sort: name }, title: about ?? "", onclick: () => state.set({ sort: on && down ? name : `-${name}`, npage: null }) }, on ? el("span", { class: "arrow", "aria-hidden": "true" }, down ? "▾" : "▴") : null, label));
  };
  const row = (i) => el("tr", { data: { neuron: ids[i] }, "aria-selected": String(ids[i] === picked), onclick: () => state.set({ neuron: ids[i] }) },
    el("th", { scope: "row" }, el("button", { type: "button", "aria-label": `Pick neuron ${ids[i]}` }, String(ids[i]))),
    all.map((c) => el("td", { data: { column: c.name, value: c.list[i] } }, typeof c.list[i] === "boolean" ? (c.list[i] ? "yes" : "no") : number(c.list[i], 4))));
  fill(panel.after,
    el("div", { class: "scroll" }, el("table", { class: "numbers", id: "neurons" },
      el("thead", {}, el("tr", {}, sorter("neuron", "neuron"), all.map((c) => sorter(c.name, c.label, c.about.long_name)))),
      el("tbody", {}, order.slice(offset, offset + PAGE).map(row)))),
    pager({ id: "neuron-pager", what: "neurons", offset, limit: PAGE, total: ids.length, go: (at) => state.set({ npage: at || null }, { replace: true }) }));
}

/** The tokens at which a neuron is largest, each in its context, coloured by the neuron. */
async function drawTokens(panel, result, context, { stage, layer, neuron }) {
  panel.texts?.abort();
  panel.texts = new AbortController();
  const { signal } = panel.texts;
  const { dataset, at } = stages(result)[0];
  const here = { ...at, layer: 0, neuron: 0 };
  const [value, token, sequence, position, text] = ["value", "token", "sequence", "position", "token_text"].map((n) => take(dataset, n, here));
  const list = el("ol", { class: "tops" });
  const most = Math.max(...value.map((v) => Math.abs(v ?? 0)));
  const items = token.flatMap((t, i) => (t < 0 ? [] : [el("li", { data: { token: t } },
    el("span", { class: "top-value" }, number(value[i], 4)),
    el("a", { class: "where", href: textAddress(sequence[i], position[i]), title: `sequence ${integer(sequence[i])}, position ${integer(position[i])}`, onclick: (event) => {
      event.preventDefault();
      state.set({ tab: "text", sequence: sequence[i], pos: position[i], tpage: null });
    } }, snippet([{ text: text?.[i] ?? `token ${t}`, value: value[i], position: position[i] }], most, position[i])))]));
  fill(panel.after, add(list, items), colourKey(most));
  await Promise.all(items.map(async (item, i) => {
    const offset = Math.max(0, position[i] - BEFORE);
    const page = { offset, limit: position[i] - offset + AFTER + 1 };
    const base = `stores/${context.store}/sequences/${sequence[i]}`;
    try {
      const [words, own] = await Promise.all([get(base, page, { signal }), get(`${base}/values`, { stage, layer, neuron, ...page }, { signal })]);
      const run = words.tokens.map((t, k) => ({ ...t, value: own.values[k] }));
      fill(item.querySelector(".where"), snippet(run, most, position[i]));
    } catch (error) {
      if (!isAbort(error)) item.title = error.message;
    }
  }));
  panel.element.dataset.texts = "done";
}

function textAddress(sequence, position) {
  const params = new URLSearchParams(location.hash.slice(1));
  params.set("tab", "text");
  params.set("sequence", sequence);
  params.set("pos", position);
  return `#${params}`;
}
