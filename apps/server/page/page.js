// The page of `hiermem serve`: brings chat, picture, menu and meters together, and asks the server how it is.

import { ask, get } from "./api.js";
import { Chat } from "./chat.js";
import { Choice } from "./choice.js";
import { count, size } from "./dom.js";
import { BlockMenu } from "./menu.js";
import { MemoryPicture } from "./picture.js";

const POLL = 1000; // ms from one look at the memory to the next
const REPLY = 512; // tokens of a reply at most, as in hiermem chat
const by = (id) => document.getElementById(id);

const choice = new Choice(showChoice);
const picture = new MemoryPicture(
  by("picture"),
  (node, x, y) => menu.open(node, x, y),
  matchMedia("(hover: none)").matches
    ? "Tap a block to see what is in it, to pin it or to block it."
    : "Point at a block to see what is in it. Click it to pin it or to block it.",
  true,
);
const menu = new BlockMenu(by("menu"), picture, choice);
const chat = new Chat(by("log"), () => ({ memory: choice.request(), max_tokens: longest }), {
  busy: showBusy,
  memory: showMemory,
  show: (memory) => {
    fold(false);
    picture.reveal(known(memory.blocks));
  },
  speed: (value) => value && (by("speed").textContent = value.toFixed(1)),
  say: (words) => (by("say").textContent = words),
});
// What each choice does, in a sentence.
const MEANING = {
  fetched: "Each question brings the part of the memory that is on its topic.",
  none: "The small model alone, to compare with.",
  generic: "One block for every topic, as large as a topic's: what more training alone would bring.",
  source: "The best passage of the documents on its topic is put before the question; no memory is used.",
  "fetched+source": "The memory on its topic, and the best passage of its documents before the question.",
};
let longest = REPLY;
let connected = false;
let locked = false; // the reader was asked for the key, and did not give it

const option = (use) => document.querySelector(`#use [value="${use}"]`);
const known = (blocks) => blocks.filter((path) => picture.root.found.has(path));

/** A reply's memory is attached: its blocks are in memory now, whatever they were. */
function showMemory(memory) {
  picture.update(Object.fromEntries(memory.blocks.map((path) => [path, "in memory"])));
  picture.light(known(memory.blocks));
  look();
}

function showBusy(busy) {
  const focused = [by("send"), by("stop")].includes(document.activeElement);
  by("send").hidden = busy;
  by("stop").hidden = !busy;
  if (focused) by(busy ? "stop" : "send").focus(); // the other took its place
}

function showChoice() {
  const name = (path) => [path, picture.root.found.get(path)?.row?.label].filter(Boolean).join(" ");
  option("pinned").hidden = !choice.pinned;
  by("use").value = choice.pinned ? "pinned" : choice.use;
  by("meaning").textContent = choice.pinned ? `Every question gets the blocks on ${name(choice.pinned)}.` : MEANING[choice.use];
  by("chosen").replaceChildren(...choice.entries(name));
  picture.close(choice.blocked);
}

/** The bank as it is now. */
async function open() {
  const memory = await get("/v1/memory");
  const blocks = memory.nodes.length;
  const bytes = memory.nodes.reduce((sum, node) => sum + node.bytes, 0);
  by("model").textContent = memory.model;
  document.title = `${memory.model} · hiermem`;
  by("about").textContent = blocks
    ? `${memory.model} has ${count(blocks, "block")} of memory, ${size(bytes)}. Each question brings only those on its topic.`
    : `${memory.model} has no memory bank.`;
  document.body.classList.toggle("bankless", !blocks);
  option("generic").disabled = !memory.generic;
  for (const use of ["source", "fetched+source"]) option(use).hidden = !memory.sources;
  longest = memory.context ? Math.min(REPLY, Math.floor(memory.context / 2)) : REPLY;
  picture.show(memory.nodes);
  showCache(memory.cache);
}

/** What is in memory; the general block is among it, and is no block of the picture. */
function showCache(cache, generic = 0) {
  if (!cache) return;
  by("held").textContent = `${size(cache.bytes)} of ${size(cache.budget)}`;
  by("general").textContent = generic ? `${size(generic)} of it general memory` : "";
  const meter = by("meter");
  meter.ariaValueMax = cache.budget;
  meter.ariaValueNow = cache.bytes;
  meter.ariaValueText = by("held").textContent;
  meter.firstElementChild.style.width = `${Math.min(100, (100 * cache.bytes) / cache.budget)}%`;
}

async function look() {
  try {
    if (!connected) await open();
    const state = await get("/v1/memory/state");
    picture.update(state.states);
    showCache(state.cache, state.generic_bytes);
    if (state.tokens_per_second && !chat.busy) by("speed").textContent = state.tokens_per_second.toFixed(1);
    connected = true;
  } catch (error) {
    connected = false;
    locked = error.code === "no_key";
  }
  by("offline").hidden = connected;
}

/** Looks for as long as the page can be seen; where the answer takes long, less often. */
async function keepLooking() {
  for (;;) {
    const begun = performance.now();
    if (!document.hidden && !locked) await look();
    await new Promise((done) => setTimeout(done, Math.max(POLL, 10 * (performance.now() - begun))));
  }
}

function send(event) {
  event?.preventDefault();
  const input = by("input");
  const text = input.value.trim();
  if (!text || chat.busy) return;
  input.value = "";
  grow();
  locked = false;
  chat.send(text);
}

/** Gives the input as many lines as it needs. */
function grow() {
  const input = by("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + input.offsetHeight - input.clientHeight}px`; // with its border
}

/** Asks for the API key; null where the reader does not give it. */
ask.key = (again) =>
  new Promise((done) => {
    const dialog = by("key");
    if (again) by("key-words").textContent = "The server does not take this key.";
    dialog.addEventListener("close", () => done(dialog.returnValue === "ok" ? by("key-input").value : null), { once: true });
    dialog.returnValue = "";
    dialog.showModal();
  });

by("composer").addEventListener("submit", send);
by("input").addEventListener("input", grow);
by("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  if (event.key === "Escape") chat.stop();
});
by("stop").addEventListener("click", () => chat.stop());
by("new").addEventListener("click", () => {
  chat.clear();
  picture.light([]);
  by("input").focus();
});
by("key-cancel").addEventListener("click", () => by("key").close());
by("use").addEventListener("change", () => by("use").value !== "pinned" && choice.take(by("use").value));
by("fold").addEventListener("click", () => fold(!document.body.classList.contains("folded")));

/** Folds the picture away, or shows it. */
function fold(away) {
  document.body.classList.toggle("folded", away);
  by("fold").ariaExpanded = String(!away);
}

fold(matchMedia("(max-width: 820px)").matches); // a phone's first screen is for the conversation
showChoice();
keepLooking();
