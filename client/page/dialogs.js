// Controls and modal dialogs.
import {make} from "./dom.js";

export function button(text, onclick, attributes = {}) {
  return make("button", { type: "button", onclick, ...attributes }, text);
}

let labelled = 0;

// A label and its control; the label comes first.
export function labelledControl(text, control) {
  control.id ||= `control-${(labelled += 1)}`;
  return make("span", { class: "labelled" }, make("label", { for: control.id }, text), control);
}

// A modal dialog with a heading, which leaves the page when it is closed.
export function openDialog(title, classes, ...children) {
  const dialog = framedDialog(title, classes, ...children);
  dialog.firstChild.append(button("Close", () => dialog.close()));
  dialog.showModal();
  return dialog;
}

function framedDialog(title, classes, ...children) {
  const heading = make("h2", { id: `dialog-${(labelled += 1)}` }, title);
  const dialog = make(
    "dialog",
    { class: `sheet ${classes}`, "aria-labelledby": heading.id },
    make("header", {}, heading),
    ...children,
  );
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  return dialog;
}

// Asked in a dialog, not by confirm(), which browsers may suppress.
export function confirmed(question, action) {
  return new Promise((resolve) => {
    let answer = false;
    const dialog = framedDialog(
      question,
      "question",
      make(
        "footer",
        {},
        button("Cancel", () => dialog.close()),
        button(
          action,
          () => {
            answer = true;
            dialog.close();
          },
          { class: "danger" },
        ),
      ),
    );
    dialog.addEventListener("close", () => resolve(answer));
    dialog.showModal();
  });
}
