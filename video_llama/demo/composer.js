// The composer: files that travel to the server, drop, paste, and the question as it is sent.
const uploads = new Set();  // { name, request, chip, sent }

// A file that is too large is refused before it travels; the server would refuse it, too.
const megabytes = (bytes) => (bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0);
vl.addFiles = (files) => {
  vl.warn("");
  const refused = [];
  for (const file of files) {
    if (file.size > window.vlUploadBytes) {
      const values = { name: file.name, size: megabytes(file.size), most: megabytes(window.vlUploadBytes) };
      refused.push(vl.text("too_large", values));
    } else startUpload(file);
  }
  if (refused.length) vl.warn(refused.join("\n"));
};
const startUpload = (file) => {
  const upload = { name: file.name, request: new XMLHttpRequest(), chip: document.createElement("div"), sent: false };
  const label = document.createElement("span"), name = document.createElement("b"), state = document.createElement("small");
  const remove = Object.assign(document.createElement("button"), { type: "button", className: "vl-remove", textContent: "✕" });
  const ring = document.createElement("progress");
  remove.setAttribute("aria-label", vl.text("remove", { name: file.name }));
  remove.onclick = () => { upload.request.abort(); forget(upload); };
  ring.setAttribute("aria-label", file.name);
  ring.max = 100;
  label.className = "vl-label";
  name.textContent = file.name;
  label.append(name, state, ring);
  upload.chip.className = "vl-file vl-reading";
  upload.chip.append(label, remove);
  uploads.add(upload);
  showUploads();
  const fail = (reason) => { forget(upload); vl.warn(vl.text("upload_failed", { name: file.name, reason })); };
  const { request } = upload, form = new FormData();
  form.append("files", file, file.name);
  request.upload.onprogress = ({ loaded, total }) => {
    ring.value = Math.round(100 * loaded / (total || 1));
    state.textContent = ring.value < 100 ? vl.text("uploading", { percent: ring.value }) : vl.text("uploaded");
  };
  request.onload = () => {
    if (request.status !== 200) return fail(request.responseText.slice(0, 200) || request.status);
    upload.path = JSON.parse(request.responseText)[0];
    remove.remove();  // the server has it now, and reads it next
    flush();
  };
  request.onerror = () => fail(vl.text("connection"));
  request.open("POST", "gradio_api/upload");
  request.send(form);
};
// Files go to the server in the order in which they were chosen, together where they are ready together.
const flush = () => {
  const ready = [];
  for (const upload of uploads) {
    if (!upload.path) break;
    if (!upload.sent) ready.push(upload);
  }
  if (!ready.length) return;
  ready.forEach((upload) => { upload.sent = true; });
  vl.send("attach", { files: ready.map(({ path, name }) => ({ path, orig_name: name })) });
  if (vl.waiting && ![...uploads].some((upload) => !upload.sent)) sendWaiting();
};
const forget = (upload) => { uploads.delete(upload); showUploads(); flush(); };
const showUploads = () => {
  let row = $("vl-uploads");
  if (!row) {
    row = Object.assign(document.createElement("div"), { id: "vl-uploads", className: "vl-files" });
    $("vl-form").prepend(row);
  }
  row.replaceChildren(...[...uploads].map(({ chip }) => chip));
};
// The server shows a file as soon as it reads it: then the chip of its upload goes.
vl.clearRead = () => {
  const read = [...document.querySelectorAll("#vl-chips b")].map((one) => one.textContent);
  for (const upload of uploads) if (upload.sent && read.includes(upload.name)) { uploads.delete(upload); showUploads(); }
};
vl.dropUploads = () => {
  uploads.forEach((upload) => upload.request.abort());
  uploads.clear();
  vl.waiting = "";
  showUploads();
};

// Question and typing bubble are there at once; the server's own take their place.
vl.showPending = (question, withFiles) => {
  const area = $("vl-sent");
  area.replaceChildren();
  if (question) {
    vl.lastQuestion = question;
    const bubble = Object.assign(document.createElement("article"), { className: "message user vl-sent" });
    if (withFiles) {
      const files = Object.assign(document.createElement("div"), { className: "vl-files" });
      document.querySelectorAll("#vl-chips .vl-file, #vl-uploads .vl-file").forEach((chip) => files.append(chip.cloneNode(true)));
      files.querySelectorAll(".vl-remove").forEach((one) => one.remove());
      if (files.childElementCount) bubble.append(files);
    }
    bubble.append(Object.assign(document.createElement("p"), { className: "vl-text", textContent: question }));
    area.append(bubble);
  }
  const typing = Object.assign(document.createElement("article"), { className: "message bot vl-typing" });
  typing.innerHTML = '<span class="vl-dots" aria-hidden="true"><i></i><i></i><i></i></span><span id="vl-queue"></span>';
  area.append(typing);
  document.body.classList.toggle("vl-asked", Boolean(question));
  $("vl-scroll").scrollTop = $("vl-scroll").scrollHeight;
};
vl.clearPendingQuestion = () => {  // the server shows the question now, and its own typing bubble
  if (!$("vl-sent").childElementCount || vl.waiting || !document.querySelector("#vl-live .message")) return;
  vl.clearPending();
};
vl.clearPending = () => {
  if (vl.waiting) return;
  $("vl-sent").replaceChildren();
  document.body.classList.remove("vl-asked");
};
vl.write = (text) => {
  const field = $("vl-question");
  field.value = text;
  grow(field);
};
const grow = (field) => {
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, 160)}px`;
};
const submit = () => {
  const question = $("vl-question").value.trim();
  if (!question || document.body.classList.contains("vl-answering") || vl.waiting) return;
  vl.warn("");
  vl.waiting = question;
  vl.showPending(question, true);
  vl.write("");
  // A question goes after the files that are still on their way.
  if (![...uploads].some((upload) => !upload.sent)) sendWaiting();
};
const sendWaiting = () => {
  const question = vl.waiting;
  vl.waiting = "";
  vl.send("ask", { question });
};
document.addEventListener("submit", (event) => {
  if (event.target.id !== "vl-form") return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.target.id !== "vl-question" || event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
document.addEventListener("input", (event) => { if (event.target.id === "vl-question") grow(event.target); });

// Files by the dialog, dropped anywhere, or pasted anywhere.
document.addEventListener("change", (event) => {
  if (event.target.id !== "vl-file") return;
  vl.addFiles([...event.target.files]);
  event.target.value = "";
});
const hasFiles = (event) => [...(event.dataTransfer ? event.dataTransfer.types : [])].includes("Files");
document.addEventListener("dragover", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("vl-dropping");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("vl-dropping");
});
document.addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  document.body.classList.remove("vl-dropping");
  vl.addFiles([...event.dataTransfer.files]);
});
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData ? event.clipboardData.files : [])];
  if (!files.length) return;
  event.preventDefault();
  vl.addFiles(files);
});
