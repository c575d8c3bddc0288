// Layers: covariance and shared variance of every layer with every other.

import { Toolbar } from "./controls.js";
import { el } from "./dom.js";
import { layerScatter } from "./fig-information.js";
import { layerMatrix } from "./fig-layers.js";
import { layerName } from "./format.js";
import { Panel } from "./panel.js";
import * as state from "./state.js";

export function layers(context) {
  const bar = new Toolbar("Layers");
  const favourites = ["hidden", "resid_post", "resid_pre", "resid_mid"];
  context.addFocus(bar, { layer: false, favourites });
  bar.select("per", "Compare", () => [["", "every value (flattened)"], ["neuron", "neuron by neuron"]]);
  const focus = () => context.focusOn(favourites);
  const known = () => context.layersOf(focus().stage);
  const names = () => known().map((n) => [n, layerName(focus().stage, n)]);
  bar.select("la", "Layer", names, { value: () => pair()[0] });
  bar.select("lb", "and", names, { value: () => pair()[1] });
  const covariance = new Panel({ id: "layer-covariance", title: "Covariance of layers", span: 6, help: "Click a cell to see values of the two layers against one another." });
  const shared = new Panel({ id: "layer-r2", title: "Shared variance of layers", span: 6 });
  const scatter = new Panel({ id: "layer-scatter", title: "Values", span: 6 });
  const panels = [covariance, shared, scatter];

  function pair() {
    const own = known();
    const pick = (key, otherwise) => (own.includes(Number(state.get(key, "-1"))) ? Number(state.get(key)) : otherwise);
    return [pick("la", own[0]), pick("lb", own[Math.min(1, own.length - 1)])];
  }

  return {
    element: el("div", {}, bar.element, el("div", { class: "panels" }, panels.map((p) => p.element))),
    panels,
    update() {
      bar.sync();
      const { store } = context;
      const { stage } = focus();
      if (known().length < 2) {
        for (const panel of panels) panel.empty("One layer only: there is nothing to compare it with.");
        return;
      }
      const requests = [{ query: "layer_covariance", params: { ...context.scope({ stages: [stage] }), per: state.get("per") || null } }];
      const picked = pair();
      const click = (point) => {
        const own = known();
        state.set({ la: own[point.pointIndex[0]], lb: own[point.pointIndex[1]] });
      };
      covariance.setTitle(`Covariance of layers of ${stage}`);
      shared.setTitle(`Shared variance of layers of ${stage}`);
      covariance.show({ store, requests, draw: ([r], env) => layerMatrix(r, { variable: "covariance", picked }, env), click });
      shared.show({ store, requests, draw: ([r], env) => layerMatrix(r, { variable: "r_squared", picked }, env), click });
      const [a, b] = picked;
      scatter.setTitle(`${stage}: ${layerName(stage, a)} against ${layerName(stage, b)}`);
      if (a === b) scatter.empty("Pick two different layers.");
      else {
        scatter.show({
          store, requests: [{ query: "sample", params: { ...context.at(stage), layers: [a, b].sort((x, y) => x - y).join(","), n: 1500, unit: "value" } }],
          draw: ([r], env) => layerScatter(r, { layers: picked }, env),
        });
      }
    },
  };
}
