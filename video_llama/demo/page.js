// A click on a frame or a stretch of sound takes the player of its card there.
document.addEventListener("click", (event) => {
  const cell = event.target.closest && event.target.closest(".vl-cell");
  if (!cell) return;
  const player = cell.closest(".vl-card").querySelector("video, audio");
  if (player) player.currentTime = Number(cell.dataset.seconds);
});

// A file that the model reads and the browser cannot show: what the model saw or heard must do.
const replacePlayer = (player) => {
  const card = player.closest(".vl-card");
  if (player.tagName === "IMG") {
    if (player.dataset.seen) player.src = player.dataset.seen;
    delete player.dataset.seen;
    return;
  }
  const line = document.createElement("p");
  line.className = "vl-unplayable";
  const below = player.tagName === "VIDEO" ? "the frames below are what the model saw" : "below is what the model heard";
  line.textContent = `Your browser cannot play this file; ${below}.`;
  player.replaceWith(line);
  card.querySelectorAll(".vl-seek").forEach((hint) => hint.remove());
  card.querySelectorAll(".vl-cell").forEach((cell) => { cell.disabled = true; });
};
const isPlayer = (target) => target.matches && target.matches(".vl-card .vl-player");
document.addEventListener("error", (event) => {
  if (isPlayer(event.target)) replacePlayer(event.target);
}, true);
document.addEventListener("loadedmetadata", (event) => {  // its sound could be played, its pictures not
  if (isPlayer(event.target) && event.target.tagName === "VIDEO" && !event.target.videoWidth) replacePlayer(event.target);
}, true);

// A number of the settings that is emptied is the one it began with; the framework would make it the lowest.
document.addEventListener("blur", (event) => {
  const field = event.target;
  if (!field.matches || !field.matches('#vl-settings input[type="number"]') || field.value !== "") return;
  const reset = field.closest(".block").querySelector(".reset-button");
  if (reset) reset.click();
}, true);

// The conversation as a file; the text comes from a hidden field.
window.saveConversation = (text) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "conversation.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
};

// A file that is too large is refused before it travels; the server would refuse it, too.
const tell = (text) => {
  let line = document.getElementById("vl-refused");
  if (!line) {
    line = document.createElement("div");
    line.id = "vl-refused";
    line.className = "vl-notice vl-error";
    line.setAttribute("role", "alert");
    document.getElementById("vl-notice").after(line);
  }
  line.textContent = text;
  line.hidden = !text;
};
const refuseLarge = (event) => {
  if (!event.target.closest || !event.target.closest("#vl-upload")) return;
  const files = [...((event.dataTransfer || event.target).files || [])];
  const large = files.find((file) => file.size > window.uploadBytes);
  if (!large) return tell("");
  event.preventDefault();
  event.stopImmediatePropagation();
  if (event.type === "drop") event.target.dispatchEvent(new DragEvent("dragleave", { bubbles: true }));
  else event.target.value = "";
  const megabytes = (bytes) => (bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0);
  tell(`${large.name}: ${megabytes(large.size)} MB is too large (at most ${megabytes(window.uploadBytes)} MB)`);
};
document.addEventListener("change", refuseLarge, true);
document.addEventListener("drop", refuseLarge, true);
document.addEventListener("click", (event) => {
  if (event.target.closest && event.target.closest("#vl-columns button") && document.getElementById("vl-refused")) tell("");
});
