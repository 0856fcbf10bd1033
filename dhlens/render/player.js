"use strict";
/* The player: opens what Python packed, keeps the state, and draws it again whenever it changes. Texts of tokens reach
   the page as text nodes only. */
(() => {
  const $ = (id) => document.getElementById(id);

  // ------------------------------------------------------------------------------------------------ what Python packed

  const TYPES = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array };
  const open = (packed) => new TYPES[packed.type](Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0)).buffer);

  const data = JSON.parse($("data").textContent);
  const H = data.layers * data.heads, P = data.prompt.length, { low, high } = data.score;
  const sides = data.sides.map((raw) => ({
    ...raw,
    steps: raw.answer.length,
    keys: open(raw.keys),
    weights: open(raw.weights),
    score: open(raw.score),
    flags: open(raw.flags),
    mass: raw.mass && open(raw.mass),
  }));
  const last = Math.max(...sides.map((side) => side.steps)) - 1;
  const sets = data.sets.map(({ name, heads }) => ({ name, heads: new Set(heads) }));

  const at = (side, step, head) => step * H + head;
  const model = {
    steps: last + 1,
    heads: data.heads,
    binary: data.score.binary,
    spans: data.spans,
    name: (head) => `L${Math.floor(head / data.heads)}H${head % data.heads}`,
    active: (side, step, head) => (side.flags[at(side, step, head)] & 1) > 0,
    masked: (side, step, head) => (side.flags[at(side, step, head)] & 2) > 0,
    share: (side, step, head) => side.score[at(side, step, head)] / FULL,
    score: (side, step, head) => low + model.share(side, step, head) * (high - low),
    mass: (side, step, head) => (side.mass ? side.mass[at(side, step, head)] / FULL : 0),
    inFirstSet: (head) => sets.length > 0 && sets[0].heads.has(head),
    kind: (side, step, head) =>
      !model.active(side, step, head) ? QUIET : model.inFirstSet(head) ? STATIC : ACTIVE,
    peak(side, step, head, rank) {
      const i = at(side, step, head) * side.k + rank;
      return [side.keys[i], side.weights[i] / FULL];
    },
    /** Tell `see` each look of the shown heads, or of the one in focus: key, weight, kind. An active head counts at its
        strongest key, which is what makes it active; others, and the one in focus, at all keys that were kept. */
    looks(side, step, view, see) {
      for (const head of view.focus === null ? view.heads : [view.focus]) {
        const kind = model.kind(side, step, head), most = kind !== QUIET && view.focus === null ? 1 : side.k;
        for (let rank = 0; rank < most; rank++) {
          const [key, weight] = model.peak(side, step, head, rank);
          if (weight > 0) see(key, weight, kind);
        }
      }
    },
  };
  const textAt = (side, position) => (position < P ? data.prompt[position] : side.answer[position - P]);
  const some = (side, head, has) => {
    for (let step = 0; step < side.steps; step++) if (has(side, step, head)) return true;
    return false;
  };
  const activity = (head) => {
    let n = 0;
    for (const side of sides) for (let step = 0; step < side.steps; step++) n += model.active(side, step, head);
    return n;
  };

  // ------------------------------------------------------------------------------------------------------------ filters

  const everActive = new Set(), everMasked = new Set(), count = [];
  for (let head = 0; head < H; head++) {
    count.push(activity(head));
    if (count[head]) everActive.add(head);
    if (sides.some((side) => some(side, head, model.masked))) everMasked.add(head);
  }
  const filters = [ // player.py refuses sets of these names
    { name: "dynamic", keeps: (head) => everActive.has(head) },
    ...sets.map(({ name, heads }) => ({ name, keeps: (head) => heads.has(head) })),
    ...(sets.length
      ? [{ name: `dynamic, not ${sets[0].name}`, keeps: (head) => everActive.has(head) && !sets[0].heads.has(head) }]
      : []),
    ...(sides.some((side) => side.edited) ? [{ name: "masked", keeps: (head) => everMasked.has(head) }] : []),
    { name: "all", keeps: () => true },
  ];
  for (const filter of filters) filter.heads = count.map((_, head) => head).filter(filter.keeps);

  // -------------------------------------------------------------------------------------------------------------- state

  const NARROW = window.matchMedia("(max-width: 760px)"), DARK = window.matchMedia("(prefers-color-scheme: dark)");
  const main = data.spans.find((span) => span.main) ?? data.spans[0] ?? { start: 0, stop: P };
  const state = {
    step: 0,
    filter: everActive.size ? 0 : filters.length - 1,
    order: "layer",
    pin: null,
    hover: null,
    centre: Math.floor((main.start + main.stop) / 2),
    zoomed: false,
    playing: false,
  };
  const windowOf = () => {
    const total = P + last + 1, tokens = Math.min(total, NARROW.matches ? 70 : sides.length > 1 ? 90 : 150);
    const from = clamp(state.centre - Math.floor(tokens / 2), 0, total - tokens);
    return [from, from + tokens];
  };
  let queued = false;
  function change(changes) {
    Object.assign(state, changes);
    if (!queued) requestAnimationFrame(paint);
    queued = true;
  }
  const goTo = (step) => change({ step: clamp(step, 0, last) });
  function place(position) {
    $("goto").value = ""; // the window stands where no name is
    change({ centre: clamp(position, 0, P + last) });
  }

  function pin(head) {
    const changes = { pin: head === state.pin ? null : head, hover: null }, [from, to] = windowOf(), side = sides[0];
    if (changes.pin !== null && state.step < side.steps && model.active(side, state.step, head)) {
      const [key] = model.peak(side, state.step, head, 0);
      if (key < from || key >= to) place(key);
    }
    change(changes);
    say();
  }

  // ---------------------------------------------------------------------------------------------------- building blocks

  const SVG = "http://www.w3.org/2000/svg";
  function element(tag, properties = {}, ...children) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  }
  /** A text as people can read it: white space as signs, what cannot be seen by its code, as draw.coded has it. */
  const visible = (text) =>
    text
      .replace(/\n/g, "↵")
      .replace(/\t/g, "⇥")
      .replace(/(?![\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu, (c) =>
        `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`) || "∅";
  const quoted = (text) => `‘${visible(text)}’`;
  const many = (n, what) => `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;
  const number = (x) => x.toFixed(Math.abs(x) < 0.0995 ? 3 : 2).replace(/^(-?)0/, "$1");
  const token = (text) => element("span", { className: "tok", textContent: visible(text) });
  function icon(kind, masked) {
    const svg = document.createElementNS(SVG, "svg"), path = document.createElementNS(SVG, "path");
    svg.setAttribute("viewBox", "0 0 12 12");
    path.setAttribute("d", kind === STATIC ? "M6 0l6 6-6 6-6-6z" : kind === ACTIVE ? "M1 1h10v10H1z" : "M4 4h4v4H4z");
    path.style.fill = `var(--${COLOURS[kind]})`;
    svg.append(path);
    if (masked) {
      const lines = document.createElementNS(SVG, "path");
      lines.setAttribute("d", "M1 1l10 10M11 1L1 11");
      lines.setAttribute("class", "masked-mark");
      svg.append(lines);
    }
    svg.setAttribute("aria-hidden", "true");
    return svg;
  }
  /** One block for each side in a section, under its label where there are two. */
  const blocks = (section) =>
    sides.map((side) => {
      const block = element("div");
      if (sides.length > 1) block.append(element("h3", { textContent: side.label }));
      document.querySelector(`#${section} .pair`).append(block);
      return block;
    });

  document.body.classList.toggle("two", sides.length > 1);
  $("title").textContent = data.title;
  const verdict = ({ correct }) => (correct === null ? "" : correct ? "answered" : "not answered");
  $("facts").textContent = [
    `${many(P, "token")} of prompt`,
    many(last + 1, "step"),
    `${many(data.layers, "layer")} × ${many(data.heads, "head")}`,
    sides.map((side) => (sides.length > 1 ? `${side.label}: ${verdict(side)}` : verdict(side))).join(", "),
  ].filter(Boolean).join(" · ");

  const said = blocks("said").map((block, i) => {
    const text = element("div", { className: "text" });
    sides[i].answer.forEach((word, step) => {
      const node = token(word);
      node.dataset.step = step;
      if (sides.length > 1 && word !== sides[1 - i].answer[step]) node.classList.add("differs");
      text.append(node);
    });
    text.addEventListener("click", ({ target }) => target.dataset.step && goTo(Number(target.dataset.step)));
    block.append(text);
    return [...text.children];
  });

  const ribbons = blocks("context").map((block, i) => {
    const canvas = element("canvas", { tabIndex: 0 }), text = element("div", { className: "window", tabIndex: 0 });
    canvas.setAttribute("role", "slider");
    canvas.setAttribute("aria-label", `Window of the context${sides.length > 1 ? `, ${sides[i].label}` : ""}`);
    canvas.setAttribute("aria-valuemin", 0);
    canvas.setAttribute("aria-valuemax", P + last);
    text.setAttribute("role", "group");
    text.setAttribute("aria-label", "Text of the window");
    block.append(element("div", {}, canvas), text);
    return Object.assign(new Ribbon(canvas, sides[i], model), { text, tokens: [], shown: "" });
  });

  const rasters = blocks("raster").map((block, i) => {
    const canvas = element("canvas", { tabIndex: 0 });
    canvas.setAttribute("role", "group");
    canvas.setAttribute("aria-roledescription", "raster");
    canvas.setAttribute("aria-label", "Heads by step. Up and down choose a head, Enter pins it, left and right change the step.");
    block.append(element("div", { className: "scroll" }, canvas));
    return new Raster(canvas, sides[i], model);
  });

  const RANKED = 14;
  const rankings = blocks("ranking").map((block) => {
    const list = element("ol", { className: "heads" }), note = element("span");
    const rows = Array.from({ length: RANKED }, () => {
      const row = {
        mark: element("span"), name: element("span", { className: "name" }), to: element("span", { className: "to" }),
        word: document.createTextNode(""), where: element("span"), bar: element("span", { className: "bar" }),
        fill: element("i"), value: document.createTextNode(""),
      };
      row.to.append(row.word, row.where);
      row.bar.append(row.fill, row.value);
      row.button = element("button", { type: "button" }, row.mark, row.name, row.to, row.bar);
      row.button.addEventListener("click", () => pin(row.head));
      row.button.addEventListener("pointerenter", ({ pointerType }) => pointerType === "mouse" && change({ hover: row.head }));
      row.button.addEventListener("pointerleave", () => change({ hover: null }));
      row.item = element("li", {}, row.button);
      list.append(row.item);
      return row;
    });
    const measure = data.score.binary && data.main ? `attention on ${data.main}` : data.score.name;
    const top = element("p", { className: "top note" }, note, element("span", { textContent: measure }));
    block.append(top, list);
    return { rows, note };
  });

  // ----------------------------------------------------------------------------------------------------------- painting

  let ink = () => "";
  function readColours() {
    const style = getComputedStyle(document.documentElement), known = {};
    ink = (name) => (known[name] ??= style.getPropertyValue(`--${name}`).trim());
  }

  function viewOf() {
    const filter = filters[state.filter], heads = [...filter.heads];
    if (state.order === "activity") heads.sort((a, b) => count[b] - count[a] || a - b);
    const shown = windowOf(), [from, to] = state.zoomed ? shown : [0, P + last + 1];
    return {
      ...state, heads, ink, from, to, window: shown, byLayer: state.order === "layer", focus: state.hover ?? state.pin,
      still: [state.filter, state.order, DARK.matches, window.devicePixelRatio].join(),
    };
  }

  function paint() {
    queued = false;
    const view = viewOf();
    for (const picture of [...ribbons, ...rasters]) picture.measure(view); // before anything changes the page's layout
    const highest = [0, 1].map((i) => Math.max(...ribbons.map((ribbon) => ribbon.highest[i])));
    ribbons.forEach((ribbon) => ribbon.paint(highest));
    ribbons.forEach((ribbon) => paintWindow(ribbon, view));
    rasters.forEach((raster) => raster.paint());
    rankings.forEach((ranking, i) => paintRanking(ranking, sides[i], view));
    said.forEach((nodes) =>
      nodes.forEach((node, step) => {
        node.classList.toggle("here", step === view.step);
        node.classList.toggle("ahead", step > view.step);
      }));
    paintControls(view);
  }

  function paintWindow(ribbon, view) {
    const { side, text } = ribbon, [from, to] = view.window;
    if (ribbon.shown !== view.window.join()) {
      ribbon.shown = view.window.join();
      ribbon.tokens = [];
      for (let p = from; p < Math.min(to, P + side.steps); p++) {
        const node = token(textAt(side, p));
        node.dataset.position = p;
        node.classList.toggle("main", data.spans.some((s) => s.main && s.start <= p && p < s.stop));
        ribbon.tokens.push(node);
      }
      text.replaceChildren(...ribbon.tokens);
      text.scrollTop = 0;
      ribbon.canvas.setAttribute("aria-valuetext", `tokens ${from} to ${to - 1} of ${P + side.steps}`);
    }
    ribbon.canvas.setAttribute("aria-valuenow", view.centre);
    const sums = COLOURS.map(() => new Float32Array(to - from));
    if (view.step < side.steps) {
      model.looks(side, view.step, view, (key, weight, kind) => {
        if (key >= from && key < to) sums[kind][key - from] += weight;
      });
    }
    ribbon.tokens.forEach((node, i) => {
      const kind = sums[STATIC][i] > sums[ACTIVE][i] ? STATIC : sums[ACTIVE][i] > 0 ? ACTIVE : QUIET;
      const strength = kind === QUIET && view.focus === null ? 0 : Math.min(sums[kind][i], 1);
      const colour = `var(--${COLOURS[kind]})`, percent = Math.round(55 * strength);
      node.style.backgroundColor = percent ? `color-mix(in srgb, ${colour} ${percent}%, transparent)` : "";
      node.style.boxShadow = percent && kind !== QUIET ? `inset 0 -3px 0 ${colour}` : "";
      node.classList.toggle("ahead", from + i > P + view.step - 1);
    });
  }

  function ranked(side, view) {
    const by = (head) => [model.score(side, view.step, head), model.mass(side, view.step, head), model.peak(side, view.step, head, 0)[1]];
    const keyed = view.heads.map((head) => [head, ...by(head)]);
    return keyed.sort((a, b) => b[1] - a[1] || b[2] - a[2] || b[3] - a[3] || a[0] - b[0]).map(([head]) => head);
  }

  function paintRanking({ rows, note }, side, view) {
    const over = view.step >= side.steps, order = over ? [] : ranked(side, view);
    const active = order.filter((head) => model.active(side, view.step, head)).length;
    note.textContent = over ? "this side has come to its end" : `${active} of ${order.length} active`;
    const place = order.indexOf(view.pin);
    if (place >= RANKED) {
      order[RANKED - 1] = view.pin; // it stays in sight
      note.textContent += `, ${model.name(view.pin)} is number ${place + 1}`;
    }
    rows.forEach((row, i) => {
      row.item.hidden = i >= order.length;
      if (row.item.hidden) return;
      const head = (row.head = order[i]), kind = model.kind(side, view.step, head), masked = model.masked(side, view.step, head);
      const [key, weight] = model.peak(side, view.step, head, 0);
      const share = model.binary && side.mass ? model.mass(side, view.step, head) : model.share(side, view.step, head);
      const shown = model.binary && side.mass ? share : model.score(side, view.step, head);
      row.button.className = ["quiet", "active", "active static"][kind];
      row.button.setAttribute("aria-pressed", head === view.pin);
      const state = [["not active", "active", `active, ${sets[0]?.name}`][kind], masked ? "masked" : ""].filter(Boolean).join(", ");
      row.button.setAttribute("aria-label", `${model.name(head)}, ${state}, looks at ${quoted(textAt(side, key))}, position ${key}, weight ${number(weight)}`);
      row.mark.replaceChildren(icon(kind, masked));
      row.name.textContent = model.name(head);
      row.word.data = quoted(textAt(side, key));
      row.where.textContent = `at ${key.toLocaleString("en")}`;
      row.fill.style.width = `${Math.round(share * 38)}px`;
      row.value.data = number(shown);
    });
  }

  function paintControls(view) {
    const slider = $("step"), side = sides.find((one) => view.step < one.steps), word = side.answer[view.step];
    slider.value = view.step;
    slider.setAttribute("aria-valuetext", `step ${view.step} of ${last}, ${quoted(word)}`);
    $("now").replaceChildren(
      element("i", { textContent: "step " }), `${view.step} / ${last}  `, element("b", { textContent: quoted(word) }),
      element("span", { textContent: `  p ${number(side.p[view.step])}, entropy ${side.entropy[view.step].toFixed(2)}` }));
    $("unpin").hidden = view.pin === null;
    $("unpin").textContent = view.pin === null ? "Unpin" : `Unpin ${model.name(view.pin)}`;
    $("zoom").setAttribute("aria-pressed", view.zoomed);
    $("zoom").textContent = view.zoomed ? "Zoom out" : "Zoom in";
    const shown = filters[state.filter];
    $("whose").textContent =
      view.focus === null
        ? `${many(shown.heads.length, "head")} (${shown.name}): active ones at their strongest key`
        : `${model.name(view.focus)}: its ${keys(sides[0].k)}; active at ${sides.map((s) => timesActive(s, view.focus)).join(" and ")}`;
  }
  function timesActive(side, head) {
    let n = 0;
    for (let step = 0; step < side.steps; step++) n += model.active(side, step, head);
    return `${n} of ${many(side.steps, "step")}`;
  }
  const keys = (k) => (k === 1 ? "strongest key" : `${k} strongest keys`);

  // ---------------------------------------------------------------------------------------------------- tips and speech

  function describe(side, step, head) {
    const lines = [`${model.name(head)} at step ${step}, ${quoted(side.answer[step])}`];
    const kind = [`not active`, "active", `active, in ${sets[0]?.name}`][model.kind(side, step, head)];
    lines.push(kind + (model.masked(side, step, head) ? ", masked" : "") + (model.binary ? "" : `, ${data.score.name} ${number(model.score(side, step, head))}`));
    if (side.mass) lines.push(`attention on ${data.main}: ${number(model.mass(side, step, head))}`);
    for (let rank = 0; rank < side.k; rank++) {
      const [key, weight] = model.peak(side, step, head, rank);
      if (weight > 0) lines.push(`${number(weight)}  ${quoted(textAt(side, key))} at ${key}`);
    }
    return lines.join("\n");
  }

  function describePosition(side, position) {
    const text = textAt(side, position), lines = [`${text === undefined ? "no token" : quoted(text)} at ${position}`];
    if (state.step >= side.steps) return lines[0];
    const looking = filters[state.filter].heads.filter((head) => model.peak(side, state.step, head, 0)[0] === position);
    const active = looking.filter((head) => model.active(side, state.step, head));
    if (active.length) lines.push(`active: ${active.map(model.name).join(", ")}`);
    if (looking.length > active.length) lines.push(`strongest key of ${many(looking.length - active.length, "other head")}`);
    return lines.join("\n");
  }

  function tip(text, event) {
    const node = $("tip");
    node.hidden = !text;
    if (!text) return;
    node.textContent = text;
    const { offsetWidth, offsetHeight } = node, right = window.scrollX + document.documentElement.clientWidth;
    const left = event.pageX + 14 + offsetWidth > right ? event.pageX - offsetWidth - 14 : event.pageX + 14;
    const below = event.clientY + 14 + offsetHeight < window.innerHeight - 60;
    node.style.left = `${clamp(left, window.scrollX + 4, right - offsetWidth - 4)}px`;
    node.style.top = `${below ? event.pageY + 14 : event.pageY - offsetHeight - 14}px`;
  }

  /** Tell a screen reader about the head in focus; not while playing. */
  function say() {
    const head = state.hover ?? state.pin, side = sides[0];
    if (!state.playing && head !== null && state.step < side.steps) $("live").textContent = describe(side, state.step, head);
  }

  // ----------------------------------------------------------------------------------------------------------- controls

  let timer = null;
  function play(on) {
    clearInterval(timer);
    timer = null;
    const again = on && state.step === last ? { step: 0 } : {};
    change({ playing: on, ...again });
    $("play").setAttribute("aria-label", on ? "Pause" : "Play");
    $("play-icon").setAttribute("d", on ? "M3 2h4v12H3zM9 2h4v12H9z" : "M4 2l10 6-10 6z");
    if (!on) return;
    timer = setInterval(() => {
      goTo(state.step + 1);
      if (state.step === last) play(false);
    }, 1000 / Number($("speed").value));
  }

  $("step").max = last;
  $("step").addEventListener("input", () => goTo(Number($("step").value)));
  $("back").addEventListener("click", () => goTo(state.step - 1));
  $("on").addEventListener("click", () => goTo(state.step + 1));
  $("play").addEventListener("click", () => play(!state.playing));
  $("speed").addEventListener("change", () => state.playing && play(true));
  $("unpin").addEventListener("click", () => pin(state.pin));
  $("zoom").addEventListener("click", () => change({ zoomed: !state.zoomed }));
  $("order").addEventListener("change", () => change({ order: $("order").value }));

  const places = [...data.spans, { name: "end of the prompt", start: P - 1, stop: P }];
  $("goto").append(element("option", { value: "", textContent: "…" }), ...places.map(({ name }, i) => element("option", { value: i, textContent: visible(name) })));
  $("goto").value = Math.max(places.indexOf(main), 0);
  $("goto").addEventListener("change", () => {
    const chosen = $("goto").value;
    if (chosen === "") return;
    const { start, stop } = places[chosen];
    place(stop - start > 150 ? start + 40 : Math.floor((start + stop) / 2));
    $("goto").value = chosen;
  });

  $("filter").append(
    ...filters.map(({ name, heads }, i) => {
      const box = element("input", { type: "radio", name: "filter", value: i, checked: i === state.filter });
      box.addEventListener("change", () => change({ filter: i, hover: null }));
      return element("label", {}, box, name, element("small", { textContent: heads.length }));
    }));

  const legend = [
    [icon(ACTIVE), sets.length ? "active" : "active (dynamic)"],
    ...(sets.length ? [[icon(STATIC), `active, in ${sets[0].name}`]] : []),
    ...(sides.some((side) => side.edited) ? [[icon(QUIET, true), "masked by the edit"]] : []),
    ...(data.main ? [[icon(QUIET), `attention on ${data.main}`]] : []),
  ];
  $("legend").append(...legend.map(([sign, text]) => element("li", {}, sign, text)));
  $("meaning").append(
    ...[
      `A head is active at a step where its score (${data.score.name}) lies above the threshold; dynamic heads are active at one step at least. Ranked are score, then attention on ${data.main || "the prompt"}, then the weight of the strongest key.`,
      `Bars above the ribbon add up attention weights at this step, each colour on its own scale over the whole answer; the first ${SINK} positions, which soak up attention, are cut off at the top. Below them each line is one step. Of each head the ${keys(sides[0].k)} ${sides[0].k === 1 ? "was" : "were"} kept. ∅ is a token without text.`,
    ].map((text) => element("p", { textContent: text })));

  ribbons.forEach(({ canvas, side, text }, i) => {
    canvas.addEventListener("pointerdown", (event) => {
      place(ribbons[i].at(event.offsetX));
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (event.buttons && !state.zoomed) place(ribbons[i].at(event.offsetX));
      if (event.pointerType === "mouse") tip(describePosition(side, ribbons[i].at(event.offsetX)), event);
    });
    canvas.addEventListener("pointerleave", () => tip(""));
    canvas.addEventListener("keydown", (event) => {
      const [from, to] = windowOf(), moves = { ArrowLeft: -10, ArrowRight: 10, PageUp: from - to, PageDown: to - from };
      const target = event.key === "Home" ? 0 : event.key === "End" ? P + last : state.centre + (moves[event.key] ?? NaN);
      if (!Number.isNaN(target)) taken(event, () => place(target));
    });
    text.addEventListener("pointermove", (event) => {
      const position = event.target.dataset.position;
      if (event.pointerType === "mouse") tip(position ? describePosition(side, Number(position)) : "", event);
    });
    text.addEventListener("pointerleave", () => tip(""));
  });

  rasters.forEach((raster) => {
    const { canvas, side } = raster;
    canvas.addEventListener("pointermove", (event) => {
      const found = raster.at(event.offsetX, event.offsetY);
      if (event.pointerType !== "mouse") return;
      if ((found?.head ?? null) !== state.hover) change({ hover: found?.head ?? null });
      tip(found && found.step >= 0 ? describe(side, found.step, found.head) : "", event);
    });
    canvas.addEventListener("pointerleave", () => {
      tip("");
      change({ hover: null });
    });
    canvas.addEventListener("click", (event) => {
      const found = raster.at(event.offsetX, event.offsetY);
      if (!found) return;
      if (found.step >= 0) goTo(found.step);
      if (found.head !== state.pin || found.step < 0) pin(found.head);
    });
    canvas.addEventListener("keydown", (event) => {
      const heads = raster.view.heads, here = heads.indexOf(state.hover ?? state.pin), by = { ArrowUp: -1, ArrowDown: 1 }[event.key];
      if (by && heads.length) taken(event, () => change({ hover: heads[clamp(here + by, 0, heads.length - 1)] }), say);
      if (event.key === "Enter" && state.hover !== null) taken(event, () => pin(state.hover));
    });
    canvas.addEventListener("blur", () => change({ hover: null }));
  });

  function taken(event, ...actions) {
    event.preventDefault();
    event.stopPropagation();
    actions.forEach((action) => action());
  }

  document.addEventListener("keydown", (event) => {
    const { key, target } = event, far = event.shiftKey ? 10 : 1;
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (key === "Escape") return change({ pin: null, hover: null });
    if (target.matches("select, [type=radio]")) return;
    const steps = { ArrowLeft: state.step - far, ArrowRight: state.step + far, Home: 0, End: last };
    if (key in steps) taken(event, () => goTo(steps[key]), say);
    else if (key === " " && !target.matches("button, summary")) taken(event, () => play(!state.playing));
    else if (key === "z" || key === "Z") change({ zoomed: !state.zoomed });
  });

  const redraw = () => {
    readColours();
    change({});
  };
  for (const media of [NARROW, DARK]) media.addEventListener("change", redraw);
  window.addEventListener("resize", redraw);
  redraw();
})();
