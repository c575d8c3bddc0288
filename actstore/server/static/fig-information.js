// Information: mutual information and covariance of pairs, their distributions, over layers.

import { binned, cut, depthBar, grid, heading, layerTicks, layout, logAxis, pearson, range, stageLine, stairs, visibleRange } from "./fig-base.js";
import { above } from "./fig-similarity.js";
import { layerName, number, plain } from "./format.js";
import { described, stages, take, title, values } from "./results.js";
import { depth, palette, stageColour } from "./theme.js";

const BOTH = ["mutual_information", "covariance"];

function entries(result, variable) {
  const { dataset, at } = stages(result)[0];
  return above(take(dataset, variable, { ...at, layer: 0 }));
}

/** Distributions over the pairs, a panel each for information and covariance. */
export function pairDistributions(result, { bins = 60 } = {}, env) {
  const cells = grid(2, env, { least: 190, height: 210, most: 2, top: 30, gapY: 78 });
  const { stage } = stages(result)[0];
  const colour = stageColour(stage, env.dark);
  const axes = {};
  const data = BOTH.map((variable, i) => {
    const { edges, counts } = binned(entries(result, variable), bins);
    const { name, x, y } = cells.cells[i];
    axes[`xaxis${name}`] = { domain: x, anchor: `y${name}`, title: { text: described(result, variable) } };
    axes[`yaxis${name}`] = { domain: y, anchor: `x${name}`, title: { text: "pairs of tokens" }, rangemode: "tozero" };
    return {
      type: "scatter", mode: "lines", ...stairs(edges, counts), xaxis: `x${name}`, yaxis: `y${name}`, showlegend: false,
      line: { color: colour, width: 1.5 }, fill: "tozeroy", fillcolor: `${colour}26`,
      hovertemplate: "%{x:.4~g}: <b>%{y:,}</b> pairs<extra></extra>",
    };
  });
  return { data, layout: layout(env, { ...axes, height: cells.height, margin: cells.margin, annotations: BOTH.map((v, i) => heading(title(result, v), cells.cells[i], env)) }) };
}

/** Mutual information against covariance, a point for each pair. */
export function informationScatter(result, options, env) {
  const [x, y] = [entries(result, "covariance"), entries(result, "mutual_information")];
  const both = x.map((v, i) => [v, y[i]]).filter(([a, b]) => a !== null && b !== null);
  const every = Math.max(1, Math.ceil(both.length / 6000));
  const shown = both.filter((_, i) => i % every === 0);
  const { stage } = stages(result)[0];
  const r = pearson(both.map((p) => p[0]), both.map((p) => p[1]));
  return {
    data: [{
      type: "scatter", mode: "markers", x: shown.map((p) => p[0]), y: shown.map((p) => p[1]), showlegend: false,
      marker: { size: 3.5, opacity: 0.4, color: stageColour(stage, env.dark) }, hovertemplate: "covariance %{x:.3~g}<br>information %{y:.3~g} bits<extra></extra>",
    }],
    layout: layout(env, {
      height: 290, margin: { l: 56, r: 12, t: 12, b: 42 },
      xaxis: { title: { text: described(result, "covariance") } }, yaxis: { title: { text: described(result, "mutual_information") } },
      annotations: [{ text: `r = ${number(r, 3)}${every > 1 ? `, every ${every}th pair drawn` : ""}`, xref: "paper", yref: "paper", x: 0.02, y: 0.99, xanchor: "left", yanchor: "top", showarrow: false, font: { color: palette(env.dark).ink } }],
    }),
  };
}

/** Over layers: the distributions of all pairs, dark to light with depth, and their means. */
export function informationSweep(result, options, env) {
  const cells = grid(4, env, { least: 150, height: 180, most: env.width > 900 ? 4 : 2, top: 30, right: 62, gapY: 78 });
  const { stage, dataset, at } = stages(result)[0];
  const layers = values(dataset, "layer");
  const colours = depth(layers.length, env.dark);
  const [data, axes, notes] = [[], {}, []];
  BOTH.forEach((variable, v) => {
    const [one, two] = [cells.cells[2 * v], cells.cells[2 * v + 1]];
    const place = (cell) => ({ xaxis: `x${cell.name}`, yaxis: `y${cell.name}` });
    axes[`xaxis${one.name}`] = { domain: one.x, anchor: `y${one.name}`, title: { text: described(result, variable in dataset.variables ? variable : `edges_${variable}`) } };
    axes[`yaxis${one.name}`] = { domain: one.y, anchor: `x${one.name}`, title: { text: "density" }, rangemode: "tozero" };
    axes[`xaxis${two.name}`] = { domain: two.x, anchor: `y${two.name}`, title: { text: "layer" }, ...layerTicks(layers, 8) };
    axes[`yaxis${two.name}`] = { domain: two.y, anchor: `x${two.name}`, title: { text: variable === "covariance" ? "activation²" : "bits" } };
    const drawn = [];
    layers.forEach((layer, i) => {
      const edges = take(dataset, `edges_${variable}`, { ...at, layer: i });
      const counts = take(dataset, `counts_${variable}`, { ...at, layer: i });
      if (edges.some((e) => e === null)) return;
      const total = counts.reduce((s, n) => s + n, 0) || 1;
      const heights = counts.map((n, k) => n / total / (edges[k + 1] - edges[k] || 1));
      drawn.push({ edges, counts: heights });
      data.push({
        type: "scatter", mode: "lines", ...stairs(edges, heights), ...place(one), showlegend: false, line: { color: colours[i], width: 1.2 },
        hovertemplate: `layer ${layer} (${layerName(stage, layer)})<br>%{x:.3~g}<extra></extra>`,
      });
    });
    const { top, spike } = cut(drawn.map((l) => range(l.counts)[1]));
    axes[`yaxis${one.name}`].range = [0, top * 1.06];
    axes[`xaxis${one.name}`].range = visibleRange(drawn, top, 40);
    if (spike) axes[`yaxis${one.name}`].title.text = `density (goes to ${number(spike, 3)})`;
    data.push(stageLine(stage, layers, take(dataset, `mean_${variable}`, at), env, { ...place(two), showlegend: false, marker: { size: 6, color: colours }, hovertemplate: "layer %{x}: <b>%{y:.4~g}</b><extra></extra>" }));
    notes.push(heading(variable === "covariance" ? "covariance" : "mutual information", one, env), heading("mean over the pairs", two, env));
  });
  data.push(depthBar(layers.map((n) => layerName(stage, n)), env));
  return { data, layout: layout(env, { ...axes, height: cells.height, margin: cells.margin, annotations: notes }) };
}

/** How much the neurons that tell most of a label tell of it: a line for each layer. */
export function labelInformation(result, { label = "the label" } = {}, env) {
  const { stage, dataset, at } = stages(result)[0];
  const layers = values(dataset, "layer");
  const ranks = values(dataset, "rank");
  const colours = depth(layers.length, env.dark);
  const neurons = take(dataset, "neuron", at);
  const entropy = Math.max(...take(dataset, "label_entropy", at).map((v) => v ?? 0));
  const c = palette(env.dark);
  const data = layers.map((layer, i) => ({
    type: "scatter", mode: "lines+markers", x: ranks, y: take(dataset, "information", { ...at, layer: i }), customdata: neurons[i], showlegend: false,
    line: { color: colours[i], width: 1.1 }, marker: { color: colours[i], size: 4 }, meta: { layer },
    hovertemplate: `layer ${layer} (${layerName(stage, layer)}), neuron %{customdata}<br><b>%{y:.4~g} bits</b><extra></extra>`,
  }));
  data.push(depthBar(layers.map((n) => layerName(stage, n)), env));
  return {
    data,
    layout: layout(env, {
      height: 330, margin: { l: 56, r: 66, t: 12, b: 42 },
      xaxis: { title: { text: "rank of the neuron" }, ...logAxis([1, ranks.length], { rim: 0.03 }) },
      yaxis: { title: { text: `information about ${plain(label)} (bits)` }, range: [0, 1.1 * entropy || 1] },
      shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: entropy, y1: entropy, line: { color: c.faint, width: 1, dash: "dot" } }],
      annotations: [{ text: `entropy of ${plain(label)}: ${number(entropy, 3)} bits`, xref: "paper", x: 1, xanchor: "right", y: entropy, yanchor: "bottom", font: { size: 10.5, color: c.faint }, showarrow: false }],
    }),
  };
}

/** The same single values at two layers, against one another. */
export function layerScatter(result, { layers }, env) {
  const { stage, dataset, at } = stages(result)[0];
  const known = values(dataset, "layer");
  const [y, x] = layers.map((n) => take(dataset, "activation", { ...at, layer: known.indexOf(n) }));
  const places = values(dataset, "token").map((t, i) => `token ${t}, neuron ${take(dataset, "neuron")[i]}`);
  const [a, b] = layers.map((n) => layerName(stage, n));
  return {
    data: [{
      type: "scatter", mode: "markers", x, y, text: places, showlegend: false, marker: { size: 4, opacity: 0.5, color: stageColour(stage, env.dark) },
      hovertemplate: "%{text}<br>%{x:.4~g}, %{y:.4~g}<extra></extra>",
    }],
    layout: layout(env, {
      height: 360, margin: { l: 56, r: 12, t: 10, b: 42 },
      xaxis: { title: { text: `activation at ${plain(b)}` } }, yaxis: { title: { text: `activation at ${plain(a)}` } },
      annotations: [{ text: `r = ${number(pearson(x, y), 3)} over ${x.length.toLocaleString("en-GB")} values`, xref: "paper", yref: "paper", x: 0.02, y: 0.99, xanchor: "left", yanchor: "top", showarrow: false }],
    }),
  };
}
