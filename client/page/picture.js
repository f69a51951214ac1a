// What pictures of the gallery are called, and how they and their seeds are shown.
import {megabytes} from "./api.js";
import {isShowable, make} from "./dom.js";
import {writeJson} from "./json.js";

const SEEDS = 2n ** 64n;

// Seeds are texts of digits: numbers lose digits above 2^53.
export function seedText(value) {
  if (typeof value === "bigint" || Number.isSafeInteger(value)) return String(value);
  return typeof value === "string" && /^\d+$/.test(value) ? value : null;
}

export function laterSeed(seed, steps) {
  return ((BigInt(seed) + BigInt(steps)) % SEEDS).toString();
}

// For a request: a number where that holds all digits.
export function seedNumber(text) {
  const seed = BigInt(text);
  return seed <= BigInt(Number.MAX_SAFE_INTEGER) ? Number(seed) : seed;
}

export function nameOf(picture) {
  const what = picture.prompt || picture.fileName || "Picture";
  const short = what.length > 80 ? `${what.slice(0, 79)}…` : what;
  return picture.seed === null ? short : `${short}, seed ${picture.seed}`;
}

// The picture, or words where it is a link that shows none.
export function shownPicture(picture, url, name) {
  const words = () => make("span", { class: "hint" }, `${name}: a link that shows no picture`);
  if (!isShowable(url)) return words();
  const image = make("img", {
    src: url,
    alt: name,
    loading: "lazy",
    decoding: "async",
    draggable: "false",
    referrerpolicy: "no-referrer",
  });
  image.addEventListener("error", () => image.replaceWith(words()));
  return image;
}

// Other tools keep whole programs in their files.
const MAX_SHOWN_CHARACTERS = 20_000;

// A value with the type and the size of each picture in its place.
function withPicturesTold(value) {
  if (typeof value === "string") {
    const [, head, data] = /^(data:[^,]{0,80}),(.*)$/s.exec(value) ?? [];
    return head ? `${head}, ${megabytes((data.length * 3) / 4)}` : value;
  }
  if (Array.isArray(value)) return value.map(withPicturesTold);
  if (typeof value !== "object" || value === null) return value;
  return Object.fromEntries(
    Object.entries(value).map(([key, one]) => [key, withPicturesTold(one)]),
  );
}

export function shownValue(value) {
  const told = withPicturesTold(value);
  const text = typeof told === "string" ? told : writeJson(told);
  if (text.length <= MAX_SHOWN_CHARACTERS) return text;
  return `${text.slice(0, MAX_SHOWN_CHARACTERS)}…`;
}
