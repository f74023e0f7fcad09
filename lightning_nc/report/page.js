"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const drawn = new Set();
const config = { responsive: true, displayModeBar: false };
const touched = matchMedia("(pointer: coarse)").matches; // a finger that moves over a figure scrolls the page

// A color is a pair, of light pages and of dark ones.
function themed(value) {
  if (typeof value === "string") return /^#\w{6}\/#\w{6}$/.test(value) ? value.split("/")[+dark.matches] : value;
  if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map(themed);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([name, part]) => [name, themed(part)]));
}

function layoutOf(own) {
  const axis = { gridcolor: "#DDDDDD/#3A3F44", linecolor: "#999999/#777777", zeroline: false, automargin: true };
  const base = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: "#222222/#DDDDDD", size: 12 },
    margin: { l: 50, r: 10, t: 10, b: 40 }, showlegend: false, hovermode: "closest",
    hoverlabel: { namelength: -1, bgcolor: "#FFFFFF/#1E2226", font: { color: "#222222/#DDDDDD" } }, dragmode: touched ? false : "zoom",
  };
  return themed({ ...base, ...own, xaxis: { ...axis, ...own.xaxis }, yaxis: { ...axis, ...own.yaxis } });
}

// ----------------------------------------------------------------------------------------------------- curves

const hidden = { run: new Set(), layer: new Set(), stage: new Set() };

function isShown([run, layer, stage]) {
  return !(hidden.run.has(run) || hidden.layer.has(layer) || hidden.stage.has(stage));
}

function tracesOf(figure) {
  return themed(figure.data).map((trace) => (trace.meta ? { ...trace, visible: isShown(trace.meta) } : trace));
}

for (const group of document.querySelectorAll("fieldset[data-group]")) {
  const buttons = [...group.querySelectorAll("button")];
  const apply = () => {
    hidden[group.dataset.group] = new Set(
      buttons.filter((button) => button.getAttribute("aria-pressed") === "false").map((button) => +button.value));
  };
  for (const button of buttons) {
    button.addEventListener("click", () => {
      const one = "one" in group.dataset;
      for (const other of one ? buttons : [button]) {
        const pressed = one ? other === button : other.getAttribute("aria-pressed") === "false";
        other.setAttribute("aria-pressed", pressed);
      }
      apply();
      drawn.forEach((div) => data.figures[div.id]?.data[0]?.meta && draw(div));
    });
  }
  apply();
}

// --------------------------------------------------------------------------------------------------- geometry

function pointsOf(moving, rows, look) {
  const [x, y, z] = [0, 1, 2].map((axis) => rows.map((row) => (row === null ? null : row[axis])));
  const solid = moving.axes === 3;
  return { type: solid ? "scatter3d" : "scatter", x, y, ...(solid ? { z } : {}), hoverinfo: "name", ...look };
}

function movingTraces(moving, at) {
  const frame = moving.frames[at];
  const solid = moving.axes === 3;
  const origin = Array(moving.axes).fill(0);
  const edges = moving.edges.flatMap(([from, to]) => [moving.corners[from], moving.corners[to], null]);
  const traces = [pointsOf(moving, edges, {
    name: "ideal frame", mode: "lines", line: { color: "#888888/#999999", dash: "dash", width: solid ? 4 : 1.5 },
  })];
  moving.classes.forEach((name, place) => {
    const color = moving.colors[place];
    traces.push(pointsOf(moving, frame.samples[place], {
      name: `${name}, samples`, mode: "markers", opacity: 0.55, marker: { color, size: solid ? 2.5 : 6 },
    }));
    traces.push(pointsOf(moving, [frame.means[place]], {
      name: `${name}, class mean`, mode: "markers",
      marker: { color, size: solid ? 7 : 15, line: { color: "#FFFFFF/#14171A", width: 2 } },
    }));
    if (frame.weight.length) {
      traces.push(pointsOf(moving, [origin, frame.weight[place]], {
        name: `${name}, row of the weight`, mode: "lines+markers",
        line: { color, width: solid ? 6 : 2.5 },
        marker: { color, size: [0, solid ? 6 : 13], symbol: solid ? "diamond" : "arrow", ...(solid ? {} : { angleref: "previous" }) },
      }));
    }
    traces.push(pointsOf(moving, [moving.corners[place].map((x) => 1.3 * x)], {
      name, mode: "text", text: [name], hoverinfo: "skip", textfont: { color, size: 15 },
    }));
  });
  return themed(traces);
}

function movingLayout(moving) {
  const range = [-moving.limit, moving.limit];
  const bare = { range, showticklabels: false, showgrid: false, zeroline: false, showline: true, mirror: true, showspikes: false };
  if (moving.axes < 3) {
    return layoutOf({ xaxis: bare, yaxis: { ...bare, scaleanchor: "x" }, margin: { l: 5, r: 5, t: 5, b: 5 }, uirevision: "keep" });
  }
  const axis = { ...bare, visible: false };
  const camera = { eye: { x: 0.35, y: -1.2, z: 0.4 } };
  return layoutOf({
    scene: { xaxis: axis, yaxis: axis, zaxis: axis, aspectmode: "cube", camera, dragmode: "turntable" },
    margin: { l: 0, r: 0, t: 0, b: 0 }, uirevision: "keep",
  });
}

function move(box) {
  const moving = data.moving[box.dataset.moving];
  const at = +box.querySelector("input").value;
  const frame = moving.frames[at];
  const all = frame.samples.flat();
  const outside = all.filter((row) => row.some((x) => Math.abs(x) > moving.limit)).length;
  box.querySelector("output").textContent =
    `epoch ${frame.epoch}` + (outside ? ` (${outside} of ${all.length} samples are outside the picture)` : "");
  return Plotly.react(box.querySelector(".plot"), movingTraces(moving, at), movingLayout(moving), config);
}

for (const box of document.querySelectorAll("[data-moving]")) {
  const slider = box.querySelector("input");
  const button = box.querySelector("button");
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "Play"; };
  slider.addEventListener("input", () => { stop(); move(box); });
  button.addEventListener("click", () => {
    if (timer !== null) return stop();
    if (slider.value === slider.max) slider.value = 0;
    button.textContent = "Stop";
    move(box);
    timer = setInterval(() => {
      slider.value = +slider.value + 1;
      move(box);
      if (slider.value === slider.max) stop();
    }, Math.max(60, Math.min(400, 8000 / (+slider.max || 1))));
  });
}

// -------------------------------------------------------------------------------------------------- all figures

function draw(div) {
  const box = div.closest("[data-moving]");
  if (box) return move(box);
  const figure = data.figures[div.id];
  return Plotly.react(div, tracesOf(figure), layoutOf(figure.layout), config);
}

// A figure is drawn when it comes near the screen, so that the page opens at once.
const watcher = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (isIntersecting && !drawn.has(target)) {
      drawn.add(target);
      watcher.unobserve(target);
      draw(target);
    }
  }
}, { rootMargin: "300px" });

// Words and tables can be read before plotly.js, the largest part of the page, has run.
requestAnimationFrame(() => setTimeout(() => {
  const code = document.createElement("script");
  code.textContent = document.getElementById("plotly").textContent;
  document.head.append(code);
  document.querySelectorAll(".plot").forEach((div) => watcher.observe(div));
  dark.addEventListener("change", () => drawn.forEach(draw));
}));

// -------------------------------------------------------------------------------------------------- sorted tables

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const body = head.closest("table").tBodies[0];
    const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
    const value = (row) => { const text = row.cells[head.cellIndex].dataset.value; return text === "" ? -Infinity : +text; };
    const rows = [...body.rows].sort((one, other) => sign * (value(one) - value(other) || 0));
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", sign < 0 ? "descending" : "ascending");
    body.append(...rows);
  });
}
