// Two pictures over each other, with a slider between them.
import {button, labelledControl, openDialog} from "./dialogs.js";
import {make} from "./dom.js";

// Both are {url, name, width, height, parameters}, where parameters are texts by their names.
export function comparePictures(first, second) {
  let pair = [first, second];
  const split = make("input", { type: "range", min: 0, max: 100, step: 1, value: 50 });
  const stage = make("div", { class: "compare-stage" });
  const names = make("p", { class: "compare-names" });
  const differences = make("div", { class: "compare-differences" });
  const control = labelledControl("Divider", split);

  const move = () => {
    stage.style.setProperty("--split", `${split.value}%`);
    split.setAttribute("aria-valuetext", `${split.value}% of the left picture`);
  };
  const show = () => {
    const [left, right] = pair;
    const image = (picture, side) =>
      make("img", {
        class: side,
        src: picture.url,
        alt: `${side === "left" ? "Left" : "Right"}: ${picture.name}`,
        draggable: "false",
      });
    stage.replaceChildren(
      image(right, "right"),
      image(left, "left"),
      make("span", { class: "divider", "aria-hidden": "true" }),
    );
    names.replaceChildren(
      make("span", {}, make("strong", {}, "Left: "), `${left.name}, ${sizeOf(left)}`),
      make("span", {}, make("strong", {}, "Right: "), `${right.name}, ${sizeOf(right)}`),
    );
    differences.replaceChildren(...tellDifferences(left, right));
    move();
  };
  split.addEventListener("input", move);

  // In the shape of the first; the other is as large as fits into it.
  const aspects = pair.map(({ width, height }) => width / height);
  stage.style.setProperty("aspect-ratio", aspects[0]);
  stage.style.setProperty("--aspect", aspects[0]);
  const drag = (event) => {
    const box = stage.getBoundingClientRect();
    split.value = (100 * (event.clientX - box.left)) / box.width;
    move();
  };
  stage.addEventListener("pointerdown", (event) => {
    stage.setPointerCapture(event.pointerId);
    drag(event);
  });
  stage.addEventListener(
    "pointermove",
    (event) => stage.hasPointerCapture(event.pointerId) && drag(event),
  );

  show();
  const dialog = openDialog(
    "Compare",
    "compare",
    stage,
    make(
      "div",
      { class: "row" },
      control,
      button("Swap sides", () => {
        pair = pair.toReversed();
        show();
      }),
    ),
    names,
    differences,
  );
  dialog.setAttribute("closedby", "any");
  split.focus();
  return dialog;
}

function sizeOf({ width, height }) {
  return `${width} x ${height}`;
}

// The parameters that are not the same in both, as [name, first, second].
function differingParameters(first, second) {
  const names = new Set([...Object.keys(first), ...Object.keys(second)]);
  return [...names]
    .filter((name) => first[name] !== second[name])
    .map((name) => [name, first[name], second[name]]);
}

function tellDifferences(left, right) {
  const rows = differingParameters(left.parameters, right.parameters);
  const told = [];
  if (left.width !== right.width || left.height !== right.height) {
    told.push(
      make(
        "p",
        { class: "hint" },
        "The pictures have different sizes; each is shown as large as fits.",
      ),
    );
  }
  if (!rows.length) return [...told, make("p", {}, "All parameters that are known are the same.")];
  const head = ["Parameter", "Left", "Right"].map((name) => make("th", { scope: "col" }, name));
  const table = make(
    "table",
    {},
    make("caption", {}, "What differs"),
    make("thead", {}, make("tr", {}, ...head)),
    make(
      "tbody",
      {},
      ...rows.map(([name, ...values]) =>
        make(
          "tr",
          {},
          make("th", { scope: "row" }, name),
          ...values.map((value) => make("td", {}, value ?? "-")),
        ),
      ),
    ),
  );
  return [
    ...told,
    make(
      "div",
      { class: "table-scroll", tabindex: 0, role: "region", "aria-label": "What differs" },
      table,
    ),
  ];
}
