// What a picture's file tells of how it was made: text chunks of PNG; EXIF and XMP of JPEG and WebP.
// Files come from anywhere: what is damaged or too large is skipped, never fatal.
import {parseJson} from "./json.js";

const XMP_NAMESPACE = "urn:sdxl-worker:";
const MAX_TEXT_BYTES = 4_000_000;
export const PROMPT_FIELDS = ["prompt", "negative_prompt", "prompt_2", "negative_prompt_2"];

// The texts of a picture's file by name: request, parameters, model, Software, versions...
export async function readTexts(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  const view = new DataView(bytes.buffer);
  try {
    if (beginsWith(bytes, 0, "\x89PNG")) return await textsOfPng(bytes, view);
    if (beginsWith(bytes, 0, "\xff\xd8")) return textsOfSegments(jpegSegments(bytes, view));
    if (beginsWith(bytes, 0, "RIFF") && beginsWith(bytes, 8, "WEBP")) {
      return textsOfSegments(webpChunks(bytes, view));
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
  }
  return {};
}

// How a picture was made, of its file's texts and of the input that is kept beside it (or null).
// `request` is the file's, with the prompts and pictures that the file leaves out; `completed` names
// what came from the input; `missing` what is nowhere, such as "controlnet[0].image_url"; `about` has
// the other texts that are lines.
export function describePicture(texts, input) {
  let request = null;
  try {
    request = texts.request === undefined ? null : parseJson(texts.request);
  } catch {
    // Not one of this worker's.
  }
  if (typeof request !== "object" || Array.isArray(request)) request = null;
  const completed = [];
  const missing = [];
  const fromFile = request !== null;
  request = { ...request };
  for (const [name, value] of Object.entries(input ?? {})) {
    const isCut = picturesLeftOut(request[name], name).length > 0;
    const isTold = name in request && !isCut;
    const isWanted = PROMPT_FIELDS.includes(name) || isCut || !fromFile;
    if (isTold || !isWanted || value === null || value === "") continue;
    request[name] = value;
    completed.push(name);
  }
  for (const [name, value] of Object.entries(request)) {
    missing.push(...picturesLeftOut(value, name));
  }
  // A file with the prompts has `prompt` even where that is empty.
  const isWithoutPrompts = !("prompt" in request) && fromFile && !input;
  if (isWithoutPrompts || (!request.prompt && !request.image_url)) missing.push("prompt");
  const about = Object.fromEntries(
    Object.entries(texts).filter(([name]) => !["request", "parameters"].includes(name)),
  );
  return {
    request,
    completed,
    missing,
    fromFile,
    about,
    infotext: infotextOf(texts, request, completed),
  };
}

// A1111's text, with the prompts in their lines where the file leaves them out.
function infotextOf({ parameters }, { prompt, negative_prompt: negative }, completed) {
  if (!parameters) return "";
  const lines = [parameters];
  if (negative && completed.includes("negative_prompt"))
    lines.unshift(`Negative prompt: ${negative}`);
  if (prompt && completed.includes("prompt")) lines.unshift(prompt);
  return lines.join("\n");
}

// "data:image/png;base64" without the picture, as files tell of one.
function isCutDataUri(value) {
  return typeof value === "string" && /^data:image\/[^,]*$/i.test(value);
}

// The paths of what is such a one, in a value of that name.
function picturesLeftOut(value, name) {
  if (isCutDataUri(value)) return [name];
  if (Array.isArray(value)) return value.flatMap((one, i) => picturesLeftOut(one, `${name}[${i}]`));
  if (typeof value !== "object" || value === null) return [];
  return Object.entries(value).flatMap(([key, one]) => picturesLeftOut(one, `${name}.${key}`));
}

// A request without the pictures that its file leaves out.
export function withoutCutPictures(value) {
  if (Array.isArray(value)) return value.map(withoutCutPictures);
  if (typeof value !== "object" || value === null) return value;
  const kept = Object.entries(value).filter(([, one]) => !isCutDataUri(one));
  return Object.fromEntries(kept.map(([key, one]) => [key, withoutCutPictures(one)]));
}

function beginsWith(bytes, offset, text) {
  return [...text].every((character, i) => bytes[offset + i] === character.charCodeAt(0));
}

function latin1(bytes) {
  return new TextDecoder("latin1").decode(bytes);
}

function utf8(bytes) {
  return new TextDecoder().decode(bytes);
}

async function textsOfPng(bytes, view) {
  const texts = {};
  for (let offset = 8; offset + 12 <= bytes.length;) {
    const length = view.getUint32(offset);
    const kind = latin1(bytes.subarray(offset + 4, offset + 8));
    const data = bytes.subarray(offset + 8, offset + 8 + length);
    offset += 12 + length;
    if (kind === "IEND") break;
    const end = data.indexOf(0);
    if (!["tEXt", "zTXt", "iTXt"].includes(kind) || end < 1 || length > MAX_TEXT_BYTES) continue;
    const name = latin1(data.subarray(0, end));
    const value = await textOfChunk(kind, data.subarray(end + 1));
    if (value !== null) texts[name] = value;
  }
  return texts;
}

async function textOfChunk(kind, data) {
  if (kind === "tEXt") return latin1(data);
  if (kind === "zTXt") {
    const inflated = await inflate(data.subarray(1));
    return inflated && latin1(inflated);
  }
  const isCompressed = data[0] === 1;
  const language = data.indexOf(0, 2);
  const keyword = data.indexOf(0, language + 1);
  if (language < 0 || keyword < 0) return null;
  const text = data.subarray(keyword + 1);
  const plain = isCompressed ? await inflate(text) : text;
  return plain && utf8(plain);
}

// Null where it is damaged, or larger than any text of a picture.
async function inflate(data) {
  const reader = new Blob([data])
    .stream()
    .pipeThrough(new DecompressionStream("deflate"))
    .getReader();
  const parts = [];
  let size = 0;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      parts.push(value);
      size += value.length;
      if (size > MAX_TEXT_BYTES) {
        await reader.cancel();
        return null;
      }
    }
  } catch {
    return null;
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

// EXIF and XMP: {exif, xmp}, bytes each.
function jpegSegments(bytes, view) {
  const found = {};
  const names = { exif: "Exif\0\0", xmp: "http://ns.adobe.com/xap/1.0/\0" };
  for (let offset = 2; bytes[offset] === 0xff && offset + 4 <= bytes.length;) {
    const marker = bytes[offset + 1];
    if (marker === 0xda) break;
    const length = view.getUint16(offset + 2);
    for (const [kind, name] of Object.entries(names)) {
      if (marker === 0xe1 && beginsWith(bytes, offset + 4, name)) {
        found[kind] = bytes.subarray(offset + 4 + name.length, offset + 2 + length);
      }
    }
    offset += 2 + length;
  }
  return found;
}

function webpChunks(bytes, view) {
  const found = {};
  for (let offset = 12; offset + 8 <= bytes.length;) {
    const kind = latin1(bytes.subarray(offset, offset + 4));
    const length = view.getUint32(offset + 4, true);
    const data = bytes.subarray(offset + 8, offset + 8 + length);
    if (kind === "EXIF") found.exif = beginsWith(data, 0, "Exif\0\0") ? data.subarray(6) : data;
    if (kind === "XMP " && length <= MAX_TEXT_BYTES) found.xmp = data;
    offset += 8 + length + (length % 2);
  }
  return found;
}

function textsOfSegments({ exif, xmp }) {
  return { ...(exif && textsOfExif(exif)), ...(xmp && textsOfXmp(utf8(xmp))) };
}

function textsOfExif(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const isLittle = beginsWith(bytes, 0, "II");
  const texts = {};
  const values = (offset) => {
    const found = new Map();
    for (let i = 0; i < view.getUint16(offset, isLittle); i += 1) {
      const entry = offset + 2 + 12 * i;
      const type = view.getUint16(entry + 2, isLittle);
      const size = view.getUint32(entry + 4, isLittle) * ({ 3: 2, 4: 4, 5: 8 }[type] ?? 1);
      const place = size > 4 ? view.getUint32(entry + 8, isLittle) : entry + 8;
      found.set(view.getUint16(entry, isLittle), bytes.subarray(place, place + size));
    }
    return found;
  };
  const main = values(view.getUint32(4, isLittle));
  const software = main.get(0x0131);
  if (software) texts.Software = latin1(software).replace(/\0+$/, "");
  const pointer = main.get(0x8769);
  if (!pointer || pointer.length < 4) return texts;
  const inner = values(new DataView(pointer.buffer, pointer.byteOffset).getUint32(0, isLittle));
  const comment = inner.get(0x9286);
  if (comment) texts.parameters = textOfUserComment(comment, isLittle);
  return texts;
}

// Two-byte characters are in the file's byte order or in the other one: their zeros tell, as most of
// an infotext is ASCII.
function textOfUserComment(bytes, isLittle) {
  const text = bytes.subarray(8);
  if (!beginsWith(bytes, 0, "UNICODE\0")) return utf8(text).replace(/\0+$/, "");
  const zeros = [0, 0];
  text.forEach((byte, i) => byte || (zeros[i % 2] += 1));
  const inLittle = zeros[0] === zeros[1] ? isLittle : zeros[1] > zeros[0];
  return new TextDecoder(inLittle ? "utf-16le" : "utf-16be").decode(text);
}

function textsOfXmp(text) {
  const parsed = new DOMParser().parseFromString(text.replace(/\0+$/, ""), "application/xml");
  const texts = {};
  for (const one of parsed.getElementsByTagNameNS(XMP_NAMESPACE, "*")) {
    texts[one.localName] = one.textContent;
  }
  return texts;
}
