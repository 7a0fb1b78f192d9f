/** Who is calling: one device, taken only from a token whose signature, time and claims hold. */
import { createPublicKey, createSecretKey, type KeyObject } from 'node:crypto';
import {
  createLocalJWKSet,
  createRemoteJWKSet,
  customFetch,
  errors,
  type FetchImplementation,
  type JSONWebKeySet,
  type JWTPayload,
  type JWTVerifyOptions,
  jwtVerify,
  SignJWT,
} from 'jose';
import { isRevoked } from '../delivery/revocation.ts';
import type { Clock } from '../lib/clock.ts';
import { reasonOf } from '../lib/reason.ts';
import { unreachable } from '../lib/unreachable.ts';
import type { MessageStore } from '../ports/message-store.ts';
import { GatewayError } from '../protocol/errors.ts';
import { type DeviceAddress, deviceId, userId } from '../protocol/ids.ts';
import { TOKEN_LENGTH_MAX } from '../protocol/limits.ts';

export interface Caller {
  device: DeviceAddress;
  /** Null where the token does not say; such a token can't outlive a revocation. */
  issuedAtMs: number | null;
  expiresAtMs: number;
}

export interface Authenticator {
  /**
   * Checks whatever a door was handed as a token.
   *
   * @throws GatewayError TOKEN_EXPIRED for a genuine token that ran out; UNAUTHENTICATED for every other fault of
   *   the token; UNAVAILABLE where the key set can't be fetched. No message holds anything of the token.
   */
  authenticate(token: unknown): Promise<Caller>;
  /** Why the key set can't be fetched, in a line; null where it can, or none is. */
  trouble(): string | null;
}

/** Signatures that a public key can verify. Ed25519 has two names; the newer one says the curve. */
export const PUBLIC_KEY_ALGORITHMS = ['EdDSA', 'Ed25519', 'ES256', 'RS256'] as const;
export type PublicKeyAlgorithm = (typeof PUBLIC_KEY_ALGORITHMS)[number];

/** Shorter secrets can be guessed from one token. */
export const SECRET_BYTES_MIN = 32;
const RSA_BITS_MIN = 2048;

/** What tokens are verified with. Algorithms are pinned here, never read from a token. */
export type TokenKeys =
  | { kind: 'secret'; secret: Uint8Array }
  | { kind: 'publicKey'; key: KeyObject; algorithms: readonly PublicKeyAlgorithm[] }
  | {
      kind: 'jwks';
      url: URL;
      algorithms: readonly PublicKeyAlgorithm[];
      timeoutMs?: number;
      /** The least time between two fetches, after a failed one and for a key id that is not in the set. */
      coolDownMs?: number;
    };

export interface AuthenticatorOptions {
  keys: TokenKeys;
  /** The `iss` that a token must have; null demands none. */
  issuer: string | null;
  /** The `aud` that a token must have; null demands none. */
  audience: string | null;
  clock: Clock;
}

const JWKS_TIMEOUT_MS = 5_000;
const JWKS_COOL_DOWN_MS = 10_000;
/** Keys that were good so lately stand in for a set that can't be fetched: longer, one that was withdrawn would live on. */
const JWKS_STALE_MAX_MS = 6 * 3_600_000;
/** A few hundred keys: whoever answers in the key server's place can't fill the memory. */
const JWKS_BYTES_MAX = 1024 * 1024;

/** The end of the year 9999: later times have no ISO 8601 form that clients can read. */
const EXPIRY_MAX_MS = 253_402_300_799_000;

/** @throws Error for a secret of less than {@link SECRET_BYTES_MIN} bytes */
export async function createAuthenticator(options: AuthenticatorOptions): Promise<Authenticator> {
  const { clock } = options;
  const { verify, trouble } = await verifier(options.keys, clock);
  const demands: JWTVerifyOptions = {
    requiredClaims: ['exp', 'sub', 'device_id'],
    ...(options.issuer === null ? {} : { issuer: options.issuer }),
    ...(options.audience === null ? {} : { audience: options.audience }),
  };

  return {
    async authenticate(token) {
      if (typeof token !== 'string' || token === '') throw new GatewayError('UNAUTHENTICATED');
      // Before any parsing: what a stranger may cost us is bounded.
      if (token.length > TOKEN_LENGTH_MAX) throw new GatewayError('UNAUTHENTICATED', 'the token is too long');
      let payload: JWTPayload;
      try {
        payload = await verify(token, { ...demands, currentDate: new Date(clock.nowMs()) });
      } catch (error) {
        throw refusal(error, options.keys.kind === 'jwks');
      }
      return callerOf(payload, clock.nowMs());
    },

    trouble,
  };
}

/** How a device's keys stood when a request came. */
export interface KeysFound {
  keyVersion: number;
  identityVersion: number;
}

/**
 * Asks the store whether a token was revoked: for requests that bring a token. A socket's door asks where it numbers the
 * connection.
 *
 * @returns what else it was told
 * @throws GatewayError FORBIDDEN for a revoked token, UNAVAILABLE where the store can't be reached
 */
export async function refuseRevoked(
  messages: Pick<MessageStore, 'prove'>,
  caller: Caller,
): Promise<KeysFound> {
  const proof = await messages.prove(caller.device);
  if (isRevoked(caller, proof?.revokedAtMs ?? null)) {
    throw new GatewayError('FORBIDDEN', 'the device was revoked');
  }
  return { keyVersion: proof?.keyVersion ?? 0, identityVersion: proof?.identityVersion ?? 0 };
}

/**
 * A token for one device, signed with HS256.
 *
 * @param parameters.device checked by nobody here: an invalid one makes a token that is refused
 */
export async function signToken(parameters: {
  secret: Uint8Array;
  device: DeviceAddress;
  ttlMs: number;
  issuer?: string | null;
  audience?: string | null;
  clock: Clock;
}): Promise<string> {
  const nowMs = parameters.clock.nowMs();
  const token = new SignJWT({ device_id: parameters.device.deviceId })
    .setProtectedHeader({ alg: 'HS256', typ: 'JWT' })
    .setSubject(parameters.device.userId)
    .setIssuedAt(Math.floor(nowMs / 1000))
    .setExpirationTime(Math.ceil((nowMs + parameters.ttlMs) / 1000));
  if (parameters.issuer) token.setIssuer(parameters.issuer);
  if (parameters.audience) token.setAudience(parameters.audience);
  return token.sign(createSecretKey(parameters.secret));
}

/**
 * Reads a public key from PEM (line breaks may be written as `\n`) or from a JWK, and pins its algorithm.
 *
 * @throws Error whose message says what is wrong and holds nothing of the text
 */
export function readPublicKey(text: string): Extract<TokenKeys, { kind: 'publicKey' }> {
  const key = parsePublicKey(text.trim());
  switch (key.asymmetricKeyType) {
    case 'ed25519':
      return { kind: 'publicKey', key, algorithms: ['EdDSA', 'Ed25519'] };
    case 'ec':
      if (key.asymmetricKeyDetails?.namedCurve !== 'prime256v1')
        throw new Error('must be on the curve P-256');
      return { kind: 'publicKey', key, algorithms: ['ES256'] };
    case 'rsa':
      if ((key.asymmetricKeyDetails?.modulusLength ?? 0) < RSA_BITS_MIN) {
        throw new Error(`must have at least ${RSA_BITS_MIN} bits`);
      }
      return { kind: 'publicKey', key, algorithms: ['RS256'] };
    default:
      throw new Error('must be an Ed25519, P-256 or RSA key');
  }
}

function parsePublicKey(text: string): KeyObject {
  try {
    if (text.startsWith('{')) {
      const jwk = JSON.parse(text);
      // Node would derive the public half: a private key in the server's environment is a mistake to hear of.
      if ('d' in jwk || 'k' in jwk) throw new PrivateKeyError();
      return createPublicKey({ key: jwk, format: 'jwk' });
    }
    if (text.includes('PRIVATE KEY')) throw new PrivateKeyError();
    return createPublicKey(text.replaceAll('\\n', '\n'));
  } catch (error) {
    if (error instanceof PrivateKeyError) throw error;
    throw new Error('must be a public key as PEM or JWK');
  }
}

class PrivateKeyError extends Error {
  constructor() {
    super('is a private or secret key; only the public half belongs here');
  }
}

interface Verifier {
  verify(token: string, demands: JWTVerifyOptions): Promise<JWTPayload>;
  trouble(): string | null;
}

const untroubled = (): null => null;

async function verifier(keys: TokenKeys, clock: Clock): Promise<Verifier> {
  switch (keys.kind) {
    case 'secret': {
      if (keys.secret.byteLength < SECRET_BYTES_MIN) {
        throw new Error(`a token secret needs at least ${SECRET_BYTES_MIN} bytes`);
      }
      // Once: jose would import any other form of it for each token.
      const secret = await crypto.subtle.importKey(
        'raw',
        keys.secret as Uint8Array<ArrayBuffer>,
        { name: 'HMAC', hash: 'SHA-256' },
        false,
        ['verify'],
      );
      return {
        verify: async (token, demands) =>
          (await jwtVerify(token, secret, { ...demands, algorithms: ['HS256'] })).payload,
        trouble: untroubled,
      };
    }
    case 'publicKey': {
      const algorithms = [...keys.algorithms];
      return {
        verify: async (token, demands) =>
          (await jwtVerify(token, keys.key, { ...demands, algorithms })).payload,
        trouble: untroubled,
      };
    }
    case 'jwks':
      return fetchedKeySet(keys, clock);
    default:
      return unreachable(keys);
  }
}

/** Verifies by the keys at an address, which are fetched when they are needed, and by the last ones while they can't be. */
function fetchedKeySet(keys: Extract<TokenKeys, { kind: 'jwks' }>, clock: Clock): Verifier {
  const algorithms = [...keys.algorithms];
  const coolDownMs = keys.coolDownMs ?? JWKS_COOL_DOWN_MS;
  let failure: { atMs: number; reason: string } | null = null;
  let last: { atMs: number; keySet: ReturnType<typeof createLocalJWKSet> } | null = null;

  const fetchSet: FetchImplementation = async (url, options) => {
    // jose waits between successful fetches only: without this, tokens with made-up key ids would hammer a key server
    // that is down.
    if (failure !== null && Math.abs(clock.nowMs() - failure.atMs) < coolDownMs) {
      throw new Error('the last fetch of the key set failed');
    }
    try {
      const response = await fetch(url, options);
      if (response.status !== 200) throw new Error(`the key set was answered with ${response.status}`);
      // Read here, so that an answer that stalls, does not end or is no key set counts as failed too.
      const answer: JSONWebKeySet = JSON.parse(await boundedText(response));
      last = { atMs: clock.nowMs(), keySet: createLocalJWKSet(answer) };
      failure = null;
      return Response.json(answer);
    } catch (error) {
      failure = { atMs: clock.nowMs(), reason: reasonOf(error) };
      throw error;
    }
  };
  const openSet = () =>
    createRemoteJWKSet(keys.url, {
      timeoutDuration: keys.timeoutMs ?? JWKS_TIMEOUT_MS,
      cooldownDuration: coolDownMs,
      [customFetch]: fetchSet,
    });
  let keySet = openSet();
  let usedMs = clock.nowMs();

  return {
    async verify(token, demands) {
      // jose would take its set for fresh until a clock that was set back has caught up, for hours maybe.
      if (clock.nowMs() < usedMs - coolDownMs) keySet = openSet();
      usedMs = clock.nowMs();
      try {
        return (await jwtVerify(token, keySet, { ...demands, algorithms })).payload;
      } catch (error) {
        if (isOfToken(error) || last === null) throw error;
        if (Math.abs(clock.nowMs() - last.atMs) > JWKS_STALE_MAX_MS) throw error;
        try {
          return (await jwtVerify(token, last.keySet, { ...demands, algorithms })).payload;
        } catch (fault) {
          // The key may be a new one, which can't be known now.
          throw fault instanceof errors.JWKSNoMatchingKey ? error : fault;
        }
      }
    },
    trouble: () =>
      failure === null ? null : `the key set of JWT_JWKS_URL can not be fetched: ${failure.reason}`,
  };
}

/** @throws Error where there is more than {@link JWKS_BYTES_MAX} */
async function boundedText(response: Response): Promise<string> {
  const chunks: Uint8Array[] = [];
  let bytes = 0;
  for await (const chunk of response.body ?? []) {
    bytes += chunk.byteLength;
    if (bytes > JWKS_BYTES_MAX) throw new Error(`the key set has more than ${JWKS_BYTES_MAX} bytes`);
    chunks.push(chunk);
  }
  return Buffer.concat(chunks).toString();
}

const TOKEN_FAULTS: ReadonlyMap<string, string> = new Map([
  [errors.JWTInvalid.code, 'the token is malformed'],
  [errors.JWSInvalid.code, 'the token is malformed'],
  [errors.JWSSignatureVerificationFailed.code, 'the signature of the token does not hold'],
  [errors.JOSEAlgNotAllowed.code, 'the algorithm of the token is not allowed'],
  [errors.JOSENotSupported.code, 'the token asks for something that is not supported'],
  [errors.JWKSNoMatchingKey.code, 'the token is signed with an unknown key'],
  [errors.JWKSMultipleMatchingKeys.code, 'the token does not say which key it is signed with'],
]);

/** Whether the token is at fault, rather than the way to the keys. */
function isOfToken(error: unknown): boolean {
  return (
    error instanceof errors.JWTExpired ||
    error instanceof errors.JWTClaimValidationFailed ||
    (error instanceof errors.JOSEError && TOKEN_FAULTS.has(error.code))
  );
}

/** jose's errors carry the claims, so none of them becomes the cause of an error that may be logged. */
function refusal(error: unknown, fetchesKeys: boolean): unknown {
  if (error instanceof errors.JWTExpired) return new GatewayError('TOKEN_EXPIRED');
  if (error instanceof errors.JWTClaimValidationFailed) {
    return new GatewayError('UNAUTHENTICATED', `the claim ${error.claim} of the token does not hold`);
  }
  const fault = error instanceof errors.JOSEError ? TOKEN_FAULTS.get(error.code) : undefined;
  if (fault !== undefined) return new GatewayError('UNAUTHENTICATED', fault);
  return fetchesKeys
    ? new GatewayError('UNAVAILABLE', 'the keys for tokens can not be fetched', { cause: error })
    : error;
}

function callerOf(payload: JWTPayload, nowMs: number): Caller {
  const user = userId.safeParse(payload.sub);
  if (!user.success) throw new GatewayError('UNAUTHENTICATED', 'the claim sub of the token is no user id');
  const device = deviceId.safeParse(payload.device_id);
  if (!device.success)
    throw new GatewayError('UNAUTHENTICATED', 'the claim device_id of the token is no device id');
  const expiresAtMs = (payload.exp ?? 0) * 1000;
  // jose compares whole seconds; the live socket is cut by the millisecond, so a fraction must mean the same here.
  if (expiresAtMs <= nowMs) throw new GatewayError('TOKEN_EXPIRED');
  if (expiresAtMs > EXPIRY_MAX_MS)
    throw new GatewayError('UNAUTHENTICATED', 'the claim exp of the token is too late');
  return {
    device: { userId: user.data, deviceId: device.data },
    issuedAtMs: payload.iat === undefined ? null : payload.iat * 1000,
    expiresAtMs,
  };
}
