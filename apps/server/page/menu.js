// The menu of one block: pin it, block it, look closer.

import { button, element } from "./dom.js";

export class BlockMenu {
  constructor(menu, picture, choice) {
    Object.assign(this, { menu, picture, choice });
    menu.addEventListener("keydown", (event) => this.press(event));
  }

  /** Opens at (x, y) of the window, within its bounds. */
  open(node, x, y) {
    const { menu } = this;
    const { name } = this.picture.describe(node);
    menu.setAttribute("aria-label", name);
    menu.replaceChildren(element("p", { text: name, role: "presentation" }), ...this.items(node));
    menu.showPopover();
    const { width, height } = menu.getBoundingClientRect();
    menu.style.left = `${Math.max(8, Math.min(x, innerWidth - width - 8))}px`;
    menu.style.top = `${Math.max(8, Math.min(y + 4, innerHeight - height - 8))}px`;
    menu.querySelector("button:not(:disabled)")?.focus();
    this.node = node;
  }

  items(node) {
    const { picture, choice } = this;
    const closer = picture.closer(node);
    const policy = node.row.state === "blocked";
    const pinned = choice.pinned === node.path;
    const items = [];
    if (pinned) items.push(["Unpin", () => choice.take("fetched")]);
    else items.push(["Pin: answer with this memory", () => choice.take(node.path), closer || policy]);
    if (policy) items.push(["Blocked by the bank", () => {}, true]);
    else if (closer) items.push([`Unblock ${closer.path}`, () => choice.unblock(closer.path)]);
    else items.push(["Block: answer without it", () => choice.block(node.path)]);
    if (picture.around(node) !== picture.top) items.push(["Look closer", () => picture.look(node)]);
    if (picture.top.parent) items.push(["Whole bank", () => picture.look(picture.root)]);
    return items.map(([text, act, disabled]) => {
      const item = button(text, () => this.run(act), { role: "menuitem", tabindex: "-1" });
      item.disabled = Boolean(disabled);
      return item;
    });
  }

  run(act) {
    this.menu.hidePopover();
    act();
    const { picture, node } = this;
    picture.focus(picture.drawn.has(node.path) ? node : picture.focused);
  }

  press(event) {
    const items = [...this.menu.querySelectorAll("button:not(:disabled)")];
    const here = items.indexOf(document.activeElement);
    const next = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: -1 }[event.key];
    if (event.key === "Tab") this.run(() => {});
    if (next === undefined && event.key !== "Tab") return;
    event.preventDefault();
    if (next !== undefined) items.at(next % items.length).focus();
  }
}
