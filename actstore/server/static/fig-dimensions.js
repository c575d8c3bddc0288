// Dimensionality: spectra, participation ratio and effective dimension.

import { depthBar, layout, logAxis } from "./fig-base.js";
import { layerName, plain } from "./format.js";
import { profiles } from "./fig-profiles.js";
import { described, stages, take, title, values } from "./results.js";
import { depth, stageColour, stageMarker } from "./theme.js";

export function dimensionProfiles(result, options, env) {
  return profiles(result, {
    variables: ["participation_ratio", "effective_dimension"],
    nulls: { participation_ratio: "null_participation_ratio" }, names: { effective_dimension: "effective dimension" },
    logs: ["participation_ratio", "effective_dimension"], height: 210, ...options,
  }, env);
}

export function intrinsicProfile(result, options, env) {
  return profiles(result, { variables: ["dimension"], errors: { dimension: "stderr" }, height: 210, ...options }, env);
}

/** Effective dimension against participation ratio: a point for each stage and layer. */
export function dimensionScatter(result, options, env) {
  const layers = [...new Set(stages(result).flatMap(({ dataset }) => values(dataset, "layer")))].sort((a, b) => a - b);
  const colours = depth(layers.length, env.dark);
  const data = stages(result).flatMap(({ stage, dataset, at }) => {
    const own = values(dataset, "layer");
    const outline = { width: 1.2, color: stageColour(stage, env.dark) };
    const named = { type: "scatter", mode: "lines+markers", name: plain(stage), x: [null], y: [null], line: { width: 0.8, color: outline.color }, marker: { size: 8, symbol: stageMarker(stage), color: "rgba(0,0,0,0)", line: outline } };
    return [named, {
      type: "scatter", mode: "lines+markers", name: plain(stage), showlegend: false,
      x: take(dataset, "participation_ratio", at), y: take(dataset, "effective_dimension", at), customdata: own,
      line: { width: 0.8, color: stageColour(stage, env.dark) },
      marker: { size: 8, symbol: stageMarker(stage), color: own.map((n) => colours[layers.indexOf(n)]), line: outline },
      hovertemplate: `${plain(stage)}, layer %{customdata}<br>participation ratio <b>%{x:.4~g}</b><br>effective dimension <b>%{y:.4~g}</b><extra></extra>`,
    }];
  });
  data.push(depthBar(layers.map(String), env));
  return {
    data,
    layout: layout(env, {
      height: 320, margin: { l: 52, r: 62, t: 30, b: 42 },
      xaxis: { title: { text: title(result, "participation_ratio") }, ...logAxis(data.flatMap((d) => d.x)) },
      yaxis: { title: { text: title(result, "effective_dimension") }, ...logAxis(data.flatMap((d) => d.y)) },
    }),
  };
}

/** Variance of principal components: a line for each layer of one stage. */
export function spectrum(result, { variable = "variance", log = true } = {}, env) {
  const { stage, dataset, at } = stages(result)[0];
  const layers = values(dataset, "layer");
  const colours = depth(layers.length, env.dark);
  const cumulative = variable === "cumulative";
  const components = values(dataset, "component");
  const lines = layers.map((layer, i) => take(dataset, variable, { ...at, layer: i }));
  const data = layers.map((layer, i) => {
    const kept = lines[i].map((v, k) => [components[k], v]).filter(([, v]) => v !== null && (cumulative || !log || v > 0));
    const name = layerName(stage, layer);
    return {
      type: "scatter", mode: "lines", name, x: kept.map((p) => p[0]), y: kept.map((p) => p[1]), showlegend: false,
      line: { color: colours[i], width: 1.4 },
      hovertemplate: `layer ${layer} (${name}), component %{x}<br><b>%{y:.4~g}</b><extra></extra>`,
    };
  });
  data.push(depthBar(layers.map((n) => layerName(stage, n)), env));
  const all = lines.flat().filter((v) => v > 0);
  const highest = Math.max(...all);
  return {
    data,
    layout: layout(env, {
      height: 320, margin: { l: 58, r: 62, t: 10, b: 42 },
      xaxis: { title: { text: "component, largest first" }, ...(log ? logAxis([components[0], components.at(-1)], { rim: 0.02 }) : {}) },
      yaxis: {
        title: { text: described(result, variable) },
        ...(cumulative ? { range: [0, 1.02] } : log ? logAxis(all.filter((v) => v > highest * 1e-7)) : { rangemode: "tozero" }),
      },
    }),
  };
}
