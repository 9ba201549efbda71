"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const make = (name, text) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const percent = (share, digits) => (100 * share).toFixed(digits);

  // Wilson's interval by the same operations in the same order as the package's own: the same floats.
  const wilson = (right, n) => {
    const z = 1.959963984540054, share = right / n, centre = share + (z * z) / (2 * n);
    const half = z * Math.sqrt((share * (1 - share)) / n + (z * z) / (4 * n * n)), scale = 1 + (z * z) / n;
    return [Math.max(0, (centre - half) / scale), Math.min(1, (centre + half) / scale)];
  };

  // A record as in its file, from the parts that it shares with others and its own values.
  const unpack = (number) => {
    const [measurementAt, checkpointAt, setupAt, extractionAt, splitAt, createdAt, chosenAt, id, certificate, objective, iterations, seconds, total, predictions, calibration, ...measured] =
      data.records[number];
    const measurement = data.measurement[measurementAt], setup = data.setup[setupAt], { extract, spectrum, ...extraction } = data.extraction[extractionAt];
    const share = (one) => (Array.isArray(one) ? one[0] : one / measurement.n);
    return {
      schema: measurement.schema, id, status: measurement.status, error: measurement.error, created: data.created[createdAt],
      protocol_id: measurement.protocol_id, protocol: measurement.protocol, checkpoint: data.checkpoint[checkpointAt], data: measurement.data,
      split: data.split[splitAt], features: { ...setup.features, ...spectrum },
      probe: { ...measurement.probe, certificate, objective, iterations, chosen: data.chosen[chosenAt] },
      metrics: measured.length
        ? {
          top1: share(measured[0]), top5: share(measured[1]),
          top1_ci95: measured.length > 2 ? measured.slice(2) : wilson(measured[0], measurement.n), n: measurement.n,
          ...(calibration ? { nll: calibration[0], brier: calibration[1], ece: calibration[2] } : {}),
        }
        : null,
      timing_s: { extract, probe: seconds, total: total === null ? Number((extract + seconds).toFixed(4)) : total, ...extraction },
      environment: setup.environment, predictions: predictions === true ? `${id}.npz` : predictions,
    };
  };
  const command = (number) => {
    const [measurementAt, checkpointAt, setupAt, , splitAt] = data.records[number], { checkpoint, setup, measurement, split } = data.commands;
    return [checkpoint[checkpointAt], setup[setupAt], measurement[measurementAt], split[splitAt]].join(" ");
  };

  // Sorting: by number, best first. Rows without a number stay last in both directions; equal rows keep their order.
  const sortable = (table, value, text, after) => {
    const heads = [...table.querySelectorAll("thead [data-sort]")];
    const sort = (head) => {
      const column = Number(head.dataset.sort), cell = head.closest("th");
      const first = column < 0 ? "ascending" : "descending";
      const turned = { ascending: "descending", descending: "ascending" }[cell.getAttribute("aria-sort")] || first;
      heads.forEach((one) => one.closest("th").setAttribute("aria-sort", "none"));
      cell.setAttribute("aria-sort", turned);
      const sign = turned === "ascending" ? 1 : -1, body = table.tBodies[0];
      const rows = [...body.rows].map((row) => ({ row, key: column < 0 ? text(row) : value(row, column) }));
      const missing = (key) => key === null || key === undefined;
      rows.sort((a, b) =>
        missing(a.key) || missing(b.key) ? missing(a.key) - missing(b.key)
          : sign * (typeof a.key === "string" ? order.compare(a.key, b.key) : a.key - b.key));
      const hung = table.parentNode, place = table.nextSibling;
      table.remove();  // one layout instead of one per row
      body.append(...rows.map((one) => one.row));
      after();
      hung.insertBefore(table, place);
    };
    heads.forEach((head) => head.addEventListener("click", () => { sort(head); head.focus({ preventScroll: true }); }));
  };
  const order = new Intl.Collator(undefined, { numeric: true });

  // A cell: index of its first record and their count; for several records also rank, how many share it, mean and interval.
  let following = 0;
  const cells = data.cells.map((line) => line.map((one) => {
    if (one === 0) return null;
    const [count, rank, tied, mean, low, high] = one, first = following;
    following += count;
    const cell = { first, count, rank, tied, mean, low, high };
    if (count === 1 && mean === undefined) {
      const { metrics } = unpack(first);
      if (metrics) Object.assign(cell, { mean: metrics.top1, low: metrics.top1_ci95[0], high: metrics.top1_ci95[1] });
    }
    return cell;
  }));
  const board = at("board"), body = board.tBodies[0];
  [...body.rows].forEach((row, number) => { row.number = number; });
  const cellOf = (row, column) => cells[row.number][column];
  sortable(board, (row, column) => (cellOf(row, column) || {}).mean, (row) => data.rows[row.number].name, () => filter());

  // Filter by every word. Only `most` rows are laid out until all are requested; then the first of them are painted before the
  // rest. Groups of columns can be hidden.
  const most = 100, said = at("shown");
  let all = false, others = 0;
  const texts = data.rows.map((row) => `${row.name} ${row.arch} ${row.note}`.toLowerCase());
  const filter = () => {
    const words = at("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const unseen = board.classList.contains("no-published");
    let fitting = 0, measured = 0;
    for (const row of body.rows) {
      const other = row.classList.contains("pub"), fits = words.every((word) => texts[row.number].includes(word));
      if (fits && !(other && unseen)) fitting += 1;
      measured += fits && !other;
      row.classList.toggle("hidden", !fits);
      row.classList.toggle("beyond", fitting > most);
    }
    cancelAnimationFrame(others);
    const show = () => { for (const row of body.rows) row.classList.remove("beyond"); };
    if (all) others = requestAnimationFrame(() => { others = requestAnimationFrame(show); });
    said.textContent = words.length ? `${measured} of ${data.measured} checkpoints match.` : "";
    at("all").hidden = all || fitting <= most;
    at("all").textContent = `Show all ${fitting.toLocaleString("en")} rows`;
  };
  at("all").addEventListener("click", () => { all = true; filter(); });
  filter();
  at("filter").addEventListener("input", filter);
  const hide = (group, hidden) => {
    board.querySelectorAll(`th.g${group}`).forEach((head) => head.classList.toggle("hidden", hidden));
    const columns = data.columns.flatMap((one, number) => (one.group === group ? [number] : []));
    for (const row of body.rows) for (const column of columns) row.cells[column + 1].classList.toggle("hidden", hidden);
  };
  document.querySelectorAll("[data-group]").forEach((box) =>
    box.addEventListener("change", () => hide(Number(box.dataset.group), !box.checked)));
  const published = at("published");
  if (published) published.addEventListener("change", () => {
    board.classList.toggle("no-published", !published.checked);
    filter();
  });

  // The tooltip of a cell, at the pointer or at the focus.
  const tip = at("tip");
  const placeOf = (button) => {
    const cell = button.closest("td");
    return { row: cell.parentNode.number, column: cell.cellIndex - 1 };
  };
  const describe = ({ row, column }) => {
    const { first, count, low, high, rank, tied } = cells[row][column];
    const records = Array.from({ length: count }, (_, number) => unpack(first + number));
    const scores = records.map((one) => (one.metrics ? percent(one.metrics.top1, 2) : "FAILED"));
    const lines = [`${data.rows[row].name} · ${data.columns[column].title}`, `${count === 1 ? "1 draw" : `${count} draws`}: ${scores.join(", ")} %`];
    if (low !== undefined && low !== null) lines.push(`95 % interval over test images: ${percent(low, 1)} to ${percent(high, 1)} %`);
    if (rank) lines.push(`rank ${rank}${tied > 1 ? `, shared by ${tied} checkpoints without a statistically significant difference` : ""}`);
    if (records.some((one) => one.status === "not_converged")) lines.push("the solver did not converge");
    records.filter((one) => one.error).forEach((one) => lines.push(one.error.slice(0, 200)));
    return lines.join("\n");
  };
  const showTip = (button) => {
    tip.textContent = describe(placeOf(button));
    tip.hidden = false;
    const box = button.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const below = box.bottom + 8 + own.height < innerHeight;
    tip.style.left = `${Math.max(8, Math.min(innerWidth - own.width - 8, box.left + box.width / 2 - own.width / 2))}px`;
    tip.style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - own.height - 8)}px`;
    button.setAttribute("aria-describedby", "tip");
  };
  const hideTip = () => { tip.hidden = true; };
  body.addEventListener("pointerover", (event) => { const b = event.target.closest("td button"); if (b) showTip(b); else hideTip(); });
  body.addEventListener("pointerleave", hideTip);
  body.addEventListener("focusin", (event) => { if (event.target.matches("td button")) showTip(event.target); });
  body.addEventListener("focusout", hideTip);
  document.addEventListener("scroll", hideTip, true);

  // Tab reaches one number; the arrow keys move between numbers.
  const start = body.querySelector("td button");
  if (start) start.tabIndex = 0;
  const visible = (one) => one && one.offsetParent !== null;
  body.addEventListener("keydown", (event) => {
    const button = event.target.closest("td button");
    if (event.key === "Escape") hideTip();
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!button || !step) return;
    event.preventDefault();
    let cell = button.closest("td"), row = cell.parentNode, column = cell.cellIndex, target = null;
    while (!visible(target)) {
      if (step[0]) row = step[0] > 0 ? row.nextElementSibling : row.previousElementSibling;
      column += step[1];
      if (!row || column < 1 || column >= row.cells.length) return;
      target = row.cells[column].querySelector("button");
    }
    body.querySelectorAll('button[tabindex="0"]').forEach((one) => { one.tabIndex = -1; });
    target.tabIndex = 0;
    target.focus();
  });

  // The origin of a number.
  const origin = at("origin");
  const showRecord = (number, pressed) => {
    const record = unpack(number);
    for (const one of at("draws").children) one.setAttribute("aria-pressed", String(one === pressed));
    const facts = [
      ["accuracy", record.metrics ? `${percent(record.metrics.top1, 2)} % of ${record.metrics.n.toLocaleString("en")} images, 95 % interval ${record.metrics.top1_ci95.map((one) => percent(one, 1)).join(" to ")}` : `FAILED: ${record.error}`],
      ["labelled", `${record.split.images.toLocaleString("en")} images of ${record.data.name}, ${record.split.subset}, draw ${record.split.draw}`],
      ["network", `${record.checkpoint.arch}, ${record.checkpoint.params.toLocaleString("en")} parameters, tap ${record.features.tap}, ${record.features.precision}`],
      ["weights", record.checkpoint.weights_sha256],
      ["protocol", record.protocol_id],
    ];
    const { metrics, features } = record, shown = (number) => (number === null ? "none" : number.toPrecision(3));
    if (metrics && metrics.brier !== undefined) facts.push(["calibration", `negative log-likelihood ${shown(metrics.nll)}, Brier score ${shown(metrics.brier)}, expected calibration error ${shown(metrics.ece)}`]);
    if (features.spectrum_images) facts.push(["spectrum", `RankMe ${shown(features.rankme)}, alpha ${shown(features.alpha)} of ${features.spectrum_images.toLocaleString("en")} validation images`]);
    if (record.probe.certificate !== null) facts.splice(3, 0, ["certificate", `relative duality gap ${record.probe.certificate.toExponential(1)} after ${record.probe.iterations} iterations of ${record.probe.solver}`]);
    at("origin-facts").replaceChildren(...facts.flatMap(([name, text]) => [make("dt", name), make("dd", text)]));
    at("command").textContent = command(number);
    at("hint").textContent = record.data.name === "digits" ? "" : `The record has the name of the data set, ${record.data.name}, not its path: replace it with your path.`;
    at("record").textContent = JSON.stringify(record, null, 1);
  };
  body.addEventListener("click", (event) => {
    const button = event.target.closest("td button");
    if (!button) return;
    hideTip();
    const { row, column } = placeOf(button), { first, count } = cells[row][column];
    at("origin-title").textContent = `${data.rows[row].name}, ${data.columns[column].title}`;
    const draws = Array.from({ length: count }, (_, number) => {
      const one = make("button", `draw ${data.split[data.records[first + number][4]].draw}`);
      one.type = "button";
      one.className = "quiet";
      one.addEventListener("click", () => showRecord(first + number, one));
      return one;
    });
    at("draws").replaceChildren(...draws);
    showRecord(first, draws[0]);
    origin.showModal();
  });
  origin.addEventListener("click", (event) => { if (event.target === origin) origin.close(); });
  at("copy").addEventListener("click", () => {
    const chosen = getSelection(), range = document.createRange();
    range.selectNodeContents(at("command"));
    chosen.removeAllRanges();
    chosen.addRange(range);
    const done = document.execCommand("copy");  // a page opened as a file may have no other clipboard
    at("copy").textContent = done ? "Copied" : "Select and copy";
    setTimeout(() => { at("copy").textContent = "Copy"; }, 1600);
  });

  // Accuracy per class of one protocol, from counts of correct predictions over all draws.
  const choice = at("protocol");
  if (choice) {
    const table = at("classes");
    // Reliability: accuracy over confidence of the predictions in each bin of confidence.
    const draw = (name, attributes) => {
      const made = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
      return made;
    };
    const showReliability = (view) => {
      const figure = at("reliability"), size = 300, margin = 40, place = (share) => margin + size * share;
      figure.hidden = !view.bins.length;
      const ticks = [0, 0.2, 0.4, 0.6, 0.8, 1].flatMap((share) => {
        const below = draw("text", { class: "tick", x: place(share), y: place(1) + 18, "text-anchor": "middle" });
        const beside = draw("text", { class: "tick", x: margin - 8, y: place(1 - share) + 4, "text-anchor": "end" });
        below.textContent = beside.textContent = percent(share, 0);
        return [below, beside, draw("line", { class: "grid", x1: place(0), x2: place(1), y1: place(share), y2: place(share) })];
      });
      const curves = view.bins.map((bins, number) => {
        const group = draw("g", { class: `line s${number}` }), points = bins.map(([, x, y]) => [place(x), place(1 - y)]);
        group.append(draw("polyline", { points: points.join(" ") }));
        bins.forEach(([count, confidence, accuracy], bin) => {
          const [cx, cy] = points[bin], dot = draw("circle", { class: "dot", cx, cy, r: 4 }), title = draw("title", {});
          title.textContent = `${data.rows[view.rows[number]].name}: confidence ${percent(confidence, 1)} %, accuracy ${percent(accuracy, 1)} %, ${count.toLocaleString("en")} predictions`;
          dot.append(title);
          group.append(dot);
        });
        return group;
      });
      const equal = draw("line", { class: "axis", x1: place(0), y1: place(1), x2: place(1), y2: place(0) });
      figure.querySelector("svg").replaceChildren(...ticks, equal, ...curves);
      figure.querySelector("ul").replaceChildren(...view.rows.map((row, number) => {
        const entry = make("li");
        entry.className = `s${number}`;
        entry.append(make("i"), make("span", data.rows[row].name));
        return entry;
      }));
    };
    const showClasses = (view) => {
      showReliability(view);
      const head = make("tr");
      ["class", ...view.rows.map((row) => data.rows[row].name), "images"].forEach((name, number) => {
        const cell = make("th"), button = make("button", name);
        cell.scope = "col";
        cell.setAttribute("aria-sort", "none");
        button.type = "button";
        button.dataset.sort = number - 1;
        cell.append(button);
        head.append(cell);
      });
      const names = data.classes[view.names];
      const shares = names.map((_, place) => view.right.map((counts) => counts[place] / (view.images[place] * view.draws)));
      const mean = (place) => shares[place].reduce((sum, one) => sum + one, 0) / shares[place].length;
      const places = names.map((_, place) => place).filter((place) => view.images[place]).sort((a, b) => mean(a) - mean(b));
      const rows = places.map((place) => {
        const row = make("tr"), name = make("th");
        name.scope = "row";
        name.append(make("bdi", names[place]));
        row.place = place;
        row.append(name, ...shares[place].map((share) => {
          const cell = make("td", percent(share, 1));
          cell.className = `h${Math.round(8 * share)}`;
          return cell;
        }), make("td", String(view.images[place])));
        return row;
      });
      table.tHead.replaceChildren(head);
      table.tBodies[0].replaceChildren(...rows);
      const said = make("span", `Accuracy in percent per class, ${data.columns[view.column].title}, ${view.draws === 1 ? "1 draw" : `mean of ${view.draws} draws`}${view.rows.length < data.measured ? `; ${view.rows.length} checkpoints` : ""}.`);
      said.className = "said";
      table.caption.replaceChildren(said);
      sortable(table, (row, column) => (column < view.rows.length ? shares[row.place][column] : view.images[row.place]), (row) => names[row.place], () => {});
    };
    choice.append(...data.views.map((view, number) => {
      const option = make("option", data.columns[view.column].title);
      option.value = number;
      return option;
    }));
    choice.addEventListener("change", () => showClasses(data.views[choice.value]));
    showClasses(data.views[0]);
  }

  // Paper does not scroll: a table wider than a landscape page is made smaller.
  const paper = 1020;
  const tables = document.querySelectorAll("table");
  addEventListener("beforeprint", () => tables.forEach((one) => { one.style.zoom = Math.min(1, paper / one.offsetWidth); }));
  addEventListener("afterprint", () => tables.forEach((one) => { one.style.zoom = ""; }));

  at("theme").addEventListener("click", () => {
    const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = root.dataset.theme || (dark ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
  });
})();
