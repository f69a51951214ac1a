// The form, built from the schema. What was typed is sent; an empty control leaves its field out.
import {dataUriOfBlob} from "./blobs.js";
import {announce, isDataUri, isShowable, make, renderText} from "./dom.js";
import {numberOf, problemOf, propertiesOf, requiredFields} from "./schema.js";
import {parseJson, writeJson} from "./json.js";
import {megabytes} from "./api.js";

// What the page asks for where nobody has said otherwise. Its pictures are all in `images`.
const PAGE_DEFAULTS = { preview: true, duplicate_first: false };

const FIRST = [
  ...["prompt", "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale"],
  ...["seed", "num_images"],
];
// Each field is in the first group that names or takes it.
const GROUPS = [
  { title: "Sampler", names: ["scheduler", "schedule", "guidance_end", "guidance_rescale"] },
  {
    title: "Refiner",
    names: ["refiner_inference_steps", "refiner_strength", "high_noise_frac"],
    takes: ({ name }) => name.startsWith("refiner_"),
  },
  {
    title: "Picture and mask",
    names: ["image_url", "mode", "strength", "fit", "mask_url"],
    takes: (one) => one.isPicture || one.name.startsWith("mask_"),
  },
  { title: "Control", names: ["controlnet", "return_maps", "ip_adapter"], takes: hasPictures },
  { title: "Larger", names: ["hires", "upscale"] },
  {
    title: "Model and LoRAs",
    names: ["model", "clip_skip"],
    takes: ({ itemProperties }) => Boolean(itemProperties),
  },
  {
    title: "Output",
    names: [
      ...["output_format", "output_quality", "on_too_large", "duplicate_first", "preview"],
      "upload_urls",
    ],
    takes: ({ name }) => name.startsWith("output_"),
  },
  { title: "More", names: [], takes: () => true },
];

// Where a slider ends, of fields whose bounds are far beyond what is usual.
const SLIDER_ENDS = { num_inference_steps: 100, refiner_inference_steps: 100, guidance_scale: 20 };
const MAX_SLIDER_STOPS = 260;
const LONG_TEXT = 5000;

let formElement;
let summaryElement;
let topFields = [];
let leastRequired = [];
let revision = 0;

function hasPictures({ itemProperties = [] }) {
  return itemProperties.some(({ isPicture }) => isPicture);
}

// Fills the form's element with a control for each field of the schema.
// `actions.paintMask(pictureUri, maskUri)` paints a mask; without it there is no such button.
export function buildForm(form, schema, actions = {}) {
  formElement = form;
  const properties = propertiesOf(schema);
  leastRequired = requiredFields(schema);
  topFields = [];
  const fieldsElement = form.querySelector("#fields");
  fieldsElement.replaceChildren();
  const rest = new Map(properties.map((property) => [property.name, property]));
  const take = (names, takes = () => false) => {
    const named = names.map((name) => rest.get(name)).filter(Boolean);
    const others = [...rest.values()].filter((one) => !named.includes(one) && takes(one));
    const taken = [...named, ...others];
    for (const { name } of taken) rest.delete(name);
    return taken.map((property) => {
      const field = makeField(property, property.name);
      topFields.push(field);
      return field.element;
    });
  };
  fieldsElement.append(make("div", { class: "fields first" }, ...take(FIRST)));
  for (const { title, names, takes } of GROUPS) {
    const elements = take(names, takes);
    if (elements.length) fieldsElement.append(makeGroup(title, elements));
  }
  summaryElement = make("div", { class: "summary", role: "alert", tabindex: "-1", hidden: true });
  fieldsElement.append(summaryElement);
  addPaintButton(actions);
  form.addEventListener("input", () => onChange());
  onChange();
}

// What was entered, as a request's input. Integers beyond 2^53 are BigInts.
export function readInput() {
  const input = {};
  for (const field of topFields) {
    const value = field.read();
    if (value !== undefined) input[field.name] = value;
  }
  // Alone, `check` needs no prompt.
  const others = Object.keys(input).filter((name) => !(name in PAGE_DEFAULTS));
  return others.length === 1 && input.check === true ? { check: true } : input;
}

// Shows an input; every other control is emptied. Fields that there are not are told.
export function fillForm(input) {
  clearErrors();
  const known = new Set(topFields.map(({ name }) => name));
  for (const field of topFields) field.fill(input[field.name] ?? undefined);
  const unknown = Object.keys(input).filter((name) => !known.has(name));
  if (unknown.length) showErrors(`not in this form, and left out: ${unknown.join(", ")}`);
  onChange();
}

// Puts a picture, as a data URI or an address, into a field; "" or null takes it out.
export function setPicture(name, dataUri) {
  const field = topFields.find((one) => one.name === name);
  if (!field) throw new Error(`there is no field ${name}`);
  field.fill(dataUri || undefined);
  openAround(field.element);
  field.element.scrollIntoView({ block: "nearest" });
  onChange();
}

// Shows a worker's error: each of its lines at the field that it begins with, the rest above the
// button. The first one gets the focus, unless `focus` is false.
export function showErrors(errorString, { focus = true } = {}) {
  clearErrors();
  let firstControl = null;
  const rest = [];
  for (const line of String(errorString).split("\n").filter(Boolean)) {
    const [, path, words] = /^([\w.[\]]+): (.*)$/s.exec(line) ?? [];
    const control = path ? showAtField(path, words) : null;
    if (control) firstControl ??= control;
    else rest.push(line);
  }
  summaryElement.replaceChildren(...rest.map((line) => make("p", {}, line)));
  summaryElement.hidden = rest.length === 0;
  if (!focus) return;
  const target = firstControl ?? (rest.length ? summaryElement : null);
  if (!target) return;
  openAround(target);
  target.focus({ preventScroll: true });
  target.scrollIntoView({ block: "center" });
  if (firstControl) announce(`Not drawn: ${firstControl.problemText}`);
}

// Marks what breaks the schema's rules, and moves the focus there. Is all well?
export function checkForm() {
  const lines = topFields.flatMap((field) => field.problems());
  const input = readInput();
  if (leastRequired.length && !leastRequired.some((name) => input[name])) {
    const [first, ...others] = leastRequired;
    lines.push(`${first}: required, unless ${others.join(" or ")} is given`);
  }
  showErrors(lines.join("\n"));
  return lines.length === 0;
}

// Grows with each change: has the form been touched since?
export function formRevision() {
  return revision;
}

// Text as an input's JSON, to keep the form over a reload; pictures only where they are small.
export function formText(maxPictureLength = 200_000) {
  return writeJson(withoutLong(readInput(), maxPictureLength));
}

export function fillFormFromText(text) {
  fillForm(parseJson(text));
}

function withoutLong(value, maxLength) {
  if (Array.isArray(value)) return value.map((one) => withoutLong(one, maxLength));
  if (typeof value !== "object" || value === null) return value;
  const kept = Object.entries(value).filter(
    ([, one]) => typeof one !== "string" || one.length <= maxLength,
  );
  return Object.fromEntries(kept.map(([name, one]) => [name, withoutLong(one, maxLength)]));
}

function clearErrors() {
  for (const field of topFields) field.clear();
  summaryElement.hidden = true;
}

function showAtField(path, words) {
  const name = /^\w+/.exec(path)?.[0];
  const field = topFields.find((one) => one.name === name);
  return field ? field.show(path.slice(name.length), words) : null;
}

function openAround(element) {
  for (let one = element; one && one !== formElement; one = one.parentElement) {
    if (one.tagName === "DETAILS") one.open = true;
  }
}

function onChange() {
  revision += 1;
  for (const group of formElement.querySelectorAll("details.group")) {
    const count = topFields.filter(
      (field) => group.contains(field.element) && field.isChanged(),
    ).length;
    const badge = group.querySelector(".count");
    badge.textContent = count ? `${count} set` : "";
  }
  formElement.dispatchEvent(new CustomEvent("formchange"));
}

function makeGroup(title, elements) {
  return make(
    "details",
    { class: "group" },
    make("summary", {}, make("span", {}, title), make("span", { class: "count" })),
    make(
      "fieldset",
      { class: "fields" },
      make("legend", { class: "visually-hidden" }, title),
      ...elements,
    ),
  );
}

// A field: {name, element, read() -> value or undefined, fill(value or undefined), problems() ->
// lines "path: words", show(rest of the path, words) -> the control that has it, clear(),
// isChanged()}.
function makeField(property, path) {
  if (property.isPicture) return pictureField(property, path);
  if (property.itemProperties || property.properties) return objectsField(property, path);
  if (property.isList && property.items) return linesField(property, path);
  if (property.enum) return choiceField(property, path);
  if (property.type === "boolean") return switchField(property, path);
  if (property.type === "integer" || property.type === "number") return numberField(property, path);
  if (property.type === "string") return textField(property, path);
  return jsonField(property, path);
}

let idCount = 0;

// A control with its label, its description behind "?", and room for a problem.
function framed(property, path, control, { beside = [], below = [], isInline = false } = {}) {
  const id = `field-${(idCount += 1)}`;
  control.id = id;
  const hint = make(
    "p",
    { class: "hint", id: `${id}-hint`, hidden: true },
    ...renderText(describe(property)),
  );
  const problem = make("p", { class: "problem", id: `${id}-problem`, hidden: true });
  control.setAttribute("aria-describedby", `${hint.id} ${problem.id}`);
  const label = make("label", { for: id }, ...breakable(property.name));
  const explain = make(
    "button",
    {
      type: "button",
      class: "explain",
      "aria-label": `Explain ${path}`,
      "aria-expanded": "false",
      "aria-controls": hint.id,
      onclick: () => {
        hint.hidden = !hint.hidden;
        explain.setAttribute("aria-expanded", String(!hint.hidden));
      },
    },
    "?",
  );
  const head = isInline
    ? make("div", { class: "field-head inline" }, control, label, explain)
    : make("div", { class: "field-head" }, label, explain);
  const row = isInline ? [] : [make("div", { class: "control" }, control, ...beside)];
  const body = make("div", { class: "field-body" }, ...row, ...below, hint, problem);
  const element = make("div", { class: "field" }, head, body);
  element.dataset.field = property.name;
  const setProblem = (words) => {
    problem.hidden = !words;
    problem.textContent = words;
    control.problemText = words ? `${path}: ${words}` : "";
    if (words) control.setAttribute("aria-invalid", "true");
    else control.removeAttribute("aria-invalid");
  };
  return { element, setProblem, control };
}

// A long name breaks after its underscores.
function breakable(name) {
  return name.split(/(?<=_)/).flatMap((part, i) => (i ? [make("wbr"), part] : [part]));
}

function describe(property) {
  const told = property.description.trim();
  const rule = property.type === "boolean" || property.enum ? "" : property.rule;
  const own = PAGE_DEFAULTS[property.name];
  return [
    told,
    rule && `${rule[0].toUpperCase()}${rule.slice(1)}.`,
    own !== undefined && `On this page ${own ? "on" : "off"} where nothing else is said.`,
  ]
    .filter(Boolean)
    .join(" ");
}

function defaultText(property) {
  const value = property.default;
  if (value === null) return "not set";
  if (value === undefined || value === "") return "";
  return typeof value === "string" ? value : writeJson(value);
}

// What most kinds of fields share. `parse()` gives {value} or {problem}; neither where it is empty.
function simpleField(property, path, frame, parse, fill) {
  const live = () => frame.setProblem(parse().problem ?? "");
  frame.element.addEventListener("input", live);
  frame.element.addEventListener("change", live);
  return {
    name: property.name,
    element: frame.element,
    read: () => parse().value,
    fill: (value) => {
      fill(value);
      frame.setProblem("");
    },
    problems: () => {
      const { problem } = parse();
      return problem ? [`${path}: ${problem}`] : [];
    },
    show: (_, words) => {
      frame.setProblem(words);
      return frame.control;
    },
    clear: () => frame.setProblem(""),
    isChanged: () => {
      const { value, problem } = parse();
      return Boolean(problem) || value !== undefined;
    },
  };
}

function checked(property, value) {
  const problem = problemOf(property, value);
  return problem ? { value, problem } : { value };
}

function textField(property, path) {
  const isLong = property.maxLength >= LONG_TEXT;
  const control = isLong
    ? make("textarea", { rows: property.name === "prompt" ? 3 : 2 })
    : make("input", { type: "text" });
  control.spellcheck = isLong;
  control.autocomplete = "off";
  control.placeholder = defaultText(property);
  const frame = framed(property, path, control);
  const parse = () => (control.value === "" ? {} : checked(property, control.value));
  return simpleField(property, path, frame, parse, (value) => {
    control.value = value ?? "";
  });
}

function numberField(property, path) {
  const isWide = [property.minimum, property.maximum].some((bound) => typeof bound === "bigint");
  const step = property.multipleOf ?? (property.type === "integer" ? 1 : "any");
  const control = isWide
    ? make("input", { type: "text", inputmode: "numeric" })
    : make("input", { type: "number", min: property.minimum, max: property.maximum, step });
  control.autocomplete = "off";
  control.placeholder = defaultText(property);
  const slider = makeSlider(property, control);
  const frame = framed(property, path, control, { beside: slider ? [slider] : [] });
  frame.element.classList.toggle("has-slider", Boolean(slider));
  const rule = `must be ${property.rule}`;
  const parse = () => {
    if (control.validity.badInput) return { problem: rule };
    const text = control.value.trim();
    if (text === "") return {};
    const value = numberOf(property, text);
    return value === undefined ? { problem: rule } : checked(property, value);
  };
  const follow = () => {
    if (slider) slider.value = control.value || String(property.default);
  };
  control.addEventListener("input", follow);
  return simpleField(property, path, frame, parse, (value) => {
    control.value = value === undefined ? "" : String(value);
    follow();
  });
}

// For the pointer alone: the control beside it has the same value, for keys and screen readers.
function makeSlider(property, control) {
  const { minimum, maximum, type, name } = property;
  const end = SLIDER_ENDS[name] ?? maximum;
  if (typeof property.default !== "number" || typeof minimum !== "number") return null;
  if (typeof end !== "number") return null;
  const range = end - minimum;
  const step = property.multipleOf ?? (type === "integer" ? 1 : range <= 1 ? 0.01 : range <= 10 ? 0.05 : 0.5);
  if (range / step > MAX_SLIDER_STOPS) return null;
  const slider = make("input", {
    type: "range",
    min: minimum,
    max: end,
    step,
    tabindex: "-1",
    "aria-hidden": "true",
    value: property.default,
  });
  slider.addEventListener("input", () => {
    control.value = slider.value;
    control.dispatchEvent(new Event("input", { bubbles: true }));
  });
  return slider;
}

function choiceField(property, path) {
  const { names } = property;
  const others = property.enum.filter((one) => !names.includes(one));
  const option = (one) => make("option", { value: writeJson(one) }, String(one));
  const nothing = property.default === null ? "" : defaultText(property);
  const control = make(
    "select",
    {},
    make("option", { value: "" }, nothing ? `${nothing} (default)` : "not set"),
    ...names.map(option),
  );
  if (others.length) {
    control.append(make("optgroup", { label: "Other names of these" }, ...others.map(option)));
  }
  const frame = framed(property, path, control);
  const parse = () => (control.value === "" ? {} : { value: parseJson(control.value) });
  return simpleField(property, path, frame, parse, (value) => {
    control.value = value === undefined ? "" : writeJson(value);
    if (control.selectedIndex >= 0) return;
    // A newer worker's value, as it is: the worker may know it.
    control.append(option(value));
    control.value = writeJson(value);
  });
}

function switchField(property, path) {
  const control = make("input", { type: "checkbox" });
  const given = property.default ?? false;
  const usual = property.name === path ? (PAGE_DEFAULTS[property.name] ?? given) : given;
  control.checked = usual;
  const frame = framed(property, path, control, { isInline: true });
  const parse = () => (control.checked === given ? {} : { value: control.checked });
  const field = simpleField(property, path, frame, parse, (value) => {
    control.checked = value ?? usual;
  });
  return { ...field, isChanged: () => control.checked !== usual };
}

// A list of texts or numbers: one a line.
function linesField(property, path) {
  const control = make("textarea", { rows: 2, placeholder: "one a line" });
  control.spellcheck = false;
  control.autocomplete = "off";
  const frame = framed(property, path, control);
  const { items } = property;
  const isNumber = items.type === "integer" || items.type === "number";
  const parse = () => {
    const lines = control.value.split("\n").map((line) => line.trim()).filter(Boolean);
    if (!lines.length) return {};
    const values = lines.map((line) => (isNumber ? numberOf(items, line) : line));
    const wrong = values.findIndex((one) => one === undefined || problemOf(items, one));
    if (wrong >= 0) return { value: values, problem: `line ${wrong + 1} must be ${items.rule}` };
    return checked(property, values);
  };
  const field = simpleField(property, path, frame, parse, (value) => {
    control.value = (value ?? []).map(String).join("\n");
  });
  const show = (rest, words) => {
    const [, index] = /^\[(\d+)\]/.exec(rest) ?? [];
    return field.show("", index === undefined ? words : `line ${Number(index) + 1} ${words}`);
  };
  return { ...field, show };
}

// What this page has no control for.
function jsonField(property, path) {
  const control = make("textarea", { rows: 2, placeholder: "JSON" });
  control.spellcheck = false;
  const frame = framed(property, path, control);
  const parse = () => {
    if (control.value.trim() === "") return {};
    try {
      return { value: parseJson(control.value) };
    } catch {
      return { problem: "must be JSON, with quotes around text" };
    }
  };
  return simpleField(property, path, frame, parse, (value) => {
    control.value = value === undefined ? "" : writeJson(value, 2);
  });
}

// The fields of an object, in a frame of their own.
function objectField(name, properties, path, legend) {
  const inner = properties.map((one) => makeField(one, `${path}.${one.name}`));
  const element = make(
    "fieldset",
    { class: "fields object" },
    make("legend", {}, legend),
    ...inner.map((field) => field.element),
  );
  element.dataset.field = name;
  const read = () => {
    const object = {};
    for (const field of inner) {
      const value = field.read();
      if (value !== undefined) object[field.name] = value;
    }
    return object;
  };
  return {
    element,
    read,
    fill: (value) => inner.forEach((field) => field.fill(value?.[field.name] ?? undefined)),
    problems: () => {
      const object = read();
      const missing = properties.filter((one) => one.isRequired && !(one.name in object));
      const wrong = inner.flatMap((field) => field.problems());
      return [...missing.map((one) => `${path}.${one.name}: required, ${one.rule}`), ...wrong];
    },
    show: (rest, words) => {
      const name = /^\.(\w+)/.exec(rest)?.[1];
      const field = inner.find((one) => one.name === name) ?? inner[0];
      return field ? field.show(name ? rest.slice(name.length + 1) : "", words) : null;
    },
    clear: () => inner.forEach((field) => field.clear()),
  };
}

// A list of objects: rows that are added and removed. An object is one row, or none.
function objectsField(property, path) {
  const { name, isList } = property;
  const maxItems = isList ? (property.maxItems ?? Infinity) : 1;
  const numbered = (i) => (isList ? `${name} ${i + 1}` : name);
  const id = `field-${(idCount += 1)}`;
  let rows = [];
  const rowsElement = make("div", { class: "rows" });
  const hint = make("p", { class: "hint", id: `${id}-hint` }, ...renderText(property.description));
  const problem = make("p", { class: "problem", id: `${id}-problem`, hidden: true });
  const add = make(
    "button",
    { type: "button", class: "small", "aria-describedby": problem.id },
    isList ? `Add to ${name}` : `Add ${name}`,
  );
  const element = make(
    "fieldset",
    { class: "field list", "aria-describedby": hint.id },
    make("legend", {}, name),
    hint,
    rowsElement,
    add,
    problem,
  );
  element.dataset.field = name;

  const setProblem = (words) => {
    problem.hidden = !words;
    problem.textContent = words;
    add.problemText = words ? `${path}: ${words}` : "";
  };
  const build = (values) => {
    rows = values.map((value, i) => {
      const row = objectField(
        name,
        property.itemProperties ?? property.properties,
        isList ? `${path}[${i}]` : path,
        isList ? numbered(i) : `settings of ${name}`,
      );
      row.fill(value);
      row.element.append(
        make(
          "button",
          {
            type: "button",
            class: "small quiet remove",
            "aria-label": `Remove ${numbered(i)}`,
            onclick: () => remove(i),
          },
          "Remove",
        ),
      );
      return row;
    });
    rowsElement.replaceChildren(...rows.map((row) => row.element));
    add.disabled = rows.length >= maxItems;
  };
  const values = () => rows.map((row) => row.read());
  const remove = (index) => {
    build(values().filter((_, i) => i !== index));
    setProblem("");
    add.focus();
    announce(`Removed ${numbered(index)}`);
    onChange();
  };
  add.addEventListener("click", () => {
    build([...values(), {}]);
    rows.at(-1).element.querySelector("input, textarea, select")?.focus();
    onChange();
  });
  build([]);
  return {
    name,
    element,
    read: () => (rows.length ? (isList ? values() : values()[0]) : undefined),
    fill: (value) => {
      const isObject = typeof value === "object" && value !== null && !Array.isArray(value);
      if (isList) build(Array.isArray(value) ? value.slice(0, maxItems) : []);
      else build(isObject ? [value] : []);
      setProblem("");
    },
    problems: () => rows.flatMap((row) => row.problems()),
    show: (rest, words) => {
      const [whole, index] = (isList ? /^\[(\d+)\]/ : /^()(?=\.)/).exec(rest) ?? [];
      const row = rows[index || 0];
      if (whole !== undefined && row) return row.show(rest.slice(whole.length), words);
      setProblem(words);
      if (!add.disabled) return add;
      const control = rows[0].element.querySelector("input, select, textarea");
      control.problemText = add.problemText;
      return control;
    },
    clear: () => {
      setProblem("");
      rows.forEach((row) => row.clear());
    },
    isChanged: () => rows.length > 0,
  };
}

// A picture: chosen, dropped or pasted, which makes it a data URI, or an address.
function pictureField(property, path) {
  const control = make("input", { type: "text", inputmode: "url", placeholder: "https://..." });
  control.autocomplete = "off";
  control.spellcheck = false;
  let dataUri = "";
  const thumbnail = make("img", { class: "thumbnail", alt: "", hidden: true });
  const told = make("span", { class: "told" });
  const chooser = make("input", { type: "file", accept: "image/*", hidden: true });
  const choose = make(
    "button",
    { type: "button", class: "small", "aria-label": `Choose a file for ${path}` },
    "Choose a file",
  );
  const remove = make(
    "button",
    { type: "button", class: "small quiet", "aria-label": `Remove ${path}`, hidden: true },
    "Remove",
  );
  const buttons = make("div", { class: "buttons" }, choose, remove);
  const zone = make(
    "div",
    { class: "zone" },
    thumbnail,
    make("div", { class: "zone-text" }, told, buttons),
    chooser,
  );
  const frame = framed(property, path, control, { below: [zone] });
  const parse = () => {
    const value = dataUri || control.value.trim();
    return value ? checked(property, value) : {};
  };
  const showPicture = () => {
    const value = parse().problem ? "" : (parse().value ?? "");
    const isShown = isShowable(value);
    thumbnail.hidden = !isShown;
    if (isShown) thumbnail.src = value;
    else thumbnail.removeAttribute("src");
    remove.hidden = !(dataUri || control.value);
    control.placeholder = dataUri ? "the picture below" : "https://...";
    told.textContent = dataUri
      ? `${mediaType(dataUri)}, ${megabytes(Math.ceil((dataUri.length * 3) / 4))}`
      : "Drop or paste a picture here, or";
  };
  const field = simpleField(property, path, frame, parse, (value) => {
    dataUri = isDataUri(value) ? value : "";
    control.value = dataUri ? "" : (value ?? "");
    showPicture();
  });
  const put = async (file) => {
    if (!file.type.startsWith("image/")) {
      frame.setProblem(`must be a picture; ${file.name} is none`);
      return;
    }
    field.fill(await dataUriOfBlob(file));
    announce(`${path}: ${file.name || "a picture"} is here`);
    onChange();
  };
  const takeFrom = (event, data) => {
    const file = [...(data?.files ?? [])].find((one) => one.type.startsWith("image/")) ?? data?.files?.[0];
    if (!file) return false;
    event.preventDefault();
    event.stopPropagation();
    put(file);
    return true;
  };
  thumbnail.addEventListener("load", () => {
    if (dataUri) told.textContent = `${thumbnail.naturalWidth} x ${thumbnail.naturalHeight}, ${mediaType(dataUri)}, ${megabytes(Math.ceil((dataUri.length * 3) / 4))}`;
  });
  thumbnail.addEventListener("error", () => {
    thumbnail.hidden = true;
    if (dataUri) frame.setProblem("is no picture that this browser can show; the worker may read it");
  });
  control.addEventListener("input", () => {
    if (isDataUri(control.value.trim())) field.fill(control.value.trim());
    else if (control.value) dataUri = "";
    showPictureOnly(control, thumbnail, remove, showPicture);
  });
  control.addEventListener("change", showPicture);
  choose.addEventListener("click", () => chooser.click());
  chooser.addEventListener("change", (event) => {
    event.stopPropagation(); // it is not what the field is checked by
    if (chooser.files[0]) put(chooser.files[0]);
    chooser.value = "";
  });
  remove.addEventListener("click", () => {
    field.fill(undefined);
    choose.focus();
    onChange();
  });
  frame.element.classList.add("picture");
  frame.element.addEventListener("paste", (event) => takeFrom(event, event.clipboardData));
  frame.element.addEventListener("dragover", (event) => {
    event.preventDefault();
    frame.element.classList.add("dragging");
  });
  frame.element.addEventListener("dragleave", () => frame.element.classList.remove("dragging"));
  frame.element.addEventListener("drop", (event) => {
    frame.element.classList.remove("dragging");
    if (takeFrom(event, event.dataTransfer)) return;
    const address = event.dataTransfer.getData("text/uri-list").split("\n")[0].trim();
    if (!address) return;
    event.preventDefault();
    field.fill(address);
    onChange();
  });
  showPicture();
  return {
    ...field,
    take: put,
    buttons,
    frame,
    show: (rest, words) => field.show(rest, words),
  };
}

// While an address is typed, nothing is loaded from it.
function showPictureOnly(control, thumbnail, remove, showPicture) {
  if (control.value) {
    thumbnail.hidden = true;
    remove.hidden = false;
  } else showPicture();
}

// A picture that is pasted or dropped anywhere else goes into the first picture field that has none.
export function takePicture(event) {
  const { files } = event.clipboardData ?? event.dataTransfer;
  // What is copied from a text has a picture of itself beside it.
  const text = event.clipboardData?.getData("text/plain");
  if (text && event.target.matches("input, textarea")) return;
  const file = [...files].find((one) => one.type.startsWith("image/"));
  const field = topFields.find((one) => one.take && one.read() === undefined);
  if (!file || !field) return;
  event.preventDefault();
  openAround(field.element);
  field.take(file);
}

function addPaintButton({ paintMask }) {
  const picture = topFields.find(({ name }) => name === "image_url");
  const mask = topFields.find(({ name }) => name === "mask_url");
  if (!paintMask || !picture?.take || !mask?.take) return;
  const paint = async () => {
    const pictureUri = picture.read();
    if (!pictureUri) {
      picture.show("", "a mask is painted on this picture: give it first").focus();
      return;
    }
    try {
      const painted = await paintMask(
        await asDataUri(pictureUri),
        mask.read() ? await asDataUri(mask.read()).catch(() => null) : null,
      );
      if (painted) setPicture("mask_url", painted);
    } catch (error) {
      picture.show("", error.message).focus();
    }
    button.focus();
  };
  const button = make(
    "button",
    { type: "button", class: "small", "aria-label": "Paint mask_url", onclick: paint },
    "Paint",
  );
  mask.buttons.prepend(button);
}

async function asDataUri(value) {
  if (isDataUri(value)) return value;
  try {
    const answer = await fetch(value, { credentials: "omit", referrerPolicy: "no-referrer" });
    if (!answer.ok) throw new Error(String(answer.status));
    return await dataUriOfBlob(await answer.blob());
  } catch {
    throw new Error("this address does not let pages read it; save the picture and choose the file");
  }
}

function mediaType(dataUri) {
  return dataUri.slice(5, dataUri.search(/[;,]/)).replace("image/", "").toUpperCase();
}
