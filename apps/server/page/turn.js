// One turn of the conversation: a question that can be edited, its reply, and what can be done with them.

import { Answer } from "./answer.js";
import { Comparison } from "./compare.js";
import { button, composing, copy, element } from "./dom.js";

export class Turn {
  /**
   * `on` has what an answer calls, and `on.edit(turn, text)`, `on.again(turn)`, `on.compare(turn)`, and
   * `on.say(words)`. `kept` is what `saved` gave of an earlier turn.
   */
  constructor(question, on, kept = null) {
    Object.assign(this, { question, on });
    this.asked = element("article", { class: "turn user", "aria-label": "Question" });
    this.answer = new Answer(on, kept?.answer);
    this.actions = element("div", { class: "actions", role: "group", "aria-label": "This reply" });
    this.answer.box.append(this.actions);
    this.box = element("div", { class: "exchange" }, this.asked, this.answer.box);
    this.ask();
    if (!kept) return;
    this.over();
    if (kept.compared) this.compare(kept.compared);
  }

  get saved() {
    return { question: this.question, answer: this.answer.saved, compared: this.comparison?.saved };
  }

  /** Whether the model is to know of it in the turns after it. */
  get counts() {
    return Boolean(!this.answer.error && this.answer.text);
  }

  /** The question as it was asked, and the way to change it. */
  ask() {
    const edit = button("Edit", () => this.rewrite(), { "aria-label": "Edit this question", "data-asks": "" });
    const actions = element("div", { class: "actions" }, edit);
    this.asked.replaceChildren(element("p", { dir: "auto", text: this.question }), actions);
    return edit;
  }

  /** The question in a field. */
  rewrite() {
    const field = element("textarea", { dir: "auto", rows: "1", "aria-label": "The question", text: this.question });
    const ask = button("Ask", () => this.on.edit(this, field.value), { class: "main", "data-asks": "" });
    const leave = () => this.ask().focus();
    const note = this.box.nextElementSibling ? "What follows goes." : "";
    const row = element("div", { class: "row" }, element("span", { class: "note", text: note }), button("Cancel", leave), ask);
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !composing(event)) leave();
      if (event.key !== "Enter" || event.shiftKey || composing(event)) return;
      event.preventDefault();
      ask.click();
    });
    this.asked.replaceChildren(element("div", { class: "rewrite" }, field, row));
    field.style.height = `${Math.min(field.scrollHeight + 2, innerHeight / 3)}px`;
    field.focus();
  }

  /** The reply has ended: what can be done with it is offered. */
  over() {
    const { answer } = this;
    const asks = { "data-asks": "" };
    const actions = [button(answer.error ? "Try again" : "Ask again", () => this.on.again(this), asks)];
    if (answer.text) actions.unshift(button("Copy", () => this.copy(), { "aria-label": "Copy this reply" }));
    if (!answer.error) {
      const compare = () => (this.comparison ? this.closeComparison() : this.on.compare(this));
      this.comparing = button("Compare memories", compare, { "aria-expanded": "false", ...asks });
      actions.push(this.comparing);
    }
    this.actions.replaceChildren(...actions);
  }

  async copy() {
    this.on.say((await copy(this.answer.text)) ? "Copied." : "This browser does not let the page copy.");
  }

  /** Opens the comparison of memories; `kept` is what its `saved` gave. */
  compare(kept = null) {
    this.comparison = new Comparison(this.on, kept);
    this.box.append(this.comparison.box);
    this.comparing.ariaExpanded = "true";
    this.comparing.textContent = "Close comparison";
    return this.comparison;
  }

  closeComparison() {
    this.comparison.box.remove();
    this.comparison = undefined;
    this.comparing.ariaExpanded = "false";
    this.comparing.textContent = "Compare memories";
    this.on.keep();
  }
}
