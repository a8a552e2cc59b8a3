// The page's own script: strings, menus, dialogs, and the bridge to the handlers of events.py.
const $ = (id) => document.getElementById(id);
const vl = window.vl = { busy: false, outbox: [], lastQuestion: "" };

// Strings. The visitor's choice is kept; before one, the browser's first language that the page has.
vl.readStored = (key) => { try { return localStorage.getItem(key); } catch { return null; } };  // blocked in some frames
vl.store = (key, value) => { try { localStorage.setItem(key, value); } catch { /* then only this page knows it */ } };
vl.chooseLanguage = () => {
  const wanted = [vl.readStored("vl-language"), ...navigator.languages].map((one) => (one || "").slice(0, 2).toLowerCase());
  return wanted.find((one) => one in window.vlStrings) || "en";
};
vl.text = (key, values = {}) => {
  if (values.count === 1 && `${key}_one` in window.vlStrings.en) key += "_one";
  return window.vlStrings[vl.language][key].replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
};
vl.language = vl.chooseLanguage();
vl.translate = () => {
  if (document.documentElement.lang !== vl.language) document.documentElement.lang = vl.language;
  const attributes = "[data-t], [data-l], [data-p]";
  document.querySelectorAll(attributes).forEach((one) => {
    const { t, l, p, language } = one.dataset;
    if (language === vl.language) return;
    one.dataset.language = vl.language;
    if (t) one.textContent = t === "answers_with" && !one.dataset.model ? "" : vl.text(t, one.dataset);
    if (l) one.setAttribute("aria-label", vl.text(l));
    if (l && one.tagName === "BUTTON") one.title = vl.text(l);
    if (p) one.placeholder = vl.text(p);
  });
};

// The bridge: events of this page for the server. One that computes waits for the one before.
const COMPUTING = ["attach", "ask", "retry", "example"];
vl.connect = (trigger) => { vl.trigger = trigger; };
vl.send = (event, data = {}) => {
  if (!COMPUTING.includes(event)) return vl.trigger(event, { ...data, language: vl.language });
  vl.outbox.push([event, data]);
  vl.pump();
};
vl.pump = () => {
  if (vl.busy || !vl.outbox.length) return;
  const [event, data] = vl.outbox.shift();
  vl.setBusy(event);
  vl.trigger(event, { ...data, language: vl.language });
};
vl.setBusy = (event) => {
  vl.busy = Boolean(event);
  document.body.classList.toggle("vl-busy", vl.busy);
  document.body.classList.toggle("vl-answering", vl.busy && event !== "attach");
};
vl.done = () => {  // called once a computing event has ended, well or not
  const answered = document.body.classList.contains("vl-answering");
  vl.setBusy("");
  vl.clearPending();
  const error = document.querySelector("#vl-notice .vl-error");
  if (answered && error && !$("vl-question").value) vl.write(vl.lastQuestion);
  const answers = document.querySelectorAll("#vl-chat .message.bot .vl-text");
  if (answered && !error && answers.length) $("vl-announce").textContent = answers[answers.length - 1].textContent;
  vl.pump();
};

// Menus, the settings and dialogs.
vl.closeMenus = (except) => document.querySelectorAll(".vl-menu:not([hidden])").forEach((menu) => {
  if (menu === except) return;
  menu.hidden = true;
  const opener = document.querySelector(`[data-menu="${menu.id}"]`);
  opener.setAttribute("aria-expanded", "false");
  if (menu.contains(document.activeElement)) opener.focus();
});
vl.showSettings = (shown) => {
  document.body.classList.toggle("vl-settings-open", shown);
  $("vl-gear").setAttribute("aria-expanded", String(shown));
  if (shown) document.querySelector("#vl-settings input").focus();
};
vl.hasConversation = () => Boolean(document.querySelector("#vl-chat .message, #vl-panel .vl-card"));
vl.confirm = (then) => {
  if (!vl.hasConversation()) return then();
  const dialog = $("vl-confirm");
  dialog.returnValue = "";
  dialog.onclose = () => { if (dialog.returnValue === "yes") then(); };
  dialog.showModal();
};
vl.warn = (text) => {  // like the server's errors, until the next one
  const line = $("vl-refused") || document.createElement("div");
  Object.assign(line, { id: "vl-refused", className: "vl-notice vl-error", textContent: text, hidden: !text });
  line.setAttribute("role", "alert");
  $("vl-notice").after(line);
};
vl.lastOf = (selector) => [...document.querySelectorAll(selector)].pop();

const ACTIONS = {
  dialog: (button) => $(button.dataset.dialog).showModal(),
  language: () => {
    vl.language = vl.language === "en" ? "tr" : "en";
    vl.store("vl-language", vl.language);
    vl.translate();
    vl.send("translate");
  },
  theme: () => {
    const dark = document.body.classList.toggle("dark");
    vl.store("vl-theme", dark ? "dark" : "light");
  },
  menu: (button) => {
    const menu = $(button.dataset.menu), shown = menu.hidden;
    menu.hidden = !shown;
    button.setAttribute("aria-expanded", String(shown));
    if (shown) menu.querySelector("button").focus();
  },
  settings: () => vl.showSettings(!document.body.classList.contains("vl-settings-open")),
  clear: () => vl.confirm(() => { vl.outbox.length = 0; vl.dropUploads(); vl.clearPending(); vl.send("clear"); }),
  save: (button) => vl.send("save", { format: button.dataset.format }),
  pick: () => $("vl-file").click(),
  record: (button) => vl.openRecorder(button.dataset.kind),
  "record-toggle": () => vl.toggleRecording(),
  stop: () => vl.send("stop"),
  remove: (button) => vl.send("remove", { file: button.dataset.file }),
  open: (button) => vl.openCard(button.dataset.file),
  time: (button) => vl.goTo(button.dataset.file, Number(button.dataset.seconds)),
  fold: () => document.body.classList.toggle("vl-folded"),
  example: (button) => {
    const number = Number(button.dataset.number), question = button.querySelector("b").textContent;
    $("vl-more-examples").close();
    vl.confirm(() => { vl.showPending(question, false); vl.send("example", { number }); });
  },
  copy: (button) => {
    navigator.clipboard.writeText(button.closest(".message").querySelector(".vl-text").textContent);
    button.textContent = vl.text("copied");
  },
  retry: () => {
    vl.lastOf("#vl-chat .message.bot").remove();
    vl.showPending("", false);
    vl.send("retry");
  },
  undo: () => {
    if (!$("vl-question").value) vl.write(vl.lastOf("#vl-chat .message.user .vl-text").textContent);
    vl.send("undo");
    $("vl-question").focus();
  },
  edit: (button) => vl.editQuestion(button.closest(".message")),
};
document.addEventListener("click", (event) => {
  const button = event.target.closest && event.target.closest("[data-action]");
  const menu = button && button.dataset.menu;
  vl.closeMenus(menu && $(menu));
  if (button && button.id !== "vl-gear" && !button.closest("#vl-settings")) vl.showSettings(false);
  if (!button) return;
  vl.warn("");
  ACTIONS[button.dataset.action](button);
});

// The last question in other words.
vl.editQuestion = (message) => {
  const text = message.querySelector(".vl-text"), form = document.createElement("form");
  form.className = "vl-edit";
  const field = Object.assign(document.createElement("textarea"), { value: text.textContent, rows: 3 });
  field.setAttribute("aria-label", vl.text("edit_question"));
  const send = Object.assign(document.createElement("button"), { className: "vl-button", textContent: vl.text("ask_again") });
  const cancel = Object.assign(document.createElement("button"), { className: "vl-button", type: "button" });
  cancel.textContent = vl.text("cancel");
  const close = () => { form.remove(); message.classList.remove("vl-editing"); };
  cancel.onclick = close;
  form.onkeydown = (event) => {
    if (event.key === "Escape") { event.stopPropagation(); close(); }
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); }
  };
  form.onsubmit = (event) => {
    event.preventDefault();
    if (!field.value.trim()) return;
    text.textContent = vl.lastQuestion = field.value;
    close();
    const answer = vl.lastOf("#vl-chat .message.bot");
    if (answer) answer.remove();
    vl.showPending("", false);
    vl.send("retry", { question: field.value });
  };
  form.append(field, cancel, send);
  message.classList.add("vl-editing");
  message.append(form);
  field.focus();
};

// The keyboard: arrows in menus and tabs; Escape closes what is open, or else stops the answer.
document.addEventListener("keydown", (event) => {
  const group = event.target.closest && event.target.closest(".vl-menu, .vl-tabs");
  const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
  if (group && step) {
    const items = [...group.querySelectorAll("button")];
    const next = items[(items.indexOf(event.target) + step + items.length) % items.length];
    next.focus();
    if (next.role === "tab") next.click();
    event.preventDefault();
  }
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (document.querySelector(".vl-menu:not([hidden])")) return vl.closeMenus();
  if (document.body.classList.contains("vl-settings-open")) { vl.showSettings(false); return $("vl-gear").focus(); }
  if (vl.busy) vl.send("stop");
});

// The conversation as a file; its name, type and text come from a hidden field.
vl.save = (json) => {
  const { name, type, text } = JSON.parse(json);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
};
window.addEventListener("beforeunload", (event) => { if (vl.hasConversation()) event.preventDefault(); });

// A number of the settings that is emptied is the one it began with; the framework would make it the lowest.
document.addEventListener("blur", (event) => {
  const field = event.target;
  if (!field.matches || !field.matches('#vl-settings input[type="number"]') || field.value !== "") return;
  const reset = field.closest(".block").querySelector(".reset-button");
  if (reset) reset.click();
}, true);

// What the framework draws: new elements get their strings, the newest message is in view, and a request in the
// queue says how many are before it.
vl.showQueue = () => {
  const tracker = document.querySelector("#vl-notice .progress-text");
  const place = tracker && tracker.textContent.match(/queue: (\d+)\//);
  const line = $("vl-queue"), text = place ? vl.text("queue", { count: Number(place[1]) }) : "";
  if (line && line.textContent !== text) line.textContent = text;
};
vl.start = () => {
  const theme = vl.readStored("vl-theme");
  let last = "";
  new MutationObserver((changes) => {
    vl.translate();
    vl.showQueue();
    if (theme && !vl.themeIsSet && document.querySelector(".vl-header")) {
      document.body.classList.toggle("dark", theme === "dark");
      vl.themeIsSet = true;
    }
    if (changes.some((change) => change.target.closest && change.target.closest("#vl-chat"))) vl.clearPendingQuestion();
    if (changes.some((change) => change.target.closest && change.target.closest("#vl-chips"))) vl.clearRead();
    const scroll = $("vl-scroll"), size = scroll ? `${scroll.scrollHeight}` : "";
    if (size !== last) { last = size; if (scroll && vl.hasConversation()) scroll.scrollTop = scroll.scrollHeight; }
  }).observe(document.body, { childList: true, subtree: true, characterData: true });
  vl.translate();
};
if (document.body) vl.start(); else document.addEventListener("DOMContentLoaded", vl.start);
