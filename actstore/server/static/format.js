// Numbers, sizes, times and token texts for people.

export function integer(n) {
  return n === null || n === undefined ? "–" : Math.round(n).toLocaleString("en-GB");
}

/** A number to some significant digits, without a tail of noise. */
export function number(x, digits = 4) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  if (typeof x !== "number") return String(x);
  if (Number.isInteger(x) && Math.abs(x) < 1e6) return x.toLocaleString("en-GB").replace("-", "−");
  const size = Math.abs(x);
  const text = size !== 0 && (size < 1e-3 || size >= 1e6)
    ? x.toExponential(digits - 2)
    : String(Number(x.toPrecision(digits)));
  return text.replace(/\.?0+e/, "e").replace("e+", "e").replaceAll("-", "−");
}

export function bytes(n) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  let value = n;
  while (value >= 1000 && i < units.length - 1) {
    value /= 1000;
    i += 1;
  }
  return `${Number(value.toPrecision(3))} ${units[i]}`;
}

export function seconds(s) {
  if (s === null || s === undefined) return "";
  if (s < 0.0995) return `${Math.max(1, Math.round(s * 1000))} ms`;
  if (s < 10) return `${Number(s.toPrecision(2))} s`;
  if (s < 90) return `${Math.round(s)} s`;
  return s < 5400 ? `${Math.round(s / 60)} min` : `${Number((s / 3600).toPrecision(2))} h`;
}

/** How many tokens a result is about. */
export function tokensOf(attrs) {
  const used = `${integer(attrs.tokens_used)} tokens`;
  return attrs.tokens_drawn && attrs.tokens_drawn < attrs.tokens_used ? `${integer(attrs.tokens_drawn)} of ${used}` : used;
}

/** "0,1,2,5" as "0-2,5": the way the command line writes layers. */
export function ranges(numbers) {
  const sorted = [...new Set(numbers)].sort((a, b) => a - b);
  const runs = [];
  for (const n of sorted) {
    const last = runs.at(-1);
    if (last && n === last[1] + 1) last[1] = n;
    else runs.push([n, n]);
  }
  return runs.map(([a, b]) => (a === b ? `${a}` : b === a + 1 ? `${a},${b}` : `${a}-${b}`)).join(",");
}

/** The numbers that "0,3-5" or "-1" means among those there are; null where it means nothing. */
export function chosen(text, known) {
  const found = new Set();
  for (const part of text.split(",").map((p) => p.trim()).filter(Boolean)) {
    const run = /^(\d+)\s*-\s*(\d+)$/.exec(part);
    const one = /^-?\d+$/.exec(part);
    if (run) {
      const [low, high] = [Number(run[1]), Number(run[2])];
      if (low > high) return null;
      for (const n of known) if (n >= low && n <= high) found.add(n);
      if (!known.includes(low) || !known.includes(high)) return null;
    } else if (one) {
      const n = Number(part);
      const at = n < 0 ? known[known.length + n] : n;
      if (!known.includes(at)) return null;
      found.add(at);
    } else {
      return null;
    }
  }
  return found.size ? known.filter((n) => found.has(n)) : null;
}

/** The library's names of layers: hidden 0 is the embeddings, the rest is what made them. */
export function layerName(stage, layer) {
  if (stage !== "hidden") return `h.${layer}`;
  return layer === 0 ? "emb" : `h.${layer - 1}`;
}

/** A token's text in one line, with what cannot be seen made visible. */
export function visible(text) {
  return String(text)
    .replace(/\n/g, "⏎")
    .replace(/\t/g, "⇥")
    .replace(/ /g, "␣")
    .replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g, "�");
}

/** Text for Plotly, which reads a little HTML: nothing in it may be taken for a tag. */
export function plain(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}
