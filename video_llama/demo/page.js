// A click on a frame or a stretch of sound takes the player of its card there.
document.addEventListener("click", (event) => {
  const cell = event.target.closest && event.target.closest(".vl-cell");
  if (!cell) return;
  const player = cell.closest(".vl-card").querySelector("video, audio");
  if (player) player.currentTime = Number(cell.dataset.seconds);
});

// The conversation as a file; the text comes from a hidden field.
window.saveConversation = (text) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "conversation.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
};
