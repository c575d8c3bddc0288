// Laminar profiles: a statistic over layers, a line for each stage.

import { grid, heading, layerTicks, layout, logAxis, stageLine } from "./fig-base.js";
import { stages, take, title, units, values } from "./results.js";
import { groupColours, MARKERS, seen } from "./theme.js";
import { plain } from "./format.js";

export const MOMENTS = ["mean", "std", "skewness", "kurtosis", "min", "max", "zero_fraction", "positive_fraction"];

const SHORT = { std: "standard deviation", kurtosis: "excess kurtosis" };

/** Several variables over layers, a panel each, a line for each stage. */
export function profiles(result, { variables = MOMENTS, nulls = {}, errors = {}, names = {}, logs = [], height = 132 } = {}, env) {
  const shown = variables.filter((v) => stages(result).some(({ dataset }) => v in dataset.variables));
  const cells = grid(shown.length, env, { least: 160, height, most: 4 });
  const data = [];
  const axes = {};
  const layers = [...new Set(stages(result).flatMap(({ dataset }) => values(dataset, "layer")))].sort((a, b) => a - b);
  shown.forEach((variable, i) => {
    const cell = cells.cells[i];
    const unit = units(result, variable);
    axes[`xaxis${cell.name}`] = { domain: cell.x, anchor: `y${cell.name}`, ...layerTicks(layers, 8), title: { text: cell.last ? "layer" : "" } };
    const all = stages(result).flatMap(({ dataset, at }) => [variable, nulls[variable]].flatMap((v) => (v in dataset.variables ? take(dataset, v, at) : [])));
    axes[`yaxis${cell.name}`] = { domain: cell.y, anchor: `x${cell.name}`, nticks: 5, title: { text: unit, font: { size: 10.5 } }, ...(logs.includes(variable) ? logAxis(all) : {}) };
    for (const { stage, dataset, at } of stages(result)) {
      const x = values(dataset, "layer");
      const place = { xaxis: `x${cell.name}`, yaxis: `y${cell.name}` };
      const error = errors[variable] && take(dataset, errors[variable], at);
      data.push(stageLine(stage, x, take(dataset, variable, at), env, {
        ...place, showlegend: i === 0, meta: { stage, variable },
        ...(error ? { error_y: { type: "data", array: error.filter((_, k) => take(dataset, variable, at)[k] !== null), thickness: 1, width: 2 } } : {}),
        hovertemplate: `${plain(stage)}, layer %{x}<br>${plain(title(result, variable))} <b>%{y:.4~g}</b><extra></extra>`,
      }));
      if (nulls[variable] && nulls[variable] in dataset.variables) {
        data.push(stageLine(stage, x, take(dataset, nulls[variable], at), env, {
          ...place, mode: "lines", showlegend: false, line: { color: data.at(-1).line.color, width: 1.2, dash: "dot" },
          hovertemplate: `${plain(stage)}, layer %{x}<br>normal data of as many tokens <b>%{y:.4~g}</b><extra></extra>`,
        }));
      }
    }
  });
  return {
    data,
    layout: layout(env, {
      ...axes, height: cells.height + legendRoom(result, env), margin: { ...cells.margin, t: cells.margin.t + legendRoom(result, env) },
      legend: { y: 1, yref: "container", yanchor: "top", itemclick: "toggle" },
      annotations: shown.map((v, i) => heading(names[v] ?? SHORT[v] ?? title(result, v), cells.cells[i], env)),
    }),
  };
}

function legendRoom(result, env) {
  return 20 * Math.ceil((stages(result).length * 96) / env.width) + 6;
}

/** Similarity of pairs of stages over layers, a line for each pair. */
export function pairProfile(result, { variable = "rsa" } = {}, env) {
  const layers = values(result, "layer");
  const pairs = values(result, "pair");
  const matrix = take(result, variable);
  const colours = groupColours(pairs.length, env.dark);
  const data = pairs.map((pair, j) => ({
    type: "scatter", mode: "lines+markers", name: plain(pair.replace(":", " : ")), x: layers, y: matrix.map((row) => row[j]),
    line: { color: seen(colours[j], env.dark), width: 1.4 },
    marker: { size: 5.5, symbol: MARKERS[j % MARKERS.length], color: colours[j] }, meta: { pair },
    hovertemplate: `${plain(pair)}, layer %{x}<br><b>%{y:.4~f}</b><extra></extra>`,
  }));
  return {
    data,
    layout: layout(env, {
      height: 300 + (env.width < 520 ? 60 : 0), margin: { l: 52, r: 12, t: 8, b: 40 },
      xaxis: { ...layerTicks(layers), title: { text: "layer" } },
      yaxis: { title: { text: title(result, variable) }, rangemode: "tozero" },
      legend: env.width < 520 ? { y: -0.2, yanchor: "top" } : { orientation: "v", x: 1.02, y: 1, yanchor: "top" },
    }),
  };
}
