// Similarity: RSA of pairs, matrices of tokens, cosines of pairs of tokens.

import { heat, layout, pearson, range, stairs } from "./fig-base.js";
import { layerName, number, plain, visible } from "./format.js";
import { stages, take, title, values } from "./results.js";
import { palette, shades, stageColour } from "./theme.js";

/** A cell for each pair of stages and layer. */
export function pairMap(result, { variable = "rsa", picked = null } = {}, env) {
  const layers = values(result, "layer");
  const pairs = values(result, "pair");
  const matrix = take(result, variable);
  const z = pairs.map((_, j) => layers.map((__, i) => matrix[i][j]));
  const names = pairs.map((p) => plain(p.replace(":", " : ")));
  const hover = pairs.map((p, j) => layers.map((n, i) => `${plain(p)}<br>layer ${n}<br><b>${number(z[j][i], 4)}</b>`));
  const data = [heat(z, { x: layers.map(String), y: names, label: title(result, variable), hover, env })];
  data[0].xgap = 1;
  data[0].ygap = 1;
  data[0].customdata = pairs.map((p) => layers.map((n) => [p, n]));
  const numbers = layers.length * pairs.length <= 150 && env.width / layers.length > 52;
  if (numbers) Object.assign(data[0], { texttemplate: "%{z:.2f}", textfont: { size: 10.5 } });
  return {
    data,
    layout: layout(env, {
      height: Math.max(330, 26 * pairs.length + 60), margin: { l: 60, r: 70, t: 8, b: 44 },
      xaxis: { title: { text: "layer" }, type: "category", showline: false, ticks: "" },
      yaxis: { autorange: "reversed", type: "category", showline: false, ticks: "" },
      shapes: picked ? [box(layers.indexOf(picked.layer), pairs.indexOf(picked.pair), env)] : [],
    }),
  };
}

function box(x, y, env) {
  return {
    type: "rect", x0: x - 0.5, x1: x + 0.5, y0: y - 0.5, y1: y + 0.5, visible: x >= 0 && y >= 0,
    line: { color: palette(env.dark).mark, width: 2 }, fillcolor: "rgba(0,0,0,0)",
  };
}

/** Similarity of every layer with every other, of one stage. */
export function layerPairs(result, { variable = "rsa" } = {}, env) {
  const { stage, dataset, at } = stages(result)[0];
  const [a, b, v] = [take(dataset, "layer_a"), take(dataset, "layer_b"), take(dataset, variable, at)];
  const layers = [...new Set([...a, ...b])].sort((x, y) => x - y);
  const z = layers.map((_, i) => layers.map((__, j) => (i === j ? 1 : null)));
  a.forEach((n, k) => {
    const [i, j] = [layers.indexOf(n), layers.indexOf(b[k])];
    z[i][j] = v[k];
    z[j][i] = v[k];
  });
  return squareOfLayers(z, stage, layers, { label: title(result, variable), digits: 3 }, env);
}

/** A square of layers by layers. */
export function squareOfLayers(z, stage, layers, { label, percent = false, picked = null }, env) {
  const names = layers.map((n) => layerName(stage, n));
  const hover = z.map((row, i) => row.map((v, j) => `${names[i]} and ${names[j]}<br><b>${number(v, 4)}${percent ? " %" : ""}</b>`));
  const trace = heat(z, { x: names, y: names, label, hover, env, colours: percent ? { ...shades([0, 1]), zmin: 0, zmax: 100 } : undefined });
  const side = Math.min(env.width - 130, 360);
  return {
    data: [trace],
    layout: layout(env, {
      height: side + 54, margin: { l: 52, r: Math.max(76, env.width - side - 52), t: 8, b: 46 },
      xaxis: { title: { text: "layer" }, type: "category", showline: false, ticks: "", constrain: "domain", nticks: 14 },
      yaxis: { title: { text: "layer" }, type: "category", showline: false, ticks: "", scaleanchor: "x", constrain: "domain", nticks: 14 },
      shapes: picked ? [box(layers.indexOf(picked[1]), layers.indexOf(picked[0]), env)] : [],
    }),
  };
}

/** A matrix of tokens by tokens; its own diagonal is blank and out of the scale. */
export function tokenMatrix(result, { variable = "similarity", texts = null, label = null, sequential = false } = {}, env) {
  const { dataset, at } = stages(result)[0];
  const whole = take(dataset, variable, { ...at, layer: 0 });
  const [rows, columns] = [values(dataset, "token"), values(dataset, "token_b")];
  const same = rows.length === columns.length && rows.every((t, i) => t === columns[i]);
  const z = whole.map((row, i) => row.map((v, j) => (same && i === j ? null : v)));
  const name = (token) => {
    const text = texts?.get(token);
    return text === undefined ? `token ${token}` : `token ${token} “${plain(visible(text))}”`;
  };
  const hover = z.map((row, i) => row.map((v, j) => `${name(rows[i])}<br>${name(columns[j])}<br><b>${number(v, 4)}</b>`));
  const side = Math.min(env.width - 84, 400);
  const unit = label ?? title(result, variable);
  const ticks = (tokens) => {
    const every = Math.max(1, Math.ceil(tokens.length / 6));
    const at = tokens.map((_, i) => i).filter((i) => i % every === 0);
    return { tickmode: "array", tickvals: at, ticktext: at.map((i) => String(tokens[i])) };
  };
  return {
    data: [heat(z, { label: unit, hover, env, colours: shades(z.flat(), env.dark, sequential) })],
    layout: layout(env, {
      height: side + 52, margin: { l: 34, r: Math.max(50, env.width - side - 34), t: 6, b: 46 },
      xaxis: { title: { text: "token" }, showline: false, ticks: "", showgrid: false, ...ticks(columns), constrain: "domain" },
      yaxis: { autorange: "reversed", showline: false, ticks: "", showgrid: false, scaleanchor: "x", constrain: "domain", ...ticks(rows) },
      plot_bgcolor: palette(env.dark).blank,
    }),
  };
}

/** The entries above the diagonal. */
export function above(matrix) {
  return matrix.flatMap((row, i) => row.slice(i + 1));
}

/** What RSA correlates: similarities at one stage against those at the other. */
export function agreement([first, second], { names }, env) {
  const lists = [first, second].map((r) => {
    const { dataset, at } = stages(r)[0];
    return above(take(dataset, "similarity", { ...at, layer: 0 }));
  });
  const both = lists[0].map((v, i) => [v, lists[1][i]]).filter(([a, b]) => a !== null && b !== null);
  const [x, y] = [both.map((p) => p[0]), both.map((p) => p[1])];
  const c = palette(env.dark);
  return {
    data: [{ type: "scatter", mode: "markers", x, y, showlegend: false, marker: { size: 3.5, opacity: 0.35, color: c.accent }, hovertemplate: "%{x:.3f}, %{y:.3f}<extra></extra>" }],
    layout: layout(env, {
      height: Math.min(env.width - 84, 400) + 52, margin: { l: 52, r: 12, t: 6, b: 46 },
      xaxis: { title: { text: `similarity at ${plain(names[0])}` } }, yaxis: { title: { text: `similarity at ${plain(names[1])}` } },
      annotations: [{ text: `r = ${number(pearson(x, y), 3)} over ${x.length.toLocaleString("en-GB")} pairs`, xref: "paper", yref: "paper", x: 0.02, y: 0.99, xanchor: "left", yanchor: "top", showarrow: false }],
    }),
  };
}

/** Which of the quantiles asked is nearest to a fraction. */
export function nearest(list, wanted) {
  return list.reduce((best, v, i) => (Math.abs(v - wanted) < Math.abs(list[best] - wanted) ? i : best), 0);
}

/** Density of the cosines of pairs, the pair at a quantile, and normal data of some dimension. */
export function cosineDensity([pairs, baseline], { quantile = 0.5, dimension = null } = {}, env) {
  const { stage, dataset, at } = stages(pairs)[0];
  const here = { ...at, layer: 0 };
  const c = palette(env.dark);
  const own = take(dataset, "density", here);
  const data = [{
    type: "scatter", mode: "lines", name: `${plain(stage)}, layer ${values(dataset, "layer")[0]}`, ...stairs(take(dataset, "edges"), own),
    line: { color: stageColour(stage, env.dark), width: 1.6 }, fill: "tozeroy", fillcolor: `${stageColour(stage, env.dark)}26`,
    hovertemplate: "cosine %{x:.3f}<br>density <b>%{y:.3~g}</b><extra></extra>",
  }];
  let top = range(own)[1];
  if (baseline && dimension !== null) {
    const { dataset: normal, at: place } = stages(baseline)[0];
    const dimensions = values(normal, "dimension");
    const i = dimension === "match" ? -1 : nearest(dimensions, dimension);
    const [density, n] = i < 0
      ? [take(normal, "matching_density", { ...place, layer: 0 }), Math.round(take(normal, "matching_dimension", { ...place, layer: 0 }))]
      : [take(normal, "density", { dimension: i }), dimensions[i]];
    top = Math.max(top, Math.min(range(density)[1], 2.5 * top));
    data.push({
      type: "scatter", mode: "lines", name: `normal data of ${n.toLocaleString("en-GB")} dimensions`, ...stairs(take(normal, "edges"), density),
      line: { color: c.faint, width: 1.4, dash: "dot" }, hovertemplate: "cosine %{x:.3f}<br>density <b>%{y:.3~g}</b><extra></extra>",
    });
  }
  const k = nearest(values(dataset, "quantile"), quantile);
  const cosine = take(dataset, "cosine", here)[k];
  return {
    data,
    layout: layout(env, {
      height: 300, margin: { l: 52, r: 14, t: 30, b: 42 }, showlegend: true,
      xaxis: { title: { text: "cosine of two tokens" }, range: [-1, 1] },
      yaxis: { title: { text: "probability density" }, range: [0, top * 1.06] },
      shapes: cosine === null ? [] : [{ type: "line", x0: cosine, x1: cosine, yref: "paper", y0: 0, y1: 1, line: { color: c.mark, width: 1.6 } }],
    }),
  };
}
