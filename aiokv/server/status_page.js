"use strict";
// Shows new figures every two seconds: rates and percentiles over the last minute, from the difference of two readings.
(() => {
  const PERIOD_MS = 2000, KEPT = 31;
  // Half a digit goes up, as on the server.
  const fixed = (value, digits) => (Math.floor(value * 10 ** digits + 0.5) / 10 ** digits).toLocaleString("en-US", {
    minimumFractionDigits: digits, maximumFractionDigits: digits,
  });
  const span = (value) => {
    const minutes = Math.floor(value / 60), hours = Math.floor(value / 3600);
    if (!minutes) return `${Math.floor(value)} s`;
    if (!hours) return `${minutes} min`;
    return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
  };
  const formats = {
    text: String,
    count: (value) => fixed(value, 0),
    rate: (value) => (value > 0 && value < 0.1 ? "< 0.1" : fixed(value, value > 0 && value < 10 ? 1 : 0)),
    bytes: (value) => {
      const units = ["B", "kB", "MB", "GB", "TB"];
      let unit = 0;
      for (; value >= 1000 && unit < units.length - 1; unit += 1) value /= 1000;
      return `${fixed(value, unit === 0 || value >= 100 ? 0 : 1)} ${units[unit]}`;
    },
    seconds: (value) => {
      if (value < 1e-3) return `${fixed(value * 1e6, 0)} \u00b5s`;
      if (value < 1) return `${fixed(value * 1e3, value < 1e-2 ? 1 : 0)} ms`;
      return `${fixed(value, 1)} s`;
    },
    percent: (value) => `${fixed(value * 100, 1)} %`,
    span,
    moment: (value) => `${new Date(value * 1000).toISOString().slice(0, 19).replace("T", " ")} UTC`,
  };
  const show = (value, form) => (value === null || value === undefined ? "–" : formats[form](value));
  const lookUp = (reading, path) => path.split(".").reduce((value, name) => (value === null ? null : value[name]), reading);

  // Buckets are [low, high, count]; high is null in the last one.
  const difference = (before, after) => {
    const counts = new Map(before.map(([low, , n]) => [low, n]));
    return after.map(([low, high, n]) => [low, high, n - (counts.get(low) || 0)]).filter(([, , n]) => n > 0);
  };
  const quantile = (buckets, share) => {
    const rank = share * buckets.reduce((sum, [, , n]) => sum + n, 0);
    let sum = 0;
    for (const [low, high, n] of buckets) {
      sum += n;
      if (sum >= rank) return high === null ? low : low + ((high - low) * (rank - sum + n)) / n;
    }
    return null;
  };
  const ratio = (part, whole) => (whole > 0 ? part / whole : null);
  const between = (before, after) => {
    const seconds = after.time - before.time;
    const rate = (name) => (after[name] - before[name]) / seconds;
    const hits = after.hits - before.hits, misses = after.misses - before.misses;
    const [old, store] = [before.store || {}, after.store || {}];
    const verbs = {};
    for (const [name, verb] of Object.entries(after.verbs)) {
      const buckets = difference(before.verbs[name].durations, verb.durations);
      verbs[name] = {
        rate: (verb.requests - before.verbs[name].requests) / seconds,
        p50: quantile(buckets, 0.5), p90: quantile(buckets, 0.9), p99: quantile(buckets, 0.99),
      };
    }
    return {
      name: `over the last ${span(Math.round(seconds))}`,
      requests: rate("requests"), bytes_in: rate("bytes_in"), bytes_out: rate("bytes_out"),
      hit_ratio: ratio(hits, hits + misses),
      writes_per_commit: ratio(store.committed_writes - old.committed_writes, store.commits - old.commits),
      verbs,
    };
  };

  const readings = [];
  const lines = { requests: [], hit_ratio: [], p99: [], connections: [] };
  const add = (reading) => {
    const last = readings.at(-1);
    if (last && (reading.time <= last.time || reading.requests < last.requests)) {
      // The server began anew, or its clock was set back.
      readings.length = 0;
      for (const values of Object.values(lines)) values.length = 0;
    } else if (last) {
      const step = between(last, reading);
      lines.requests.push(step.requests);
      lines.hit_ratio.push(step.hit_ratio);
      lines.p99.push(step.verbs.get.p99);
      lines.connections.push(reading.connections);
      for (const values of Object.values(lines)) if (values.length >= KEPT) values.shift();
    }
    readings.push(reading);
    if (readings.length > KEPT) readings.shift();
    if (readings.length > 1) reading.window = between(readings[0], reading);
  };
  const draw = (svg, values) => {
    const known = values.filter((value) => value !== null);
    if (known.length < 2) return;
    const top = svg.dataset.line === "hit_ratio" ? 1 : Math.max(...known) * 1.1 || 1;
    const points = values
      .map((value, index) => [120 - (values.length - 1 - index) * (120 / (KEPT - 2)), value])
      .filter(([, value]) => value !== null)
      .map(([x, value]) => [x.toFixed(2), (31 - (value / top) * 30).toFixed(2)]);
    svg.classList.add("drawn");
    const path = `M${points.map((point) => point.join(" ")).join("L")}`;
    svg.querySelector(".stroke").setAttribute("d", path);
    svg.querySelector(".area").setAttribute("d", `${path}L${points.at(-1)[0]} 32L${points[0][0]} 32Z`);
  };
  const showWorkers = (workers) => {
    const body = document.getElementById("workers");
    while (body.rows.length > workers.length) body.deleteRow(-1);
    while (body.rows.length < workers.length) body.append(body.rows[0].cloneNode(true));
    workers.forEach((worker, index) => {
      for (const cell of body.rows[index].cells) cell.textContent = show(worker[cell.dataset.name], cell.dataset.form);
    });
  };
  const showReading = (reading) => {
    for (const element of document.querySelectorAll("[data-path]")) {
      const value = lookUp(reading, element.dataset.path);
      element.textContent = show(value, element.dataset.form);
      if ("nonzero" in element.parentElement.dataset) element.parentElement.hidden = value === 0;
    }
    for (const none of document.querySelectorAll("[data-none]")) {
      none.hidden = none.parentElement.querySelector("[data-nonzero]:not([hidden])") !== null;
    }
    for (const svg of document.querySelectorAll("[data-line]")) draw(svg, lines[svg.dataset.line]);
    showWorkers(reading.workers);
    document.getElementById("state").dataset.state = reading.state;
    document.getElementById("problem").hidden = reading.problem === null;
    document.body.classList.remove("stale");
  };
  const showSilence = (reason) => {
    const problem = document.getElementById("problem"), state = document.getElementById("state");
    problem.hidden = false;
    problem.firstElementChild.textContent = `The figures below are old: ${reason}`;
    state.dataset.state = state.lastElementChild.textContent = "No answer";
    document.body.classList.add("stale");
  };
  // The page's address may hold credentials, which fetch() takes in no URL; the browser sends them by itself.
  const figures = `${location.origin}${location.pathname}.json`;
  const look = async () => {
    if (!document.hidden) {
      try {
        const answer = await fetch(figures, { cache: "no-store", signal: AbortSignal.timeout(5000) });
        if (answer.ok) {
          const reading = await answer.json();
          add(reading);
          showReading(reading);
        } else {
          showSilence(`the server answers ${answer.status}.`);
        }
      } catch {
        showSilence("the server does not answer.");
      }
    }
    setTimeout(look, PERIOD_MS);
  };
  look();
})();
