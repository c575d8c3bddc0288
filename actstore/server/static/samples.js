// A random sample of the tokens that are picked, as a token expression: matrices need few tokens.

import { ask, get } from "./api.js";
import { values } from "./results.js";

/**
 * Draw n of the tokens that an expression picks, as the library's `sample` draws them.
 *
 * place is {stages, layers, tokens}, of one stage and layer. Returns {expression, texts: Map of
 * token to text, total}; where there are no more than n, the expression is the one given.
 */
export async function draw(store, place, n, seed, { signal } = {}) {
  const where = place.tokens ?? "";
  const page = await get(`stores/${store}/tokens`, { where, limit: n }, { signal });
  const column = (name) => page.columns.indexOf(name);
  if (page.total <= n) {
    const texts = new Map(page.rows.map((row) => [row[column("token")], row[column("token_text")] ?? String(row[column("token_id")])]));
    return { expression: where || null, texts, total: page.total };
  }
  const { result } = await ask(store, "sample", { ...place, neurons: "0", n, seed }, { signal });
  const [tokens, sequences, positions, words] = ["token", "sequence", "position", "token_text"].map((name) => values(result, name));
  const texts = new Map(tokens.map((token, i) => [token, words[i] ?? ""]));
  return { expression: byPlace(sequences, positions), texts, total: page.total };
}

function byPlace(sequences, positions) {
  const groups = new Map();
  sequences.forEach((sequence, i) => groups.set(sequence, [...(groups.get(sequence) ?? []), positions[i]]));
  return [...groups].map(([sequence, own]) => (own.length === 1 ? `sequence == ${sequence} and position == ${own[0]}` : `sequence == ${sequence} and position in [${own.join(", ")}]`)).join(" or ");
}
