"use strict";
// Formatting of numbers. A missing or non-finite number is shown as a dash.

const NONE = "–";
const SPACE = "\u00a0"; // keeps a number and its unit on one line

function isFigure(value) {
  return typeof value === "number" && Number.isFinite(value);
}

/** Formats a number with three significant digits, or all digits before the decimal point: 0.0213, 1.30, 412, 12,345, 2.1e−5. */
function figure(value) {
  if (!isFigure(value)) return NONE;
  const size = Math.abs(value);
  let text;
  if (size === 0) text = "0";
  else if (size < 1e-3) text = size.toExponential(1).replace("e-", "e\u2212");
  else if (size >= 1e7) text = size.toExponential(2).replace("e+", "e");
  else if (size >= 1000) text = Math.round(size).toLocaleString("en");
  else text = Number.isInteger(size) ? String(size) : size.toPrecision(3);
  return value < 0 ? `\u2212${text}` : text;
}

function percent(share) {
  if (!isFigure(share)) return NONE;
  const hundredths = share * 100;
  return `${hundredths > 0 && hundredths < 1 ? "<1" : Math.round(hundredths)}${SPACE}%`;
}

function duration(seconds) {
  if (!isFigure(seconds)) return NONE;
  const s = Math.max(0, seconds);
  if (s < 9.95) return `${s.toFixed(1)}${SPACE}s`;
  if (s < 99.5) return `${Math.round(s)}${SPACE}s`;
  const minutes = Math.round(s / 60);
  if (minutes < 100) return `${minutes}${SPACE}min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return `${hours}${SPACE}h${SPACE}${String(minutes % 60).padStart(2, "0")}${SPACE}min`;
  return `${Math.floor(hours / 24)}${SPACE}d${SPACE}${hours % 24}${SPACE}h`;
}

function byteCount(count) {
  if (!isFigure(count)) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let scaled = count;
  let unit = 0;
  while (scaled >= 1024 && unit < units.length - 1) {
    scaled /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? scaled : scaled.toPrecision(3)}${SPACE}${units[unit]}`;
}

function perSecond(value) {
  if (!isFigure(value)) return NONE;
  return `${value >= 0.001 && value < 10 ? value.toPrecision(2) : figure(value)}/s`;
}

function counted(count, one, many = `${one}s`) {
  return `${count}${SPACE}${count === 1 ? one : many}`;
}

/** Returns one value, or the two ends of a range. */
function range(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  return low === high ? String(low) : `${low}–${high}`;
}

/** Returns the time of day, with the date if it is not today. */
function clockTime(milliseconds) {
  const then = new Date(milliseconds);
  const time = then.toLocaleTimeString("en-GB");
  if (then.toDateString() === new Date().toDateString()) return time;
  return `${then.toLocaleDateString("en-GB", { day: "numeric", month: "short" })}, ${time}`;
}
