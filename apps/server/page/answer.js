// One reply in the conversation: its text as it comes, and below it which memory it came with.

import { button, count, element, size } from "./dom.js";
import { Prose } from "./markdown.js";

export class Answer {
  /**
   * `on.show(memory)` is called when the reader presses the path that the reply came by, `on.source(source, memory)`
   * when the reader presses a source, `on.say(words)` when code was copied. `kept` is what `saved` gave of an earlier one.
   */
  constructor(on, kept = null) {
    this.on = on;
    this.text = "";
    this.tokens = 0;
    this.words = element("div", { class: "words", dir: "auto" });
    this.prose = new Prose(this.words, on.say);
    this.wait = element("p", { class: "wait" });
    this.notes = element("p", { class: "note", role: "note" });
    this.foot = element("footer");
    this.source = element("p", { class: "source" });
    this.box = element("article", { class: "turn assistant", "aria-label": "Reply" }, this.notes, this.wait, this.words, this.foot, this.source);
    if (kept) this.restore(kept);
    else this.box.setAttribute("aria-busy", "true");
  }

  /** What is kept of it, as JSON. */
  get saved() {
    const { text, memory, sources, tokens, speed, ending, left, error } = this;
    return { text, memory, sources, tokens, speed, ending, left, error };
  }

  restore({ sources, speed, left, error, ...kept }) {
    Object.assign(this, kept);
    this.rate = speed;
    this.prose.write(this.text);
    if (sources) this.tell(sources);
    if (left) this.leaveOut(left);
    if (error) this.fail(error);
    this.write();
  }

  /** How many of the conversation's last turns a reply with blocks saw; 0: all of them. */
  get seen() {
    return this.memory?.blocks.length ? (this.memory.turns ?? 0) : 0;
  }

  /** A chunk of the stream. */
  take(chunk) {
    const piece = chunk.choices?.[0]?.delta?.content;
    if (chunk.memory && !this.memory) this.memory = chunk.memory;
    if (chunk.sources) this.tell(chunk.sources);
    if (piece) {
      this.begun ??= performance.now();
      this.latest = performance.now();
      this.tokens += 1;
      this.text += piece;
      this.wait.textContent = "";
      this.prose.write(this.text, true);
    }
    if (chunk.choices?.[0]?.finish_reason === "length") this.ending = "cut at its longest";
    if (chunk.usage) this.tokens = chunk.usage.completion_tokens;
    this.write();
  }

  /** Says which sentence of which document says the reply. A bank without sources says nothing of it. */
  tell(sources) {
    this.sources = sources;
    const [best] = sources;
    if (!best) return void (this.source.textContent = "No source in this bank says this.");
    const name = button(named(best), () => this.on.source(best, this.memory), { class: "document", title: "Read the passage" });
    this.source.replaceChildren("From ", name, element("q", { text: best.sentence }));
  }

  /** Tokens per second since the first; 0 while there is no second one. */
  get speed() {
    if (this.rate !== undefined) return this.rate;
    return this.begun && this.tokens > 1 ? (this.tokens - 1) / Math.max((this.latest - this.begun) / 1000, 1e-3) : 0;
  }

  /** Where the reply came from, in words. */
  get origin() {
    const { memory } = this;
    if (!memory) return "";
    if (["none", "generic"].includes(memory.memory)) return memory.memory === "none" ? "Without memory" : "General memory";
    if (memory.far) return "Nothing like it in the bank: no memory";
    const labels = memory.labels.filter(Boolean).join(" › ");
    return labels || `Memory ${memory.path}`;
  }

  get details() {
    const { memory } = this;
    const details = [];
    if (memory?.blocks.length) {
      details.push(memory.bytes_read ? `${size(memory.bytes_read)} fetched` : "already in memory");
    } else if (memory?.path && memory.memory !== "source") details.push("no block on this path");
    if (memory?.stayed) details.push("kept the topic");
    if (memory?.avoided?.length) details.push(`went around ${memory.avoided.join(", ")}`);
    if (this.speed) details.push(`${this.speed.toFixed(1)} tokens/s`);
    if (this.ending) details.push(this.ending);
    return details;
  }

  write() {
    if (this.memory && !this.path) {
      this.path = this.memory.path
        ? button(this.origin, () => this.on.show(this.memory), { class: "path", title: "Show it in the picture" })
        : element("span", { class: "path", text: this.origin });
      this.figures = element("span", { class: "figures" });
      this.foot.append(this.path, this.figures);
      const { passage } = this.memory;
      const read = () => this.on.source(passage, this.memory);
      if (passage) this.foot.append(button(`passage ${passage.title || passage.document}`, read, { class: "path", title: "Read the passage" }));
    }
    if (this.figures) this.figures.textContent = this.details.join(" · ");
  }

  /** The reply is over; `how` says so where it did not end by itself. */
  end(how) {
    this.ending = how ?? this.ending;
    this.wait.textContent = "";
    this.prose.write(this.text);
    this.box.removeAttribute("aria-busy");
    this.write();
  }

  fail(message) {
    this.error = message;
    this.end();
    this.box.classList.add("failed");
    this.box.append(element("p", { class: "error", text: message }));
  }

  /** Says that `turns` turns more of the conversation no longer fit. */
  leaveOut(turns) {
    this.left = (this.left ?? 0) + turns;
    this.notes.textContent = `Left out, to fit the model's context: the oldest ${count(this.left, "turn")}.`;
  }
}

/** A source's document, and where in it: `Gold (metals.pdf, page 3)`. */
export function named({ document, title, place }) {
  const where = [document, place].filter(Boolean).join(", ");
  return title && where ? `${title} (${where})` : title || where;
}
