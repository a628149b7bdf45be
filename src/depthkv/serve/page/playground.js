"use strict";

const at = (id) => document.getElementById(id);
let card = null;
let running = null;

function headers() {
  const key = at("key").value;
  return key ? { authorization: `Bearer ${key}` } : {};
}

function size(bytes) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (bytes < 1024 || unit === "GiB") return `${unit === "B" ? bytes : bytes.toFixed(2)} ${unit}`;
    bytes /= 1024;
  }
}

async function problem(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

async function connect() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (response.status === 401) {
    at("key-label").hidden = false;
    at("key").focus();
    at("status").textContent = at("key").value
      ? "The server did not take this API key."
      : "This server asks for an API key.";
    return false;
  }
  if (!response.ok) throw new Error(await problem(response));
  card = (await response.json()).data[0];
  at("model").textContent = card.id;
  if (card.max_retention < 1) at("full-title").textContent = "Most layers";
  const slider = at("retention");
  slider.min = Math.max(1, Math.ceil(card.min_retention * card.num_layers - 1e-6));
  slider.max = Math.floor(card.max_retention * card.num_layers + 1e-6);
  slider.value = Math.round(Math.min(card.default_retention, (card.min_retention + card.max_retention) / 2) * card.num_layers);
  at("tokens").max = card.max_tokens;
  at("tokens").value = Math.min(at("tokens").value, card.max_tokens);
  at("adaptive-label").hidden = !card.adaptive;
  at("chat-label").hidden = !card.chat;
  at("status").textContent = "";
  show();
  return true;
}

function show() {
  if (!card) return;
  const adaptive = at("adaptive").checked;
  const layers = Number(at("retention").value);
  at("retention").disabled = adaptive;
  at("chosen").textContent = adaptive
    ? `of ${card.num_layers}, chosen for the prompt`
    : `${layers} of ${card.num_layers} (${Math.round((100 * layers) / card.num_layers)} %)`;
}

// 15 of 30 is 0.5 exactly, but a third of the layers is no number that both sides round alike
function retention() {
  if (at("adaptive").checked) return "adaptive";
  const share = Number(at("retention").value) / card.num_layers;
  return Math.min(card.max_retention, Math.max(card.min_retention, share));
}

class Panel {
  constructor(id) {
    this.root = at(id);
    this.part("text").textContent = "";
    this.root.classList.remove("failed");
    this.started = null;
    this.count = 0;
    this.bytes = 0;
  }

  part(name) {
    return this.root.querySelector(`.${name}`);
  }

  add(piece) {
    const choice = piece.choices[0];
    const text = choice.delta ? choice.delta.content || "" : choice.text;
    this.part("text").append(this.part("text").textContent ? text : text.trimStart());
    this.part("text").scrollTop = this.part("text").scrollHeight;
    const now = performance.now();
    this.started ??= now;
    this.count += 1;
    this.bytes = piece.depthkv.cache_bytes;
    const layers = piece.depthkv.num_leaders;
    this.first ??= layers;
    this.gaveUp = layers < this.first;
    const given = this.gaveUp ? ` (${this.first} at first)` : "";
    this.part("layers").textContent = `${layers} of ${piece.depthkv.num_layers}${given}`;
    this.part("cache").textContent = size(this.bytes);
    this.part("count").textContent = this.count;
    if (this.count > 1) this.part("speed").textContent = (((this.count - 1) * 1000) / (now - this.started)).toFixed(1);
  }

  fail(message) {
    this.root.classList.add("failed");
    this.part("text").append(`\n${message}`);
  }
}

async function write(panel, share, signal, others) {
  const chat = at("chat").checked;
  const prompt = at("prompt").value;
  const body = {
    model: card.id,
    max_tokens: Number(at("tokens").value),
    temperature: Number(at("temperature").value),
    seed: 0,
    stream: true,
    kv_retention: share,
    ...(chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
  };
  const response = await fetch(chat ? "/v1/chat/completions" : "/v1/completions", {
    method: "POST",
    headers: { "content-type": "application/json", ...headers() },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) return panel.fail(await problem(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (held + value).split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") continue;
      const piece = JSON.parse(data);
      if (piece.error) return panel.fail(piece.error.message);
      panel.add(piece);
    }
    const largest = Math.max(...others.map((other) => other.bytes), 1);
    for (const other of others) {
      other.part("bar").max = largest;
      other.part("bar").value = other.bytes;
    }
  }
}

function summary(full, shared, gaveUp) {
  const short = gaveUp ? " Room was short, so layers were given up." : "";
  if (full === shared) return `Done: both caches are equally large.${short}`;
  const [which, factor] = full > shared ? ["second", full / shared] : ["first", shared / full];
  return `Done: the ${which} cache is ${factor.toFixed(2)} times smaller.${short}`;
}

async function run() {
  if (running || (!card && !(await connect()))) return;
  running = new AbortController();
  at("run").disabled = true;
  at("stop").disabled = false;
  at("status").textContent = "Writing …";
  document.querySelector(".answers").scrollIntoView({ block: "nearest" });
  const panels = [new Panel("full"), new Panel("shared")];
  const shares = [card.max_retention, retention()];
  const ends = await Promise.allSettled(panels.map((panel, i) => write(panel, shares[i], running.signal, panels)));
  const stopped = running.signal.aborted;
  running = null;
  at("run").disabled = false;
  at("stop").disabled = true;
  ends.forEach((end, i) => {
    if (end.status === "rejected" && !stopped) panels[i].fail(String(end.reason.message || end.reason));
  });
  const [full, shared] = panels.map((panel) => panel.bytes);
  at("status").textContent = stopped
    ? "Stopped."
    : full && shared
      ? summary(full, shared, panels.some((panel) => panel.gaveUp))
      : "";
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run().catch((error) => (at("status").textContent = String(error.message || error)));
});
at("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
  if (event.key === "Escape") running?.abort();
});
for (const id of ["retention", "adaptive"]) at(id).addEventListener("input", show);
at("key").addEventListener("change", () => connect().catch(() => {}));
connect().catch((error) => (at("status").textContent = String(error.message || error)));
