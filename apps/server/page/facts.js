// What the picture says in words: about one block, and which colours stand for what.

import { count, element, size } from "./dom.js";

const STATES = ["in memory", "on disk", "remote", "blocked", "missing"];

/** What is known of a block, a row of /v1/memory: its name, its figures, and what it was learnt from. */
export function describe(row, state) {
  const { path, label, bytes, documents, sources = [], more_sources: more = 0 } = row;
  const figures = [size(bytes), state];
  if (documents && !sources.some(isRow)) figures.push(count(documents, "document"));
  const from = learntFrom(sources, more);
  return { name: label && label !== path ? `${path} ${label}` : path, figures: figures.join(" · "), from };
}

const ROW = /:\d+$/; // the line of a row in a file of many documents
const isRow = (source) => ROW.test(source);

/** Documents by their titles, where they are known; rows of a file (`elements.jsonl:16`) are counted. */
function learntFrom(sources, more) {
  const rows = new Map();
  const names = [];
  for (const source of sources) {
    const file = source.replace(ROW, "");
    if (isRow(source)) rows.set(file, (rows.get(file) ?? 0) + 1);
    else names.push(source);
  }
  const only = rows.size === 1 && !names.length;
  for (const [file, found] of rows) names.push(`${count(found + (only ? more : 0), "row")} of ${file}`);
  if (!names.length) return "";
  return `learnt from ${names.join(", ")}${more && !only ? ` and ${more} more` : ""}`;
}

/** One paragraph for each thing known. */
export function paragraphs({ name, figures, from }) {
  return [
    element("p", { class: "name", text: name }),
    element("p", { text: figures }),
    element("p", { class: "from", text: from, title: from }),
  ];
}

/** A list entry for each state that occurs among [state, bytes] pairs, for `lit` blocks, and for `folds`. */
export function legend(pairs, lit, folds) {
  const found = new Map(STATES.map((state) => [state, { blocks: 0, bytes: 0 }]));
  for (const [state, bytes] of pairs) {
    found.get(state).blocks += 1;
    found.get(state).bytes += bytes;
  }
  const entries = lit ? [entry("lit", "answering", "")] : [];
  for (const [state, { blocks, bytes }] of found) {
    if (blocks) entries.push(entry(state.replace(" ", "-"), state, `${count(blocks, "block")}, ${size(bytes)}`));
  }
  if (folds) entries.push(entry("fold", "several blocks", "click to look closer"));
  return entries;
}

function entry(kind, name, amount) {
  const swatch = element("span", { class: `swatch block ${kind}`, "aria-hidden": "true" });
  return element("li", {}, swatch, element("span", { text: name }), element("small", { text: amount }));
}
