// The page: a store, a selection, a tab.

import { get } from "./api.js";
import { Context } from "./context.js";
import { announce, el, fill } from "./dom.js";
import { redrawAll } from "./panel.js";
import { Sidebar } from "./sidebar.js";
import * as state from "./state.js";
import { dimensionality } from "./tab-dimensionality.js";
import { distributions } from "./tab-distributions.js";
import { information } from "./tab-information.js";
import { layers } from "./tab-layers.js";
import { neurons } from "./tab-neurons.js";
import { overview } from "./tab-overview.js";
import { similarity } from "./tab-similarity.js";
import { text } from "./tab-text.js";

const TABS = [
  ["overview", "Overview", overview], ["distributions", "Distributions", distributions], ["neurons", "Neurons", neurons],
  ["dimensionality", "Dimensionality", dimensionality], ["similarity", "Similarity", similarity], ["information", "Information", information],
  ["layers", "Layers", layers], ["text", "Text", text],
];

const tablist = document.getElementById("tabs");
const area = document.getElementById("tab-area");
const made = new Map();
let context = null;
let sidebar = null;
let shown = null;

// -- light and dark ---------------------------------------------------------------------------

const preferred = matchMedia("(prefers-color-scheme: dark)");
const themeSwitch = document.getElementById("theme");

function theme() {
  let wanted = null;
  try {
    wanted = localStorage.getItem("actstore.theme");
  } catch {
    // Storage may be switched off.
  }
  return wanted ?? (preferred.matches ? "dark" : "light");
}

function paint(redraw = true) {
  const name = theme();
  document.documentElement.dataset.theme = name;
  themeSwitch.setAttribute("aria-pressed", String(name === "dark"));
  if (!redraw) return;
  redrawAll();
  sidebar?.sync();
}

themeSwitch.addEventListener("click", () => {
  const next = theme() === "dark" ? "light" : "dark";
  try {
    localStorage.setItem("actstore.theme", next);
  } catch {
    // As above.
  }
  document.documentElement.dataset.theme = next;
  paint();
});
preferred.addEventListener("change", () => paint());

// The address after # is the state, so that this link moves the focus by itself.
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  document.getElementById("main").focus();
});

// -- tabs -------------------------------------------------------------------------------------

function makeTabs() {
  fill(tablist, TABS.map(([id, name]) => el("button", {
    type: "button", role: "tab", id: `tab-${id}`, "aria-controls": `tabpanel-${id}`, data: { tab: id }, onclick: () => state.set({ tab: id === "overview" ? null : id }),
  }, name)));
  fill(area, TABS.map(([id]) => el("div", { role: "tabpanel", id: `tabpanel-${id}`, "aria-labelledby": `tab-${id}`, hidden: true })));
  tablist.addEventListener("keydown", (event) => {
    const order = [...tablist.children];
    const at = order.indexOf(document.activeElement);
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: order.length - 1 }[event.key];
    if (at < 0 || next === undefined) return;
    event.preventDefault();
    const tab = order[(next + order.length) % order.length];
    tab.focus();
    tab.click();
  });
}

function showTab() {
  const wanted = state.get("tab", "overview");
  const [id, name, make] = TABS.find(([t]) => t === wanted) ?? TABS[0];
  if (shown && shown !== id) for (const panel of made.get(shown)?.panels ?? []) panel.stop();
  for (const tab of tablist.children) {
    const on = tab.dataset.tab === id;
    tab.setAttribute("aria-selected", String(on));
    tab.tabIndex = on ? 0 : -1;
    document.getElementById(`tabpanel-${tab.dataset.tab}`).hidden = !on;
    if (on && shown !== id) tab.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
  if (!made.has(id)) {
    made.set(id, make(context));
    document.getElementById(`tabpanel-${id}`).append(made.get(id).element);
  }
  if (shown !== id) announce(name);
  shown = id;
  document.title = `${name} · ${context.store} · actstore`;
  made.get(id).update();
}

// -- stores -----------------------------------------------------------------------------------

async function openStore() {
  const wanted = state.get("store");
  const name = context.stores.some((s) => s.name === wanted) ? wanted : context.stores[0].name;
  if (wanted && wanted !== name) problem(`There is no store named ${wanted} here; this is ${name}.`);
  if (context.card?.name === name) return;
  const card = await get(`stores/${name}`);
  for (const { panels } of made.values()) for (const panel of panels) panel.dispose();
  for (const id of made.keys()) document.getElementById(`tabpanel-${id}`).replaceChildren();
  made.clear();
  context.card = card;
  sidebar.show();
}

function problem(message) {
  const banner = document.getElementById("problem");
  fill(banner, el("p", {}, message));
  banner.hidden = false;
}

async function update() {
  try {
    await openStore();
    sidebar.sync();
    showTab();
  } catch (error) {
    problem(error.message);
    console.error(error);
  }
}

async function start() {
  paint(false);
  try {
    const { stores } = await get("stores");
    if (!stores.length) {
      problem("No stores are served: start `actstore serve` with the path of one.");
      return;
    }
    context = new Context(stores);
    sidebar = new Sidebar(context);
    const wide = matchMedia("(min-width: 900px)");
    const unfold = () => { document.getElementById("sidebar").open = wide.matches; };
    wide.addEventListener("change", unfold);
    unfold();
    makeTabs();
    state.subscribe(update);
    await update();
    document.body.dataset.ready = "true";
  } catch (error) {
    problem(error.message);
    if (error.code !== "unreachable" && error.code !== "unauthorized") console.error(error);
  }
}

start();
