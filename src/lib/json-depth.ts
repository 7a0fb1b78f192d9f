/** JSON that is nested a hundred thousand deep takes twenty times as long to parse as its length would tell. */

const QUOTE = 0x22;
const BACKSLASH = 0x5c;
const OPENING = new Set(['[', '{'].map((character) => character.charCodeAt(0)));
const CLOSING = new Set([']', '}'].map((character) => character.charCodeAt(0)));

/** Whether the text opens more than `depthMax` brackets that it has not closed; it need not be JSON. */
export function nestsDeeper(json: string, depthMax: number): boolean {
  // Too short to be deep enough to matter: the usual request costs nothing here.
  if (json.length <= SHORT_LENGTH_MAX) return false;
  let depth = 0;
  for (let at = 0; at < json.length; at++) {
    const character = json.charCodeAt(at);
    if (character === QUOTE) {
      at = endOfString(json, at);
      if (at < 0) return false;
    } else if (OPENING.has(character)) {
      depth += 1;
      if (depth > depthMax) return true;
    } else if (CLOSING.has(character)) depth -= 1;
  }
  return false;
}

const SHORT_LENGTH_MAX = 1_024;

/** @returns where the string ends that begins at `start`, or -1 where it does not */
function endOfString(json: string, start: number): number {
  for (let at = json.indexOf('"', start + 1); at >= 0; at = json.indexOf('"', at + 1)) {
    let backslashes = 0;
    while (json.charCodeAt(at - 1 - backslashes) === BACKSLASH) backslashes += 1;
    if (backslashes % 2 === 0) return at;
  }
  return -1;
}
