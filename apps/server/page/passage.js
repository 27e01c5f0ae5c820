// The passage that a reply's source stands in, and the others that its topic was learnt from.

import { named } from "./answer.js";
import { get } from "./api.js";
import { element } from "./dom.js";

export class Passage {
  /** `place` is the dialog that shows it. */
  constructor(place) {
    this.place = place;
    this.body = place.querySelector(".passage");
    this.where = place.querySelector(".where");
    this.title = place.querySelector("h2");
    this.back = place.querySelector(".back");
    this.on = place.querySelector(".on");
    this.back.addEventListener("click", () => this.turn(-1));
    this.on.addEventListener("click", () => this.turn(1));
    place.querySelector(".close").addEventListener("click", () => place.close());
  }

  /** Opens at a source, {document, title, place, sentence}, of a reply with this memory. */
  async open(source, { path }, model) {
    this.passages = [];
    this.sentence = source.sentence ?? "";
    this.write(source, "Fetching the passage …");
    if (!this.place.open) this.place.showModal();
    try {
      const query = new URLSearchParams({ path, model });
      this.passages = (await get(`/v1/memory/passages?${query}`)).passages;
    } catch (error) {
      return this.write(source, error.message);
    }
    const here = (one) => one.document === source.document && one.place === source.place && one.text.includes(this.sentence);
    this.at = this.passages.findIndex(here);
    if (this.at < 0) return this.write(source, "The bank has changed since: this passage is no longer in it.");
    this.turn(0);
  }

  turn(step) {
    this.at = (this.at + step + this.passages.length) % this.passages.length;
    const passage = this.passages[this.at];
    this.write(passage, passage.text);
  }

  write(source, text) {
    const { passages } = this;
    this.title.textContent = source.title || source.document;
    this.where.textContent = [source.title && named({ ...source, title: "" }), passages.length > 1 && `${this.at + 1} of ${passages.length} on this topic`]
      .filter(Boolean).join(" · ");
    const [before, after] = this.sentence && text.includes(this.sentence) ? split(text, this.sentence) : [text, null];
    this.body.replaceChildren(before, ...(after === null ? [] : [element("mark", { text: this.sentence }), after]));
    for (const turn of [this.back, this.on]) turn.hidden = passages.length < 2;
    this.body.querySelector("mark")?.scrollIntoView({ block: "nearest" });
  }
}

function split(text, sentence) {
  const at = text.indexOf(sentence);
  return [text.slice(0, at), text.slice(at + sentence.length)];
}
