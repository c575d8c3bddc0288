// Colours. A stage has the same one in every picture, here as in actstore.plot; layers run from
// dark to light with depth. On a dark page, colours too dark to be seen are lightened.

export const STAGE_STYLE = {
  hidden: ["#717581", "circle"],
  resid_pre: ["#b9ac70", "triangle-down"],
  resid_mid: ["#1a1a40", "triangle-up"],
  resid_post: ["#94a4a2", "triangle-left"],
  attn_z: ["#a96b59", "triangle-right"],
  attn_out: ["#e76300", "cross"],
  mlp_in: ["#3f90da", "circle"],
  mlp_pre: ["#ffa90e", "square"],
  mlp_post: ["#bd1f01", "diamond"],
  mlp_out: ["#832db6", "triangle-up"],
};

const GROUPS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#593109"];
export const MARKERS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star", "x"];

const PLASMA = [
  "#0d0887", "#330597", "#5002a2", "#6a00a8", "#8405a7", "#9c179e", "#b12a90", "#c33d80",
  "#d35171", "#e16462", "#ed7953", "#f68f44", "#fca636", "#fec029", "#f9dc24", "#f0f921",
];
const VIRIDIS = [
  "#440154", "#481a6c", "#472f7d", "#414487", "#39568c", "#31688e", "#2a788e", "#23888e",
  "#1f988b", "#22a884", "#35b779", "#54c568", "#7ad151", "#a5db36", "#d2e21b", "#fde725",
];
const BOTH_SIGNS = [
  "#053061", "#175290", "#2a71b2", "#3f8ec0", "#6bacd1", "#9bc9e0", "#c2ddec", "#e0ecf3",
  "#f7f6f6", "#fbe5d8", "#fbccb4", "#f5aa89", "#e48066", "#d05548", "#ba2832", "#930e26", "#67001f",
];
const BOTH_SIGNS_DARK = [
  "#cfe6f5", "#a9d2ec", "#82bce2", "#5fa2d3", "#4586ba", "#356a97", "#2c4f70", "#27384b",
  "#24292f", "#46302d", "#6b3a32", "#914639", "#b65743", "#d46d53", "#e88a6d", "#f4ab90", "#fbd0bd",
];

const LIGHT = {
  dark: false, ink: "#2b2f36", faint: "#6b7280", grid: "#eceef2", axis: "#b8bec9",
  paper: "#ffffff", blank: "#e3e6eb", accent: "#24648f", mark: "#c0392b",
};
const DARK = {
  dark: true, ink: "#d9dde4", faint: "#949cab", grid: "#262c35", axis: "#4a5260",
  paper: "#181c22", blank: "#2b313a", accent: "#79b8e3", mark: "#ff8a75",
};

export function palette(dark) {
  return dark ? DARK : LIGHT;
}

function rgb(hex) {
  return [1, 3, 5].map((i) => Number.parseInt(hex.slice(i, i + 2), 16));
}

function hex(parts) {
  return `#${parts.map((p) => Math.round(p).toString(16).padStart(2, "0")).join("")}`;
}

function luminance(colour) {
  const [r, g, b] = rgb(colour).map((v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

/** The colour, mixed with white until it can be seen on the dark page. */
export function seen(colour, dark) {
  if (!dark) return colour;
  let mixed = colour;
  for (let white = 0.1; luminance(mixed) < 0.16 && white <= 0.7; white += 0.1) {
    mixed = hex(rgb(colour).map((v) => v + (255 - v) * white));
  }
  return mixed;
}

function crc32(text) {
  let crc = 0xffffffff;
  for (const byte of new TextEncoder().encode(text)) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit += 1) crc = crc & 1 ? (crc >>> 1) ^ 0xedb88320 : crc >>> 1;
  }
  return (crc ^ 0xffffffff) >>> 0;
}

function style(stage) {
  const styles = Object.values(STAGE_STYLE);
  return STAGE_STYLE[stage] ?? styles[crc32(stage) % styles.length];
}

export function stageColour(stage, dark = false) {
  return seen(style(stage)[0], dark);
}

export function stageMarker(stage) {
  return style(stage)[1];
}

function along(map, fraction) {
  const at = Math.min(Math.max(fraction, 0), 1) * (map.length - 1);
  const low = Math.floor(at);
  const [a, b] = [rgb(map[low]), rgb(map[Math.min(low + 1, map.length - 1)])];
  return hex(a.map((v, i) => v + (b[i] - v) * (at - low)));
}

/** One colour for each layer: dark to light with depth. */
export function depth(n, dark = false) {
  const [first, last] = dark ? [0.28, 1] : [0, 0.88];
  return Array.from({ length: n }, (_, i) => along(PLASMA, first + (n > 1 ? i / (n - 1) : 0) * (last - first)));
}

/** Colours of the groups of a label: a few that differ, or a run of many. */
export function groupColours(n, dark = false) {
  return n <= GROUPS.length ? GROUPS.slice(0, n).map((c) => seen(c, dark)) : depth(n, dark);
}

/** A colour scale and limits for a matrix: blank at 0 where both signs occur, unless `plain`. */
export function shades(values, dark = false, plain = false) {
  let [low, high] = [Infinity, -Infinity];
  for (const v of values) {
    if (v === null) continue;
    if (v < low) low = v;
    if (v > high) high = v;
  }
  if (low > high) [low, high] = [0, 1];
  if (plain || !(low < 0 && high > 0)) {
    return { zmin: low, zmax: high, colorscale: scale((f) => along(VIRIDIS, f)) };
  }
  const most = Math.max(-low, high);
  const map = dark ? BOTH_SIGNS_DARK : BOTH_SIGNS;
  const [first, last] = [low, high].map((end) => 0.5 + end / (2 * most));
  return { zmin: low, zmax: high, colorscale: scale((f) => along(map, first + f * (last - first))) };
}

function scale(colour) {
  return Array.from({ length: 33 }, (_, i) => [i / 32, colour(i / 32)]);
}

/** A colour scale of equal steps, for a bar that says which line is which layer. */
export function steps(colours) {
  return colours.flatMap((c, i) => [[i / colours.length, c], [(i + 1) / colours.length, c]]);
}

/** Behind a token's text: red above zero, blue below, as strong as the value. */
export function tint(value, most) {
  if (value === null || value === undefined || !most) return "transparent";
  const strength = Math.min(1, Math.abs(value) / most);
  const colour = value > 0 ? "214, 69, 46" : "47, 119, 189";
  return `rgba(${colour}, ${(0.72 * strength ** 0.8).toFixed(3)})`;
}

/** What all figures share. */
export function template(dark) {
  const c = palette(dark);
  const axis = {
    gridcolor: c.grid, linecolor: c.axis, zerolinecolor: c.grid, zeroline: false, showline: true,
    ticks: "outside", ticklen: 3, tickcolor: c.axis, tickfont: { size: 10.5, color: c.faint },
    title: { font: { size: 11.5, color: c.ink }, standoff: 6 }, automargin: true,
    exponentformat: "power", minexponent: 4,
  };
  return {
    layout: {
      font: { family: 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif', size: 11.5, color: c.ink },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      colorway: GROUPS.map((colour) => seen(colour, dark)),
      margin: { l: 52, r: 12, t: 26, b: 38 }, hovermode: "closest", dragmode: "zoom",
      xaxis: axis, yaxis: axis,
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { size: 11, color: c.ink }, bgcolor: "rgba(0,0,0,0)", tracegroupgap: 2, itemwidth: 30 },
      hoverlabel: { bgcolor: dark ? "#2b313a" : "#ffffff", bordercolor: c.axis, font: { size: 11.5, color: c.ink }, namelength: -1, align: "left" },
      annotationdefaults: { font: { size: 11.5, color: c.ink }, showarrow: false },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: c.faint, activecolor: c.accent },
    },
  };
}
