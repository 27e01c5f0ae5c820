// Markdown within a paragraph: code, bold, italic, links. What is made are elements and texts, never HTML, so that
// nothing in a reply can become more than these.

import { element } from "./dom.js";

const SCHEMES = ["http:", "https:", "mailto:"]; // of links that can be pressed; others stay text
const TAGS = { "*": ["em", "strong"], _: ["em", "strong"], "~": ["del", "del"] };
const PUNCTUATION = /[\p{P}\p{S}]/u;

/** The nodes and strings that a text becomes; no link is made within a link. */
export function inline(text, inLink = false) {
  return emphasised(scan(text, inLink));
}

// What each of them finds at a place of the text is turned into a string, an element, or a run of delimiters; null
// is none of it. The first that finds something has it, the last find everything.
const SCANNERS = [
  [/\\([!-/:-@[-`{-~\n])/y, ([, character]) => character],
  [/(`+)([^`]|[^`][^]*?[^`])\1(?!`)/y, ([, , text]) => element("code", { text: unpadded(text.replaceAll("\n", " ")) })],
  [/`+/y, ([text]) => text],
  // [text](address "title"), and an image, which is a link too: the page loads nothing from elsewhere
  [
    /!?\[((?:\\.|[^[\]\\]|\[[^[\]]*\])*)\]\(\s*(?:<([^<>\n]*)>|([^\s()<>]*(?:\([^\s()]*\)[^\s()<>]*)*))(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/y,
    ([, text, bracketed, bare], { inLink }) => (inLink ? null : link(bracketed ?? bare, ...inline(text || (bracketed ?? bare), true))),
  ],
  [/<((?:https?:|mailto:)[^\s<>]*)>/iy, ([, address], { inLink }) => (inLink ? null : link(address, address))],
  [
    /https?:\/\/(?:\([^\s<>()]*\)|[^\s<>()])*(?:\([^\s<>()]*\)|[^\s<>().,:;!?'"*_~\]}|`])/iy,
    ([address], { inLink, before }) => (inLink || /[\p{L}\p{N}]/u.test(before) ? null : link(address, address)),
  ],
  [/\*+|_+|~~(?!~)/y, ([text], around) => run(text, around)],
  [/[^\\`*_~[!<hH]+|[^]/y, ([text]) => text],
];

function scan(text, inLink) {
  const parts = [];
  for (let at = 0; at < text.length; ) {
    for (const [pattern, make] of SCANNERS) {
      pattern.lastIndex = at;
      const found = pattern.exec(text);
      const end = at + (found?.[0].length ?? 0);
      const part = found && make(found, { inLink, before: text[at - 1] ?? " ", after: text[end] ?? " " });
      if (part === null) continue;
      parts.push(part);
      at = end;
      break;
    }
  }
  return parts;
}

const unpadded = (code) => (/^ .*[^ ].* $/.test(code) ? code.slice(1, -1) : code);

/** A link that opens a window of its own; null for an address that it must not lead to. */
function link(address, ...words) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return null; // also of an address within this server
  }
  if (!SCHEMES.includes(url.protocol)) return null;
  return element("a", { href: url.href, title: url.href, target: "_blank", rel: "noopener noreferrer" }, ...words);
}

/** A run of `*`, `_` or `~~`: it may open emphasis before a word, and close it behind one. */
function run(text, { before, after }) {
  const [blank, sign] = [(character) => /\s/.test(character), (character) => PUNCTUATION.test(character)];
  const left = !blank(after) && (!sign(after) || blank(before) || sign(before));
  const right = !blank(before) && (!sign(before) || blank(after) || sign(after));
  const within = text[0] === "_"; // snake_case is no emphasis
  return {
    character: text[0],
    count: text.length,
    opens: left && (!within || !right || sign(before)),
    closes: right && (!within || !left || sign(after)),
  };
}

/** Puts what lies between two runs into an element; what is left of a run is text. */
function emphasised(parts) {
  const done = [];
  for (const part of parts) {
    while (part.closes && part.count) {
      const at = done.findLastIndex(({ character, opens }) => opens && character === part.character);
      if (at < 0) break;
      const opener = done[at];
      const width = Math.min(2, opener.count, part.count);
      const inside = done.splice(at + 1).map(asText);
      done.push(element(TAGS[part.character][width - 1], {}, ...inside));
      opener.count -= width;
      part.count -= width;
      if (!opener.count) done.splice(at, 1);
    }
    if (part.count !== 0) done.push(part);
  }
  return done.map(asText);
}

const asText = (part) => (part.character ? part.character.repeat(part.count) : part);
