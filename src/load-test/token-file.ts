/** Tokens that somebody else made: one a line. Whether they hold is the gateway's to say. */
import { decodeJwt } from 'jose';
import { deviceId, userId } from '../protocol/ids.ts';
import type { Credential } from './load-test.ts';

/** @throws Error naming the line that holds no token of a device, never what stands in it */
export function readTokens(text: string): Credential[] {
  const seen = new Set<string>();
  return text.split(/\r?\n/).flatMap((line, index) => {
    const token = line.trim();
    if (token === '') return [];
    const address = addressOf(token);
    if (address === null) throw new Error(`line ${index + 1} holds no token with sub and device_id`);
    const name = `${address.userId}/${address.deviceId}`;
    if (seen.has(name)) throw new Error(`line ${index + 1} holds a second token of one device`);
    seen.add(name);
    return [{ address, token }];
  });
}

function addressOf(token: string): Credential['address'] | null {
  let claims: ReturnType<typeof decodeJwt>;
  try {
    claims = decodeJwt(token);
  } catch {
    return null;
  }
  const user = userId.safeParse(claims.sub);
  const device = deviceId.safeParse(claims.device_id);
  return user.success && device.success ? { userId: user.data, deviceId: device.data } : null;
}
