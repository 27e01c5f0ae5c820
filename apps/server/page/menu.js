// A menu that lies above the page, for a block of the memory or for a conversation.

import { button, element } from "./dom.js";

export class Menu {
  constructor(place) {
    this.place = place;
    place.addEventListener("keydown", (event) => this.press(event));
  }

  /**
   * Opens at (x, y) of the window, within its bounds. `items` are [text, act, disabled]; `after` is called once the
   * menu has closed, whether something was chosen or not.
   */
  open(name, items, x, y, after) {
    const { place } = this;
    this.after = after;
    place.setAttribute("aria-label", name);
    const buttons = items.map(([text, act, disabled]) => {
      const item = button(text, () => this.run(act), { role: "menuitem", tabindex: "-1" });
      item.disabled = Boolean(disabled);
      return item;
    });
    place.replaceChildren(element("p", { text: name, role: "presentation" }), ...buttons);
    place.showPopover();
    const { width, height } = place.getBoundingClientRect();
    place.style.left = `${Math.max(8, Math.min(x, innerWidth - width - 8))}px`;
    place.style.top = `${Math.max(8, Math.min(y + 4, innerHeight - height - 8))}px`;
    place.querySelector("button:not(:disabled)")?.focus();
  }

  run(act) {
    this.place.hidePopover();
    act();
    this.after();
  }

  press(event) {
    const items = [...this.place.querySelectorAll("button:not(:disabled)")];
    const here = items.indexOf(document.activeElement);
    const next = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: -1 }[event.key];
    if (event.key === "Tab") this.run(() => {});
    if (next === undefined && event.key !== "Tab") return;
    event.preventDefault();
    if (next !== undefined) items.at(next % items.length).focus();
  }
}

/** What can be done with a block: pin it, block it, look closer. */
export function blockItems(node, picture, choice) {
  const closer = picture.closer(node);
  const policy = node.row.state === "blocked";
  const items = [];
  if (choice.pinned === node.path) items.push(["Unpin", () => choice.take("fetched")]);
  else items.push(["Pin: answer with this memory", () => choice.take(node.path), closer || policy]);
  if (policy) items.push(["Blocked by the bank", () => {}, true]);
  else if (closer) items.push([`Unblock ${closer.path}`, () => choice.unblock(closer.path)]);
  else items.push(["Block: answer without it", () => choice.block(node.path)]);
  if (picture.around(node) !== picture.top) items.push(["Look closer", () => picture.look(node)]);
  if (picture.top.parent) items.push(["Whole bank", () => picture.look(picture.root)]);
  return items;
}
