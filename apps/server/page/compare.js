// The same question with each memory, side by side: what the small model says alone, with a block for every topic,
// and with the memory on the question's own topic.

import { Answer } from "./answer.js";
import { reply } from "./api.js";
import { element } from "./dom.js";

const MEMORIES = { none: "Without memory", generic: "General memory", fetched: "Memory on its topic" };

export class Comparison {
  /** `on` as an answer's. `kept` is what `saved` gave of an earlier one. */
  constructor(on, kept = null) {
    Object.assign(this, { on, answers: {} });
    this.box = element("section", { class: "compare", "aria-label": "The same question with each memory" });
    for (const [memory, answer] of Object.entries(kept ?? {})) this.add(memory, answer);
  }

  get saved() {
    return Object.fromEntries(Object.entries(this.answers).map(([memory, answer]) => [memory, answer.saved]));
  }

  add(memory, kept = null) {
    const answer = (this.answers[memory] = new Answer(this.on, kept));
    answer.box.setAttribute("aria-label", MEMORIES[memory]);
    if (memory !== "fetched") answer.box.classList.add("plain"); // its heading says all of where it came from
    answer.box.prepend(element("h3", { text: MEMORIES[memory] }));
    this.box.append(answer.box);
    return answer;
  }

  /** Asks with each memory, all at once; `bodies` are requests by memory. Resolves when all replies have ended. */
  async run(bodies, signal) {
    const runs = Object.entries(bodies).map(async ([memory, body]) => {
      const answer = this.add(memory);
      try {
        for await (const chunk of reply(body, signal)) answer.take(chunk);
        answer.end();
      } catch (error) {
        if (signal.aborted) answer.end("stopped");
        else answer.fail(error.message);
      }
    });
    await Promise.all(runs);
  }
}
