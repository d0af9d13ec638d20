"use strict";
// Shows a curve's values under the pointer, the finger or the arrow keys. Without it the page is still complete.
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const figures = [...document.querySelectorAll("figure[data-chart]")];

  const trim = (text) => (text.includes(".") ? text.replace(/0+$/, "").replace(/\.$/, "") : text);
  const superscript = (text) => [...text].map((c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]).join("");
  const grouped = (text) => {
    const [whole, fraction] = text.split(".");
    const commas = whole.replace(/\B(?=(\d{3})+$)/g, ",");
    return fraction === undefined ? commas : `${commas}.${fraction}`;
  };
  const number = (value) => {
    const size = Math.abs(value);
    if (value !== 0 && (size < 1e-4 || size >= 1e6)) {
      const [mantissa, exponent] = value.toExponential(2).split("e");
      return `${trim(mantissa)} × 10${superscript(String(Number(exponent)))}`;
    }
    const decimals = value === 0 ? 0 : Math.max(0, 3 - Math.floor(Math.log10(size)));
    return grouped(trim(value.toFixed(decimals)));
  };
  const bytes = (value) => {
    let unit = 0;
    while (Math.abs(value) >= 999.5 && unit < 4) { value /= 1000; unit += 1; }
    return `${Number(value.toPrecision(3))} ${["B", "kB", "MB", "GB", "TB"][unit]}`;
  };
  const seconds = (value) => {
    if (value < 10) return `${value.toFixed(1)} s`;
    const whole = Math.round(value), two = (part) => String(part).padStart(2, "0");
    if (whole < 60) return `${whole} s`;
    if (whole < 3600) return `${Math.floor(whole / 60)} min ${two(whole % 60)} s`;
    return `${Math.floor(whole / 3600)} h ${two(Math.floor((whole % 3600) / 60))} min`;
  };
  const forms = {
    share: (value) => `${(value * 100).toFixed(value !== 0 && Math.abs(value) < 0.01 ? 2 : 1)}%`,
    count: (value) => grouped(value.toFixed(0)),
    seconds,
    bytes,
    number,
  };
  const written = (value, unit) => (value === null ? "not finite" : forms[unit](value).replaceAll("-", "−"));

  // The index of the last update at or before `update`, or of the first one.
  const before = (updates, update) => {
    let low = 0, high = updates.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (updates[middle] <= update) low = middle; else high = middle - 1;
    }
    return low;
  };
  const nearest = (updates, update) => {
    const i = before(updates, update);
    const next = Math.min(i + 1, updates.length - 1);
    return Math.abs(updates[next] - update) < Math.abs(updates[i] - update) ? next : i;
  };

  const make = (name, cls, text) => {
    const element = document.createElement(name);
    if (cls) element.className = cls;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const place = (range, value) => (value - range[0]) / (range[1] - range[0]);

  const views = figures.map((figure) => {
    const chart = charts[Number(figure.dataset.chart)];
    const plot = figure.querySelector(".plot");
    const cursor = make("div", "cursor");
    const tooltip = make("div", "tooltip");
    const dots = chart.lines.map((line) => make("div", `cursor-dot c-${line.colour}`));
    const moving = [cursor, ...dots, tooltip];
    moving.forEach((element) => { element.hidden = true; element.setAttribute("aria-hidden", "true"); });
    plot.append(...moving);
    const updates = [...new Set(chart.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    const view = { figure, chart, plot, cursor, tooltip, dots, updates, at: updates.length - 1 };
    plot.setAttribute("role", "slider");
    plot.setAttribute("aria-valuemin", String(updates[0]));
    plot.setAttribute("aria-valuemax", String(updates[updates.length - 1]));
    speak(view);
    return view;
  });

  function readings(view, update) {
    return view.chart.lines.map((line) => {
      const i = before(line.x, update);
      return { line, update: line.x[i], value: line.y[i], known: line.x[i] <= update };
    });
  }

  function speak(view) {
    const update = view.updates[view.at];
    const told = readings(view, update).filter((r) => r.known).map((r) => `${r.line.label} ${written(r.value, view.chart.unit)}`);
    view.plot.setAttribute("aria-valuenow", String(update));
    view.plot.setAttribute("aria-valuetext", `update ${update}: ${told.join(", ")}`);
  }

  function show(view, update, withTooltip) {
    const x = place(view.chart.x, update);
    view.cursor.hidden = x < 0 || x > 1;
    view.cursor.style.left = `${x * 100}%`;
    const rows = readings(view, update);
    rows.forEach((reading, i) => {
      const dot = view.dots[i];
      dot.hidden = view.cursor.hidden || !reading.known || reading.value === null;
      if (dot.hidden) return;
      dot.style.left = `${place(view.chart.x, reading.update) * 100}%`;
      dot.style.bottom = `${place(view.chart.y, reading.value) * 100}%`;
    });
    view.tooltip.hidden = !withTooltip;
    if (!withTooltip) return;
    view.tooltip.replaceChildren(make("div", "at", `update ${grouped(String(update))}`));
    for (const reading of rows.filter((r) => r.known)) {
      const row = make("div", `c-${reading.line.colour}`);
      const late = reading.update === update ? "" : ` at ${grouped(String(reading.update))}`;
      row.append(make("i", "swatch"), make("span", "", reading.line.label + late));
      row.append(make("b", "", written(reading.value, view.chart.unit)));
      view.tooltip.append(row);
    }
    // Away from the curve: in the lower half where the values are high, beside the crosshair, inside the page.
    const heights = rows.filter((r) => r.known && r.value !== null).map((r) => place(view.chart.y, r.value));
    const high = heights.filter((h) => h > 0.5).length * 2 >= heights.length;
    view.tooltip.style.top = high ? "auto" : "0.25rem";
    view.tooltip.style.bottom = high ? "0.25rem" : "auto";
    const width = view.plot.clientWidth, own = view.tooltip.offsetWidth, left = x * width;
    const wanted = left + 14 + own <= width ? left + 14 : left - 14 - own;
    const edge = view.plot.getBoundingClientRect().left;
    const most = document.documentElement.clientWidth - edge - own - 4;
    view.tooltip.style.left = `${Math.min(Math.max(wanted, 4 - edge), most)}px`;
  }

  function select(view, at) {
    view.at = Math.min(Math.max(at, 0), view.updates.length - 1);
    speak(view);
    const update = view.updates[view.at];
    for (const other of views) {
      if (other.figure.dataset.axis === view.figure.dataset.axis) show(other, update, other === view);
    }
  }

  function hide() {
    for (const view of views) [view.cursor, view.tooltip, ...view.dots].forEach((element) => { element.hidden = true; });
  }

  for (const view of views) {
    const point = (event) => {
      const box = view.plot.getBoundingClientRect();
      const share = (event.clientX - box.left) / box.width;
      select(view, nearest(view.updates, view.chart.x[0] + share * (view.chart.x[1] - view.chart.x[0])));
    };
    view.plot.addEventListener("pointermove", point);
    view.plot.addEventListener("pointerdown", point);
    view.plot.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
    view.plot.addEventListener("focus", () => { if (view.plot.matches(":focus-visible")) select(view, view.at); });
    view.plot.addEventListener("blur", hide);
    view.plot.addEventListener("keydown", (event) => {
      const jump = Math.max(1, Math.round(view.updates.length / 10));
      const moves = {
        ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: jump, PageDown: -jump,
        Home: -Infinity, End: Infinity,
      };
      if (event.key === "Escape") { hide(); return; }
      if (!(event.key in moves)) return;
      event.preventDefault();
      select(view, view.at + moves[event.key]);
    });
  }
  document.addEventListener("pointerdown", (event) => { if (!event.target.closest(".plot")) hide(); });

  // In a sandboxed srcdoc frame a link to #section would load the surrounding page: scroll instead.
  for (const link of document.querySelectorAll('a[href^="#"]')) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      document.getElementById(link.getAttribute("href").slice(1))?.scrollIntoView();
    });
  }

  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((element) => { element.open = true; });
  });
  addEventListener("afterprint", () => { opened.forEach((element) => { element.open = false; }); });
})();
