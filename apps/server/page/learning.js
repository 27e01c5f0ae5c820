// Runs of `hiermem learn` that the server watches: their stages, how far each is, the loss, and what comes of it.

import { get, post } from "./api.js";
import { button, element } from "./dom.js";

const OPEN = 2000; // ms from look to look while they are watched
const SHUT = 15000; // and else
const SIZE = [320, 90]; // px of the picture of the loss

export class Learning {
  /** Calls `on.say(words)` when a run has ended, and `on.loaded(name)` when the reader has had what it made loaded. */
  constructor(opener, place, on) {
    Object.assign(this, { opener, place, on, states: new Map() });
    this.body = place.querySelector(".runs");
    opener.addEventListener("click", () => this.open());
    place.querySelector(".close").addEventListener("click", () => place.close());
  }

  /** Begins to look, once the server answers. */
  start() {
    if (!this.started) this.keepLooking();
    this.started = true;
  }

  open() {
    this.place.showModal();
    this.keepLooking();
  }

  async look() {
    try {
      this.show((await get("/v1/learning")).runs);
    } catch (error) {
      if (this.place.open) this.body.replaceChildren(element("p", { text: error.message }));
    }
  }

  /** Looks, and again after a while: sooner while the runs are watched. */
  async keepLooking() {
    if (!document.hidden) await this.look();
    clearTimeout(this.timer);
    if (this.none) return; // the server watches nothing, and will not while it runs
    this.timer = setTimeout(() => this.keepLooking(), this.place.open ? OPEN : SHUT);
  }

  show(runs) {
    this.none = !runs.length;
    this.opener.hidden = this.none;
    const going = runs.find((run) => run.state === "running");
    this.opener.textContent = going ? ["Learning", percent(going)].filter(Boolean).join(" ") : "Learning";
    for (const { name, state } of runs) {
      if (this.states.get(name) === "running" && state !== "running") this.on.say(`${name}: ${ENDS[state]}`);
      this.states.set(name, state);
    }
    if (!this.place.open) return;
    const focused = this.body.contains(document.activeElement);
    this.body.replaceChildren(...runs.map((run) => this.run(run)));
    if (focused) this.body.querySelector("button")?.focus();
  }

  run(run) {
    const box = element("section", {}, element("h3", { text: run.name }));
    if (run.state === "done") box.append(...this.done(run));
    else if (run.state === "nothing") box.append(element("p", { text: ENDS.nothing }));
    else box.append(stages(run), ...now(run), ...curve(run));
    return box;
  }

  done(run) {
    const { documents, windows, perplexity, perplexity_of: of } = run.report;
    const figures = Object.entries(perplexity).map(([name, value]) => `${name} ${value.toFixed(1)}`).join(", ");
    const words = [`Done: ${documents} documents in ${windows} windows.`, figures && `Perplexity of ${of}: ${figures}.`];
    const parts = words.filter(Boolean).map((text) => element("p", { text }));
    if (run.served) parts.push(element("p", { text: "This server has it: choose it at the top." }));
    if (run.path) parts.push(button("Load it", (event) => this.load(run, event.target), { class: "main" }));
    return parts;
  }

  async load({ name, path }, pressed) {
    pressed.disabled = true;
    pressed.textContent = "Loading …";
    try {
      await post("/v1/banks/load", { name, path });
      this.place.close();
      this.on.loaded(name);
    } catch (error) {
      pressed.replaceWith(element("p", { class: "error", text: error.message }));
    }
  }
}

const ENDS = {
  done: "learning is done.",
  stopped: "learning has stopped.",
  nothing: "Nothing is being learnt here yet, and nothing was.",
};

const percent = ({ done, total }) => (total ? `${Math.floor((100 * done) / total)} %` : "");

/** The stages that are done, each with what came of it. */
function stages({ stages: over }) {
  return element(
    "ol",
    { class: "stages" },
    ...over.map(({ stage, line }) => element("li", {}, element("strong", { text: stage }), ` ${line}`)),
  );
}

/** What is being done now, and how long yet. */
function now(run) {
  const { stage, done, total, unit, doing, seconds_left: left } = run;
  if (run.state === "stopped") {
    return [element("p", { class: "error", text: `Stopped in stage ${stage}. The same command goes on from there.` })];
  }
  const amount = total ? `${done.toLocaleString("en")} of ${total.toLocaleString("en")} ${unit}` : done ? `${done.toLocaleString("en")} ${unit}` : "";
  const words = [stage, doing, amount, left === null ? "" : `${duration(left)} left`].filter(Boolean).join(" · ");
  const bar = element("progress", { "aria-label": `Stage ${stage}`, ...(total && { max: total, value: done }) });
  return [element("p", { text: words }), bar];
}

/** The loss over the tokens learnt, and the last figures on held-out texts. */
function curve({ loss, measured }) {
  const parts = [];
  if (loss.length > 2) {
    const [width, height] = SIZE;
    const tokens = loss.map(([at]) => at);
    const losses = loss.map(([, value]) => value);
    const scale = (value, from, to, px) => ((value - from) / (to - from || 1)) * px;
    const [first, last] = [tokens[0], tokens.at(-1)];
    const [low, high] = [Math.min(...losses), Math.max(...losses)];
    const points = loss.map(([at, value]) => `${scale(at, first, last, width).toFixed(1)},${(height - scale(value, low, high, height)).toFixed(1)}`);
    const told = `Loss from ${losses[0].toFixed(2)} to ${losses.at(-1).toFixed(2)}`;
    const picture = drawn("svg", { viewBox: `-2 -2 ${width + 4} ${height + 4}`, role: "img", "aria-label": told, preserveAspectRatio: "none" });
    picture.append(drawn("polyline", { points: points.join(" ") }));
    parts.push(picture, element("p", { class: "note", text: `${told}, over ${last.toLocaleString("en")} tokens` }));
  }
  const latest = measured.at(-1);
  if (latest) {
    const figures = Object.entries(latest.losses).map(([name, value]) => `${name} ${value.toFixed(2)}`).join(", ");
    parts.push(element("p", { class: "note", text: `Loss of texts that are not learnt, subtree ${latest.job}: ${figures}` }));
  }
  return parts;
}

function drawn(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** 4 s, 12 min, 3.1 h. */
function duration(seconds) {
  if (seconds < 120) return `${Math.round(Math.max(seconds, 0))} s`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}
