// The same question as a line of Python and as a command line.

function isList(value) {
  return Array.isArray(value);
}

/** Parameters as the server and the command line spell them; what is not asked is left out. */
export function spelled(params) {
  const found = {};
  for (const [name, value] of Object.entries(params)) {
    if (value === null || value === undefined || value === "") continue;
    found[name] = isList(value) ? value.join(",") : String(value);
  }
  return found;
}

function pythonValue(value) {
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value === "number") return String(value);
  if (isList(value)) return `[${value.map(pythonValue).join(", ")}]`;
  return JSON.stringify(value);
}

export function python(folder, query, params) {
  const args = Object.entries(params)
    .filter(([, v]) => v !== null && v !== undefined && v !== "")
    .map(([name, v]) => `, ${name}=${pythonValue(v)}`);
  return [
    "import actstore",
    "",
    `store = actstore.open(${JSON.stringify(folder)})`,
    `result = actstore.compute(actstore.${query}(store${args.join("")}))`,
  ].join("\n");
}

function shell(text) {
  return /^[\w.,:+@%/-]+$/.test(text) ? text : `'${text.replace(/'/g, "'\\''")}'`;
}

export function cli(folder, query, params) {
  const args = Object.entries(params)
    .filter(([, v]) => v !== null && v !== undefined && v !== "")
    .map(([name, v]) => {
      const option = `--${name.replace(/_/g, "-")}`;
      if (v === true) return option;
      if (v === false) return `--no-${option.slice(2)}`;
      const text = spelled({ v }).v;
      return text.startsWith("-") ? `${option}=${shell(text)}` : `${option} ${shell(text)}`;
    });
  return ["actstore query", query, shell(folder), ...args].join(" ");
}
