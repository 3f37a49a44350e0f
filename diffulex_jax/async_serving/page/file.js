"use strict"; // A replay in a file of its own: what a server would have sent is in it.

const filed = JSON.parse($("records").textContent);
blockSize = filed.block_size;
readColours();
lanes = filed.lanes.map(({ name, asked, records }) => {
  const lane = newLane(name, { final: records.at(-1), state: "finished" });
  for (const patch of records.slice(0, -1)) push(lane, patch);
  showAsked(lane, asked);
  return lane;
});
$("lanes").append(...lanes.map((lane) => lane.root));
$("lanes").classList.toggle("two", lanes.length > 1);
lanes.forEach(drawFilm);
play(true);
