// Inputs that are tied to a value of the URL's state.

import { el, fill } from "./dom.js";
import * as state from "./state.js";

/** A row of controls that follow the state. */
export class Toolbar {
  constructor(label) {
    this.element = el("div", { class: "toolbar", role: "group", "aria-label": label });
    this.syncs = [];
  }

  add(...nodes) {
    this.element.append(...nodes);
    return this;
  }

  sync() {
    for (const sync of this.syncs) sync();
  }

  field(label, id, input, ...more) {
    const node = el("div", { class: "field" }, el("label", { for: id }, label), input, ...more);
    this.element.append(node);
    return node;
  }

  /** options: () -> [[value, text], ...]; value: () -> the one in use. */
  select(key, label, options, { value = () => state.get(key), change = null } = {}) {
    const id = `ctl-${key}`;
    const input = el("select", { id, data: { key }, onchange: () => (change ? change(input.value) : state.set({ [key]: input.value })) });
    let shown = "";
    this.syncs.push(() => {
      const list = options();
      const text = JSON.stringify(list);
      if (text !== shown) fill(input, list.map(([v, name]) => el("option", { value: String(v) }, name)));
      shown = text;
      input.value = String(value());
    });
    this.field(label, id, input);
    return input;
  }

  check(key, label) {
    const id = `ctl-${key}`;
    const input = el("input", { type: "checkbox", id, data: { key }, onchange: () => state.set({ [key]: input.checked }) });
    this.syncs.push(() => { input.checked = state.flag(key); });
    this.element.append(el("div", { class: "field check" }, input, el("label", { for: id }, label)));
    return input;
  }

  number(key, label, { least = 0, most = null, step = 1, value = () => state.get(key), width = "6em", placeholder = "" } = {}) {
    const id = `ctl-${key}`;
    const input = el("input", { type: "number", id, min: String(least), step: String(step), placeholder, data: { key }, style: { width },
      onchange: () => { if (input.checkValidity()) state.set({ [key]: input.value }); else input.reportValidity(); } });
    this.syncs.push(() => {
      const limit = typeof most === "function" ? most() : most;
      if (limit !== null) input.max = String(limit);
      if (document.activeElement !== input) input.value = String(value());
    });
    this.field(label, id, input);
    return input;
  }

  text(key, label, { placeholder = "", width = "9em", title = "" } = {}) {
    const id = `ctl-${key}`;
    const input = el("input", { type: "text", id, placeholder, title, data: { key }, spellcheck: false, autocomplete: "off", style: { width },
      onchange: () => state.set({ [key]: input.value.trim() }) });
    this.syncs.push(() => { if (document.activeElement !== input) input.value = state.get(key); });
    this.field(label, id, input);
    return input;
  }
}
