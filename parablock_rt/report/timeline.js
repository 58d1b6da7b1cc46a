"use strict";
// The timeline: every span of a run on a canvas, to zoom and pan. One row a track; spans that overlap get lanes of their
// own. A frame draws at most one mark a pixel and lane, so its cost does not grow with the number of spans in view.

class Timeline {
  static LANE = 15;
  static HEAD = 24; // of a process
  static AXIS = 24;
  static LABEL = 168;
  static MAX_LANES = 4; // of a track

  constructor(host, { onView }) {
    this.canvas = element("canvas", { tabindex: "0", role: "img", "aria-label": "Timeline of the run" });
    host.replaceChildren(this.canvas);
    this.onView = onView;
    this.listen();
    new ResizeObserver(() => this.draw()).observe(host);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  // data: {rows: [[process, track]], labels: [[name, stage]], row, label, start, dur}; times in milliseconds.
  show(data) {
    this.data = data;
    this.end = 0;
    for (let i = 0; i < data.start.length; i++) this.end = Math.max(this.end, data.start[i] + data.dur[i]);
    this.end = this.end || 1;
    this.rows = this.layOut(data);
    this.setView(0, this.end);
  }

  // Rows in the order of their processes; in each, lanes of spans that do not overlap, sorted by time.
  layOut(data) {
    const lanes = data.rows.map(() => []);
    for (let i = 0; i < data.start.length; i++) { // spans come sorted by start
      const own = lanes[data.row[i]];
      let lane = own.find((candidate) => candidate.until <= data.start[i]);
      if (!lane && own.length < Timeline.MAX_LANES) own.push((lane = { spans: [], until: 0 }));
      lane ??= own[own.length - 1];
      lane.spans.push(i);
      lane.until = Math.max(lane.until, data.start[i] + data.dur[i]);
    }
    const rows = [];
    let y = Timeline.AXIS;
    const processes = [...new Set(data.rows.map(([process]) => process))].sort();
    for (const process of processes) {
      rows.push({ y, process });
      y += Timeline.HEAD;
      data.rows.forEach(([owner, track], index) => {
        if (owner !== process) return;
        rows.push({ y, track, lanes: lanes[index] });
        y += lanes[index].length * Timeline.LANE + 3;
      });
    }
    this.height = y + 6;
    return rows;
  }

  setView(from, to) {
    const width = Math.min(Math.max(to - from, this.end * 1e-6, 1e-3), this.end);
    this.from = Math.min(Math.max(0, from), this.end - width);
    this.to = this.from + width;
    this.draw();
  }

  // factor < 1 zooms in; `at` (0 to 1) is the place in the view that stays.
  zoom(factor, at = 0.5) {
    const centre = this.from + (this.to - this.from) * at;
    const width = (this.to - this.from) * factor;
    this.setView(centre - width * at, centre + width * (1 - at));
  }

  pan(share) {
    const shift = (this.to - this.from) * share;
    this.setView(this.from + shift, this.to + shift);
  }

  listen() {
    const { canvas } = this;
    const place = (event) => (event.offsetX - Timeline.LABEL) / (canvas.clientWidth - Timeline.LABEL);
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return; // the page scrolls
      event.preventDefault();
      this.zoom(event.deltaY < 0 ? 0.8 : 1.25, Math.min(1, Math.max(0, place(event))));
    }, { passive: false });
    canvas.addEventListener("dblclick", (event) => this.zoom(0.4, Math.min(1, Math.max(0, place(event)))));
    canvas.addEventListener("keydown", (event) => {
      const keys = { "+": () => this.zoom(0.6), "=": () => this.zoom(0.6), "-": () => this.zoom(1.6), ArrowLeft: () => this.pan(-0.2), ArrowRight: () => this.pan(0.2), 0: () => this.setView(0, this.end) };
      if (!keys[event.key]) return;
      event.preventDefault();
      keys[event.key]();
    });
    let held = null;
    canvas.addEventListener("pointerdown", (event) => {
      held = { x: event.clientX, from: this.from, to: this.to };
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointerup", () => { held = null; });
    canvas.addEventListener("pointermove", (event) => {
      if (held) {
        const shift = ((held.x - event.clientX) / (canvas.clientWidth - Timeline.LABEL)) * (held.to - held.from);
        this.setView(held.from + shift, held.to + shift);
        return;
      }
      this.explain(event);
    });
    canvas.addEventListener("pointerleave", tooltip.hide);
  }

  explain(event) {
    const found = this.spanAt(event.offsetX, event.offsetY);
    if (found === null) return tooltip.hide();
    const { data } = this;
    const [process, track] = data.rows[data.row[found]];
    const [name] = data.labels[data.label[found]];
    tooltip.show(`${track}, ${name}\n${process}\n${format.seconds(data.dur[found] / 1e3)}, from ${format.seconds(data.start[found] / 1e3)}`, event.clientX, event.clientY);
  }

  spanAt(x, y) {
    const row = this.rows?.find((candidate) => candidate.lanes && y >= candidate.y && y < candidate.y + candidate.lanes.length * Timeline.LANE);
    if (!row || x < Timeline.LABEL) return null;
    const lane = row.lanes[Math.floor((y - row.y) / Timeline.LANE)];
    const perPixel = (this.to - this.from) / (this.canvas.clientWidth - Timeline.LABEL);
    const at = this.from + (x - Timeline.LABEL) * perPixel;
    const i = this.firstAfter(lane.spans, at - perPixel);
    return i < lane.spans.length && this.data.start[lane.spans[i]] <= at + perPixel ? lane.spans[i] : null;
  }

  // The first span of a lane that ends after `time`.
  firstAfter(spans, time) {
    const { start, dur } = this.data;
    let [low, high] = [0, spans.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (start[spans[middle]] + dur[spans[middle]] <= time) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  draw() {
    const width = this.canvas.parentElement?.clientWidth; // a run without a timeline has the canvas taken away
    if (!this.rows || !width) return;
    const scale = devicePixelRatio || 1;
    this.canvas.width = width * scale;
    this.canvas.height = this.height * scale;
    this.canvas.style.height = `${this.height}px`;
    const pen = this.canvas.getContext("2d");
    pen.scale(scale, scale);
    const style = getComputedStyle(document.documentElement);
    const colors = {};
    this.color = (name) => (colors[name] ??= style.getPropertyValue(`--${name || "other"}`).trim() || style.getPropertyValue("--other").trim());
    pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;
    pen.textBaseline = "middle";
    this.drawAxis(pen, width);
    let drawn = 0;
    for (const row of this.rows) drawn += row.lanes ? this.drawTrack(pen, row, width) : this.drawProcess(pen, row, width);
    Object.assign(this.canvas.dataset, { from: this.from, to: this.to, drawn });
    this.onView(this.from / 1e3, this.to / 1e3);
  }

  clip(pen, text, room) {
    const width = pen.measureText(text).width;
    return width <= room ? text : `${text.slice(0, Math.floor((text.length * room) / width) - 1)}…`;
  }

  drawAxis(pen, width) {
    const [from, to] = [this.from / 1e3, this.to / 1e3];
    const marks = ticks(from, to, (width - Timeline.LABEL) / 110);
    const step = marks[1] - marks[0] || 1;
    for (const mark of marks) {
      const x = Timeline.LABEL + ((mark - from) / (to - from)) * (width - Timeline.LABEL);
      pen.fillStyle = this.color("grid");
      pen.fillRect(x, 18, 1, this.height);
      pen.fillStyle = this.color("soft");
      const text = `${tickLabel(mark, step)} s`;
      pen.fillText(text, Math.min(x + 3, width - pen.measureText(text).width), 10);
    }
  }

  drawProcess(pen, row, width) {
    pen.fillStyle = this.color("line");
    pen.fillRect(0, row.y + 3, width, 1);
    pen.fillStyle = this.color("ink");
    pen.fillText(row.process, 0, row.y + 15);
    return 0;
  }

  drawTrack(pen, row, width) {
    pen.fillStyle = this.color("soft");
    pen.fillText(row.track, 12, row.y + Timeline.LANE / 2, Timeline.LABEL - 20);
    const { data } = this;
    const perMs = (width - Timeline.LABEL) / (this.to - this.from);
    let drawn = 0;
    row.lanes.forEach((lane, index) => {
      const y = row.y + index * Timeline.LANE;
      let filled = Timeline.LABEL; // everything left of it is drawn
      for (let i = this.firstAfter(lane.spans, this.from); i < lane.spans.length;) {
        const span = lane.spans[i];
        if (data.start[span] >= this.to) break;
        const left = Math.max(Timeline.LABEL, Timeline.LABEL + (data.start[span] - this.from) * perMs);
        const right = Math.min(width, Timeline.LABEL + (data.start[span] + data.dur[span] - this.from) * perMs);
        const [name, stage] = data.labels[data.label[span]];
        const begin = Math.max(left, filled);
        pen.fillStyle = this.color(stage);
        pen.fillRect(begin, y, Math.max(right - begin - (right - left > 3 ? 1 : 0), 1), Timeline.LANE - 2);
        drawn += 1;
        if (right - left > 54) {
          pen.fillStyle = this.color("card");
          pen.fillText(this.clip(pen, name, right - left - 10), left + 5, y + Timeline.LANE / 2 - 0.5);
        }
        filled = Math.max(right, begin + 1);
        // What ends before the pixel is full cannot be seen: go on behind it.
        const next = this.from + (filled - Timeline.LABEL) / perMs;
        i = right - left >= 1 ? i + 1 : Math.max(i + 1, this.firstAfter(lane.spans, next));
      }
    });
    return drawn;
  }
}
