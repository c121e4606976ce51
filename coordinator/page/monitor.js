// The page: asks /api/state every two seconds and shows it. Peers' texts become text nodes, never markup.
"use strict";

const POLL_MS = 2000;
const TIMEOUT_MS = 8000;
const SVG = "http://www.w3.org/2000/svg";
const BACKBONES = ["base", "own", "fused"];
const AGREEMENT = {
  agrees: ["agrees", "good"], behind: ["behind", "warn"], differs: ["differs", "bad"], serves: ["entry point", ""],
};
// How grave: a conviction is red, what came in part or sits out is not, who went away has done nothing wrong.
const DROPPED = { "in part": "warn", "sits out": "warn", absent: "" };
const ROUNDS_SHOWN = 8;
const LISTED = 12;

const $ = (id) => document.getElementById(id);
let state = null;
let failures = 0;
let announcedRound = null;

// ---- small helpers

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function show(node, visible) {
  if (node.hidden === visible) node.hidden = !visible;
}

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function draw(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function ago(seconds) {
  if (seconds < 2) return "just now";
  return `${duration(seconds)} ago`;
}

function duration(seconds) {
  if (seconds < 120) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} d`;
}

function size(bytes) {
  let value = bytes;
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (value < 999.95) return `${value.toFixed(unit === "B" ? 0 : 1)} ${unit}`;
    value /= 1000;
  }
  return `${value.toFixed(1)} TB`;
}

function score(metric, value) {
  if (value === null || value === undefined) return "–";
  return metric === "accuracy" ? `${(100 * value).toFixed(1)} %` : value.toFixed(3);
}

function count(number, word) {
  return `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;
}

// ---- at a glance

function showRun(s) {
  document.title = `${s.run.name}, round ${s.state.round}`;
  setText($("run-name"), s.run.name);
  const number = s.run.num_parameters;
  const parameters = number < 1e5 ? number.toLocaleString("en") : `${(number / 1e6).toFixed(1)} M`;
  setText($("model"), `${s.run.model}, ${parameters} shared parameters`);
  setText($("round"), String(s.state.round));
  setText($("num-rounds"), `of ${s.run.num_rounds}`);
  $("run-progress").value = s.state.round / s.run.num_rounds;
  const when = s.state.committed_at === null
    ? `Waiting for the first round, begun ${ago(s.now - s.run.created_at)}.`
    : `${s.is_over ? "The run is over. Last" : "Last"} commit ${ago(s.now - s.state.committed_at)}.`;
  setText($("last-commit"), when);
  const phases = new Map();
  for (const peer of s.peers) {
    const key = peer.status === "live" ? (peer.phase === "serving" ? "entry point" : peer.phase) : peer.status;
    phases.set(key, (phases.get(key) || 0) + 1);
  }
  setText($("num-live"), String(s.state.num_live));
  setText($("phases"), [...phases].map(([name, number]) => `${number} ${name}`).join(", ") || "nobody yet");
  setText($("agreement"), s.state.num_live ? `${s.state.num_agreeing} of ${s.state.num_live}` : "–");
  setText($("state-short"), s.state.state_hash.slice(0, 12));
  const rest = [];
  if (s.state.num_behind) rest.push(`${s.state.num_behind} behind`);
  if (s.state.num_differing) rest.push(`${s.state.num_differing} with another state`);
  if (s.state.num_signatures) rest.push(`signed by ${s.state.num_signatures}, electorate ${s.state.num_electorate}`);
  setText($("signed-by"), rest.join(", "));
  setText($("bytes-sent"), size(s.traffic.bytes_sent));
  setText($("bytes-received"), `${size(s.traffic.bytes_received)} received, by all peers since they started`);
  setText($("digest"), s.run.digest);
  setText($("state-hash"), s.state.state_hash);
  setText($("commit"), s.state.round ? s.state.commit : "none yet");
  if (announcedRound !== null && s.state.round > announcedRound) setText($("announce"), `Round ${s.state.round} is committed.`);
  announcedRound = s.state.round;
}

// ---- peers

function who(entry) {
  const node = make("span", "who");
  if (entry.name) node.append(make("bdi", "", entry.name));
  const id = make("code", "", entry.short_id);
  id.title = entry.peer_id;
  node.append(id);
  return node;
}

function peerCells(peer, now) {
  const [agreement, tone] = AGREEMENT[peer.agreement] || [peer.agreement, ""];
  const live = peer.status === "live";
  const phase = make("span", "", live ? (peer.phase === "serving" ? "serves the run" : peer.phase) : peer.status);
  const progress = [];
  if (peer.progress !== null) {
    const bar = make("progress");
    bar.max = 1;
    bar.value = peer.progress;
    bar.setAttribute("aria-label", `${peer.phase}, ${Math.round(100 * peer.progress)} percent`);
    progress.push(bar);
  }
  if (!live) phase.className = "mark";
  return [
    ["Peer", "", [who(peer)]],
    ["Phase", "phase", [phase, ...progress]],
    ["Round", "num", [String(peer.round)]],
    ["Device", "", [make("bdi", "", peer.device || "–")]],
    ["Examples/s", "num", [peer.examples_per_second === null ? "–" : peer.examples_per_second.toFixed(1)]],
    ["Sent", "num", [peer.bytes_sent ? size(peer.bytes_sent) : "–"]],
    ["Received", "num", [peer.bytes_received ? size(peer.bytes_received) : "–"]],
    ["State", "", [make("span", `mark ${live ? tone : ""}`, agreement)]],
    ["Last seen", "num", [ago(now - peer.last_seen)]],
  ];
}

function showPeers(s) {
  const body = $("peers").tBodies[0];
  const rows = s.peers.map((peer) => {
    const row = make("tr", peer.status === "live" ? "" : peer.status);
    row.dataset.peer = peer.peer_id;
    for (const [label, className, children] of peerCells(peer, s.now)) {
      const cell = make("td", className);
      cell.dataset.label = label;
      cell.append(...children);
      row.append(cell);
    }
    return row;
  });
  body.replaceChildren(...rows);
  show($("peers"), rows.length > 0);
  show($("peers-empty"), rows.length === 0);
  show($("peers-more"), s.num_peers_left_out > 0);
  setText($("peers-more"), `and ${s.num_peers_left_out} more`);
}

// ---- charts

function ticks(low, high, number) {
  const step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000, 20000, 100000, 500000, 1000000]
    .find((candidate) => (high - low) / candidate <= number) || high - low;
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high; value += step) found.push(value);
  return found;
}

function niceTicks(low, high, number) {
  const raw = (high - low) / number || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((m) => m * power >= raw) * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-6; i += 1) found.push(i * step);
  return found;
}

/* series: [{name, points: [[x, y], ...], className}], in units of x and y. */
function chart(host, label, series, { xTicks, yTicks, xText, yText, x, y }) {
  const width = Math.max(240, host.clientWidth), height = 240;
  const left = 52, right = 14, top = 12, bottom = 26;
  const px = (value) => left + ((value - x[0]) / (x[1] - x[0] || 1)) * (width - left - right);
  const py = (value) => height - bottom - ((value - y[0]) / (y[1] - y[0] || 1)) * (height - top - bottom);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label, preserveAspectRatio: "none" });
  for (const value of yTicks) {
    svg.append(draw("line", { class: "grid", x1: left, x2: width - right, y1: py(value), y2: py(value) }));
    svg.append(draw("text", { x: left - 8, y: py(value) + 4, "text-anchor": "end" }, yText(value)));
  }
  for (const value of xTicks) {
    svg.append(draw("text", { x: px(value), y: height - 6, "text-anchor": "middle" }, xText(value)));
  }
  for (const { points, className } of series) {
    if (points.length > 1) {
      const path = points.map(([a, b], i) => `${i ? "L" : "M"}${px(a).toFixed(1)} ${py(b).toFixed(1)}`).join("");
      svg.append(draw("path", { class: `line ${className}`, d: path }));
    }
  }
  for (const { points, className, dotClass, title } of series) {
    if (points.length > 60) continue;
    points.forEach(([a, b], i) => {
      if (dotClass && dotClass(i) === null) return;
      const extra = dotClass ? dotClass(i) : "";
      const dot = draw("circle", { class: `dot ${className} ${extra}`, cx: px(a), cy: py(b), r: 3.8 });
      if (title) dot.append(draw("title", {}, title(i)));
      svg.append(dot);
    });
  }
  return svg;
}

function legend(entries) {
  const node = make("div", "legend");
  for (const [className, text] of entries) {
    const item = make("span");
    const swatch = draw("svg", { viewBox: "0 0 30 10", "aria-hidden": "true" });
    swatch.append(draw("line", { class: `line ${className}`, x1: 1, x2: 29, y1: 5, y2: 5 }));
    item.append(swatch, text);
    node.append(item);
  }
  return node;
}

/* What is drawn: of one peer, or the mean of those that shared the metric in a round. */
function scoreLines(metrics, choice) {
  const [kind, key] = [choice.slice(0, 5), choice.slice(5)];
  const chosen = metrics.filter((m) => (kind === "peer:" ? m.peer_id === key : m.metric === key));
  const rounds = new Map();
  for (const entry of chosen) rounds.set(entry.round, [...(rounds.get(entry.round) || []), entry]);
  return BACKBONES.map((backbone) => {
    const points = [];
    for (const [round, entries] of [...rounds].sort((a, b) => a[0] - b[0])) {
      const values = entries.map((e) => e[backbone]).filter((v) => v !== null);
      if (values.length) points.push([round, values.reduce((a, b) => a + b, 0) / values.length]);
    }
    return { name: backbone, className: backbone, points };
  });
}

function showChoices(s) {
  const choices = new Map();
  for (const m of s.metrics) choices.set(`mean:${m.metric}`, `all who share ${m.metric}`);
  for (const m of s.metrics) choices.set(`peer:${m.peer_id}`, m.name ? `${m.name} (${m.short_id})` : m.short_id);
  const select = $("whose");
  const known = [...select.options].map((o) => `${o.value}\n${o.textContent}`).join("\n");
  if (known !== [...choices].map(([value, text]) => `${value}\n${text}`).join("\n")) {
    const before = select.value;
    select.replaceChildren(...[...choices].map(([value, text]) => {
      const option = make("option", "", text);
      option.value = value;
      return option;
    }));
    if (choices.has(before)) select.value = before;
  }
  show($("whose-label"), choices.size > 2);
}

/* A mean of other peers than before moves by itself: that must be said beside it. */
function aboutMean(metrics, metric) {
  const rounds = new Map();
  for (const m of metrics) {
    if (m.metric === metric) rounds.set(m.round, [...(rounds.get(m.round) || []), m.peer_id]);
  }
  const groups = new Set([...rounds.values()].map((peers) => peers.sort().join()));
  const sizes = [...rounds.values()].map((peers) => peers.length);
  const low = Math.min(...sizes), high = Math.max(...sizes);
  const text = `mean ${metric} of ${low === high ? count(high, "peer") : `${low} to ${high} peers`}, each on its own held-out data`;
  return groups.size > 1 ? `${text}; not the same peers in all rounds` : text;
}

function showScores(s) {
  showChoices(s);
  const series = s.metrics.length ? scoreLines(s.metrics, $("whose").value) : [];
  const values = series.flatMap((line) => line.points.map((p) => p[1]));
  show($("scores-empty"), values.length === 0);
  show($("scores-chart"), values.length > 0);
  show($("scores-about"), values.length > 0);
  if (!values.length) return;
  const kind = $("whose").value;
  const metric = s.metrics.find((m) => (kind.startsWith("peer:") ? m.peer_id === kind.slice(5) : m.metric === kind.slice(5))).metric;
  setText($("scores-about"), kind.startsWith("peer:") ? `${metric} on its own held-out data` : aboutMean(s.metrics, metric));
  const low = Math.min(...values), high = Math.max(...values), margin = Math.max(0.01, 0.12 * (high - low));
  const rounds = series.flatMap((line) => line.points.map((p) => p[0]));
  const x = [Math.min(...rounds), Math.max(...rounds)], y = [low - margin, Math.min(1, high + margin)];
  if (x[0] === x[1]) { x[0] -= 1; x[1] += 1; }
  for (const line of series) line.title = (i) => `round ${line.points[i][0]}: ${line.name} ${score(metric, line.points[i][1])}`;
  const last = series.map((line) => `${line.name} ${score(metric, line.points.length ? line.points[line.points.length - 1][1] : null)}`);
  const svg = chart($("scores-chart"), `Scores by round; the last: ${last.join(", ")}`, series, {
    x, y, xTicks: ticks(Math.max(1, x[0]), x[1], 10), yTicks: niceTicks(y[0], y[1], 5),
    xText: (v) => String(v), yText: (v) => (metric === "accuracy" ? `${+(100 * v).toFixed(1)} %` : String(+v.toFixed(3))),
  });
  $("scores-chart").replaceChildren(svg, legend(series.map((line, i) => [line.className, last[i]])));
}

function showPace(s) {
  const rounds = s.rounds;
  show($("pace-empty"), rounds.length === 0);
  show($("pace-chart"), rounds.length > 0);
  show($("pace-about"), rounds.length > 0);
  if (!rounds.length) return;
  const first = rounds[0];
  const begun = first.committed_at - first.seconds;
  const points = [[0, first.round - 1]];
  for (const entry of rounds) {
    points.push([entry.committed_at - begun, points[points.length - 1][1]], [entry.committed_at - begun, entry.round]);
  }
  if (!s.is_over) points.push([Math.max(s.now - begun, points[points.length - 1][0]), points[points.length - 1][1]]);
  const took = rounds.map((r) => r.seconds).sort((a, b) => a - b);
  const middle = took[Math.floor(took.length / 2)];
  const end = points[points.length - 1][0];
  setText($("pace-about"), `a round takes ${duration(middle)} (median of ${rounds.length})`);
  const [unit, per] = end < 180 ? ["s", 1] : end < 10800 ? ["min", 60] : end < 259200 ? ["h", 3600] : ["d", 86400];
  const last = rounds[rounds.length - 1].round;
  const svg = chart($("pace-chart"), `${last} rounds in ${duration(end)}`, [{
    name: "rounds", className: "pace", points,
    dotClass: (i) => (i > 0 && i % 2 === 0 && i / 2 <= rounds.length ? (rounds[i / 2 - 1].kind === "rollback" ? "rollback" : "") : null),
    title: (i) => { const r = rounds[i / 2 - 1]; return `round ${r.round}: ${r.kind === "rollback" ? "a roll-back" : count(r.num_peers, "peer")}, took ${duration(r.seconds)}`; },
  }], {
    x: [0, end], y: [first.round - 1, last + 0.3],
    xTicks: niceTicks(0, end / per, 5).map((v) => v * per), yTicks: ticks(first.round - 1, last, 6),
    xText: (v) => `${+(v / per).toFixed(2)} ${unit}`, yText: (v) => String(v),
  });
  $("pace-chart").replaceChildren(svg);
}

// ---- rounds, who was dropped, who is in

function showRounds(s) {
  const latest = s.rounds.slice(-ROUNDS_SHOWN).reverse();
  $("rounds").tBodies[0].replaceChildren(...latest.map((entry) => {
    const row = make("tr");
    const fused = entry.kind === "fuse";
    const hash = make("code", "", entry.state_hash.slice(0, 8));
    hash.title = entry.state_hash;
    const peers = make("td", "num", fused ? String(entry.num_peers) : "");
    if (!fused) { peers.append(make("span", "mark bad", "undone")); peers.title = entry.reason; }
    const state = make("td");
    state.append(hash);
    row.append(
      make("td", "", String(entry.round)), peers,
      make("td", "num", fused ? entry.num_examples.toLocaleString("en") : "–"),
      make("td", "num", duration(entry.seconds)),
      make("td", "num", `${entry.num_signatures} / ${entry.num_electorate}`), state,
    );
    return row;
  }));
  show($("rounds"), latest.length > 0);
  show($("rounds-empty"), latest.length === 0);
}

function list(id, entries, build) {
  const shown = entries.slice(0, LISTED).map((entry) => {
    const item = make("li");
    item.append(...build(entry));
    return item;
  });
  if (entries.length > LISTED) shown.push(make("li", "why", `and ${entries.length - LISTED} more`));
  $(id).replaceChildren(...shown);
  show($(id), shown.length > 0);
  show($(`${id}-empty`), shown.length === 0);
}

function showLists(s) {
  const undone = s.rounds.filter((r) => r.kind === "rollback").map((r) => ({ round: r.round, what: "rolled back", reason: r.reason }));
  const dropped = [...s.dropped, ...undone].sort((a, b) => b.round - a.round);
  list("dropped", dropped, (entry) => [
    make("span", "quiet", `round ${entry.round}`), ...(entry.peer_id ? [who(entry)] : []),
    make("span", `mark ${DROPPED[entry.what] ?? "bad"}`, entry.what), make("bdi", "why", entry.reason),
  ]);
  list("contributors", s.contributors, (entry) => [
    who(entry), make("span", "why", `${count(entry.num_examples, "example")}, weight ${+entry.weight.toFixed(3)}${entry.factor < 1 ? `, cut to ${Math.round(100 * entry.factor)} %` : ""}`),
  ]);
}

function showSpec(s) {
  const shown = Object.entries(s.run.spec).map(([key, value]) => `${key}\n${value}`).join("\n");
  if ($("spec").dataset.shown === shown) return;
  $("spec").replaceChildren(...Object.entries(s.run.spec).flatMap(([key, value]) => {
    const text = make("dd");
    text.append(make("code", "", key === "created_at" ? new Date(1000 * value).toISOString() : String(value)));
    return [make("dt", "", key.replaceAll("_", " ")), text];
  }));
  $("spec").dataset.shown = shown;
}

// ---- the loop

const SECTIONS = {
  "at a glance": showRun, peers: showPeers, scores: showScores, "rounds over time": showPace, "latest rounds": showRounds,
  dropped: showLists, spec: showSpec,
};

/* A section that cannot be drawn hides no other: it keeps what it showed before, and the notice names it. */
function render() {
  if (!state) return;
  const failed = [];
  for (const name of Object.keys(SECTIONS)) {
    try {
      SECTIONS[name](state);
    } catch (error) {
      console.warn(`${name}:`, error);
      failed.push(name);
    }
  }
  const told = [state.problem, failed.length && `This page cannot show what it was told of: ${failed.join(", ")}.`].filter(Boolean);
  setText($("notice"), told.join(" "));
  show($("notice"), told.length > 0);
}

function showLink(ok) {
  const pill = $("link-state");
  const over = ok && state && state.is_over;
  setText(pill, ok ? (over ? "run is over" : "live") : failures > 1 ? "monitor does not answer" : "connecting");
  pill.className = `pill ${ok ? (over ? "" : "good") : failures > 1 ? "bad" : ""}`;
}

async function poll() {
  try {
    const reply = await fetch("api/state", { signal: AbortSignal.timeout(TIMEOUT_MS), cache: "no-store" });
    if (!reply.ok) throw new Error(`status ${reply.status}`);
    state = await reply.json();
    failures = 0;
    render();
    showLink(true);
  } catch (error) {
    failures += 1;
    console.warn("no state:", error);
    showLink(false);
  }
  setTimeout(poll, POLL_MS);
}

$("whose").addEventListener("change", render);
new ResizeObserver(render).observe(document.querySelector("main"));
poll();
