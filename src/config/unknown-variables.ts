/** Variables that nobody reads: most likely misspelt, so that what was meant would silently not hold. */
import { environment, type VariableName } from './environment.ts';

const variableNames = Object.keys(environment.shape) as VariableName[];

/** A variable that begins like ours is taken for ours. */
const FAMILIES = [
  'JWT_',
  'PREKEY_',
  'SIGNED_',
  'CLAIMED_',
  'IDLE_',
  'MESSAGE_',
  'QUEUE_',
  'ADMIN_',
  'ALLOWED_',
  'TRUSTED_',
  'PRIVATE_',
  'LIMIT_',
  'KEYGATE_',
];

/** Kubernetes sets such names for every service; one that is called "keygate" must not stop the gateway. */
const SERVICE_LINK = /^[A-Z0-9_]+_(SERVICE_(HOST|PORT)(_[A-Z0-9_]+)?|PORT(_\d+_(TCP|UDP|SCTP)(_[A-Z]+)?)?)$/;

/** Shorter names are too near to too many words. */
const TYPO_NAME_LENGTH_MIN = 8;

/** A misspelling leaves most letters as they are. */
const LETTERS_PER_MISTAKE = 4;

/** A line for each that begins like ours, or nearly is one of ours. */
export function unknownVariables(given: ReadonlyMap<string, string>): string[] {
  const problems: string[] = [];
  for (const name of given.keys()) {
    if (Object.hasOwn(environment.shape, name) || SERVICE_LINK.test(name)) continue;
    const isOurs = FAMILIES.some((family) => name.startsWith(family));
    const isTypo =
      name.length >= TYPO_NAME_LENGTH_MIN &&
      variableNames.some((candidate) => editDistance(name, candidate) === 1);
    if (!isOurs && !isTypo) continue;
    const meant = meantName(name.replace(/^KEYGATE_/, ''));
    problems.push(
      `${name} is unknown; ${meant === null ? 'keygate config-reference lists every variable' : `did you mean ${meant}?`}`,
    );
  }
  return problems;
}

/** The nearest name that `name` may be a misspelling, a beginning or a lengthening of; null where there is none. */
function meantName(name: string): VariableName | null {
  const mistakesMax = Math.max(1, Math.floor(name.length / LETTERS_PER_MISTAKE));
  let nearest: { candidate: VariableName; distance: number } | null = null;
  for (const candidate of variableNames) {
    const distance = editDistance(name, candidate);
    const isPart = candidate.startsWith(`${name}_`) || name.startsWith(`${candidate}_`);
    if (!isPart && distance > mistakesMax) continue;
    if (nearest === null || distance < nearest.distance) nearest = { candidate, distance };
  }
  return nearest?.candidate ?? null;
}

/** Letters to insert, delete, replace, or swap with their neighbour. */
function editDistance(a: string, b: string): number {
  const rows: number[][] = [Array.from({ length: b.length + 1 }, (_, column) => column)];
  for (let i = 1; i <= a.length; i++) {
    const row = [i];
    for (let j = 1; j <= b.length; j++) {
      const replaced = rows[i - 1]![j - 1]! + (a[i - 1] === b[j - 1] ? 0 : 1);
      let best = Math.min(rows[i - 1]![j]! + 1, row[j - 1]! + 1, replaced);
      if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) {
        best = Math.min(best, rows[i - 2]![j - 2]! + 1);
      }
      row.push(best);
    }
    rows.push(row);
  }
  return rows[a.length]![b.length]!;
}
