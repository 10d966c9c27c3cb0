"use strict";

const MOST_COLUMNS = 6;
const $ = (id) => document.getElementById(id);

/** An element with attributes and children; text goes in as text, never as HTML. */
function make(name, attributes = {}, ...children) {
  const svg = ["svg", "line", "polyline", "circle", "text", "title", "g"].includes(name);
  const element = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

// --- Settings, and the link that carries them ---

function settings() {
  return [...document.querySelectorAll("#columns input")].map((input) => input.value.trim());
}

function addColumn(text, focus = false) {
  const input = make("input", {
    value: text, list: "known", placeholder: "loops=6", spellcheck: "false",
    autocapitalize: "off", autocomplete: "off", "aria-describedby": "form-of-a-setting",
  });
  const remove = make("button", { type: "button" }, "Remove");
  const item = make("li", {}, input, remove);
  remove.addEventListener("click", () => {
    const next = item.nextElementSibling ?? item.previousElementSibling;
    item.remove();
    number();
    (next?.querySelector("input") ?? $("add")).focus();
  });
  $("columns").append(item);
  number();
  if (focus) input.focus();
}

function number() {
  const items = [...$("columns").children];
  items.forEach((item, i) => {
    item.querySelector("input").setAttribute("aria-label", `Setting ${i + 1}`);
    item.querySelector("button").setAttribute("aria-label", `Remove setting ${i + 1}`);
    item.querySelector("button").disabled = items.length === 1;
  });
  $("add").disabled = items.length >= MOST_COLUMNS;
}

const NUMBERS = ["max_tokens", "temperature", "seed"];

function toLink() {
  const link = new URLSearchParams({ prompt: $("prompt").value });
  for (const text of settings()) link.append("setting", text);
  for (const name of NUMBERS) link.set(name, $(name).value);
  return link;
}

function fromLink() {
  const link = new URLSearchParams(location.hash.slice(1));
  if (link.has("prompt")) $("prompt").value = link.get("prompt");
  for (const name of NUMBERS) if (link.has(name)) $(name).value = link.get(name);
  $("columns").replaceChildren();
  const given = link.has("setting") ? link.getAll("setting") : ["loops=1", "loops=3", "loops=6"];
  given.slice(0, MOST_COLUMNS).forEach((text) => addColumn(text));
}

// --- The server ---

function ask(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  return fetch(path, { ...options, headers });
}

/** Throws what the server says is wrong. */
async function check(response) {
  if (response.ok) return response;
  if (response.status === 401) {
    $("key-row").hidden = false;
    $("key").focus();
  }
  let message = response.statusText;
  try {
    message = (await response.json()).error;
  } catch { /* no JSON: the status has to do */ }
  throw new Refused(message);
}

class Refused extends Error {}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
  }
}

async function readModels() {
  try {
    const { data } = await (await check(await ask("/v1/models"))).json();
    $("model").textContent = data[0].id;
    const known = data.slice(1).map((model) => model.id.slice(data[0].id.length + 1));
    $("known").replaceChildren(...known.map((value) => make("option", { value })));
  } catch (error) {
    if (error instanceof Refused) say(error.message, true);
    else waitForServer();
  }
}

let waits = false;

async function waitForServer() {
  if (waits) return;
  waits = true;
  say("The server has gone. This page tries again by itself.", true);
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, 1000));
    try {
      if ((await fetch("/health")).ok) break;
    } catch { /* still gone */ }
  }
  waits = false;
  say("The server is back.");
  readModels();
}

// --- A comparison ---

let abort = null;

async function run() {
  if (abort || !$("form").reportValidity()) return;
  const names = settings();
  const body = {
    prompt: $("prompt").value,
    settings: names,
    ...Object.fromEntries(NUMBERS.map((name) => [name, Number($(name).value)])),
  };
  abort = new AbortController();
  $("run").disabled = true;
  $("stop").disabled = false;
  $("drift").hidden = true;
  say("Reading the prompt …");
  let board = null;
  try {
    const options = { method: "POST", body: JSON.stringify(body), signal: abort.signal };
    const response = await check(await ask("/compare", options));
    for await (const event of events(response)) {
      if (event.event === "start") board = new Board(names, event.columns);
      else if (event.event === "error") throw new Refused(event.message);
      else board.take(event);
    }
    if (!board?.ended) throw new TypeError("cut off");
    say(`${names.length} answers are finished.`);
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else if (error instanceof Refused) say(error.message, true);
    else waitForServer();
  } finally {
    board?.stop();
    abort = null;
    $("run").disabled = false;
    $("stop").disabled = true;
  }
}

/** The columns of one comparison. Several may show the same view. */
class Board {
  ended = false;
  #columns;
  #drifts = [];

  constructor(names, columns) {
    this.#columns = columns.map(({ view, loop }, i) => {
      const name = names[i] || (loop ? `loops=${loop.loops}` : "loops=1");
      const text = make("div", { class: "text", tabindex: "0", "aria-label": `Answer, ${name}` });
      const notes = make("ul");
      const card = make("article", { class: `c${i} running` }, make("h2", {}, name), text, notes);
      return { view, name, card, text, notes, answer: "", departs: null };
    });
    $("answers").replaceChildren(...this.#columns.map((column) => column.card));
    say("Answering …");
  }

  take(event) {
    this.ended ||= event.event === "end";
    this.#columns.forEach((column, i) => {
      if (column.view !== event.view) return;
      if (event.event === "text") this.#say(column, event);
      if (event.event === "report") this.#report(column, event);
      if (event.event === "trace") {
        this.#note(column, `drift: ${event.verdict}`);
        this.#drifts.push({ name: column.name, colour: i, loops: event.loops });
        drawDrift(this.#drifts);
      }
    });
  }

  #say(column, event) {
    column.answer += event.text;
    column.departs ??= event.departs;
    column.text.replaceChildren(...marked(column.answer, column.departs));
    const speed = event.tokens_per_second ? `, ${event.tokens_per_second.toFixed(1)} tokens/s` : "";
    column.notes.replaceChildren(make("li", {}, `${event.tokens} tokens${speed}`));
    if (event.finish_reason) column.card.classList.remove("running");
  }

  #report(column, event) {
    const { departs_at_token: at, generation_tokens: tokens, notes } = event;
    const where = at === null ? "same answer as un-looped" : `departs at token ${at + 1}`;
    column.notes.replaceChildren(make("li", {}, `${tokens} tokens`));
    if (column.view !== 0) this.#note(column, where);
    notes.forEach((line) => this.#note(column, line));
  }

  #note(column, line) {
    column.notes.append(make("li", {}, line));
  }

  stop() {
    for (const { card } of this.#columns) card.classList.remove("running");
  }
}

/** An answer whose first word that is not the un-looped answer's is marked. */
function marked(answer, departs) {
  if (departs === null) return [answer];
  const [, space, word] = answer.slice(departs).match(/^(\s*)(\S*)/);
  const [start, end] = [departs + space.length, departs + space.length + word.length];
  const mark = make("mark", { title: "here it departs from the un-looped answer" }, word);
  return [answer.slice(0, start), mark, answer.slice(end)];
}

// --- The plot ---

function drawDrift(drifts) {
  const lines = drifts.flatMap(({ name, colour, loops }) => loops.map((loop) => ({
    name: loops.length > 1 ? `${name}, layers ${loop.layers[0]} to ${loop.layers[1] - 1}` : name,
    colour, verdict: loop.verdict, reason: loop.reason,
    values: loop.residual.map((x) => x / loop.residual[0]),
  })));
  // As wide as it is shown, so that its words are as large as others.
  const width = Math.min(640, document.querySelector("main").clientWidth);
  const [height, left, bottom] = [260, 48, 36];
  const passes = Math.max(2, ...lines.map((line) => line.values.length));
  const top = Math.max(1.1, ...lines.flatMap((line) => line.values));
  const x = (i) => left + (i / (passes - 1)) * (width - left - 16);
  const y = (value) => 12 + (1 - value / top) * (height - bottom - 12);
  const label = lines.map((l) => `${l.name}: ${l.verdict}`).join("; ");
  const plot = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  for (const value of [0, 0.5, 1, ...(top > 1.6 ? [top] : [])]) {
    plot.append(
      make("line", { x1: left, x2: width - 16, y1: y(value), y2: y(value), class: "axis" }),
      make("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(1)),
    );
  }
  for (let i = 0; i < passes; i += Math.ceil(passes / 12)) {
    plot.append(make("text", { x: x(i), y: height - 16, "text-anchor": "middle" }, `${i + 1}`));
  }
  plot.append(make("text", { x: width / 2, y: height - 2, "text-anchor": "middle" }, "pass"));
  for (const { values, colour, name } of lines) {
    const points = values.map((value, i) => [x(i), y(value)]);
    const line = make("polyline", { points: points.join(" ") });
    const dots = points.map(([cx, cy]) => make("circle", { cx, cy, r: 3 }));
    plot.append(make("g", { class: `c${colour}` }, make("title", {}, name), line, ...dots));
  }
  $("plot").replaceChildren(plot);
  const row = (cell, cells) => make("tr", {}, ...cells.map((text) => make(cell, {}, text)));
  const body = lines.map((l) => row("td", [l.name, l.verdict, l.reason]));
  $("table").replaceChildren(make("table", {},
    make("thead", {}, row("th", ["setting", "verdict", "why"])),
    make("tbody", {}, ...body)));
  $("drift").hidden = false;
}

// --- What people do ---

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  history.replaceState(null, "", `#${toLink()}`);
  run();
});
$("stop").addEventListener("click", () => abort?.abort());
$("add").addEventListener("click", () => addColumn("", true));
$("link").addEventListener("click", async () => {
  history.replaceState(null, "", `#${toLink()}`);
  try {
    await navigator.clipboard.writeText(location.href);
    say("The link is copied: it carries the prompt and the settings.");
  } catch {
    say("The link is in the address bar: it carries the prompt and the settings.");
  }
});
$("key").addEventListener("change", readModels);
addEventListener("hashchange", fromLink);
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
  if (event.key === "Escape") abort?.abort();
});

fromLink();
readModels();
