// What figures are made of: grids of small panels, lines over layers, matrices.
// Every figure is a pure function (result, options, env) -> {data, layout}; env is {width, dark}.

import { layerName, number, plain } from "./format.js";
import { depth, palette, seen, shades, stageColour, stageMarker, steps, template } from "./theme.js";

export function layout(env, more = {}) {
  return { template: template(env.dark), height: 320, ...more };
}

/** As many columns as fit, and where each panel lies. */
export function grid(n, env, { least = 190, height = 150, most = 8, top = 34, bottom = 42, left = 44, right = 10, gapX = 56, gapY = 54 } = {}) {
  const columns = Math.max(1, Math.min(n, most, Math.floor((env.width - left - right + gapX) / (least + gapX))));
  const rows = Math.ceil(n / columns);
  const inner = { width: Math.max(60, env.width - left - right), height: rows * height + (rows - 1) * gapY };
  const wide = (inner.width - (columns - 1) * gapX) / columns;
  const cells = Array.from({ length: n }, (_, i) => {
    const [row, column] = [Math.floor(i / columns), i % columns];
    const x0 = (column * (wide + gapX)) / inner.width;
    const y1 = 1 - (row * (height + gapY)) / inner.height;
    return {
      row, column, name: i ? String(i + 1) : "",
      x: [x0, x0 + wide / inner.width], y: [Math.max(0, y1 - height / inner.height), y1],
      last: row === rows - 1 || i + columns >= n,
    };
  });
  return { cells, columns, rows, height: inner.height + top + bottom, margin: { l: left, r: right, t: top, b: bottom } };
}

/** A panel's title, above its left end. */
export function heading(text, cell, env) {
  return {
    text: `<b>${plain(text)}</b>`, xref: "paper", yref: "paper", x: cell.x[0], y: cell.y[1],
    xanchor: "left", yanchor: "bottom", yshift: 3, showarrow: false,
    font: { size: 11.5, color: palette(env.dark).ink },
  };
}

/** Ticks at whole layers, few enough to be read, by the library's names for one stage. */
export function layerTicks(layers, room = 13, stage = null) {
  const every = Math.max(1, Math.ceil(layers.length / room));
  const shown = layers.filter((_, i) => i % every === 0);
  return { tickmode: "array", tickvals: shown, ticktext: shown.map((n) => (stage ? layerName(stage, n) : String(n))) };
}

/** A line over layers in a stage's colour and marker; layers that it lacks are left out. */
export function stageLine(stage, x, y, env, more = {}) {
  const kept = x.map((v, i) => [v, y[i]]).filter(([, v]) => v !== null && v !== undefined);
  const colour = stageColour(stage, env.dark);
  return {
    type: "scatter", mode: "lines+markers", name: plain(stage), legendgroup: stage,
    x: kept.map((p) => p[0]), y: kept.map((p) => p[1]),
    line: { color: colour, width: 1.4 }, marker: { color: colour, size: 5.5, symbol: stageMarker(stage) },
    ...more,
  };
}

/** An invisible trace whose bar says which colour is which layer. */
export function depthBar(names, env, label = "layer", more = {}) {
  const colours = depth(names.length, env.dark);
  const every = Math.max(1, Math.ceil(names.length / 13));
  const at = names.map((_, i) => i).filter((i) => i % every === 0);
  return {
    type: "scatter", mode: "markers", x: [null], y: [null], showlegend: false, hoverinfo: "skip",
    marker: {
      color: [0], cmin: -0.5, cmax: names.length - 0.5, colorscale: steps(colours), showscale: true,
      colorbar: bar(env, label, { tickmode: "array", tickvals: at, ticktext: at.map((i) => plain(names[i])), ...more }),
    },
  };
}

export function bar(env, label, more = {}) {
  const c = palette(env.dark);
  return {
    thickness: 10, outlinewidth: 0, ticks: "", x: 1.01, xpad: 4, len: 1, lenmode: "fraction",
    tickfont: { size: 10, color: c.faint }, title: { text: label, side: "right", font: { size: 11, color: c.ink } },
    ...more,
  };
}

/** A trace of a matrix, with its colours; rows run down. */
export function heat(z, { x, y, label, colours, hover, env, axes = "", barAt = {}, showscale = true }) {
  const look = colours ?? shades(z.flat(), env.dark);
  return {
    type: "heatmap", z, x, y, ...look, xgap: 0, ygap: 0, hoverongaps: false, showscale,
    xaxis: `x${axes}`, yaxis: `y${axes}`,
    colorbar: bar(env, label, barAt),
    ...(hover ? { text: hover, hovertemplate: "%{text}<extra></extra>" } : {}),
  };
}

/** A logarithmic axis with plain numbers: 1, 2, 5, 10, ... as far apart as they can be read. */
export function logAxis(list, { room = 6, rim = 0.06 } = {}) {
  const positive = list.filter((v) => v > 0);
  if (!positive.length) return { type: "log" };
  const [low, high] = range(positive).map(Math.log10);
  const edge = rim * (high - low) || 0.1;
  const decades = [];
  for (let k = Math.floor(low) - 1; k <= Math.ceil(high) + 1; k += 1) decades.push(k);
  for (const steps of [[1, 2, 3, 5, 7], [1, 2, 5], [1]]) {
    const ticks = decades.flatMap((k) => steps.map((s) => Number((s * 10 ** k).toPrecision(3)))).filter((v) => Math.log10(v) >= low - edge && Math.log10(v) <= high + edge);
    const every = steps.length === 1 ? Math.ceil(ticks.length / room) : 1;
    if (ticks.length <= room || steps.length === 1) {
      const kept = ticks.filter((_, i) => i % every === 0);
      return { type: "log", range: [low - edge, high + edge], tickmode: "array", tickvals: kept, ticktext: kept.map((v) => number(v, 3)) };
    }
  }
  return { type: "log" };
}

/** Where an axis from zero ends: cut where a few spikes would flatten all other lines. */
export function cut(tops) {
  const sorted = [...tops].sort((a, b) => a - b);
  const middle = sorted.length % 2 ? sorted[(sorted.length - 1) / 2] : (sorted[sorted.length / 2 - 1] + sorted[sorted.length / 2]) / 2;
  const top = sorted.at(-1) ?? 0;
  const usual = 4 * middle;
  if (!(usual > 0 && usual < top)) return { top, spike: 0 };
  return { top: Math.max(...sorted.filter((t) => t <= usual)), spike: top };
}

/** Limits that leave out tails lower than can be seen. lines: {edges, counts} each. */
export function visibleRange(lines, top, least = 150) {
  const ends = lines.flatMap(({ edges, counts }) => {
    const own = Math.min(range(counts)[1], top) / least;
    const high = counts.map((v, i) => [v, i]).filter(([v]) => v > own).map(([, i]) => i);
    return high.length ? [edges[high[0]], edges[high.at(-1) + 1]] : [];
  });
  if (!ends.length) return undefined;
  const [low, high] = range(ends);
  const rim = 0.03 * (high - low);
  return [low - rim, high + rim];
}

export function range(list) {
  let [low, high] = [Infinity, -Infinity];
  for (const v of list) {
    if (v === null || v === undefined || Number.isNaN(v)) continue;
    if (v < low) low = v;
    if (v > high) high = v;
  }
  return low > high ? [0, 1] : [low, high];
}

export function pearson(a, b) {
  const n = a.length;
  const mean = (list) => list.reduce((s, v) => s + v, 0) / n;
  const [ma, mb] = [mean(a), mean(b)];
  let [ab, aa, bb] = [0, 0, 0];
  for (let i = 0; i < n; i += 1) {
    ab += (a[i] - ma) * (b[i] - mb);
    aa += (a[i] - ma) ** 2;
    bb += (b[i] - mb) ** 2;
  }
  return ab / Math.sqrt(aa * bb);
}

/** Counts of values in even bins between their ends. */
export function binned(list, bins) {
  const [low, high] = range(list);
  const width = (high - low) / bins || 1;
  const counts = new Array(bins).fill(0);
  for (const v of list) {
    if (v !== null && v !== undefined) counts[Math.min(bins - 1, Math.floor((v - low) / width))] += 1;
  }
  return { edges: Array.from({ length: bins + 1 }, (_, i) => low + i * width), counts };
}

/** A histogram's outline: x and y of a line that steps at the edges. */
export function stairs(edges, heights) {
  const [x, y] = [[], []];
  heights.forEach((h, i) => {
    x.push(edges[i], edges[i + 1]);
    y.push(h, h);
  });
  return { x, y };
}
