// The page of `eyetune serve`: what is dropped goes to the server three at a time; what is read there comes back here.

import { Card, make, pair } from "./cards.js";
import { chosen, dropped } from "./files.js";

const SENDERS = 3;
const BUSY = 350;
const QUIET = 45000;

const at = (id) => document.getElementById(id);
const state = {
  token: null, model: null, version: 0, items: [], queue: [], known: new Map(), sending: 0, apart: new Set(), undownloaded: false, shown: "",
};

const wait = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

function ask(path, options = {}) {
  return fetch(path, { ...options, headers: { ...(state.token && { "X-EyeTune-Page": state.token }), ...options.headers }, cache: "no-store" });
}

function trouble(text) {
  at("trouble").textContent = text || "";
  at("trouble").hidden = !text;
}

// ---- photographs in -----------------------------------------------------------------------------------------------

function take({ taken, left }) {
  const room = state.model.limits.results - state.items.length;
  const some = taken.slice(0, Math.max(0, room));
  const notes = [];
  if (left) notes.push(`${left} ${left === 1 ? "file of the folder is no photograph and was" : "files of the folder are no photographs and were"} left aside.`);
  if (some.length < taken.length) notes.push(`${taken.length - some.length} more were left out: ${state.model.limits.results} are kept at a time. Download the table, clear the page, and drop the rest.`);
  if (!taken.length && !left) notes.push("There was no file in what was dropped.");
  trouble(notes.join("\n"));
  for (const { file, name } of some) {
    const item = { file, name, place: ++state.places, state: "queued", key: null, data: null, eye: null };
    item.card = new Card(item, actions);
    state.items.push(item);
    state.queue.push(item);
  }
  refresh();
  send();
}
state.places = 0;

async function send() {
  while (state.sending < SENDERS && state.queue.length) {
    state.sending += 1;
    const item = state.queue.shift();
    sendOne(item).finally(() => {
      state.sending -= 1;
      refresh();
      send();
    });
  }
}

async function sendOne(item) {
  const { limits } = state.model;
  item.state = "sending";
  item.retry = false;
  item.card.update();
  if (item.file.size > limits.bytes) return fail(item, `It has ${megabytes(item.file.size)}; at most ${megabytes(limits.bytes)} are taken here.`);
  const headers = { "Content-Type": "application/octet-stream", "X-EyeTune-Name": encodeURIComponent(wellFormed(item.name)), "X-EyeTune-Place": item.place };
  while (item.state === "sending") {
    item.abort = new AbortController();
    let answer;
    try {
      answer = await ask("api/photographs", { method: "POST", headers, body: item.file, signal: item.abort.signal });
      if (answer.status === 503) {
        await wait(1000 * (Number(answer.headers.get("Retry-After")) || 3));
        continue;
      }
      if (!answer.ok) return fail(item, await answer.text(), answer.status !== 415 && answer.status !== 413);
      item.key = (await answer.json()).key;
    } catch (error) {
      if (error.name === "AbortError") return undefined;
      return fail(item, "It could not be sent. Is the server still there, and the file?", true);
    }
    item.file = item.state === "sending" ? item.file : null;
    if (item.state !== "sending") return ask(`api/photographs/${item.key}`, { method: "DELETE" });
    item.state = "waiting";
    apply(item);
    hurry();
  }
  return undefined;
}

const megabytes = (bytes) => `${(bytes / 1048576).toFixed(1)} MiB`;
const wellFormed = (text) => (text.toWellFormed ? text.toWellFormed() : text);

function fail(item, error, retry = false) {
  Object.assign(item, { state: "failed", error, retry, data: item.data || { bars: [], flags: [], decisions: [] } });
  item.card.update();
  refresh();
}

// ---- results out --------------------------------------------------------------------------------------------------

let alarm = null;

function hurry() {
  clearTimeout(alarm);
  alarm = setTimeout(poll, BUSY);
}

async function poll() {
  clearTimeout(alarm);
  try {
    const point = at("point").value;
    const answer = await ask(`api/photographs?since=${state.version}${point ? `&point=${encodeURIComponent(point)}` : ""}`);
    if (answer.status === 404) return trouble("The server has forgotten this page. What is shown here is all there is: load the page anew to go on.");
    const told = await answer.json();
    state.version = told.version;
    state.ahead = told.ahead;
    for (const data of told.photographs) state.known.set(data.key, data);
    for (const item of state.items) if (item.key && state.known.get(item.key) !== item.data) apply(item);
    if (told.photographs.length) refresh();
    if (at("trouble").dataset.away) {
      delete at("trouble").dataset.away;
      trouble("");
    }
  } catch {
    at("trouble").dataset.away = "yes";
    trouble("The server does not answer. Is it still running?");
  }
  alarm = setTimeout(poll, state.items.some((item) => item.key && !settled(item)) ? BUSY : QUIET);
  return undefined;
}

const settled = (item) => item.state === "done" || item.state === "failed";

function apply(item) {
  const data = state.known.get(item.key);
  if (!data) return;
  const before = item.state;
  item.data = data;
  item.state = data.state;
  item.error = data.error;
  if (!item.eye && data.eye) item.eye = { ...data.eye };
  if (settled(item) && !settled({ state: before })) {
    item.file = null;
    state.undownloaded = true;
  }
  item.card.update();
  if (item.state === "done") near.observe(item.card.element);
}

// Pictures are fetched when they come into view, heat maps when they are wanted as well.
const near = new IntersectionObserver((seen) => {
  for (const { target, isIntersecting } of seen) {
    const item = state.items.find((one) => one.card.element === target);
    if (!item) continue;
    item.visible = isIntersecting;
    if (isIntersecting) picture(item);
  }
}, { rootMargin: "300px" });

async function picture(item) {
  if (item.state !== "done") return;
  if (!item.url && !item.fetching) {
    item.fetching = true;
    item.url = await blob(`api/photographs/${item.key}/preview`);
    item.fetching = false;
    item.card.show();
  }
  if (item.warm && !item.heatUrl && !item.heating) {
    item.heating = true;
    item.card.show();
    item.heatUrl = await blob(`api/photographs/${item.key}/heat`);
    item.heating = false;
    if (!item.heatUrl) item.warm = false;
    item.card.show();
  }
}

async function blob(path) {
  try {
    const answer = await ask(path);
    if (answer.ok) return URL.createObjectURL(await answer.blob());
    if (answer.status !== 404) trouble(await answer.text());
  } catch {
    trouble("The server does not answer. Is it still running?");
  }
  return null;
}

// ---- what can be done ---------------------------------------------------------------------------------------------

const actions = {
  noHeat: () => Boolean(state.model.no_heat_maps),
  heat(item) {
    item.warm = !item.warm;
    item.card.show();
    picture(item);
  },
  again(item) {
    item.state = "queued";
    item.error = null;
    item.card.update();
    state.queue.push(item);
    refresh();
    send();
  },
  remove(item) {
    const next = neighbour(item);
    drop([item]);
    if (item.key) ask(`api/photographs/${item.key}`, { method: "DELETE" }).catch(() => {});
    (next || at("pick-files")).focus();
  },
  regroup: () => refresh(),
};

// The button of the next card, so that who works with the keyboard is not thrown back to the top.
function neighbour(item) {
  const place = state.items.indexOf(item);
  const other = state.items[place + 1] || state.items[place - 1];
  return other && other.card.element.querySelector(".away");
}

function drop(some) {
  for (const item of some) {
    if (item.abort && item.state === "sending") item.abort.abort();
    if (item.state === "sending" || item.state === "queued") item.state = "dropped";
    near.unobserve(item.card.element);
    for (const url of [item.url, item.heatUrl]) if (url) URL.revokeObjectURL(url);
  }
  state.items = state.items.filter((item) => !some.includes(item));
  state.queue = state.queue.filter((item) => !some.includes(item));
  refresh();
}

async function stop() {
  drop(state.items.filter((item) => item.state === "queued" || item.state === "sending"));
  try {
    const answer = await ask("api/photographs?waiting", { method: "DELETE" });
    const { forgotten } = await answer.json();
    drop(state.items.filter((item) => forgotten.includes(item.key)));
  } catch {
    trouble("The server does not answer. Is it still running?");
  }
}

function clear() {
  drop([...state.items]);
  state.known.clear();
  state.apart.clear();
  state.undownloaded = false;
  trouble("");
  ask("api/photographs", { method: "DELETE" }).catch(() => {});
  at("pick-files").focus();
}

async function download() {
  const point = at("point").value;
  const url = await blob(`api/table.csv${point ? `?point=${encodeURIComponent(point)}` : ""}`);
  if (!url) return;
  const link = make("a", { href: url, download: "eyetune-research-use.csv" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
  state.undownloaded = false;
}

// ---- the whole page ------------------------------------------------------------------------------------------------

const shows = {
  all: () => true,
  positive: (item) => item.state === "done" && item.data.decisions.some((one) => one.positive),
  warned: (item) => item.state === "done" && Boolean(item.data.flags.length || item.data.unlike),
  failed: (item) => item.state === "failed",
};

// [[right, left]] of patients with one photograph of each eye, and how many photographs could not be paired.
function pairs() {
  const patients = new Map();
  for (const item of state.items) {
    if (!item.eye || !item.eye.patient || !item.eye.eye || state.apart.has(item.eye.patient)) continue;
    if (!patients.has(item.eye.patient)) patients.set(item.eye.patient, []);
    patients.get(item.eye.patient).push(item);
  }
  const found = new Map();
  let unclear = 0;
  for (const [patient, some] of patients) {
    const right = some.filter((item) => item.eye.eye === "right");
    const left = some.filter((item) => item.eye.eye === "left");
    if (right.length === 1 && left.length === 1) found.set(patient, [right[0], left[0]]);
    else if (some.length > 1) unclear += some.length;
  }
  return { found, unclear };
}

function refresh() {
  const { items } = state;
  at("tools").hidden = !items.length;
  at("drop").classList.toggle("small", items.length > 0);
  const { found, unclear } = at("pairs").checked ? pairs() : { found: new Map(), unclear: 0 };
  const wanted = shows[at("filter").value];
  const done = new Set();
  const parts = [];
  for (const item of items) {
    if (done.has(item)) continue;
    const mine = item.eye && found.get(item.eye.patient);
    const group = mine && mine.includes(item) ? mine : [item];
    group.forEach((one) => done.add(one));
    if (group.some(wanted)) parts.push({ group, patient: mine ? item.eye.patient : null });
  }
  const shown = JSON.stringify(parts.map(({ group }) => group.map((item) => [item.place, item.eye])));
  if (shown !== state.shown) {
    state.shown = shown;
    layout(parts);
  }
  say(found.size, unclear);
}

function layout(parts) {
  const focused = document.activeElement;
  const elements = parts.map(({ group, patient }) => {
    if (group.length === 1) {
      group[0].paired = false;
      group[0].card.update();
      return group[0].card.element;
    }
    return pair(patient, group[0].card, group[1].card, () => {
      state.apart.add(patient);
      refresh();
    });
  });
  if (!elements.length && state.items.length) elements.push(make("p", { class: "empty" }, "None of the photographs is of this kind."));
  at("results").replaceChildren(...elements);
  if (focused && focused.isConnected) focused.focus({ preventScroll: true });
}

let spoken = 0;

function say(paired, unclear) {
  const { items } = state;
  const done = items.filter(settled).length;
  const left = items.length - done;
  at("bar").max = items.length || 1;
  at("bar").value = done;
  at("bar").hidden = !left;
  at("cancel").hidden = !left;
  const failed = items.filter((item) => item.state === "failed").length;
  const notRead = failed ? `, ${failed} not read` : "";
  const others = left && state.ahead ? `, ${state.ahead} of others first` : "";
  const text = left ? `${done} of ${items.length} done, ${left} waiting${others}` : `${items.length} done${notRead}`;
  // A screen reader reads each change aloud: not every one, but the last.
  if (!left || performance.now() - spoken > 1500) {
    if (at("progress").textContent !== text) at("progress").textContent = text;
    spoken = performance.now();
  }
  for (const option of at("filter").options) {
    const count = items.filter(shows[option.value]).length;
    option.textContent = `${option.textContent.replace(/ \(\d+\)$/, "")} (${count})`;
  }
  const notes = [];
  if (paired) notes.push(`${paired} ${paired === 1 ? "pair" : "pairs"} of eyes, put together by file names alone unless you say otherwise. Check them: a wrong pair looks just like a right one.`);
  if (unclear) notes.push(`${unclear} photographs share a patient's name with others and were not paired: two of one eye, or more than two.`);
  at("paired").textContent = notes.join(" ");
  at("paired").hidden = !notes.length;
  at("download").disabled = !done;
}

function introduce(model) {
  at("model").textContent = `${model.name} (${model.backbone})`;
  at("drop-note").prepend(`JPEG, PNG, TIFF, BMP, WebP or DICOM, up to ${megabytes(model.limits.bytes)} each. `);
  for (const { name, title } of model.points) at("point").append(make("option", { value: name }, title.replace(">=", "≥")));
  at("point-choice").hidden = !model.points.length;
  if (!model.points.length) at("filter").querySelector("[value=positive]").remove();
  for (const id of ["heat-choice", "heat-words"]) at(id).hidden = Boolean(model.no_heat_maps);
  const grounds = [...model.grounds, ...(model.no_heat_maps ? [`There are no heat maps: ${model.no_heat_maps}`] : [])];
  at("grounds").querySelector("ul").append(...grounds.map((text) => make("li", {}, text)));
  at("licence").textContent = `Licence of the base weights: ${model.licence}`;
}

function listen() {
  at("pick-files").onclick = () => at("files").click();
  at("pick-folder").onclick = () => at("folder").click();
  for (const input of [at("files"), at("folder")]) {
    input.onchange = () => {
      take(chosen(input.files));
      input.value = "";
    };
  }
  let depth = 0;
  addEventListener("dragenter", () => at("drop").classList.toggle("over", (depth += 1) > 0));
  addEventListener("dragleave", () => at("drop").classList.toggle("over", (depth -= 1) > 0));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", async (event) => {
    event.preventDefault();
    depth = 0;
    at("drop").classList.remove("over");
    if (event.dataTransfer) take(await dropped(event.dataTransfer));
  });
  at("cancel").onclick = stop;
  at("clear").onclick = clear;
  at("download").onclick = download;
  at("filter").onchange = refresh;
  at("pairs").onchange = () => {
    state.apart.clear();
    refresh();
  };
  at("point").onchange = () => {
    state.version = 0;
    poll();
  };
  at("heat").onchange = () => {
    for (const item of state.items) {
      item.warm = at("heat").checked;
      item.card.show();
      if (item.visible) picture(item);
    }
  };
  addEventListener("beforeunload", (event) => {
    if (state.undownloaded) event.preventDefault();
  });
  addEventListener("pagehide", () => ask("api/page", { method: "DELETE", keepalive: true }).catch(() => {}));
  addEventListener("pageshow", (event) => event.persisted && location.reload());
}

async function start() {
  try {
    state.model = await (await ask("api/model")).json();
    const answer = await ask("api/page", { method: "POST" });
    if (!answer.ok) return trouble(await answer.text());
    state.token = (await answer.json()).page;
  } catch {
    return trouble("The server does not answer. Is it still running?");
  }
  introduce(state.model);
  listen();
  document.body.dataset.ready = "yes";
  alarm = setTimeout(poll, QUIET);
  return undefined;
}

start();
