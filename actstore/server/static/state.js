// All state of the page is in the URL: whoever opens it sees the same, and the back button works.

const listeners = new Set();
let current = read();

function read() {
  return Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
}

/** A value as text; "" where there is none. */
export function get(key, otherwise = "") {
  return current[key] ?? otherwise;
}

export function flag(key) {
  return current[key] === "1";
}

/** Change some values; null and "" take one away. `replace` leaves no step in the history. */
export function set(changes, { replace = false } = {}) {
  const next = { ...current };
  for (const [key, value] of Object.entries(changes)) {
    if (value === null || value === undefined || value === "" || value === false) delete next[key];
    else next[key] = value === true ? "1" : String(value);
  }
  const before = new URLSearchParams(current).toString();
  const after = new URLSearchParams(next).toString();
  if (before === after) return;
  const changed = new Set([...Object.keys(current), ...Object.keys(next)].filter((k) => current[k] !== next[k]));
  current = next;
  history[replace ? "replaceState" : "pushState"](null, "", `#${after}`);
  for (const listener of listeners) listener(changed);
}

export function subscribe(listener) {
  listeners.add(listener);
}

function moved() {
  const next = read();
  const changed = new Set([...Object.keys(current), ...Object.keys(next)].filter((k) => current[k] !== next[k]));
  if (!changed.size) return;
  current = next;
  for (const listener of listeners) listener(changed);
}

addEventListener("popstate", moved);
addEventListener("hashchange", moved);
