// A table of pictures over two settings: one job for each cell.
import {loadImage, saveBlob} from "./blobs.js";
import {button, confirmed, labelledControl} from "./dialogs.js";
import {make} from "./dom.js";
import {numberOf, problemOf} from "./schema.js";

const JOBS_AT_ONCE = 3;
const MAX_CELLS = 400;
// From so many jobs on they are started only when confirmed.
const MANY_CELLS = 30;
const REPLACE = "words of the prompt";
// They say how the answer comes, or are one for each picture.
const NOT_COMPARED = [
  ...["preview", "check", "num_images", "on_too_large", "duplicate_first", "return_maps"],
  ...["upload_urls", "embeddings"],
];
const LABEL_PX = 16;
const GAP_PX = 8;

// The values of a text: "20, 30, 40", "1-4", "20:50:10" (steps), '"with, comma"'. Throws an Error
// that says what is wrong.
export function parseAxis(field, text) {
  const parts = splitList(text);
  if (!parts.length) throw new Error(`${field.name}: needs values, such as ${exampleOf(field)}`);
  const values = parts.flatMap((part) => valuesOf(field, part));
  if (values.length > MAX_CELLS)
    throw new Error(
      `${field.name}: ${values.length} values are more than the ${MAX_CELLS} cells of a grid`,
    );
  const seen = new Set();
  for (const value of values) {
    const problem = field.name === REPLACE ? "" : problemOf(field, value);
    if (problem) throw new Error(`${field.name}: ${problem}; got ${value}`);
    if (seen.has(String(value))) throw new Error(`${field.name}: ${value} is there twice`);
    seen.add(String(value));
  }
  return values;
}

function exampleOf(field) {
  if (field.name === REPLACE) return "red, green, blue";
  if (field.type === "boolean") return "true, false";
  if (field.enum) return (field.names ?? field.enum).slice(0, 2).join(", ");
  return field.type === "integer" ? "1, 2, 3 or 1-3 or 10:50:20" : "1, 2.5 or 1:3:0.5";
}

// At commas and line ends; a part in double quotes may hold them ("" is a quote).
function splitList(text) {
  const parts = text.match(/\s*("(?:[^"]|"")*"|[^,\n]*)\s*(?:[,\n]|$)/g) ?? [];
  return parts
    .map((part) => part.replace(/[,\n]$/, "").trim())
    .filter(Boolean)
    .map((part) => (/^".*"$/s.test(part) ? part.slice(1, -1).replaceAll('""', '"') : part));
}

function valuesOf(field, part) {
  if (field.name === REPLACE) return [part];
  if (field.type === "boolean") {
    const value = { true: true, false: false }[part.toLowerCase()];
    if (value === undefined) throw new Error(`${field.name}: must be true or false; got ${part}`);
    return [value];
  }
  if (field.type === "string") return [part];
  const number = "([+-]?\\d+(?:\\.\\d+)?)";
  const [, first, last, step = "1"] =
    RegExp(`^${number}\\s*-\\s*${number}$`).exec(part) ??
    RegExp(`^${number}:${number}:${number}$`).exec(part) ??
    [];
  if (first !== undefined) return range(field, first, last, step, part);
  const value = numberOf(field, part);
  if (value === undefined) throw new Error(`${field.name}: must be ${field.rule}; got ${part}`);
  return [value];
}

// Counted in whole units of the finest digit, so that 0.1 + 0.2 is 0.3 and no seed loses digits.
function range(field, first, last, step, part) {
  const digits = Math.max(...[first, last, step].map((text) => text.split(".")[1]?.length ?? 0));
  const units = (text) => {
    const [whole, fraction = ""] = text.replace(/^[+-]/, "").split(".");
    const size = BigInt(whole + fraction.padEnd(digits, "0"));
    return text.startsWith("-") ? -size : size;
  };
  const [from, to, by] = [first, last, step].map(units);
  if (by <= 0n || to < from)
    throw new Error(`${field.name}: a range goes up, by a step above 0; got ${part}`);
  if ((to - from) / by >= BigInt(MAX_CELLS))
    throw new Error(`${field.name}: ${part} has more than ${MAX_CELLS} values`);
  const values = [];
  for (let value = from; value <= to; value += by) {
    const text = value
      .toString()
      .replace("-", "")
      .padStart(digits + 1, "0");
    const place = text.length - digits;
    values.push(
      numberOf(
        field,
        `${value < 0n ? "-" : ""}${text.slice(0, place)}${digits ? `.${text.slice(place)}` : ""}`,
      ),
    );
  }
  return values;
}

// The inputs of all cells, row by row: [{x, y, input}]. Axes are {field, values}; y may be null.
function cellsOf(base, x, y) {
  const rows = y ? y.values : [null];
  return rows.flatMap((down) =>
    x.values.map((across) => {
      const input = { ...base };
      setCell(input, x, across);
      if (y) setCell(input, y, down);
      return { x: across, y: down, input };
    }),
  );
}

// The first of the words is in the prompt; each takes its place.
function setCell(input, { field, values }, value) {
  if (field.name === REPLACE) {
    input.prompt = input.prompt.replaceAll(values[0], () => value);
    return;
  }
  let holder = input;
  for (const key of field.path.slice(0, -1)) {
    holder[key] = Array.isArray(holder[key]) ? [...holder[key]] : { ...holder[key] };
    holder = holder[key];
  }
  holder[field.path.at(-1)] = value;
}

// The fields that have single values, also inside objects and inside the first one of a list, each
// with the `path` to it.
function scalarsOf(properties) {
  const isScalar = ({ type, isPicture, isList, enum: choices }) =>
    !isPicture && !isList && (["integer", "number", "boolean"].includes(type) || choices);
  const compared = properties.filter(({ name }) => !NOT_COMPARED.includes(name));
  return compared.flatMap((property) => {
    const { name, itemProperties } = property;
    const inside = itemProperties ?? property.properties;
    if (!inside) return isScalar(property) ? [{ ...property, path: [name] }] : [];
    return inside.filter(isScalar).map((one) => ({
      ...one,
      name: `${name}${itemProperties ? "[0]" : ""}.${one.name}`,
      path: [name, ...(itemProperties ? [0] : []), one.name],
    }));
  });
}

// Why the axis does not go with the form's input; "" where it does.
function problemOfAxis({ field, values }, input) {
  if (field.name === REPLACE) {
    return (input.prompt ?? "").includes(values[0])
      ? ""
      : `The prompt does not have "${values[0]}", which is to be replaced.`;
  }
  const [list, place] = field.path;
  return place === 0 && !input[list]?.length ? `Add one to ${list} in the form first.` : "";
}

// Runs `work` on all of a list, so many at once; stops starting when the signal is aborted.
async function inTurns(list, count, signal, work) {
  const waiting = [...list];
  const line = async () => {
    while (waiting.length && !signal.aborted) await work(waiting.shift());
  };
  await Promise.all(Array.from({ length: count }, line));
}

// A grid in a section. `actions` are the page's: {readInput, submit, propertiesOf}.
export function openGrid(section, actions) {
  const scalars = scalarsOf(actions.propertiesOf());
  const prompt = { name: REPLACE, type: "string", rule: "words" };
  new Grid(section, actions, [...scalars, prompt]);
}

class Grid {
  #actions;
  #fields;
  #axes = {};
  #count;
  #start;
  #cancel;
  #save;
  #table;
  #status;
  #stopping = null;
  #drawn = null;

  constructor(section, actions, fields) {
    this.#actions = actions;
    this.#fields = fields;
    this.#count = make("p", { class: "hint", role: "status" });
    this.#status = make("p", { class: "message", role: "status" });
    this.#start = button("Start", () => this.#run(), { class: "primary" });
    this.#cancel = button("Cancel all", () => this.#stopping?.abort(), { disabled: true });
    this.#save = button("Download as one picture", () => this.#download(), { disabled: true });
    this.#table = make("div", {
      class: "table-scroll grid-table",
      tabindex: 0,
      role: "region",
      "aria-label": "Cells of the grid",
      hidden: true,
    });
    const body = make(
      "details",
      {},
      make("summary", {}, "X/Y grid"),
      make(
        "p",
        { class: "hint" },
        "Draws what the form says once for each pair of values. Values are a list (20, 30, 40), a range (1-4), or a range with a step (20:50:10). For words of the prompt, the first is replaced by each.",
      ),
      this.#axisRow("X", "num_inference_steps", false),
      this.#axisRow("Y", "", true),
      this.#count,
      make("div", { class: "row" }, this.#start, this.#cancel, this.#save),
      this.#status,
      this.#table,
    );
    section.classList.add("xy-grid");
    section.replaceChildren(body);
    this.#tellCount();
  }

  #axisRow(axis, chosen, mayBeNone) {
    const select = make(
      "select",
      {},
      ...(mayBeNone ? [make("option", { value: "" }, "nothing")] : []),
      ...this.#fields.map(({ name }) => make("option", { value: name }, name)),
    );
    select.value = this.#fields.some(({ name }) => name === chosen)
      ? chosen
      : select.options[0].value;
    const values = make("input", { type: "text", autocomplete: "off" });
    const changed = () => {
      const field = this.#fieldOf(select.value);
      values.disabled = !field;
      values.placeholder = field ? exampleOf(field) : "";
      this.#tellCount();
    };
    select.addEventListener("change", changed);
    values.addEventListener("input", () => this.#tellCount());
    this.#axes[axis] = { select, values };
    changed();
    return make(
      "div",
      { class: "row axis" },
      labelledControl(`${axis} setting`, select),
      labelledControl(`${axis} values`, values),
    );
  }

  #fieldOf(name) {
    return this.#fields.find((field) => field.name === name);
  }

  // {x, y}: y is null where only one setting changes. Throws what is wrong.
  #readAxes() {
    const [x, y] = ["X", "Y"].map((axis) => {
      const field = this.#fieldOf(this.#axes[axis].select.value);
      return field ? { field, values: parseAxis(field, this.#axes[axis].values.value) } : null;
    });
    if (y && x.field === y.field)
      throw new Error("X and Y are the same setting; choose two, or nothing for Y");
    const cells = x.values.length * (y ? y.values.length : 1);
    if (cells > MAX_CELLS)
      throw new Error(`${cells} pictures are too many; a grid has at most ${MAX_CELLS}`);
    return { x, y, cells };
  }

  #tellCount() {
    if (!this.#axes.Y || this.#stopping) return;
    const isEmpty = !this.#axes.X.values.value.trim();
    let words;
    try {
      const { x, y, cells } = this.#readAxes();
      words = `${x.values.length}${y ? ` x ${y.values.length}` : ""} values: ${cells === 1 ? "1 job" : `${cells} jobs`}, ${JOBS_AT_ONCE} at a time.`;
      this.#start.disabled = false;
    } catch (error) {
      words = isEmpty ? "" : error.message;
      this.#start.disabled = true;
    }
    this.#count.textContent = words;
    this.#count.classList.toggle("problem", this.#start.disabled && !isEmpty);
  }

  async #run() {
    const axes = this.#readAxes();
    const { x, y, cells: count } = axes;
    const base = { ...this.#actions.readInput() };
    delete base.num_images;
    delete base.upload_urls;
    const problem = [x, y].map((axis) => (axis ? problemOfAxis(axis, base) : "")).find(Boolean);
    if (problem) {
      this.#status.textContent = problem;
      return;
    }
    if (count > MANY_CELLS && !(await confirmed(`Start ${count} jobs?`, "Start"))) return;
    const hasSeed = [x, y].some((axis) => axis?.field.name === "seed") || (base.seed ?? -1) !== -1;
    if (!hasSeed) [base.seed] = crypto.getRandomValues(new Uint32Array(1));

    this.#stopping = new AbortController();
    const { signal } = this.#stopping;
    this.#setRunning(true);
    const cells = cellsOf(base, x, y).map((cell) => ({
      ...cell,
      place: make("td", {}, "waiting"),
      picture: null,
    }));
    this.#drawn = { x, y, cells };
    this.#showTable();
    let [done, failed] = [0, 0];
    const tell = (words) => {
      const seed = hasSeed ? "" : ` All with seed ${base.seed}.`;
      this.#status.textContent = `${words}${done} of ${cells.length} drawn${failed ? `, ${failed} failed` : ""}.${seed}`;
    };
    tell("");
    await inTurns(cells, JOBS_AT_ONCE, signal, async (cell) => {
      cell.place.textContent = "drawing";
      try {
        const { output } = await this.#actions.submit(cell.input, {
          label: `grid: ${axisLabel(x, cell.x)}${y ? `, ${axisLabel(y, cell.y)}` : ""}`,
          signal,
        });
        await this.#showPicture(cell, output);
        done += 1;
      } catch (error) {
        failed += 1;
        cell.place.replaceChildren(make("span", { class: "problem" }, error.message));
      }
      tell("");
    });
    for (const { place } of cells)
      if (place.textContent === "waiting") place.textContent = "cancelled";
    tell(signal.aborted ? "Cancelled: " : "Finished: ");
    this.#setRunning(false);
    this.#save.disabled = done === 0;
  }

  #setRunning(isRunning) {
    if (!isRunning) this.#stopping = null;
    this.#start.disabled = isRunning;
    this.#cancel.disabled = !isRunning;
    this.#save.disabled = true;
    for (const { select, values } of Object.values(this.#axes)) {
      select.disabled = isRunning;
      values.disabled = isRunning || !select.value;
    }
    if (!isRunning) this.#tellCount();
  }

  async #showPicture(cell, output) {
    const source = output?.images?.[0] ?? output?.image_url;
    const name = [
      axisLabel(this.#drawn.x, cell.x),
      this.#drawn.y && axisLabel(this.#drawn.y, cell.y),
    ]
      .filter(Boolean)
      .join(", ");
    const isShown = typeof source === "string" && /^(data:image\/|https?:\/\/)/i.test(source);
    if (!isShown) throw new Error("the answer has no picture");
    cell.picture = await loadImage(source);
    cell.picture.alt = name;
    cell.place.replaceChildren(cell.picture);
  }

  #showTable() {
    const { x, y, cells } = this.#drawn;
    const head = make(
      "tr",
      {},
      ...(y ? [make("td", {})] : []),
      ...x.values.map((value) => make("th", { scope: "col" }, String(value))),
    );
    const rows = (y ? y.values : [null]).map((value, row) =>
      make(
        "tr",
        {},
        ...(y ? [make("th", { scope: "row" }, String(value))] : []),
        ...cells
          .slice(row * x.values.length, (row + 1) * x.values.length)
          .map(({ place }) => place),
      ),
    );
    this.#table.replaceChildren(
      make(
        "table",
        {},
        make("caption", {}, this.#title),
        make("thead", {}, head),
        make("tbody", {}, ...rows),
      ),
    );
    this.#table.hidden = false;
  }

  get #title() {
    const { x, y } = this.#drawn;
    return `${x.field.name} across${y ? `, ${y.field.name} down` : ""}`;
  }

  // All cells in their places, as large as they are, under their labels.
  #download() {
    const { x, y, cells } = this.#drawn;
    const pictures = cells.map(({ picture }) => picture).filter(Boolean);
    const width = Math.max(...pictures.map(({ naturalWidth }) => naturalWidth));
    const height = Math.max(...pictures.map(({ naturalHeight }) => naturalHeight));
    const font = Math.max(LABEL_PX, Math.round(width / 24));
    const canvas = make("canvas");
    const context = canvas.getContext("2d");
    context.font = `${font}px sans-serif`;
    const rowLabels = (y ? y.values : []).map(String);
    const margin = Math.ceil(
      Math.max(
        0,
        ...rowLabels.map((label) => Math.min(width, context.measureText(label).width + 2 * GAP_PX)),
      ),
    );
    const top = 4 * font;
    canvas.width = margin + x.values.length * (width + GAP_PX);
    canvas.height = top + (cells.length / x.values.length) * (height + GAP_PX);
    context.fillStyle = "white";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.fillStyle = "black";
    context.font = `${font}px sans-serif`;
    context.textBaseline = "middle";
    context.fillText(this.#title, GAP_PX, font, canvas.width - 2 * GAP_PX);
    context.textAlign = "center";
    x.values.forEach((value, i) =>
      context.fillText(value, margin + i * (width + GAP_PX) + width / 2, 3 * font, width),
    );
    context.textAlign = "left";
    rowLabels.forEach((label, i) =>
      context.fillText(label, GAP_PX, top + i * (height + GAP_PX) + height / 2, margin - GAP_PX),
    );
    cells.forEach(({ picture, place }, i) => {
      const left = margin + (i % x.values.length) * (width + GAP_PX);
      const down = top + Math.floor(i / x.values.length) * (height + GAP_PX);
      if (picture) context.drawImage(picture, left, down);
      else
        context.fillText(place.textContent, left + GAP_PX, down + height / 2, width - 2 * GAP_PX);
    });
    try {
      canvas.toBlob((blob) => {
        if (blob)
          saveBlob(
            blob,
            `grid-${x.field.name}${y ? `-${y.field.name}` : ""}.png`.replaceAll(" ", "-"),
          );
        else this.#status.textContent = "The grid is too large for one picture in this browser.";
      }, "image/png");
    } catch {
      this.#status.textContent =
        "Pictures that the answer only links to cannot be put into one; the gallery has their links.";
    }
  }
}

function axisLabel({ field }, value) {
  return field.name === REPLACE ? value : `${field.name}: ${value}`;
}
