// Reading results as actstore.wire writes them: labelled arrays as nested lists.

/** The parts of a result that one line or panel is about: its stages, each a dataset. */
export function stages(result) {
  const datasets = result.stages ? Object.values(result.stages) : [result];
  return datasets.flatMap((dataset) => {
    const { dims, data } = dataset.coords.stage ?? { dims: [], data: "" };
    return dims.length
      ? data.map((stage, i) => ({ stage, dataset, at: { stage: i } }))
      : [{ stage: data, dataset, at: {} }];
  });
}

/** A coordinate's values; where it has none, the numbers from 0. */
export function values(dataset, dim) {
  const coord = dataset.coords[dim];
  if (coord && coord.dims.length === 1) return coord.data;
  if (coord && coord.dims.length === 0) return [coord.data];
  return Array.from({ length: dataset.dims[dim] ?? 0 }, (_, i) => i);
}

/** A variable or coordinate at some indexes: what is left of its nested list, in its order. */
export function take(dataset, name, at = {}) {
  const variable = dataset.variables[name] ?? dataset.coords[name];
  if (!variable) return undefined;
  const walk = (data, dims) => {
    if (!dims.length) return data;
    const [dim, ...rest] = dims;
    return dim in at ? walk(data[at[dim]], rest) : data.map((part) => walk(part, rest));
  };
  return walk(variable.data, variable.dims);
}

export function has(result, name) {
  return stages(result).some(({ dataset }) => name in dataset.variables);
}

export function attrs(result, name) {
  const found = stages(result).find(({ dataset }) => dataset.variables[name] ?? dataset.coords[name]);
  return (found?.dataset.variables[name] ?? found?.dataset.coords[name])?.attrs ?? {};
}

const UNITS = { bit: "bits", "activation^2": "activation²", "1/activation": "per unit of activation" };

export function units(result, name) {
  const unit = attrs(result, name).units;
  return !unit || unit === "1" ? "" : UNITS[unit] ?? unit;
}

export function title(result, name) {
  return attrs(result, name).long_name ?? name.replaceAll("_", " ");
}

/** An axis title: what, and in which unit. */
export function described(result, name) {
  const unit = units(result, name);
  return unit ? `${title(result, name)} (${unit})` : title(result, name);
}
