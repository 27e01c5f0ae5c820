// The list of conversations: a column beside them where the window is wide, else above the page.

import { button, composing, download, element } from "./dom.js";
import { titleOf } from "./store.js";

const WIDE = matchMedia("(min-width: 1100px)");

export class Chats {
  /**
   * `place` is the dialog that holds the list, `opener` the button that shows it. Calls `on.open(id)` when one is
   * chosen, `on.changed(id)` when one was renamed, and `on.gone(id)` when one is about to be deleted.
   */
  constructor(place, opener, store, menu, on) {
    Object.assign(this, { place, opener, store, menu, on, current: "", removed: null });
    this.list = place.querySelector("ul");
    this.undo = place.querySelector(".undo");
    opener.addEventListener("click", () => this.toggle(!place.open));
    place.querySelector(".close").addEventListener("click", () => this.toggle(false));
    place.addEventListener("close", () => this.toggle(false));
    place.addEventListener("click", (event) => event.target === place && this.toggle(false)); // beside it
    WIDE.addEventListener("change", () => this.toggle(false));
  }

  toggle(open) {
    const { place, opener } = this;
    if (open && !place.open) {
      if (WIDE.matches) place.show();
      else place.showModal();
      this.draw();
    } else if (!open && place.open) place.close();
    opener.ariaExpanded = String(open);
  }

  /** The list as it is now; `current` is the conversation that is shown. */
  draw(current = this.current) {
    this.current = current;
    if (!this.place.open || this.renaming) return;
    const focused = document.activeElement?.dataset.chat;
    const rows = this.store.all().map((conversation) => this.row(conversation));
    this.list.replaceChildren(...rows);
    if (focused) this.focus(focused);
    this.place.querySelector(".empty").hidden = Boolean(rows.length);
  }

  focus(name) {
    this.list.querySelector(`[data-chat="${name}"]`)?.focus();
  }

  row(conversation) {
    const { id } = conversation;
    const title = titleOf(conversation);
    const marks = { class: "title", title, "data-chat": id, ...(id === this.current && { "aria-current": "true" }) };
    const open = button(title, () => this.choose(id), marks);
    const more = button("⋯", () => this.offer(conversation, more), {
      class: "more", "aria-label": `${title}: rename, save or delete`, "aria-haspopup": "menu", "data-chat": `${id}/`,
    });
    return element("li", {}, open, more);
  }

  choose(id) {
    if (!WIDE.matches) this.toggle(false);
    this.on.open(id);
  }

  offer(conversation, more) {
    const { left, bottom } = more.getBoundingClientRect();
    const items = [
      ["Rename", () => this.rename(conversation, more.parentElement)],
      ["Save as a file", () => download(`${titleOf(conversation)}.md`, markdown(conversation), "text/markdown")],
      ["Delete", () => this.remove(conversation)],
    ];
    this.menu.open(titleOf(conversation), items, left, bottom, () => this.renaming || this.undo.contains(document.activeElement) || this.focus(more.dataset.chat));
  }

  rename(conversation, row) {
    const field = element("input", { "aria-label": "Title", maxlength: "60" });
    field.value = titleOf(conversation);
    this.renaming = true;
    const done = (keep) => {
      if (!this.renaming) return;
      this.renaming = false;
      const found = this.store.get(conversation.id);
      if (keep && found) {
        this.store.put({ ...found, title: field.value.trim() });
        this.on.changed(conversation.id);
      }
      this.draw();
      this.focus(conversation.id);
    };
    field.addEventListener("keydown", (event) => {
      if (composing(event) || !["Enter", "Escape"].includes(event.key)) return;
      event.preventDefault(); // Escape would close the list
      event.stopPropagation();
      done(event.key === "Enter");
    });
    field.addEventListener("blur", () => done(true));
    row.replaceChildren(field);
    field.select();
    field.focus();
  }

  /** Deletes one; it can be brought back until the next is deleted or the page is left. */
  remove(conversation) {
    const { id } = conversation;
    this.on.gone(id); // first: it keeps what is being written, which would bring it back
    const last = this.store.get(id) ?? conversation;
    this.store.remove(id);
    const back = button("Undo", () => {
      this.store.put(last);
      this.undo.replaceChildren();
      this.draw();
      this.focus(id);
    });
    this.undo.replaceChildren(element("span", { text: `Deleted: ${titleOf(conversation)}` }), back);
    this.draw();
    back.focus();
  }
}

/** A conversation as a text that can be read anywhere. */
function markdown(conversation) {
  const { system, turns } = conversation;
  const parts = [`# ${titleOf(conversation)}`, ...(system ? [`System message: ${system}`] : [])];
  for (const { question, answer } of turns) {
    parts.push(`**${question.trim()}**`, answer.text || `(${answer.error ?? "no reply"})`);
    const [best] = answer.sources ?? [];
    if (best) parts.push(`From ${[best.title, best.document, best.place].filter(Boolean).join(", ")}: “${best.sentence}”`);
  }
  return `${parts.join("\n\n")}\n`;
}
