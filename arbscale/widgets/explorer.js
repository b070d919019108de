// The explorer's front: it asks the kernel for what is seen next, one question in flight, and the
// newest one wins. Python puts explorer.html (as PAGE) and view.js before it; there is no build step.

const MAX_SCREEN = 1024; // device pixels a side that the kernel renders
const SILENCE = 8000; // ms without an answer, after which the kernel is thought lost
const PAUSE = 100; // ms at rest, after which the full density is asked for
const PART = 1 << 20; // bytes of a photograph in one message
const FRAMES = 8; // estimates in the strip
const LOST =
  "No answer from the kernel: it is busy, or was restarted; " +
  "then run the cell above again (on a page without cells: load the page again).";

function render({ model, el }) {
  const explorer = new Explorer(model, el);
  return () => explorer.close();
}

class Explorer {
  constructor(model, el) {
    this.model = model;
    this.options = model.get("options");
    this.id = Math.random().toString(36).slice(2);
    this.state = {
      scale: model.get("answer").scale ?? 1,
      size: null, // [height, width] once typed, until the slider moves
      typed: null,
      rival: model.get("answer").rival ?? null,
    };
    this.serial = 0; // of the newest question
    this.waiting = 0; // the serial of the question in flight
    this.closing = new AbortController();
    this.build(el);
    this.listen();
    this.take();
    this.work();
    this.view.resize();
  }

  // The page ----------------------------------------------------------------------------------

  build(el) {
    el.innerHTML = PAGE;
    this.root = el.firstElementChild;
    this.root.explorer = this; // for tests, and for the curious in a console
    this.root.dataset.kind = this.options.kind;
    if (this.options.kind === "enlarge") this.find("draw").textContent = "Enlarge again";
    const { sampler, samplers } = this.options;
    for (const name of ["seed", "to_seed", "steps", "mix"]) this.find(name).value = this.options[name];
    this.find("sampler").replaceChildren(...samplers.map((s) => new Option(s, s, false, s === sampler)));
    // Notebook 7 and Lab take the arrow keys unless the focused element itself says otherwise.
    for (const node of this.root.querySelectorAll("input, select, button, [tabindex]"))
      node.dataset.lmSuppressShortcuts = "true";
    this.view = new View(this.root, this.closing.signal, {
      look: () => this.ask(true),
      fit: () => this.ask(),
    });
    this.drawn = this.settings();
    this.showScale();
  }

  find(name) {
    return this.root.querySelector(`.ax-${name}`);
  }

  listen() {
    const add = listener(this.closing.signal, this);
    const on = (name, type, f) => add(this.find(name), type, f);
    on("scale", "input", this.moveScale);
    on("typed", "change", this.typeSize);
    on("typed", "keydown", enter(() => this.typeSize())); // Lab keeps Enter's "change" back
    on("rival", "change", this.pickRival);
    on("reset", "click", () => this.view.reset());
    on("draw", "click", this.draw);
    on("mix", "input", this.drawIfChanged);
    on("sampler", "change", this.drawIfChanged);
    for (const name of ["seed", "to_seed", "steps"]) {
      on(name, "change", this.drawIfChanged);
      on(name, "keydown", enter(() => this.drawIfChanged()));
    }
    on("cancel", "click", this.cancel);
    on("save-view", "click", () => this.send({ kind: "save", what: "view" }));
    on("save-whole", "click", () => this.send({ kind: "save", what: "whole" }));
    on("copy", "click", this.copy);
    on("pick", "click", () => this.find("file").click());
    on("file", "change", (e) => this.upload(e.target.files[0]));
    on("view", "dragover", this.dragOver);
    on("view", "dragleave", () => this.root.classList.remove("ax-over"));
    on("view", "drop", this.drop);
    this.hear("change:answer", () => this.take());
    this.hear("change:work", () => this.work());
    this.hear("change:estimate", () => this.addEstimate());
    this.hear("comm_live_update", () => this.lost());
    this.hear("msg:custom", (message, buffers) => this.saveFile(message, buffers));
  }

  hear(type, f) {
    this.model.on(type, f);
    this.closing.signal.addEventListener("abort", () => this.model.off(type, f));
  }

  close() {
    this.closing.abort();
    clearTimeout(this.timer);
    clearTimeout(this.full);
    this.closed = true;
  }

  // Questions and answers ---------------------------------------------------------------------

  // Ask for what is seen now; while a question is in flight, only remember that there is more.
  ask(live = false) {
    if (this.waiting) {
      this.wanted = true;
      this.live = live;
      return;
    }
    clearTimeout(this.full);
    this.waiting = ++this.serial;
    this.wanted = false;
    const { centre, zoom, canvas } = this.view;
    const screen = [canvas.height, canvas.width].map((n) => Math.min(n, MAX_SCREEN));
    this.timer = setTimeout(() => this.lost(), SILENCE);
    this.send({
      kind: "view", view: this.id, serial: this.serial,
      ...this.state, centre, zoom, screen, live,
    });
  }

  send(message, buffers = []) {
    try {
      this.model.send(message, undefined, buffers);
    } catch {
      this.lost();
    }
  }

  lost() {
    if (this.closed) return;
    clearTimeout(this.timer);
    this.waiting = 0;
    this.root.classList.add("ax-lost");
    this.say(LOST);
  }

  // Take an answer: both images of it, or neither.
  async take() {
    const answer = this.model.get("answer");
    const mine = answer.view === this.id;
    this.root.classList.remove("ax-lost");
    if (!mine && answer.view && this.view.images) {
      if (answer.subject !== this.subject) this.ask(); // another view of this widget drew anew
      return;
    }
    if (answer.error || answer.pending) {
      this.say(answer.error || answer.pending);
      this.settle(answer);
      return;
    }
    const type = answer.draft ? "image/jpeg" : "image/png";
    const blobs = ["left", "right"].map((n) => new Blob([this.model.get(n)], { type }));
    const newest = (this.newest = {});
    const [left, right] = await Promise.all(blobs.map((blob) => createImageBitmap(blob)));
    if (newest !== this.newest || this.closed) {
      left.close();
      right.close();
    } else {
      this.show(answer, left, right);
    }
    if (!this.closed) this.settle(answer);
  }

  show(answer, left, right) {
    const [top, first, height, width] = answer.window;
    const [h, w] = answer.shown;
    const place = [top / h, first / w, height / h, width / w];
    this.view.show({ left, right, place, draft: answer.draft }, answer.size);
    this.subject = answer.subject;
    this.answer = answer;
    if (this.state.typed && this.state.typed === answer.typed) {
      this.state.size = answer.size;
      this.state.scale = answer.scale;
      this.state.typed = null;
      this.showScale();
    }
    this.showRivals(answer);
    this.say(describe(answer, this.view.zoom));
    this.root.dataset.size = answer.size.join("x");
    this.root.dataset.draft = answer.draft;
  }

  // The question in flight has its answer: ask the next one, or for the full density.
  settle(answer) {
    if (answer.view !== this.id || answer.serial !== this.serial) return;
    clearTimeout(this.timer);
    clearTimeout(this.full);
    this.waiting = 0;
    this.root.dataset.serial = answer.serial;
    const refused = answer.error && answer.typed;
    if (refused && answer.typed === this.state.typed) this.state.typed = null;
    const draft = answer.draft || (refused && this.view.images?.draft);
    if (this.wanted) this.ask(this.live);
    else if (draft) this.full = setTimeout(() => this.ask(), PAUSE);
  }

  say(text) {
    this.find("status").textContent = text;
  }

  // The scale ---------------------------------------------------------------------------------

  moveScale() {
    this.state.scale = 2 ** +this.find("scale").value;
    this.state.size = this.state.typed = null;
    this.showScale();
    this.ask(true);
  }

  typeSize() {
    const text = this.find("typed").value.trim();
    if (!text) this.showScale();
    if (!text || text === this.shown) return;
    this.shown = this.state.typed = text;
    this.ask();
  }

  showScale() {
    const { scale, size } = this.state;
    const text = size && this.answer?.stretched ? size.join("x") : String(+scale.toPrecision(3));
    this.find("scale").value = Math.log2(scale);
    this.find("scale").setAttribute("aria-valuetext", `times ${text}`);
    this.find("typed").value = this.shown = text;
  }

  // The side on the right ---------------------------------------------------------------------

  showRivals({ rivals, rival }) {
    const key = JSON.stringify(rivals);
    if (key !== this.rivals) {
      this.find("rival").replaceChildren(...rivals.map(([k, label]) => new Option(label, k)));
      this.rivals = key;
    }
    this.find("rival").value = rival;
    this.find("right").textContent = rivals.find(([k]) => k === rival)[1];
  }

  pickRival() {
    this.state.rival = this.find("rival").value;
    this.ask();
  }

  // Drawing anew, and what takes long ---------------------------------------------------------

  draw() {
    const number = (name) => this.find(name).valueAsNumber;
    const [seed, to_seed, steps, share] = ["seed", "to_seed", "steps", "mix"].map(number);
    const sampler = this.find("sampler").value;
    this.drawn = this.settings();
    this.find("strip").replaceChildren();
    this.send({ kind: "draw", seed, to_seed, steps, share, sampler });
  }

  // What was typed for a drawing that is cancelled must not start it again.
  cancel() {
    this.state.typed = null;
    this.showScale();
    this.send({ kind: "cancel" });
  }

  settings() {
    return ["seed", "to_seed", "steps", "mix", "sampler"].map((n) => this.find(n).value).join();
  }

  drawIfChanged() {
    if (this.settings() !== this.drawn) this.draw();
  }

  work() {
    const { text, done, total, error } = this.model.get("work");
    const busy = total !== undefined;
    this.root.classList.toggle("ax-busy", busy);
    for (const name of ["save-view", "save-whole", "pick"]) this.find(name).disabled = busy;
    this.find("progress").value = busy ? done / total : 0;
    this.find("doing").textContent = busy ? `${text}: ${done} of ${total}` : "";
    if (error || (text && !busy)) this.say(error || text);
  }

  async addEstimate() {
    const blob = new Blob([this.model.get("estimate")], { type: "image/png" });
    const image = await createImageBitmap(blob);
    const frame = document.createElement("canvas");
    [frame.width, frame.height] = [image.width, image.height];
    frame.getContext("2d").drawImage(image, 0, 0);
    image.close();
    const strip = this.find("strip");
    strip.append(frame);
    if (strip.childElementCount > FRAMES) strip.firstElementChild.remove();
  }

  // Photographs -------------------------------------------------------------------------------

  dragOver(e) {
    if (this.options.kind !== "enlarge") return;
    e.preventDefault();
    this.root.classList.add("ax-over");
  }

  drop(e) {
    if (this.options.kind !== "enlarge") return;
    e.preventDefault();
    this.root.classList.remove("ax-over");
    this.upload(e.dataTransfer.files[0]);
  }

  // Send a file in parts: a server closes the connection at a message of over 10 MB.
  async upload(file) {
    this.find("file").value = "";
    if (!file) return;
    if (file.size > this.options.max_upload) {
      const most = this.options.max_upload >> 20;
      this.say(`${file.name} is over ${most} MB; reduce the photograph`);
      return;
    }
    this.say(`reading ${file.name}`);
    const bytes = await file.arrayBuffer().catch(() => new ArrayBuffer(0)); // none in a folder
    const parts = Math.max(1, Math.ceil(bytes.byteLength / PART));
    for (let part = 0; part < parts; part++) {
      const buffers = [bytes.slice(part * PART, (part + 1) * PART)];
      this.send({ kind: "photo", name: file.name, part, parts }, buffers);
    }
  }

  // Files and code out ------------------------------------------------------------------------

  saveFile(message, buffers) {
    if (message.kind !== "file") return;
    const url = URL.createObjectURL(new Blob([buffers[0]], { type: "image/png" }));
    const link = document.createElement("a");
    link.href = url;
    link.download = message.name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  async copy() {
    const text = this.answer?.code ?? "";
    const code = this.find("code");
    code.value = text;
    try {
      await navigator.clipboard.writeText(text);
      this.say("The Python lines are in the clipboard.");
    } catch {
      code.hidden = false; // no clipboard without a secure address: to be copied by hand
      code.select();
    }
  }
}

function describe({ size, scale, stretched, shown, window, ms, rate, draft, note }, zoom) {
  const facts = [
    `${size[0]} x ${size[1]} px`,
    stretched ? "stretched" : `scale x${+scale.toPrecision(3)}`,
    `zoom x${+zoom.toPrecision(3)}`,
    `${ms.toFixed(0)} ms`,
    `${rate.toFixed(2)} Mpx/s`,
  ];
  if (shown[0] < size[0]) facts.push(`rendered for the screen: ${window[2]} x ${window[3]} px`);
  if (draft) facts.push("while moving");
  if (note) facts.push(note);
  return facts.join(" · ");
}

// A listener for the Enter key alone.
function enter(f) {
  return (e) => {
    if (e.key !== "Enter") return;
    e.preventDefault();
    f();
  };
}

export default { render };
