// Pictures as blobs, data URIs and files.
import {make} from "./dom.js";

export function saveBlob(blob, name) {
  const url = URL.createObjectURL(blob);
  const link = make("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

// fetch() of data URIs would need them in connect-src.
export function blobOfDataUri(uri) {
  const [, type, base64, data] = /^data:([^;,]*)[^,]*?(;base64)?,(.*)$/s.exec(uri) ?? [];
  if (data === undefined) throw new Error("not a data URI");
  const binary = base64 ? atob(data) : decodeURIComponent(data);
  return new Blob([Uint8Array.from(binary, (character) => character.charCodeAt(0))], { type });
}

export function dataUriOfBlob(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

export function loadImage(source) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("the picture cannot be read"));
    image.src = source;
  });
}
