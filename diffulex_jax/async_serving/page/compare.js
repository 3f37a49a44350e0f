"use strict"; // Two finished lanes beside each other.

const MEASURES = [
  ["forwards", (lane) => lane.final.nfe, 0],
  ["tokens a forward", (lane) => lane.final.tokens_per_forward, 2],
  ["edits", (lane) => lane.final.revised_tokens, 0],
  ["seconds", (lane) => lane.frames.at(-1)?.seconds ?? lane.final.seconds, 2],
];

function make(tag, text = "", className = "") {
  return Object.assign(document.createElement(tag), { textContent: text, className });
}

// Shown once both answers are complete and have been played to their end.
function compare() {
  if (!$("comparison").hidden || lanes.length < 2 || !lanes.every((lane) => lane.final) || step < last()) return;
  $("comparison").hidden = false;
  const table = make("table"), header = table.insertRow();
  header.append(make("th"), ...lanes.map((lane) => make("th", lane.name)));
  for (const [label, measure, digits] of MEASURES) {
    const row = table.insertRow(), values = lanes.map(measure);
    row.append(make("th", label));
    for (const value of values) {
      const cell = row.insertCell(), bar = make("span", "", "bar");
      bar.style.width = `${(100 * value) / (Math.max(...values) || 1)}%`;
      cell.append(value.toFixed(digits), bar);
    }
  }
  const live = "Both ran at the same time and shared the machine: neither's seconds are what it needs alone.";
  $("comparison").replaceChildren(table);
  if (lanes.length === 2) $("comparison").prepend(make("p", verdict(), "verdict"));
  if (lanes.every((lane) => lane.choice)) $("comparison").append(make("p", live, "small"));
}

function verdict() {
  const [a, b] = lanes, names = a.name === b.name ? [`the first ${a.name}`, `the second ${b.name}`] : [a.name, b.name];
  const same = a.final.text === b.final.text ? "The answers are the same." : "The answers differ.";
  if (a.final.nfe === b.final.nfe) return `Both took ${a.final.nfe} forwards. ${same}`;
  const [few, many] = a.final.nfe < b.final.nfe ? [0, 1] : [1, 0];
  const saved = `${names[few]} took ${lanes[few].final.nfe} forwards where ${names[many]} took ${lanes[many].final.nfe}`;
  return `${saved}: ${(lanes[many].final.nfe / lanes[few].final.nfe).toFixed(1)} times fewer. ${same}`;
}
