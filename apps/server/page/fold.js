// The blocks below a node as one, where they are too narrow to be drawn one by one.

import { count, size } from "./dom.js";

// What is in memory is not among them: the picture draws a line for each.
const FILLS = { "on disk": "--disk", remote: "--remote-many", blocked: "--blocked-edge", missing: "--quiet" };
const PERIOD = 12; // px from one group of stripes to the next

/** For each node of `folds` what is below it, counted among `blocks`: Map of node to {blocks, bytes, states}. */
export function tally(folds, blocks, state) {
  const tallies = new Map(folds.map((node) => [node, { blocks: 0, bytes: 0, states: {} }]));
  for (const block of blocks) {
    let above = block.parent;
    while (above && !tallies.has(above)) above = above.parent;
    const sum = tallies.get(above);
    if (!sum) continue;
    const { bytes } = block.row;
    const where = (sum.states[state(block)] ??= { blocks: 0, bytes: 0 });
    for (const part of [sum, where]) {
      part.blocks += 1;
      part.bytes += bytes;
    }
  }
  return tallies;
}

/** A background of stripes, as broad as the states' shares of the bytes. */
export function stripes({ bytes, states }) {
  const parts = [];
  let start = 0;
  for (const [state, fill] of Object.entries(FILLS)) {
    if (!states[state]) continue;
    const end = start + Math.max(1, (PERIOD * states[state].bytes) / bytes);
    parts.push(`var(${fill}) ${start}px ${end}px`);
    start = end;
  }
  parts.push(`var(--page) ${start}px ${start + 1}px`);
  return `repeating-linear-gradient(90deg, ${parts.join(", ")})`;
}

/** What is known of them, as `describe` does it for one block. */
export function describeFold(node, sum) {
  const states = Object.entries(sum.states).map(([state, { blocks }]) => `${blocks.toLocaleString("en")} ${state}`);
  return {
    name: `Below ${[node.path, node.row?.label].filter(Boolean).join(" ")}`,
    figures: [count(sum.blocks, "block"), size(sum.bytes), states.join(", ")].join(" · "),
    from: "Click to look closer.",
  };
}
