"use strict"; // Colours come from the style sheet, which has two sets: light and dark.

let ramp, card, mask;
const $ = (id) => document.getElementById(id);
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
const mix = (a, b, share) => a.map((x, i) => Math.round(x + (b[i] - x) * share));

function readColours() {
  ramp = style("--ramp").split(",").map((hex) => rgb(hex.trim()));
  [card, mask] = [rgb(style("--card")), rgb(style("--mask"))];
  for (const sample of document.querySelectorAll(".legend [data-p]")) Object.assign(sample.style, paint(sample.dataset.p, "settled" in sample.dataset));
}

// A probability as [r, g, b]; what has settled moves towards the card's own colour.
function colour(p, settled) {
  const at = Math.min(1, Math.max(0, p)) * (ramp.length - 1), low = Math.min(ramp.length - 2, Math.floor(at));
  const full = mix(ramp[low], ramp[low + 1], at - low);
  return settled ? mix(full, card, 0.68) : full;
}

function paint(p, settled) {
  const [r, g, b] = colour(p, settled);
  return { backgroundColor: `rgb(${r}, ${g}, ${b})`, color: 0.299 * r + 0.587 * g + 0.114 * b > 105 ? "#14202b" : "#fff" };
}
