// Sliders and pagers: small inputs that tell a function.

import { el, quiet } from "./dom.js";

/** A slider that moves at once; the URL follows when it rests. */
export function slider({ id, label, min, max, step = 1, value, move, rest = null, unit = (v) => String(v) }) {
  const shown = el("output", { for: id, class: "slider-value" });
  const settled = quiet(250, (v) => rest?.(v));
  const input = el("input", { type: "range", id, oninput: () => {
    const v = Number(input.value);
    say(v);
    move(v);
    settled(v);
  } });
  Object.assign(input, { min: String(min), max: String(max), step: String(step), value: String(value) });
  function say(v) {
    shown.textContent = unit(v);
    input.setAttribute("aria-valuetext", unit(v));
  }
  say(Number(input.value));
  const element = el("div", { class: "slider" }, el("div", { class: "slider-head" }, el("label", { for: id }, label), shown), input);
  return { element, input, set: (v) => { input.value = String(v); say(Number(input.value)); } };
}

/** Previous and next page. */
export function pager({ id, what, offset, limit, total, go }) {
  const last = Math.min(total, offset + limit);
  const button = (action, text, at, off) => el("button", { type: "button", data: { action }, disabled: off, onclick: () => go(at), "aria-label": `${action === "before" ? "Previous" : "Next"} ${what}` }, text);
  return el("div", { class: "pager", id },
    button("before", "‹", Math.max(0, offset - limit), offset <= 0),
    el("span", {}, total ? `${(offset + 1).toLocaleString("en-GB")}–${last.toLocaleString("en-GB")} of ${total.toLocaleString("en-GB")} ${what}` : `no ${what}`),
    button("after", "›", offset + limit, last >= total));
}
