// The gallery: every picture that was drawn or dropped here, with what can be done with it.
import {megabytes} from "./api.js";
import {blobOfDataUri, dataUriOfBlob, loadImage, saveBlob} from "./blobs.js";
import {comparePictures} from "./compare.js";
import {button, confirmed, openDialog} from "./dialogs.js";
import {isShowable, make} from "./dom.js";
import {describePicture, readTexts} from "./file_metadata.js";
import {writeJson} from "./json.js";
import {paintMask} from "./mask_painter.js";
import {curlOf, fileNameOf, pythonOf} from "./snippets.js";
import {PictureStore} from "./store.js";

const PAGE_SIZE = 24;
const SEEDS = 2n ** 64n;
const PICTURE_TYPES = ["image/png", "image/jpeg", "image/webp"];
// They say how the answer comes, or where to, not what is drawn.
const OF_ONE_ANSWER = ["upload_urls", "check"];
// For this page alone.
const OF_THE_PAGE = ["preview"];
const PROMPTS_FIRST = ["prompt", "negative_prompt", "prompt_2", "negative_prompt_2"];
const NO_MASK = ["mask_url", "mask_from_alpha", "mask_invert"];

let gallery = null;
let opened;
const whenOpened = new Promise((resolve) => (opened = resolve));

// Shows the pictures that are kept in this browser in a section. `actions` are the page's:
// {fillForm, readInput, submit, connection}.
export async function openGallery(section, actions) {
  gallery = new Gallery(section, actions);
  await gallery.open();
  opened();
}

// The pictures of a job's answer. Those of a job that are there already are not added again.
export async function addPictures({ input, output, jobId, seconds }) {
  await whenOpened;
  await gallery.addJob({ input, output, jobId, seconds });
}

// Seeds are texts of digits: numbers lose digits above 2^53.
function seedText(value) {
  if (typeof value === "bigint" || Number.isSafeInteger(value)) return String(value);
  return typeof value === "string" && /^\d+$/.test(value) ? value : null;
}

export function laterSeed(seed, steps) {
  return ((BigInt(seed) + BigInt(steps)) % SEEDS).toString();
}

// For a request: a number where that holds all digits.
function seedNumber(text) {
  const seed = BigInt(text);
  return seed <= BigInt(Number.MAX_SAFE_INTEGER) ? Number(seed) : seed;
}

class Gallery {
  #section;
  #actions;
  #store;
  #listed = [];
  #page = 0;
  #chosen = new Set();
  #urls = new Map();
  #tiles = new Map();
  #list;
  #summary;
  #notice;
  #pager;
  #compare;
  #deleteAll;
  #shown = 0;

  constructor(section, actions) {
    this.#section = section;
    this.#actions = actions;
    this.#store = new PictureStore((problem) => this.#tell(problem, "warning"));
  }

  async open() {
    this.#build();
    await this.#store.open(() => this.#refresh());
    await this.#refresh();
  }

  #build() {
    this.#summary = make("p", { class: "stored", role: "status" });
    this.#notice = make("div", { class: "notices", role: "log", "aria-label": "Messages of the gallery" });
    this.#list = make("ul", { class: "pictures" });
    this.#pager = make("nav", { class: "pager", "aria-label": "Pages of the gallery" });
    this.#compare = button("Compare two", () => this.#compareChosen());
    this.#deleteAll = button("Delete all", () => this.#removeAll(), { class: "danger" });
    const file = make("input", { type: "file", multiple: true, accept: PICTURE_TYPES.join(), id: "gallery-files" });
    file.addEventListener("change", async () => {
      await this.addFiles([...file.files]);
      file.value = "";
    });
    const adding = make("label", { for: file.id }, "Add pictures from disk");
    this.#section.replaceChildren(
      make("div", { class: "section-head" }, make("h2", {}, "Gallery"), make("div", { class: "row" }, make("span", { class: "file-choice" }, file, adding), this.#compare, this.#deleteAll)),
      this.#summary,
      this.#notice,
      this.#list,
      this.#pager,
    );
    this.#section.classList.add("gallery");
    this.#section.addEventListener("dragover", (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      this.#section.classList.add("dropping");
    });
    this.#section.addEventListener("dragleave", () => this.#section.classList.remove("dropping"));
    this.#section.addEventListener("drop", (event) => {
      this.#section.classList.remove("dropping");
      if (!event.dataTransfer.files.length) return;
      event.preventDefault();
      this.addFiles([...event.dataTransfer.files]);
    });
  }

  async addJob({ input, output, jobId, seconds }) {
    const images = Array.isArray(output?.images) ? output.images : [output?.image_url].filter(Boolean);
    const first = seedText(output?.seed);
    const time = Date.now();
    let added = 0;
    for (const [index, image] of images.entries()) {
      const picture = {
        id: `${jobId}/${index}`,
        // The first of a job is the first in the gallery as well.
        time: time - index / 1000,
        bytes: 0,
        jobId,
        index,
        seconds,
        prompt: input?.prompt ?? "",
        seed: first === null ? null : laterSeed(first, index),
        warning: output.warning ?? null,
      };
      if (/^https?:\/\//i.test(image)) picture.link = image;
      else {
        try {
          picture.blob = blobOfDataUri(image);
        } catch {
          this.#tell(`Picture ${index + 1} of job ${jobId} is neither a picture nor a link, and was left out.`, "warning");
          continue;
        }
        picture.bytes = picture.blob.size;
        // The file has all digits; the answer's may have passed through a number.
        picture.seed = (await this.#seedOfFile(picture.blob)) ?? picture.seed;
      }
      if (await this.#store.add(picture, input)) added += 1;
    }
    if (added) await this.#refresh();
  }

  async addFiles(files) {
    let added = 0;
    for (const file of files) {
      if (!PICTURE_TYPES.includes(file.type)) {
        this.#tell(`${file.name} was not added: it is no PNG, JPEG or WebP.`, "warning");
        continue;
      }
      const url = URL.createObjectURL(file);
      try {
        await loadImage(url);
      } catch {
        this.#tell(`${file.name} was not added: the picture cannot be read.`, "warning");
        continue;
      } finally {
        URL.revokeObjectURL(url);
      }
      const id = `file/${file.name}/${file.size}/${file.lastModified}`;
      const blob = new Blob([file], { type: file.type });
      const seed = await this.#seedOfFile(blob);
      const picture = { id, time: Date.now(), bytes: blob.size, jobId: id, index: 0, prompt: "", seed, fileName: file.name, warning: null, blob };
      if (await this.#store.add(picture, null)) added += 1;
      else this.#tell(`${file.name} is here already.`);
    }
    if (added) {
      this.#page = 0;
      await this.#refresh();
      this.#tell(added === 1 ? "A picture was added." : `${added} pictures were added.`);
    }
  }

  async #seedOfFile(blob) {
    return seedText(describePicture(await readTexts(blob), null).request.seed);
  }

  async #refresh() {
    const turn = (this.#shown += 1);
    const listed = await this.#store.list();
    const pages = Math.max(1, Math.ceil(listed.length / PAGE_SIZE));
    const page = Math.min(this.#page, pages - 1);
    const visible = await this.#store.get(listed.slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE).map(({ id }) => id));
    if (turn !== this.#shown) return;
    this.#listed = listed;
    this.#page = page;
    const there = new Set(listed.map(({ id }) => id));
    for (const id of this.#chosen) if (!there.has(id)) this.#chosen.delete(id);
    this.#forgetUrls(new Set(visible.map(({ id }) => id)));
    this.#showTiles(visible);
    this.#showPager(pages);
    this.#showChoice();
    await this.#showSummary();
  }

  async #showSummary() {
    const count = this.#listed.length;
    this.#deleteAll.disabled = count === 0;
    if (!count) {
      this.#summary.textContent = "No pictures yet. Those that are drawn stay here, in this browser; drop files here to read how they were made.";
      return;
    }
    const bytes = this.#listed.reduce((sum, picture) => sum + picture.bytes, 0);
    const { quota, usage } = (await navigator.storage?.estimate?.().catch(() => ({}))) ?? {};
    const room = quota ? `; the browser has room for about ${storageWords(Math.max(0, quota - usage))} more` : "";
    this.#summary.textContent = `${count === 1 ? "1 picture" : `${count} pictures`}, ${storageWords(bytes)} in this browser${room}.`;
  }

  #showPager(pages) {
    this.#pager.hidden = pages === 1;
    const go = (step) => async () => {
      this.#page += step;
      await this.#refresh();
      this.#section.scrollIntoView();
    };
    this.#pager.replaceChildren(
      button("Newer", go(-1), { disabled: this.#page === 0 }),
      make("span", { role: "status" }, `Page ${this.#page + 1} of ${pages}`),
      button("Older", go(1), { disabled: this.#page === pages - 1 }),
    );
  }

  // Tiles that stay are left where they are, with the focus that they may have.
  #showTiles(pictures) {
    const before = this.#tiles;
    this.#tiles = new Map();
    for (const picture of pictures) {
      const known = before.get(picture.id);
      const isSame = known && Boolean(picture.link) === known.isLink;
      this.#tiles.set(picture.id, isSame ? known : { isLink: Boolean(picture.link), element: this.#tile(picture) });
    }
    const items = [...this.#tiles.values()].map(({ element }) => element);
    for (const item of [...this.#list.children]) if (!items.includes(item)) item.remove();
    items.forEach((item, i) => {
      if (this.#list.children[i] !== item) this.#list.insertBefore(item, this.#list.children[i] ?? null);
    });
  }

  #tile(picture) {
    const name = nameOf(picture);
    const opening = button("", () => this.#open(picture.id), { class: "open-picture" });
    opening.append(shownPicture(picture, this.#urlOf(picture), name));
    const choice = make("input", { type: "checkbox", checked: this.#chosen.has(picture.id), "aria-label": `Compare ${name}` });
    choice.addEventListener("change", () => {
      if (choice.checked) this.#chosen.add(picture.id);
      else this.#chosen.delete(picture.id);
      this.#showChoice();
    });
    const caption = picture.seed === null ? (picture.fileName ?? "picture") : `seed ${picture.seed}`;
    return make("li", { class: "tile" }, opening, make("label", { class: "choice" }, choice, make("span", {}, caption), ...(picture.link ? [make("span", { class: "badge" }, "link")] : [])));
  }

  #showChoice() {
    this.#compare.disabled = this.#chosen.size !== 2;
    this.#compare.title = this.#chosen.size === 2 ? "" : "Tick two pictures";
  }

  #urlOf(picture) {
    if (picture.link) return picture.link;
    if (!this.#urls.has(picture.id)) this.#urls.set(picture.id, URL.createObjectURL(picture.blob));
    return this.#urls.get(picture.id);
  }

  #forgetUrls(kept) {
    for (const [id, url] of this.#urls) {
      if (kept.has(id)) continue;
      URL.revokeObjectURL(url);
      this.#urls.delete(id);
    }
  }

  // A sentence that stays until it is put away; problems look different.
  #tell(text, kind = "note") {
    const note = make("p", { class: kind }, text, " ", button("Dismiss", () => note.remove(), { "aria-label": `Dismiss: ${text}` }));
    if ([...this.#notice.children].some((one) => one.firstChild.data === text)) return;
    this.#notice.append(note);
    while (this.#notice.children.length > 4) this.#notice.firstChild.remove();
  }

  async #open(id) {
    const [picture] = await this.#store.get([id]);
    if (!picture) return this.#refresh();
    const input = await this.#store.inputOf(picture.jobId);
    const known = describePicture(picture.blob ? await readTexts(picture.blob) : {}, input);
    new Detail(this, this.#actions, picture, input, known);
  }

  // The neighbour of a picture, or undefined at either end.
  neighbour(id, step) {
    const place = this.#listed.findIndex((one) => one.id === id);
    return this.#listed[place + step]?.id;
  }

  async show(id) {
    await this.#open(id);
  }

  tell(text, kind) {
    this.#tell(text, kind);
  }

  async remove(picture) {
    const place = [...this.#tiles.keys()].indexOf(picture.id);
    await this.#store.remove(picture);
    await this.#refresh();
    const next = this.#list.children[place] ?? this.#list.lastChild;
    next?.querySelector("button").focus();
  }

  // A link's picture, fetched and kept. Fails where its server lets no page read it.
  async keep(picture) {
    const answer = await fetch(picture.link, { referrerpolicy: "no-referrer", credentials: "omit" });
    if (!answer.ok) throw new Error(`the server answers with ${answer.status}`);
    const blob = await answer.blob();
    if (!blob.type.startsWith("image/")) throw new Error(`it is no picture but ${blob.type || "of no known type"}`);
    const { link, ...rest } = picture;
    await this.#store.replace({ ...rest, blob, bytes: blob.size, source: link, seed: (await this.#seedOfFile(blob)) ?? picture.seed });
    await this.#refresh();
  }

  async #removeAll() {
    const count = this.#listed.length;
    if (!(await confirmed(`Delete ${count === 1 ? "the picture" : `all ${count} pictures`} from this browser?`, "Delete all"))) return;
    await this.#store.clear();
    this.#page = 0;
    await this.#refresh();
  }

  async #compareChosen() {
    const [first, second] = await this.#store.get([...this.#chosen]);
    if (second) await this.#compareTwo(first, second);
  }

  async compareWithNext(picture) {
    const other = this.neighbour(picture.id, 1) ?? this.neighbour(picture.id, -1);
    const [second] = await this.#store.get([other]);
    if (second) await this.#compareTwo(picture, second);
  }

  async #compareTwo(...pictures) {
    const urls = [];
    try {
      const sides = await Promise.all(
        pictures.map(async (picture) => {
          // Their own: those of the page may be revoked while the dialog is open.
          const url = picture.link ?? URL.createObjectURL(picture.blob);
          if (!picture.link) urls.push(url);
          const image = await loadImage(url);
          const input = await this.#store.inputOf(picture.jobId);
          const { request, about } = describePicture(picture.blob ? await readTexts(picture.blob) : {}, input);
          const parameters = Object.fromEntries(Object.entries({ ...about, ...request, ...(picture.seed && { seed: picture.seed }) }).map(([name, value]) => [name, shownValue(value)]));
          return { url, name: nameOf(picture), width: image.naturalWidth, height: image.naturalHeight, parameters };
        }),
      );
      comparePictures(...sides).addEventListener("close", () => urls.forEach((url) => URL.revokeObjectURL(url)));
    } catch (error) {
      urls.forEach((url) => URL.revokeObjectURL(url));
      this.#tell(`The pictures cannot be compared: ${error.message}.`, "warning");
    }
  }
}

function nameOf(picture) {
  const what = picture.prompt || picture.fileName || "Picture";
  const short = what.length > 80 ? `${what.slice(0, 79)}…` : what;
  return picture.seed === null ? short : `${short}, seed ${picture.seed}`;
}

// The picture, or words where it is a link that shows none.
function shownPicture(picture, url, name) {
  const words = () => make("span", { class: "hint" }, `${name}: a link that shows no picture`);
  if (!isShowable(url)) return words();
  const image = make("img", { src: url, alt: name, loading: "lazy", decoding: "async", draggable: "false", referrerpolicy: "no-referrer" });
  image.addEventListener("error", () => image.replaceWith(words()));
  return image;
}

function storageWords(bytes) {
  return bytes < 1e9 ? megabytes(bytes) : `${(bytes / 1e9).toFixed(1)} GB`;
}

function shownValue(value) {
  if (typeof value === "string") return value.replace(/^(data:[^,]{0,80}),(.*)$/s, (_, head, data) => `${head}, ${megabytes((data.length * 3) / 4)}`);
  return writeJson(value);
}

// One picture large, how it was made, and what can be done with it.
class Detail {
  #owner;
  #actions;
  #picture;
  #input;
  #known;
  #dialog;
  #message = make("p", { class: "message", role: "status" });

  constructor(owner, actions, picture, input, known) {
    this.#owner = owner;
    this.#actions = actions;
    this.#picture = picture;
    this.#input = input;
    this.#known = known;
    const name = nameOf(picture);
    // Its own: the gallery's address ends when its page is turned.
    const url = picture.link ?? URL.createObjectURL(picture.blob);
    const image = shownPicture(picture, url, name);
    const size = make("span", { class: "hint" });
    image.addEventListener("load", () => (size.textContent = `${image.naturalWidth} x ${image.naturalHeight} pixels${picture.blob ? `, ${megabytes(picture.bytes)}` : ""}`));
    this.#dialog = openDialog(
      name,
      "detail",
      make(
        "div",
        { class: "detail-body" },
        make("figure", {}, image, make("figcaption", {}, size, this.#steps())),
        make("div", { class: "detail-side" }, ...this.#notes(), this.#buttons(), this.#message, this.#parameters(), ...this.#infotext()),
      ),
    );
    this.#dialog.setAttribute("closedby", "any");
    this.#dialog.addEventListener("close", () => URL.revokeObjectURL(url));
    this.#dialog.addEventListener("keydown", (event) => {
      if (event.target.matches("textarea, pre")) return;
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "ArrowLeft") this.#go(-1);
      if (event.key === "ArrowRight") this.#go(1);
    });
  }

  #steps() {
    const step = (text, by) => button(text, () => this.#go(by), { disabled: this.#owner.neighbour(this.#picture.id, by) === undefined });
    return make("span", { class: "row" }, step("Newer", -1), step("Older", 1));
  }

  #go(by) {
    const id = this.#owner.neighbour(this.#picture.id, by);
    if (id === undefined) return;
    this.#dialog.close();
    this.#owner.show(id);
  }

  // The request that makes this picture alone; where it was drawn here, as it was sent.
  get #request() {
    const request = { ...(this.#input ?? this.#known.request) };
    for (const name of OF_ONE_ANSWER) delete request[name];
    delete request.num_images;
    for (const name of this.#known.missing) delete request[name];
    if (this.#picture.seed !== null) request.seed = seedNumber(this.#picture.seed);
    return request;
  }

  get #alone() {
    const request = this.#request;
    for (const name of OF_THE_PAGE) delete request[name];
    return request;
  }

  get #isKnown() {
    return this.#known.missing.length === 0 && this.#picture.seed !== null;
  }

  #notes() {
    const { missing, fromFile } = this.#known;
    const { link, source, warning, blob } = this.#picture;
    const notes = [];
    if (warning) notes.push(`The worker's warning: ${warning}`);
    if (link) notes.push("The answer had a link, and only that is kept here: when it ends, the picture is gone. What the file tells of it is read when a copy is kept.");
    if (source) notes.push(`Copied from ${new URL(source).origin}.`);
    if (blob && !fromFile) notes.push(this.#input ? "The file does not tell how it was made; this is what was asked for." : "The file does not tell how it was made.");
    if (fromFile && missing.length) notes.push(`Not in the file: ${missing.join(", ")}. Load it into the form and add what is missing.`);
    return notes.map((text) => make("p", { class: "note" }, text));
  }

  #buttons() {
    const picture = this.#picture;
    const known = this.#known;
    const again = { disabled: !this.#isKnown };
    const nothing = { disabled: Object.keys(this.#request).length === 0 };
    const act = (text, work, attributes) => button(text, () => this.#do(text, work), attributes);
    return make(
      "div",
      { class: "row deeds", role: "group", "aria-label": "Actions" },
      act("Again", () => this.#draw(this.#request), again),
      act("Next seed", () => this.#draw({ ...this.#request, seed: seedNumber(laterSeed(picture.seed, 1)) }), again),
      act("Load into form", () => this.#fill(this.#request, "It is in the form."), nothing),
      act("Use as input", () => this.#useAsInput()),
      act("Paint mask", () => this.#paint()),
      act("Compare with the next", () => this.#owner.compareWithNext(picture), { disabled: (this.#owner.neighbour(picture.id, 1) ?? this.#owner.neighbour(picture.id, -1)) === undefined }),
      act("Download", () => this.#download()),
      ...(picture.link ? [act("Keep a copy", () => this.#keep())] : []),
      act("Copy as curl", () => this.#copy(curlOf(this.#url(), this.#alone)), nothing),
      act("Copy as Python", () => this.#copy(pythonOf(this.#url(), this.#alone)), nothing),
      act("Copy parameters", () => this.#copy(known.infotext || writeJson(this.#request, 2)), { disabled: !known.infotext && nothing.disabled }),
      act("Delete", () => this.#remove(), { class: "danger" }),
    );
  }

  async #do(what, work) {
    this.#message.textContent = "";
    try {
      await work();
    } catch (error) {
      this.#message.textContent = `${what}: ${error.message}`;
    }
  }

  #parameters() {
    const { request, completed, about } = this.#known;
    const first = Object.fromEntries(PROMPTS_FIRST.filter((name) => name in request).map((name) => [name, request[name]]));
    const rows = Object.entries({ ...first, ...request, ...about }).map(([name, value]) =>
      make(
        "tr",
        {},
        make("th", { scope: "row" }, name),
        make("td", {}, shownValue(value), ...(completed.includes(name) ? [" ", make("span", { class: "badge" }, "not in the file")] : [])),
      ),
    );
    if (!rows.length) return make("p", {}, "Nothing is known of how it was made.");
    const caption = completed.length ? "Parameters; what the file leaves out is from this browser" : "Parameters, from the file";
    return make("table", {}, make("caption", {}, caption), make("tbody", {}, ...rows));
  }

  #infotext() {
    const { infotext } = this.#known;
    return infotext ? [make("details", {}, make("summary", {}, "As text"), make("pre", {}, infotext))] : [];
  }

  #url() {
    return this.#actions.connection().url || "https://api.runpod.ai/v2/ENDPOINT_ID";
  }

  // Jobs that fail are told where the jobs are.
  #draw(request) {
    this.#actions.submit(request).catch((error) => this.#owner.tell(`Not drawn: ${error.message}`, "warning"));
    this.#dialog.close();
    this.#owner.tell("A job was added; its picture will be the first here.");
  }

  #fill(input, message) {
    this.#actions.fillForm(input);
    this.#dialog.close();
    this.#owner.tell(message);
    document.getElementById("form")?.scrollIntoView();
  }

  // The file itself, or the address of a link.
  async #source() {
    return this.#picture.link ?? dataUriOfBlob(this.#picture.blob);
  }

  // What the form has, of another picture, without that one's mask.
  #formWithout(...names) {
    const input = { ...this.#actions.readInput() };
    for (const name of names) delete input[name];
    return input;
  }

  async #useAsInput() {
    const picture = { image_url: await this.#source(), mode: "img2img" };
    this.#fill({ ...this.#formWithout(...NO_MASK), ...picture }, "It is the form's input picture now.");
  }

  async #paint() {
    const image = await this.#source();
    if (this.#picture.link) throw new Error("keep a copy first: a page may not paint on another site's picture");
    const mask = await paintMask(image, null);
    if (mask === null) return;
    this.#fill({ ...this.#formWithout(...NO_MASK), image_url: image, mask_url: mask, mode: "img2img" }, "Picture and mask are in the form.");
  }

  #download() {
    const { blob, fileName, seed, link } = this.#picture;
    if (blob) return saveBlob(blob, fileName ?? fileNameOf(this.#known.request.prompt, seed, blob.type));
    globalThis.open(link, "_blank", "noopener,noreferrer");
  }

  async #keep() {
    try {
      await this.#owner.keep(this.#picture);
    } catch (error) {
      const reason = error instanceof TypeError ? "its server lets no page read it" : error.message;
      throw new Error(`${reason}. Download opens it in a new tab; save it there and drop the file here.`);
    }
    this.#dialog.close();
    await this.#owner.show(this.#picture.id);
  }

  async #copy(text) {
    try {
      await navigator.clipboard.writeText(text);
      this.#message.textContent = "Copied.";
    } catch {
      // Where a page may not write to the clipboard, it is there to be copied by hand.
      const area = make("textarea", { readonly: true, rows: 10, "aria-label": "Text to copy" });
      area.value = text;
      this.#message.replaceChildren("The browser does not let the page copy. Copy it from here: ", area);
      area.focus();
      area.select();
    }
  }

  async #remove() {
    if (!(await confirmed("Delete this picture from this browser?", "Delete"))) return;
    this.#dialog.close();
    await this.#owner.remove(this.#picture);
  }
}
