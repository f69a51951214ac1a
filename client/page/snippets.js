// A request as a command or a program. API keys and pictures stay out of both: they are read from the
// environment and from files.
import {writeJson} from "./json.js";

const PYTHON_MODULES = ["base64", "json", "os", "time", "urllib.request"];
const KEY_VARIABLE = "RUNPOD_API_KEY";
const EXTENSIONS = { "image/jpeg": "jpg", "image/svg+xml": "svg" };

function extensionOf(mediaType) {
  return EXTENSIONS[mediaType] ?? (/^image\/([a-z0-9]+)$/.exec(mediaType)?.[1] || "png");
}

// A name for people: the prompt's words and the seed.
export function fileNameOf(prompt, seed, mediaType) {
  const words = String(prompt ?? "")
    .normalize("NFKD")
    .replace(/[^\p{L}\p{N}]+/gu, " ")
    .trim()
    .toLowerCase()
    .split(" ");
  let slug = "";
  for (const word of words) {
    if (slug.length + word.length > 60) break;
    slug += (slug && "-") + word;
  }
  const name =
    seed === null || seed === undefined ? slug || "picture" : `${slug || "picture"}-${seed}`;
  return `${name}.${extensionOf(mediaType)}`;
}

// Data URIs within an input become files: the input with a mark in the place of each, and the files.
// Names and types may come from a stranger's picture: they must not reach a shell as they are.
function picturesAsFiles(input) {
  const nonce = crypto.getRandomValues(new Uint32Array(4)).join("-");
  const files = [];
  const replaced = (value, name) => {
    if (typeof value === "string") {
      const type = /^data:(image\/[\w.+-]+);base64,/i.exec(value)?.[1];
      if (type === undefined) return value;
      const file = {
        name: `${name.replace(/\W+/g, "_")}.${extensionOf(type)}`,
        prefix: `data:${type};base64,`,
        mark: `picture-${nonce}-${files.length}`,
      };
      files.push(file);
      return file.mark;
    }
    if (Array.isArray(value)) return value.map((one, i) => replaced(one, `${name}_${i + 1}`));
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(
        Object.entries(value).map(([key, one]) => [
          key,
          replaced(one, name ? `${name}_${key}` : key),
        ]),
      );
    }
    return value;
  };
  return { input: replaced(input, ""), files };
}

function filesFirst(files) {
  const names = files.map(({ name }) => name).join(" and ");
  return files.length
    ? `# Save the input ${files.length > 1 ? "pictures" : "picture"} as ${names} first.\n`
    : "";
}

function shellQuoted(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

// A command for sh, bash and zsh. Its body goes through a pipe: an argument may have 128 kB at most.
export function curlOf(url, input) {
  const { input: bare, files } = picturesAsFiles(input);
  let body = shellQuoted(writeJson({ input: bare }));
  for (const { name, prefix, mark } of files) {
    body = body.replace(mark, () => `${prefix}'"$(base64 < ${shellQuoted(name)} | tr -d '\\n')"'`);
  }
  return `${filesFirst(files)}printf %s ${body} |
    curl --silent --show-error --fail-with-body ${shellQuoted(`${url}/runsync`)} \\
        --header "Authorization: Bearer \${${KEY_VARIABLE}:?has to be set to your API key}" \\
        --header 'Content-Type: application/json' --data-binary @- > answer.json
jq --exit-status --raw-output '.output.images[0]' answer.json | cut -d, -f2 | base64 --decode > picture.${extensionFor(input)}
`;
}

// A program for Python 3.9 and newer, of its standard library.
export function pythonOf(url, input) {
  const { input: bare, files } = picturesAsFiles(input);
  let literal = pythonLiteral(bare, "");
  for (const { name, prefix, mark } of files) {
    literal = literal.replace(
      JSON.stringify(mark),
      () => `data_uri(${JSON.stringify(prefix)}, ${JSON.stringify(name)})`,
    );
  }
  const reader = `

def data_uri(prefix, path):
    return prefix + base64.b64encode(Path(path).read_bytes()).decode()
`;
  const imports = PYTHON_MODULES.map((name) => `import ${name}`).join("\n");
  return `${filesFirst(files)}${imports}
from pathlib import Path

URL = ${JSON.stringify(url)}
API_KEY = os.environ["${KEY_VARIABLE}"]
${files.length ? reader : ""}

def call(path, body=None):
    request = urllib.request.Request(
        URL + path,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": "Bearer " + API_KEY, "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


job = call("/run", {"input": ${literal}})
while job["status"] in ("IN_QUEUE", "IN_PROGRESS"):
    time.sleep(1)
    job = call("/status/" + job["id"])
if job["status"] != "COMPLETED":
    raise SystemExit(job.get("error", job["status"]))
for number, picture in enumerate(job["output"]["images"], 1):
    if picture.startswith("data:"):
        path = Path(f"picture-{number}.${extensionFor(input)}")
        path.write_bytes(base64.b64decode(picture.partition(",")[2]))
        print(path)
    else:
        print(picture)
`;
}

function extensionFor(input) {
  return extensionOf(`image/${input.output_format ?? "png"}`);
}

// JSON's strings are Python's, escapes and all.
function pythonLiteral(value, indent) {
  if (value === null || value === undefined) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value !== "object") return writeJson(value);
  const inner = `${indent}    `;
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const items = Array.isArray(value)
    ? value.map((one) => pythonLiteral(one, inner))
    : Object.entries(value).map(
        ([key, one]) => `${JSON.stringify(key)}: ${pythonLiteral(one, inner)}`,
      );
  return items.length
    ? `${open}\n${items.map((item) => `${inner}${item},\n`).join("")}${indent}${close}`
    : open + close;
}
