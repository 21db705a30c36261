"use strict";

// Sorting: a heading sorts upwards, then downwards; what was not measured stays at the end.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.key;
      const numbers = [...body.rows].every((row) => key(row) === "" || !Number.isNaN(Number(key(row))));
      const compare = (a, b) => {
        if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "");
        const order = numbers ? Number(key(a)) - Number(key(b)) : key(a) < key(b) ? -1 : Number(key(a) > key(b));
        return down ? -order : order;
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}

// Charts: the specifications of figures.py, fitted to the page's width and, on dark ground, in its inks.
const chartData = document.getElementById("chart-data");
if (chartData) {
  const { specs, datasets, captions } = JSON.parse(chartData.textContent);
  const AXIS_ROOM = 84;
  const NARROW = 640;
  const PANEL = 190;
  const CHARACTER = 6.5;

  const inks = () => {
    const style = getComputedStyle(document.documentElement);
    const [ink, soft, line, grid] = ["--ink", "--soft", "--line", "--grid"].map((name) => style.getPropertyValue(name).trim());
    return {
      background: "transparent",
      padding: 8,
      text: { color: soft },
      axis: { labelColor: soft, titleColor: ink, gridColor: grid, domainColor: line, tickColor: line },
      legend: { labelColor: ink, titleColor: soft },
      header: { labelColor: ink, titleColor: ink },
    };
  };

  const fitWrapped = (spec, width) => {
    const gap = spec.spacing;
    const fitting = Math.max(1, Math.floor((width - AXIS_ROOM + gap) / (PANEL + gap)));
    if (fitting < spec.columns) {
      spec.columns = fitting;
      spec.resolve = { ...spec.resolve, axis: { ...spec.resolve?.axis, x: "independent" } };
    }
    spec.spec.width = Math.floor((width - AXIS_ROOM - gap * (spec.columns - 1)) / spec.columns);
  };

  const fitGrid = (spec, width) => {
    const columns = spec.facet.column.sort.length;
    // The narrowest panel that is still read; below it the chart scrolls.
    const each = Math.max(64, Math.floor((width - AXIS_ROOM - 26 - spec.spacing * (columns - 1)) / columns));
    spec.spec.width = each;
    if (each <= 110) {
      spec.spec.encoding.x.title = "log10 rate";
      spec.spec.encoding.x.axis.tickCount = 3;
    }
  };

  const fitPair = (spec, width) => {
    const panels = spec.hconcat;
    const { axis, sort } = panels[0].encoding.y;
    const lines = axis.labels ? sort.flatMap((name) => name.split(", ")) : [];
    const room = Math.max(AXIS_ROOM, 24 + CHARACTER * Math.max(0, ...lines.map((line) => line.length)));
    if (width >= NARROW) {
      panels.forEach((panel) => (panel.width = Math.floor((width - room - spec.spacing) / 2)));
      return;
    }
    panels.forEach((panel) => {
      panel.width = Math.floor(width - room);
      panel.encoding.y = panels[0].encoding.y;
    });
    spec.vconcat = panels;
    delete spec.hconcat;
  };

  const fitMaps = (spec, width) => {
    const first = spec.concat[0].spec;
    if (width < NARROW) spec.columns = 2;
    const each = Math.floor((width - AXIS_ROOM - (spec.columns - 1) * (spec.spacing + (width < NARROW ? AXIS_ROOM : 0))) / spec.columns);
    spec.concat.forEach((map, index) => {
      map.spec.width = each;
      // The maps that begin a line name the hooks.
      if (index % spec.columns === 0) map.spec.layer.forEach((layer, part) => (layer.encoding.y = first.layer[part].encoding.y));
    });
  };

  const fitted = (name, width) => {
    const spec = structuredClone(specs[name]);
    spec.datasets = datasets;
    for (const [part, values] of Object.entries(inks())) {
      spec.config[part] = typeof values === "object" ? { ...spec.config[part], ...values } : values;
    }
    if (spec.layer) {
      spec.width = width;
      spec.autosize = { type: "fit-x", contains: "padding" };
      if (width < NARROW) spec.layer = spec.layer.filter((layer) => layer.name !== "notes");
    } else if (spec.hconcat) fitPair(spec, width);
    else if (spec.concat) fitMaps(spec, width);
    else if (spec.facet.row && !spec.facet.column) spec.spec.width = width - AXIS_ROOM;
    else if (spec.facet.column) fitGrid(spec, width);
    else fitWrapped(spec, width);
    return spec;
  };

  const draw = (element) => {
    const name = element.dataset.chart;
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    vegaEmbed(element, fitted(name, Math.floor(element.clientWidth) - 4), {
      actions: { export: true, source: false, compiled: false, editor: false },
      ast: true,
      downloadFileName: name,
      renderer: "svg",
      tooltip: { theme: dark ? "dark" : "light" },
    }).catch((error) => {
      element.textContent = `This chart could not be drawn: ${error.message}`;
    });
  };

  const drawAll = () => document.querySelectorAll("[data-chart]").forEach(draw);
  let drawnAt = 0;
  let waiting = 0;
  const redraw = () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      if (document.body.clientWidth !== drawnAt) {
        drawnAt = document.body.clientWidth;
        drawAll();
      }
    }, 150);
  };
  drawnAt = document.body.clientWidth;
  drawAll();
  addEventListener("resize", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

  for (const radio of document.querySelectorAll('input[name="measure"]')) {
    radio.addEventListener("change", () => {
      const element = document.querySelector('[data-chart^="curves-"]');
      element.dataset.chart = radio.value;
      element.nextElementSibling.textContent = captions[radio.value].join(" · ");
      draw(element);
    });
  }
}
