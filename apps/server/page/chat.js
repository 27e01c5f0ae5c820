// The conversation: its turns, the reply that is being written, and what becomes of them.

import { reply } from "./api.js";
import { Turn } from "./turn.js";

const PATIENCE = 2; // seconds that a reply may take to begin before the reader is told why

export class Chat {
  /**
   * `log` is the element that takes the turns. `request(use)` gives a request's other fields, with that memory if one
   * is named; `memories()` those that the model has; `waiting()` says why a reply has not begun. Calls
   * `on.keep(conversation)` when it is to be kept, `on.memory(memory)` when a reply's memory is known,
   * `on.speed(tokensPerSecond)` while it is written, `on.busy(boolean)`, `on.say(words)` for screen readers,
   * and `on.show(memory)` and `on.source(source, memory)` when the reader asks where a reply came from.
   */
  constructor(log, { request, memories, waiting }, on) {
    Object.assign(this, { log, request, memories, waiting, on, turns: [] });
    this.acts = {
      ...on,
      keep: () => this.keep(),
      again: (turn) => this.from(turn, turn.question),
      edit: (turn, text) => this.from(turn, text),
      compare: (turn) => this.compare(turn),
    };
  }

  get busy() {
    return Boolean(this.running);
  }

  /** Shows a conversation; what is being written in another is stopped. */
  open(conversation) {
    this.stop();
    this.running = null;
    this.on.busy(false);
    this.conversation = conversation;
    this.turns = conversation.turns.map((kept) => new Turn(kept.question, this.acts, kept));
    this.log.replaceChildren(...this.turns.map((turn) => turn.box));
    this.follow(true);
  }

  keep() {
    this.conversation.turns = this.turns.map((turn) => turn.saved);
    if (this.turns.length) this.on.keep(this.conversation);
  }

  stop() {
    if (!this.running) return;
    this.running.abort();
    this.keep();
  }

  /** Stops what is being written, and does not keep it. */
  drop() {
    this.running?.abort();
    this.running = null;
  }

  /** Asks anew at a turn, in whose place the new one comes; what followed it goes. */
  from(turn, text) {
    const question = text.trim();
    if (this.busy || !question) return;
    const gone = this.turns.splice(this.turns.indexOf(turn));
    for (const { box } of gone) box.remove();
    this.conversation.skipped = Math.min(this.conversation.skipped, this.turns.length);
    this.send(question);
  }

  async send(text) {
    const turn = new Turn(text, this.acts);
    this.turns.push(turn);
    this.log.append(turn.box);
    this.follow(true);
    await this.working(async (signal) => {
      const { answer } = turn;
      this.keep();
      const told = this.tellWhy(answer);
      try {
        await this.stream(turn, signal);
      } catch (error) {
        if (signal.aborted) answer.end("stopped");
        else answer.fail(error.message);
      }
      clearInterval(told);
      turn.over();
      return answer.error ?? `${answer.words.innerText} ${answer.origin}`;
    });
  }

  /** While a reply has not begun: why, and for how long already. */
  tellWhy(answer) {
    const begun = performance.now();
    return setInterval(() => {
      const seconds = Math.round((performance.now() - begun) / 1000);
      if (!answer.text && seconds >= PATIENCE) answer.wait.textContent = `${this.waiting()}, ${seconds} s`;
    }, 1000);
  }

  /** Streams one reply. Where the conversation no longer fits the model's context, its oldest turns are left out. */
  async stream(turn, signal) {
    const { answer } = turn;
    for (;;) {
      try {
        for await (const chunk of reply({ messages: this.messages(turn), ...this.request() }, signal)) {
          if (chunk.memory && !answer.memory) this.on.memory(chunk.memory);
          answer.take(chunk);
          this.on.speed(answer.speed);
          this.follow();
        }
        return answer.end();
      } catch (error) {
        const before = this.turns.slice(this.conversation.skipped, this.turns.indexOf(turn));
        if (error.code !== "context_length_exceeded" || !before.length) throw error;
        this.conversation.skipped += 1;
        if (before[0].counts) answer.leaveOut(1);
      }
    }
  }

  /**
   * What the server is sent to answer a turn: the system message, the turns before, the question. With `seen`, of the
   * turns the last so many alone.
   */
  messages(turn, seen = 0) {
    const { system, skipped } = this.conversation;
    const all = this.turns.slice(skipped, this.turns.indexOf(turn)).filter((one) => one.counts);
    const before = seen ? all.slice(Math.max(0, all.length + 1 - seen)) : all;
    return [
      ...(system ? [said("system", system)] : []),
      ...before.flatMap(({ question, answer }) => [said("user", question), said("assistant", answer.text)]),
      said("user", turn.question),
    ];
  }

  /** Asks a turn's question with each memory, below its reply. */
  async compare(turn) {
    if (this.busy) return;
    const messages = this.messages(turn, turn.answer.seen); // or the others would answer another prompt
    const bodies = this.memories().map((memory) => [memory, { messages, ...this.request(memory) }]);
    const comparison = turn.compare();
    await this.working(async (signal) => {
      const asked = comparison.run(Object.fromEntries(bodies), signal);
      comparison.box.scrollIntoView({ block: "nearest" });
      await asked;
      return "All replies are there.";
    });
  }

  /** Does what takes time: `work(signal)` returns what a screen reader is told in the end. */
  async working(work) {
    const running = (this.running = new AbortController());
    this.on.busy(true);
    const told = await work(running.signal);
    if (this.running !== running) return; // another conversation was opened meanwhile
    this.running = null;
    this.keep();
    this.on.busy(false);
    this.on.say(told);
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
