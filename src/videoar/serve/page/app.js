"use strict";
// One session over one WebSocket: messages are JSON, what lies between is fragmented MP4.

const $ = (id) => document.getElementById(id);
const BEHIND = 10, MAX_RECORD = 256 * 2 ** 20;
const token = new URLSearchParams(location.search).get("token");
const query = token ? "?token=" + encodeURIComponent(token) : "";
const video = $("video");

let socket, session, source, buffer, way, head, paused = false, ended = true, retry = 0;
let waiting = [], sent = new Map(), number = 0, recording = null, lastUnit = null, drawing = 0;

// ---------------------------------------------------------------- talking

function say(message) {
  if (socket && socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
}

function tell(text, bad = false) {
  $("status").textContent = text;
  $("status").className = bad ? "bad" : "";
}

async function call(method, path, body, type) {
  const answer = await fetch("/api/" + path + query, {
    method, body, headers: type ? { "Content-Type": type } : {},
  });
  const value = answer.status === 204 ? null : await answer.json();
  if (!answer.ok) throw new Error(typeof value.detail === "string" ? value.detail : "the server refused it");
  return value;
}

const chosen = (name) => document.querySelector(`input[name=${name}]:checked`)?.value;

function wanted(given = false) {
  const message = { type: "start", prompt: $("prompt").value, seed: Number($("seed").value), given };
  if (chosen("unit")) message.units = chosen("unit");
  if ($("steps").dataset.set) message.num_inference_steps = Number($("steps").value);
  return message;
}

async function start() {
  try {
    tell("starting");
    session = (await call("POST", "sessions", JSON.stringify(wanted()), "application/json")).session;
    history.replaceState(null, "", location.search + "#" + session);
    remember($("prompt").value);
    open();
  } catch (error) { tell(error.message, true); }
}

function open() {
  ended = false;
  socket = new WebSocket(`${location.protocol.replace("http", "ws")}//${location.host}/api/sessions/${session}${query}`);
  socket.binaryType = "arraybuffer";
  socket.onopen = () => { retry = 0; };
  socket.onmessage = ({ data }) => (typeof data === "string" ? heard(JSON.parse(data)) : came(data));
  socket.onclose = () => {
    if (ended) return;
    tell("the connection is lost; trying again", true);
    setTimeout(open, Math.min(8000, 500 * 2 ** retry++));
  };
}

function heard(event) {
  if (event.type === "begin") begin(event);
  else if (event.type === "unit") computed(event);
  else if (event.type === "changed") changed(event);
  else if (event.type === "branched") link(query + "#" + event.session, "open the branch", "_blank");
  else if (event.type === "refused") {
    sent.delete(event.id);
    tell(event.message, true);
    if (event.fatal) over();
  }
}

function over() {
  ended = true;
  session = null;
  socket.onclose = socket.onmessage = null;
  socket.close();
  history.replaceState(null, "", location.pathname + location.search);
  for (const id of ["pause", "back", "reset", "branch", "record"]) $(id).disabled = true;
  $("start").hidden = false;
}

// ---------------------------------------------------------------- the video

function begin(event) {
  way = event;
  head = null;
  waiting = [];
  buffer = null;
  paused = false;
  lastUnit = null;
  source = new MediaSource();
  const mine = source;
  video.src = URL.createObjectURL(source);
  source.addEventListener("sourceopen", () => {
    URL.revokeObjectURL(video.src);
    if (mine !== source) return;
    buffer = source.addSourceBuffer(event.mime);
    buffer.addEventListener("updateend", append);
    append();
  });
  $("start").hidden = true;
  $("drop").hidden = false;
  for (const id of ["pause", "back", "reset", "branch", "record"]) $(id).disabled = false;
  $("pause").textContent = "Pause";
  $("screen").style.aspectRatio = `${event.width} / ${event.height}`;
  $("prompt").value = $("prompt").matches(":focus") ? $("prompt").value : event.prompt;
  $("seed").value = event.seed;
  $("steps").value = event.num_inference_steps;
  select(event.units);
  tell(["live", ...event.notes].join("; "));
}

function came(data) {
  if (!head) head = data;
  else record(data);
  waiting.push(data);
  append();
}

function append() {
  if (!buffer || buffer.updating || source.readyState !== "open") return;
  const played = video.currentTime - BEHIND;
  if (buffer.buffered.length && buffer.buffered.start(0) < played - BEHIND) buffer.remove(0, played);
  else if (waiting.length) buffer.appendBuffer(waiting.shift());
  if (!paused && video.paused) video.play().catch(() => {});
}

setInterval(() => {
  if (!way) return;
  say({ type: "seen", seconds: video.currentTime });
  $("clock").textContent = (way.seconds + video.currentTime).toFixed(1) + " s";
}, 100);

// ---------------------------------------------------------------- what comes next

function ask(fields) {
  const id = ++number;
  sent.set(id, performance.now());
  say({ type: "change", id, ...fields });
  tell("asked");
}

function changed(event) {
  const times = event.ids.filter((id) => sent.has(id)).map((id) => performance.now() - sent.get(id));
  event.ids.forEach((id) => sent.delete(id));
  if (times.length) $("latency").textContent = Math.max(...times).toFixed(0) + " ms";
  tell(["live", ...event.notes].join("; "));
}

function remember(prompt) {
  const old = [...$("history").children].find((item) => item.textContent === prompt);
  const item = old ?? document.createElement("li");
  if (!old) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = prompt;
    button.onclick = () => { $("prompt").value = prompt; send(); };
    item.append(button);
  }
  $("history").prepend(item);
}

function send() {
  if (!session) return start();
  const how = { recompute: { recompute: true }, keep: { recompute: false }, blend: { over: 8 } }[chosen("how")];
  remember($("prompt").value);
  ask({ prompt: $("prompt").value, ...how });
}

function select(units, now = true) {
  const known = [...document.querySelectorAll("input[name=unit]")];
  const found = known.find((input) => input.value === units) ?? choice(units);
  found.checked ||= now;
}

function choice(units) {
  const label = document.createElement("label"), input = document.createElement("input");
  Object.assign(input, { type: "radio", name: "unit", value: units });
  input.onchange = () => { if (session) ask({ units }); };
  label.append(input, units);
  $("units").append(label);
  return input;
}

call("GET", "model").then((model) => {
  model.kinds.forEach((units) => select(units, false));
  if (!chosen("unit")) select(model.units);
  model.prompts.forEach((prompt) => $("prompts").append(new Option(prompt)));
  $("prompt").value ||= model.prompts[0] ?? "";
  $("steps").value ||= model.num_inference_steps; // a session that goes on may have said its own
}).catch((error) => tell(error.message, true));
$("start").onclick = start;
$("ask").onsubmit = (event) => { event.preventDefault(); send(); };
$("pause").onclick = () => {
  paused = !paused;
  if (paused) video.pause();
  else video.play();
  say({ type: "pause", paused });
  $("pause").textContent = paused ? "Go on" : "Pause";
  tell(paused ? "paused" : "live");
};
$("back").onclick = () => {
  say({ type: "seek", seconds: Math.max(way.oldest, way.seconds + video.currentTime - 5, 0) });
};
$("reset").onclick = () => say(wanted());
$("branch").onclick = () => say({ type: "branch" });
$("steps").onchange = () => {
  $("steps").dataset.set = "yes";
  if (session) ask({ num_inference_steps: Number($("steps").value) });
};
$("seed").onchange = () => { if (session) ask({ seed: Number($("seed").value) }); };
document.addEventListener("keydown", (event) => {
  if (event.key === " " && event.target === document.body && session) {
    event.preventDefault();
    $("pause").click();
  }
});

// ---------------------------------------------------------------- a picture or clip to begin with

for (const kind of ["dragover", "dragleave", "drop"]) {
  $("screen").addEventListener(kind, (event) => {
    event.preventDefault();
    $("screen").classList.toggle("over", kind === "dragover");
  });
}
$("screen").addEventListener("drop", async ({ dataTransfer }) => {
  const file = dataTransfer.files[0];
  if (!file || !session) return;
  try {
    tell("reading " + file.name);
    await call("PUT", `sessions/${session}/beginning`, file);
    say(wanted(true));
  } catch (error) { tell(error.message, true); }
});

// ---------------------------------------------------------------- recording

function find(view, name) {
  const code = [...name].map((letter) => letter.charCodeAt(0));
  for (let i = 4; i < view.byteLength - 12; i++) {
    if (code.every((value, k) => view.getUint8(i + k) === value)) return i;
  }
  return -1;
}

// Fragments keep the time at which they were sent; a recording begins at 0 and has no gaps.
function record(data) {
  if (!recording) return;
  const copy = data.slice(0), view = new DataView(copy);
  view.setBigUint64(find(view, "tfdt") + 8, BigInt(recording.frames));
  recording.frames += view.getUint32(find(view, "trun") + 8);
  recording.parts.push(copy);
  recording.size += copy.byteLength;
  if (recording.size > MAX_RECORD) $("record").click();
}

$("record").onclick = () => {
  if (!recording) recording = { parts: [head], frames: 0, size: 0 };
  else {
    const file = new Blob(recording.parts, { type: "video/mp4" });
    link(URL.createObjectURL(file), `download ${(recording.frames / way.fps).toFixed(1)} s`, "", "videoar.mp4");
    recording = null;
  }
  $("record").textContent = recording ? "Stop" : "Record";
  $("record").setAttribute("aria-pressed", String(Boolean(recording)));
};

function link(href, text, target, download) {
  const a = document.createElement("a");
  Object.assign(a, { href: href.startsWith("blob:") ? href : "/" + href, textContent: text, target });
  if (download) a.download = download;
  $("links").append(a);
}

// ---------------------------------------------------------------- figures and lattice

function computed(event) {
  lastUnit = event;
  $("fps").textContent = event.fps.toFixed(1);
  $("unit").textContent = event.unit_ms.toFixed(0) + " ms";
  $("cache").textContent = (event.cache_bytes / 2 ** 20).toFixed(2) + " MiB";
  $("memory").textContent = (event.process_bytes / 2 ** 20).toFixed(0) + " MiB";
  drawing ||= requestAnimationFrame(draw); // once, however many units come before
}

// Colours are those of the legend, whatever scheme the page has.
function colour(name) {
  if (name === "ink") return getComputedStyle($("clock")).color;
  return getComputedStyle(document.querySelector(".legend ." + name), "::before").backgroundColor;
}

function draw() {
  const event = lastUnit, canvas = $("lattice");
  drawing = 0;
  if (!event || !way) return;
  const [rows, columns] = way.lattice, ratio = devicePixelRatio || 1;
  const wide = (canvas.width = canvas.clientWidth * ratio), label = 16 * ratio;
  const cell = Math.max(1, Math.min(16 * ratio, Math.floor(wide / 12 / (columns + 0.8))));
  const step = Math.ceil(cell * (columns + 0.8)), count = Math.max(2, Math.floor(wide / step));
  canvas.style.height = (cell * rows + label) / ratio + "px";
  canvas.height = cell * rows + label;
  // The sinks first, then the newest frames.
  const due = Math.min(...event.next.map((run) => run[0]));
  const newest = Math.max(...event.next.concat(event.cells).map((run) => run[0]));
  const held = [...new Set(event.cached.map((run) => run[0]))].sort((x, y) => x - y);
  let frames = held.filter((t) => t <= newest - count).slice(0, Math.floor(count / 3));
  const rest = count - frames.length;
  for (let t = Math.max(0, newest - rest + 1); t <= newest; t++) frames.push(t);
  const place = new Map(frames.map((t, k) => [t, k * step]));
  const pen = canvas.getContext("2d");
  const fill = (runs, name) => {
    pen.fillStyle = colour(name);
    for (const [t, h, from, to, level] of runs) {
      if (!place.has(t)) continue;
      const size = cell * 2 ** level, inset = level ? size * 0.2 : cell * 0.06;
      for (let w = from; w <= to; w++) {
        pen.fillRect(place.get(t) + w * size + inset, h * size + inset, size - 2 * inset, size - 2 * inset);
      }
    }
  };
  for (const t of frames) {
    pen.strokeStyle = colour("done");
    pen.strokeRect(place.get(t) + 0.5, 0.5, cell * columns - 1, cell * rows - 1);
    if (t < due) fill(Array.from({ length: rows }, (_, h) => [t, h, 0, columns - 1, 0]), "done");
  }
  fill(event.cached.filter((run) => run[4] === 0), "cached");
  fill(event.cells, "fresh");
  fill(event.next, "next");
  pen.fillStyle = colour("ink");
  pen.font = `${11 * ratio}px system-ui`;
  for (const t of frames) pen.fillText(t, place.get(t), cell * rows + 13 * ratio);
}

if (location.hash.length > 1) {
  session = location.hash.slice(1);
  open();
}
