// What is being looked at: the store's card, and the selection and focus that the URL names.

import { chosen, layerName, ranges } from "./format.js";
import * as state from "./state.js";

const FAVOURITES = ["mlp_post", "hidden", "resid_post", "mlp_out"];

export class Context {
  constructor(stores) {
    this.stores = stores;
    this.card = null;
  }

  get store() {
    return this.card.name;
  }

  stage(name) {
    return this.card.stages.find((s) => s.name === name);
  }

  /** Stages that are picked, in the store's order. */
  get stages() {
    const picked = state.get("stages").split(",").filter(Boolean);
    const kept = this.card.stages.map((s) => s.name).filter((s) => picked.includes(s));
    return kept.length ? kept : this.card.stages.map((s) => s.name);
  }

  get allLayers() {
    return [...new Set(this.card.stages.flatMap((s) => s.layers))].sort((a, b) => a - b);
  }

  get layers() {
    return chosen(state.get("layers"), this.allLayers) ?? this.allLayers;
  }

  layersOf(stage) {
    const own = this.stage(stage)?.layers ?? [];
    const kept = own.filter((n) => this.layers.includes(n));
    return kept.length ? kept : own;
  }

  get tokens() {
    return state.get("tokens");
  }

  /** Parameters of the selection; what is the default is left out. */
  scope({ stages = this.stages, layers = this.layers } = {}) {
    const every = this.card.stages.map((s) => s.name);
    const own = [...new Set(stages.flatMap((s) => this.stage(s).layers))];
    const kept = layers.filter((n) => own.includes(n));
    return {
      stages: stages.length === every.length ? null : stages.join(","),
      layers: kept.length === own.length || !kept.length ? null : ranges(kept),
      tokens: this.tokens || null,
    };
  }

  /** One stage at one layer, which the tabs with single pictures are about. */
  get focus() {
    return this.focusOn(FAVOURITES);
  }

  /** The focus, where nobody has chosen a stage on the first of some favourites. */
  focusOn(favourites) {
    const known = this.stages;
    const named = state.get("stage");
    const stage = known.includes(named) ? named : favourites.find((s) => known.includes(s)) ?? known.at(-1);
    const layers = this.layersOf(stage);
    const wanted = state.get("layer") === "" ? layers[Math.floor(layers.length / 2)] : Number(state.get("layer"));
    const layer = layers.includes(wanted) ? wanted : layers.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
    const { width } = this.stage(stage);
    const neuron = state.get("neuron") === "" ? 0 : Math.min(Math.max(0, Number.parseInt(state.get("neuron"), 10) || 0), width - 1);
    return { stage, layer, neuron, width };
  }

  /** Parameters that ask for one stage at one layer, over the tokens that are picked. */
  at(stage = this.focus.stage, layer = this.focus.layer) {
    return { stages: stage, layers: String(layer), tokens: this.tokens || null };
  }

  label(stage, layer) {
    return `layer ${layer} (${layerName(stage, layer)})`;
  }

  /** Menus of stage and layer, for a toolbar. */
  addFocus(bar, { layer = true, favourites = FAVOURITES } = {}) {
    bar.select("stage", "Stage", () => this.stages.map((s) => [s, s]), { value: () => this.focusOn(favourites).stage });
    if (layer) {
      bar.select("layer", "Layer", () => this.layersOf(this.focus.stage).map((n) => [n, layerName(this.focus.stage, n) === `h.${n}` ? String(n) : `${n} (${layerName(this.focus.stage, n)})`]), { value: () => this.focus.layer });
    }
  }
}
