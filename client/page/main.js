// Wires the page together.
import {connection, connectionOf, health, keepConnection, restoreConnection} from "./api.js";
import {announce, make} from "./dom.js";
import {buildForm, checkForm, fillForm, fillFormFromText, formRevision, formText, readInput, setPicture, showErrors, takePicture} from "./form.js";
import {addPictures, openGallery} from "./gallery.js";
import {openGrid} from "./grid.js";
import {NOT_WATCHED, openJobs, submit} from "./jobs.js";
import {paintMask} from "./mask_painter.js";
import {loadSchema, propertiesOf} from "./schema.js";

const FORM_KEY = "sdxl-form";
const THEME_KEY = "sdxl-theme";
const SAVE_MS = 300;

const byId = (id) => document.getElementById(id);

async function start() {
  openTheme();
  if (!("rawJSON" in JSON)) throw new Error("this browser is too old for seeds of 20 digits");
  const schema = await loadSchema();
  const form = byId("form");
  buildForm(form, schema, { paintMask });
  openDrawing(form);
  openReset(form);
  keepForm(form);
  await restoreConnection();
  openConnection();
  const actions = {
    fillForm,
    readInput,
    setPicture,
    submit,
    connection,
    propertiesOf: () => propertiesOf(schema),
  };
  await openGallery(byId("gallery"), actions);
  openGrid(byId("grid"), actions);
  openJobs(byId("jobs"), { addPictures });
  document.documentElement.dataset.ready = "true";
}

function openDrawing(form) {
  const isApple = /mac|iphone|ipad/i.test(navigator.platform);
  if (isApple) form.querySelector(".keys").textContent = "⌘ + Enter draws";
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    draw();
  });
  // The second click of a double click is no second job.
  byId("draw").addEventListener("click", (event) => {
    if (event.detail > 1) event.preventDefault();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    const isToDraw = event.ctrlKey || event.metaKey;
    if (isToDraw && !event.repeat && !document.querySelector("dialog[open]")) {
      event.preventDefault();
      draw();
    } else if (!isToDraw && form.contains(event.target) && event.target.matches("input")) {
      event.preventDefault(); // a number that is confirmed is no order for a picture
    }
  });
  for (const name of ["paste", "drop"]) {
    document.addEventListener(name, (event) => {
      if (!event.defaultPrevented && !document.querySelector("dialog[open]")) takePicture(event);
    });
  }
  // A file that is dropped beside everything would take the place of the page.
  for (const name of ["dragover", "drop"]) {
    document.addEventListener(name, (event) => {
      if (event.dataTransfer.types.includes("Files")) event.preventDefault();
    });
  }
}

async function draw() {
  if (!checkForm()) return;
  if (!connection().url) {
    openConnectionDialog();
    return;
  }
  const revision = formRevision();
  try {
    await submit(readInput());
  } catch (error) {
    if (["cancelled", NOT_WATCHED].includes(error.message)) return;
    // Whoever has gone on typing keeps the focus.
    showErrors(error.message, { focus: revision === formRevision() });
  }
}

// The first press empties the form, a second one takes that back.
function openReset(form) {
  const button = byId("reset");
  let before = null;
  const forget = () => {
    before = null;
    button.textContent = "Reset";
  };
  button.addEventListener("click", () => {
    if (before) {
      fillForm(before);
      forget();
      announce("The form is as it was");
      return;
    }
    const entered = readInput();
    fillForm({});
    before = entered;
    button.textContent = "Undo reset";
    announce("The form is empty");
  });
  form.addEventListener("input", forget);
}

// A reload leaves the form as it was.
function keepForm(form) {
  try {
    const kept = sessionStorage.getItem(FORM_KEY);
    if (kept) fillFormFromText(kept);
  } catch {
    sessionStorage.removeItem(FORM_KEY);
  }
  const save = () => {
    try {
      sessionStorage.setItem(FORM_KEY, formText());
    } catch {
      sessionStorage.removeItem(FORM_KEY); // no room: rather nothing than an old one
    }
  };
  let timer;
  form.addEventListener("formchange", () => {
    clearTimeout(timer);
    timer = setTimeout(save, SAVE_MS);
  });
  addEventListener("pagehide", save);
}

function openTheme() {
  const select = byId("theme");
  const show = (theme) => {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    select.value = theme;
  };
  try {
    show(localStorage.getItem(THEME_KEY) ?? "");
  } catch {
    show(""); // a browser that keeps nothing
  }
  select.addEventListener("change", () => {
    show(select.value);
    try {
      localStorage.setItem(THEME_KEY, select.value);
    } catch {
      // it holds until the page is left
    }
  });
}

function openConnection() {
  const dialog = byId("connection");
  const told = byId("connection-told");
  byId("endpoint").addEventListener("click", openConnectionDialog);
  byId("connection-close").addEventListener("click", () => dialog.close());
  byId("connection-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    told.classList.remove("problem");
    try {
      const typed = connectionOf(byId("connection-url").value, byId("connection-key").value);
      told.textContent = "Asking the endpoint.";
      const words = workersWords(await health(typed));
      keepConnection(typed);
      showConnection({ words, isUp: true });
      announce(`Connected: ${words}`);
      dialog.close();
    } catch (error) {
      told.classList.add("problem");
      told.textContent = error.message;
    }
  });
  showConnection();
  if (!connection().url) return;
  health().then(
    (state) => showConnection({ words: workersWords(state), isUp: true }),
    ({ status, message }) =>
      showConnection({ words: [401, 403].includes(status) ? "wrong key" : "no answer", message }),
  );
}

function openConnectionDialog() {
  const { url, apiKey } = connection();
  byId("connection-url").value = url;
  byId("connection-key").value = apiKey;
  byId("connection-told").textContent = "";
  byId("connection").showModal();
}

function showConnection({ words = "", message = "", isUp = false } = {}) {
  const { url } = connection();
  const name = url.split("/").at(-1);
  byId("endpoint").replaceChildren(
    make("span", { class: "dot", "data-on": isUp }),
    make("span", { class: "name" }, url ? name : "Connect an endpoint"),
    ...(words ? [make("span", { class: isUp ? "muted" : "problem", title: message }, words)] : []),
  );
}

function workersWords({ workers = {} } = {}) {
  const { idle = 0, running = 0, initializing = 0 } = workers;
  const parts = [
    idle + running && `${idle + running} worker${idle + running > 1 ? "s" : ""}`,
    initializing && `${initializing} starting`,
  ].filter(Boolean);
  return parts.join(", ") || "no worker yet";
}

start().catch((error) => {
  byId("fields").replaceChildren(make("p", { class: "problem", role: "alert" }, error.message));
});
