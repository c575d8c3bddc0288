// Similarity: RSA of stages and of layers, the matrices behind a cell, cosines of pairs.

import { isAbort } from "./api.js";
import { Toolbar } from "./controls.js";
import { QUANTILES, dimensionsFor, explore } from "./cosines.js";
import { el } from "./dom.js";
import { agreement, cosineDensity, layerPairs, pairMap, tokenMatrix } from "./fig-similarity.js";
import { Panel } from "./panel.js";
import { draw } from "./samples.js";
import { values } from "./results.js";
import * as state from "./state.js";

const MEASURES = {
  rsa: ["RSA of cosines", "rsa", {}],
  correlation: ["RSA of correlations", "rsa", { metric: "correlation" }],
  spearman: ["RSA of ranks (Spearman)", "rsa", { compare: "spearman" }],
  cka: ["linear CKA", "cka", {}],
  debiased: ["linear CKA, debiased", "cka", { debiased: true }],
};

export function similarity(context) {
  const bar = new Toolbar("Similarity");
  bar.select("measure", "Measure", () => Object.entries(MEASURES).map(([k, [name]]) => [k, name]), { value: () => state.get("measure", "rsa") });
  bar.select("pair", "Pair", pairs, { value: () => picked().join(":") });
  context.addFocus(bar);
  bar.select("sampled", "Tokens in matrices", () => [32, 64, 96, 128].map((n) => [n, String(n)]), { value: () => state.get("sampled", "64") });
  bar.check("center", "cosines about the mean");
  const map = new Panel({ id: "rsa", title: "Stages", span: 7, help: "Click a cell for the two matrices that it compares." });
  const left = new Panel({ id: "matrix-a", title: "Tokens", span: 4 });
  const right = new Panel({ id: "matrix-b", title: "Tokens", span: 4 });
  const both = new Panel({ id: "agreement", title: "One against the other", span: 4 });
  const cosines = new Panel({ id: "cosines", title: "Cosines of pairs of tokens", help: "All pairs of 2,000 tokens. Move the slider to see the pair at that quantile." });
  const layers = new Panel({ id: "rsa-layers", title: "Layers", span: 5 });
  const panels = [map, layers, left, right, both, cosines];
  const view = { quantile: 0.5, dimension: 0 };
  let settled = "";
  let drawing = null;

  function comparable() {
    return context.stages.filter((s) => s !== "hidden");
  }

  function pairs() {
    const known = comparable();
    return known.flatMap((a, i) => known.slice(i + 1).map((b) => [`${a}:${b}`, `${a} : ${b}`]));
  }

  function picked() {
    const wanted = state.get("pair").split(":");
    const known = comparable();
    if (wanted.length === 2 && wanted.every((s) => known.includes(s))) return wanted;
    return known.length > 1 ? known.slice(0, 2) : known;
  }

  async function matrices(store, [a, b], layer, metric) {
    drawing?.abort();
    drawing = new AbortController();
    const { signal } = drawing;
    try {
      const sample = await draw(store, context.at(a, layer), Number(state.get("sampled", "64")), 0, { signal });
      if (signal.aborted) return;
      const request = (stage) => ({ query: "cosine_matrix", params: { stages: stage, layers: String(layer), tokens: sample.expression, metric: metric === "correlation" ? metric : null } });
      const how = { texts: sample.texts, label: metric === "correlation" ? "correlation" : "cosine", sequential: true };
      left.show({ store, cheap: true, requests: [request(a)], draw: ([r], env) => tokenMatrix(r, how, env) });
      right.show({ store, cheap: true, requests: [request(b)], draw: ([r], env) => tokenMatrix(r, how, env) });
      both.show({ store, cheap: true, requests: [request(a), request(b)], draw: (r, env) => agreement(r, { names: [a, b] }, env) });
    } catch (error) {
      if (!isAbort(error)) for (const panel of [left, right, both]) panel.fail(error);
    }
  }

  return {
    element: el("div", {}, bar.element, el("div", { class: "panels" }, panels.map((p) => p.element))),
    panels,
    update() {
      bar.sync();
      const { store, focus } = context;
      const [, query, own] = MEASURES[state.get("measure", "rsa")] ?? MEASURES.rsa;
      const variable = query;
      const stages = comparable();
      const pair = picked();
      const shared = stages.length > 1 ? pair.map((s) => context.layersOf(s)).reduce((x, y) => x.filter((n) => y.includes(n))) : [];
      const layer = shared.includes(focus.layer) ? focus.layer : shared.at(-1);
      if (layer === undefined) {
        for (const panel of [map, left, right, both]) panel.empty("Pick at least two stages beside hidden that share layers.");
      } else {
        const requests = [{ query, params: { ...context.scope({ stages }), ...own } }];
        map.show({
          store, requests, draw: ([r], env) => pairMap(r, { variable, picked: { pair: pair.join(":"), layer } }, env),
          click: ({ pointIndex: [row, column] }) => state.set({ pair: values(map.results[0], "pair")[row], layer: values(map.results[0], "layer")[column] }),
        });
        left.setTitle(`Tokens at ${pair[0]}, layer ${layer}`);
        right.setTitle(`Tokens at ${pair[1]}, layer ${layer}`);
        matrices(store, pair, layer, own.metric);
      }
      layers.setTitle(`Layers of ${focus.stage}`);
      if (context.layersOf(focus.stage).length < 2) layers.empty("One layer only: there is nothing to compare it with.");
      else layers.show({
        store, requests: [{ query, params: { ...context.scope({ stages: [focus.stage] }), pairs: "layers", ...own } }],
        draw: ([r], env) => layerPairs(r, { variable }, env),
      });
      showCosines(store, focus);
    },
  };

  function showCosines(store, { stage, layer, width }) {
    const common = { ...context.at(stage, layer), center: state.flag("center") ? true : null };
    const asked = { quantile: Number(state.get("q", "0.5")), dimension: state.get("dim") === "match" ? "match" : Number(state.get("dim", String(width))) };
    // What the sliders told the address comes back from there, and by then they may have moved on.
    const moved = JSON.stringify(asked) !== settled;
    if (moved) Object.assign(view, asked);
    settled = JSON.stringify(asked);
    cosines.setTitle(`Cosines of pairs of tokens: ${stage}, ${context.label(stage, layer)}`);
    cosines.show({
      store,
      requests: [
        { query: "cosine_pairs", params: { ...common, quantiles: QUANTILES } },
        { query: "gaussian_baseline", params: { ...common, n: 1000, dimensions: dimensionsFor(width) } },
      ],
      draw: (results, env) => cosineDensity(results, view, env),
      done: (results, panel) => {
        if (panel.explored === results) {
          if (moved) panel.sync();
          return;
        }
        panel.explored = results;
        panel.sync = explore(panel, results, view, () => {
          settled = JSON.stringify(view);
          state.set({ q: view.quantile === 0.5 ? null : view.quantile, dim: view.dimension === width ? null : view.dimension }, { replace: true });
        });
      },
    });
  }
}
