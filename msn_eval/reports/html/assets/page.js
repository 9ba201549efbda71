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

  // Sorting: by number, best first. Rows without a number stay last in both directions; equal rows have the order of the page.
  const sortable = (table, value, text, after) => {
    const heads = [...table.querySelectorAll("thead [data-sort]")];
    const sort = (head, direction) => {
      const column = Number(head.dataset.sort);
      heads.forEach((one) => one.closest("th").setAttribute("aria-sort", "none"));
      head.closest("th").setAttribute("aria-sort", direction);
      const sign = direction === "ascending" ? 1 : -1, body = table.tBodies[0];
      const rows = [...body.rows].map((row) => ({ row, key: column < 0 ? text(row) : value(row, column) }));
      const missing = (key) => key === null || key === undefined;
      rows.sort((a, b) =>
        (missing(a.key) || missing(b.key) ? missing(a.key) - missing(b.key)
          : sign * (typeof a.key === "string" ? order.compare(a.key, b.key) : a.key - b.key)) || a.row.number - b.row.number);
      const parent = table.parentNode, place = table.nextSibling;
      table.remove();  // one layout instead of one per row
      body.append(...rows.map((one) => one.row));
      after();
      parent.insertBefore(table, place);
    };
    heads.forEach((head) => head.addEventListener("click", () => {
      const turned = { ascending: "descending", descending: "ascending" }[head.closest("th").getAttribute("aria-sort")];
      sort(head, turned || (Number(head.dataset.sort) < 0 ? "ascending" : "descending"));
      head.focus({ preventScroll: true });
    }));
    return sort;
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
  const sortBoard = sortable(board, (row, column) => (cellOf(row, column) || {}).mean, (row) => data.rows[row.number].name, () => filter());

  // Columns are shown by their probe, their data and the switch of published numbers.
  const published = at("published"), dataSet = at("data-set"), boxes = [...document.querySelectorAll("[data-group]")];
  const chosenData = () => (dataSet ? dataSet.value : "");
  const heads = data.columns.map((_, column) => board.querySelector(`[data-sort="${column}"]`).closest("th"));
  const isShown = data.columns.map(() => true);
  const showColumns = () => {
    const unchecked = boxes.filter((box) => !box.checked).map((box) => Number(box.dataset.group)), chosen = chosenData();
    const withPublished = Boolean(published) && published.checked;
    board.classList.toggle("no-published", !withPublished);
    data.columns.forEach((one, column) => {
      const shown = one.data === "" ? withPublished : !unchecked.includes(one.group) && (!chosen || one.data === chosen);
      if (shown === isShown[column]) return;
      isShown[column] = shown;
      heads[column].classList.toggle("hidden", !shown);
      for (const row of body.rows) row.cells[column + 1].classList.toggle("hidden", !shown);
    });
    board.querySelectorAll("th.group").forEach((head, group) => {
      const count = data.columns.filter((one, column) => one.group === group && isShown[column]).length;
      head.classList.toggle("hidden", !count);
      head.colSpan = Math.max(1, count);
    });
    for (const box of boxes)
      box.closest(".chip").hidden = Boolean(chosen) && !data.columns.some((one) => one.group === Number(box.dataset.group) && one.data === chosen);
    for (const row of document.querySelectorAll("[data-of]")) row.hidden = Boolean(chosen) && row.dataset.of !== chosen;
    for (const section of document.querySelectorAll(".chart-section")) section.hidden = !section.querySelector(".row:not([hidden])");
    fillProtocols();
    filter();
  };

  // Filter by every word, and by the chosen data. Only `most` rows are laid out until all are requested; then the first of them
  // are painted before the rest.
  const most = 100, matching = at("shown");
  let all = false, frame = 0;
  const texts = data.rows.map((row) => `${row.name} ${row.arch} ${row.note}`.toLowerCase());
  const filter = () => {
    const words = at("filter").value.toLowerCase().split(/\s+/).filter(Boolean), chosen = chosenData();
    const unseen = board.classList.contains("no-published");
    let fitting = 0, measured = 0;
    for (const row of body.rows) {
      const other = row.classList.contains("pub"), line = cells[row.number];
      const fits = words.every((word) => texts[row.number].includes(word))
        && (!chosen || other || line.some((cell, column) => cell && data.columns[column].data === chosen));
      if (fits && !(other && unseen)) fitting += 1;
      measured += fits && !other;
      row.classList.toggle("hidden", !fits);
      row.classList.toggle("beyond", fitting > most);
    }
    cancelAnimationFrame(frame);
    const show = () => { for (const row of body.rows) row.classList.remove("beyond"); };
    if (all) frame = requestAnimationFrame(() => { frame = requestAnimationFrame(show); });
    matching.textContent = words.length || chosen ? `${measured} of ${data.measured} checkpoints match.` : "";
    at("all").hidden = all || fitting <= most;
    at("all").textContent = `Show all ${fitting.toLocaleString("en")} rows`;
    // The legend explains what is there.
    const seen = (kind) => body.querySelector(`tr:not(.hidden${unseen ? ", .pub" : ""}) > td${kind}:not(.hidden${unseen ? ", .pub" : ""})`);
    for (const entry of document.querySelectorAll(".legend [data-for]"))
      entry.hidden = !(entry.dataset.for === "shaded" ? seen(".h0") && seen(".h8") : seen(`.${entry.dataset.for}`));
    save();
  };
  at("all").addEventListener("click", () => { all = true; filter(); });
  at("filter").addEventListener("input", filter);
  [...boxes, dataSet, published].forEach((one) => one && one.addEventListener("change", showColumns));

  // The state of the page in its address. Columns stand there by the ids of their protocols: the same in every page.
  const isPublishedDefault = Boolean(published) && published.defaultChecked, titles = [...board.querySelectorAll("th.group")].map((head) => head.textContent);
  let isRestoring = true;
  const save = () => {
    if (isRestoring) return;
    const state = new URLSearchParams(), sorted = board.querySelector("th[aria-sort]:not([aria-sort=none])");
    const column = Number(sorted.querySelector("[data-sort]").dataset.sort), direction = sorted.getAttribute("aria-sort");
    if (column || direction !== "descending") state.set("sort", `${column < 0 ? "name" : data.columns[column].id}.${direction}`);
    if (at("filter").value) state.set("filter", at("filter").value);
    if (chosenData()) state.set("data", chosenData());
    boxes.filter((box) => !box.checked).forEach((box) => state.append("without", titles[box.dataset.group]));
    if (published && published.checked !== isPublishedDefault) state.set("published", Number(published.checked));
    if (all) state.set("rows", "all");
    history.replaceState(null, "", `${location.href.split("#")[0]}${String(state) && `#${state}`}`);
  };
  const restore = () => {
    isRestoring = true;
    const state = new URLSearchParams(location.hash.slice(1)), [column, direction] = (state.get("sort") || "").split(".");
    at("filter").value = state.get("filter") || "";
    if (dataSet) dataSet.value = [...dataSet.options].some((one) => one.value === state.get("data")) ? state.get("data") : "";
    boxes.forEach((box) => { box.checked = !state.getAll("without").includes(titles[box.dataset.group]); });
    if (published) published.checked = state.has("published") ? state.get("published") === "1" : isPublishedDefault;
    all = state.get("rows") === "all";
    const found = column === "name" ? -1 : data.columns.findIndex((one) => one.id === column);
    const known = (column === "name" || found >= 0) && ["ascending", "descending"].includes(direction);
    const head = board.querySelector(`[data-sort="${known ? found : 0}"]`), wanted = known ? direction : "descending";
    if (head.closest("th").getAttribute("aria-sort") !== wanted) sortBoard(head, wanted);
    showColumns();
    isRestoring = false;
  };
  addEventListener("hashchange", restore);

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
  const copy = (button, text) => {
    const area = make("textarea"), before = button.textContent;
    area.className = "sr";
    area.value = text;
    button.after(area);  // inside of the dialog, where it is open
    area.select();
    button.textContent = document.execCommand("copy") ? "Copied" : "Not copied";  // a page opened as a file may have no other clipboard
    area.remove();
    button.focus({ preventScroll: true });
    setTimeout(() => { button.textContent = before; }, 1600);
  };
  at("copy").addEventListener("click", () => copy(at("copy"), at("command").textContent));

  // The rows that match and the columns shown, as CSV. What a spreadsheet would take for a formula gets a quote in front.
  const field = (value) => {
    const text = String(value), safe = /^[=+\-@\uff1d\uff0b\uff0d\uff20']/.test(text) && typeof value === "string" ? `'${text}` : text;
    return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  const numbersOf = (row, column) => {
    const cell = cellOf(row, column), shown = row.cells[column + 1];
    if (!cell) return ["", "", "", ""];
    const records = Array.from({ length: cell.count }, (_, number) => unpack(cell.first + number));
    const statuses = records.map((one) => one.status), damaged = shown.classList.contains("damaged");
    const status = ["failed", "not_converged"].find((one) => statuses.includes(one)) || (damaged ? "damaged" : records.length ? "ok" : "published");
    const mean = cell.mean, [, spread] = shown.textContent.split("±");
    if (mean === undefined || mean === null) return [status.toUpperCase(), "", cell.count || "", status];
    const deviations = records.map((one) => (one.metrics.top1 - mean) ** 2).reduce((sum, one) => sum + one, 0);
    const std = records.length > 1 ? Number(percent(Math.sqrt(deviations / (records.length - 1)), 5)) : records.length || !spread ? "" : parseFloat(spread);
    return [Number(percent(mean, 5)), std, cell.count || "", status];
  };
  at("copy-table").addEventListener("click", () => {
    const columns = data.columns.flatMap((_, column) => (isShown[column] ? [column] : [])), unseen = board.classList.contains("no-published");
    const names = columns.flatMap((column) => ["top1 %", "std %", "draws", "status"].map((name) => `${data.columns[column].title}: ${name}`));
    const rows = [...body.rows].filter((row) => !row.classList.contains("hidden") && !(unseen && row.classList.contains("pub")));
    const lines = rows.map((row) => [data.rows[row.number].name, ...columns.flatMap((column) => numbersOf(row, column))]);
    copy(at("copy-table"), [["checkpoint", ...names], ...lines].map((line) => `${line.map(field).join(",")}\r\n`).join(""));
  });

  // Accuracy per class of one protocol, from counts of correct predictions over all draws.
  const choice = at("protocol");
  let fillProtocols = () => {};
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
      const rows = places.map((place, number) => {
        const row = make("tr"), name = make("th");
        name.scope = "row";
        name.append(make("bdi", names[place]));
        row.place = place;
        row.number = number;
        row.append(name, ...shares[place].map((share) => {
          const cell = make("td", percent(share, 1));
          cell.className = `h${Math.round(8 * share)}`;
          return cell;
        }), make("td", String(view.images[place])));
        return row;
      });
      table.tHead.replaceChildren(head);
      table.tBodies[0].replaceChildren(...rows);
      const note = make("span", `Accuracy in percent per class, ${data.columns[view.column].title}, ${view.draws === 1 ? "1 draw" : `mean of ${view.draws} draws`}${view.rows.length < data.measured ? `; ${view.rows.length} checkpoints` : ""}.`);
      note.className = "note";
      table.caption.replaceChildren(note);
      sortable(table, (row, column) => (column < view.rows.length ? shares[row.place][column] : view.images[row.place]), (row) => names[row.place], () => {});
    };
    fillProtocols = () => {
      const before = choice.value, chosen = chosenData();
      const fitting = data.views.flatMap((view, number) => (!chosen || data.columns[view.column].data === chosen ? [number] : []));
      choice.replaceChildren(...fitting.map((number) => {
        const option = make("option", data.columns[data.views[number].column].title);
        option.value = number;
        return option;
      }));
      choice.closest("section").hidden = !fitting.length;
      if (fitting.includes(Number(before)) && before) choice.value = before;
      else if (fitting.length) showClasses(data.views[fitting[0]]);
    };
    choice.addEventListener("change", () => showClasses(data.views[choice.value]));
  }
  restore();

  // Paper does not scroll: a table wider than a landscape page is made smaller.
  const paper = 1020;
  const tables = document.querySelectorAll("table");
  addEventListener("beforeprint", () => tables.forEach((one) => { one.style.zoom = Math.min(1, paper / one.offsetWidth); }));
  addEventListener("afterprint", () => tables.forEach((one) => { one.style.zoom = ""; }));
})();
