"use strict"; // The canvas after each forward. Frame 0 is what the model starts from; cells that stay the same are shared.

const MASK = { id: null, text: "", p: 0, event: "", first: 0, last: 0, edits: 0 };
const WAITING = { ...MASK }; // a position that the model has not come to yet
const textOf = (patch, i) => patch.tokens?.[i] ?? ` ${patch.token_ids[i]}`;

// A record buffer_snapshot of the stream, as the lane's next frame.
function push(lane, patch, seconds) {
  if (!lane.frames.length) lane.frames.push(origin(patch));
  lane.prompt = patch.absolute_start - patch.token_offset;
  lane.frames.push(advance(lane.frames.at(-1), patch, seconds));
}

function origin(patch) {
  const given = patch.token_ids.map((id, i) => id !== null && !patch.confidence[i]); // pinned: a token without a probability
  const cells = given.map((there, i) => (there ? { ...MASK, id: patch.token_ids[i], text: textOf(patch, i) } : MASK));
  return { cells, settled: 0, seconds: 0, edits: 0 };
}

function advance(frame, patch, seconds) {
  const cells = frame.cells.map((cell) => (cell.event ? { ...cell, event: "" } : cell));
  const revised = new Set(patch.revised), remasked = new Set(patch.remasked);
  patch.token_ids.forEach((id, i) => {
    const at = patch.token_offset + i, old = cells[at] ?? MASK, p = patch.confidence[i], filled = old.id === null;
    if (id === null) {
      cells[at] = remasked.has(at) ? { ...old, id, text: "", p: 0, last: patch.nfe, event: "remasked" } : old;
    } else if (filled || id !== old.id || p !== old.p) {
      const event = filled ? "new" : revised.has(at) ? "edited" : "", first = old.first || patch.nfe;
      cells[at] = { id, text: textOf(patch, i), p, event, first, last: event ? patch.nfe : old.last, edits: old.edits + (event === "edited") };
    }
  });
  return { cells, settled: Math.max(patch.committed, patch.token_offset), seconds, edits: frame.edits + revised.size };
}
