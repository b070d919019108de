// The explorer's front. It draws two images that the kernel rendered, half and half, and asks for
// what is seen next: one question in flight, and the newest one wins. No build step, no other file.

const MIN_SCALE = -1; // log2, x0.5
const MAX_SCALE = 6; // x64
const MAX_ZOOM = 4096;
const MAX_SCREEN = 1024; // device pixels a side that the kernel renders
const SILENCE = 8000; // ms without an answer, after which the kernel is thought lost
const PAUSE = 100; // ms at rest, after which the full density is asked for
const PART = 1 << 20; // bytes of a photograph in one message
const FRAMES = 8; // estimates in the strip
const LOST = "No answer from the kernel: it is busy, or was restarted; then run the cell above again.";

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
      centre: [0.5, 0.5], // y, x in units of the image
      zoom: 1,
      wipe: 0.5,
      rival: model.get("answer").rival ?? null,
    };
    this.images = null; // {left, right, place: [top, left, height, width] in units, draft}
    this.pointers = new Map();
    this.serial = 0; // of the newest question
    this.waiting = 0; // the serial of the question in flight
    this.times = []; // of the last questions: ms until the image, and whether it is a draft
    this.closing = new AbortController();
    this.build(el);
    this.listen();
    this.take();
    this.work();
    this.resize();
  }

  // The page ----------------------------------------------------------------------------------

  build(el) {
    el.innerHTML = PAGE;
    this.root = el.firstElementChild;
    this.root.explorer = this; // for tests, and for the curious in a console
    this.root.dataset.kind = this.options.kind;
    if (this.options.kind === "enlarge") this.find("draw").textContent = "Enlarge again";
    this.canvas = this.find("canvas");
    this.pen = this.canvas.getContext("2d");
    const { sampler, samplers } = this.options;
    for (const name of ["seed", "to_seed", "steps"]) this.find(name).value = this.options[name];
    this.find("sampler").replaceChildren(...samplers.map((s) => new Option(s, s, false, s === sampler)));
    // Notebook 7 and Lab take the arrow keys unless the focused element itself says otherwise.
    for (const node of this.root.querySelectorAll("input, select, button, [tabindex]"))
      node.dataset.lmSuppressShortcuts = "true";
    this.drawn = this.settings();
    this.showScale();
  }

  find(name) {
    return this.root.querySelector(`.ax-${name}`);
  }

  listen() {
    const signal = this.closing.signal;
    const on = (name, type, f, options = {}) =>
      this.find(name).addEventListener(type, f.bind(this), { signal, ...options });
    on("scale", "input", this.moveScale);
    on("typed", "change", this.typeSize);
    on("typed", "keydown", enter(() => this.typeSize())); // Lab keeps Enter's "change" back
    on("rival", "change", this.pickRival);
    on("view", "wheel", this.wheel, { passive: false });
    on("view", "dblclick", this.reset);
    on("canvas", "keydown", this.key);
    for (const type of ["pointerdown", "pointermove", "pointerup", "pointercancel"])
      on("canvas", type, this[type]);
    on("wipe", "pointerdown", (e) => this.find("wipe").setPointerCapture(e.pointerId));
    on("wipe", "pointermove", this.dragWipe);
    on("wipe", "keydown", this.keyWipe);
    on("reset", "click", this.reset);
    on("draw", "click", this.draw);
    on("mix", "input", this.drawIfChanged);
    on("sampler", "change", this.drawIfChanged);
    for (const name of ["seed", "to_seed", "steps"]) {
      on(name, "change", this.drawIfChanged);
      on(name, "keydown", enter(() => this.drawIfChanged()));
    }
    on("cancel", "click", () => this.send({ kind: "cancel" }));
    on("save-view", "click", () => this.send({ kind: "save", what: "view" }));
    on("save-whole", "click", () => this.send({ kind: "save", what: "whole" }));
    on("copy", "click", this.copy);
    on("pick", "click", () => this.find("file").click());
    on("file", "change", (e) => this.upload(e.target.files[0]));
    on("view", "dragover", this.dragOver);
    on("view", "dragleave", () => this.root.classList.remove("ax-over"));
    on("view", "drop", this.drop);
    this.watcher = new ResizeObserver(() => this.resize());
    this.watcher.observe(this.find("view"));
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
    this.watcher.disconnect();
    clearTimeout(this.timer);
    clearTimeout(this.full);
    this.closed = true;
    this.dropImages();
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
    const { scale, size, typed, centre, zoom, rival } = this.state;
    const screen = [this.canvas.height, this.canvas.width].map((n) => Math.min(n, MAX_SCREEN));
    this.asked = performance.now();
    this.timer = setTimeout(() => this.lost(), SILENCE);
    this.send({
      kind: "view", view: this.id, serial: this.serial,
      scale, size, typed, centre, zoom, rival, screen, live,
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
    if (!mine && answer.view && this.images) {
      if (answer.subject !== this.subject) this.ask(); // another view of this widget drew anew
      return;
    }
    if (answer.error || answer.pending) {
      this.say(answer.error || answer.pending);
      this.settle(answer);
      return;
    }
    const blobs = ["left", "right"].map((n) => new Blob([this.model.get(n)], { type: "image/png" }));
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
    this.dropImages();
    this.images = { left, right, place: [top / h, first / w, height / h, width / w], draft: answer.draft };
    this.subject = answer.subject;
    this.answer = answer;
    if (this.state.typed && this.state.typed === answer.typed) {
      this.state.size = answer.size;
      this.state.scale = answer.scale;
      this.state.typed = null;
      this.showScale();
    }
    this.showRivals(answer);
    this.shape(answer.size);
    this.say(describe(answer, this.state.zoom));
    this.paint();
    this.root.dataset.size = answer.size.join("x");
    this.root.dataset.draft = answer.draft;
  }

  // The question in flight has its answer: ask the next one, or for the full density.
  settle(answer) {
    if (answer.view !== this.id || answer.serial !== this.waiting) return;
    clearTimeout(this.timer);
    this.waiting = 0;
    this.root.dataset.serial = answer.serial;
    this.times.push([performance.now() - this.asked, !!answer.draft]);
    if (this.times.length > 500) this.times.shift();
    if (answer.error && answer.typed === this.state.typed) this.state.typed = null;
    if (this.wanted) this.ask(this.live);
    else if (answer.draft) this.full = setTimeout(() => this.ask(), PAUSE);
  }

  dropImages() {
    this.images?.left.close();
    this.images?.right.close();
    this.images = null;
  }

  say(text) {
    this.find("status").textContent = text;
  }

  // Drawing -----------------------------------------------------------------------------------

  // The box has the image's own ratio, and the canvas a pixel for each of the screen's.
  shape([height, width]) {
    const ratio = `${width} / ${height}`;
    const view = this.find("view");
    const longest = this.options.box;
    view.style.aspectRatio = ratio;
    view.style.width = `${width >= height ? longest : Math.round((longest * width) / height)}px`;
  }

  resize() {
    const box = this.find("view").getBoundingClientRect();
    const dense = window.devicePixelRatio || 1;
    const [width, height] = [box.width, box.height].map((n) => Math.max(1, Math.round(n * dense)));
    if (!box.width || (width === this.canvas.width && height === this.canvas.height)) return;
    this.canvas.width = width;
    this.canvas.height = height;
    this.paint();
    this.ask();
  }

  paint() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      if (!this.closed) this.paintNow();
    });
  }

  paintNow() {
    const { width, height } = this.canvas;
    const middle = Math.round(this.state.wipe * width);
    this.pen.clearRect(0, 0, width, height);
    if (this.images) {
      this.half(this.images.left, 0, middle);
      this.half(this.images.right, middle, width);
    }
    const wipe = this.find("wipe");
    wipe.style.left = `${100 * this.state.wipe}%`;
    wipe.setAttribute("aria-valuenow", Math.round(100 * this.state.wipe));
  }

  // Draw one image between two columns of the canvas: hard pixels where they are enlarged.
  half(image, from, to) {
    const { width, height } = this.canvas;
    const { centre, zoom } = this.state;
    const [top, left, tall, wide] = this.images.place;
    const x = ((left - centre[1]) * zoom + 0.5) * width;
    const y = ((top - centre[0]) * zoom + 0.5) * height;
    const w = wide * zoom * width;
    const h = tall * zoom * height;
    this.pen.save();
    this.pen.beginPath();
    this.pen.rect(from, 0, to - from, height);
    this.pen.clip();
    this.pen.imageSmoothingEnabled = this.images.draft || image.width > w * 1.01;
    this.pen.imageSmoothingQuality = "high";
    this.pen.drawImage(image, x, y, w, h);
    this.pen.restore();
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

  dragWipe(e) {
    if (!e.buttons) return;
    const box = this.canvas.getBoundingClientRect();
    this.setWipe((e.clientX - box.left) / box.width);
  }

  keyWipe(e) {
    const step = { ArrowLeft: -0.02, ArrowRight: 0.02, Home: -1, End: 1 }[e.key];
    if (!step) return;
    e.preventDefault();
    this.setWipe(this.state.wipe + step);
  }

  setWipe(share) {
    this.state.wipe = clamp(share, 0, 1);
    this.paint();
  }

  // Pan and zoom ------------------------------------------------------------------------------

  // Enlarge about a point of the box, given in its units, which stays where it is.
  zoomAbout([y, x], factor) {
    const { centre, zoom } = this.state;
    const next = clamp(zoom * factor, 1, MAX_ZOOM);
    const shift = 1 / zoom - 1 / next;
    this.look([centre[0] + (y - 0.5) * shift, centre[1] + (x - 0.5) * shift], next);
  }

  look(centre, zoom) {
    const half = 0.5 / zoom;
    this.state.zoom = zoom;
    this.state.centre = centre.map((c) => clamp(c, half, 1 - half));
    this.paint();
    this.ask(true);
  }

  pan(dy, dx) {
    const { centre, zoom } = this.state;
    this.look([centre[0] - dy / zoom, centre[1] - dx / zoom], zoom);
  }

  reset() {
    this.look([0.5, 0.5], 1);
  }

  wheel(e) {
    e.preventDefault();
    const pixels = e.deltaY * (e.deltaMode === 1 ? 16 : 1);
    this.zoomAbout(this.place(e), 2 ** clamp(-pixels / 250, -1, 1));
  }

  key(e) {
    const moves = {
      ArrowUp: [0.1, 0], ArrowDown: [-0.1, 0], ArrowLeft: [0, 0.1], ArrowRight: [0, -0.1],
    };
    if (moves[e.key]) this.pan(...moves[e.key]);
    else if (e.key === "+" || e.key === "=") this.zoomAbout([0.5, 0.5], 1.5);
    else if (e.key === "-") this.zoomAbout([0.5, 0.5], 1 / 1.5);
    else if (e.key === "0") this.reset();
    else return;
    e.preventDefault();
  }

  // Where a pointer is, (y, x) in units of the box.
  place(e) {
    const box = this.canvas.getBoundingClientRect();
    return [(e.clientY - box.top) / box.height, (e.clientX - box.left) / box.width];
  }

  pointerdown(e) {
    this.canvas.setPointerCapture(e.pointerId);
    this.pointers.set(e.pointerId, this.place(e));
  }

  pointerup(e) {
    this.pointers.delete(e.pointerId);
  }

  pointercancel(e) {
    this.pointerup(e);
  }

  pointermove(e) {
    const before = this.pointers.get(e.pointerId);
    if (!before) return;
    const now = this.place(e);
    const other = [...this.pointers].find(([id]) => id !== e.pointerId)?.[1];
    this.pointers.set(e.pointerId, now);
    if (other) this.pinch(before, now, other);
    else this.pan(now[0] - before[0], now[1] - before[1]);
  }

  // Two fingers: their middle moves the image, their distance enlarges it.
  pinch(before, now, other) {
    const far = (a, b) => Math.hypot(a[0] - b[0], a[1] - b[1]) || 1e-3;
    this.pan((now[0] - before[0]) / 2, (now[1] - before[1]) / 2);
    const middle = [(now[0] + other[0]) / 2, (now[1] + other[1]) / 2];
    this.zoomAbout(middle, far(now, other) / far(before, other));
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
    const parts = Math.max(1, Math.ceil(file.size / PART));
    for (let part = 0; part < parts; part++) {
      const bytes = await file.slice(part * PART, (part + 1) * PART).arrayBuffer();
      this.send({ kind: "photo", name: file.name, part, parts }, [bytes]);
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

function clamp(x, low, high) {
  return Math.min(Math.max(x, low), high);
}

const PAGE = `
<div class="ax" role="group" aria-label="Scale explorer">
  <div class="ax-view">
    <canvas class="ax-canvas" tabindex="0" role="application" aria-roledescription="image"
      aria-label="Image: arrow keys pan, plus and minus zoom, 0 shows the whole"></canvas>
    <span class="ax-tag ax-left">rendered at this size</span><span class="ax-tag ax-right"></span>
    <div class="ax-wipe" tabindex="0" role="slider" aria-label="Border between the two images"
      aria-valuemin="0" aria-valuemax="100" aria-valuenow="50"><i></i></div>
    <div class="ax-drop">Drop a photograph</div>
  </div>
  <div class="ax-panel">
    <label class="ax-row">Scale
      <input class="ax-scale" type="range" min="${MIN_SCALE}" max="${MAX_SCALE}" step="0.01"
        aria-label="Scale">
      <input class="ax-typed" type="text" size="8" spellcheck="false" aria-label="Scale or size"
        title="A scale such as 3.7, or a size such as 180x240 (height first)">
    </label>
    <label class="ax-row">Right <select class="ax-rival" aria-label="Image on the right"></select>
    </label>
    <div class="ax-row ax-generate">
      <label>Seed <input class="ax-seed" type="number" min="0" step="1"></label>
      <label>to <input class="ax-to_seed" type="number" min="0" step="1"
        aria-label="Second seed"></label>
      <input class="ax-mix" type="range" min="0" max="1" step="0.0625" value="0"
        aria-label="Between the two seeds" title="From the first seed to the second">
    </div>
    <div class="ax-row ax-sampled">
      <label>Steps <input class="ax-steps" type="number" min="1" max="1000" step="1"></label>
      <label>Sampler <select class="ax-sampler"></select></label>
      <button class="ax-draw" type="button">Draw</button>
    </div>
    <div class="ax-row ax-enlarge">
      <button class="ax-pick" type="button">Open a photograph…</button>
      <input class="ax-file" type="file" accept="image/*" hidden>
    </div>
    <div class="ax-row ax-working">
      <progress class="ax-progress" max="1" value="0" aria-label="Progress"></progress>
      <span class="ax-doing"></span>
      <button class="ax-cancel" type="button">Cancel</button>
    </div>
    <div class="ax-strip" aria-hidden="true"></div>
    <div class="ax-row">
      <button class="ax-reset" type="button">Whole image</button>
      <button class="ax-save-view" type="button">Save view</button>
      <button class="ax-save-whole" type="button">Save whole</button>
      <button class="ax-copy" type="button">Copy Python</button>
    </div>
    <textarea class="ax-code" rows="6" readonly hidden aria-label="Python"></textarea>
    <div class="ax-status" role="status" aria-live="polite"></div>
  </div>
</div>`;

export default { render };
