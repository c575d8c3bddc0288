// The pairs of tokens behind a density of cosines: a slider over quantiles that shows the two
// contexts, and one over the dimensions of normal data. All moves are local: nothing is fetched.

import { slider } from "./widgets.js";
import { el, fill } from "./dom.js";
import { nearest } from "./fig-similarity.js";
import { integer, number } from "./format.js";
import { stages, take, values } from "./results.js";

export const QUANTILES = [0, 0.001, 0.002, 0.005, ...Array.from({ length: 99 }, (_, i) => (i + 1) / 100), 0.995, 0.998, 0.999, 1];

function line(text) {
  return text.replace(/\r?\n/g, "⏎");
}

/** Dimensions to compare with: closer together where they are few. */
export function dimensionsFor(width) {
  const list = [];
  for (let d = 2; d < width; d = Math.max(d + 1, Math.round(d * 1.25))) list.push(d);
  return [...list, width];
}

/**
 * Fill `host.after` with sliders and contexts, and keep them in step with the figure.
 *
 * host has `after`, an element, and `redraw()`. view is {quantile, dimension}, which changes as
 * the sliders move; `rest` hears of it when they stop. Gives a function to call after the view was
 * changed from elsewhere.
 */
export function explore(host, [pairs, baseline], view, rest = () => {}) {
  const { dataset, at } = stages(pairs)[0];
  const here = { ...at, layer: 0 };
  const quantiles = values(dataset, "quantile");
  const column = Object.fromEntries(["cosine", "token_a", "token_b", "context_a", "context_b", "next_a", "next_b"].map((n) => [n, take(dataset, n, here)]));
  const dimensions = baseline ? values(baseline, "dimension") : [];
  const match = baseline ? take(stages(baseline)[0].dataset, "matching_dimension", { ...stages(baseline)[0].at, layer: 0 }) : null;
  const words = el("div", { class: "pair", id: "cosine-pair", "aria-live": "polite" });
  const start = nearest(quantiles, view.quantile);

  const say = (k) => {
    const card = (side) => el("figure", { class: "context", data: { token: column[`token_${side}`][k] } },
      el("figcaption", {}, `token ${integer(column[`token_${side}`][k])}`),
      el("p", {}, column[`context_${side}`]
        ? [el("span", {}, line(column[`context_${side}`][k])), column[`next_${side}`][k] === "" ? el("span", { class: "next" }, "⟨end⟩") : el("span", { class: "next", title: "the next token" }, line(column[`next_${side}`][k]))]
        : "no text in this store"));
    fill(words, el("p", { class: "pair-value" }, "cosine ", el("b", { id: "cosine-value", data: { value: column.cosine[k] } }, number(column.cosine[k], 4)),
      ` at quantile ${number(quantiles[k], 3)}`), el("div", { class: "pair-texts" }, card("a"), card("b")));
  };
  const first = slider({
    id: "quantile", label: "Quantile of the pairs", min: 0, max: quantiles.length - 1, value: start, unit: (i) => number(quantiles[i], 3),
    move: (i) => { view.quantile = quantiles[i]; say(i); host.redraw(); }, rest: () => rest(view),
  });
  const nodes = [first.element];
  const sync = [() => {
    const k = nearest(quantiles, view.quantile);
    first.set(k);
    say(k);
  }];
  if (dimensions.length) {
    const matched = el("button", { type: "button", id: "match", "aria-pressed": String(view.dimension === "match"), onclick: () => {
      view.dimension = "match";
      second.set(nearest(dimensions, match));
      press();
      host.redraw();
      rest(view);
    } }, `best match: ${number(match, 3)}`);
    const press = () => matched.setAttribute("aria-pressed", String(view.dimension === "match"));
    const second = slider({
      id: "dimension", label: "Dimensions of normal data", min: 0, max: dimensions.length - 1,
      value: nearest(dimensions, view.dimension === "match" ? match : view.dimension), unit: (i) => integer(dimensions[i]),
      move: (i) => { view.dimension = dimensions[i]; press(); host.redraw(); }, rest: () => rest(view),
    });
    second.element.firstChild.append(matched);
    sync.push(() => {
      second.set(nearest(dimensions, view.dimension === "match" ? match : view.dimension));
      press();
    });
    nodes.push(second.element);
  }
  say(start);
  fill(host.after, el("div", { class: "sliders" }, nodes), words);
  return () => sync.forEach((step) => step());
}
