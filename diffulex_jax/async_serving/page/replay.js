"use strict"; // One clock for all lanes: play, step, scrub.

// step: the forward that is shown. A lane that has fewer stays at its last.
const FRAMES_A_SECOND = 30; // at most; faster than that, some forwards are skipped over
let lanes = [], step = 0, playing = false, timer = 0, drawing = 0;
const running = () => lanes.some((lane) => lane.state === "denoising");
const last = () => Math.max(0, ...lanes.map((lane) => lane.frames.length - 1));

function update(moving) {
  lanes.forEach((lane) => show(lane, moving));
  Object.assign($("scrubber"), { max: last(), value: step });
  $("where").textContent = `forward ${step} of ${last()}${running() ? " so far" : ""}`;
  $("scrubber").setAttribute("aria-valuetext", $("where").textContent);
  $("play").dataset.playing = playing;
  $("play").setAttribute("aria-label", playing ? "Pause" : "Play");
  $("transport").hidden = !lanes.some((lane) => lane.frames.length);
  if (!$("tip").hidden) told();
  compare();
}

function arrived() {
  $("abort").disabled = !running();
  if (playing && $("speed").value === "live") step = last();
  drawing ||= requestAnimationFrame(() => {
    drawing = 0;
    lanes.forEach(drawFilm);
    update(false);
  });
}

// Forwards a second. "calm" is slow enough to look at, and keeps up with a stream that is faster.
function speed() {
  const chosen = $("speed").value;
  return chosen === "calm" ? Math.max(4, running() ? last() - step : 0) : Number(chosen) || FRAMES_A_SECOND;
}

function tick() {
  const before = step;
  step = Math.min(last(), step + Math.ceil(speed() / FRAMES_A_SECOND));
  playing = step > before || running(); // at the end of what there is: more may come
  update(step === before + 1);
  schedule();
}

function schedule() {
  clearTimeout(timer);
  if (playing) timer = setTimeout(tick, 1000 / Math.min(speed(), FRAMES_A_SECOND));
}

function play(on) {
  playing = on;
  if (on && step >= last() && !running()) step = 0;
  update(false);
  schedule();
}

function seek(to) {
  playing = false;
  const moving = to === step + 1;
  step = Math.max(0, Math.min(last(), to));
  update(moving);
}

$("play").addEventListener("click", () => play(!playing));
$("scrubber").addEventListener("input", () => seek(Number($("scrubber").value)));
$("speed").addEventListener("change", schedule);
for (const button of document.querySelectorAll("[data-go]")) {
  button.addEventListener("click", () => seek({ first: 0, back: step - 1, on: step + 1, last: last() }[button.dataset.go]));
}

addEventListener("scroll", () => ($("tip").hidden = true), { passive: true });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  readColours();
  for (const lane of lanes) lane.nodes.forEach((node) => (node.cell = null));
  lanes.forEach(drawFilm);
  update(false);
});
