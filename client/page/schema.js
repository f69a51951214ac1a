// The fields of a request, from the JSON Schema that the worker publishes.
import {parseJson} from "./json.js";

// A single file carries its schema; the served page asks for it.
export async function loadSchema() {
  const block = document.getElementById("input-schema");
  if (block) return parseJson(block.textContent);
  const answer = await fetch("input.schema.json");
  if (!answer.ok) throw new Error(`the schema could not be loaded: HTTP ${answer.status}`);
  return parseJson(await answer.text());
}

// A list with, of each field: name, type ("unknown" for what has none), default, description,
// minimum, maximum (and exclusive ones), multipleOf, minLength, maxLength, pattern, enum, names (of the enum's values
// the ones to offer first), rule (in words), isPicture, isList, items (as a field without a name),
// itemProperties (as this list, where the items are objects), properties (of an object),
// constants (taken beside the others, such as a side of 0), isRequired. "or null" and references
// are resolved.
export function propertiesOf(schema, root = schema) {
  return Object.entries(schema.properties ?? {}).map(([name, part]) => ({
    ...propertyOf(part, root),
    name,
    isRequired: (schema.required ?? []).includes(name),
  }));
}

function propertyOf(part, root) {
  const whole = resolved(part, root);
  const types = [whole.type ?? []].flat().filter((type) => type !== "null");
  const type = types.length === 1 ? types[0] : whole.enum ? "string" : "unknown";
  const items = type === "array" && whole.items ? propertyOf(whole.items, root) : undefined;
  const property = {
    ...whole,
    type,
    default: whole.default,
    description: whole.description ?? "",
    names: whole["x-names"] ?? whole.enum,
    isPicture: type === "string" && (whole.pattern ?? "").includes("data:image/"),
    isList: type === "array",
    items,
    itemProperties: items?.properties,
    properties: type === "object" && whole.properties ? propertiesOf(whole, root) : undefined,
  };
  property.rule = ruleOf(property);
  return property;
}

function resolved(part, root) {
  if (part.$ref) {
    const { $ref, ...beside } = part;
    const target = $ref.split("/").slice(1).reduce((inner, name) => inner?.[name], root);
    return resolved({ ...target, ...beside }, root);
  }
  const { anyOf, oneOf, ...own } = part;
  const isBare = (option) => Object.keys(option).join() === "const";
  const all = anyOf ?? oneOf ?? [];
  const options = all.filter((option) => option.type !== "null" && !isBare(option));
  if (own.type || options.length !== 1) return part; // an object's own anyOf ties its fields
  const constants = all.filter(isBare).map((option) => option.const);
  return { ...resolved(options[0], root), ...own, constants };
}

// As the worker words it.
function ruleOf(property) {
  if (property["x-rule"]) return property["x-rule"];
  if (property.enum) return `one of ${property.enum.join(", ")}`;
  const { type, minimum, maximum, exclusiveMinimum, exclusiveMaximum } = property;
  if (type === "array") return listRule(property);
  if (type === "boolean") return "true or false";
  if (type === "object") return "an object";
  let words = { integer: "an integer", number: "a number", string: "a string" }[type] ?? "JSON";
  if (minimum !== undefined && maximum !== undefined) words += ` from ${minimum} to ${maximum}`;
  else {
    const bounds = [
      minimum !== undefined && `of at least ${minimum}`,
      exclusiveMinimum !== undefined && `above ${exclusiveMinimum}`,
      maximum !== undefined && `of at most ${maximum}`,
      exclusiveMaximum !== undefined && `below ${exclusiveMaximum}`,
    ].filter(Boolean);
    if (bounds.length) words += ` ${bounds.join(" and ")}`;
  }
  if (property.multipleOf) words += `, a multiple of ${property.multipleOf}`;
  if (property.minLength) words += ` of at least ${property.minLength} characters`;
  if (property.maxLength) words += ` of at most ${property.maxLength} characters`;
  return words;
}

function listRule({ items, minItems, maxItems }) {
  const counts = [minItems && `at least ${minItems}`, maxItems && `at most ${maxItems}`];
  const count = counts.filter(Boolean).join(" and ");
  return `a list${count && ` of ${count}`}${items ? `, each ${items.rule}` : ""}`;
}

// What a value that was entered breaks of a field's rules, in words; "" where it breaks none.
export function problemOf(property, value) {
  const { type, minimum, maximum, multipleOf, minLength, maxLength, minItems, maxItems } = property;
  const { exclusiveMinimum, exclusiveMaximum } = property;
  let isRight = true;
  if (property.constants?.includes(value)) return "";
  if (property.enum) isRight = property.enum.includes(value);
  else if (type === "integer" || type === "number") {
    isRight =
      (typeof value === "bigint" || Number.isFinite(value)) &&
      (type === "number" || typeof value === "bigint" || Number.isInteger(value)) &&
      !(value < minimum) &&
      !(value > maximum) &&
      !(value <= exclusiveMinimum) &&
      !(value >= exclusiveMaximum) &&
      (!multipleOf || type === "number" || BigInt(value) % BigInt(multipleOf) === 0n);
  } else if (type === "string") {
    const length = [...value].length; // in code points, as the worker counts
    isRight =
      !(length < minLength) && !(length > maxLength) && (patternOf(property)?.test(value) ?? true);
  } else if (type === "array") {
    isRight = !(value.length < minItems) && !(value.length > maxItems);
  }
  return isRight ? "" : `must be ${property.rule}`;
}

// Python's patterns may begin with a flag; one that this browser cannot read is left to the worker.
function patternOf({ pattern }) {
  if (!pattern) return null;
  try {
    return pattern.startsWith("(?i)") ? new RegExp(pattern.slice(4), "i") : new RegExp(pattern);
  } catch {
    return null;
  }
}

// The value of a text that was typed into a field of numbers; undefined where it is no number. An
// integer beyond 2^53 is a BigInt.
export function numberOf(property, text) {
  if (/^[+-]?\d+(\.0*)?$/.test(text)) {
    const whole = BigInt(text.replace(/^\+|\..*$/g, ""));
    return Number.isSafeInteger(Number(whole)) ? Number(whole) : whole;
  }
  const number = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(text) ? Number(text) : NaN;
  return Number.isFinite(number) ? number : undefined;
}

// The fields of which one at least has to be given, as the schema's `anyOf` lists them.
export function requiredFields(schema) {
  return (schema.anyOf ?? []).map((option) => option.required?.[0]).filter(Boolean);
}
