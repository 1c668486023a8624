// Draws the charts when they come into view, in the colors of the theme; with buttons to zoom, and a table of each.
"use strict";

const drawnCharts = new Map(); // figure -> {chart, domain}

function themeColor(name) {
  const probe = make("span", { style: `color: var(--${name})` });
  document.body.append(probe);
  const color = getComputedStyle(probe).color;
  probe.remove();
  return color;
}

function themeConfig() {
  const [text, quiet, line] = ["text", "quiet", "line"].map(themeColor);
  const font = getComputedStyle(document.body).fontFamily;
  return {
    background: "transparent",
    font,
    view: { stroke: null },
    axis: { labelColor: quiet, titleColor: quiet, gridColor: line, domainColor: line, tickColor: line, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" },
    legend: { labelColor: text, titleColor: text, labelFontSize: 12 },
    text: { color: text, fontSize: 12 },
    style: { text: { fill: text } },
  };
}

async function drawChart(figure) {
  const state = drawnCharts.get(figure);
  const spec = structuredClone(state.chart.spec);
  if (state.domain) spec.encoding.x.scale = { ...spec.encoding.x.scale, domain: state.domain };
  const plot = figure.querySelector(".plot");
  plot.classList.toggle("bars", spec.height < 200);
  const theme = document.documentElement.dataset.theme;
  state.view?.finalize();
  // Expressions are interpreted, not compiled, so that the page needs no permission to evaluate text.
  const result = await vegaEmbed(plot, spec, {
    actions: false,
    renderer: "svg",
    ast: true,
    config: themeConfig(),
    tooltip: { theme: theme === "dark" ? "dark" : "light" },
  });
  state.view = result;
}

function zoomChart(figure, factor) {
  const state = drawnCharts.get(figure);
  const [first, last] = state.chart.zoom;
  const [low, high] = state.domain ?? [first, last];
  const half = Math.max(((high - low) * factor) / 2, (last - first) / 500);
  const middle = Math.min(Math.max((low + high) / 2, first + half), last - half);
  state.domain = factor && 2 * half < last - first ? [middle - half, middle + half] : null;
  drawChart(figure);
}

function fillTable(details, chart) {
  if (details.querySelector("table")) return;
  const rows = chart.spec.data.values.map((value) =>
    make("tr", {}, ...chart.columns.map(([field]) => {
      const cell = value[field];
      return make("td", {}, typeof cell === "number" ? String(Number(cell.toPrecision(6))) : String(cell ?? "–"));
    })),
  );
  const headings = chart.columns.map(([, heading]) => make("th", { scope: "col" }, heading));
  const table = make("table", { class: "numeric" }, make("caption", {}, chart.title),
    make("thead", {}, make("tr", {}, ...headings)), make("tbody", {}, ...rows));
  details.append(make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `${chart.title}, table` }, table));
}

function prepareChart(figure) {
  const chart = report.charts[figure.dataset.chart];
  drawnCharts.set(figure, { chart, domain: null });
  const caption = figure.querySelector("figcaption");
  caption.append(make("strong", {}, chart.title));
  if (chart.zoom) {
    const label = (action) => `${action}: ${chart.title}`;
    caption.append(
      make("button", { type: "button", "aria-label": label("zoom in"), onclick: () => zoomChart(figure, 0.5) }, "+"),
      make("button", { type: "button", "aria-label": label("zoom out"), onclick: () => zoomChart(figure, 2) }, "−"),
      make("button", { type: "button", "aria-label": label("show all"), onclick: () => zoomChart(figure, 0) }, "all"),
    );
  }
  if (chart.note) caption.append(make("p", { class: "note" }, chart.note));
  const details = make("details", {}, make("summary", {}, "Table"));
  details.addEventListener("toggle", () => fillTable(details, chart));
  figure.append(details);
}

function prepareCharts() {
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      observer.unobserve(entry.target);
      drawChart(entry.target);
    }
  }, { rootMargin: "300px" });
  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    prepareChart(figure);
    observer.observe(figure);
  }
}

let chartsAreStale = false;

// A chart that is hidden has no width; it is drawn again when it is shown.
function redrawCharts() {
  chartsAreStale = document.getElementById("overview").hidden;
  if (chartsAreStale) return;
  for (const [figure, state] of drawnCharts) if (state.view) drawChart(figure);
}
