// The gallery: every picture that was drawn or dropped here, with what can be done with it.
import {megabytes} from "./api.js";
import {blobOfDataUri, loadImage} from "./blobs.js";
import {comparePictures} from "./compare.js";
import {Detail} from "./detail.js";
import {button, confirmed} from "./dialogs.js";
import {isDataUri, make} from "./dom.js";
import {describePicture, readTexts} from "./file_metadata.js";
import {laterSeed, nameOf, seedText, shownPicture, shownValue} from "./picture.js";
import {PictureStore} from "./store.js";

const PAGE_SIZE = 24;
const PICTURE_TYPES = ["image/png", "image/jpeg", "image/webp"];

let gallery = null;
let opened;
const whenOpened = new Promise((resolve) => (opened = resolve));

// Shows the pictures that are kept in this browser in a section. `actions` are the page's:
// {fillForm, readInput, setPicture, submit, connection}.
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
    this.#notice = make("div", {
      class: "notices",
      role: "log",
      "aria-label": "Messages of the gallery",
    });
    this.#list = make("ul", { class: "pictures" });
    this.#pager = make("nav", { class: "pager", "aria-label": "Pages of the gallery" });
    this.#compare = button("Compare two", () => this.#compareChosen());
    this.#deleteAll = button("Delete all", () => this.#removeAll(), { class: "danger" });
    const file = make("input", {
      type: "file",
      multiple: true,
      accept: PICTURE_TYPES.join(),
      id: "gallery-files",
    });
    file.addEventListener("change", async () => {
      await this.addFiles([...file.files]);
      file.value = "";
    });
    const adding = make("label", { for: file.id }, "Add files");
    this.#section.replaceChildren(
      make(
        "div",
        { class: "section-head" },
        make("h2", {}, "Gallery"),
        make(
          "div",
          { class: "row" },
          make("span", { class: "file-choice" }, file, adding),
          this.#compare,
          this.#deleteAll,
        ),
      ),
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
    const images = Array.isArray(output?.images)
      ? output.images
      : [output?.image_url].filter(Boolean);
    const first = seedText(output?.seed);
    const time = Date.now();
    let added = 0;
    // Of control pictures, after what was drawn: no seed makes them.
    const maps = Array.isArray(output?.maps) ? output.maps : [];
    for (const [index, image] of [...images, ...maps].entries()) {
      const map = index - images.length;
      const isMap = map >= 0;
      const picture = {
        id: isMap ? `${jobId}/map-${map}` : `${jobId}/${index}`,
        // The first of a job is the first in the gallery as well.
        time: time - index / 1000,
        bytes: 0,
        jobId,
        index,
        seconds,
        prompt: isMap ? `map ${map + 1} of ${input?.prompt || jobId}` : (input?.prompt ?? ""),
        seed: isMap || first === null ? null : laterSeed(first, index),
        warning: output.warning ?? null,
      };
      if (/^https?:\/\//i.test(image)) picture.link = image;
      else {
        try {
          if (!isDataUri(image)) throw new Error("no picture");
          picture.blob = blobOfDataUri(image);
        } catch {
          this.#tell(
            `Picture ${index + 1} of job ${jobId} is neither a picture nor a link, and was left out.`,
            "warning",
          );
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
    await whenOpened;
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
      const picture = {
        id,
        time: Date.now(),
        bytes: blob.size,
        jobId: id,
        index: 0,
        prompt: "",
        seed,
        fileName: file.name,
        warning: null,
        blob,
      };
      if (await this.#store.add(picture, null)) added += 1;
      else this.#tell(`${file.name} was not added: it is here already.`, "warning");
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
    const visible = await this.#store.get(
      listed.slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE).map(({ id }) => id),
    );
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
      this.#summary.textContent =
        "No pictures yet. Those that are drawn stay here, in this browser; drop files here to read how they were made.";
      return;
    }
    const bytes = this.#listed.reduce((sum, picture) => sum + picture.bytes, 0);
    const { quota, usage } = (await navigator.storage?.estimate?.().catch(() => ({}))) ?? {};
    const room = quota
      ? `; the browser has room for about ${storageWords(Math.max(0, quota - usage))} more`
      : "";
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
      this.#tiles.set(
        picture.id,
        isSame ? known : { isLink: Boolean(picture.link), element: this.#tile(picture) },
      );
    }
    const items = [...this.#tiles.values()].map(({ element }) => element);
    for (const item of [...this.#list.children]) if (!items.includes(item)) item.remove();
    items.forEach((item, i) => {
      if (this.#list.children[i] !== item)
        this.#list.insertBefore(item, this.#list.children[i] ?? null);
    });
  }

  #tile(picture) {
    const name = nameOf(picture);
    const opening = button("", () => this.#open(picture.id), { class: "open-picture" });
    opening.append(shownPicture(picture, this.#urlOf(picture), name));
    const choice = make("input", {
      type: "checkbox",
      checked: this.#chosen.has(picture.id),
      "aria-label": `Compare ${name}`,
    });
    choice.addEventListener("change", () => {
      if (choice.checked) this.#chosen.add(picture.id);
      else this.#chosen.delete(picture.id);
      this.#showChoice();
    });
    const caption =
      picture.seed === null ? (picture.fileName ?? "picture") : `seed ${picture.seed}`;
    return make(
      "li",
      { class: "tile" },
      opening,
      make(
        "label",
        { class: "choice" },
        choice,
        make("span", {}, caption),
        ...(picture.link ? [make("span", { class: "badge" }, "link")] : []),
      ),
    );
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

  // A sentence that stays until it is put away, a note until the next one; problems look different.
  #tell(text, kind = "note") {
    if (kind === "note") for (const old of this.#notice.querySelectorAll(".note")) old.remove();
    const note = make(
      "p",
      { class: kind },
      text,
      " ",
      button("Dismiss", () => note.remove(), { "aria-label": `Dismiss: ${text}` }),
    );
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
    const answer = await fetch(picture.link, {
      referrerPolicy: "no-referrer",
      credentials: "omit",
    });
    if (!answer.ok) throw new Error(`the server answers with ${answer.status}`);
    const blob = await answer.blob();
    if (!blob.type.startsWith("image/"))
      throw new Error(`it is no picture but ${blob.type || "of no known type"}`);
    const { link, ...rest } = picture;
    await this.#store.replace({
      ...rest,
      blob,
      bytes: blob.size,
      source: link,
      seed: (await this.#seedOfFile(blob)) ?? picture.seed,
    });
    await this.#refresh();
  }

  async #removeAll() {
    const count = this.#listed.length;
    if (
      !(await confirmed(
        `Delete ${count === 1 ? "the picture" : `all ${count} pictures`} from this browser?`,
        "Delete all",
      ))
    )
      return;
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
          const { request, about } = describePicture(
            picture.blob ? await readTexts(picture.blob) : {},
            input,
          );
          const parameters = Object.fromEntries(
            Object.entries({
              ...about,
              ...request,
              ...(picture.seed && { seed: picture.seed }),
            }).map(([name, value]) => [name, shownValue(value)]),
          );
          return {
            url,
            name: nameOf(picture),
            width: image.naturalWidth,
            height: image.naturalHeight,
            parameters,
          };
        }),
      );
      comparePictures(...sides).addEventListener("close", () =>
        urls.forEach((url) => URL.revokeObjectURL(url)),
      );
    } catch (error) {
      urls.forEach((url) => URL.revokeObjectURL(url));
      this.#tell(`The pictures cannot be compared: ${error.message}.`, "warning");
    }
  }
}

function storageWords(bytes) {
  return bytes < 1e9 ? megabytes(bytes) : `${(bytes / 1e9).toFixed(1)} GB`;
}
