// Asks the server how it is, for as long as the page can be seen: its models, a model's bank, what is in memory.

import { get } from "./api.js";

const POLL = 1000; // ms from one look to the next

export class Watch {
  /**
   * Calls `on.models(names)` and `on.bank(memory)` (/v1/memory) once connected, `on.state(state)` (/v1/memory/state)
   * at every look, and `on.connected(boolean)` after it.
   */
  constructor(on) {
    Object.assign(this, { on, model: "", models: [], connected: false, locked: false, state: {} });
  }

  /** Looks at another model; `look` follows. */
  take(model) {
    this.model = model;
    this.connected = false;
  }

  /** Other models have come or gone: all is asked anew. */
  renew() {
    this.connected = false;
    return this.look();
  }

  async look() {
    try {
      if (!this.connected) await this.open();
      const { model } = this;
      const state = await get(`/v1/memory/state?model=${encodeURIComponent(model)}`);
      this.connected = this.model === model; // another may have been chosen meanwhile
      if (this.connected) this.on.state((this.state = state));
    } catch (error) {
      this.connected = false;
      this.locked = error.code === "no_key"; // the reader was asked for the key, and did not give it
      if (error.code === "model_not_found") this.model = "";
    }
    this.on.connected(this.connected);
  }

  async open() {
    const { data } = await get("/v1/models");
    this.models = data.filter((row) => !row.parent).map((row) => row.id);
    if (!this.models.includes(this.model)) this.model = this.models[0];
    this.on.models(this.models, this.model);
    this.on.bank(await get(`/v1/memory?model=${encodeURIComponent(this.model)}`));
  }

  /** Where the answer takes long it looks less often. */
  async keepLooking() {
    for (;;) {
      const begun = performance.now();
      if (!document.hidden && !this.locked) await this.look();
      await new Promise((done) => setTimeout(done, Math.max(POLL, 10 * (performance.now() - begun))));
    }
  }
}
