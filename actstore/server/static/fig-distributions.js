// Histograms as outlines: of stages, of layers, of groups, of neurons.

import { cut, depthBar, layout, logAxis, range, stairs, visibleRange } from "./fig-base.js";
import { integer, layerName, number, plain } from "./format.js";
import { described, stages, take, values } from "./results.js";
import { depth, groupColours, palette, stageColour } from "./theme.js";

/** One histogram: where its bins are, how many values each holds, and how many lie outside. */
function outline(dataset, at) {
  const edges = take(dataset, "edges", at).filter((e) => e !== null);
  const counts = (take(dataset, "density", at) ?? take(dataset, "counts", at)).slice(0, Math.max(0, edges.length - 1));
  const outside = ["below", "above", "nonfinite"].reduce((n, v) => n + (take(dataset, v, at) ?? 0), 0);
  return { edges, counts, outside };
}

function asDensity({ edges, counts, outside }) {
  const total = counts.reduce((s, v) => s + v, 0);
  return { edges, outside, counts: counts.map((v, i) => v / (total || 1) / (edges[i + 1] - edges[i] || 1)) };
}

/**
 * Histograms over one another.
 *
 * along: "stage" (at one layer), "layer" (of one stage), a label's name, or "neuron".
 * log, density: of the vertical axis. view: limits of the horizontal axis.
 */
export function histograms(result, { along = "stage", log = false, density = true, view = null, layer = null } = {}, env) {
  const lines = [];
  let names = [];
  let colours = [];
  if (along === "stage") {
    for (const { stage, dataset, at } of stages(result)) {
      const j = layer === null ? 0 : values(dataset, "layer").indexOf(layer);
      if (j < 0 || take(dataset, "edges", { ...at, layer: j }).every((e) => e === null)) continue;
      lines.push({ name: stage, colour: stageColour(stage, env.dark), ...outline(dataset, { ...at, layer: j }) });
    }
  } else {
    const { dataset, stage, at } = stages(result)[0];
    const dim = along in dataset.dims ? along : "layer";
    const keys = values(dataset, dim);
    names = keys.map((k) => (dim === "layer" ? layerName(stage, k) : String(k)));
    colours = dim === "layer" ? depth(keys.length, env.dark) : groupColours(keys.length, env.dark);
    keys.forEach((key, i) => {
      const here = { ...at, ...(dim === "layer" ? {} : { layer: 0 }), [dim]: i };
      const name = dim === "layer" ? `layer ${key} (${names[i]})` : dim === "neuron" ? `neuron ${key}` : `${dim} ${key}`;
      lines.push({ name, colour: keys.length === 1 ? stageColour(stage, env.dark) : colours[i], ...outline(dataset, here) });
    });
  }
  const counted = "counts" in stages(result)[0].dataset.variables;
  const shown = density && counted ? lines.map((l) => ({ ...l, ...asDensity(l) })) : lines;
  const tops = shown.map((l) => range(l.counts)[1]);
  const { top, spike } = cut(tops);
  const least = Math.min(...shown.flatMap((l) => l.counts.filter((v) => v > 0)));
  const bars = along === "layer" || names.length > 8;
  const many = shown.length > 12;
  const data = shown.map((line) => ({
    type: "scatter", mode: "lines", name: plain(line.name), ...stairs(line.edges, log ? line.counts.map((v) => v || least / 10) : line.counts),
    line: { color: line.colour, width: many ? 1.1 : 1.5, shape: "linear" }, showlegend: !bars && shown.length > 1,
    ...(shown.length === 1 ? { fill: "tozeroy", fillcolor: `${line.colour}26` } : {}),
    hovertemplate: `${plain(line.name)}<br>%{x:.4~g}: <b>%{y:.4~g}</b><extra></extra>`,
  }));
  if (bars) data.push(depthBar(names, env, along === "layer" ? "layer" : along));
  const outside = lines.reduce((n, l) => n + l.outside, 0);
  const c = palette(env.dark);
  return {
    data,
    layout: layout(env, {
      height: 330, margin: { l: 58, r: bars ? 66 : 14, t: bars ? 14 : 30, b: 42 },
      xaxis: { title: { text: "activation" }, range: view ?? (log || along === "neuron" ? undefined : visibleRange(shown, top)) },
      yaxis: {
        title: { text: `${density ? "probability density" : described(result, "counts")}${spike && !log ? ` (goes to ${number(spike, 3)})` : ""}` },
        ...(log ? { ...logAxis([least, ...tops]), range: [Math.log10(least * 0.7), Math.log10(Math.max(...tops) * 1.5)] } : { range: [0, top * 1.06 || 1] }),
      },
      annotations: outside ? [{
        text: `${integer(outside)} values outside the bins`, xref: "paper", yref: "paper", x: 1, y: 1, xanchor: "right", yanchor: "top",
        font: { size: 10.5, color: c.faint }, showarrow: false,
      }] : [],
    }),
  };
}

/** Two statistics of a layer's neurons against one another; the picked one is marked. */
export function neuronScatter(result, { x = "mean", y = "std", picked = null } = {}, env) {
  const { stage, dataset, at } = stages(result)[0];
  const here = { ...at, layer: 0 };
  const neurons = values(dataset, "neuron");
  const [xs, ys] = [take(dataset, x, here), take(dataset, y, here)];
  const c = palette(env.dark);
  const i = neurons.indexOf(picked);
  const colour = stageColour(stage, env.dark);
  const data = [{
    type: "scatter", mode: "markers", x: xs, y: ys, customdata: neurons, showlegend: false,
    marker: { size: neurons.length > 2000 ? 3 : 4.5, color: colour, opacity: neurons.length > 1000 ? 0.45 : 0.65 },
    hovertemplate: `neuron %{customdata}<br>${plain(x)} <b>%{x:.4~g}</b><br>${plain(y)} <b>%{y:.4~g}</b><extra></extra>`,
  }];
  if (i >= 0) {
    data.push({
      type: "scatter", mode: "markers", x: [xs[i]], y: [ys[i]], showlegend: false, hoverinfo: "skip",
      marker: { size: 12, color: "rgba(0,0,0,0)", line: { color: c.mark, width: 2 } },
    });
  }
  return {
    data,
    layout: layout(env, {
      height: 520, margin: { l: 56, r: 12, t: 10, b: 42 },
      xaxis: { title: { text: described(result, x) } }, yaxis: { title: { text: described(result, y) } },
    }),
  };
}
