"use strict";
// The only thing on the page that computes: selection_replay/cost.py again, for other figures than its own.
(() => {
  const root = document.querySelector(".cost");
  if (!root) return;
  const facts = JSON.parse(root.dataset.costFacts);
  const state = { ...facts.defaults };

  const compute = (batch) => state.base + batch * state.perRequest; // us
  const readUs = (ids) => ids === 0 ? 0
    : state.alpha + ids * state.op + ids * facts.bytesPerId / (state.bandwidth * 1e3);
  const stepUs = (batch, overlapped) => {
    const computed = compute(batch);
    return facts.misses.reduce((total, misses) => {
      const fetched = readUs(batch * misses);
      return total + (overlapped ? Math.max(computed, fetched) : computed + fetched);
    }, 0);
  };
  const wholeStepUs = (batch) => facts.misses.length * compute(batch);
  const mostRequests = (context, offloaded) => {
    const ids = context / facts.tokensPerId;
    const held = offloaded ? Math.min(facts.size, ids) : ids;
    return Math.floor(state.hbm * 2 ** 30 / (facts.misses.length * (held * facts.bytesPerId + ids * facts.indexBytesPerId)));
  };
  const paysFrom = (context) => {
    const whole = mostRequests(context, false);
    const rate = whole ? whole / wholeStepUs(whole) : 0;
    const most = Math.min(mostRequests(context, true), facts.mostRequests);
    for (let batch = whole + 1; batch <= most; batch += 1) if (batch / stepUs(batch, true) > rate) return batch;
    return null;
  };

  const text = (value, digits) =>
    value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  const fill = (id, rows, digits) => rows.forEach((row, i) => row.forEach((value, j) => {
    const cell = document.getElementById(id).tBodies[0].rows[i].cells[j];
    cell.dataset.value = value === null ? "" : value;
    cell.textContent = value === null ? "never" : j === 0 && digits[0] < 0 ? `${value}` : text(value, Math.max(digits[j], 0));
  }));

  const curves = () => [wholeStepUs, (batch) => stepUs(batch, true), (batch) => stepUs(batch, false)].map((step, i) => {
    const most = Math.min(mostRequests(state.context, i > 0), facts.mostRequests);
    const batches = [];
    for (let batch = 1; batch < most; batch *= 2) batches.push(batch);
    if (most) batches.push(most);
    return batches.map((batch) => [batch, batch / step(batch) * 1e6]);
  });

  // The chart is drawn anew into the drawing that Python made: its axes, its three lines.
  const svg = root.querySelector("[data-cost=chart] figure svg[role=img]");
  const box = { left: 74, top: 14, right: 660, bottom: 274 };
  const node = (name, attributes, content) => {
    const made = document.createElementNS(svg.namespaceURI, name);
    Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
    if (content !== undefined) made.textContent = content;
    svg.append(made);
  };
  const DASHES = ["", "7 4", "2 3"];
  const tick = (value) => value >= 1e6 ? `${+(value / 1e6).toPrecision(3)} M` : value >= 100 ? text(value, 0) : `${+value.toPrecision(3)}`;
  const ticks = (low, high, most) => {
    const base = [2, 4, 10, 100, 1000].find((one) => Math.log(high / low) / Math.log(one) <= most) ?? 1000;
    const found = [];
    for (let i = Math.ceil(Math.log(low) / Math.log(base) - 1e-9); base ** i <= high * (1 + 1e-9); i += 1) found.push(base ** i);
    return found.length > 1 ? found : [low, high];
  };
  const draw = () => {
    const lines = curves();
    const points = lines.flat();
    const rates = points.length ? points.map((point) => point[1]) : [1, 2];
    const xs = [1, Math.max(2, ...points.map((point) => point[0]))];
    const ys = [Math.min(...rates), Math.max(...rates) * 1.05];
    const x = (value) => box.left + (box.right - box.left) * Math.log(value) / Math.log(xs[1]);
    const y = (value) => box.bottom - (box.bottom - box.top) * Math.log(value / ys[0]) / Math.log(ys[1] / ys[0]);
    [...svg.children].filter((one) => !["title", "desc"].includes(one.tagName)).forEach((one) => one.remove());
    ticks(...xs, 9).forEach((value) => {
      node("path", { class: "tick", d: `M${x(value)} ${box.bottom}v4` });
      node("text", { x: x(value), y: box.bottom + 17, "text-anchor": "middle" }, tick(value));
    });
    ticks(...ys, 6).forEach((value) => {
      node("path", { class: "grid", d: `M${box.left} ${y(value)}H${box.right}` });
      node("text", { x: box.left - 7, y: y(value) + 4, "text-anchor": "end" }, tick(value));
    });
    node("path", { class: "axis", d: `M${box.left} ${box.top}V${box.bottom}H${box.right}` });
    node("text", { class: "title", x: (box.left + box.right) / 2, y: 312, "text-anchor": "middle" }, "batch (requests)");
    node("text", { class: "title", transform: `translate(14 ${(box.top + box.bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, "tokens per second");
    lines.forEach((line, i) => {
      if (!line.length) return;
      const d = line.map(([a, b]) => `${x(a).toFixed(1)} ${y(b).toFixed(1)}`);
      node("path", { class: `line s${i}`, "data-curve": i, "stroke-dasharray": DASHES[i], d: `M${d.join("L")}` });
      const [a, b] = line[line.length - 1];
      node("circle", { class: `marker s${i}`, cx: x(a), cy: y(b), r: 4 });
    });
  };

  const say = () => {
    const { batch, context } = state, pays = paysFrom(context);
    root.parentElement.querySelector("[data-cost=said]").textContent =
      `Modelled: at batch ${text(batch, 0)} a step takes ${text(stepUs(batch, true) / 1e3, 2)} ms with buffers, fetch and compute `
      + `overlapped (${text(stepUs(batch, false) / 1e3, 2)} ms one after the other), and ${text(wholeStepUs(batch) / 1e3, 2)} ms with everything in `
      + `HBM. At ${text(context, 0)} tokens of context ${text(mostRequests(context, false), 0)} requests fit without buffers and `
      + `${text(mostRequests(context, true), 0)} with; `
      + (pays === null ? "buffers do not pay at any batch that fits." : `buffers pay from batch ${text(pays, 0)}.`);
  };

  const update = (redraw) => {
    fill("cost-batches", facts.batches.map((batch) =>
      [batch, wholeStepUs(batch) / 1e3, stepUs(batch, true) / 1e3, stepUs(batch, false) / 1e3]), [-1, 2, 2, 2]);
    fill("cost-contexts", facts.contexts.map((context) => {
      const whole = mostRequests(context, false), most = mostRequests(context, true);
      return [context, whole, most, whole ? whole / wholeStepUs(whole) * 1e6 : 0, most ? most / stepUs(most, true) * 1e6 : 0,
        paysFrom(context)];
    }), [0, 0, 0, 0, 0, 0]);
    say();
    if (redraw) draw();
  };

  const ranges = new Map([...root.querySelectorAll("input[type=range]")].map((one) => [one.dataset.key, one]));
  const numbers = new Map([...root.querySelectorAll("input[type=number]")].map((one) => [one.dataset.key, one]));
  const ends = (range) => [Number(range.dataset.low), Number(range.dataset.high)];
  const toValue = (range) => { // the lower part of a scale that begins at 0 is logarithmic too, from 1/1000 of its end
    const [low, high] = ends(range), share = range.value / 1000, from = low || high / 1000;
    return range.value === "0" ? low : from * (high / from) ** share;
  };
  const toPlace = (range, value) => {
    const [low, high] = ends(range), from = low || high / 1000;
    return value <= low ? 0 : Math.round(1000 * Math.min(Math.max(Math.log(value / from) / Math.log(high / from), 0), 1));
  };
  const reset = (redraw) => {
    Object.assign(state, facts.defaults);
    ranges.forEach((range, key) => { range.value = toPlace(range, state[key]); });
    numbers.forEach((one, key) => { one.value = Number(state[key].toPrecision(6)); });
    update(redraw);
  };
  const links = document.getElementById("cost-link");
  const first = links.value;
  links.addEventListener("change", () => {
    const chosen = facts.links[links.value] ?? facts.defaults;
    for (const key of ["bandwidth", "alpha", "op"]) {
      state[key] = chosen[key];
      ranges.get(key).value = toPlace(ranges.get(key), state[key]);
      numbers.get(key).value = state[key];
    }
    update(true);
  });
  const isWhole = (key) => key === "batch" || key === "context";
  const least = (key) => ({ bandwidth: 1e-3, base: 1e-3, hbm: 1e-3, batch: 1, context: 1 }[key] ?? 0);
  ranges.forEach((range, key) => range.addEventListener("input", () => {
    const value = toValue(range);
    state[key] = isWhole(key) ? Math.max(Math.round(value), 1) : Number(value.toPrecision(3));
    numbers.get(key).value = state[key];
    update(true);
  }));
  numbers.forEach((one, key) => one.addEventListener("change", () => {
    const value = Number(one.value);
    const kept = Number.isFinite(value) && one.value !== "" ? Math.max(value, least(key)) : facts.defaults[key];
    state[key] = isWhole(key) ? Math.round(kept) : kept;
    one.value = state[key];
    ranges.get(key).value = toPlace(ranges.get(key), state[key]);
    update(true);
  }));
  root.querySelector("button.reset").addEventListener("click", () => { links.value = first; reset(true); });
  reset(false);
})();
