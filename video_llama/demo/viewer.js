// The viewer: one card is shown; frames, audio segments and times in answers take its player to their time.
vl.openCard = (key) => {
  const card = $(`vl-card-${key}`);
  if (!card) return null;
  document.querySelectorAll("#vl-panel .vl-card").forEach((one) => {
    one.hidden = one !== card;
    const player = one.querySelector("video, audio");
    if (player && one.hidden) player.pause();
  });
  document.querySelectorAll("#vl-panel .vl-tab").forEach((tab) => {
    const isShown = tab.dataset.file === key;
    tab.setAttribute("aria-selected", String(isShown));
    tab.tabIndex = isShown ? 0 : -1;
  });
  document.body.classList.remove("vl-folded");
  return card;
};
const seek = (card, seconds) => {
  const player = card && card.querySelector("video, audio");
  if (player) player.currentTime = Math.min(seconds, player.duration || seconds);
};
vl.goTo = (key, seconds) => seek(vl.openCard(key), seconds);
document.addEventListener("click", (event) => {
  const cell = event.target.closest && event.target.closest(".vl-cell");
  if (cell) seek(cell.closest(".vl-card"), Number(cell.dataset.seconds));
});

// A file that the model reads and the browser cannot show: what the model gets must do.
const replacePlayer = (player) => {
  const card = player.closest(".vl-card");
  if (player.tagName === "IMG") {
    if (player.dataset.seen) player.src = player.dataset.seen;
    delete player.dataset.seen;
    return;
  }
  const line = document.createElement("p");
  line.className = "vl-unplayable";
  line.textContent = player.dataset.instead;
  player.replaceWith(line);
  card.querySelectorAll(".vl-seek").forEach((hint) => hint.remove());
  card.querySelectorAll(".vl-cell").forEach((cell) => { cell.disabled = true; });
};
const isPlayer = (target) => target.matches && target.matches(".vl-card .vl-player");
document.addEventListener("error", (event) => {
  if (isPlayer(event.target)) replacePlayer(event.target);
}, true);
document.addEventListener("loadedmetadata", (event) => {  // its audio could be played, its frames not
  if (isPlayer(event.target) && event.target.tagName === "VIDEO" && !event.target.videoWidth) replacePlayer(event.target);
}, true);
