"use strict";
// The page of `python -m maskvit explore`. What it knows of the checkpoint is in #about; answers come from #stored, where that holds
// some, or from the server. A mask is an array of booleans over all tokens of all inputs, true where hidden.

const read = (id) => JSON.parse(document.getElementById(id).textContent);
const about = read("about"), stored = read("stored");
const at = (id) => document.getElementById(id);
const state = { sample: 0, data: null, masked: [], token: null, seed: 0 };

// --- Answers -------------------------------------------------------------------------------------------------------

async function ask(path, body) {
  const options = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer: was it stopped?");
  }
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

const server = {
  picture: (number) => ask(`picture?number=${number}`),
  draw: (number) => ask("draw", {
    number, strategy: at("strategy").value, budget: at("budget").value, visible: Number(at("visible").value), seed: state.seed,
  }),
  rebuild: (number, masked) => ask("rebuild", { number, masked: bits(masked) }),
  token: (number, token) => ask(`token?number=${number}&token=${token}&block=${at("block").value}`),
};

const file = {
  chosen: (number) => stored.samples[number].drawn[at("strategy").value][Number(at("visible").value)],
  async picture(number) {
    const sample = stored.samples[number];
    if (sample.problem) throw new Error(`${sample.name}: ${sample.problem}`);
    return sample;
  },
  async draw(number) { return file.chosen(number); },
  async rebuild(number) { return file.chosen(number); },
  async token(number, token) {
    const tokens = stored.samples[number].tokens;
    if (!tokens) throw new Error(`${about.tokens} tokens have too many pairs for a file: start the server to see them.`);
    tokens.bytes ??= { attention: unpack(tokens.attention), similarity: unpack(tokens.similarity) };
    const row = (name) => [...tokens.bytes[name].subarray(token * about.tokens, (token + 1) * about.tokens)];
    return {
      attention: row("attention").map((level) => level / 255 * tokens.most[token]),
      similarity: row("similarity").map((level) => 2 * level / 255 - 1),
    };
  },
};

const answers = stored ? file : server;
const bits = (masked) => masked.map((hidden) => (hidden ? "1" : "0")).join("");
const unpack = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

function tell(error) {
  at("problem").textContent = error ? error.message : "";
  at("problem").hidden = !error;
}

// --- Boards: a picture under a grid of cells -----------------------------------------------------------------------

function make(tag, fields = {}, ...children) {
  const element = Object.assign(document.createElement(tag), fields);
  element.append(...children);
  return element;
}

const numbers = (input) => Array.from({ length: input.rows * input.columns }, (_, i) => input.start + i);
const present = (input, token) => state.data.inputs[input.name].present[token - input.start] === "1";

// `takes(token, phase)`: what a click ("down"), a drag over further cells ("move") or the space bar does; null where nothing.
function board(input, source, caption, takes, classes = "") {
  const cells = make("div", { className: `cells ${classes} ${takes ? "takes" : ""} ${Math.max(...about.size) < 160 ? "sharp" : ""}` });
  cells.style.setProperty("--rows", input.rows);
  cells.style.setProperty("--columns", input.columns);
  if (source) cells.append(make("img", { src: source, alt: "" }));
  if (takes !== undefined) for (const token of numbers(input)) {
    const cell = make("i", { className: present(input, token) ? "" : "absent" });
    cell.dataset.token = token;
    cells.append(cell);
  }
  if (takes) {
    pointer(cells, takes);
    keys(cells, input, takes);
  }
  return make("figure", { className: "board" }, cells, make("figcaption", {}, make("b", { textContent: input.name }), " ", caption));
}

function pointer(cells, takes) {
  let last = null;
  const under = (event) => document.elementFromPoint(event.clientX, event.clientY)?.closest("[data-token]");
  const take = (event, phase) => {
    const cell = under(event);
    if (!cell || cell === last || cell.parentElement !== cells || cell.classList.contains("absent")) return;
    last = cell;
    takes(Number(cell.dataset.token), phase);
  };
  cells.addEventListener("pointerdown", (event) => { last = null; take(event, "down"); });
  cells.addEventListener("pointermove", (event) => { if (event.buttons && last) take(event, "move"); });
}

function keys(cells, input, takes) {
  cells.tabIndex = 0;
  cells.setAttribute("role", "application");
  cells.setAttribute("aria-label", `${input.name}: ${input.rows} by ${input.columns} tokens; arrows move, the space bar chooses`);
  let place = 0;
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -input.columns, ArrowDown: input.columns };
  cells.addEventListener("keydown", (event) => {
    if (event.key in steps) place = Math.min(Math.max(place + steps[event.key], 0), input.rows * input.columns - 1);
    else if (event.key === " " || event.key === "Enter") { if (present(input, input.start + place)) takes(input.start + place, "down"); }
    else return;
    event.preventDefault();
    cells.querySelectorAll("i").forEach((cell, i) => cell.classList.toggle("at", i === place));
  });
}

const absentBoard = (input) => make("figure", { className: "board" },
  make("div", { className: "empty", textContent: "absent: no file of it" }),
  make("figcaption", {}, make("b", { textContent: input.name })));

// One board per input that the picture has.
function boards(id, source, caption, takes, classes) {
  at(id).replaceChildren(...about.inputs.map((input) => {
    const data = state.data.inputs[input.name];
    return data.absent ? absentBoard(input) : board(input, data[source], caption, takes, classes);
  }));
}

// --- Tokens and what is rebuilt of them ----------------------------------------------------------------------------

let showing = false; // what a drag does to every cell it passes

function toggle(token, phase) {
  if (phase === "down") showing = state.masked[token];
  if (state.masked[token] !== showing) return;
  state.masked[token] = !showing;
  paintMask();
  rebuild();
}

function paintMask() {
  const shown = (input) => numbers(input).filter((token) => present(input, token) && !state.masked[token]).length;
  about.inputs.forEach((input, i) => {
    const figure = at("tokens").children[i];
    for (const cell of figure.querySelectorAll("i")) cell.classList.toggle("hidden", state.masked[cell.dataset.token] && !cell.classList.contains("absent"));
    if (!state.data.inputs[input.name].absent) figure.querySelector("figcaption").lastChild.textContent = ` ${shown(input)} of ${input.rows * input.columns} shown`;
  });
  const total = about.inputs.reduce((sum, input) => sum + shown(input), 0);
  at("count").textContent = `${total} of ${about.tokens} tokens (${Math.round(100 * total / about.tokens)} %)`;
  return total;
}

let busy = false, again = false; // one question at a time; the latest mask is always asked last

async function rebuild() {
  if (about.cannot_rebuild) return;
  if (busy) { again = true; return; }
  busy = true;
  try {
    do {
      again = false;
      const number = state.sample;
      const answer = await answers.rebuild(number, state.masked);
      if (number === state.sample) paintRebuilt(answer);
    } while (again);
    tell(null);
  } catch (error) {
    tell(error);
  }
  busy = false;
}

function paintRebuilt(answer) {
  const took = answer.milliseconds ? ` Computed in ${Math.max(1, Math.round(answer.milliseconds))} ms.` : "";
  at("rebuilt-hint").textContent = `Hidden patches as the model rebuilds them, shown ones as they are; the loss is that of the hidden ones.${took}`;
  const [height, width] = about.size;
  at("rebuilt").replaceChildren(...Object.entries(answer.outputs).map(([name, output]) => {
    if (!output.picture) return make("figure", { className: "board" }, make("div", { className: "empty", textContent: output.note }),
      make("figcaption", {}, make("b", { textContent: name })));
    return board({ name, rows: height, columns: width }, output.picture, output.note);
  }));
}

async function drawMask() {
  try {
    const number = state.sample, answer = await answers.draw(number);
    if (number !== state.sample) return;
    state.masked = [...answer.masked].map((digit) => digit === "1");
    paintMask();
    rebuild();
    tell(null);
  } catch (error) {
    tell(error);
  }
}

// --- Attention and likeness of one token ---------------------------------------------------------------------------

function legend(id, low, high) {
  const bar = make("span", { className: "bar" });
  bar.style.background = `linear-gradient(90deg, ${about.heat.filter((_, i) => i % 15 === 0).join(", ")})`;
  at(id).replaceChildren(low, bar, high);
}

function heat(id, values, low, high) {
  for (const cell of at(id).querySelectorAll("i")) {
    const token = Number(cell.dataset.token), gone = cell.classList.contains("absent");
    const level = Math.round(255 * Math.min(Math.max((values[token] - low) / Math.max(high - low, 1e-12), 0), 1));
    cell.style.background = gone ? "" : about.heat[level];
    cell.classList.toggle("heated", !gone);
    cell.classList.toggle("chosen", token === state.token);
  }
}

async function choose(token) {
  state.token = token;
  try {
    const number = state.sample, answer = await answers.token(number, token);
    if (number !== state.sample || token !== state.token) return;
    const input = about.inputs.filter((one) => one.start <= token).at(-1), place = token - input.start;
    const where = `${input.name}, row ${Math.floor(place / input.columns)}, column ${place % input.columns}`;
    const most = Math.max(...answer.attention), total = answer.attention.reduce((sum, one) => sum + one, 0);
    const beside = about.globals ? `; ${(100 * Math.max(0, 1 - total)).toFixed(0)} % goes to the global token${about.globals > 1 ? "s" : ""}` : "";
    at("attention-hint").textContent = `What the framed token (${where}) attends to when nothing is hidden, mean over heads${beside}. Click another.`;
    at("features-hint").textContent = `How alike features are to that of the framed token (${where}): the cosine between them. Click another.`;
    const alike = answer.similarity.filter((_, i) => about.inputs.some((one) => i >= one.start && i < one.start + one.rows * one.columns && present(one, i)));
    const least = Math.min(...alike);
    heat("attention", answer.attention, 0, most);
    heat("similarity", answer.similarity, least, 1);
    legend("attention-legend", "0", `${(100 * most).toPrecision(2)} % of its attention`);
    legend("similarity-legend", `cosine ${least.toFixed(2)}`, "1");
    tell(null);
  } catch (error) {
    at("attention-legend").replaceChildren();
    at("similarity-legend").replaceChildren();
    tell(error);
  }
}

// --- The controls --------------------------------------------------------------------------------------------------

async function show(number) {
  state.sample = number;
  at("sample").value = number;
  at("previous").disabled = number === 0;
  at("next").disabled = number === about.samples.length - 1;
  const lists = ["tokens", "rebuilt", "attention", "similarity", "components", "content"];
  try {
    const data = await answers.picture(number);
    if (number !== state.sample) return;
    state.data = data;
  } catch (error) {
    for (const id of lists) at(id).replaceChildren();
    tell(error);
    return;
  }
  boards("tokens", "picture", "", stored ? null : toggle);
  boards("attention", "picture", "", choose, "grey");
  boards("similarity", "picture", "", choose, "grey");
  boards("components", "components", "");
  boards("content", "content", "");
  await drawMask();
  const input = about.inputs.find((one) => !state.data.inputs[one.name].absent);
  const middle = input.start + Math.floor(input.rows / 2) * input.columns + Math.floor(input.columns / 2);
  const first = present(input, middle) ? middle : numbers(input).find((token) => present(input, token));
  const kept = state.token !== null && about.inputs.some((one) => numbers(one).includes(state.token) && present(one, state.token));
  if (kept || first !== undefined) await choose(kept ? state.token : first);
}

function fill(id, values, words = (value) => value) {
  at(id).replaceChildren(...values.map((value, i) => make("option", { value: typeof value === "string" && id !== "sample" ? value : i, textContent: words(value) })));
}

function start() {
  fill("sample", about.samples);
  const strategies = about.strategies.filter((one) => !stored || stored.strategies.includes(one.name));
  at("strategy").replaceChildren(...strategies.map((one) => make("option", {
    value: one.name, textContent: one.name + (one.options ? ` (${one.options})` : ""),
  })));
  at("strategy").value = strategies.some((one) => one.name === about.start.strategy) ? about.start.strategy : strategies[0].name;
  fill("budget", stored ? [stored.budget] : about.budgets);
  at("budget").value = stored ? stored.budget : about.start.budget;
  at("budget-field").hidden = about.inputs.length < 2;
  at("block").replaceChildren(...Array.from({ length: about.blocks }, (_, i) => make("option", { value: i, textContent: `${i + 1} of ${about.blocks}` })));
  at("block").value = about.blocks - 1;
  const slider = at("visible");
  if (stored) {
    Object.assign(slider, { min: 0, max: stored.visible.length - 1, step: 1, value: 0 });
    const nearest = stored.visible.map((count) => Math.abs(count - about.start.visible));
    slider.value = nearest.indexOf(Math.min(...nearest));
    at("buttons").hidden = at("block-field").hidden = true;
  } else {
    Object.assign(slider, { min: 1, max: about.tokens, step: 1, value: about.start.visible });
  }
  at("tokens-hint").textContent = (stored
    ? "What the chosen strategy hides, in grey; this page holds answers that were computed before. "
    : "Click or drag over cells to hide and show tokens: what is rebuilt follows. ") + about.guidance;
  at("rebuilt-hint").textContent = about.cannot_rebuild;

  at("sample").addEventListener("change", () => show(Number(at("sample").value)));
  at("previous").addEventListener("click", () => show(state.sample - 1));
  at("next").addEventListener("click", () => show(state.sample + 1));
  for (const id of ["strategy", "budget", "visible"]) at(id).addEventListener(id === "visible" ? "input" : "change", drawMask);
  at("again").addEventListener("click", () => { state.seed += 1; drawMask(); });
  const set = (hidden) => { state.masked.fill(hidden); paintMask(); rebuild(); };
  at("all").addEventListener("click", () => set(false));
  at("none").addEventListener("click", () => set(true));
  at("block").addEventListener("change", () => state.token !== null && choose(state.token));
  at("controls").addEventListener("submit", (event) => event.preventDefault());
  show(0);
}

start();
