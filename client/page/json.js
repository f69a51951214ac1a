// JSON whose integers lose no digits: those beyond 2^53 are BigInts.

export function parseJson(text) {
  return JSON.parse(text, (_, value, context) =>
    typeof value === "number" && !Number.isSafeInteger(value) && /^-?\d+$/.test(context.source)
      ? BigInt(context.source)
      : value,
  );
}

export function writeJson(value, indent) {
  const withDigits = (_, one) => (typeof one === "bigint" ? JSON.rawJSON(String(one)) : one);
  return JSON.stringify(value, withDigits, indent);
}
