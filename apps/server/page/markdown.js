// Markdown as models write it: the blocks of a reply, found line by line by CommonMark's rules for what is common, and
// GitHub's tables. Lists may be indented by two; HTML is text like any other.

import { button, copy, element } from "./dom.js";
import { inline } from "./inline.js";

const FENCE = /^[ \t]*(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^[ \t]*([-*+]|\d{1,9}[.)])([ \t]+)(.*)$/;
const FIRST_ITEM = /^[ \t]*([-*+]|1[.)])[ \t]+\S/; // may follow a paragraph without a blank line
const DEEPEST = 12; // levels of lists and quotes; what is deeper stays text
const BENEATH = 2; // a reply's first heading is an h3: the page has an h1 and an h2

/**
 * The blocks of a text. Each has its `source`, and `draw({ say, growing })` makes its element; `growing` is true where
 * more of it may come.
 */
export function parse(text) {
  return blocks(text.replaceAll("\r\n", "\n").split("\n"));
}

function blocks(lines, depth = 0) {
  const found = [];
  for (let at = 0; at < lines.length; ) {
    if (blank(lines[at])) {
      at += 1;
      continue;
    }
    const block = (depth < DEEPEST && special(lines, at, depth)) || paragraph(lines, at);
    found.push({ ...block, source: lines.slice(at, block.to).join("\n") });
    at = block.to;
  }
  return found;
}

// Each reader takes the lines and the place of the first, and returns the place behind the last, and how to draw it;
// null where there is no such block.
const special = (...where) =>
  fenced(...where) ?? heading(...where) ?? rule(...where) ?? quote(...where) ?? list(...where) ?? table(...where);

const blank = (line) => !line.trim();

/** Whether a line ends the paragraph before it. */
const begins = (line) => [FENCE, HEADING, RULE, QUOTE, FIRST_ITEM].some((pattern) => pattern.test(line));

/** Columns before the first character; a tab counts as four. */
const indent = (line) => /^[ \t]*/.exec(line)[0].replaceAll("\t", "    ").length;

/** A line without so many columns of its indent. */
function outdent(line, columns) {
  let at = 0;
  for (let left = columns; left > 0 && (line[at] === " " || line[at] === "\t"); at++) left -= line[at] === "\t" ? 4 : 1;
  return line.slice(at);
}

/** Its lines stay lines: small models write verse and addresses so. */
function paragraph(lines, at) {
  let to = at + 1;
  while (to < lines.length && !blank(lines[to]) && !begins(lines[to]) && !table(lines, to)) to++;
  const text = lines.slice(at, to).join("\n").trimEnd();
  return { to, draw: () => element("p", {}, ...inline(text)) };
}

function heading(lines, at) {
  const [, marks, text] = HEADING.exec(lines[at]) ?? [];
  if (!marks) return null;
  const level = Math.min(marks.length + BENEATH, 6);
  return { to: at + 1, draw: () => element(`h${level}`, {}, ...inline(text.trim().replace(/(^|[ \t])#+$/, ""))) };
}

function rule(lines, at) {
  return RULE.test(lines[at]) ? { to: at + 1, draw: () => element("hr") } : null;
}

/** Code between fences. Where the second is missing it goes on to the end. */
function fenced(lines, at) {
  const [, mark, info] = FENCE.exec(lines[at]) ?? [];
  if (!mark) return null;
  const ends = (line) => line.trim().length >= mark.length && line.trim() === mark[0].repeat(line.trim().length);
  let to = at + 1;
  while (to < lines.length && !ends(lines[to])) to++;
  const text = lines.slice(at + 1, to).map((line) => outdent(line, indent(lines[at]))).join("\n");
  const open = to >= lines.length;
  return { to: Math.min(to + 1, lines.length), draw: ({ say, growing }) => code(text, info.trim().split(/\s/)[0], open && growing ? null : say) };
}

/** Code with its language, and, once it is whole and so `say` is given, a button that copies it. */
function code(text, language, say) {
  const put = async () => say((await copy(text)) ? "Copied." : "This browser does not let the page copy.");
  const buttons = say ? [button("Copy", put, { "aria-label": "Copy this code" })] : [];
  const top = element("div", { class: "top" }, element("span", { text: language }), ...buttons);
  const name = language ? `Code, ${language}` : "Code";
  return element("div", { class: "code" }, top, element("pre", { tabindex: "0", role: "region", "aria-label": name }, element("code", { text })));
}

function quote(lines, at, depth) {
  if (!QUOTE.test(lines[at])) return null;
  let to = at + 1;
  while (to < lines.length && !blank(lines[to]) && (QUOTE.test(lines[to]) || !begins(lines[to]))) to++;
  const inner = blocks(lines.slice(at, to).map((line) => line.replace(QUOTE, "")), depth + 1);
  return { to, draw: (how) => element("blockquote", {}, ...drawn(inner, how)) };
}

function list(lines, at, depth) {
  const ordered = (line) => /\d/.test(ITEM.exec(line)[1]);
  if (!ITEM.test(lines[at])) return null;
  const [first, items] = [lines[at], []];
  let [to, loose] = [at, false];
  for (;;) {
    const item = oneItem(lines, to);
    items.push(blocks(item.lines, depth + 1));
    to = item.to;
    let next = to;
    while (next < lines.length && blank(lines[next])) next++;
    const goesOn = next < lines.length && ITEM.test(lines[next]) && !RULE.test(lines[next]) && ordered(lines[next]) === ordered(first);
    if (!goesOn) break;
    loose ||= next > to;
    to = next;
  }
  const start = ordered(first) && parseInt(ITEM.exec(first)[1]) !== 1 ? { start: parseInt(ITEM.exec(first)[1]) } : {};
  const attributes = { ...start, ...(loose && { class: "loose" }) };
  const draw = (how) => {
    const last = items.length - 1;
    const made = items.map((inner, n) => element("li", {}, ...drawn(inner, { ...how, growing: how.growing && n === last })));
    return element(ordered(first) ? "ol" : "ul", attributes, ...made);
  };
  return { to, draw };
}

/** One item: its first line, what is indented below it, and lines that go on with its paragraph. */
function oneItem(lines, at) {
  const [, mark, spaces, text] = ITEM.exec(lines[at]);
  const own = indent(lines[at]);
  const width = own + mark.length + (spaces.length > 4 ? 1 : spaces.length);
  const inside = (line) => indent(line) >= own + 2;
  const found = [text];
  let to = at + 1;
  for (; to < lines.length; to++) {
    const line = lines[to];
    if (blank(line)) {
      const next = lines.slice(to).find((one) => !blank(one));
      if (next === undefined || !inside(next)) break;
    } else if (!inside(line) && (blank(lines[to - 1]) || ITEM.test(line) || begins(line))) break;
    found.push(outdent(line, width));
  }
  return { lines: found, to };
}

/** A head, a line of dashes with as many cells, and rows up to a blank line. */
function table(lines, at) {
  const [head, dashes = ""] = [lines[at], lines[at + 1]];
  if (!head.includes("|") || !dashes.includes("|")) return null;
  const [names, rules] = [cells(head), cells(dashes)];
  if (names.length !== rules.length || !rules.every((one) => /^:?-+:?$/.test(one))) return null;
  let to = at + 2;
  while (to < lines.length && lines[to].includes("|") && !begins(lines[to])) to++;
  const rows = lines.slice(at + 2, to).map(cells);
  const sides = rules.map((one) => (/:$/.test(one) ? (/^:/.test(one) ? "center" : "right") : ""));
  const row = (tag, texts) => element("tr", {}, ...names.map((_, n) => element(tag, sides[n] ? { class: sides[n] } : {}, ...inline(texts[n] ?? ""))));
  const draw = () => {
    const parts = [element("thead", {}, row("th", names)), element("tbody", {}, ...rows.map((texts) => row("td", texts)))];
    return element("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, element("table", {}, ...parts));
  };
  return { to, draw };
}

/** The cells of a row; `\|` is a bar within one. */
const cells = (line) =>
  line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "").split(/(?<!\\)\|/).map((cell) => cell.replaceAll("\\|", "|").trim());

/** The elements of blocks within another; only the last of them may grow. */
const drawn = (inner, how) => inner.map((block, n) => block.draw({ ...how, growing: how.growing && n === inner.length - 1 }));

/** A text that is shown as it comes: the blocks that are over stay as they are, the last is made anew. */
export class Prose {
  /** `place` takes the elements; `say(words)` is told what became of a copy. */
  constructor(place, say) {
    Object.assign(this, { place, say, shown: [] });
  }

  /** Shows the text so far; `growing` where more will come. */
  write(text, growing = false) {
    const found = parse(text);
    const last = found.length - 1;
    const keys = found.map(({ source }, n) => (growing && n === last ? `${source}\0` : source));
    const changed = keys.findIndex((key, n) => key !== this.shown[n]);
    const kept = changed < 0 ? keys.length : changed;
    for (const old of [...this.place.children].slice(kept)) old.remove();
    this.place.append(...found.slice(kept).map((block, n) => block.draw({ say: this.say, growing: growing && kept + n === last })));
    this.shown = keys;
  }
}
