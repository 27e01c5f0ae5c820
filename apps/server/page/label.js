// What is written in a block: as much of its label as has room, and below that an amount.

import { element } from "./dom.js";

const LINE = 16; // px from line to line, as in picture.css
const LEAST = 30; // px that it is worth writing in
const NARROW = 88; // px that are too narrow for level lines
const pen = document.createElement("canvas").getContext("2d");

/** Measures with the font that `place` has, until the next call. */
export function useFont(place) {
  pen.font = getComputedStyle(place).font;
}

/** Writes into a block of so many px: upright where it is narrow and tall. */
export function writeLabel(box, label, amount, width, height) {
  const upright = height > width && width < NARROW;
  const [along, across] = upright ? [height - 10, width - 4] : [width - 10, height - 4];
  const lines = Math.floor(across / LINE);
  box.classList.toggle("upright", upright);
  if (along < LEAST || lines < 1) return box.replaceChildren();
  const longest = Math.max(...label.split(/\s+/).map(measure)); // a word that would break is cut short instead
  const needed = along < longest ? 1 : Math.min(lines, Math.ceil(measure(label) / along));
  const both = needed < lines && measure(amount) <= along;
  const text = element("span", { class: needed > 1 ? "label" : "label short", text: label });
  text.style.setProperty("--lines", both ? lines - 1 : lines);
  box.replaceChildren(text, ...(both ? [element("span", { class: "amount", text: amount })] : []));
}

const measure = (text) => pen.measureText(text).width;
