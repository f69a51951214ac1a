// The endpoint's HTTP interface. The API key stays in this tab: memory and sessionStorage.
import {parseJson, writeJson} from "./json.js";

const CONNECTION_KEY = "sdxl-connection";
const RUN_MAX_BYTES = 10_000_000; // "10 MB", in the stricter reading
const TIMEOUT_MS = { GET: 60_000, POST: 180_000 };

// `status` is that of HTTP, 0 where none came. `wasRefused`: the request has surely done nothing.
class CallError extends Error {
  constructor(message, { status = 0, wasRefused = false, retrySeconds = 0 } = {}) {
    super(message);
    this.name = "CallError";
    Object.assign(this, { status, wasRefused, retrySeconds });
  }
}

let currentConnection = { url: "", apiKey: "" };

// {url, apiKey}: url like https://api.runpod.ai/v2/ENDPOINT_ID; both "" where none is known.
export function connection() {
  return { ...currentConnection };
}

// From this tab's last time, or from the server that the page came from.
export async function restoreConnection() {
  try {
    const kept = JSON.parse(sessionStorage.getItem(CONNECTION_KEY));
    if (kept?.url) return keepConnection(connectionOf(kept.url, kept.apiKey));
  } catch {
    sessionStorage.removeItem(CONNECTION_KEY);
  }
  const isServed = location.protocol.startsWith("http") && !document.getElementById("input-schema");
  if (!isServed) return connection();
  try {
    const answer = await fetch("page-config.json", { cache: "no-store" });
    const { url, api_key: apiKey } = await answer.json();
    currentConnection = { url: endpointUrl(url), apiKey };
  } catch {
    // A server without it: the endpoint and the key are typed in.
  }
  return connection();
}

// {url, apiKey} of what was typed in. Throws an Error that says what to change.
export function connectionOf(endpoint, apiKey) {
  return { url: endpointUrl(endpoint), apiKey: checkedKey(apiKey) };
}

export function keepConnection(connected) {
  currentConnection = connected;
  sessionStorage.setItem(CONNECTION_KEY, JSON.stringify(currentConnection));
  return connection();
}

// The URL of an endpoint's id, or of an address that was copied from somewhere.
export function endpointUrl(text) {
  const typed = text.trim();
  if (!typed) throw new Error("Type the endpoint's id or its URL.");
  if (/^[\w-]+$/.test(typed)) return `https://api.runpod.ai/v2/${typed}`;
  let url;
  try {
    url = new URL(typed);
  } catch {
    throw new Error("Neither an endpoint's id nor a URL like https://api.runpod.ai/v2/ENDPOINT_ID.");
  }
  const isLoopback = /^(localhost|127(\.\d+){3}|\[::1\])$/.test(url.hostname);
  if (url.protocol !== "https:" && !(url.protocol === "http:" && isLoopback)) {
    throw new Error("The key is sent over https:// only, or to this machine (http://127.0.0.1).");
  }
  if (url.username || url.password || url.search || url.hash) {
    throw new Error("A URL without user, query and #: like https://api.runpod.ai/v2/ENDPOINT_ID.");
  }
  return (url.origin + url.pathname).replace(/\/(run|runsync|health|status.*)?\/*$/, "");
}

function checkedKey(apiKey) {
  const typed = (apiKey ?? "").trim();
  if (!typed) throw new Error("Type the API key.");
  if (!/^[!-~]+$/.test(typed)) throw new Error("The API key has characters that no key has.");
  return typed;
}

// Queues a job: {id, status}.
export async function run(input, at = connection()) {
  const body = new TextEncoder().encode(writeJson({ input }));
  if (body.length > RUN_MAX_BYTES) {
    const { path } = largestText(input);
    throw new CallError(
      `${path}: the request has ${megabytes(body.length)}, and the platform takes 10 MB; ` +
        "a smaller picture, a JPEG, or an https:// address in its place fits",
      { wasRefused: true },
    );
  }
  const answer = await call("POST", "run", at, body);
  if (typeof answer?.id !== "string") throw new CallError("the endpoint's answer has no job id");
  return answer;
}

export async function status(jobId, at = connection()) {
  return call("GET", `status/${encodeURIComponent(jobId)}`, at);
}

export async function cancel(jobId, at = connection()) {
  return call("POST", `cancel/${encodeURIComponent(jobId)}`, at);
}

export async function health(at = connection()) {
  return call("GET", "health", at);
}

async function call(method, route, { url, apiKey }, body) {
  if (!url || !apiKey) {
    throw new CallError("no endpoint is connected: give its id and an API key under Endpoint", {
      wasRefused: true,
    });
  }
  const headers = { Authorization: `Bearer ${apiKey}` };
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  let text;
  try {
    answer = await fetch(`${url}/${route}`, {
      method,
      headers,
      body,
      cache: "no-store",
      credentials: "omit",
      redirect: "error", // the key goes nowhere else
      referrerPolicy: "no-referrer",
      signal: AbortSignal.timeout(TIMEOUT_MS[method]),
    });
    text = await answer.text();
  } catch (error) {
    const host = new URL(url).host;
    throw new CallError(
      error.name === "TimeoutError"
        ? `${host} did not answer in ${TIMEOUT_MS[method] / 1000} seconds`
        : `the browser could not reach ${host}, or the endpoint does not allow pages from ` +
          "elsewhere; the browser does not tell which (its console may)",
    );
  }
  if (!answer.ok) throw refusal(answer, text);
  try {
    return parseJson(text);
  } catch {
    throw new CallError(`${new URL(url).host} did not answer with JSON: is this an endpoint's URL?`);
  }
}

function refusal(answer, text) {
  const code = answer.status;
  const known = {
    401: "the API key is missing or wrong (401)",
    403: "the API key may not use this endpoint (403)",
    404: "the endpoint does not know this: the id is wrong, or the job's answer is no longer kept (404)",
    413: "the request is too large for the endpoint (413)",
    429: "the endpoint takes no more requests for now (429)",
  }[code];
  return new CallError(known ?? `the endpoint answered ${code}${toldReason(text)}`, {
    status: code,
    wasRefused: code >= 400 && code < 500,
    retrySeconds: Number(answer.headers.get("Retry-After")) || 0,
  });
}

function toldReason(text) {
  try {
    const { error, title, detail } = JSON.parse(text);
    const reason = [error, detail, title].find((one) => typeof one === "string");
    return reason ? `: ${reason.slice(0, 300)}` : "";
  } catch {
    return "";
  }
}

function largestText(value, path = "") {
  if (typeof value === "string") return { path, length: value.length };
  if (typeof value !== "object" || value === null) return { path, length: 0 };
  const inside = Object.entries(value).map(([name, inner]) =>
    largestText(inner, Array.isArray(value) ? `${path}[${name}]` : path ? `${path}.${name}` : name),
  );
  return inside.reduce((one, other) => (other.length > one.length ? other : one), {
    path: "input",
    length: -1,
  });
}

export function megabytes(bytes) {
  return bytes < 1_000_000 ? `${Math.ceil(bytes / 1000)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}
