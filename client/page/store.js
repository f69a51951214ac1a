// The pictures in the browser: in IndexedDB, and in memory what it does not take.

const DATABASE = "sdxl-gallery";
const STORES = ["pictures", "inputs"];

// Pictures are {id, time, bytes, jobId, index, seed, ...}; inputs, which all pictures of a job share,
// are kept under the job's id. `tell(problem)` is called with a sentence when something is kept in
// memory only.
export class PictureStore {
  #database = null;
  #memory = { pictures: new Map(), inputs: new Map() };
  #tell;
  #channel = null;

  constructor(tell) {
    this.#tell = tell;
  }

  // Never fails: without a database all is kept in memory. `changed` is called after another tab
  // changed something.
  async open(changed) {
    try {
      this.#database = await openDatabase();
      this.#database.onclose = () => this.#lose();
      this.#database.onversionchange = () => this.#lose();
    } catch (error) {
      this.#tell(
        `This browser keeps no pictures here (${reasonOf(error)}). They stay until this tab is closed or loaded again: download what you want to keep.`,
      );
      return;
    }
    if ("BroadcastChannel" in globalThis) {
      this.#channel = new BroadcastChannel(DATABASE);
      this.#channel.onmessage = changed;
    }
  }

  // Another tab, or whoever clears this site's data, has taken the database away.
  #lose() {
    this.#database?.close();
    this.#database = null;
    this.#tell(
      "The browser has closed its storage. Load the page again to see the pictures in it; new ones stay in this tab until then.",
    );
  }

  // Whether the picture is new. One that is there already, by its id, stays as it is.
  async add(picture, input) {
    if (this.#memory.pictures.has(picture.id)) return false;
    if (this.#database) {
      try {
        const added = await this.#change((pictures, inputs) => {
          const adding = pictures.add(picture);
          adding.onsuccess = () => inputs.put(input, picture.jobId);
          return adding;
        });
        if (added) this.#channel?.postMessage("added");
        return added;
      } catch (error) {
        this.#tell(
          `The browser could not store a picture (${reasonOf(error)}). It stays until this tab is closed or loaded again: download it, or delete others to make room.`,
        );
      }
    }
    this.#memory.pictures.set(picture.id, picture);
    this.#memory.inputs.set(picture.jobId, input);
    return true;
  }

  // {id, time, bytes} of all pictures, newest first, without their contents.
  async list() {
    const listed = [...this.#memory.pictures.values()].map(({ id, time, bytes }) => ({
      id,
      time,
      bytes,
    }));
    if (this.#database) {
      const source = this.#database.transaction("pictures").objectStore("pictures").index("byTime");
      await new Promise((resolve, reject) => {
        const walk = source.openKeyCursor();
        walk.onerror = () => reject(walk.error);
        walk.onsuccess = () => {
          const cursor = walk.result;
          if (!cursor) return resolve();
          const [time, bytes] = cursor.key;
          listed.push({ id: cursor.primaryKey, time, bytes });
          cursor.continue();
        };
      });
    }
    return listed.sort((a, b) => b.time - a.time || (a.id < b.id ? -1 : 1));
  }

  // The pictures of these ids that are still there.
  async get(ids) {
    const found = await Promise.all(ids.map((id) => this.#read("pictures", id)));
    return found.filter((picture) => picture !== undefined);
  }

  inputOf(jobId) {
    return this.#read("inputs", jobId);
  }

  // A picture that takes the place of the one of its id.
  async replace(picture) {
    if (this.#memory.pictures.has(picture.id) || !this.#database) {
      this.#memory.pictures.set(picture.id, picture);
    } else {
      await this.#change((pictures) => pictures.put(picture));
    }
  }

  async remove({ id, jobId }) {
    this.#memory.pictures.delete(id);
    if (![...this.#memory.pictures.values()].some((picture) => picture.jobId === jobId)) {
      this.#memory.inputs.delete(jobId);
    }
    if (this.#database) {
      await this.#change((pictures, inputs) => {
        pictures.delete(id);
        const others = pictures.index("byJob").count(jobId);
        others.onsuccess = () => others.result || inputs.delete(jobId);
      });
      this.#channel?.postMessage("removed");
    }
  }

  async clear() {
    for (const kept of Object.values(this.#memory)) kept.clear();
    if (this.#database) {
      await this.#change((...stores) => stores.forEach((store) => store.clear()));
      this.#channel?.postMessage("removed");
    }
  }

  #read(store, key) {
    if (this.#memory[store].has(key)) return this.#memory[store].get(key);
    return (
      this.#database && resultOf(this.#database.transaction(store).objectStore(store).get(key))
    );
  }

  // False where a picture of this id is there already.
  #change(work) {
    return new Promise((resolve, reject) => {
      const transaction = this.#database.transaction(STORES, "readwrite");
      const request = work(...STORES.map((name) => transaction.objectStore(name)));
      transaction.oncomplete = () => resolve(true);
      transaction.onabort = () =>
        request?.error?.name === "ConstraintError"
          ? resolve(false)
          : reject(transaction.error ?? request?.error);
    });
  }
}

function openDatabase() {
  const opening = indexedDB.open(DATABASE, 1);
  opening.onupgradeneeded = () => {
    const pictures = opening.result.createObjectStore("pictures", { keyPath: "id" });
    pictures.createIndex("byTime", ["time", "bytes"]);
    pictures.createIndex("byJob", "jobId");
    opening.result.createObjectStore("inputs");
  };
  return resultOf(opening);
}

function resultOf(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function reasonOf(error) {
  if (error?.name === "QuotaExceededError") return "its storage is full";
  if (error?.name === "SecurityError") return "its settings forbid it";
  return error?.message || error?.name || "it gives no reason";
}
