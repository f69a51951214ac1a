// A mask painted over a picture: white is repainted. Every pixel is black or white, as the worker
// takes it: it repaints from half white on, so greys would only hide where the edge is.
import {loadImage} from "./blobs.js";
import {button, labelledControl, openDialog} from "./dialogs.js";
import {make} from "./dom.js";

// More pixels than any phone's canvas takes: the worker takes a mask of another size, too.
const MAX_CANVAS_PIXELS = 16_777_216;
const MAX_UNDO_BYTES = 200_000_000;

// A mask of bytes, 1 where the picture is repainted, whose changes can be undone.
class MaskPixels {
  #before = null;
  #undo = [];
  #redo = [];

  constructor(width, height) {
    this.width = width;
    this.height = height;
    this.pixels = new Uint8Array(width * height);
  }

  get isEmpty() {
    return !this.pixels.includes(1);
  }

  get canUndo() {
    return this.#undo.length > 0;
  }

  get canRedo() {
    return this.#redo.length > 0;
  }

  // Changes between begin and end are one step of undo.
  begin() {
    this.#before = { pixels: this.pixels.slice(), box: null };
  }

  end() {
    const { pixels, box } = this.#before;
    this.#before = null;
    if (!box) return;
    this.#undo.push({ box, pixels: cut(pixels, this.width, box) });
    let bytes = this.#undo.reduce((sum, step) => sum + step.pixels.length, 0);
    while (bytes > MAX_UNDO_BYTES) bytes -= this.#undo.shift().pixels.length;
    this.#redo = [];
  }

  // The box that changed: {left, top, right, bottom}, or null.
  undo() {
    return this.#swap(this.#undo, this.#redo);
  }

  redo() {
    return this.#swap(this.#redo, this.#undo);
  }

  // The line between two points, as thick as the brush and round at both ends.
  stroke(from, to, diameter, value) {
    const radius = Math.max(diameter / 2, 0.5);
    const [dx, dy] = [to.x - from.x, to.y - from.y];
    const length2 = dx * dx + dy * dy;
    const box = {
      left: Math.min(from.x, to.x) - radius,
      top: Math.min(from.y, to.y) - radius,
      right: Math.max(from.x, to.x) + radius,
      bottom: Math.max(from.y, to.y) + radius,
    };
    return this.#set(box, value, (x, y) => {
      const along = length2
        ? Math.min(1, Math.max(0, ((x - from.x) * dx + (y - from.y) * dy) / length2))
        : 0;
      return (x - from.x - along * dx) ** 2 + (y - from.y - along * dy) ** 2 <= radius * radius;
    });
  }

  rectangle(x, y, width, height, value) {
    return this.#set({ left: x, top: y, right: x + width, bottom: y + height }, value, () => true);
  }

  ellipse(x, y, width, height, value) {
    const [a, b] = [width / 2, height / 2];
    const box = { left: x, top: y, right: x + width, bottom: y + height };
    return this.#set(
      box,
      value,
      (px, py) => ((px - x - a) / a) ** 2 + ((py - y - b) / b) ** 2 <= 1,
    );
  }

  invert() {
    const box = this.#changed(this.#whole());
    this.pixels.forEach((value, i) => (this.pixels[i] = 1 - value));
    return box;
  }

  #whole() {
    return { left: 0, top: 0, right: this.width, bottom: this.height };
  }

  // Of a box of points, the pixels whose middle lies inside of `holds`.
  #set(box, value, holds) {
    const left = Math.max(0, Math.floor(box.left));
    const top = Math.max(0, Math.floor(box.top));
    const right = Math.min(this.width, Math.ceil(box.right));
    const bottom = Math.min(this.height, Math.ceil(box.bottom));
    if (left >= right || top >= bottom) return null;
    for (let y = top; y < bottom; y += 1) {
      for (let x = left; x < right; x += 1) {
        if (holds(x + 0.5, y + 0.5)) this.pixels[y * this.width + x] = value;
      }
    }
    return this.#changed({ left, top, right, bottom });
  }

  #changed(box) {
    if (this.#before) this.#before.box = union(this.#before.box, box);
    return box;
  }

  #swap(source, target) {
    const step = source.pop();
    if (!step) return null;
    const { box, pixels } = step;
    target.push({ box, pixels: cut(this.pixels, this.width, box) });
    const columns = box.right - box.left;
    for (let y = box.top; y < box.bottom; y += 1) {
      const row = (y - box.top) * columns;
      this.pixels.set(pixels.subarray(row, row + columns), y * this.width + box.left);
    }
    return box;
  }
}

function cut(pixels, width, box) {
  const columns = box.right - box.left;
  const part = new Uint8Array(columns * (box.bottom - box.top));
  for (let y = box.top; y < box.bottom; y += 1) {
    const start = y * width + box.left;
    part.set(pixels.subarray(start, start + columns), (y - box.top) * columns);
  }
  return part;
}

function union(a, b) {
  if (!a || !b) return a ?? b;
  return {
    left: Math.min(a.left, b.left),
    top: Math.min(a.top, b.top),
    right: Math.max(a.right, b.right),
    bottom: Math.max(a.bottom, b.bottom),
  };
}

// The mask for a picture as the data URI of a PNG of the picture's size, or null when dismissed.
// Both are data URIs; the mask to start from may be null. Rejects where one cannot be read.
export async function paintMask(pictureUri, maskUri) {
  const picture = await loadImage(pictureUri);
  const share = Math.min(
    1,
    Math.sqrt(MAX_CANVAS_PIXELS / (picture.naturalWidth * picture.naturalHeight)),
  );
  const width = Math.max(1, Math.floor(picture.naturalWidth * share));
  const height = Math.max(1, Math.floor(picture.naturalHeight * share));
  const mask = new MaskPixels(width, height);
  if (maskUri) readMask(mask, await loadImage(maskUri));
  return new Promise((resolve) => new Painter(picture, mask, resolve));
}

// As the worker: from half white on, and transparent is black.
function readMask(mask, image) {
  const canvas = make("canvas", { width: mask.width, height: mask.height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "black";
  context.fillRect(0, 0, mask.width, mask.height);
  context.imageSmoothingEnabled = false;
  context.drawImage(image, 0, 0, mask.width, mask.height);
  const { data } = context.getImageData(0, 0, mask.width, mask.height);
  for (let i = 0; i < mask.pixels.length; i += 1) {
    const [red, green, blue] = data.subarray(4 * i, 4 * i + 3);
    mask.pixels[i] = 0.299 * red + 0.587 * green + 0.114 * blue >= 127.5 ? 1 : 0;
  }
}

class Painter {
  #mask;
  #canvas;
  #context;
  #dialog;
  #stage;
  #frame;
  #cursor;
  #controls = {};
  #message;
  #last = null;
  #fingers = new Map();
  #result = null;

  constructor(picture, mask, resolve) {
    this.#mask = mask;
    this.#canvas = make("canvas", {
      width: mask.width,
      height: mask.height,
      role: "img",
      "aria-label": `Mask of ${mask.width} by ${mask.height} pixels over the picture. Without a pointer, add shapes by their numbers.`,
    });
    this.#context = this.#canvas.getContext("2d");
    this.#cursor = make("span", { class: "brush-cursor", hidden: true, "aria-hidden": "true" });
    picture.alt = "";
    this.#frame = make("div", { class: "mask-frame" }, picture, this.#canvas, this.#cursor);
    this.#stage = make(
      "div",
      { class: "mask-stage", tabindex: 0, role: "group", "aria-label": "Picture" },
      this.#frame,
    );
    this.#message = make("p", { class: "message", role: "status" });
    this.#dialog = openDialog(
      "Paint a mask",
      "mask-painter",
      make("div", { class: "mask-tools" }, this.#toolRow(), this.#historyRow(), this.#shapeRow()),
      this.#stage,
      this.#message,
      make(
        "footer",
        {},
        make(
          "p",
          { class: "hint" },
          "What is painted is repainted. [ and ] size the brush, B paints, E erases, Ctrl+Z undoes, Enter applies, Escape dismisses.",
        ),
        button("Apply mask", () => this.#apply(), { class: "primary" }),
      ),
    );
    this.#dialog.addEventListener("keydown", (event) => this.#key(event));
    this.#dialog.addEventListener("close", () => {
      removeEventListener("resize", this.#fit);
      resolve(this.#result);
    });
    addEventListener("resize", this.#fit);
    this.#listenToPointers();
    this.#fit();
    this.#show(this.#all);
    this.#setOpacity();
    this.#controls.paint.focus();
  }

  get #all() {
    return { left: 0, top: 0, right: this.#mask.width, bottom: this.#mask.height };
  }

  #toolRow() {
    const radio = (value, checked) =>
      make("input", { type: "radio", name: "mask-tool", value, checked });
    this.#controls.paint = radio("paint", true);
    this.#controls.erase = radio("erase", false);
    const side = Math.max(this.#mask.width, this.#mask.height);
    this.#controls.size = make("input", {
      type: "range",
      min: 1,
      max: Math.max(16, Math.round(side / 2)),
      value: Math.max(4, Math.round(side / 16)),
      oninput: () => this.#sizeCursor(),
    });
    this.#controls.opacity = make("input", {
      type: "range",
      min: 10,
      max: 100,
      value: 60,
      oninput: () => this.#setOpacity(),
    });
    this.#controls.zoom = make("input", {
      type: "range",
      min: 100,
      max: 800,
      step: 25,
      value: 100,
      oninput: () => this.#fit(),
    });
    return make(
      "div",
      { class: "row" },
      make(
        "fieldset",
        {},
        make("legend", {}, "Tool"),
        make("label", {}, this.#controls.paint, " Brush"),
        make("label", {}, this.#controls.erase, " Eraser"),
      ),
      labelledControl("Brush size", this.#controls.size),
      labelledControl("Opacity", this.#controls.opacity),
      labelledControl("Zoom", this.#controls.zoom),
    );
  }

  #historyRow() {
    this.#controls.undo = button("Undo", () => this.#show(this.#mask.undo()));
    this.#controls.redo = button("Redo", () => this.#show(this.#mask.redo()));
    const { width, height } = this.#mask;
    return make(
      "div",
      { class: "row" },
      this.#controls.undo,
      this.#controls.redo,
      button("Fill all", () => this.#once((mask) => mask.rectangle(0, 0, width, height, 1))),
      button("Clear", () => this.#once((mask) => mask.rectangle(0, 0, width, height, 0))),
      button("Invert", () => this.#once((mask) => mask.invert())),
    );
  }

  #shapeRow() {
    const { width, height } = this.#mask;
    const number = (value, min, max) =>
      make("input", { type: "number", min, max, step: 1, value, required: true });
    const shape = make(
      "select",
      {},
      make("option", { value: "rectangle" }, "Rectangle"),
      make("option", { value: "ellipse" }, "Ellipse"),
    );
    const fields = [
      number(Math.round(width / 4), 0, width - 1),
      number(Math.round(height / 4), 0, height - 1),
      number(Math.max(1, Math.round(width / 2)), 1, width),
      number(Math.max(1, Math.round(height / 2)), 1, height),
    ];
    const draw = (value) => {
      if (!fields.every((field) => field.reportValidity())) return;
      const box = fields.map((field) => field.valueAsNumber);
      this.#once((mask) => mask[shape.value](...box, value));
      this.#tell(`${shape.selectedOptions[0].text} ${value ? "added" : "removed"}.`);
    };
    const row = make(
      "div",
      { class: "row shape" },
      labelledControl("Shape", shape),
      ...["x", "y", "width", "height"].map((name, i) => labelledControl(name, fields[i])),
      button("Add shape", () => draw(1)),
      button("Remove shape", () => draw(0)),
    );
    const byNumbers = make("details", {}, make("summary", {}, "Shapes by numbers"), row);
    byNumbers.addEventListener("toggle", this.#fit);
    return byNumbers;
  }

  // As large as the dialog has room for, at zoom 100.
  #fit = () => {
    const { width, height } = this.#mask;
    // With the room of scroll bars, which would come and go.
    const { offsetWidth, offsetHeight } = this.#stage;
    const zoom = this.#controls.zoom.valueAsNumber / 100;
    const scale = Math.min((offsetWidth - 2) / width, (offsetHeight - 2) / height) * zoom;
    this.#frame.style.setProperty("width", `${Math.max(1, Math.floor(width * scale))}px`);
    this.#frame.style.setProperty("height", `${Math.max(1, Math.floor(height * scale))}px`);
    this.#sizeCursor();
  };

  #setOpacity() {
    this.#canvas.style.setProperty("opacity", this.#controls.opacity.value / 100);
  }

  #sizeCursor() {
    const scale = this.#canvas.clientWidth / this.#mask.width;
    const size = `${Math.max(2, this.#controls.size.valueAsNumber * scale)}px`;
    this.#cursor.style.setProperty("width", size);
    this.#cursor.style.setProperty("height", size);
  }

  #point(event) {
    const box = this.#canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) * this.#mask.width) / box.width,
      y: ((event.clientY - box.top) * this.#mask.height) / box.height,
    };
  }

  // One finger, pen or button paints; two fingers move the picture.
  #listenToPointers() {
    const canvas = this.#canvas;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      event.preventDefault();
      canvas.setPointerCapture(event.pointerId);
      this.#fingers.set(event.pointerId, event);
      if (this.#fingers.size > 1) return this.#abandonStroke();
      this.#mask.begin();
      this.#last = this.#point(event);
      this.#strokeTo(this.#last);
    });
    canvas.addEventListener("pointermove", (event) => {
      this.#moveCursor(event);
      const before = this.#fingers.get(event.pointerId);
      if (!before) return;
      this.#fingers.set(event.pointerId, event);
      if (this.#fingers.size > 1) {
        this.#stage.scrollBy(
          (before.clientX - event.clientX) / 2,
          (before.clientY - event.clientY) / 2,
        );
      } else if (this.#last) {
        const passed = event.getCoalescedEvents?.() ?? [];
        for (const one of [...passed, event]) this.#strokeTo(this.#point(one));
      }
    });
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, (event) => {
        this.#fingers.delete(event.pointerId);
        if (!this.#last) return;
        this.#last = null;
        this.#mask.end();
        this.#showHistory();
      });
    }
    canvas.addEventListener("pointerleave", () => (this.#cursor.hidden = true));
  }

  #abandonStroke() {
    if (!this.#last) return;
    this.#last = null;
    this.#mask.end();
    this.#show(this.#mask.undo());
  }

  #strokeTo(point) {
    const value = this.#controls.paint.checked ? 1 : 0;
    this.#draw(this.#mask.stroke(this.#last, point, this.#controls.size.valueAsNumber, value));
    this.#last = point;
  }

  #moveCursor(event) {
    const box = this.#canvas.getBoundingClientRect();
    this.#cursor.hidden = event.pointerType === "touch";
    this.#cursor.style.setProperty("left", `${event.clientX - box.left}px`);
    this.#cursor.style.setProperty("top", `${event.clientY - box.top}px`);
  }

  #once(change) {
    this.#mask.begin();
    const box = change(this.#mask);
    this.#mask.end();
    this.#show(box);
  }

  #show(box) {
    this.#draw(box);
    this.#showHistory();
  }

  #showHistory() {
    this.#controls.undo.disabled = !this.#mask.canUndo;
    this.#controls.redo.disabled = !this.#mask.canRedo;
    this.#tell("");
  }

  // In magenta, which few pictures have.
  #draw(box) {
    if (!box) return;
    const columns = box.right - box.left;
    const part = this.#context.createImageData(columns, box.bottom - box.top);
    const colours = new Uint32Array(part.data.buffer);
    for (let y = box.top; y < box.bottom; y += 1) {
      for (let x = box.left; x < box.right; x += 1) {
        const i = (y - box.top) * columns + x - box.left;
        colours[i] = this.#mask.pixels[y * this.#mask.width + x] ? 0xffd040ff : 0;
      }
    }
    this.#context.putImageData(part, box.left, box.top);
  }

  #tell(text) {
    this.#message.textContent = text;
  }

  #key(event) {
    const { target } = event;
    const inField = target.matches("input[type=number], select");
    const { size } = this.#controls;
    const key = event.key.toLowerCase();
    if (event.key === "Enter" && !target.matches("button, summary, select")) this.#apply();
    else if ((event.ctrlKey || event.metaKey) && key === "z")
      this.#show(event.shiftKey ? this.#mask.redo() : this.#mask.undo());
    else if ((event.ctrlKey || event.metaKey) && key === "y") this.#show(this.#mask.redo());
    else if (event.ctrlKey || event.metaKey || event.altKey || inField) return;
    else if (key === "[" || key === "]") {
      const step = Math.max(1, Math.round(size.valueAsNumber / 8));
      size.value = size.valueAsNumber + (key === "]" ? step : -step);
      this.#sizeCursor();
    } else if (key === "b" || key === "e")
      this.#controls[key === "b" ? "paint" : "erase"].checked = true;
    else return;
    event.preventDefault();
  }

  #apply() {
    const { width, height, pixels } = this.#mask;
    if (this.#mask.isEmpty) {
      this.#tell(
        "Nothing is painted yet, so nothing would be repainted: paint over what is to change.",
      );
      return;
    }
    const canvas = make("canvas", { width, height });
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    const colours = new Uint32Array(image.data.buffer);
    pixels.forEach((value, i) => (colours[i] = value ? 0xffffffff : 0xff000000));
    context.putImageData(image, 0, 0);
    this.#result = canvas.toDataURL("image/png");
    this.#dialog.close();
  }
}
