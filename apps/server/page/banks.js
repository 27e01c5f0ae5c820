// The models and banks that the server has, and those that it can load: offered where it was told to allow that.

import { get, post } from "./api.js";
import { button, count, element, size } from "./dom.js";

export class Banks {
  /**
   * `opener` is the button that opens the dialog `place`. Calls `on.loaded(name)` when one was loaded,
   * `on.gone(name)` when one was unloaded, and `on.say(words)` for screen readers.
   */
  constructor(opener, place, on) {
    Object.assign(this, { opener, place, on });
    this.loaded = place.querySelector(".loaded");
    this.found = place.querySelector(".found");
    this.trouble = place.querySelector(".trouble");
    this.form = place.querySelector("form");
    opener.addEventListener("click", () => this.open());
    place.querySelector(".close").addEventListener("click", () => place.close());
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      const path = this.form.elements.path.value.trim();
      if (path) this.load(path.replace(/\/+$/, "").split("/").at(-1), path);
    });
  }

  /** Asks the server whether it lets the page load anything, and what. */
  async look() {
    const { allow_loading: allowed, data, found } = await get("/v1/banks");
    this.opener.hidden = !allowed;
    this.loaded.replaceChildren(...data.map((row) => this.served(row, data.length > 1)));
    this.found.replaceChildren(...found.map((row) => this.offered(row)));
    this.place.querySelector(".none").hidden = Boolean(found.length);
  }

  open() {
    this.trouble.textContent = "";
    this.place.showModal();
    this.look().catch((error) => (this.trouble.textContent = error.message));
  }

  served({ name, blocks, bytes }, several) {
    const what = blocks ? `${count(blocks, "block")}, ${size(bytes)}` : "no memory";
    const unload = button("Unload", () => this.unload(name), { "aria-label": `Unload ${name}` });
    unload.disabled = !several;
    if (!several) unload.title = "The only one stays.";
    return element("li", {}, named(name, what), unload);
  }

  offered({ name, path }) {
    return element("li", {}, named(name, path), button("Load", () => this.load(name, path), { "aria-label": `Load ${name}` }));
  }

  async load(name, path) {
    if (!(await this.wait(`Loading ${name} …`, () => post("/v1/banks/load", { name, path })))) return;
    this.form.reset();
    this.place.close();
    this.on.say(`${name} is loaded, and answers now.`);
    this.on.loaded(name);
  }

  async unload(name) {
    if (!(await this.wait(`Unloading ${name} …`, () => post("/v1/banks/unload", { name })))) return;
    this.on.say(`${name} is unloaded.`);
    this.on.gone(name);
    (this.loaded.querySelector("button:not(:disabled)") ?? this.place.querySelector(".close")).focus();
  }

  /** Does what takes a while; whether it went well. What the server says against it is shown. */
  async wait(words, act) {
    this.trouble.textContent = words;
    const buttons = this.place.querySelectorAll("li button, form button");
    for (const one of buttons) one.disabled = true;
    let trouble = "";
    try {
      await act();
    } catch (error) {
      trouble = error.message;
    }
    await this.look().catch((error) => (trouble ||= error.message));
    this.form.querySelector("button").disabled = false;
    this.trouble.textContent = trouble;
    return !trouble;
  }
}

const named = (name, what) =>
  element("span", {}, element("strong", { text: name }), element("small", { text: what, title: what }));
