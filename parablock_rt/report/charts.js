"use strict";
// Lines, strips and stacked bars as SVG. A chart draws itself again when its width changes.

const charts = (() => {
  const MARGIN = { top: 10, right: 14, bottom: 34, left: 58 };

  function draw(host, height, paint) {
    let width = 0;
    const repaint = () => {
      const now = Math.max(280, host.clientWidth);
      if (now === width) return;
      width = now;
      const svg = shape("svg", { width, height, role: "img" });
      paint(svg, { width, height, right: width - MARGIN.right, bottom: height - MARGIN.bottom });
      host.replaceChildren(svg);
    };
    host.observer?.disconnect();
    host.observer = new ResizeObserver(repaint);
    host.observer.observe(host);
    repaint();
  }

  function axes(svg, box, x, y, labels) {
    const [yStep, xStep] = [y.ticks[1] - y.ticks[0], x.ticks[1] - x.ticks[0]];
    for (const value of y.ticks) {
      const at = y.scale(value);
      svg.append(shape("line", { class: "grid", x1: MARGIN.left, x2: box.right, y1: at, y2: at }));
      svg.append(shape("text", { x: MARGIN.left - 8, y: at + 4, "text-anchor": "end" }, tickLabel(value, yStep)));
    }
    for (const value of x.ticks) {
      const text = x.name ? x.name(value) : tickLabel(value, xStep);
      svg.append(shape("text", { x: x.scale(value), y: box.bottom + 16, "text-anchor": "middle" }, text));
    }
    svg.append(shape("line", { class: "axis", x1: MARGIN.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
    svg.append(shape("text", { x: (MARGIN.left + box.right) / 2, y: box.height - 3, "text-anchor": "middle" }, labels.x));
    const middle = (MARGIN.top + box.bottom) / 2;
    svg.append(shape("text", { x: 0, y: 0, "text-anchor": "middle", transform: `translate(12 ${middle}) rotate(-90)` }, labels.y));
  }

  const linear = (low, high, from, to) => (value) => from + ((value - low) / (high - low || 1)) * (to - from);

  // series: [{name, color, dash, points: [[x, y], ...], fill}]; a null y leaves a gap.
  function lines(host, series, { x: xLabel, y: yLabel, show, low, high, height = 230 }) {
    const points = series.flatMap((each) => each.points).filter((point) => isNumber(point[1]));
    if (points.length === 0) {
      host.observer?.disconnect();
      host.replaceChildren(element("p", { class: "none" }, "The selected runs recorded none of this."));
      return;
    }
    const extent = (values) => values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    const [xLow, xHigh] = extent(points.map((point) => point[0]));
    let [yLow, yHigh] = extent(points.map((point) => point[1]));
    const room = (yHigh - yLow || Math.abs(yHigh) || 1) * 0.06;
    yLow = low ?? yLow - room;
    yHigh = high ?? yHigh + room;
    draw(host, height, (svg, box) => {
      const x = linear(xLow, xHigh, MARGIN.left, box.right);
      const y = linear(yLow, yHigh, box.bottom, MARGIN.top);
      axes(svg, box, { ticks: ticks(xLow, xHigh, box.width / 110), scale: x }, { ticks: ticks(yLow, yHigh, 4), scale: y }, { x: xLabel, y: yLabel });
      for (const each of series) {
        let path = "";
        let pen = "M";
        for (const [px, py] of each.points) {
          if (!isNumber(py)) { pen = "M"; continue; }
          path += `${pen}${x(px).toFixed(1)} ${y(py).toFixed(1)}`;
          pen = "L";
        }
        if (each.points.length === 1) svg.append(shape("circle", { cx: x(each.points[0][0]), cy: y(each.points[0][1] ?? yLow), r: 3, fill: each.color }));
        svg.append(shape("path", { d: path, fill: "none", stroke: each.color, "stroke-width": 1.8, "stroke-dasharray": each.dash ?? "", "stroke-linejoin": "round" }));
      }
      readout(svg, box, series, x, (value) => xLow + ((value - MARGIN.left) / (box.right - MARGIN.left)) * (xHigh - xLow), xLabel, show);
    });
  }

  // A vertical cursor, and what every series says there.
  function readout(svg, box, series, x, invert, xLabel, show) {
    const cursor = shape("line", { class: "cursor", y1: MARGIN.top, y2: box.bottom, visibility: "hidden" });
    const area = shape("rect", { x: MARGIN.left, y: MARGIN.top, width: box.right - MARGIN.left, height: box.bottom - MARGIN.top, fill: "transparent" });
    area.addEventListener("pointermove", (event) => {
      const at = invert(event.clientX - svg.getBoundingClientRect().left);
      const nearest = (points) => points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
      const shown = series.filter((each) => each.points.length > 0).map((each) => [each, nearest(each.points)]);
      const px = x(shown[0][1][0]);
      cursor.setAttribute("x1", px);
      cursor.setAttribute("x2", px);
      cursor.setAttribute("visibility", "visible");
      const head = `${xLabel} ${Number(shown[0][1][0].toFixed(2))}`;
      tooltip.show([head, ...shown.map(([each, point]) => `${each.name}: ${isNumber(point[1]) ? show(point[1]) : DASH}`)].join("\n"), event.clientX, event.clientY);
    });
    area.addEventListener("pointerleave", () => {
      cursor.setAttribute("visibility", "hidden");
      tooltip.hide();
    });
    svg.append(cursor, area);
  }

  // groups: [{name, stacks: [[{name, value, color, striped}, ...], ...]}]; values in seconds.
  function stacks(host, groups, { x: xLabel, y: yLabel, height = 270 }) {
    if (groups.length === 0) {
      host.observer?.disconnect();
      host.replaceChildren(element("p", { class: "none" }, "This run recorded no stages."));
      return;
    }
    const high = Math.max(...groups.flatMap((group) => group.stacks.map((stack) => stack.reduce((sum, part) => sum + part.value, 0)))) * 1.05 || 1;
    draw(host, height, (svg, box) => {
      const band = (box.right - MARGIN.left) / groups.length;
      const y = linear(0, high, box.bottom, MARGIN.top);
      const every = Math.max(1, Math.ceil((groups.length * 44) / (box.right - MARGIN.left)));
      const named = groups.map((_, i) => i).filter((i) => i % every === 0);
      const centre = (i) => MARGIN.left + (i + 0.5) * band;
      axes(svg, box, { ticks: named, scale: centre, name: (i) => groups[i].name }, { ticks: ticks(0, high, 4), scale: y }, { x: xLabel, y: yLabel });
      svg.prepend(stripes());
      const width = Math.min(22, band * 0.36);
      groups.forEach((group, i) => group.stacks.forEach((stack, side) => {
        let base = 0;
        for (const part of stack) {
          const top = y(base + part.value);
          const bar = { x: centre(i) + (side === 0 ? -width - 1 : 1), y: top, width, height: Math.max(0, y(base) - top), fill: part.color };
          const pieces = [shape("rect", bar)];
          if (part.striped) pieces.push(shape("rect", { ...bar, fill: "url(#stripes)" }));
          for (const piece of pieces) {
            piece.addEventListener("pointermove", (event) =>
              tooltip.show(`${xLabel} ${group.name}\n${part.name}: ${format.seconds(part.value)}`, event.clientX, event.clientY));
            piece.addEventListener("pointerleave", tooltip.hide);
          }
          svg.append(...pieces);
          base += part.value;
        }
      }));
    });
  }

  // One strip a series, filled from 0 to its value (0 to 100) over the same time.
  function strips(host, series, { x: xLabel, show }) {
    if (series.length === 0) return lines(host, [], {});
    const [row, gap] = [54, 16];
    const height = MARGIN.top + series.length * (row + gap) + MARGIN.bottom;
    const xHigh = Math.max(...series.map((each) => each.points[each.points.length - 1][0]));
    draw(host, height, (svg, box) => {
      const left = 108;
      const x = linear(0, xHigh, left, box.right);
      const marks = ticks(0, xHigh, box.width / 110);
      for (const mark of marks) {
        svg.append(shape("line", { class: "grid", x1: x(mark), x2: x(mark), y1: MARGIN.top, y2: box.bottom }));
        svg.append(shape("text", { x: x(mark), y: box.bottom + 16, "text-anchor": "middle" }, tickLabel(mark, marks[1] - marks[0])));
      }
      svg.append(shape("text", { x: (left + box.right) / 2, y: height - 3, "text-anchor": "middle" }, xLabel));
      series.forEach((each, i) => {
        const bottom = MARGIN.top + i * (row + gap) + row;
        const y = linear(0, 100, bottom, bottom - row);
        const outline = each.points.map(([px, py]) => `L${x(px).toFixed(1)} ${y(py).toFixed(1)}`).join("");
        const mean = each.points.reduce((sum, point) => sum + point[1], 0) / each.points.length;
        svg.append(shape("path", { d: `M${left} ${bottom}${outline}L${box.right} ${bottom}Z`, fill: each.color, "fill-opacity": 0.75 }));
        svg.append(shape("line", { class: "axis", x1: left, x2: box.right, y1: bottom, y2: bottom }));
        svg.append(shape("text", { x: 0, y: bottom - row / 2 }, each.name));
        svg.append(shape("text", { x: 0, y: bottom - row / 2 + 16 }, `mean ${show(mean)}`));
      });
      readout(svg, box, series, x, (value) => ((value - left) / (box.right - left)) * xHigh, xLabel, show);
    });
  }

  const stripes = () =>
    shape("defs", {}, shape("pattern", { id: "stripes", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
      shape("rect", { width: 2.2, height: 6, fill: "var(--card)" })));

  return { lines, stacks, strips };
})();
