// Conversations, kept in this browser and nowhere else. Each has an entry of its own in localStorage, so that two
// tabs do not undo one another's.

const PREFIX = "hiermem-chat:";
const LONGEST = 60; // characters of a title

/** A conversation in which nothing was asked yet; it is kept once something is. */
export function fresh(model = "") {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, title: "", model, system: "", temperature: null, skipped: 0, turns: [] };
}

/** What a conversation is called: its title, or its first question. */
export function titleOf({ title, turns }) {
  const words = title || turns[0]?.question.replace(/\s+/g, " ").trim() || "New conversation";
  return words.length > LONGEST ? `${words.slice(0, LONGEST - 1).trimEnd()}…` : words;
}

export class Store {
  /** `trouble(words)` is told why conversations are not kept; "" once they are again. */
  constructor(trouble) {
    this.trouble = trouble;
    try {
      this.shelf = localStorage;
    } catch {
      this.shelf = null; // the browser forbids it
    }
  }

  /** All, those that were changed last first. */
  all() {
    const names = Object.keys(this.shelf ?? {}).filter((name) => name.startsWith(PREFIX));
    const found = names.map((name) => this.get(name.slice(PREFIX.length))).filter(Boolean);
    return found.sort((one, other) => other.changed - one.changed);
  }

  /** One by its id; null where there is none, or none that can be read. */
  get(id) {
    try {
      const found = JSON.parse(this.shelf?.getItem(PREFIX + id) ?? "null");
      return Array.isArray(found?.turns) ? found : null;
    } catch {
      return null;
    }
  }

  keep(conversation) {
    conversation.changed = Date.now();
    this.put(conversation);
  }

  /** The same, without a new date. */
  put(conversation) {
    try {
      this.shelf.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
      this.trouble("");
    } catch {
      this.trouble(
        this.shelf
          ? "This browser has no more room: what is said now is lost with this tab. Delete conversations, or save them as files."
          : "This browser keeps nothing for this page: what is said is lost with this tab.",
      );
    }
  }

  remove(id) {
    this.shelf?.removeItem(PREFIX + id);
  }

  /** Calls `changed(id)` when another tab has changed or deleted a conversation, `changed()` when it has cleared all. */
  watch(changed) {
    addEventListener("storage", ({ key }) => {
      if (key === null || key.startsWith(PREFIX)) changed(key?.slice(PREFIX.length));
    });
  }
}
