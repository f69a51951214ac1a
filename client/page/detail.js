// One picture large, how it was made, and what can be done with it.
import {megabytes} from "./api.js";
import {dataUriOfBlob, saveBlob} from "./blobs.js";
import {button, confirmed, openDialog} from "./dialogs.js";
import {make} from "./dom.js";
import {PROMPT_FIELDS, withoutCutPictures} from "./file_metadata.js";
import {writeJson} from "./json.js";
import {paintMask} from "./mask_painter.js";
import {laterSeed, nameOf, seedNumber, shownPicture, shownValue} from "./picture.js";
import {curlOf, fileNameOf, pythonOf} from "./snippets.js";

// They say how the answer comes, or where to, not what is drawn.
const OF_ONE_ANSWER = ["upload_urls", "check"];
// For this page alone.
const OF_THE_PAGE = ["preview"];
const NO_MASK = ["mask_url", "mask_from_alpha", "mask_invert"];

export class Detail {
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
    image.addEventListener("load", () => {
      const bytes = picture.blob ? `, ${megabytes(picture.bytes)}` : "";
      size.textContent = `${image.naturalWidth} x ${image.naturalHeight} pixels${bytes}`;
    });
    this.#dialog = openDialog(
      name,
      "detail",
      make(
        "div",
        { class: "detail-body" },
        make("figure", {}, image, make("figcaption", {}, size, this.#steps())),
        make(
          "div",
          { class: "detail-side" },
          ...this.#notes(),
          this.#buttons(),
          this.#message,
          this.#parameters(),
          this.#origin(),
          ...this.#infotext(),
        ),
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
    const step = (text, by) =>
      button(text, () => this.#go(by), {
        disabled: this.#owner.neighbour(this.#picture.id, by) === undefined,
      });
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
    const request = withoutCutPictures(this.#input ?? this.#known.request);
    for (const name of OF_ONE_ANSWER) delete request[name];
    delete request.num_images;
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
    if (link)
      notes.push(
        "The answer had a link, and only that is kept here: when it ends, the picture is gone. What the file tells of it is read when a copy is kept.",
      );
    if (source) notes.push(`Copied from ${new URL(source).origin}.`);
    if (blob && !fromFile)
      notes.push(
        this.#input
          ? "The file does not tell how it was made; this is what was asked for."
          : "The file does not tell how it was made.",
      );
    if (fromFile && missing.length)
      notes.push(
        `Not in the file: ${missing.join(", ")}. Load it into the form and add what is missing.`,
      );
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
      act(
        "Next seed",
        () => this.#draw({ ...this.#request, seed: seedNumber(laterSeed(picture.seed, 1)) }),
        again,
      ),
      act("Load into form", () => this.#fill(this.#request, "It is in the form."), nothing),
      act("Use as input", () => this.#useAsInput()),
      act("Paint mask", () => this.#paint()),
      act("Compare with the next", () => this.#owner.compareWithNext(picture), {
        disabled:
          (this.#owner.neighbour(picture.id, 1) ?? this.#owner.neighbour(picture.id, -1)) ===
          undefined,
      }),
      act("Download", () => this.#download()),
      act("Copy parameters", () => this.#copy(known.infotext || writeJson(this.#request, 2)), {
        disabled: !known.infotext && nothing.disabled,
      }),
      act("Copy as curl", () => this.#copy(curlOf(this.#url(), this.#alone)), nothing),
      act("Copy as Python", () => this.#copy(pythonOf(this.#url(), this.#alone)), nothing),
      ...(picture.link ? [act("Keep a copy", () => this.#keep())] : []),
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
    const first = Object.fromEntries(
      PROMPT_FIELDS.filter((name) => name in request).map((name) => [name, request[name]]),
    );
    const rows = Object.entries({ ...first, ...request, ...about }).map(([name, value]) =>
      make(
        "tr",
        {},
        make("th", { scope: "row" }, name),
        make(
          "td",
          {},
          shownValue(value),
          ...(completed.includes(name)
            ? [" ", make("span", { class: "badge" }, "not in the file")]
            : []),
        ),
      ),
    );
    if (!rows.length) return make("p", {}, "Nothing is known of how it was made.");
    const caption = completed.length
      ? "Parameters; what the file leaves out is from this browser"
      : "Parameters, from the file";
    return make("table", {}, make("caption", {}, caption), make("tbody", {}, ...rows));
  }

  #origin() {
    const { time, seconds, jobId, fileName } = this.#picture;
    const when = new Date(time).toLocaleString();
    const took = seconds ? ` in ${seconds.toFixed(1)} s` : "";
    const words = fileName ? `Added ${when} from ${fileName}` : `Drawn ${when}${took}, job ${jobId}`;
    return make("p", { class: "hint" }, words);
  }

  #infotext() {
    const { infotext } = this.#known;
    return infotext
      ? [make("details", {}, make("summary", {}, "As text"), make("pre", {}, infotext))]
      : [];
  }

  #url() {
    return this.#actions.connection().url || "https://api.runpod.ai/v2/ENDPOINT_ID";
  }

  // Jobs that fail are told where the jobs are.
  #draw(request) {
    this.#actions
      .submit(request)
      .catch((error) => this.#owner.tell(`Not drawn: ${error.message}`, "warning"));
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
    const image = await this.#source();
    this.#fill(
      { ...this.#formWithout(...NO_MASK), image_url: image, mode: "img2img" },
      "It is the form's input picture now.",
    );
    this.#actions.setPicture("image_url", image);
  }

  async #paint() {
    const image = await this.#source();
    if (this.#picture.link)
      throw new Error("keep a copy first: a page may not paint on another site's picture");
    const mask = await paintMask(image, null);
    if (mask === null) return;
    this.#fill(
      { ...this.#formWithout(...NO_MASK), image_url: image, mask_url: mask, mode: "img2img" },
      "Picture and mask are in the form.",
    );
    this.#actions.setPicture("mask_url", mask);
  }

  #download() {
    const { blob, fileName, seed, link } = this.#picture;
    if (blob)
      return saveBlob(blob, fileName ?? fileNameOf(this.#known.request.prompt, seed, blob.type));
    globalThis.open(link, "_blank", "noopener,noreferrer");
  }

  async #keep() {
    try {
      await this.#owner.keep(this.#picture);
    } catch (error) {
      const reason = error instanceof TypeError ? "its server lets no page read it" : error.message;
      throw new Error(
        `${reason}. Download opens it in a new tab; save it there and drop the file here.`,
      );
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
      this.#message.replaceChildren(
        "The browser does not let the page copy. Copy it from here: ",
        area,
      );
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
