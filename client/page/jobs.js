// The jobs of this tab: each is sent once, watched until it ends, and survives a reload.
import {announce, isDataUri, isShowable, make} from "./dom.js";
import {cancel, connection, run, status} from "./api.js";
import {parseJson, writeJson} from "./json.js";

const JOBS_KEY = "sdxl-jobs";
const POLL_MS = { near: 500, far: 1000, queue: 3000, hidden: 10_000, trouble: 30_000 };
const LEAVING_MS = 1000;
const MAX_FINISHED = 20;
const MAX_DONE = 3; // their pictures are in the gallery
export const NOT_WATCHED = "no longer watched";
const ENDED = ["COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"];
const STAGES = {
  base: "base",
  hires: "second pass",
  refiner: "refiner",
  upscale: "upscaling",
  download: "downloading",
  loading: "loading",
};

let jobsElement;
let listElement;
let emptyElement;
let clearButton;
let addFinished = async () => {};
let allJobs = [];

// Shows the jobs in the section, and goes on with those that a reload cut off. `addPictures` gets
// {input, output, jobId, seconds} of each that has ended well: the same again where the page was
// reloaded at just that moment, so it goes by the job's id.
export function openJobs(section, { addPictures }) {
  jobsElement = section;
  addFinished = addPictures;
  listElement = make("ol", { class: "jobs" });
  emptyElement = make("p", { class: "muted" }, "Nothing is being drawn.");
  clearButton = make(
    "button",
    { type: "button", class: "small quiet", hidden: true, onclick: clearFinished },
    "Clear finished",
  );
  jobsElement.append(
    make("div", { class: "section-head" }, make("h2", {}, "Jobs"), clearButton),
    emptyElement,
    listElement,
  );
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) allJobs.forEach((job) => job.wake?.());
  });
  setInterval(() => allJobs.filter((job) => !job.isOver).forEach(showState), 1000);
  for (const kept of keptJobs()) resume(kept);
}

// Queues a job. Resolves to {input, output, jobId, seconds}; rejects with an Error whose message is
// the worker's error, or "cancelled", as it is when the signal is aborted, or NOT_WATCHED.
export function submit(input, { label, signal } = {}) {
  return new Promise((resolve, reject) => {
    const job = {
      key: crypto.randomUUID(),
      label: label ?? labelOf(input),
      input,
      at: connection(),
      jobId: null,
      sentAt: Date.now(),
      resolve,
      reject,
    };
    add(job);
    keep();
    send(job);
    signal?.addEventListener("abort", () => stop(job));
  });
}

function labelOf(input) {
  if (input.prompt) return input.prompt.trim().replace(/\s+/g, " ").slice(0, 120);
  return input.check ? "check" : "a picture without a prompt";
}

async function send(job) {
  try {
    const answer = await run(job.input, job.at);
    job.jobId = answer.id;
    keep();
    announce(`In queue: ${job.label}`);
    follow(job);
    if (job.isUnwanted) stop(job);
  } catch (error) {
    // A page that is left breaks off its requests first: then the next page tells of it.
    if (!error.wasRefused) await pause(job, LEAVING_MS);
    const told = error.wasRefused
      ? error.message
      : `${error.message}. Whether the job has arrived is not known, so it was not sent again.`;
    end(job, { error: told });
  }
}

function resume(kept) {
  const job = { ...kept, resolve() {}, reject() {} };
  add(job);
  if (job.jobId) follow(job);
  else {
    end(job, {
      error:
        "the page was left while this job was being sent; whether it has arrived is not known, " +
        "so it was not sent again",
    });
  }
}

async function follow(job) {
  let failures = 0;
  showState(job);
  while (!job.isOver) {
    try {
      take(job, await status(job.jobId, job.at));
      if (failures) job.trouble = "";
      failures = 0;
    } catch (error) {
      if (job.isOver) return;
      if (error.status === 404) {
        end(job, { error: error.message });
        break;
      }
      failures += 1;
      job.trouble = `${error.message}; trying again`;
      job.retryMs = Math.max(1000 * 2 ** failures, 1000 * (error.retrySeconds ?? 0));
      showState(job);
    }
    if (!job.isOver) await pause(job, pollMs(job, failures));
  }
}

function pollMs(job, failures) {
  if (failures) return Math.min(job.retryMs, POLL_MS.trouble);
  if (document.hidden) return POLL_MS.hidden;
  if (job.at.url.startsWith("http:")) return POLL_MS.near; // this machine
  const waited = Date.now() - job.sentAt;
  return job.state === "IN_QUEUE" && waited > 20_000 ? POLL_MS.queue : POLL_MS.far;
}

// Waits, or until something has happened to the job.
function pause(job, milliseconds) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    job.wake = () => {
      clearTimeout(timer);
      resolve();
    };
  });
}

function take(job, answer) {
  if (job.isOver) return;
  job.state = answer.status;
  // The platform repeats the input while a job runs: what the tab's memory had no room for.
  if (job.isCut && answer.input) {
    job.input = answer.input;
    job.isCut = false;
  }
  if (!ENDED.includes(answer.status)) {
    note(job, answer.output);
    showState(job);
    return;
  }
  const seconds = typeof answer.executionTime === "number" ? answer.executionTime / 1000 : null;
  const error = errorOf(answer);
  end(job, error ? { error } : { output: answer.output, seconds });
}

function errorOf(answer) {
  if (answer.status === "CANCELLED") return "cancelled";
  const told = answer.error ?? answer.output?.error;
  if (answer.status === "COMPLETED" && !told) {
    return answer.output ? "" : "the job has ended without an output";
  }
  if (!told) return answer.status === "TIMED_OUT" ? "the job ran out of time" : "the job failed";
  // What the SDK makes of an exception.
  try {
    return JSON.parse(told).error_message ?? String(told);
  } catch {
    return String(told);
  }
}

function note(job, update) {
  const progress = update?.progress;
  if (progress) {
    job.progress = progress;
    if (typeof progress.percent === "number") {
      job.first ??= { percent: progress.percent, at: performance.now(), stage: progress.stage };
      const passed = progress.percent - job.first.percent;
      if (passed > 0) {
        const perPercent = (performance.now() - job.first.at) / passed / 1000;
        job.doneAt = performance.now() / 1000 + perPercent * (100 - progress.percent);
      }
    }
    if (progress.stage === "download" || progress.stage === "loading") {
      job.first = undefined;
      job.doneAt = undefined;
    }
  }
  if (isDataUri(update?.preview)) {
    job.view.picture.src = update.preview;
    job.view.picture.alt = `Preview of ${job.label}`;
    job.view.picture.hidden = false;
  }
}

async function end(job, { output, seconds, error }) {
  job.isOver = true;
  job.state = error ? (error === "cancelled" ? "cancelled" : "failed") : "done";
  job.error = error;
  job.trouble = "";
  const { picture } = job.view;
  if (error) picture.hidden = true;
  else await deliver(job, { input: job.input, output, jobId: job.jobId, seconds });
  job.isSettled = true;
  keep();
  showState(job);
  showList();
  announce(`${job.state}: ${job.label}`);
  if (error) job.reject(new Error(error));
  else job.resolve({ input: job.input, output, jobId: job.jobId, seconds });
}

async function deliver(job, finished) {
  const { output, seconds } = finished;
  const pictures = [output?.images ?? output?.image_url ?? []].flat();
  const took = seconds === null ? "" : ` in ${seconds.toFixed(1)} s`;
  const count = pictures.length === 1 ? "1 picture" : `${pictures.length} pictures`;
  job.told = pictures.length ? `${count}${took}` : `Done${took}`;
  job.warning = output?.warning;
  const { picture, report } = job.view;
  picture.hidden = !isShowable(pictures[0]);
  if (!picture.hidden) {
    picture.src = pictures[0];
    picture.alt = "";
  }
  if (!pictures.length) {
    report.textContent = writeJson(output, 2);
    report.hidden = false;
    return;
  }
  try {
    await addFinished(finished);
  } catch (error) {
    job.warning = `the gallery could not keep it: ${error.message}`;
  }
}

async function stop(job) {
  if (job.isOver) return;
  if (!job.jobId) {
    job.isUnwanted = true; // until it is known by which id
    return;
  }
  job.isStopping = true;
  showState(job);
  try {
    await cancel(job.jobId, job.at);
    job.wake?.();
  } catch (error) {
    job.trouble = `not cancelled: ${error.message}`;
  }
  job.isStopping = false;
  showState(job);
}

function again(job) {
  submit(job.input, { label: job.label }).catch(() => {});
}

// What is on the page.

function add(job) {
  job.view = makeView(job);
  allJobs.unshift(job);
  listElement.prepend(job.view.item);
  showState(job);
  showList();
}

function dismiss(job) {
  if (!job.isOver) leave(job);
  const next = job.view.item.nextElementSibling ?? job.view.item.previousElementSibling;
  allJobs = allJobs.filter((one) => one !== job);
  job.view.item.remove();
  showList();
  (next?.querySelector("button:not([hidden])") ?? document.getElementById("draw")).focus();
}

// A job whose endpoint does not answer is not asked for any more.
function leave(job) {
  job.isOver = true;
  job.isSettled = true;
  job.wake?.();
  keep();
  job.reject(new Error(NOT_WATCHED));
}

function clearFinished() {
  allJobs.filter((job) => job.isOver).forEach((job) => job.view.item.remove());
  allJobs = allJobs.filter((job) => !job.isOver);
  showList();
  document.getElementById("draw").focus();
}

function showList() {
  const running = allJobs.filter((job) => !job.isOver).length;
  const link = document.getElementById("running");
  link.hidden = running === 0;
  link.textContent = running === 1 ? "1 job" : `${running} jobs`;
  const finished = allJobs.filter((job) => job.isSettled);
  const isDone = (job) => job.state === "done" && !job.warning && job.view.report.hidden;
  const surplus = [...finished.filter(isDone).slice(MAX_DONE), ...finished.slice(MAX_FINISHED)];
  surplus.forEach((job) => job.view.item.remove());
  allJobs = allJobs.filter((job) => !surplus.includes(job));
  emptyElement.hidden = allJobs.length > 0;
  clearButton.hidden = !allJobs.some((job) => job.isOver);
}

function makeView(job) {
  const button = (words, act) =>
    make(
      "button",
      { type: "button", class: "small quiet", "aria-label": `${words}: ${job.label}`, onclick: act },
      words,
    );
  const view = {
    picture: make("img", { class: "job-picture", alt: "", hidden: true }),
    state: make("p", { class: "job-state" }),
    bar: make("progress", { max: 100, "aria-label": `Progress of ${job.label}` }),
    trouble: make("p", { class: "job-trouble", hidden: true }),
    error: make("p", { class: "problem", hidden: true }),
    report: make("pre", { class: "report", hidden: true, tabindex: "0" }),
    cancel: button("Cancel", () => stop(job)),
    again: button("Again", () => again(job)),
    dismiss: button("Dismiss", () => dismiss(job)),
  };
  view.item = make(
    "li",
    { class: "job" },
    view.picture,
    make(
      "div",
      { class: "job-body" },
      make("h3", { class: "job-label", title: job.label }, job.label),
      view.state,
      view.bar,
      view.trouble,
      view.error,
      view.report,
      make("div", { class: "buttons" }, view.cancel, view.again, view.dismiss),
    ),
  );
  return view;
}

function showState(job) {
  const { view } = job;
  view.item.dataset.state = job.isOver ? job.state : "running";
  view.state.textContent = stateWords(job);
  const percent = job.progress?.percent;
  view.bar.hidden = job.isOver;
  if (typeof percent === "number") view.bar.value = percent;
  else view.bar.removeAttribute("value");
  view.trouble.textContent = job.trouble || job.warning || "";
  view.trouble.hidden = !view.trouble.textContent;
  const isFailed = job.state === "failed";
  view.error.textContent = isFailed ? job.error : "";
  view.error.hidden = !isFailed;
  const hadFocus = document.activeElement === view.cancel;
  view.cancel.hidden = job.isOver || !job.jobId;
  view.cancel.disabled = Boolean(job.isStopping);
  view.again.hidden = !job.isOver || Boolean(job.isCut);
  view.dismiss.hidden = !job.isOver && !job.trouble;
  if (hadFocus && job.isOver) view.dismiss.focus();
}

function stateWords(job) {
  if (job.isOver) return { done: job.told, cancelled: "Cancelled", failed: "Failed" }[job.state];
  if (job.isStopping) return "Cancelling";
  if (!job.jobId) return "Sending";
  const waited = Math.round((Date.now() - job.sentAt) / 1000);
  if (job.state !== "IN_PROGRESS") return `In queue, ${waited} s`;
  const { progress } = job;
  if (!progress) return `Started, ${waited} s`;
  if (progress.stage === "loading") return `Loading ${progress.model ?? "the model"}, ${waited} s`;
  const percent = typeof progress.percent === "number" ? `${progress.percent}%` : "";
  if (progress.stage === "download") {
    return ["Downloading", percent].filter(Boolean).join(", ");
  }
  const left = job.doneAt === undefined ? "" : timeLeft(job.doneAt - performance.now() / 1000);
  const steps = progress.steps ? `step ${progress.step} of ${progress.steps}` : "";
  const stage = STAGES[progress.stage] ?? progress.stage;
  return [`Drawing: ${stage}`, steps, percent, left].filter(Boolean).join(", ");
}

function timeLeft(seconds) {
  if (seconds < 1.5) return "about a second left";
  if (seconds < 90) return `about ${Math.round(seconds)} s left`;
  return `about ${Math.round(seconds / 60)} min left`;
}

// What a reload must not lose: jobs that have not ended.

function keep() {
  const open = allJobs.filter((job) => !job.isSettled);
  const texts = open.map((job) => keptText(job, false));
  for (let cut = 0; ; cut += 1) {
    try {
      sessionStorage.setItem(JOBS_KEY, `[${texts.join(",")}]`);
      return;
    } catch {
      if (cut >= open.length) return; // no room at all: nothing can be kept
      // The largest first: without its pictures, which the platform repeats while it runs.
      const largest = texts.reduce((a, text, i) => (text.length > texts[a].length ? i : a), 0);
      texts[largest] = keptText(open[largest], true);
    }
  }
}

function keptText({ key, label, input, at, jobId, sentAt, isCut }, isToCut) {
  const kept = isToCut ? withoutPictures(input) : input;
  return writeJson({ key, label, input: kept, at, jobId, sentAt, isCut: isToCut || isCut });
}

function withoutPictures(value) {
  if (isDataUri(value)) return null;
  if (Array.isArray(value)) return value.map(withoutPictures);
  if (typeof value !== "object" || value === null) return value;
  return Object.fromEntries(
    Object.entries(value).map(([name, inner]) => [name, withoutPictures(inner)]),
  );
}

function keptJobs() {
  try {
    return parseJson(sessionStorage.getItem(JOBS_KEY) ?? "[]").reverse();
  } catch {
    return [];
  }
}
