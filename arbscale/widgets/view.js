// What is seen: two images, half and half, in a canvas that is panned, enlarged and wiped. It knows
// no kernel; `look` is called when another part of the image is seen, `fit` when the box changed.

const MAX_ZOOM = 4096;

class View {
  constructor(root, signal, { look, fit }) {
    this.box = root.querySelector(".ax-view");
    this.canvas = root.querySelector(".ax-canvas");
    this.handle = root.querySelector(".ax-wipe");
    this.pen = this.canvas.getContext("2d");
    this.signal = signal;
    this.moved = look;
    this.fit = fit;
    this.centre = [0.5, 0.5]; // y, x in units of the image
    this.zoom = 1;
    this.wipe = 0.5;
    this.images = null; // {left, right, place: [top, left, height, width] in units, draft}
    this.pointers = new Map();
    this.listen();
  }

  listen() {
    const on = listener(this.signal, this);
    on(this.box, "wheel", this.wheel, { passive: false });
    on(this.box, "dblclick", this.reset);
    on(this.canvas, "keydown", this.key);
    on(this.canvas, "pointerdown", this.press);
    on(this.canvas, "pointermove", this.move);
    for (const type of ["pointerup", "pointercancel"]) on(this.canvas, type, this.release);
    on(this.handle, "pointerdown", (e) => this.handle.setPointerCapture(e.pointerId));
    on(this.handle, "pointermove", (e) => e.buttons && this.setWipe(this.place(e)[1]));
    on(this.handle, "keydown", this.keyWipe);
    const watcher = new ResizeObserver(() => this.resize());
    watcher.observe(this.box);
    this.signal.addEventListener("abort", () => {
      watcher.disconnect();
      this.drop();
    });
  }

  // Painting ----------------------------------------------------------------------------------

  show(images, size) {
    this.drop();
    this.images = images;
    this.shape(size);
    this.paint();
  }

  drop() {
    this.images?.left.close();
    this.images?.right.close();
    this.images = null;
  }

  // The box has the image's own ratio, and the canvas a pixel for each of the screen's.
  shape([height, width]) {
    this.box.style.setProperty("--ax-ratio", width / height);
  }

  resize() {
    const box = this.box.getBoundingClientRect();
    const dense = window.devicePixelRatio || 1;
    const [width, height] = [box.width, box.height].map((n) => Math.max(1, Math.round(n * dense)));
    if (!box.width || (width === this.canvas.width && height === this.canvas.height)) return;
    this.canvas.width = width;
    this.canvas.height = height;
    this.paint();
    this.fit();
  }

  paint() {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      this.paintNow();
    });
  }

  paintNow() {
    const { width, height } = this.canvas;
    const middle = Math.round(this.wipe * width);
    this.pen.clearRect(0, 0, width, height);
    if (this.images) {
      this.half(this.images.left, 0, middle);
      this.half(this.images.right, middle, width);
    }
    this.handle.style.left = `${100 * this.wipe}%`;
    this.handle.setAttribute("aria-valuenow", Math.round(100 * this.wipe));
  }

  // Draw one image between two columns of the canvas: hard pixels where they are enlarged.
  half(image, from, to) {
    const { width, height } = this.canvas;
    const [top, left, tall, wide] = this.images.place;
    const x = ((left - this.centre[1]) * this.zoom + 0.5) * width;
    const y = ((top - this.centre[0]) * this.zoom + 0.5) * height;
    const w = wide * this.zoom * width;
    const h = tall * this.zoom * height;
    this.pen.save();
    this.pen.beginPath();
    this.pen.rect(from, 0, to - from, height);
    this.pen.clip();
    this.pen.imageSmoothingEnabled = this.images.draft || image.width > w * 1.01;
    this.pen.imageSmoothingQuality = "high";
    this.pen.drawImage(image, x, y, w, h);
    this.pen.restore();
  }

  // Wipe, pan and zoom ------------------------------------------------------------------------

  setWipe(share) {
    this.wipe = clamp(share, 0, 1);
    this.paint();
  }

  keyWipe(e) {
    const step = { ArrowLeft: -0.02, ArrowRight: 0.02, Home: -1, End: 1 }[e.key];
    if (!step) return;
    e.preventDefault();
    this.setWipe(this.wipe + step);
  }

  look(centre, zoom) {
    const half = 0.5 / zoom;
    this.zoom = zoom;
    this.centre = centre.map((c) => clamp(c, half, 1 - half));
    this.paint();
    this.moved();
  }

  // Enlarge about a point of the box, given in its units, which stays where it is.
  zoomAbout([y, x], factor) {
    const { centre, zoom } = this;
    const next = clamp(zoom * factor, 1, MAX_ZOOM);
    const shift = 1 / zoom - 1 / next;
    this.look([centre[0] + (y - 0.5) * shift, centre[1] + (x - 0.5) * shift], next);
  }

  pan(dy, dx) {
    const { centre, zoom } = this;
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
    if (e.ctrlKey || e.metaKey || e.altKey) return; // the browser's own
    const middle = [0.5, 0.5];
    const act = {
      ArrowUp: () => this.pan(0.1, 0),
      ArrowDown: () => this.pan(-0.1, 0),
      ArrowLeft: () => this.pan(0, 0.1),
      ArrowRight: () => this.pan(0, -0.1),
      "+": () => this.zoomAbout(middle, 1.5),
      "=": () => this.zoomAbout(middle, 1.5),
      "-": () => this.zoomAbout(middle, 1 / 1.5),
      0: () => this.reset(),
    }[e.key];
    if (!act) return;
    e.preventDefault();
    act();
  }

  // Where a pointer is, (y, x) in units of the box.
  place(e) {
    const box = this.canvas.getBoundingClientRect();
    return [(e.clientY - box.top) / box.height, (e.clientX - box.left) / box.width];
  }

  press(e) {
    if (e.button) return; // neither the left one nor a finger
    this.canvas.setPointerCapture(e.pointerId);
    this.pointers.set(e.pointerId, this.place(e));
  }

  release(e) {
    this.pointers.delete(e.pointerId);
  }

  move(e) {
    const before = this.pointers.get(e.pointerId);
    if (!e.buttons) this.release(e); // let go outside the page
    if (!before || !e.buttons) return;
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
}

// A function that listens until `signal` is aborted, with methods of `self` as handlers.
function listener(signal, self) {
  return (node, type, f, options = {}) =>
    node.addEventListener(type, f.bind(self), { signal, ...options });
}

function clamp(x, low, high) {
  return Math.min(Math.max(x, low), high);
}
