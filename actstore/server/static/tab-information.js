// Information: mutual information and covariance of every two of some tokens.

import { isAbort } from "./api.js";
import { Toolbar } from "./controls.js";
import { el } from "./dom.js";
import { informationScatter, informationSweep, labelInformation, pairDistributions } from "./fig-information.js";
import { tokenMatrix } from "./fig-similarity.js";
import { integer } from "./format.js";
import { Panel } from "./panel.js";
import { draw } from "./samples.js";
import * as state from "./state.js";

export function information(context) {
  const bar = new Toolbar("Information");
  context.addFocus(bar);
  bar.select("drawn", "Tokens drawn", () => [32, 64, 96, 128].map((n) => [n, String(n)]), { value: () => state.get("drawn", "64") });
  bar.number("seed", "Seed", { value: () => state.get("seed", "0"), width: "4.5em" });
  const labels = context.card.labels.filter((l) => l.values && l.values.length > 1).map((l) => l.name);
  const words = context.card.labels.filter((l) => labels.includes(l.name) && l.kind === "text").map((l) => l.name);
  const label = () => (labels.includes(state.get("label")) ? state.get("label") : words[0] ?? labels[0] ?? "position");
  bar.select("label", "Label", () => [...labels, "position", "token_text"].map((l) => [l, l]), { value: label });
  bar.select("estimator", "Estimator", () => [["", "histogram, 15 bins"], ["gaussian-copula", "Gaussian copula"]]);
  const said = el("p", { class: "help", id: "information-sample" });
  const mutual = new Panel({ id: "mutual-information", title: "Mutual information", span: 6, help: "Of two tokens, over their neurons." });
  const covariance = new Panel({ id: "pair-covariance", title: "Covariance", span: 6, help: "Of two tokens, over the neurons that are an outlier of neither." });
  const spread = new Panel({ id: "pair-distributions", title: "Distributions over the pairs", span: 7 });
  const against = new Panel({ id: "information-scatter", title: "Information against covariance", span: 5 });
  const sweep = new Panel({ id: "information-sweep", title: "Over layers" });
  const told = new Panel({ id: "label-information", title: "Neurons and a label", help: "How much each layer's 100 most telling neurons tell of the label; click a point to see its neuron." });
  const panels = [mutual, covariance, spread, against, sweep, told];
  let drawing = null;
  return {
    element: el("div", {}, bar.element, said, el("div", { class: "panels" }, panels.map((p) => p.element))),
    panels,
    async update() {
      bar.sync();
      drawing?.abort();
      drawing = new AbortController();
      const { signal } = drawing;
      const { store, focus } = context;
      told.setTitle(`Which neurons of ${focus.stage} tell ${label()}`);
      told.show({
        store, requests: [{ query: "label_information", params: { ...context.scope({ stages: [focus.stage] }), label: label(), k: Math.min(100, focus.width) } }],
        draw: ([r], env) => labelInformation(r, { label: label() }, env),
        click: ({ data, customdata }) => data.meta && state.set({ tab: "neurons", layer: data.meta.layer, neuron: customdata }),
      });
      const n = Number(state.get("drawn", "64"));
      try {
        const sample = await draw(store, context.at(), n, Number(state.get("seed", "0")), { signal });
        if (signal.aborted) return;
        said.textContent = sample.total <= n ? `All ${integer(sample.total)} tokens that are picked.` : `${integer(n)} of the ${integer(sample.total)} tokens that are picked, drawn at random.`;
        const own = { tokens: sample.expression, estimator: state.get("estimator") || null };
        const one = [{ query: "mutual_information", params: { ...context.at(), ...own } }];
        const { texts } = sample;
        const name = `${focus.stage}, ${context.label(focus.stage, focus.layer)}`;
        mutual.setTitle(`Mutual information: ${name}`);
        covariance.setTitle(`Covariance: ${name}`);
        sweep.setTitle(`Layers of ${focus.stage}`);
        mutual.show({ store, requests: one, draw: ([r], env) => tokenMatrix(r, { variable: "mutual_information", label: "mutual information (bits)", texts }, env) });
        covariance.show({ store, requests: one, draw: ([r], env) => tokenMatrix(r, { variable: "covariance", label: "covariance (activation²)", texts }, env) });
        spread.show({ store, requests: one, draw: ([r], env) => pairDistributions(r, {}, env) });
        against.show({ store, requests: one, draw: ([r], env) => informationScatter(r, {}, env) });
        const every = { ...context.scope({ stages: [focus.stage] }), ...own, reduce: "histogram", reduce_bins: 60 };
        sweep.show({ store, requests: [{ query: "mutual_information", params: every }], draw: ([r], env) => informationSweep(r, {}, env), click: (point) => Number.isInteger(point.x) && state.set({ layer: point.x }) });
      } catch (error) {
        if (!isAbort(error)) for (const panel of panels.filter((p) => p !== told)) panel.fail(error);
      }
    },
  };
}
