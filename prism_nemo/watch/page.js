// The live page of `prism-nemo watch`. All text from the run goes through textContent; nothing is ever made from markup.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 440, HEIGHT = 180, LEFT = 58, RIGHT = 10, TOP = 8, BOTTOM = 24;
const EVERY = 2000;
const at = (id) => document.getElementById(id);
let chosen = new URLSearchParams(location.search).get("run") || "";
let shown = "";
let listed = "";
let lost = 0;

function make(name, attributes = {}, text = null, svg = false) {
  const element = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== null) element.textContent = text;
  return element;
}

function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e15) return value.toLocaleString("en");
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return value.toLocaleString("en", { maximumSignificantDigits: 4 });
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const s = Math.round(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

function ticks(low, high, wanted) {
  const raw = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= raw);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) {
    found.push(Math.abs(value) < step * 1e-9 ? 0 : value);
  }
  return found;
}

// A chart: the band between lowest and highest value of each bucket, and their middle as a line.
function curve(chart) {
  const points = chart.series.flatMap((one) => one.points);
  const known = points.filter((point) => point[1] !== null);
  const card = make("figure", { class: "card" });
  const heading = make("h2", {}, chart.title);
  heading.className = "chart-title";
  if (chart.unit) heading.append(" ", make("span", { class: "unit" }, chart.unit));
  card.append(heading);
  if (!known.length) {
    card.append(make("p", { class: "absent" }, "no finite value yet"));
    return card;
  }
  let low = Math.min(...known.map((point) => point[1])), high = Math.max(...known.map((point) => point[2]));
  if (low === high) { low -= Math.abs(low) * 0.05 || 0.5; high += Math.abs(high) * 0.05 || 0.5; }
  const first = Math.min(...points.map((point) => point[0]));
  const last = Math.max(...points.map((point) => point[0]), first + 1);
  const x = (step) => LEFT + ((step - first) / (last - first)) * (WIDTH - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - ((value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const spoken = chart.series.map((one) => `${one.label} ${number(one.newest)}`).join(", ");
  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "curve", role: "img" }, null, true);
  svg.setAttribute("aria-label", `${chart.title} over steps ${first} to ${last}; newest: ${spoken}`);
  for (const value of ticks(low, high, 5)) {
    svg.append(make("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value), class: "gridline" }, null, true));
    svg.append(make("text", { x: LEFT - 6, y: y(value) + 4, class: "tick", "text-anchor": "end" }, number(value), true));
  }
  for (const step of ticks(first, last, 5)) {
    svg.append(make("text", { x: x(step), y: HEIGHT - 6, class: "tick", "text-anchor": "middle" }, number(step), true));
  }
  const legend = make("ul", { class: "legend" });
  chart.series.forEach((one, place) => {
    const group = make("g", { class: `c${place % 6}` }, null, true);
    for (const part of runs(one.points)) {
      const up = part.map((point) => `${x(point[0]).toFixed(1)} ${y(point[2]).toFixed(1)}`);
      const down = part.map((point) => `${x(point[0]).toFixed(1)} ${y(point[1]).toFixed(1)}`).reverse();
      const middle = part.map((point) => `${x(point[0]).toFixed(1)} ${y((point[1] + point[2]) / 2).toFixed(1)}`);
      if (part.length === 1) {
        group.append(make("circle", { cx: x(part[0][0]), cy: y(part[0][2]), r: 2.5, class: "dot" }, null, true));
      } else {
        group.append(make("path", { d: `M${up.join("L")}L${down.join("L")}Z`, class: "band" }, null, true));
        group.append(make("path", { d: `M${middle.join("L")}`, class: `line d${Math.floor(place / 6) % 3}` }, null, true));
      }
    }
    svg.append(group);
    legend.append(make("li", { class: `c${place % 6}` }, `${one.label} ${number(one.newest)}`));
  });
  const readout = make("p", { class: "readout" });
  const cursor = make("line", { y1: TOP, y2: HEIGHT - BOTTOM, class: "cursor", visibility: "hidden" }, null, true);
  svg.append(cursor);
  const places = [...new Set(points.map((point) => point[0]))].sort((one, other) => one - other);
  let place = places.length - 1;
  const point = (step) => {
    const near = chart.series.map((one) => [one.label, nearest(one.points, step)]);
    cursor.setAttribute("x1", x(near[0][1][0]));
    cursor.setAttribute("x2", x(near[0][1][0]));
    cursor.setAttribute("visibility", "visible");
    readout.textContent = near.map(([label, one]) => `step ${number(one[0])}: ${label} ${range(one)}`).join("; ");
  };
  const away = () => { cursor.setAttribute("visibility", "hidden"); readout.textContent = ""; };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const across = (((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT);
    point(first + across * (last - first));
  });
  svg.addEventListener("pointerleave", away);
  // The same with the arrow keys.
  svg.setAttribute("tabindex", "0");
  svg.addEventListener("blur", away);
  svg.addEventListener("keydown", (event) => {
    const moved = { ArrowLeft: -1, ArrowRight: 1, Home: -places.length, End: places.length }[event.key];
    if (moved === undefined) return;
    event.preventDefault();
    place = Math.min(places.length - 1, Math.max(0, place + moved));
    point(places[place]);
  });
  card.append(svg, legend, readout);
  return card;
}

function range(point) {
  if (point[1] === null) return "not finite";
  return point[1] === point[2] ? number(point[1]) : `${number(point[1])} to ${number(point[2])}`;
}

function nearest(points, step) {
  return points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));
}

function runs(points) {
  const parts = [[]];
  for (const point of points) {
    if (point[1] === null) parts.push([]);
    else parts[parts.length - 1].push(point);
  }
  return parts.filter((part) => part.length);
}

function tile(name, value) {
  const box = make("div");
  box.append(make("span", {}, name), make("b", {}, value));
  return box;
}

function rollout(one) {
  const card = make("article", { class: "card" });
  const verdict = one.failure ? `no verdict: ${one.failure}` : `reward ${number(one.reward)}`;
  card.append(make("h3", {}, `${one.task}, step ${number(one.step)}: ${verdict}`));
  for (const [name, text] of [["Prompt", one.prompt], ["Response", one.response], ["Expected", one.answer]]) {
    card.append(make("p", { class: "quiet" }, name), make("p", { class: "said", dir: "auto" }, text));
  }
  return card;
}

function fill(id, parts) {
  const section = at(id);
  section.replaceChildren(...parts);
  section.hidden = parts.length === 0;
}

function choices(state) {
  return state.runs.map((one) => {
    const option = make("option", { value: one.name }, `${one.name} (${one.stage || "not started"}, ${one.state})`);
    option.selected = state.run !== null && one.name === state.run.name;
    return option;
  });
}

function show(state) {
  const run = state.run;
  at("choice").hidden = state.runs.length < 2;
  const list = JSON.stringify([state.runs, run && run.name]);
  if (list !== listed) {  // a list that is made anew while it is open would close
    listed = list;
    at("runs").replaceChildren(...choices(state));
  }
  fill("problems", [...(state.problem ? [state.problem] : []), ...(run ? run.problems : [])]
    .map((problem) => make("p", { class: "problem" }, problem)));
  if (run === null) {
    at("title").textContent = state.problem ? "Nothing to show" : "Waiting for the first step";
    for (const id of ["numbers", "charts", "rollouts", "events"]) fill(id, []);
    say(state.problem ? "" : "the directory is there, and nothing has been logged yet");
    return;
  }
  const of = run.steps === null ? "" : ` of ${number(run.steps)}`;
  at("where").textContent = `prism-nemo watch · ${run.name} · ${run.stage || "stage"}`;
  at("title").textContent = run.charts.length ? `Step ${number(run.step)}${of}` : "Waiting for the first step";
  document.title = `${run.step}${of} ${run.name}`;
  at("done").style.setProperty("width", run.steps ? `${Math.min(100, (100 * run.step) / run.steps)}%` : "0");
  say(run.state === "running" ? "" : `the run is not going on: ${run.state}`);
  fill("numbers", [
    tile("state", run.state),
    tile("time left", duration(run.seconds_left)),
    tile("tokens/s", number(run.tokens_per_second === null ? null : Math.round(run.tokens_per_second))),
    ...(run.mfu === null ? [] : [tile("MFU", `${(100 * run.mfu).toFixed(1)} %`)]),
    ...(run.memory_gb === null ? [] : [tile("memory", `${run.memory_gb.toFixed(2)} GB`)]),
    tile("last checkpoint", run.checkpoint_step === null ? "none" : `step ${number(run.checkpoint_step)}`),
    tile("restarts", number(run.restarts)),
    ...(run.skipped_steps === null ? [] : [tile("skipped steps", number(run.skipped_steps))]),
    ...(run.job ? [tile("job", run.job)] : []),
  ]);
  // Not under the reader's pointer or keyboard: what is read would move away.
  if (!at("charts").matches(":hover, :focus-within")) fill("charts", run.charts.map(curve));
  const answers = make("div", { class: "list" });
  answers.append(...run.rollouts.map(rollout));
  fill("rollouts", run.rollouts.length ? [make("h2", {}, "Latest rollouts"), answers] : []);
  const said = make("ul");
  said.append(...run.events.map((event) => make("li", {}, event)));
  fill("events", run.events.length ? [make("h2", {}, "Events"), said] : []);
}

// Said once: a screen reader would otherwise hear it every two seconds.
function say(text, bad = false) {
  const line = at("says");
  if (line.textContent !== text) line.textContent = text;
  line.classList.toggle("bad", bad);
}

async function look() {
  try {
    const answer = await fetch(`/state.json?run=${encodeURIComponent(chosen)}`, { cache: "no-store" });
    if (!answer.ok) throw new Error(String(answer.status));
    const text = await answer.text();
    // A page that is drawn anew under the pointer cannot be read.
    if (text !== shown) { shown = text; show(JSON.parse(text)); }
    lost = 0;
  } catch {
    lost += 1;
    shown = "";
    say("prism-nemo watch has stopped; what is shown is old. Start it again and reload", true);
  }
  setTimeout(look, EVERY * Math.min(10, 1 + lost));
}

at("runs").addEventListener("change", (event) => {
  chosen = event.target.value;
  shown = "";
});
look();
