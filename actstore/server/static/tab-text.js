// Text: a sequence's tokens coloured by a neuron, and what the model predicted at one of them.

import { get, isAbort } from "./api.js";
import { Toolbar } from "./controls.js";
import { announce, el, fill, quiet } from "./dom.js";
import { integer, number, visible } from "./format.js";
import * as state from "./state.js";
import { colourKey, token } from "./texts.js";
import { pager } from "./widgets.js";

const PAGE = 300;
const LIST = 12;
const OUTCOMES = { loss: " nats", entropy: " nats", rank: "" };

export function text(context) {
  const bar = new Toolbar("Text");
  bar.number("sequence", "Sequence", { most: () => context.card.sequences - 1, value: () => state.get("sequence", "0"), width: "5.5em" });
  context.addFocus(bar);
  bar.number("neuron", "Neuron", { most: () => context.focus.width - 1, value: () => context.focus.neuron, width: "5.5em" });
  bar.select("colour", "Colour", () => [["", "activation"], ...(context.card.outcomes ? Object.keys(OUTCOMES).map((o) => [o, o]) : [])]);
  const title = el("h3", { id: "text-title" }, "Text");
  const meta = el("p", { class: "meta" });
  const words = el("div", { class: "text", id: "text-tokens", role: "listbox", "aria-label": "Tokens; arrow keys move, Enter pins one" });
  const key = el("div", {});
  const pages = el("div", {});
  const notice = el("div", { class: "notice", hidden: true });
  const detail = el("section", { class: "panel", id: "token-detail", "aria-label": "The token", style: { "--span": 4 } }, el("p", { class: "help" }, "Pick a token to see it here."));
  const found = el("div", { id: "token-hits" });
  const search = el("input", { type: "search", id: "token-search", placeholder: "text of a token", spellcheck: false, oninput: quiet(250, () => look(0)) });
  const list = el("div", {});
  const element = el("div", {}, bar.element, el("div", { class: "panels" },
    el("section", { class: "panel", id: "panel-text", data: { panel: "text", state: "idle" }, style: { "--span": 8 }, "aria-labelledby": "text-title" }, el("header", {}, title, el("div", { class: "under" }, meta)), notice, words, key, pages),
    detail,
    el("section", { class: "panel", id: "panel-sequences", style: { "--span": 8 }, "aria-label": "Sequences" }, el("header", {}, el("h3", {}, "Sequences")), list),
    el("section", { class: "panel", id: "panel-search", style: { "--span": 4 }, "aria-label": "Find tokens" }, el("header", {}, el("h3", {}, "Find tokens")),
      el("div", { class: "field" }, el("label", { for: "token-search" }, "Text"), search), found)));
  const frame = element.querySelector("#panel-text");
  let loading = null;
  let shownKey = "";
  let tokens = [];
  let asking = null;

  async function load() {
    const sequence = Math.min(Number(state.get("sequence", "0")) || 0, context.card.sequences - 1);
    const pos = state.get("pos") === "" ? null : Number(state.get("pos"));
    const asked = Number(state.get("tpage")) || 0;
    const offset = state.get("tpage") === "" && pos !== null ? Math.floor(pos / PAGE) * PAGE : asked;
    const { stage, layer, neuron } = context.focus;
    const wanted_ = JSON.stringify([context.store, sequence, offset, stage, layer, neuron, state.get("colour")]);
    if (wanted_ === shownKey) {
      pin(pos);
      return;
    }
    loading?.abort();
    loading = new AbortController();
    const { signal } = loading;
    frame.dataset.state = "loading";
    const base = `stores/${context.store}/sequences/${sequence}`;
    const page = { offset, limit: PAGE };
    try {
      const [read, own] = await Promise.all([get(base, page, { signal }), get(`${base}/values`, { stage, layer, neuron, ...page }, { signal })]);
      const colour = state.get("colour");
      tokens = read.tokens.map((t, i) => ({ ...t, activation: own.values[i], value: colour ? t[colour] : own.values[i] }));
      shownKey = wanted_;
      title.textContent = `Sequence ${integer(sequence)}`;
      fill(meta, el("span", {}, `${integer(read.total)} tokens`), el("span", {}, colour || `neuron ${neuron} of ${stage}, ${context.label(stage, layer)}`));
      const most = Math.max(0, ...tokens.map((t) => Math.abs(t.value ?? 0)));
      fill(words, tokens.map((t, i) => token(t.text, t.value, most, {
        unit: OUTCOMES[colour] ?? "", role: "option", tabIndex: i ? -1 : 0, id: `token-${t.position}`, "aria-selected": "false",
        data: { position: t.position, value: t.value, kept: t.token !== null }, "aria-label": `${visible(t.text)}, ${number(t.value)}`,
      })));
      fill(key, most ? colourKey(most, colour || "activation", !colour) : null);
      fill(pages, read.total > PAGE ? pager({ id: "text-pager", what: "tokens", offset, limit: PAGE, total: read.total, go: (at) => state.set({ tpage: String(at), pos: null }) }) : null);
      notice.hidden = true;
      frame.dataset.state = "done";
      pin(pos);
    } catch (error) {
      if (isAbort(error)) return;
      frame.dataset.state = "error";
      fill(notice, el("p", { class: "error-text" }, error.message));
      notice.hidden = false;
      announce(error.message);
    }
  }

  function pin(position) {
    for (const node of words.querySelectorAll("[aria-selected=true]")) node.setAttribute("aria-selected", "false");
    const node = position === null ? null : words.querySelector(`#token-${position}`);
    if (!node) {
      fill(detail, el("p", { class: "help" }, context.card.predictions ? "Point at a token for what the model predicted there; click to keep it." : "Pick a token to see it here."));
      return;
    }
    node.setAttribute("aria-selected", "true");
    for (const other of words.querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
    node.tabIndex = 0;
    describe(tokens.find((t) => t.position === position));
  }

  async function describe(t) {
    asking?.abort();
    asking = new AbortController();
    const { signal } = asking;
    const rows = [["position", integer(t.position)], ["token", t.token === null ? "not kept" : integer(t.token)], ["id", integer(t.id)], ["activation", number(t.activation, 5)],
      ...Object.entries(OUTCOMES).filter(([o]) => t[o] !== undefined && t[o] !== null).map(([o, unit]) => [o, `${number(t[o])}${unit}`])];
    const chart = el("div", { id: "predictions" });
    fill(detail, el("header", {}, el("h3", {}, "“", el("code", {}, visible(t.text)), "”")), el("dl", { class: "card" }, rows.map(([k, v]) => [el("dt", {}, k), el("dd", {}, v)])), chart);
    if (!context.card.predictions || t.token === null) return;
    try {
      const { predictions, next } = await get(`stores/${context.store}/predictions`, { token: t.token }, { signal });
      if (signal.aborted) return;
      const most = Math.max(...predictions.map((p) => p.probability ?? 0), 1e-9);
      fill(chart, el("h4", {}, "The model's next tokens"), el("table", { class: "bars" }, el("tbody", {}, predictions.map((p) => el("tr", { class: p.text === next ? "true-next" : "" },
        el("th", { scope: "row" }, visible(p.text)), el("td", {}, el("span", { class: "bar", style: { width: `${(100 * (p.probability ?? 0)) / most}%` } })), el("td", { class: "value" }, (p.probability ?? 0).toFixed(3)))))),
      el("p", { class: "help" }, next === null ? "The text ends here." : ["The next token was ", el("b", {}, visible(next)), "."]));
    } catch (error) {
      if (!isAbort(error)) fill(chart, el("p", { class: "error-text" }, error.message));
    }
  }

  const at = (event) => {
    const node = event.target.closest?.("[data-position]");
    return node ? Number(node.dataset.position) : null;
  };
  words.addEventListener("click", (event) => {
    const position = at(event);
    if (position !== null) state.set({ pos: position });
  });
  const hover = quiet(120, (position) => {
    const t = tokens.find((x) => x.position === position);
    if (t) describe(t);
  });
  words.addEventListener("pointerover", (event) => {
    const position = at(event);
    if (position !== null) hover(position);
  });
  words.addEventListener("pointerleave", () => hover(state.get("pos") === "" ? -1 : Number(state.get("pos"))));
  words.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const node = document.activeElement.closest("[data-position]");
    if (!node) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      state.set({ pos: Number(node.dataset.position) });
    } else if (step) {
      event.preventDefault();
      const next = step > 0 ? node.nextElementSibling : node.previousElementSibling;
      if (!next) return;
      node.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
      hover(Number(next.dataset.position));
    }
  });

  async function listing() {
    const offset = Number(state.get("spage")) || 0;
    const wanted_ = `${context.store} ${offset}`;
    if (list.dataset.key === wanted_) return;
    try {
      const page = await get(`stores/${context.store}/sequences`, { offset, limit: LIST });
      const column = (name) => page.columns.indexOf(name);
      fill(list, el("ul", { class: "sequences" }, page.rows.map((row) => el("li", {}, el("button", { type: "button", data: { sequence: row[column("sequence")] }, onclick: () => state.set({ sequence: row[column("sequence")], pos: null, tpage: null }) },
        el("span", { class: "faint" }, integer(row[column("sequence")])), el("span", { class: "preview" }, visible(row[column("preview")] ?? "").replace(/␣/g, " ")), el("span", { class: "faint" }, `${integer(row[column("tokens")])} tokens`))))),
      pager({ id: "sequence-pager", what: "sequences", offset, limit: LIST, total: page.total, go: (to) => state.set({ spage: to || null }, { replace: true }) }));
      list.dataset.key = wanted_;
    } catch (error) {
      fill(list, el("p", { class: "error-text" }, error.message));
    }
  }

  async function look(offset) {
    const wanted = search.value;
    if (!wanted) {
      fill(found);
      return;
    }
    try {
      const page = await get(`stores/${context.store}/tokens`, { search: wanted, where: context.tokens, offset, limit: LIST });
      if (search.value !== wanted) return;
      const column = (name) => page.columns.indexOf(name);
      fill(found, el("ul", { class: "sequences" }, page.rows.map((row) => el("li", {}, el("button", { type: "button", onclick: () => state.set({ sequence: row[column("sequence")], pos: row[column("position")], tpage: null }) },
        el("span", { class: "preview" }, visible(row[column("token_text")] ?? "")), el("span", { class: "faint" }, `sequence ${integer(row[column("sequence")])}, position ${integer(row[column("position")])}`))))),
      pager({ id: "hit-pager", what: "tokens", offset, limit: LIST, total: page.total, go: look }));
    } catch (error) {
      fill(found, el("p", { class: "error-text" }, error.message));
    }
  }

  return {
    element,
    panels: [],
    update() {
      bar.sync();
      load();
      listing();
    },
  };
}
