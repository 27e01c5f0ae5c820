// What the page asks of its server: JSON, and replies as they are written. Errors come in words.

const KEY = "hiermem-key"; // kept for as long as the tab is open

/** An error that can be shown as it is. `code` is the server's own name for it, where it has one. */
export class ServerError extends Error {
  constructor(message, code = "") {
    super(message);
    this.code = code;
  }
}

/** Set by the page: asks for the API key, and returns it or null. */
export const ask = { key: async () => null };

let asking = null; // several requests may be refused at once; the reader is asked once

async function request(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Is hiermem serve still running?", "unreachable");
  }
  if (response.status === 401) {
    if (key === sessionStorage.getItem(KEY)) await newKey(key);
    return request(path, options);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function newKey(wrong) {
  asking ??= ask.key(wrong !== null).finally(() => (asking = null));
  const key = await asking;
  if (key === null) throw new ServerError("The server wants an API key.", "no_key");
  if (/[^\x20-\x7e]/.test(key)) return newKey(key); // typed with another keyboard's letters, which no header has
  sessionStorage.setItem(KEY, key);
}

async function refusal(response) {
  const { error } = await response.json().catch(() => ({}));
  const words = error?.message ?? `the server answered ${response.status} ${response.statusText}`;
  return new ServerError(sentence(words), error?.code ?? "");
}

/** A message as a sentence. */
const sentence = (words) => (words[0].toUpperCase() + words.slice(1)).replace(/[^.!?]$/, "$&.");

export async function get(path) {
  return (await request(path)).json();
}

export async function post(path, body) {
  const headers = { "Content-Type": "application/json" };
  return (await request(path, { method: "POST", headers, body: JSON.stringify(body) })).json();
}

/** The chunks of a streamed chat completion, each as it comes. */
export async function* reply(body, signal) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(sentence(chunk.error.message), chunk.error.code ?? "");
    yield chunk;
  }
  throw new ServerError("The connection to the server broke off.", "unreachable");
}

/** The data of each server-sent event. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The connection to the server broke off.", "unreachable");
    });
    if (done) return;
    const lines = (text + value).split(/\r?\n/);
    text = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}
