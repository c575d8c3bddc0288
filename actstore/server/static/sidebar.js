// Left: which store, which stages, layers and tokens.

import { get, isAbort } from "./api.js";
import { add, el, fill, announce } from "./dom.js";
import { bytes, chosen, integer, ranges } from "./format.js";
import { isDark } from "./panel.js";
import * as state from "./state.js";
import { depth, stageColour } from "./theme.js";

export class Sidebar {
  constructor(context) {
    this.context = context;
    this.stores = el("select", { id: "ctl-store", onchange: () => state.set({ store: this.stores.value, stages: null, layers: null, tokens: null, stage: null, layer: null, neuron: null, pair: null, sequence: null, pos: null, tpage: null, spage: null, npage: null }) });
    fill(this.stores, context.stores.map((s) => el("option", { value: s.name }, s.name)));
    this.card = el("dl", { class: "card", id: "card" });
    this.stages = el("fieldset", { id: "stages" });
    this.layerText = el("input", { type: "text", id: "ctl-layers", placeholder: "all", spellcheck: false, autocomplete: "off", "aria-describedby": "layers-error", onchange: () => this.setLayers(this.layerText.value) });
    this.layerError = el("p", { class: "error-text", id: "layers-error", role: "alert" });
    this.strip = el("div", { class: "strip", id: "layer-strip", role: "group", "aria-label": "Layers" });
    this.tokens = el("input", { type: "text", id: "ctl-tokens", placeholder: "all tokens", spellcheck: false, autocomplete: "off", "aria-describedby": "tokens-error tokens-count",
      onkeydown: (event) => { if (event.key === "Enter") this.setTokens(this.tokens.value); }, onchange: () => this.setTokens(this.tokens.value) });
    this.tokensError = el("div", { class: "error-text", id: "tokens-error", role: "alert" });
    this.count = el("p", { class: "help", id: "tokens-count" });
    this.examples = el("div", { class: "chips", role: "group", "aria-label": "Token filters" });
    add(document.getElementById("sidebar-body"),
      section("Store", el("label", { for: "ctl-store", class: "hidden" }, "Store"), this.stores, this.card),
      section("Stages", this.stages),
      section("Layers", el("label", { for: "ctl-layers", class: "hidden" }, "Layers, as 0,3-5"), this.layerText, this.layerError, this.strip),
      section("Tokens", el("label", { for: "ctl-tokens", class: "hidden" }, "Tokens, as an expression"), this.tokens, this.tokensError, this.examples, this.count));
  }

  /** Show another store's card. */
  show() {
    const { card } = this.context;
    const model = card.model ?? {};
    const rows = [
      ["model", model.name ?? "–"], ["type", model.class ?? "–"], ["tokens", integer(card.tokens)], ["sequences", integer(card.sequences)],
      ["size", bytes(card.nbytes)], ["sketches", card.sketch ? (card.sketch.by ? `by ${card.sketch.by}` : "yes") : "none"],
      ["predictions", card.predictions ? `top ${card.predictions}` : "none"], ["outcomes", card.outcomes ? "loss, entropy, rank" : "none"],
    ];
    fill(this.card, rows.map(([k, v]) => [el("dt", {}, k), el("dd", { data: { card: k }, title: String(v) }, v)]));
    const quoted = (v) => `'${String(v).replace(/\\/g, "\\\\").replace(/'/g, "\\'")}'`;
    const name = (n) => (/^[A-Za-z_]\w*$/.test(n) ? n : `\`${n}\``);
    const labels = card.labels.filter((l) => l.kind === "text" && l.values && l.values.length > 1 && l.values.length <= 4).slice(0, 2);
    const filters = ["", "position > 0", ...labels.flatMap((l) => l.values.map((v) => `${name(l.name)} == ${quoted(v)}`))];
    fill(this.examples, filters.map((f) => el("button", { type: "button", class: "chip", data: { filter: f }, onclick: () => this.setTokens(f) }, f || "all")));
    this.sync();
  }

  sync() {
    const { context } = this;
    this.stores.value = context.store;
    const picked = context.stages;
    fill(this.stages, el("legend", { class: "hidden" }, "Stages"), context.card.stages.map((s) => {
      const id = `stage-${s.name}`;
      const box = el("input", { type: "checkbox", id, checked: picked.includes(s.name), data: { stage: s.name }, onchange: () => this.toggle(s.name, box) });
      return el("div", { class: "stage" }, box, el("label", { for: id, title: s.meaning ?? "" }, el("span", { class: "swatch", style: { background: stageColour(s.name, isDark()) } }), s.name),
        el("span", { class: "faint" }, `${s.layers.length} × ${integer(s.width)}`));
    }));
    const every = context.allLayers;
    const layers = context.layers;
    const colours = depth(every.length, isDark());
    if (document.activeElement !== this.layerText) this.layerText.value = state.get("layers");
    const had = this.strip.contains(document.activeElement) ? document.activeElement.dataset.layer : null;
    fill(this.strip, every.map((n, i) => el("button", { type: "button", data: { layer: n }, title: `layer ${n}`, "aria-label": `layer ${n}`, "aria-pressed": String(layers.includes(n)), style: { "--colour": colours[i] }, onclick: (event) => this.toggleLayer(n, event.shiftKey) }, every.length <= 14 ? String(n) : "")));
    if (had !== null) this.strip.querySelector(`[data-layer="${had}"]`)?.focus();
    if (document.activeElement !== this.tokens) this.tokens.value = state.get("tokens");
    for (const chip of this.examples.children) chip.setAttribute("aria-pressed", String(chip.dataset.filter === state.get("tokens")));
    this.countTokens();
  }

  toggle(stage, box) {
    const every = this.context.card.stages.map((s) => s.name);
    const next = every.filter((s) => (s === stage ? box.checked : this.context.stages.includes(s)));
    if (!next.length) {
      box.checked = true;
      announce("At least one stage stays picked");
      return;
    }
    state.set({ stages: next.length === every.length ? null : next.join(",") });
    document.getElementById(`stage-${stage}`)?.focus();
  }

  toggleLayer(layer, only) {
    const every = this.context.allLayers;
    const now = this.context.layers;
    const all = now.length === every.length;
    const next = only || all ? [layer] : now.includes(layer) ? now.filter((n) => n !== layer) : [...now, layer];
    state.set({ layers: next.length === every.length || !next.length ? null : ranges(next) });
  }

  setLayers(text) {
    const every = this.context.allLayers;
    const numbers = text.trim() ? chosen(text, every) : every;
    this.layerText.setAttribute("aria-invalid", String(!numbers));
    this.layerError.textContent = numbers ? "" : `There are layers ${ranges(every)}: write for example ${every.length > 4 ? `0,${every[2]}-${every[4]}` : "0"}.`;
    if (numbers) state.set({ layers: numbers.length === every.length ? null : ranges(numbers) });
  }

  /** Check an expression with the server before it is taken. */
  async setTokens(text) {
    const where = text.trim();
    this.tokens.value = where;
    if (where === state.get("tokens")) {
      this.tokenProblem(null);
      return;
    }
    try {
      const page = await this.total(where);
      this.tokenProblem(null);
      if (page.total === 0) this.tokenProblem({ message: "No token is picked by this." });
      else state.set({ tokens: where || null });
    } catch (error) {
      if (!isAbort(error)) this.tokenProblem(error);
    }
  }

  total(where) {
    this.asking?.abort();
    this.asking = new AbortController();
    return get(`stores/${this.context.store}/tokens`, { where, limit: 1 }, { signal: this.asking.signal });
  }

  tokenProblem(error) {
    this.tokens.setAttribute("aria-invalid", String(Boolean(error)));
    fill(this.tokensError, error ? el("pre", {}, error.message) : null);
    const { value, nearest } = error ?? {};
    if (!nearest) return;
    const wrong = this.tokens.value;
    this.tokensError.append(el("button", { type: "button", class: "chip", id: "tokens-nearest", onclick: () => this.setTokens(wrong.split(value).join(nearest)) }, `use ${nearest}`));
  }

  async countTokens() {
    const { card } = this.context;
    const where = state.get("tokens");
    if (!where) {
      this.count.textContent = `all ${integer(card.tokens)} tokens`;
      return;
    }
    try {
      const { total } = await this.total(where);
      this.count.textContent = `${integer(total)} of ${integer(card.tokens)} tokens`;
      this.tokenProblem(null);
    } catch (error) {
      if (isAbort(error)) return;
      this.count.textContent = "";
      this.tokenProblem(error);
    }
  }
}

function section(title, ...children) {
  return el("section", {}, el("h2", {}, title), children);
}
