// Overview: laminar profiles of every statistic.

import { el } from "./dom.js";
import { dimensionProfiles, intrinsicProfile } from "./fig-dimensions.js";
import { pairProfile, profiles } from "./fig-profiles.js";
import { Panel } from "./panel.js";
import * as state from "./state.js";

export function overview(context) {
  const moments = new Panel({ id: "moments", title: "Moments over layers", help: "Each line is a stage; click a point to see that layer's distribution." });
  const dimensions = new Panel({ id: "overview-dimensions", title: "Dimensionality over layers", span: 6, help: "Dotted: the participation ratio of normal data of as many tokens." });
  const intrinsic = new Panel({ id: "overview-intrinsic", title: "Intrinsic dimension over layers", span: 6, help: "Two nearest neighbours, of 1,000 tokens." });
  const similarity = new Panel({ id: "overview-rsa", title: "Similarity of stages over layers", span: 6, help: "RSA: how alike two stages find the same pairs of tokens." });
  const normality = new Panel({ id: "overview-normality", title: "Distance from normal over layers", span: 6, help: "Largest difference between the cumulative distribution and that of a normal." });
  const panels = [moments, dimensions, intrinsic, similarity, normality];

  const open = (point) => {
    const { stage } = point.data.meta ?? {};
    if (stage) state.set({ tab: "distributions", stage, layer: point.x });
  };

  return {
    element: el("div", { class: "panels" }, panels.map((p) => p.element)),
    panels,
    update() {
      const { store } = context;
      const scope = context.scope();
      const ask = (query, params = {}) => [{ query, params: { ...scope, ...params } }];
      moments.show({ store, requests: ask("moments", { per: "layer" }), draw: ([r], env) => profiles(r, {}, env), click: open });
      dimensions.show({ store, requests: ask("dimensionality"), draw: ([r], env) => dimensionProfiles(r, {}, env), click: open });
      intrinsic.show({ store, requests: ask("intrinsic_dimension", { n: 1000 }), draw: ([r], env) => intrinsicProfile(r, {}, env), click: open });
      normality.show({ store, requests: ask("normality", { per: "layer" }), draw: ([r], env) => profiles(r, { variables: ["distance"], names: { distance: "distance from normal" }, height: 210 }, env), click: open });
      if (context.stages.filter((s) => s !== "hidden").length < 2) similarity.empty("Pick at least two stages beside hidden to compare them.");
      else {
        similarity.show({
          store, requests: ask("rsa"), draw: ([r], env) => pairProfile(r, {}, env),
          click: (point) => state.set({ tab: "similarity", pair: point.data.meta.pair, layer: point.x }),
        });
      }
    },
  };
}
