"use strict";
// Fills the heat maps, reads them out under the pointer, and copies tables. Nothing else needs it.
(() => {
  document.documentElement.classList.add("js");

  const ramp = () => {
    const style = getComputedStyle(document.documentElement);
    return Array.from({ length: 8 }, (_, i) => {
      const hex = style.getPropertyValue(`--r${i}`).trim().slice(1);
      return [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16));
    });
  };
  const colour = (stops, share) => {
    const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
    const low = Math.min(Math.floor(place), stops.length - 2);
    return stops[low].map((from, i) => Math.round(from + (stops[low + 1][i] - from) * (place - low)));
  };

  async function cellsOf(canvas) {
    const packed = Uint8Array.from(atob(canvas.dataset.cells), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  function paint(canvas, cells, facts) {
    const stops = ramp();
    const colours = Array.from({ length: facts.levels + 1 }, (_, i) => {
      const share = i / facts.levels;
      return colour(stops, facts.root ? Math.sqrt(share) : share);
    });
    const image = new ImageData(facts.columns, facts.rows);
    cells.forEach((cell, i) => {
      if (cell) image.data.set([...colours[cell - 1], 255], 4 * i);
    });
    canvas.getContext("2d").putImageData(image, 0, 0);
    canvas.classList.add("ready");
  }

  const number = (value) => value.toLocaleString("en", { maximumSignificantDigits: 4 });
  const span = ([title, low, high], index, count) => {
    const edge = (i) => Math.ceil(low + ((high - low) * i) / count - 1e-6);
    const first = edge(index), last = edge(index + 1) - 1;
    return `${title} ${first.toLocaleString("en")}${last > first ? ` to ${last.toLocaleString("en")}` : ""}`;
  };

  async function heatMap(canvas) {
    const facts = JSON.parse(canvas.dataset.facts);
    const cells = await cellsOf(canvas);
    const readout = canvas.closest("figure").querySelector(".readout");
    paint(canvas, cells, facts);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => paint(canvas, cells, facts));
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect();
      const at = (place, size, count) => Math.min(Math.max(Math.floor((place / size) * count), 0), count - 1);
      const column = at(event.clientX - box.left, box.width, facts.columns);
      const row = at(event.clientY - box.top, box.height, facts.rows);
      const cell = cells[row * facts.columns + column];
      const value = ((cell - 1) / facts.levels) * facts.high;
      const said = !cell ? "none" : facts.share ? `${number(value * 100)}%` : number(value);
      const where = facts.yLabels.length && facts.rowsPerCell === 1
        ? `${facts.y[0]} ${facts.yLabels[row]}` : span(facts.y, row, facts.rows);
      readout.textContent = `${where}, ${span(facts.x, column, facts.columns)}: ${facts.value} ${said}`;
    });
    canvas.addEventListener("pointerleave", () => { readout.textContent = ""; });
  }

  const csv = (table) => [...table.rows].map((row) => [...row.cells].map((cell) => {
    const text = cell.dataset.value ?? cell.textContent;
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }).join(",")).join("\n") + "\n";

  async function copy(button) {
    const text = csv(document.getElementById(button.dataset.table));
    const said = button.textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch { // a page opened from disk may not have the clipboard
      const area = Object.assign(document.createElement("textarea"), { value: text });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = said; }, 1500);
  }

  document.querySelectorAll("canvas.heat").forEach(heatMap);
  document.querySelectorAll("button.copy").forEach((button) => button.addEventListener("click", () => copy(button)));
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
})();
