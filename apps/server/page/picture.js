// The picture of a memory bank: an icicle of its blocks that can be pointed at, walked through and looked into.
//
// `hiermem serve` shows it beside the chat, and `hiermem bank show --html` writes it into a file. A block narrower
// than a pixel is not drawn, but it can be pointed at and walked to like any other.

import { button, element } from "./dom.js";
import { describe, legend, paragraphs } from "./facts.js";
import { useFont, writeLabel } from "./label.js";
import { at, firstBlock, layout, neighbour, within } from "./layout.js";

const HINT = "Point at a block, or walk from one to the next with the arrow keys.";

export class MemoryPicture {
  /** Draws into `place`. `choose(node, x, y)` is called when a block is clicked, or Enter is pressed on it. */
  constructor(place, choose = (node) => this.look(node)) {
    this.trail = element("nav", { class: "trail", "aria-label": "Part of the bank that is shown" });
    this.blocks = element("div", { class: "blocks", role: "tree", "aria-label": "Blocks of the memory bank" });
    this.cursor = element("div", { class: "cursor", "aria-hidden": "true", hidden: "" });
    this.facts = element("div", { class: "facts" });
    this.legend = element("ul", { class: "legend", "aria-label": "Colours" });
    const frame = element("div", { class: "frame" }, this.blocks, this.cursor);
    place.replaceChildren(this.trail, frame, this.legend, this.facts);
    this.choose = choose;
    this.closed = new Set(); // paths that the page's reader has blocked, beside the bank's policy
    this.lit = new Set(); // paths of the blocks that answer
    this.drawn = new Map(); // path -> element
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

  /** Lights these blocks, and no others. */
  light(paths) {
    this.lit = new Set(paths);
    this.change();
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
    this.draw();
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
    this.legend.replaceChildren(...legend(pairs, this.lit.size, this.blocks.classList.contains("fine")));
    this.tell(this.pointed);
  }

  /** Tells about a node below the picture; without one about that in focus, or else the last that is lit. */
  tell(node) {
    const lit = [...this.lit].map((path) => this.root.found.get(path)).findLast((found) => found?.row);
    const shown = node ?? (this.blocks.contains(document.activeElement) ? this.focused : lit);
    const hint = element("p", { text: this.focused ? HINT : "" });
    this.facts.replaceChildren(...(shown ? paragraphs(this.describe(shown)) : [hint]));
  }

  describe(node) {
    const state = this.closer(node) ? "blocked here" : node.row.state;
    return describe(node.row, state === "blocked" ? "blocked by the bank" : state);
  }

  draw() {
    const { clientWidth: across, clientHeight: down } = this.blocks;
    if (!across || !down) return;
    const { root, top } = this;
    useFont(this.blocks);
    const [scaleX, scaleY] = [across / top.width, down / (1 - top.y)];
    const kept = new Map();
    let fine = false; // whether some are too narrow
    for (const node of root.blocks) {
      if (!within(node, top)) continue;
      const [start, width] = [(node.x - top.x) * scaleX, node.width * scaleX];
      const least = this.least(node);
      if (width < 1 && !least) {
        fine = true;
        continue;
      }
      const [left, upper] = [Math.round(start), Math.round((node.y - top.y) * scaleY)];
      const right = Math.max(Math.round(start + width), left + least);
      const lower = Math.max(Math.round((node.y + node.height - top.y) * scaleY), upper + 1);
      const box = this.drawn.get(node.path) ?? this.box(node);
      this.dress(box, node, [left, upper, right - left, lower - upper]);
      kept.set(node.path, box);
    }
    this.blocks.classList.toggle("fine", fine);
    this.arrange(kept);
  }

  /** Px that a block is drawn broad however narrow it is. */
  least(node) {
    if (node === this.focused || this.lit.has(node.path)) return 3;
    return node.row.state === "in memory" ? 1 : 0;
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

  dress(box, node, [left, upper, width, height]) {
    const px = { left, top: upper, width: width - (width > 6 ? 1 : 0), height: height - (height > 6 ? 1 : 0) };
    for (const [side, length] of Object.entries(px)) box.style[side] = `${length}px`;
    const lit = this.lit.has(node.path) && this.state(node) !== "blocked";
    const marks = { lit, fetched: node.row.fetched, thin: width < 5 };
    const kinds = ["block", this.state(node).replace(" ", "-"), ...Object.keys(marks).filter((mark) => marks[mark])];
    box.className = kinds.join(" ");
    box.tabIndex = node === this.focused ? 0 : -1;
    const { name, figures, from } = this.describe(node);
    const used = lit ? "answering" : "";
    box.setAttribute("aria-label", [name, used, figures, from].filter(Boolean).join(", "));
    writeLabel(box, node.row, px.width, px.height);
  }

  listen() {
    const { blocks } = this;
    blocks.addEventListener("pointermove", (event) => this.point(this.under(event)));
    blocks.addEventListener("pointerleave", () => this.point(null));
    blocks.addEventListener("focusin", () => this.tell(null));
    blocks.addEventListener("focusout", () => requestAnimationFrame(() => this.tell(this.pointed)));
    blocks.addEventListener("click", (event) => {
      const node = this.under(event);
      if (!node) return;
      this.focus(node);
      this.choose(node, event.clientX, event.clientY);
    });
    blocks.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !this.press(event.key)) return;
      event.preventDefault();
    });
  }

  /** Whether the key means something here. */
  press(key) {
    const next = neighbour(this.root, this.focused, key, this.top);
    if (next) this.focus(next);
    else if (key === "Enter" || key === " ") {
      const { left, bottom } = this.drawn.get(this.focused.path).getBoundingClientRect();
      this.choose(this.focused, left, bottom);
    } else if (key === "Escape" && this.top.parent) this.look(this.top.parent);
    else return key.startsWith("Arrow"); // at an edge: the page is not to scroll instead
    return true;
  }

  /** The node below the pointer. */
  under(event) {
    const { left, top, width, height } = this.blocks.getBoundingClientRect();
    const { x, y, width: share } = this.top;
    return at(this.top, x + ((event.clientX - left) / width) * share, y + ((event.clientY - top) / height) * (1 - y));
  }

  point(node) {
    if (node === this.pointed) return;
    this.pointed = node;
    this.tell(node);
    this.cursor.hidden = !node;
    if (!node) return;
    const { x, y, width: share } = this.top;
    const [left, upper] = [(node.x - x) / share, (node.y - y) / (1 - y)];
    const place = { left, top: upper, width: node.width / share, height: node.height / (1 - y) };
    for (const [side, part] of Object.entries(place)) this.cursor.style[side] = `${part * 100}%`;
  }
}
