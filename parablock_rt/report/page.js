"use strict";
// Puts the data into the page: which runs are shown, which one is shown in detail, and every section of them.

const STAGES = {
  compute: "compute", apply: "apply aggregate", exposed: "exposed: waits for communication or other clients",
  encode: "encode", copy: "copy device to host", send: "send", fold: "server fold", wait: "wait for other clients", receive: "receive",
};
const TRAINING = ["compute", "apply", "exposed"];
const DASHES = ["", "7 4", "2 3", "10 3 2 3", "4 2", "1 4"];
const MOST_BARS = 60;

const HEADLINE = [
  ["overlap_efficiency", "of the communication hidden", format.percent],
  ["wall_s", "wall time", format.seconds],
  ["compute_s", "computing, a client", format.seconds],
  ["exposed_comm_s", "waiting for communication, a client", format.seconds],
  ["waited_for_others_s", "waiting for other clients, a client", format.seconds],
  ["bytes_up", "sent by clients", format.bytes],
  ["bytes_down", "sent to clients", format.bytes],
  ["eval_loss_after", "held-out loss at the end", format.loss],
];

const SHOWN_AS = {
  overlap_efficiency: format.percent, bytes_up: format.bytes, bytes_down: format.bytes, bytes_as_bf16: format.bytes,
  snapshot_bytes: format.bytes,
  eval_loss_before: format.loss, eval_loss_after: format.loss, train_loss_last: format.loss,
};

const content = JSON.parse(document.getElementById("data").textContent);
const runs = content.runs;
const state = { shown: new Set(runs.keys()), detail: runs.length - 1 };
const at = (id) => document.getElementById(id);
const color = (index) => `var(--run${index % 6})`;
const shownRuns = () => [...runs.entries()].filter(([index]) => state.shown.has(index));

const timeline = new Timeline(at("timeline"), {
  onView: (from, to) => { at("timeline-range").textContent = `${format.seconds(from)} to ${format.seconds(to)}`; },
});

function chooser() {
  if (runs.length < 2) return;
  const boxes = runs.map((run, index) => {
    const box = element("input", { type: "checkbox", value: index, style: `--swatch: ${color(index)}` });
    box.checked = true;
    box.addEventListener("change", () => {
      if (box.checked) state.shown.add(index);
      else if (state.shown.size > 1) state.shown.delete(index);
      else box.checked = true; // one run at least
      if (!state.shown.has(state.detail)) detail([...state.shown].sort()[0]);
      showSelection();
    });
    return element("label", {}, box, run.name);
  });
  const select = element("select", { id: "detail" }, ...runs.map((run, index) => element("option", { value: index }, run.name)));
  select.value = state.detail;
  select.addEventListener("change", () => {
    state.shown.add(Number(select.value));
    boxes[Number(select.value)].firstChild.checked = true;
    detail(Number(select.value));
    showSelection();
  });
  at("runs").append(...boxes, element("label", { class: "in-detail" }, "in detail:", select));
}

function detail(index) {
  state.detail = index;
  if (at("detail")) at("detail").value = index;
  const run = runs[index];
  for (const place of document.querySelectorAll("[data-focus]")) place.textContent = runs.length > 1 ? run.name : "";
  showHeadline(run);
  showTimeline(run);
  showStages(run);
  showActivity(run);
  showTelemetry(run);
  showClients(run);
}

function showSelection() {
  at("verdict").replaceChildren(...shownRuns().map(([, run]) =>
    element("p", {}, ...(runs.length > 1 ? [element("b", {}, `${run.name}:`)] : []), run.verdict)));
  showLoss();
  showBytes();
  showFigures();
  showNotes();
}

function showHeadline(run) {
  at("headline").replaceChildren(...HEADLINE.filter(([key]) => isNumber(run.summary[key])).map(([key, label, show]) =>
    element("div", { class: "tile", "data-key": key }, element("b", {}, show(run.summary[key])), element("span", {}, label))));
}

function legend(place, entries) {
  place.replaceChildren(...entries.map(([name, fill]) => element("span", {}, element("i", { style: `background: ${fill}` }), name)));
}

function showTimeline(run) {
  const { timeline: data } = run;
  if (data.start.length > 0) {
    if (!timeline.canvas.isConnected) at("timeline").replaceChildren(timeline.canvas);
    timeline.show(data);
  } else {
    at("timeline").replaceChildren(element("p", { class: "none" }, "This run recorded no timeline."));
    at("timeline-range").textContent = "";
  }
  const stages = new Set(data.labels.map(([, stage]) => stage));
  const names = { ...STAGES, upload: "upload, seen by the server", update: "update, seen by the server", close: "server closes the round" };
  legend(at("timeline-legend"), Object.keys(names).filter((stage) => stages.has(stage)).map((stage) => [names[stage], `var(--${stage})`]));
}

// At most MOST_BARS groups: neighbours are averaged.
function showStages(run) {
  const rounds = run.rounds.filter((round) => Object.keys(round.stages).length > 0);
  const size = Math.max(1, Math.ceil(rounds.length / MOST_BARS));
  const groups = [];
  const used = new Set();
  for (let i = 0; i < rounds.length; i += size) {
    const some = rounds.slice(i, i + size);
    const stack = (stages) => stages.flatMap((stage) => {
      const values = some.map((round) => round.stages[stage]).filter(isNumber);
      if (values.length === 0) return [];
      used.add(stage);
      const value = values.reduce((sum, each) => sum + each, 0) / some.length;
      return [{ name: STAGES[stage], value, color: `var(--${stage})`, striped: stage === "exposed" }];
    });
    const name = size === 1 ? `${some[0].round + 1}` : `${some[0].round + 1}–${some[some.length - 1].round + 1}`;
    groups.push({ name, stacks: [stack(TRAINING), stack(Object.keys(STAGES).filter((stage) => !TRAINING.includes(stage)))] });
  }
  charts.stacks(at("stages"), groups, { x: "round", y: "seconds" });
  legend(at("stages-legend"), Object.keys(STAGES).filter((stage) => used.has(stage)).map((stage) => {
    const fill = `var(--${stage})`;
    return [STAGES[stage], stage === "exposed" ? `repeating-linear-gradient(45deg, ${fill} 0 4px, var(--card) 4px 6px)` : fill];
  }));
}

function withLegend(host, series, options) {
  const chart = element("div");
  const names = element("div", { class: "legend" }, ...series.map((each) => {
    const sample = shape("svg", { width: 22, height: 8 }, shape("path", { d: "M0 4H22", stroke: each.color, "stroke-width": 2.4, "stroke-dasharray": each.dash ?? "" }));
    return element("span", {}, sample, each.name);
  }));
  host.replaceChildren(chart, names);
  charts.lines(chart, series, options);
}

function showActivity(run) {
  const colors = { compute: "compute", "link up": "send", "link down": "receive" };
  const series = Object.entries(run.activity?.series ?? {}).map(([name, values]) => ({
    name, color: `var(--${colors[name]})`, points: values.map((value, bin) => [(bin + 0.5) * run.activity.bin_s, 100 * value]),
  }));
  charts.strips(at("activity"), series, { x: "seconds", show: (value) => format.percent(value / 100) });
}

function showTelemetry(run) {
  for (const [kind, y, show] of [["gpu", "%", (v) => `${v.toFixed(0)} %`], ["link", "MB/s", (v) => `${v.toFixed(2)} MB/s`]]) {
    const series = run.telemetry.filter((each) => each.kind === kind).map((each, i) => ({ name: each.name, color: color(i), dash: DASHES[i % 6], points: each.points }));
    at(`${kind}-card`).hidden = series.length === 0;
    if (series.length > 0) withLegend(at(kind), series, { x: "seconds", y, low: 0, high: kind === "gpu" ? 104 : undefined, show });
  }
}

function showClients(run) {
  if (run.clients.length === 0) {
    at("clients").replaceChildren(element("p", { class: "none" }, "What single clients took is in the server's folder alone, from this release on."));
    return;
  }
  const latest = Math.max(...run.clients.map((client) => client.late_s ?? 0)) || 1;
  const head = ["client", "rounds", "computing", "waiting", "behind the first", ""].map((name) => element("th", {}, name));
  const rows = run.clients.map((client) => {
    const bar = element("i", { style: `background: var(--wait); width: ${(100 * (client.late_s ?? 0)) / latest}%` });
    const cells = [client.client, client.rounds, format.seconds(client.compute_s), format.seconds(client.exposed_s), format.seconds(client.late_s)];
    return element("tr", {}, ...cells.map((text) => element("td", {}, String(text))), element("td", { class: "bar" }, bar));
  });
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
  at("clients").replaceChildren(element("p", { class: "explain" }, "Means over a client's rounds, slowest first. Waiting is that before and in a round: what follows the last one is in the run's figures alone."), element("div", { class: "scroll" }, table));
}

const seriesOf = (pick) => shownRuns().map(([index, run]) => ({
  name: run.name, color: color(index), dash: DASHES[index % 6], points: run.rounds.map((round) => [round.round + 1, pick(round)]),
})).filter((each) => each.points.some((point) => isNumber(point[1])));

function showLoss() {
  withLegend(at("loss"), seriesOf((round) => round.loss ?? null), { x: "round", y: "loss", show: format.loss });
}

function showBytes() {
  const sum = (round) => (isNumber(round.bytes_up) && isNumber(round.bytes_down) ? (round.bytes_up + round.bytes_down) / 1e6 : null);
  withLegend(at("bytes"), seriesOf(sum), { x: "round", y: "MB", low: 0, show: (value) => format.bytes(value * 1e6) });
}

function showFigures() {
  const picked = shownRuns();
  const keys = [...new Set(picked.flatMap(([, run]) => Object.keys(run.summary)))].filter((key) => {
    const values = picked.map(([, run]) => run.summary[key]);
    return values.some((value) => typeof value !== "object" || value === null);
  });
  const text = (key, value) => {
    if (isNumber(value)) return (SHOWN_AS[key] ?? (key.endsWith("_s") ? format.seconds : format.count))(value);
    return format.any(value);
  };
  const head = element("tr", {}, element("th", {}, ""), ...picked.map(([, run]) => element("th", {}, run.name)));
  const rows = keys.map((key) => element("tr", { "data-key": key }, element("td", {}, key.replace(/_s$/, "").replaceAll("_", " ")),
    ...picked.map(([, run]) => element("td", {}, text(key, run.summary[key])))));
  at("figures").replaceChildren(element("div", { class: "scroll" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows))));
}

function showNotes() {
  const withNotes = shownRuns().filter(([, run]) => run.notes.length > 0);
  at("notes-card").hidden = withNotes.length === 0;
  at("notes").replaceChildren(...withNotes.flatMap(([, run]) => [
    ...(runs.length > 1 ? [element("h3", {}, run.name)] : []), element("ul", {}, ...run.notes.map((note) => element("li", {}, note))),
  ]));
}

for (const button of document.querySelectorAll("[data-zoom]")) {
  const act = { in: () => timeline.zoom(0.5), out: () => timeline.zoom(2), all: () => timeline.setView(0, timeline.end) };
  button.addEventListener("click", act[button.dataset.zoom]);
}
document.querySelector("footer").textContent = `Made by ParaBlock-RT ${content.release}. Times are seconds of one monotonic clock; figures are those of summary.json.`;
chooser();
detail(state.detail);
showSelection();
document.body.dataset.ready = "yes";
