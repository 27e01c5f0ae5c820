// The conversation: what was said, the reply that is being written, and which memory each reply came with.

import { Answer } from "./answer.js";
import { reply } from "./api.js";
import { button, element } from "./dom.js";

export class Chat {
  /**
   * `log` is the element that takes the messages. Calls `on.memory(memory)` when a reply's memory is known,
   * `on.speed(tokensPerSecond)` while it is written, `on.busy(boolean)`, `on.say(words)` for screen readers, and
   * `on.show(memory)` when the reader asks where a reply came from. `options()` gives a request's other fields.
   */
  constructor(log, options, on) {
    Object.assign(this, { log, options, on });
    this.clear();
  }

  get busy() {
    return Boolean(this.running);
  }

  clear() {
    this.stop();
    this.running = null;
    this.on.busy(false);
    this.turns = []; // {role, content}, as the server takes them
    this.log.replaceChildren();
  }

  stop() {
    this.running?.abort();
  }

  async send(text) {
    const running = (this.running = new AbortController());
    const question = element("article", { class: "turn user", "aria-label": "Question" }, element("p", { text }));
    const answer = new Answer(this.on.show);
    this.log.append(question, answer.box);
    this.follow(true);
    this.on.busy(true);
    try {
      await this.stream(text, answer, running.signal);
    } catch (error) {
      if (running.signal.aborted) answer.end("stopped");
      else this.fail(error, text, question, answer);
    }
    if (this.running !== running) return; // a new chat has begun meanwhile
    if (!answer.failed) this.turns.push(said("user", text), said("assistant", answer.text));
    this.running = null;
    this.on.busy(false);
    this.on.say(answer.failed ? answer.box.textContent : `${answer.text} ${answer.origin}`);
  }

  /** Streams one reply. Where the conversation no longer fits the model's context, its oldest turns are left out. */
  async stream(text, answer, signal) {
    for (;;) {
      try {
        const messages = [...this.turns, said("user", text)];
        for await (const chunk of reply({ messages, ...this.options() }, signal)) {
          if (chunk.memory && !answer.memory) this.on.memory(chunk.memory);
          answer.take(chunk);
          this.on.speed(answer.speed);
          this.follow();
        }
        return answer.end();
      } catch (error) {
        if (error.code !== "context_length_exceeded" || !this.turns.length) throw error;
        this.turns.splice(0, 2);
        answer.leaveOut(1);
      }
    }
  }

  fail(error, text, question, answer) {
    answer.fail(error.message);
    const again = button("Try again", () => {
      question.remove();
      answer.box.remove();
      this.send(text);
    });
    answer.box.append(again);
  }

  /** Keeps the end in view, unless the reader has scrolled up. */
  follow(always = false) {
    const { log } = this;
    const scroller = log.parentElement;
    const below = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;
    if (always || below < 120) scroller.scrollTop = scroller.scrollHeight;
  }
}

const said = (role, content) => ({ role, content });
