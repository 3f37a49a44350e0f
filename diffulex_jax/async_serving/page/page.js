"use strict"; // The form: what is asked for, how it goes, what went wrong.

// What each strategy is usually asked for. Those of the second list revise no token by a threshold.
const USUAL = { llada2: { accept_threshold: 0.9 }, llada2_edit: { accept_threshold: 0.5, edit_threshold: 0 }, dmax: { accept_threshold: 0.5 } };
const NO_EDIT_THRESHOLD = ["llada2", "multi_bd", "d2f", "dmax", "sdar", "sdar_leftmost", "sdar_sequential", "sdar_entropy", "fast_dllm_v2",
  "llada", "llada_random", "llada_threshold", "llada_factor"];
const OURS = ["prompt", "strategy", "stream", "stream_mode", "n"];

async function connect() {
  try {
    const { model, engine } = await (await call("server_info")).json(), names = Object.keys(engine.strategies);
    blockSize = engine.block_size;
    $("server").textContent = `${model} · blocks of ${blockSize} tokens · ${names.join(", ")}`;
    [...$("choices").children].forEach((choice, i) => {
      const select = choice.elements.strategy;
      select.replaceChildren(...names.map((name) => new Option(name, name)));
      select.selectedIndex = Math.min(i, names.length - 1);
      suggest(choice);
    });
    $("error").hidden = true;
  } catch (error) {
    $("server").textContent = error.status === 401 ? "This server wants an API key." : error.status === 503 ? `${error.message} …` : "";
    if (error.status === 503) setTimeout(connect, 1000); // it is loading or compiling
    else if (error.status === 401 && !$("key").value) $("key-field").hidden = false; // not an error yet
    else fail(error);
  }
}

function suggest(choice) {
  const { strategy, accept_threshold, edit_threshold, remask_threshold } = choice.elements, usual = USUAL[strategy.value] ?? {};
  for (const field of [accept_threshold, edit_threshold, remask_threshold]) field.value = usual[field.name] ?? "";
  edit_threshold.parentElement.hidden = NO_EDIT_THRESHOLD.includes(strategy.value);
}

function settingsOf(fields) {
  const settings = {};
  for (const { name, value } of fields) {
    const text = value.trim();
    if (name && text) settings[name] = Number.isNaN(Number(text)) ? text : Number(text); // what is no number the server explains
  }
  return settings;
}

function otherSettings() {
  const blame = (message) => Object.assign(new Error(message), { param: "others" });
  let others;
  try {
    others = JSON.parse($("others").value.trim() || "{}");
  } catch {}
  if (others?.constructor !== Object) throw blame(`other settings must be a JSON object such as ${$("others").placeholder}`);
  const ours = OURS.find((name) => name in others);
  if (ours) throw blame(`${ours} cannot be among the other settings here`);
  return others;
}

async function denoise() {
  const { max_tokens, temperature, seed, form } = $("form").elements, shared = { ...settingsOf([max_tokens, temperature, seed]), ...otherSettings() };
  const typed = $("prompt").value;
  if (!typed.trim()) throw Object.assign(new Error("the prompt is empty; type what the model should answer"), { param: "prompt" });
  const spoken = form.value === "chat" ? { messages: [{ role: "user", content: typed }] } : { prompt: typed };
  const prompt = (await (await call("tokenize", spoken)).json()).tokens;
  const began = performance.now(), asked = { prompt, stream: true, stream_mode: "denoise" };
  const fresh = [...$("choices").children].filter((choice) => !choice.hidden).map((choice) => newLane(choice.elements.strategy.value, { choice }));
  const streams = await Promise.all(fresh.map((lane) => begin(lane, { ...shared, ...settingsOf([...lane.choice.elements]), ...asked }))).catch((error) => {
    fresh.forEach((lane) => lane.controller.abort());
    throw error; // refused: what is there stays
  });
  abort();
  lanes = fresh;
  const { parts } = await (await call("detokenize", { tokens: prompt })).json();
  lanes.forEach((lane) => showAsked(lane, parts));
  $("lanes").replaceChildren(...lanes.map((lane) => lane.root));
  $("lanes").classList.toggle("two", lanes.length > 1);
  $("comparison").hidden = true;
  document.body.classList.add("ran");
  step = 0;
  play(true);
  await Promise.all(lanes.map((lane, i) => run(lane, streams[i], began)));
  $("status").textContent = lanes.map((lane) => `${lane.name}: ${lane.state} after ${Math.max(0, lane.frames.length - 1)} forwards.`).join(" ");
}

const begin = (lane, body) =>
  call("generate", body, lane.controller.signal).catch((error) => {
    throw Object.assign(error, { choice: lane.choice });
  });

async function run(lane, stream, began) {
  try {
    for await (const record of events(stream)) {
      if (record.error) throw Object.assign(new Error(record.error.message), record.error);
      if (record.event === "final") Object.assign(lane, { final: record, state: "finished" });
      else push(lane, record, (performance.now() - began) / 1000);
      arrived();
    }
    if (!lane.final) throw new Error("the stream ended before the answer was complete");
  } catch (error) {
    lane.state = error.name === "AbortError" ? "aborted" : "failed";
    if (lane.state === "failed") fail(Object.assign(error, { choice: lane.choice }));
  }
  arrived();
}

function fail(error) {
  $("error").hidden = false;
  $("error").textContent = `${error.status ? `${error.status}: ` : ""}${error.message}`;
  if (error.status === 401) $("key-field").hidden = false;
  const field = error.choice?.elements[error.param] ?? (error.status === 401 ? $("key") : $("form").elements[error.param]);
  if (!(field instanceof HTMLElement)) return;
  field.setAttribute("aria-invalid", "true");
  if (field.closest("details")) field.closest("details").open = true;
  field.focus();
}

const abort = () => lanes.forEach((lane) => lane.controller.abort());
$("abort").addEventListener("click", abort);
$("key").addEventListener("change", connect);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("error").hidden = true;
  for (const field of $("form").elements) field.removeAttribute("aria-invalid");
  $("start").disabled = true;
  await denoise().catch((error) => fail(error));
  $("start").disabled = false;
});

for (const name of ["first strategy", "second strategy"]) {
  const choice = $("choice").content.firstElementChild.cloneNode(true);
  choice.setAttribute("aria-label", name);
  choice.elements.strategy.addEventListener("change", () => suggest(choice));
  $("choices").append(choice);
}
const pair = () => ($("choices").lastElementChild.hidden = !$("both").checked);
$("both").addEventListener("change", pair);
pair();
readColours();
connect();
