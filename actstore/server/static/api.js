// The server: answers, errors, and long queries as jobs with progress.

import { spelled } from "./commands.js";

export class ApiError extends Error {
  constructor(error) {
    super(error.message);
    this.name = "ApiError";
    Object.assign(this, { status: error.status, code: error.code, value: error.value, nearest: error.nearest, allowed: error.allowed });
  }
}

export function isAbort(error) {
  return error?.name === "AbortError";
}

export function url(path, params = {}) {
  const query = new URLSearchParams(spelled(params)).toString();
  return `/api/${path.split("/").map(encodeURIComponent).join("/")}${query ? `?${query}` : ""}`;
}

async function send(address, options = {}) {
  let response;
  try {
    response = await fetch(address, { headers: { Accept: "application/json" }, ...options });
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new ApiError({ status: 0, code: "unreachable", message: "The server does not answer. Is `actstore serve` still running?" });
  }
  let body = null;
  try {
    body = await response.json();
  } catch (error) {
    if (isAbort(error)) throw error;
  }
  if (!response.ok || body === null) {
    const shown = body?.error ?? { status: response.status, code: "internal", message: `The server answered ${response.status} without saying why.` };
    throw Object.assign(new ApiError(shown), { retryAfter: Number(response.headers.get("Retry-After")) || 0 });
  }
  return { body, response };
}

const kept = new Map();
const MOST_KEPT = 120;

function keep(address, value) {
  kept.delete(address);
  kept.set(address, value);
  if (kept.size > MOST_KEPT) kept.delete(kept.keys().next().value);
}

/** Anything that is no query: cards, tokens, contexts. Sealed stores do not change. */
export async function get(path, params = {}, { signal, fresh = false } = {}) {
  const address = url(path, params);
  if (!fresh && kept.has(address)) return kept.get(address);
  const { body } = await send(address, { signal });
  keep(address, body);
  return body;
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("superseded", "AbortError"));
    }, { once: true });
  });
}

export function cancel(job) {
  return send(`/api/jobs/${encodeURIComponent(job.id)}`, { method: "DELETE" }).catch(() => null);
}

/** Whether an answer is at hand, so that asking for it costs nothing. */
export function known(store, query, params) {
  const address = url(`stores/${store}/${query}`, params);
  return kept.has(address) || asked().has(address);
}

function asked() {
  try {
    return new Set(JSON.parse(sessionStorage.getItem("actstore.asked") ?? "[]"));
  } catch {
    return new Set();
  }
}

function remember(address) {
  try {
    sessionStorage.setItem("actstore.asked", JSON.stringify([...asked(), address].slice(-200)));
  } catch {
    // Storage may be switched off; the answer then merely costs a click again.
  }
}

export async function estimate(store, query, params, { signal } = {}) {
  const { estimate: found } = await get(`stores/${store}/${query}/estimate`, params, { signal });
  return found;
}

/**
 * Ask a query. A long one becomes a job, of which `onJob` hears; aborting the signal cancels it.
 *
 * Returns {result, seconds, cache}.
 */
export async function ask(store, query, params, { signal, onJob } = {}) {
  const address = url(`stores/${store}/${query}`, params);
  if (kept.has(address)) return kept.get(address);
  const waiting = url(`stores/${store}/${query}`, { ...params, wait: 1 });
  for (let tries = 0; ; tries += 1) {
    let answer;
    try {
      answer = await send(waiting, { signal });
    } catch (error) {
      if (error.code !== "busy" || tries > 60) throw error;
      onJob?.({ state: "queued", progress: 0, busy: true });
      await pause(1000 * Math.min(Math.max(error.retryAfter, 0.3), 5), signal);
      continue;
    }
    const { body, response } = answer;
    if (response.status !== 202) {
      const found = {
        result: body,
        seconds: Number(response.headers.get("X-Actstore-Seconds") ?? Number.NaN),
        cache: response.headers.get("X-Actstore-Cache"),
      };
      keep(address, found);
      if (found.seconds > 1) remember(address);
      return found;
    }
    await finished(body.job, signal, onJob);
  }
}

async function finished(first, signal, onJob) {
  let job = first;
  let rest = 150;
  try {
    while (job.state === "queued" || job.state === "running") {
      onJob?.(job);
      await pause(rest, signal);
      rest = Math.min(1000, rest * 1.3);
      job = (await send(`/api/jobs/${encodeURIComponent(job.id)}`, { signal })).body.job;
    }
  } catch (error) {
    if (isAbort(error)) cancel(job);
    throw error;
  }
  if (job.state === "failed") throw new ApiError(job.error ?? { code: "internal", message: "The query failed." });
  if (job.state === "cancelled") throw new ApiError({ code: "cancelled", message: "Cancelled." });
}
