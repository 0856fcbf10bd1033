"use strict";
(() => {
  const films = JSON.parse(document.getElementById("data").textContent);
  const by = (id) => document.getElementById(id);
  const svg = by("graph");
  const R = 8;
  const state = { film: 0, at: 0, most: 60, pin: null, hover: null, timer: 0 };

  const film = () => films[state.film];
  const step = (i = state.at) => film().steps[i];
  const looked = () => state.pin ?? state.hover;

  function make(parent, name, attributes, text) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  }

  const key = (edge) => `${edge[0]}>${edge[1]}`;

  function changes() {
    const shown = step().edges.slice(0, state.most);
    const before = state.at ? step(state.at - 1).edges.slice(0, state.most) : [];
    const was = new Set(before.map(key));
    const is = new Set(shown.map(key));
    return {
      shown: shown.map((edge) => ({ edge, kind: state.at && was.has(key(edge)) ? "stays" : "comes" })),
      gone: before.filter((edge) => !is.has(key(edge))),
    };
  }

  function scale() {
    const width = Math.max(svg.clientWidth || 0, 280);
    const left = 62, lane = (width - left - 3 * R - 18) / 2;
    const levels = film().levels.length;
    const line = Math.max(18, Math.min(30, 900 / levels));
    const height = (levels + 1) * line + 22;
    return {
      width, height, lane, left,
      x: (node) => left + R + node[1] * (lane + 18) + node[2] * (lane - R),
      y: (node) => height - 26 - node[3] * line,
      row: (level) => height - 26 - level * line,
    };
  }

  function path(s, a, b, bent) {
    const [x0, y0, x1, y1] = [s.x(a), s.y(a), s.x(b), s.y(b)];
    return `M${x0} ${y0}Q${(x0 + x1) / 2 + bent * s.lane} ${(y0 + y1) / 2} ${x1} ${y1}`;
  }

  function frame(s) {
    svg.setAttribute("viewBox", `0 0 ${s.width} ${s.height}`);
    svg.setAttribute("height", s.height);
    film().levels.forEach((name, i) => {
      make(svg, "line", { class: "row", x1: s.left, x2: s.width, y1: s.row(i), y2: s.row(i) });
      make(svg, "text", { x: 0, y: s.row(i) + 3 }, name);
    });
    const middle = s.left + s.lane + R + 5;
    make(svg, "line", { class: "row", x1: middle, x2: middle, y1: 0, y2: s.height - 16 });
    make(svg, "text", { x: s.left, y: s.height - 4 }, "needle's rows");
    make(svg, "text", { x: middle + 8, y: s.height - 4 }, "step's row");
  }

  function draw() {
    const { shown, gone } = changes();
    const s = scale();
    const nodes = film().nodes;
    const largest = Math.abs(step().edges[0]?.[2] || 1);
    const seen = new Set([...shown.flatMap(({ edge }) => [edge[0], edge[1]]), ...step().ringed]);
    const its = (edge) => (looked() !== null && (edge[0] === looked() || edge[1] === looked()) ? " its" : "");
    svg.replaceChildren();
    svg.classList.toggle("pinned", looked() !== null);
    frame(s);
    const line = (edge, kind, width) =>
      make(svg, "path", {
        class: `edge ${kind}${its(edge)}`, "stroke-width": width.toFixed(2), d: path(s, nodes[edge[0]], nodes[edge[1]], edge[3]),
      });
    gone.forEach((edge) => line(edge, "goes", 1.2));
    step().links.filter(([a, b]) => seen.has(a) && seen.has(b)).forEach((edge) =>
      make(svg, "path", { class: `link${its(edge)}`, d: path(s, nodes[edge[0]], nodes[edge[1]], 0) }));
    [...shown].reverse().forEach(({ edge, kind }) =>
      line(edge, `${edge[2] < 0 ? "helps" : "against"} ${kind}`, 0.6 + (6 * Math.abs(edge[2])) / largest));
    const ringed = new Set(step().ringed);
    const ghosts = new Set(gone.flatMap(([a, b]) => [a, b]).filter((i) => !seen.has(i)));
    if (state.pin !== null && !seen.has(state.pin)) ghosts.add(state.pin);
    for (const i of [...ghosts, ...seen]) {
      const node = nodes[i];
      const name = `node${ghosts.has(i) ? " ghost" : ringed.has(i) ? " on" : ""}${i === state.pin ? " pin" : ""}`;
      const [x, y] = [s.x(node), s.y(node)];
      if (node[4] === "head") make(svg, "circle", { class: name, cx: x, cy: y, r: R });
      else make(svg, "rect", { class: name, x: x - R, y: y - R + 1, width: 2 * R, height: 2 * R - 2, rx: node[4] === "mlp" ? 1 : 4 });
      make(svg, "text", { class: ghosts.has(i) ? "name ghost" : "name", x, y }, node[5]);
    }
    say(shown, gone);
    list(shown, gone);
  }

  function say(shown, gone) {
    const stays = shown.filter(({ kind }) => kind === "stays").length;
    const said = by("said");
    const open = new Map(film().steps.map((entry, i) => [entry.step, i]));
    said.replaceChildren(...film().pieces.map((piece, i) => {
      const span = document.createElement("span");
      span.textContent = piece.replaceAll("\n", "↵");
      if (open.has(i)) {
        span.className = i === step().step ? "here open" : "open";
        span.dataset.at = open.get(i);
      }
      return span;
    }));
    const heads = step().heads;
    const absent = heads.length - step().ringed.length;
    const missing = absent ? ` ${absent} of ${heads.length} dynamic heads ${absent === 1 ? "is" : "are"} not in this graph.` : "";
    const compared = state.at ? `${stays} stay, ${shown.length - stays} came, ${gone.length} are gone since step ${step(state.at - 1).step}` : `${shown.length} edges, the first graph`;
    const now = by("now");
    now.replaceChildren();
    const strong = document.createElement("b");
    strong.textContent = `Step ${step().step}, ‘${film().pieces[step().step]}’`;
    now.append(strong, `: ${compared}. ${heads.length} dynamic ${heads.length === 1 ? "head" : "heads"}: ${heads.join(" ") || "none"}.${missing}`);
    by("at").max = film().steps.length - 1;
    by("at").value = state.at;
    by("at").setAttribute("aria-valuetext", `step ${step().step}`);
  }

  function list(shown, gone) {
    const box = by("its");
    box.replaceChildren();
    if (state.pin === null) return;
    const nodes = film().nodes;
    const title = document.createElement("h2");
    title.textContent = nodes[state.pin][0].replace("@", " at the ");
    const rows = [...shown.map(({ edge, kind }) => [edge, kind]), ...gone.map((edge) => [edge, "goes"])]
      .filter(([edge]) => edge[0] === state.pin || edge[1] === state.pin);
    const table = document.createElement("table");
    const fill = (cells, tag) => {
      const row = document.createElement("tr");
      for (const text of cells) {
        const cell = document.createElement(tag);
        cell.textContent = text;
        cell.className = typeof text === "number" ? "" : "t";
        row.append(cell);
      }
      table.append(row);
    };
    const words = { stays: "was there before", comes: "came", goes: "is gone" };
    fill(["from", "to", "score", ""], "th");
    rows.forEach(([edge, kind]) => fill([nodes[edge[0]][0], nodes[edge[1]][0], edge[2], words[kind]], "td"));
    const scroll = document.createElement("div");
    scroll.className = "scroll";
    scroll.append(table);
    box.append(title, rows.length ? scroll : "no edge of it is shown at this step");
  }

  function go(at) {
    state.at = Math.max(0, Math.min(at, film().steps.length - 1));
    draw();
  }

  function play(on) {
    clearInterval(state.timer);
    state.timer = on ? setInterval(() => (state.at + 1 < film().steps.length ? go(state.at + 1) : play(false)), 1200) : 0;
    by("play").textContent = on ? "Stop" : "Play";
    by("play").setAttribute("aria-pressed", String(Boolean(on)));
    if (on && state.at + 1 === film().steps.length) go(0);
  }

  /** The nearest node within reach of a finger. */
  function nearest(event, reach) {
    const box = svg.getBoundingClientRect();
    const s = scale();
    const { shown, gone } = changes();
    const drawn = new Set([...shown.map(({ edge }) => edge), ...gone].flatMap(([a, b]) => [a, b]).concat(step().ringed));
    let best = null, least = reach;
    for (const i of drawn) {
      const node = film().nodes[i];
      const distance = Math.hypot(s.x(node) - (event.clientX - box.left), s.y(node) - (event.clientY - box.top));
      if (distance < least) [best, least] = [i, distance];
    }
    return best;
  }

  films.forEach((entry, i) => by("film").append(new Option(entry.name, i)));
  by("which").hidden = films.length < 2;
  by("film").addEventListener("change", (event) => {
    play(false);
    [state.film, state.pin, state.hover] = [Number(event.target.value), null, null];
    go(0);
  });
  by("most").addEventListener("change", (event) => {
    state.most = Number(event.target.value);
    draw();
  });
  by("at").addEventListener("input", (event) => go(Number(event.target.value)));
  by("back").addEventListener("click", () => go(state.at - 1));
  by("next").addEventListener("click", () => go(state.at + 1));
  by("play").addEventListener("click", () => play(!state.timer));
  by("said").addEventListener("click", (event) => event.target.dataset.at && go(Number(event.target.dataset.at)));
  svg.addEventListener("click", (event) => {
    const found = nearest(event, 24);
    state.pin = found === state.pin ? null : found;
    draw();
  });
  function hover(found) {
    if (found === state.hover) return;
    state.hover = found;
    if (state.pin === null) draw();
  }
  svg.addEventListener("pointermove", (event) => event.pointerType === "mouse" && hover(nearest(event, 12)));
  svg.addEventListener("pointerleave", () => hover(null));
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("select, input") || event.ctrlKey || event.metaKey || event.altKey) return;
    const to = { ArrowLeft: state.at - 1, ArrowRight: state.at + 1, Home: 0, End: film().steps.length - 1 }[event.key];
    if (to !== undefined) go(to);
    else if (event.key === "Escape") { state.pin = null; draw(); }
    else if (event.key === " " && !event.target.matches("button")) play(!state.timer);
    else return;
    event.preventDefault();
  });
  addEventListener("resize", draw);
  draw();
})();
