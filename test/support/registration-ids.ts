import { randomInt } from 'node:crypto';

/** As libsignal's own devices take them. */
const REGISTRATION_ID_MAX = 16_380;
let last = randomInt(REGISTRATION_ID_MAX);

/** From 1 on. Two that follow each other differ: a device that is installed anew is told from the one before by it. */
export function nextRegistrationId(): number {
  last = (last % REGISTRATION_ID_MAX) + 1;
  return last;
}
