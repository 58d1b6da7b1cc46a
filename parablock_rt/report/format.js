"use strict";
// Numbers for a reader, and elements for a page. What is null is shown as a dash, never as zero.

const DASH = "–";
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

const format = {
  seconds(value) {
    if (!isNumber(value)) return DASH;
    const size = Math.abs(value);
    if (size >= 1 || size === 0) return `${value.toFixed(size < 100 ? 2 : 1)} s`;
    return size >= 1e-3 ? `${(value * 1e3).toFixed(1)} ms` : `${(value * 1e6).toFixed(0)} µs`;
  },
  percent(value) {
    if (!isNumber(value)) return DASH;
    let text = (100 * value).toFixed(0);
    if ((text === "100") !== value >= 1 || (text === "0" || text === "-0") !== (value === 0)) text = (100 * value).toFixed(1);
    return `${text}\u00a0%`;
  },
  bytes(value) {
    if (!isNumber(value)) return DASH;
    for (const [unit, size] of [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
      if (value >= size) return `${(value / size).toFixed(value >= 100 * size ? 0 : 1)} ${unit}`;
    }
    return `${value} B`;
  },
  loss: (value) => (isNumber(value) ? value.toFixed(4) : DASH),
  count: (value) => (isNumber(value) ? value.toLocaleString("en") : DASH),
  any(value) {
    if (value === null || value === undefined) return DASH;
    if (typeof value === "boolean") return value ? "yes" : "no";
    if (typeof value === "number") return format.count(value);
    return typeof value === "object" ? JSON.stringify(value) : String(value);
  },
};

// Children that are text stay text: nothing of a run's data is ever parsed as HTML.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function shape(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const tooltip = {
  show(text, x, y) {
    const box = document.getElementById("tooltip");
    box.textContent = text;
    box.hidden = false;
    const { width, height } = box.getBoundingClientRect();
    box.style.left = `${Math.min(x + 14, innerWidth - width - 8)}px`;
    box.style.top = `${y + 18 + height > innerHeight ? y - height - 8 : y + 18}px`;
  },
  hide() {
    document.getElementById("tooltip").hidden = true;
  },
};

// About `count` round numbers from `low` to `high`.
function ticks(low, high, count) {
  const span = high - low;
  if (!(span > 0)) return [low];
  const raw = span / count;
  const base = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * base).find((candidate) => candidate >= raw);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-6; i++) found.push(i * step);
  return found;
}

function tickLabel(value, step) {
  const digits = Math.max(0, Math.min(6, -Math.floor(Math.log10(step) + 1e-9)));
  return value.toFixed(digits);
}
