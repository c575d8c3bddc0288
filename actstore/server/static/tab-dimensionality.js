// Dimensionality: spectra, participation ratio, effective and intrinsic dimension.

import { Toolbar } from "./controls.js";
import { el } from "./dom.js";
import { dimensionProfiles, dimensionScatter, intrinsicProfile, spectrum } from "./fig-dimensions.js";
import { Panel } from "./panel.js";
import * as state from "./state.js";

export function dimensionality(context) {
  const bar = new Toolbar("Dimensionality");
  context.addFocus(bar, { layer: false });
  bar.select("spectrum", "Spectrum of", () => [["variance", "variance"], ["explained", "fraction of the variance"], ["cumulative", "running sum"]], { value: () => state.get("spectrum", "variance") });
  bar.select("k", "Components", () => [50, 200, 1000].map((n) => [n, String(n)]), { value: () => state.get("k", "200") });
  bar.select("threshold", "Effective dimension at", () => [0.5, 0.8, 0.9, 0.95, 0.99].map((v) => [v, `${100 * v}% of the variance`]), { value: () => state.get("threshold", "0.95") });
  bar.check("linear", "linear axes");
  const spectra = new Panel({ id: "spectrum", title: "Spectrum", span: 6, help: "A line for each layer, dark to light with depth." });
  const scatter = new Panel({ id: "dimension-scatter", title: "Effective dimension against participation ratio", span: 6, help: "A point for each stage and layer; fill says the layer, outline the stage." });
  const profile = new Panel({ id: "dimensionality", title: "Over layers", span: 6, help: "Dotted: the participation ratio of normal data of as many tokens." });
  const intrinsic = new Panel({ id: "intrinsic", title: "Intrinsic dimension", span: 6, help: "Two nearest neighbours, of 2,000 tokens; bars are standard errors." });
  const panels = [spectra, scatter, profile, intrinsic];
  return {
    element: el("div", {}, bar.element, el("div", { class: "panels" }, panels.map((p) => p.element))),
    panels,
    update() {
      bar.sync();
      const { store, focus } = context;
      const threshold = Number(state.get("threshold", "0.95"));
      const dims = { query: "dimensionality", params: { ...context.scope(), threshold: threshold === 0.95 ? null : threshold } };
      spectra.setTitle(`Spectrum of ${focus.stage}`);
      spectra.show({
        store, requests: [{ query: "spectrum", params: { ...context.scope({ stages: [focus.stage] }), k: Math.min(Number(state.get("k", "200")), focus.width) } }],
        draw: ([r], env) => spectrum(r, { variable: state.get("spectrum", "variance"), log: !state.flag("linear") }, env),
      });
      scatter.show({ store, requests: [dims], draw: ([r], env) => dimensionScatter(r, {}, env) });
      profile.show({ store, requests: [dims], draw: ([r], env) => dimensionProfiles(r, {}, env) });
      intrinsic.show({ store, requests: [{ query: "intrinsic_dimension", params: context.scope() }], draw: ([r], env) => intrinsicProfile(r, {}, env) });
    },
  };
}
