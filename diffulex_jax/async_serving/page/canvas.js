"use strict"; // A lane on the screen: its canvas of cells, its answer, its film.

let blockSize = 32;
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const printable = (text) => text.trim() || text.replaceAll("\n", "⏎").replaceAll(" ", "␣") || "∅";

function newLane(name, more) {
  const root = $("lane").content.firstElementChild.cloneNode(true), find = (x) => root.querySelector(x);
  const lane = { root, name, frames: [], nodes: [], prompt: 0, final: null, state: "denoising", controller: new AbortController(), ...more };
  Object.assign(lane, { canvas: find(".canvas"), answer: find(".answer"), film: find(".film"), head: find(".head"), label: find("h2 span") });
  find("h2 b").textContent = name;
  for (const type of ["pointerover", "focusin"]) lane.canvas.addEventListener(type, (event) => tell(lane, event.target));
  for (const type of ["pointerleave", "focusout"]) lane.canvas.addEventListener(type, () => ($("tip").hidden = true));
  lane.canvas.addEventListener("keydown", (event) => walk(lane, event));
  const scrub = (event) => event.buttons && seek(Math.floor((event.offsetX / lane.film.clientWidth) * (last() + 1)));
  for (const type of ["pointerdown", "pointermove"]) lane.film.addEventListener(type, scrub);
  return lane;
}

// The prompt as the model reads it: special tokens, such as a chat's roles, are spelled, and fainter.
function showAsked(lane, parts) {
  const spans = parts.map(({ text, special }) => Object.assign(document.createElement(special ? "i" : "span"), { textContent: text }));
  lane.root.querySelector(".asked").replaceChildren(...spans);
}

// The lane as it was after forward `step`; `moving`: from the forward before, so that changes may flash.
function show(lane, moving) {
  lane.root.dataset.state = lane.state;
  lane.root.hidden = lane.state === "failed" && !lane.frames.length;
  lane.label.textContent = lane.final ? `${lane.state} (${lane.final.finish_reason})` : lane.state + (lane.state === "denoising" ? " …" : "");
  const at = Math.min(step, lane.frames.length - 1), frame = lane.frames[at];
  if (!frame) return;
  const end = lane.final && at === lane.frames.length - 1, length = lane.final ? lane.final.token_ids.length : Infinity;
  Object.assign(lane, { frame, settled: end ? Infinity : frame.settled });
  while (lane.nodes.length < lane.frames.at(-1).cells.length) addCell(lane);
  lane.nodes.forEach((node, i) => draw(node, frame.cells[i] ?? WAITING, i < lane.settled, i >= length, moving && step === at));
  showFigures(lane, frame, at, length);
  showAnswer(lane, frame, end, length);
  Object.assign(lane.head.style, { width: `${100 / (last() + 1)}%`, left: `${(100 * at) / (last() + 1)}%` });
}

function addCell(lane) {
  const at = lane.nodes.length, node = document.createElement("div");
  if (!at || (lane.prompt + at) % blockSize === 0) lane.canvas.append(Object.assign(document.createElement("div"), { className: "block" }));
  Object.assign(node, { at, tabIndex: at ? -1 : 0, role: "option" });
  node.setAttribute("aria-describedby", "tip");
  lane.canvas.lastElementChild.append(node);
  lane.nodes.push(node);
}

function draw(node, cell, settled, past, moving) {
  if (node.cell === cell && node.settled === settled && node.past === past) return;
  Object.assign(node, { cell, settled, past });
  const masked = cell.id === null, text = masked ? "" : printable(cell.text);
  node.textContent = text;
  node.ariaLabel = masked ? "masked" : cell.text;
  node.dataset.kind = cell === WAITING ? "waiting" : masked ? "mask" : settled ? "settled" : "filled";
  node.dataset.event = cell.event;
  node.className = `cell${text.length > 8 ? " longer" : text.length > 5 ? " long" : ""}${cell.text.trim() ? "" : " blank"}${past ? " past" : ""}`;
  Object.assign(node.style, masked ? { backgroundColor: "", color: "" } : paint(cell.first ? cell.p : 1, settled));
  if (moving && cell.event && !calm.matches) flash(node, cell.event);
}

function flash(node, event) {
  const ring = style({ new: "--accent", edited: "--edit", remasked: "--remask" }[event]);
  const from = event === "new" ? { transform: "scale(.82)", opacity: 0.35 } : { boxShadow: `0 0 0 7px ${ring}`, zIndex: 1 };
  node.animate([from, {}], { duration: event === "new" ? 380 : 800, easing: "ease-out" });
}

function showFigures(lane, frame, at, length) {
  const tokens = frame.cells.filter((cell, i) => cell.id !== null && i < length).length;
  const figures = { forwards: at, tokens, rate: (tokens / Math.max(1, at)).toFixed(2), edits: frame.edits };
  figures.seconds = (frame.seconds ?? (lane.frames[at + 1] ? undefined : lane.final.seconds))?.toFixed(2) ?? "–"; // a file knows no others
  for (const [name, value] of Object.entries(figures)) lane.root.querySelector(`[data-figure=${name}]`).textContent = value;
}

function showAnswer(lane, frame, end, length) {
  const text = (from, to) => frame.cells.slice(from, to).map((cell) => (cell.id === null ? "·" : cell.text)).join("");
  const open = document.createElement("i");
  if (!end) open.textContent = text(frame.settled, length);
  lane.answer.replaceChildren(end ? lane.final.text ?? lane.final.token_ids.join(" ") : text(0, Math.min(frame.settled, length)), open);
}

// A pixel a cell; the style sheet stretches it. All lanes have the columns of the longest.
function drawFilm({ film, frames, final }) {
  const rows = Math.max(1, Math.min(frames.at(-1)?.cells.length ?? 1, final ? final.token_ids.length : Infinity)), columns = last() + 1;
  const image = new ImageData(columns, rows), marks = { edited: rgb(style("--edit")), remasked: rgb(style("--remask")) };
  frames.forEach((frame, x) => {
    for (let y = 0; y < rows; y++) {
      const cell = frame.cells[y], settled = y < frame.settled || (final && x === frames.length - 1);
      if (!cell) break; // not begun yet
      const filled = () => colour(cell.first ? cell.p : 1, settled);
      image.data.set([...(marks[cell.event] ?? (cell.id === null ? mask : filled())), 255], 4 * (y * columns + x));
    }
  });
  Object.assign(film, { width: columns, height: rows });
  film.getContext("2d").putImageData(image, 0, 0);
}

let told = () => {}; // fills the tip in again, for the step that is shown by then
function tell(lane, node) {
  if (!node.classList.contains("cell")) return;
  told = () => tell(lane, node);
  const { cell } = node, lines = [];
  if (cell === WAITING) lines.push("not begun yet");
  else if (cell.id === null) lines.push(cell.first ? `masked again in forward ${cell.last}` : "masked");
  else lines.push(`“${cell.text}”  token ${cell.id}`, cell.first ? `probability ${(100 * cell.p).toFixed(1)} %` : "given with the request");
  if (cell.first) lines.push(`first accepted in forward ${cell.first}`);
  if (cell.first && cell.id !== null) lines.push(cell.last > cell.first ? `last revised in forward ${cell.last}` : "never revised");
  lines.push(`position ${node.at}${node.at < lane.settled ? ", settled" : ""}`);
  const tip = $("tip"), box = node.getBoundingClientRect();
  tip.textContent = lines.join("\n");
  tip.hidden = false;
  const above = box.top - tip.offsetHeight - 8, middle = box.left + box.width / 2 - tip.offsetWidth / 2;
  tip.style.top = `${above > 4 ? above : box.bottom + 8}px`;
  tip.style.left = `${Math.max(6, Math.min(innerWidth - tip.offsetWidth - 6, middle))}px`;
}

function walk(lane, event) {
  if (event.key === "Escape") $("tip").hidden = true;
  const columns = getComputedStyle(event.target.parentElement).gridTemplateColumns.split(" ").length;
  const next = lane.nodes[event.target.at + { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key]];
  if (!next) return;
  event.preventDefault();
  [event.target.tabIndex, next.tabIndex] = [-1, 0];
  next.focus();
}
