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

  // The levels that the screen has pixels for; -1 for no value. Cells that share a pixel are pooled, never skipped.
  function fitted(cells, facts, columns, rows) {
    const sums = new Float64Array(columns * rows), counts = new Uint32Array(columns * rows);
    for (let row = 0; row < facts.rows; row += 1) {
      const start = Math.floor((row * rows) / facts.rows) * columns;
      for (let column = 0; column < facts.columns; column += 1) {
        const cell = cells[row * facts.columns + column];
        if (!cell) continue;
        const at = start + Math.floor((column * columns) / facts.columns);
        sums[at] = facts.pool === "max" ? Math.max(sums[at], cell - 1) : sums[at] + cell - 1;
        counts[at] += 1;
      }
    }
    return sums.map((sum, i) => !counts[i] ? -1 : facts.pool === "max" ? sum : sum / counts[i]);
  }

  function paint(canvas, cells, facts) {
    const pixels = (size) => Math.max(Math.round(size * devicePixelRatio), 1);
    const columns = Math.min(facts.columns, pixels(canvas.clientWidth));
    const rows = Math.min(facts.rows, pixels(canvas.clientHeight));
    const stops = ramp(), image = new ImageData(columns, rows);
    fitted(cells, facts, columns, rows).forEach((level, i) => {
      const share = level / facts.levels;
      if (level >= 0) image.data.set([...colour(stops, facts.root ? Math.sqrt(share) : share), 255], 4 * i);
    });
    Object.assign(canvas, { width: columns, height: rows });
    canvas.getContext("2d").putImageData(image, 0, 0);
    const shared = [[facts.columns, columns, "columns"], [facts.rows, rows, "rows"]].filter(([all, shown]) => shown < all);
    canvas.closest("figure").querySelector(".fit").textContent = shared.length === 0 ? "" : ` On this screen ${shared
      .map(([all, shown, name]) => `${all.toLocaleString("en")} ${name} share ${shown.toLocaleString("en")} pixels`)
      .join(" and ")}, each the ${facts.pool === "max" ? "largest" : "mean"} of its cells.`;
    canvas.classList.add("ready");
    canvas.parentElement.classList.add("drawn");
  }

  const number = (value) => value.toLocaleString("en", { maximumSignificantDigits: 4 });
  const span = ([title, low, high], index, count) => {
    const edge = (i) => Math.ceil(low + ((high - low) * i) / count - 1e-6) + 0; // + 0: no minus zero
    const first = edge(index), last = edge(index + 1) - 1;
    return `${title} ${first.toLocaleString("en")}${last > first ? ` to ${last.toLocaleString("en")}` : ""}`;
  };

  async function heatMap(canvas) {
    const facts = JSON.parse(canvas.dataset.facts);
    const cells = await cellsOf(canvas);
    const readout = canvas.closest("figure").querySelector(".readout");
    const cursor = canvas.parentElement.appendChild(document.createElement("div"));
    cursor.className = "cursor";
    paint(canvas, cells, facts);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => paint(canvas, cells, facts));
    let painted = canvas.clientWidth;
    new ResizeObserver(() => {
      if (canvas.clientWidth === painted) return;
      painted = canvas.clientWidth;
      paint(canvas, cells, facts);
    }).observe(canvas);
    const read = (row, column) => {
      const cell = cells[row * facts.columns + column];
      const value = ((cell - 1) / facts.levels) * facts.high;
      const said = !cell ? "none" : facts.share ? `${number(value * 100)}%` : number(value);
      const where = facts.yLabels.length && facts.rowsPerCell === 1
        ? `${facts.y[0]} ${facts.yLabels[row]}` : span(facts.y, row, facts.rows);
      readout.textContent = `${where}, ${span(facts.x, column, facts.columns)}: ${facts.value} ${said}`;
    };
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect();
      const at = (place, size, count) => Math.min(Math.max(Math.floor((place / size) * count), 0), count - 1);
      read(at(event.clientY - box.top, box.height, facts.rows), at(event.clientX - box.left, box.width, facts.columns));
    });
    canvas.addEventListener("pointerleave", () => { readout.textContent = ""; });
    // By keyboard: the arrows go from cell to cell, with Shift by ten, Home and End to the ends of a row.
    const place = { row: 0, column: 0 };
    const go = () => {
      const [wide, tall] = [canvas.clientWidth / facts.columns, canvas.clientHeight / facts.rows];
      Object.assign(cursor.style, {
        left: `${canvas.offsetLeft + place.column * wide}px`, top: `${canvas.offsetTop + place.row * tall}px`,
        width: `${Math.max(wide, 3)}px`, height: `${Math.max(tall, 3)}px`,
      });
      read(place.row, place.column);
    };
    canvas.addEventListener("focus", go);
    canvas.addEventListener("blur", () => { readout.textContent = ""; });
    canvas.addEventListener("keydown", (event) => {
      const by = event.shiftKey ? 10 : 1;
      const moves = { ArrowLeft: [0, -by], ArrowRight: [0, by], ArrowUp: [-by, 0], ArrowDown: [by, 0],
        Home: [0, -facts.columns], End: [0, facts.columns] };
      const move = moves[event.key];
      if (!move) return;
      event.preventDefault();
      place.row = Math.min(Math.max(place.row + move[0], 0), facts.rows - 1);
      place.column = Math.min(Math.max(place.column + move[1], 0), facts.columns - 1);
      go();
    });
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
