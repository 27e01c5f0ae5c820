// Which memory the next question gets: chosen by the switch, pinned to a path, or routed around blocked nodes.

import { button, element } from "./dom.js";

const WORDS = ["fetched", "none", "generic", "source", "fetched+source"];
const ROUTED = ["fetched", "source", "fetched+source"];
const under = (path, top) => path === top || path.startsWith(top + ".");

export class Choice {
  /** `changed` is called after every change. */
  constructor(changed) {
    this.changed = changed;
    this.use = "fetched"; // one of WORDS, or the path that is pinned
    this.blocked = new Set();
  }

  get pinned() {
    return WORDS.includes(this.use) ? null : this.use;
  }

  /** One of WORDS, or a path. */
  take(use) {
    this.use = use;
    this.changed();
  }

  /** Blocks a node and all below it; a path pinned through it is let go. */
  block(path) {
    this.blocked = new Set([...this.blocked].filter((other) => !under(other, path))).add(path);
    if (this.pinned && under(this.pinned, path)) this.use = "fetched";
    this.changed();
  }

  unblock(path) {
    this.blocked.delete(path);
    this.changed();
  }

  /** The `memory` field of a request. */
  request(use = this.use) {
    return ROUTED.includes(use) ? { use, blocked: [...this.blocked], history: "topic" } : { use };
  }

  /** Lets everything go: another bank has other paths. */
  clear() {
    this.use = this.pinned ? "fetched" : this.use;
    this.blocked.clear();
    this.changed();
  }

  /** A list entry with a way back for what is pinned and for each blocked node; `name` gives a path's label. */
  entries(name) {
    const blocked = [...this.blocked].map((path) => ["Blocked", path, "Unblock", () => this.unblock(path)]);
    const pinned = this.pinned ? [["Pinned", this.pinned, "Unpin", () => this.take("fetched")]] : [];
    return [...pinned, ...blocked].map(([what, path, undo, act]) =>
      element(
        "li",
        {},
        element("strong", { text: what }),
        element("span", { text: name(path), title: name(path) }),
        button(undo, act, { "aria-label": `${undo} ${path}` }),
      ),
    );
  }
}
