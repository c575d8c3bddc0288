// Tokens as text, coloured by their activation.

import { el } from "./dom.js";
import { number, visible } from "./format.js";
import { tint } from "./theme.js";

/** A token's text for running text: line ends are shown and kept. */
function shown(text) {
  return text.replace(/\r?\n/g, "⏎\n").replace(/\t/g, "⇥\t").replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g, "�");
}

/** One token; its colour says its value, its title says both. */
export function token(text, value, most, { unit = "", marked = false, ...props } = {}) {
  const title = value === null || value === undefined ? `“${visible(text)}”` : `“${visible(text)}” ${number(value)}${unit}`;
  return el("span", { class: marked ? "token marked" : "token", title, style: { "background-color": tint(value, most) }, ...props }, shown(text));
}

/** A short run of tokens around the one that matters, in one line. */
export function snippet(tokens, most, at) {
  return el("span", { class: "snippet" }, tokens.map((t) =>
    el("span", { class: t.position === at ? "token marked" : "token", title: `“${visible(t.text)}” ${number(t.value)}`, style: { "background-color": tint(t.value, most) } }, t.text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g, "�"))));
}

/** What a colour means: from the largest negative, or zero, to the largest positive value. */
export function colourKey(most, unit = "activation", signed = true) {
  const stops = (signed ? [-1, -0.6, -0.3, 0, 0.3, 0.6, 1] : [0, 0.2, 0.4, 0.6, 0.8, 1]).map((f) => tint(f * most, most));
  return el("div", { class: "colour-key" }, el("span", {}, signed ? number(-most, 3) : "0"),
    el("span", { class: "ramp", style: { background: `linear-gradient(90deg, ${stops.join(", ")})` } }), el("span", {}, number(most, 3)), el("span", { class: "faint" }, unit));
}
