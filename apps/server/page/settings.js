// What holds for one conversation: its system message and how freely its replies are drawn.

const by = (id) => document.getElementById(id);

export class Settings {
  /** `opener` is the button that opens them, and says what is set. `changed(conversation)` is called after a change. */
  constructor(opener, changed) {
    Object.assign(this, { opener, changed });
    this.dialog = by("settings");
    opener.addEventListener("click", () => this.open());
    by("settings-cancel").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("close", () => this.dialog.returnValue === "ok" && this.take());
  }

  show(conversation) {
    this.conversation = conversation;
    const { system, temperature } = conversation;
    const set = [system && "system message", temperature !== null && `temperature ${temperature}`].filter(Boolean);
    this.opener.textContent = set.length ? `Settings: ${set.join(", ")}` : "Settings";
  }

  open() {
    by("system").value = this.conversation.system;
    by("temperature").value = this.conversation.temperature ?? "";
    this.dialog.returnValue = "";
    this.dialog.showModal();
  }

  take() {
    const number = by("temperature").valueAsNumber;
    this.conversation.system = by("system").value.trim();
    this.conversation.temperature = Number.isNaN(number) ? null : number;
    this.show(this.conversation);
    this.changed(this.conversation);
  }
}

/** A request's fields that follow from a conversation's settings. */
export const drawing = ({ temperature }) => (temperature === null ? {} : { temperature });
