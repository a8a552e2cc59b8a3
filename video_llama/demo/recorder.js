// Recordings with the camera or the microphone; each becomes a file like any other.
const recorder = { stream: null, media: null };
const stopDevices = () => {
  if (recorder.stream) recorder.stream.getTracks().forEach((track) => track.stop());
  recorder.stream = recorder.media = null;
};
vl.openRecorder = async (kind) => {
  const dialog = $("vl-recorder"), preview = $("vl-preview"), error = $("vl-recorder-error"), button = $("vl-record");
  const isCamera = kind === "camera";
  $("vl-recorder-title").textContent = vl.text(isCamera ? "record_camera" : "record_microphone");
  button.textContent = vl.text("record");
  button.disabled = error.hidden = true;
  preview.hidden = !isCamera;
  $("vl-level").hidden = isCamera;
  recorder.kind = kind;
  dialog.onclose = () => {
    if (recorder.media && recorder.media.state === "recording") recorder.media.onstop = null;
    stopDevices();
    preview.srcObject = null;
    dialog.classList.remove("vl-recording");
  };
  dialog.showModal();
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ audio: true, video: isCamera });
    if (!dialog.open) return stream.getTracks().forEach((track) => track.stop());  // closed meanwhile
    recorder.stream = stream;
    if (isCamera) { preview.srcObject = stream; preview.play(); }
    button.disabled = false;
    button.focus();
  } catch (reason) {
    error.textContent = vl.text("no_device", { reason: reason.message || reason });
    error.hidden = false;
  }
};
vl.toggleRecording = () => {
  const dialog = $("vl-recorder");
  if (recorder.media) return recorder.media.stop();
  const parts = [], media = recorder.media = new MediaRecorder(recorder.stream);
  media.ondataavailable = (event) => parts.push(event.data);
  media.onstop = () => {
    const type = (media.mimeType || "video/webm").split(";")[0], suffix = type.split("/")[1];
    dialog.close();
    vl.addFiles([new File(parts, `${recorder.kind}-${new Date().toTimeString().slice(0, 8).replace(/:/g, "")}.${suffix}`, { type })]);
  };
  media.start();
  dialog.classList.add("vl-recording");
  $("vl-record").textContent = vl.text("record_end");
};
