// The page of `hiermem serve`: brings conversations, picture, menus and meters together.

import { ask } from "./api.js";
import { Banks } from "./banks.js";
import { Chat } from "./chat.js";
import { Chats } from "./chats.js";
import { Choice } from "./choice.js";
import { composing, count, size } from "./dom.js";
import { Learning } from "./learning.js";
import { blockItems, Menu } from "./menu.js";
import { Passage } from "./passage.js";
import { MemoryPicture } from "./picture.js";
import { drawing, Settings } from "./settings.js";
import { fresh, Store, titleOf } from "./store.js";
import { Watch } from "./watch.js";

const REPLY = 512; // tokens of a reply at most, as in hiermem chat
const COMPARED = 160; // of a reply that is compared: without memory small models ramble
const by = (id) => document.getElementById(id);

const choice = new Choice(showChoice);
const picture = new MemoryPicture(
  by("picture"),
  (node, x, y) => menu.open(picture.describe(node).name, blockItems(node, picture, choice), x, y, () => back(node)),
  matchMedia("(hover: none)").matches
    ? "Tap a block to see what is in it, to pin it or to block it."
    : "Point at a block to see what is in it. Click it to pin it or to block it.",
  true,
);
const menu = new Menu(by("menu"));
const passage = new Passage(by("passage"));
const store = new Store((words) => (by("trouble").textContent = words));
const settings = new Settings(by("open-settings"), (conversation) => conversation.turns.length && store.keep(conversation));
const watch = new Watch({ models: showModels, bank: showBank, state: showState, connected: showConnected });
const chats = new Chats(by("chats"), by("open-chats"), store, new Menu(by("chats-menu")), {
  open: (id) => open(id, true),
  changed: (id) => id === chat.conversation.id && update({ title: store.get(id).title }),
  gone: (id) => id === chat.conversation.id && show(fresh(watch.model), true),
});
const chat = new Chat(by("log"), { request, memories, waiting }, {
  busy: showBusy,
  keep,
  memory: showMemory,
  show: (memory) => {
    fold(false);
    picture.reveal(known(memory.blocks));
  },
  source: (source, memory) => passage.open(source, memory, watch.model),
  speed: (value) => value && (by("speed").textContent = value.toFixed(1)),
  say: (words) => (by("say").textContent = words),
});
const learning = new Learning(by("open-learning"), by("learning"), {
  say: (words) => (by("say").textContent = words),
  loaded: (name) => takeModel(name),
});
const banks = new Banks(by("open-banks"), by("banks"), {
  say: (words) => (by("say").textContent = words),
  loaded: (name) => takeModel(name),
  gone: (name) => (name === watch.model ? takeModel("") : watch.renew()),
});
// What each choice does, in a sentence.
const MEANING = {
  fetched: "Each question brings the part of the memory that is on its topic.",
  none: "The small model alone, to compare with.",
  generic: "One block for every topic, as large as a topic's: what more training alone would bring.",
  source: "The best passage of the documents on its topic is put before the question; no memory is used.",
  "fetched+source": "The memory on its topic, and the best passage of its documents before the question.",
};
let longest; // tokens of a reply; as long as it is not known, the server decides
let bank = null; // the last /v1/memory

const option = (use) => document.querySelector(`#use [value="${use}"]`);
const known = (blocks) => blocks.filter((path) => picture.root.found.has(path));

/** What a question is sent with beside the messages; `use` is named where memories are compared. */
function request(use) {
  const most = use ? Math.min(COMPARED, longest ?? COMPARED) : longest;
  return { model: watch.model, memory: choice.request(use), max_tokens: most, ...drawing(chat.conversation) };
}

/** What can be compared. */
function memories() {
  return bank?.nodes.length ? ["none", ...(bank.generic ? ["generic"] : []), "fetched"] : ["none"];
}

/** Why a reply has not begun. */
function waiting() {
  const { active, queued } = watch.state;
  return queued ? `Waiting for a place: the server answers ${active}, and ${queued} wait` : "Reading the conversation";
}

/** Shows a conversation; as an entry of the browser's history where that is wanted. */
function show(conversation, entry = false) {
  const model = conversation.model || watch.model;
  chat.open(conversation);
  settings.show(conversation);
  chats.draw(conversation.id);
  if (entry) history.pushState(null, "", conversation.turns.length ? `#${conversation.id}` : location.pathname);
  if (model !== watch.model && watch.models.includes(model)) takeModel(model);
  else lightLast();
  name();
}

/** Shows a kept conversation, unless it is shown already: what is being written in it goes on. */
function open(id, entry = false) {
  if (id !== chat.conversation.id) show(store.get(id) ?? fresh(watch.model), entry);
}

/** Takes over what was changed about the conversation that is shown; what is being written in it goes on. */
function update(fields) {
  Object.assign(chat.conversation, fields);
  settings.show(chat.conversation);
  name();
}

/** Lights the blocks of the last reply. */
function lightLast() {
  picture.light(known(chat.turns.at(-1)?.answer.memory?.blocks ?? []));
}

function keep(conversation) {
  conversation.model = watch.model;
  // For the first time only: a reply that is left by the browser's Back is kept when the address is another's already.
  if (!conversation.changed) history.replaceState(null, "", `#${conversation.id}`);
  store.keep(conversation);
  chats.draw(conversation.id);
  name();
}

/** The window's title. */
function name() {
  const { conversation } = chat;
  document.title = [conversation.turns.length && titleOf(conversation), watch.model, "hiermem"].filter(Boolean).join(" · ");
}

/** A reply's memory is attached: its blocks are in memory now, whatever they were. */
function showMemory(memory) {
  picture.update(Object.fromEntries(memory.blocks.map((path) => [path, "in memory"])));
  picture.light(known(memory.blocks));
  watch.look();
}

function showBusy(busy) {
  const focused = [by("send"), by("stop")].includes(document.activeElement);
  by("send").hidden = busy;
  by("stop").hidden = !busy;
  if (focused) by(busy ? "stop" : "send").focus(); // the other took its place
  for (const button of by("log").querySelectorAll("[data-asks]")) button.disabled = busy;
}

function showChoice() {
  const name = (path) => [path, picture.root.found.get(path)?.row?.label].filter(Boolean).join(" ");
  option("pinned").hidden = !choice.pinned;
  by("use").value = choice.pinned ? "pinned" : choice.use;
  by("meaning").textContent = choice.pinned ? `Every question gets the blocks on ${name(choice.pinned)}.` : MEANING[choice.use];
  by("chosen").replaceChildren(...choice.entries(name));
  picture.close(choice.blocked);
}

function showModels(names, chosen) {
  banks.look().catch(() => {}); // whether any can be loaded; the dialog says what is wrong
  by("models").replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
  by("models").hidden = names.length < 2;
  by("model").hidden = names.length > 1;
  by("model").textContent = chosen;
}

function takeModel(model) {
  watch.take(model);
  by("models").value = model;
  choice.clear();
  picture.show([]);
  watch.look();
  name();
}

/** The bank as it is now. */
function showBank(memory) {
  bank = memory;
  const blocks = memory.nodes.length;
  const bytes = memory.nodes.reduce((sum, node) => sum + node.bytes, 0);
  by("about").textContent = blocks
    ? `${memory.model} has ${count(blocks, "block")} of memory, ${size(bytes)}. Each question brings only those on its topic.`
    : `${memory.model} has no memory bank.`;
  document.body.classList.toggle("bankless", !blocks);
  option("generic").disabled = !memory.generic;
  for (const use of ["source", "fetched+source"]) option(use).hidden = !memory.sources;
  if (!choice.pinned && (option(choice.use).hidden || option(choice.use).disabled)) choice.take("fetched");
  longest = memory.context ? Math.min(REPLY, Math.floor(memory.context / 2)) : REPLY;
  picture.show(memory.nodes);
  lightLast();
  showCache(memory.cache);
  name();
}

function showState(state) {
  picture.update(state.states);
  showCache(state.cache, state.generic_bytes);
  if (state.tokens_per_second && !chat.busy) by("speed").textContent = state.tokens_per_second.toFixed(1);
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

function showConnected(connected) {
  by("offline").hidden = connected;
  if (connected) learning.start();
}

function send(event) {
  event?.preventDefault();
  const input = by("input");
  const text = input.value.trim();
  if (!text || chat.busy) return;
  input.value = "";
  grow();
  watch.locked = false;
  chat.send(text);
}

/** Gives the input as many lines as it needs. */
function grow() {
  const input = by("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + input.offsetHeight - input.clientHeight}px`; // with its border
}

/** The keyboard's focus goes back to a block whose menu has closed. */
function back(node) {
  picture.focus(picture.drawn.has(node.path) ? node : picture.focused);
}

/** Folds the picture away, or shows it. */
function fold(away) {
  document.body.classList.toggle("folded", away);
  by("fold").ariaExpanded = String(!away);
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
  if (event.key === "Enter" && !event.shiftKey && !composing(event)) send(event);
  if (event.key === "Escape" && !composing(event)) chat.stop();
});
by("stop").addEventListener("click", () => chat.stop());
by("new").addEventListener("click", () => {
  show(fresh(watch.model), true);
  by("input").focus();
});
by("key-cancel").addEventListener("click", () => by("key").close());
by("use").addEventListener("change", () => by("use").value !== "pinned" && choice.take(by("use").value));
by("models").addEventListener("change", () => takeModel(by("models").value));
by("fold").addEventListener("click", () => fold(!document.body.classList.contains("folded")));
addEventListener("popstate", () => open(location.hash.slice(1)));
addEventListener("pagehide", () => chat.stop());
store.watch((id = chat.conversation.id) => {
  chats.draw();
  if (id !== chat.conversation.id || !chat.turns.length) return;
  const found = store.get(id);
  if (!found) chat.drop(); // else what is being written would bring it back
  if (!chat.busy) return show(found ?? fresh(watch.model));
  const { title, system, temperature } = found;
  update({ title, system, temperature });
});

fold(matchMedia("(max-width: 820px)").matches); // a phone's first screen is for the conversation
showChoice();
const opened = store.get(location.hash.slice(1)) ?? fresh();
watch.model = opened.model;
show(opened);
watch.keepLooking();
