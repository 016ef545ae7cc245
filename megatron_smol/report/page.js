// Draws the charts of a report with uPlot, from the JSON in the page. Drag to zoom, double-click to see all again, click a
// name in the legend to hide its line; charts over the same tokens zoom and point together. Loads nothing.
"use strict";
(() => {
  const HOVER_PX = 30, INK = "#1f2933", GRID = "#e9edf0", BAD = "#b42318", MUTED = "#66737f";
  const FONT = '12px "Segoe UI", "Helvetica Neue", "Liberation Sans", Arial, sans-serif';
  const charts = [];

  const trim = (value, digits) => String(Number(value.toPrecision(digits)));
  const scaled = (value, digits) => {
    for (const [scale, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(value) >= scale * 0.99995) return trim(value / scale, digits) + letter;
    return trim(value, digits);
  };
  const FORMATS = {
    tokens: scaled,
    whole: (value) => Math.round(value).toLocaleString("en"),
    percent: (value, digits) => trim(100 * value, digits) + "%",
    number: (value, digits) =>
      value !== 0 && (Math.abs(value) < 1e-4 || Math.abs(value) >= 1e6)
        ? Number(value.toPrecision(digits)).toExponential() : trim(value, digits),
  };
  const faded = (hex, alpha) => hex + Math.round(255 * alpha).toString(16).padStart(2, "0");

  // Lines of one stack lie on top of each other; a hidden one leaves no gap.
  function stacked(lines, data, shown) {
    const sums = {};
    return data.map((values, i) => {
      const stack = i && lines[i - 1].stack;
      if (!stack || !shown(i)) return values;
      const below = sums[stack];
      sums[stack] = values.map((value, j) => (value == null ? value : value + ((below && below[j]) || 0)));
      return sums[stack];
    });
  }

  function draw(holder, spec) {
    const lines = spec.lines;
    // uPlot draws later series over earlier ones: areas come first, from the top of their stack down.
    const all = lines.map((_, i) => i);
    const order = [...all.filter((i) => lines[i].fill).reverse(), ...all.filter((i) => !lines[i].fill)];
    const joined = uPlot.join(lines.map((line) => [line.x, line.y]));
    const isStacked = lines.some((line) => line.stack);
    const fullX = spec.x_range || [joined[0][0], joined[0][joined[0].length - 1]];
    const fx = FORMATS[spec.x_format], fy = FORMATS[spec.y_format];
    const zoomed = (u) => u.scales.x.min != null && (u.scales.x.min > fullX[0] || u.scales.x.max < fullX[1]);

    const series = lines.map((line, i) => ({
      label: line.label,
      class: line.named === false ? "unnamed" : "named",
      stroke: line.width ? faded(line.colour, line.alpha ?? 1) : undefined,
      width: line.width,
      dash: line.dash && line.dash.length ? line.dash : undefined,
      fill: line.fill ? line.colour : undefined,
      paths: line.stepped ? uPlot.paths.stepped({ align: 1 }) : uPlot.paths.linear(),
      points: { show: !!line.dots, size: 7, fill: line.colour, stroke: line.colour },
      value: (u, _v, _s, at) => (at == null || joined[i + 1][at] == null ? "–" : fy(joined[i + 1][at], 5)),
      spanGaps: !!line.stack,
    }));

    const narrow = holder.clientWidth < 520;
    const axis = { font: FONT, labelFont: FONT, stroke: MUTED, labelGap: 0, ticks: { stroke: GRID, size: 5, width: 1 }, grid: { stroke: isStacked ? "#ffffff55" : GRID, width: 1 } };
    const opts = {
      width: holder.clientWidth,
      height: spec.height,
      padding: [spec.marks.length ? 18 : 8, 12, 0, 0],
      drawOrder: isStacked ? ["series", "axes"] : ["axes", "series"],
      focus: { alpha: 1 },
      cursor: {
        points: { size: 6 },
        drag: { x: true, y: false, dist: 6 },
        sync: spec.sync ? { key: spec.sync, setSeries: false } : undefined,
        dataIdx: (u, s, at, x) => (s === 0 ? at : nearest(u, s, at, x)),
      },
      scales: {
        x: { time: false, range: (u, low, high) => (low == null || (low <= joined[0][0] && high >= joined[0].at(-1)) ? fullX : [low, high]) },
        y: { range: (u, low, high) => yRange(u, low, high) },
      },
      axes: [
        { ...axis, label: spec.x_label, size: 34, labelSize: 20, space: narrow ? 60 : 80, values: (u, v) => v.map((x) => fx(x, 5)) },
        { ...axis, label: spec.y_label, size: 58, labelSize: 18, space: 36, values: (u, v) => v.map((y) => fy(y, 5)) },
      ],
      series: [{ label: spec.x_label, value: (u, v) => (v == null ? "–" : fx(v, 6)) }, ...order.map((i) => series[i])],
      hooks: {
        ready: [(u) => ready(u)],
        draw: [(u) => { drawErrors(u); drawMarks(u); }],
        setScale: [(u, key) => key === "x" && holder.classList.toggle("zoomed", zoomed(u))],
        setSeries: [(u, i, change) => i != null && change.show != null && toggle(u, i, change.show)],
      },
    };
    const lineAt = (s) => lines[order[s - 1]];
    const data = [joined[0], ...order.map((i) => joined[i + 1])];
    const shown = (u) => (i) => !u || u.series[order.indexOf(i - 1) + 1].show;
    const arranged = (u) => {
      if (!isStacked) return data;
      const sums = stacked(lines, joined, shown(u));
      return [joined[0], ...order.map((i) => sums[i + 1])];
    };
    const plot = new uPlot(opts, arranged(null), holder);
    charts.push({ plot, holder, spec });

    function yRange(u, low, high) {
      if (spec.y_range && (isStacked || !zoomed(u))) return spec.y_range;
      if (low == null) return [0, 1];
      if (spec.from_zero) return [0, (high || 1) * 1.08];
      const error = Math.max(0, ...lines.flatMap((line) => line.errors || []));
      low -= error, high += error;
      const margin = 0.06 * (high - low) || 0.05 * Math.abs(high) || 0.05;
      return [low - margin, high + margin];
    }
    // The value of a line that lies nearest to the pointer, none when that is far away.
    function nearest(u, s, at, x) {
      const values = u.data[s], xs = u.data[0], reach = HOVER_PX / (u.bbox.width / devicePixelRatio) * (u.scales.x.max - u.scales.x.min);
      if (lineAt(s).stepped) {
        while (at > 0 && (xs[at] > x || values[at] == null)) at--;
        return values[at] == null || x > lineAt(s).x[lineAt(s).x.length - 1] ? null : at;
      }
      if (values[at] != null) return at;
      let before = at, after = at;
      while (before >= 0 && values[before] == null && x - xs[before] < reach) before--;
      while (after < xs.length && values[after] == null && xs[after] - x < reach) after++;
      const found = [before, after].filter((i) => i >= 0 && i < xs.length && values[i] != null && Math.abs(xs[i] - x) < reach);
      found.sort((a, b) => Math.abs(xs[a] - x) - Math.abs(xs[b] - x));
      return found.length ? found[0] : null;
    }
    function toggle(u, i, show) {
      u.series.forEach((other, j) => {
        if (j && j !== i && other.show !== show && lineAt(j).group === lineAt(i).group) u.setSeries(j, { show }, false);
      });
      if (isStacked) u.setData(arranged(u), false), u.redraw();
    }
    function drawErrors(u) {
      u.series.forEach((one, s) => {
        if (!s || !one.show || !lineAt(s).errors) return;
        const { x, y, errors, colour } = lineAt(s);
        u.ctx.save();
        u.ctx.strokeStyle = colour;
        u.ctx.lineWidth = devicePixelRatio;
        x.forEach((at, k) => {
          if (y[k] == null || !errors[k] || at < u.scales.x.min || at > u.scales.x.max) return;
          const left = u.valToPos(at, "x", true);
          u.ctx.beginPath();
          u.ctx.moveTo(left, u.valToPos(y[k] - errors[k], "y", true));
          u.ctx.lineTo(left, u.valToPos(y[k] + errors[k], "y", true));
          u.ctx.stroke();
        });
        u.ctx.restore();
      });
    }
    function drawMarks(u) {
      const { ctx, bbox } = u, ratio = devicePixelRatio;
      let free = -1;
      ctx.save();
      ctx.font = `${11 * ratio}px sans-serif`;
      ctx.textAlign = "left";
      ctx.textBaseline = "bottom";
      spec.marks.forEach(({ x, label, kind }) => {
        if (x < u.scales.x.min || x > u.scales.x.max) return;
        const left = Math.round(u.valToPos(x, "x", true)), bad = kind === "incident";
        ctx.strokeStyle = ctx.fillStyle = bad ? BAD : isStacked ? INK : MUTED;
        ctx.lineWidth = bad ? 1.5 * ratio : ratio;
        ctx.setLineDash(bad ? [] : [3 * ratio, 3 * ratio]);
        ctx.beginPath();
        ctx.moveTo(left, bbox.top);
        ctx.lineTo(left, bbox.top + bbox.height);
        if (left > bbox.left + 1) ctx.stroke();
        const width = ctx.measureText(label).width;
        if (bad || left < free || left + width > u.ctx.canvas.width) return;
        ctx.fillText(label, left, bbox.top - 3 * ratio);
        free = left + width + 12 * ratio;
      });
      ctx.restore();
    }
    function ready(u) {
      const button = document.createElement("button");
      button.className = "all";
      button.textContent = "show all";
      button.onclick = () => charts.filter((c) => c.plot === u || (spec.sync && c.spec.sync === spec.sync)).forEach((c) => c.plot.setScale("x", fullScale(c)));
      holder.append(button);
      // A finger drags like a mouse; up and down still scrolls the page (touch-action in page.css).
      for (const [touch, mouse] of [["touchstart", "mousedown"], ["touchmove", "mousemove"], ["touchend", "mouseup"]])
        u.over.addEventListener(touch, (event) => {
          const { clientX, clientY } = event.changedTouches[0];
          const target = mouse === "mouseup" ? document : u.over;
          const told = { bubbles: true, clientX, clientY, button: 0, movementX: 1 }; // uPlot leaves out moves by nothing
          if (mouse === "mousedown") u.over.dispatchEvent(new MouseEvent("mousemove", told));
          target.dispatchEvent(new MouseEvent(mouse, told));
        }, { passive: true });
    }
  }
  const fullScale = ({ plot, spec }) => {
    const xs = plot.data[0], [min, max] = spec.x_range || [xs[0], xs[xs.length - 1]];
    return { min, max };
  };

  const resize = (width) => charts.forEach(({ plot, holder, spec }) => plot.setSize({ width: width || holder.clientWidth, height: spec.height }));
  const open = [];
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details:not([open])").forEach((one) => { one.open = true; open.push(one); });
    resize(680);
  });
  addEventListener("afterprint", () => {
    open.splice(0).forEach((one) => { one.open = false; });
    resize();
  });

  document.querySelectorAll(".chart").forEach((holder) => {
    const spec = JSON.parse(holder.querySelector("script").textContent);
    draw(holder, spec);
  });
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; resize(); } });
  document.querySelectorAll("details").forEach((one) => one.addEventListener("toggle", () => one.open && resize()));
  // While `smol report --watch` rewrites the page: look again, unless someone is looking closely.
  const { every } = document.body.dataset;
  if (every) setInterval(() => document.querySelector(".zoomed") || location.reload(), 1000 * every);
})();
