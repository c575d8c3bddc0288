// Distributions: histograms of stages, layers, groups and any neuron.

import { Toolbar } from "./controls.js";
import { el } from "./dom.js";
import { histograms } from "./fig-distributions.js";
import { Panel } from "./panel.js";
import * as state from "./state.js";

const TRANSFORMS = [["", "as they are"], ["center", "about each neuron's mean"], ["scale", "scaled to one spread"], ["peak", "about each neuron's peak"]];

function limits(text) {
  const ends = text.split(",").map(Number);
  return ends.length === 2 && ends.every(Number.isFinite) && ends[0] < ends[1] ? ends : null;
}

export function distributions(context) {
  const bar = new Toolbar("Histograms");
  context.addFocus(bar);
  bar.number("neuron", "Neuron", { most: () => context.focus.width - 1, value: () => context.focus.neuron, width: "5.5em" });
  bar.select("bins", "Bins", () => [50, 100, 200, 400, 1000, 4000].map((n) => [n, String(n)]), { value: () => state.get("bins", "400") });
  bar.text("range", "Range", { placeholder: "all values", width: "7em", title: "Two numbers, as -5,5. Zooming into a figure sets it." });
  bar.select("transform", "Values", () => TRANSFORMS);
  bar.select("by", "Split by", () => [["", "nothing"], ...context.card.labels.filter((l) => l.values).map((l) => [l.name, l.name])]);
  bar.check("log", "log scale");
  bar.check("counts", "counts");
  const layer = new Panel({ id: "hist-stages", title: "Stages", span: 6, help: "Drag to zoom in, double-click for the whole; the bins follow." });
  const stage = new Panel({ id: "hist-layers", title: "Layers", span: 6, help: "Dark to light with depth." });
  const neuron = new Panel({ id: "hist-neuron", title: "Neuron", span: 6 });
  const groups = new Panel({ id: "hist-groups", title: "Groups", span: 6 });
  const panels = [layer, stage, neuron, groups];

  /** Zooming asks for finer bins, unless that would take long: then the picture is merely larger. */
  const zoom = (panel, key) => (range) => {
    if ((panel.answers?.[0].seconds ?? 0) > 1.5) return;
    state.set({ [key]: range ? range.map((v) => Number(v.toPrecision(4))).join(",") : null }, { replace: true });
  };

  return {
    element: el("div", {}, bar.element, el("div", { class: "panels" }, panels.map((p) => p.element))),
    panels,
    update() {
      bar.sync();
      const { store } = context;
      const focus = context.focus;
      const common = { bins: Number(state.get("bins", "400")), transform: state.get("transform") || null, approximate: true };
      const range = limits(state.get("range"));
      const own = limits(state.get("nrange"));
      const look = { log: state.flag("log"), density: !state.flag("counts") };
      const name = context.label(focus.stage, focus.layer);
      layer.setTitle(`Stages at ${context.label("", focus.layer).replace(/ \(.*/, "")}`);
      const there = context.stages.filter((s) => context.stage(s).layers.includes(focus.layer));
      layer.show({
        store, requests: [{ query: "histogram", params: { ...context.scope({ stages: there }), layers: String(focus.layer), ...common, range } }],
        draw: ([r], env) => histograms(r, { along: "stage", view: range, ...look, layer: focus.layer }, env), zoom: zoom(layer, "range"),
      });
      stage.setTitle(`Layers of ${focus.stage}`);
      stage.show({
        store, requests: [{ query: "histogram", params: { ...context.scope({ stages: [focus.stage] }), ...common, range } }],
        draw: ([r], env) => histograms(r, { along: "layer", view: range, ...look }, env), zoom: zoom(stage, "range"),
      });
      neuron.setTitle(`Neuron ${focus.neuron} of ${focus.stage}, ${name}`);
      neuron.show({
        store, requests: [{ query: "histogram", params: { ...context.at(), neurons: String(focus.neuron), per: "neuron", ...common, bins: Math.min(common.bins, 100), range: own } }],
        draw: ([r], env) => histograms(r, { along: "neuron", view: own, ...look }, env), zoom: zoom(neuron, "nrange"),
      });
      const by = state.get("by");
      groups.element.hidden = !by;
      neuron.element.style.setProperty("--span", by ? 6 : 12);
      if (by) {
        groups.setTitle(`${focus.stage}, ${name}, by ${by}`);
        groups.show({
          store, requests: [{ query: "histogram", params: { ...context.at(), by, ...common, range } }],
          draw: ([r], env) => histograms(r, { along: by, view: range, ...look }, env), zoom: zoom(groups, "range"),
        });
      } else {
        groups.stop();
        groups.key = null;
      }
    },
  };
}
