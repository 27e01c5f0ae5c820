// The picture of a memory bank: an icicle of its blocks that can be pointed at, walked through and looked into.
//
// `hiermem serve` shows it beside the chat, and `hiermem bank show --html` writes it into a file. Where blocks are too
// narrow, a fold stands for all that are below a node; a click on it, or walking into it, makes them large.

import { button, count, element, size } from "./dom.js";
import { describe, legend, paragraphs } from "./facts.js";
import { describeFold, stripes, tally } from "./fold.js";
import { useFont, writeLabel } from "./label.js";
import { firstBlock, layout, neighbour, unfold, within } from "./layout.js";

const HINT = "Point at a block to see what is in it; click to look closer.";

// An arrow key where the levels go from left to right, and what it is where they go from top to bottom.
const SIDEWAYS = { ArrowUp: "ArrowLeft", ArrowDown: "ArrowRight", ArrowLeft: "ArrowUp", ArrowRight: "ArrowDown" };

export class MemoryPicture {
  /**
   * Draws into `place`. `choose(node, x, y)` is called when a block is clicked, or Enter is pressed on it; `hint` says
   * so to the reader. `sideways` has the levels from left to right, where labels have room in narrow places too.
   */
  constructor(place, choose = (node) => this.look(node), hint = HINT, sideways = false) {
    this.trail = element("nav", { class: "trail", "aria-label": "Part of the bank that is shown" });
    this.blocks = element("div", { class: "blocks", role: "tree", "aria-label": "Blocks of the memory bank" });
    this.facts = element("div", { class: "facts" });
    this.legend = element("ul", { class: "legend", "aria-label": "Colours" });
    const frame = element("div", { class: "frame" }, this.blocks);
    place.replaceChildren(this.trail, frame, this.legend, this.facts);
    Object.assign(this, { choose, hint, sideways });
    this.closed = new Set(); // paths that the page's reader has blocked, beside the bank's policy
    this.lit = new Set(); // paths of the blocks that answer
    this.drawn = new Map(); // path -> element of a block; path/ -> of a fold
    this.whole = new Set(); // nodes whose blocks are drawn, and not folded away
    this.folds = new Map(); // node -> what is below it
    this.show([]);
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.blocks);
  }

  /** Another bank: the `nodes` of /v1/memory. */
  show(nodes) {
    this.arrange(new Map());
    this.root = layout(nodes);
    this.focused = firstBlock(this.root);
    this.look(this.root);
  }

  /** Takes states, {path: state}. What has come into memory flashes. */
  update(states) {
    let changed = false;
    for (const [path, state] of Object.entries(states)) {
      const row = this.root.found.get(path)?.row;
      if (!row || row.state === state) continue;
      row.fetched = state === "in memory";
      row.state = state;
      changed = true;
    }
    if (changed) this.change();
  }

  /** Lights these blocks, and no others, and sees to it that some can be seen. */
  light(paths) {
    this.lit = new Set(paths);
    if (paths.length && !paths.some((path) => within(this.root.found.get(path), this.top))) this.look(this.root);
    else this.change();
  }

  /** Shows these lit, and the last of them large enough to read. */
  reveal(paths) {
    this.light(paths);
    const last = this.root.found.get(paths.at(-1));
    if (last && !this.whole.has(last)) this.look(last.parent);
  }

  /** Shows these nodes, and all below them, as blocked. */
  close(paths) {
    this.closed = new Set(paths);
    this.change();
  }

  /** What `look` shows: a node with all below it, or with its siblings where there is nothing below. */
  around(node) {
    return node.children.length ? node : (node.parent ?? node);
  }

  /** Shows what is around a node as large as the picture. */
  look(node) {
    const top = (this.top = this.around(node));
    this.pointed = null; // something else lies there now
    if (this.focused && !within(this.focused, top)) this.focused = top.row ? top : firstBlock(top);
    this.change();
    const steps = [];
    for (let here = top; top.parent && here; here = here.parent) steps.unshift(this.step(here));
    this.trail.replaceChildren(...steps);
  }

  step(node) {
    const name = node.parent ? node.row?.label || node.path : "Whole bank";
    const go = () => {
      this.look(node);
      this.focus(this.focused); // the button that was pressed is gone
    };
    return button(name, go, node === this.top ? { "aria-current": "true" } : {});
  }

  /** Moves the keyboard's focus to a node. */
  focus(node) {
    this.focused = node;
    if (this.whole.has(node)) this.draw();
    else this.look(node.parent);
    this.drawn.get(node.path).focus();
  }

  /** The node whose block here closes `node`: itself or one above; null where there is none. */
  closer(node) {
    for (let here = node; here && this.closed.size; here = here.parent) if (this.closed.has(here.path)) return here;
    return null;
  }

  state(node) {
    return this.closer(node) ? "blocked" : node.row.state;
  }

  change() {
    this.draw();
    const pairs = this.root.blocks.map((node) => [this.state(node), node.row.bytes]);
    this.legend.replaceChildren(...legend(pairs, this.lit.size, this.folds.size));
    this.tell();
  }

  /** Tells below the picture about what is pointed at; else about the block in focus, or the last that is lit. */
  tell() {
    const lit = [...this.lit].map((path) => this.root.found.get(path)).findLast((found) => found?.row);
    const shown = this.blocks.contains(document.activeElement) ? this.focused : lit;
    const words = this.pointed ? this.pointed() : shown && this.describe(shown);
    const hint = element("p", { text: this.focused ? this.hint : "" });
    this.facts.replaceChildren(...(words ? paragraphs(words) : [hint]));
  }

  describe(node) {
    const state = this.closer(node) ? "blocked here" : node.row.state;
    return describe(node.row, state === "blocked" ? "blocked by the bank" : state);
  }

  draw() {
    const { clientWidth, clientHeight } = this.blocks;
    const [across, down] = this.sideways ? [clientHeight, clientWidth] : [clientWidth, clientHeight];
    if (!across || !down) return;
    const { root, top } = this;
    useFont(this.blocks);
    const { blocks, folds } = unfold(top, across);
    this.whole = new Set(blocks);
    this.folds = tally(folds, root.blocks, (node) => this.state(node));
    while (this.focused && !this.whole.has(this.focused)) this.focused = this.focused.parent ?? blocks[0];
    const shown = new Set(blocks);
    for (const node of root.blocks) if (this.least(node) && within(node, top)) shown.add(node);
    const scale = [across / top.width, down / (1 - top.y)];
    const kept = new Map();
    for (const node of [...shown].sort((a, b) => a.order - b.order)) {
      const box = this.drawn.get(node.path) ?? this.box(node);
      this.dress(box, node, this.place(node, node.y, node.y + node.height, scale));
      kept.set(node.path, box);
    }
    for (const node of folds) {
      const name = `${node.path}/`;
      const box = this.drawn.get(name) ?? element("div", { class: "fold", "data-fold": node.path, "aria-hidden": "true" });
      this.dressFold(box, node, this.place(node, node.y + node.height, 1, scale));
      kept.set(name, box);
    }
    this.arrange(kept);
  }

  /** Whole px of what is as wide as a node and reaches from `upper` to `lower`, parts of the square. */
  place(node, upper, lower, [scaleX, scaleY]) {
    const left = Math.round((node.x - this.top.x) * scaleX);
    const top = Math.round((upper - this.top.y) * scaleY);
    const right = Math.round((node.x - this.top.x + node.width) * scaleX);
    const width = Math.max(right - left, this.least(node), 1);
    const height = Math.max(Math.round((lower - this.top.y) * scaleY) - top, 1);
    const [wide, tall] = [width - (width > 6 ? 1 : 0), height - (height > 6 ? 1 : 0)];
    if (this.sideways) return { left: top, top: left, width: tall, height: wide };
    return { left, top, width: wide, height: tall };
  }

  /** Px that a block is drawn broad however narrow it is, over a fold too. */
  least(node) {
    if (this.lit.has(node.path)) return 3;
    return node.row?.state === "in memory" ? 1 : 0;
  }

  /** Brings the elements into the document. What stays is not moved, or it would lose the focus. */
  arrange(kept) {
    for (const [path, box] of this.drawn) if (!kept.has(path)) box.remove();
    let next = this.blocks.firstChild;
    for (const box of kept.values()) {
      if (box === next) next = next.nextSibling;
      else this.blocks.insertBefore(box, next);
    }
    this.drawn = kept;
  }

  box(node) {
    const box = element("div", { role: "treeitem", "aria-level": node.level, "data-path": node.path });
    box.style.setProperty("--level", node.level);
    box.addEventListener("animationend", () => {
      node.row.fetched = false;
      box.classList.remove("fetched");
    });
    return box;
  }

  dress(box, node, px) {
    for (const [side, length] of Object.entries(px)) box.style[side] = `${length}px`;
    const lit = this.lit.has(node.path) && this.state(node) !== "blocked";
    const marks = { lit, fetched: node.row.fetched, thin: Math.min(px.width, px.height) < 5 };
    const kinds = ["block", this.state(node).replace(" ", "-"), ...Object.keys(marks).filter((mark) => marks[mark])];
    box.className = kinds.join(" ");
    box.tabIndex = node === this.focused ? 0 : -1;
    const { name, figures, from } = this.describe(node);
    const used = lit ? "answering" : "";
    box.setAttribute("aria-label", [name, used, figures, from].filter(Boolean).join(", "));
    writeLabel(box, node.row.label || node.path, size(node.row.bytes), px.width, px.height);
  }

  dressFold(box, node, px) {
    for (const [side, length] of Object.entries(px)) box.style[side] = `${length}px`;
    const sum = this.folds.get(node);
    box.style.background = stripes(sum);
    const name = this.drawn.get(node.path)?.hasChildNodes() ? "" : node.row?.label || node.path;
    const blocks = count(sum.blocks, "block");
    writeLabel(box, name || blocks, name ? blocks : size(sum.bytes), px.width, px.height);
  }

  listen() {
    const { blocks } = this;
    blocks.addEventListener("pointermove", (event) => this.point(event.target));
    blocks.addEventListener("pointerleave", () => this.point(null));
    blocks.addEventListener("focusin", () => this.tell());
    blocks.addEventListener("focusout", () => requestAnimationFrame(() => this.tell()));
    blocks.addEventListener("click", (event) => {
      const { node, fold } = this.under(event.target);
      if (fold) this.focus(firstBlock(node));
      if (fold || !node) return;
      this.focus(node);
      this.choose(node, event.clientX, event.clientY);
    });
    blocks.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !this.press(event.key)) return;
      event.preventDefault();
    });
  }

  /** Whether the key means something here. */
  press(pressed) {
    const key = this.sideways ? (SIDEWAYS[pressed] ?? pressed) : pressed;
    const next = neighbour(this.root, this.focused, key, this.top);
    if (next) this.focus(next);
    else if (key === "Enter" || key === " ") {
      const { left, bottom } = this.drawn.get(this.focused.path).getBoundingClientRect();
      this.choose(this.focused, left, bottom);
    } else if (key === "Escape" && this.top.parent) {
      this.look(this.top.parent);
      this.focus(this.focused);
    }
    else return key.startsWith("Arrow"); // at an edge: the page is not to scroll instead
    return true;
  }

  /** The node that an element of the picture stands for, and whether as a fold. */
  under(target) {
    const { path, fold } = target.closest("[data-path], [data-fold]")?.dataset ?? {};
    return { node: this.root.found.get(path ?? fold), fold: path === undefined };
  }

  point(target) {
    const { node, fold } = target ? this.under(target) : {};
    const words = fold ? () => describeFold(node, this.folds.get(node)) : () => this.describe(node);
    this.pointed = node && words;
    this.tell();
  }
}
