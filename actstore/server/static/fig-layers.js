// Layers: covariance and shared variance of every layer with every other.

import { squareOfLayers } from "./fig-similarity.js";
import { described, stages, take, values } from "./results.js";

/** One of layer_covariance's matrices; shared variance in per cent. */
export function layerMatrix(result, { variable = "covariance", picked = null } = {}, env) {
  const { stage, dataset, at } = stages(result)[0];
  const percent = variable === "r_squared";
  const all = take(dataset, variable, at);
  const layers = values(dataset, "layer").filter((_, i) => all[i].some((v) => v !== null));
  const keep = values(dataset, "layer").map((n) => layers.includes(n));
  const z = all.filter((_, i) => keep[i]).map((row) => row.filter((_, j) => keep[j]).map((v) => (percent && v !== null ? 100 * v : v)));
  const label = percent ? "R² (% shared variance)" : described(result, variable);
  return squareOfLayers(z, stage, layers, { label, percent, picked }, env);
}
