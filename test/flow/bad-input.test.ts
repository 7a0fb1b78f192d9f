/**
 * Whatever a client sends: it is told what is wrong and where, nothing is stored, and everybody else is served.
 * The tables are generated: each request's own valid input, with one thing wrong at a time, at every place.
 */
import { randomUUID } from 'node:crypto';
import { Manager } from 'socket.io-client';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { type ErrorObject, errorObject } from '../../src/protocol/errors.ts';
import { type Reply, type RequestInput, type RequestName, requestNames } from '../../src/protocol/events.ts';
import { eventually } from '../support/eventually.ts';
import { type Client, startGateway, type TestGateway } from '../support/gateway.ts';
import { ids, KeyMaker } from '../support/key-maker.ts';

const KIB = 1024;
const CONTENT_BYTES_MAX = 96 * KIB;
const FRAME_BYTES_MAX = 2 * 1024 * KIB;

let gateway: TestGateway;
/** Sends all the garbage; has keys, so that every request gets as far as it can. */
let sender: Client;
const keys = new KeyMaker();
/** Somebody who does nothing wrong. */
let bystander: Client;
let recipient: Client;
const recipientKeys = new KeyMaker();

const uncaught: unknown[] = [];
const noteUncaught = (error: unknown): void => void uncaught.push(error);

beforeAll(async () => {
  process.on('uncaughtException', noteUncaught);
  process.on('unhandledRejection', noteUncaught);
  gateway = await startGateway();
  sender = await gateway.connect({ userId: 'sender', deviceId: 1 });
  bystander = await gateway.connect({ userId: 'bystander', deviceId: 1 });
  recipient = await gateway.connect({ userId: 'recipient', deviceId: 1 });
  await sender.call('uploadKeys', keys.keySet({ pqLastResortPreKey: keys.pq(1) }));
  await recipient.call(
    'uploadKeys',
    recipientKeys.keySet({ oneTimePreKeys: ids(1, 5).map((id) => recipientKeys.oneTime(id)) }),
  );
});

afterAll(async () => {
  await gateway?.stop();
  process.off('uncaughtException', noteUncaught);
  process.off('unhandledRejection', noteUncaught);
});

afterEach(async () => {
  expect(uncaught).toEqual([]);
  // The same socket as ever, and the one of somebody else.
  await sender.call('keyStatus');
  await bystander.call('keyStatus');
});

/** A valid input of each request, with every field that it can have. */
const templates: { [Name in RequestName]: RequestInput<Name> } = {
  uploadKeys: {
    registrationId: 77,
    identityKey: keys.identityKey(),
    identityKeyEd25519: Buffer.alloc(32, 3).toString('base64'),
    signedPreKey: keys.signed(2),
    pqLastResortPreKey: keys.pq(2),
    oneTimePreKeys: [keys.oneTime(1), keys.oneTime(2, 'raw')],
    pqOneTimePreKeys: [keys.pq(3), keys.pq(4)],
    replaceIdentity: true,
    ifKeyVersion: 1,
  },
  addPreKeys: {
    oneTimePreKeys: [keys.oneTime(1), keys.oneTime(2)],
    pqOneTimePreKeys: [keys.pq(3), keys.pq(4)],
  },
  withdrawPreKeys: { preKeyIds: [1, 2], pqPreKeyIds: [3, 4] },
  rotateSignedPreKey: { signedPreKey: keys.signed(2), pqLastResortPreKey: keys.pq(2), ifKeyVersion: 1 },
  resetKeys: { reason: 'lost', ifKeyVersion: 1 },
  keyStatus: {},
  keyStats: {},
  checkPreKeys: {},
  validateKeys: {
    localIdentityKey: keys.identityKey(),
    localSignedPreKeyId: 1,
    localSignedPreKeyPublicKey: keys.signed(1, 'raw').publicKey,
    localRegistrationId: 77,
    localPqLastResortPreKeyId: 1,
    localPreKeyIds: [1, 2],
    localPreKeyCount: 2,
    localPqPreKeyIds: [3, 4],
    lastKeyVersion: 1,
    lastCountVersion: 0,
  },
  requestBundle: { claimId: randomUUID(), userId: 'recipient', deviceId: 1 },
  listDevices: { userId: 'recipient' },
  sendMessages: {
    messageId: randomUUID(),
    userId: 'recipient',
    envelopes: [
      { deviceId: 1, registrationId: 77, type: 3, content: 'AAAA' },
      { deviceId: 2, registrationId: 78, type: 2, content: 'AAA=' },
    ],
    onMismatch: 'reject',
  },
  clientReady: { validation: 'x' },
  refreshToken: { token: 'x' },
};

/** As the contract marks them; inside of lists and keys nothing is optional. */
const OPTIONAL: ReadonlySet<string> = new Set([
  'identityKeyEd25519',
  'pqLastResortPreKey',
  'oneTimePreKeys',
  'pqOneTimePreKeys',
  'replaceIdentity',
  'ifKeyVersion',
  'preKeyIds',
  'pqPreKeyIds',
  'reason',
  'localSignedPreKeyPublicKey',
  'localRegistrationId',
  'localPqLastResortPreKeyId',
  'localPreKeyIds',
  'localPreKeyCount',
  'localPqPreKeyIds',
  'lastKeyVersion',
  'lastCountVersion',
  'onMismatch',
  'validation',
]);

function isOptional(name: RequestName, path: Path): boolean {
  const [field] = path;
  if (path.length !== 1) return false;
  if (name === 'requestBundle') return field === 'deviceId';
  // Of these one must be there, which the other is.
  if (name === 'rotateSignedPreKey') return true;
  return OPTIONAL.has(String(field));
}

type Path = (string | number)[];

interface Case {
  name: RequestName;
  title: string;
  input: unknown;
  /** Where the fault lies, or begins, which an issue must say. */
  path: Path;
  code: 'BAD_REQUEST' | 'PAYLOAD_TOO_LARGE';
}

/** What is wrong, and the value that is. */
type Fault = [title: string, value: unknown];

const WHOLE_NUMBER_MAX: Readonly<Record<string, number>> = {
  registrationId: 16383,
  localRegistrationId: 16383,
  deviceId: 127,
  type: 255,
  keyId: 2 ** 32 - 1,
  localSignedPreKeyId: 2 ** 32 - 1,
  localPqLastResortPreKeyId: 2 ** 32 - 1,
  preKeyIds: 2 ** 32 - 1,
  pqPreKeyIds: 2 ** 32 - 1,
  localPreKeyIds: 2 ** 32 - 1,
  localPqPreKeyIds: 2 ** 32 - 1,
  ifKeyVersion: 2 ** 48,
  lastKeyVersion: 2 ** 48,
  lastCountVersion: 2 ** 48,
  localPreKeyCount: Number.MAX_SAFE_INTEGER,
};

const LIST_LENGTH_MAX: Readonly<Record<string, number>> = {
  oneTimePreKeys: 100,
  pqOneTimePreKeys: 100,
  preKeyIds: 1000,
  pqPreKeyIds: 1000,
  localPreKeyIds: 2000,
  localPqPreKeyIds: 2000,
  envelopes: 127,
};

function base64(bytes: number, first = 5): string {
  const buffer = Buffer.alloc(bytes, 0xab);
  if (bytes > 0) buffer[0] = first;
  return buffer.toString('base64');
}

/** Forms that are no strict base64, whatever they stand for. */
function looseBase64(text: string): Fault[] {
  const bytes = Buffer.from(text, 'base64');
  const stray = [...text];
  const last = text.indexOf('=') === -1 ? -1 : text.indexOf('=') - 1;
  // The bits after the last byte must be zero; the next letter sets one of them.
  if (last >= 0) stray[last] = String.fromCharCode(stray[last]!.charCodeAt(0) + 1);
  return [
    ['URL-safe', `${bytes.toString('base64url')}-_`],
    ['URL-safe letters', `-_${text.slice(2)}`],
    ['white space before', ` ${text}`],
    ['a line break after', `${text}\n`],
    ['a line break within', `${text.slice(0, 4)}\n${text.slice(4)}`],
    ['one letter less', text.slice(1)],
    ['one letter more', `A${text}`],
    ['padding in the middle', `${text.slice(0, 2)}==${text.slice(4)}`],
    ['hexadecimal', bytes.toString('hex')],
    ['a NUL within', `${text.slice(0, 4)}\0${text.slice(5)}`],
    ['other letters', `é${text.slice(1)}`],
    ['too much padding', `${text}====`],
    ...(text.endsWith('=')
      ? ([
          ['unpadded', text.replace(/=+$/, '')],
          ['stray bits', stray.join('')],
        ] as Fault[])
      : []),
  ];
}

function keyFaults(text: string, length: number, prefix: number | null): Fault[] {
  return [
    ...looseBase64(text),
    ['no byte', ''],
    ['one byte less', base64(length - 1, prefix ?? 5)],
    ['one byte more', base64(length + 1, prefix ?? 5)],
    ['ten thousand bytes', base64(10_000)],
    ...(prefix === null
      ? []
      : ([0, 1, prefix ^ 1, prefix ^ 0x80, 0xff].map((first) => [
          `prefix byte ${first}`,
          base64(length, first),
        ]) as Fault[])),
  ];
}

/** What is wrong with a text, by the field that it stands in. */
function textFaults(path: Path, text: string): Fault[] {
  const field = path.at(-1);
  const isPq = String(path[0]).startsWith('pq');
  switch (field) {
    case 'publicKey':
      return isPq
        ? keyFaults(text, 1569, 8)
        : // One byte less than 33 is the other form, and one byte more than 32 too.
          [...keyFaults(base64(33), 33, 5).filter(([title]) => title !== 'one byte less'), ...ecFaults(path)];
    case 'identityKey':
    case 'localIdentityKey':
    case 'localSignedPreKeyPublicKey':
      return [
        ...keyFaults(base64(33), 33, 5).filter(([title]) => title !== 'one byte less'),
        ...ecFaults(path),
      ];
    case 'identityKeyEd25519':
      return keyFaults(text, 32, null);
    case 'signature':
      return keyFaults(text, 64, null);
    case 'content':
      // Hexadecimal of an even number of bytes is base64 of something.
      return [...looseBase64(base64(100)).filter(([title]) => title !== 'hexadecimal'), ['no byte', '']];
    case 'claimId':
    case 'messageId':
      return [
        ['no UUID', 'x'],
        ['empty', ''],
        ['without dashes', text.replaceAll('-', '')],
        ['in braces', `{${text}}`],
        ['with a letter that is no digit', `g${text.slice(1)}`],
        ['with a line break', `${text}\n`],
        ['with a NUL', `${text.slice(0, 35)}\0`],
      ];
    case 'userId':
      return [
        ['empty', ''],
        ['too long', 'a'.repeat(129)],
        ['huge', 'a'.repeat(1_000_000)],
        ['begins with a dot', '.a'],
        ['a slash', 'a/b'],
        ['a space', 'a b'],
        ['a letter of another script', 'ä'],
        ['a NUL', 'a\0b'],
        ['a lone surrogate', 'a\ud800'],
        ['a line break', 'a\n'],
        ['SQL', "a'; DROP TABLE devices; --"],
        ...['stats', 'check-prekeys', 'add-prekeys', 'upload'].map((id): Fault => [`reserved ${id}`, id]),
      ];
    case 'reason':
      return [
        ['too long', 'a'.repeat(257)],
        ['huge', 'a'.repeat(1_000_000)],
        ['a NUL', 'a\0b'],
        ['a lone high surrogate', 'a\ud83c'],
        ['a lone low surrogate', '\udf0a'],
        ['a pair the wrong way round', '\udf0a\ud83c'],
      ];
    case 'validation':
    case 'token':
      return [['huge', 'a'.repeat(1_000_000)]];
    case 'onMismatch':
      return [
        ['empty', ''],
        ['another word', 'ignore'],
        ['a member of every object', 'toString'],
      ];
    default:
      throw new Error(`no faults known for ${path.join('.')}`);
  }
}

/** Keys that no honest client makes. Where a signature tells of them, another code fits. */
function ecFaults(path: Path): Fault[] {
  if (path[0] !== 'oneTimePreKeys' && !String(path[0]).startsWith('local')) return [];
  const p = Buffer.from(`ed${'ff'.repeat(30)}7f`, 'hex');
  return [
    ['u = 0', Buffer.alloc(32).toString('base64')],
    ['u = 1', Buffer.concat([Buffer.from([1]), Buffer.alloc(31)]).toString('base64')],
    ['u = p', p.toString('base64')],
    ['u = p, prefixed', Buffer.concat([Buffer.from([5]), p]).toString('base64')],
    ['u above p', Buffer.alloc(32, 0xff).toString('base64')],
  ];
}

function numberFaults(path: Path): Fault[] {
  const field = [...path].reverse().find((part) => typeof part === 'string')!;
  const max = WHOLE_NUMBER_MAX[field];
  if (max === undefined) throw new Error(`no bound known for ${field}`);
  return [
    ['-1', -1],
    ['one more than the greatest', max + 1],
    ['2^63', 2 ** 63],
    ['1.5', 1.5],
    ['1e308', 1e308],
    ['5e-324', 5e-324],
    // Of these JSON makes null.
    ['NaN', Number.NaN],
    ['Infinity', Number.POSITIVE_INFINITY],
    ['a text', '1'],
    ['a text with more', '1; DROP TABLE devices'],
    ...(field === 'deviceId' ? ([['0', 0]] as Fault[]) : []),
  ];
}

function typeFaults(value: unknown): Fault[] {
  const all: [string, unknown, string][] = [
    ['null', null, 'null'],
    ['true', true, 'boolean'],
    ['a number', 5, 'number'],
    ['a text', 'x', 'string'],
    ['an object', {}, 'object'],
    ['an object with fields', { keyId: 1, length: 1, 0: 'x' }, 'object'],
    ['an operator', { $gt: '' }, 'object'],
    ['a list', [], 'list'],
    ['a list of it', [value], 'list of it'],
    ['bytes', Buffer.from('bytes'), 'bytes'],
  ];
  const type = Array.isArray(value) ? 'list' : typeof value;
  return all
    .filter(([, , wrong]) => wrong !== type)
    .map(([title, wrong]): Fault => [`${title} instead of a ${type}`, wrong]);
}

const EXTRA_FIELDS = ['extra', 'privateKey', '__proto__', 'constructor', 'toString', 'prototype', '', '0'];

/** Everything that can be wrong at one place of an input, and below it. */
function* casesAt(name: RequestName, whole: unknown, path: Path): Generator<Case> {
  const value = at(whole, path);
  const wrong = (title: string, input: unknown, where = path): Case => ({
    name,
    title: `${where.join('.') || 'the input'}: ${title}`,
    input,
    path: where,
    code: 'BAD_REQUEST',
  });
  for (const [title, fault] of typeFaults(value)) {
    yield wrong(title, replaced(whole, path, fault));
  }
  if (path.length > 0 && typeof path.at(-1) === 'string' && !isOptional(name, path)) {
    yield wrong('missing', without(whole, path));
  }
  if (typeof value === 'string') {
    for (const [title, fault] of textFaults(path, value)) yield wrong(title, replaced(whole, path, fault));
  } else if (typeof value === 'number') {
    for (const [title, fault] of numberFaults(path)) yield wrong(title, replaced(whole, path, fault));
  } else if (Array.isArray(value)) {
    yield* listCases(wrong, whole, path, value);
    for (const index of [0, value.length - 1]) yield* casesAt(name, whole, [...path, index]);
  } else if (typeof value === 'object' && value !== null) {
    for (const field of EXTRA_FIELDS) {
      for (const extra of [1, { a: [] }]) {
        yield wrong('an extra field', replaced(whole, [...path, field], extra), [...path, field]);
      }
    }
    for (const field of Object.keys(value)) yield* casesAt(name, whole, [...path, field]);
  }
}

function* listCases(
  wrong: (title: string, input: unknown, where?: Path) => Case,
  whole: unknown,
  path: Path,
  list: unknown[],
): Generator<Case> {
  const field = String(path.at(-1));
  const lengthMax = LIST_LENGTH_MAX[field];
  if (lengthMax === undefined) throw new Error(`no length known for ${field}`);
  const [first] = list;
  const idName = field === 'envelopes' ? 'deviceId' : 'keyId';
  const numbered = (id: number) =>
    typeof first === 'object'
      ? { ...(first as object), [idName]: (id % 127) + (idName === 'keyId' ? id : 1) }
      : id;
  yield wrong('one item too many', replaced(whole, path, ids(0, lengthMax + 1).map(numbered)));
  yield wrong('a hundred thousand items', replaced(whole, path, ids(0, 100_000)));
  if (field === 'envelopes') yield wrong('empty', replaced(whole, path, []));
  const twice = typeof first === 'object' ? [...path, 1, idName] : [...path, 1];
  yield wrong('the same item twice', replaced(whole, path, [first, first]), twice);
  if (typeof first === 'object') {
    const sameId = { ...(list[1] as object), [idName]: (first as Record<string, unknown>)[idName] };
    yield wrong('the same id twice', replaced(whole, path, [first, sameId]), twice);
  }
  yield wrong('a hole', replaced(whole, path, [first, undefined]), [...path, 1]);
}

function at(value: unknown, path: Path): unknown {
  return path.reduce<unknown>((inner, part) => (inner as Record<string | number, unknown>)[part], value);
}

function replaced(value: unknown, path: Path, replacement: unknown): unknown {
  const [part, ...rest] = path;
  if (part === undefined) return replacement;
  const copy: object = Array.isArray(value) ? [...value] : { ...(value as object) };
  const inner = Object.hasOwn(copy, part) ? (copy as Record<string | number, unknown>)[part] : undefined;
  // Defined, not assigned: `__proto__` is to be a field like any other, as JSON can bring it.
  Object.defineProperty(copy, part, {
    value: replaced(inner, rest, replacement),
    enumerable: true,
    configurable: true,
    writable: true,
  });
  return copy;
}

function without(value: unknown, path: Path): unknown {
  const parent = { ...(at(value, path.slice(0, -1)) as object) } as Record<string | number, unknown>;
  delete parent[path.at(-1)!];
  return replaced(value, path.slice(0, -1), parent);
}

const tables = new Map<RequestName, Case[]>(
  requestNames.map((name) => [name, [...casesAt(name, templates[name], [])]]),
);

/** Emits as the wire lets anybody do, whatever the types say. */
function emit(client: Client, event: string, ...args: unknown[]): void {
  (client.socket.emit as (event: string, ...args: unknown[]) => void).call(client.socket, event, ...args);
}

function answerTo(client: Client, event: string, ...args: unknown[]): Promise<Reply<RequestName>> {
  return new Promise((resolve) => emit(client, event, ...args, resolve));
}

/** The error of a reply that must be one: in the form that the contract gives to errors, and small. */
function errorOf(reply: Reply<RequestName>): ErrorObject {
  if (reply.ok) throw new Error(`succeeded: ${JSON.stringify(reply.data).slice(0, 200)}`);
  expect(Object.keys(reply)).toEqual(['ok', 'error']);
  expect(errorObject.strict().parse(reply.error)).toEqual(reply.error);
  expect(JSON.stringify(reply).length).toBeLessThan(32 * KIB);
  return reply.error;
}

/** Why a reply is not what a case wants; null where it is. */
function complaint(one: Case, reply: Reply<RequestName>): string | null {
  try {
    const error = errorOf(reply);
    expect(error).toMatchObject({ code: one.code, retryable: false });
    const issues = (error.details as { issues: { path: Path; message: string }[] }).issues;
    expect(issues.map((issue) => issue.path.slice(0, one.path.length))).toContainEqual(one.path);
    for (const issue of issues) expect(issue.message).not.toBe('');
    return null;
  } catch (failure) {
    return `${one.name}: ${one.title}: ${(failure as Error).message} ${JSON.stringify(reply).slice(0, 300)}`;
  }
}

const BURST = 100;

async function inBursts<Item, Result>(
  items: Item[],
  ask: (item: Item) => Promise<Result>,
): Promise<Result[]> {
  const results: Result[] = [];
  for (let start = 0; start < items.length; start += BURST) {
    results.push(...(await Promise.all(items.slice(start, start + BURST).map(ask))));
  }
  return results;
}

/** Everything that a request could have changed. */
async function everything(): Promise<unknown> {
  return {
    sender: await sender.call('keyStatus'),
    senderStats: await sender.call('keyStats'),
    recipient: await recipient.call('keyStatus'),
    recipientStats: await recipient.call('keyStats'),
    waiting: await waitingForRecipient(),
  };
}

async function waitingForRecipient(): Promise<number> {
  const { validation } = await recipient.call('validateKeys', {
    localIdentityKey: recipientKeys.identityKey(),
    localSignedPreKeyId: 1,
  });
  const { pendingCount } = await recipient.call('clientReady', { validation: validation! });
  return pendingCount;
}

describe('every request', () => {
  it.each(requestNames)('%s names each fault of its input, and stores nothing of it', async (name) => {
    const table = tables.get(name)!;
    const before = await everything();
    const replies = await inBursts(table, (one) => answerTo(sender, name, one.input));
    const complaints = table
      .map((one, index) => complaint(one, replies[index]!))
      .filter((text) => text !== null);
    expect(complaints).toEqual([]);
    expect(table.length).toBeGreaterThanOrEqual(20);
    expect(await everything()).toEqual(before);
  });

  it.each(requestNames)(
    '%s without an acknowledgement, or with more arguments, does nothing',
    async (name) => {
      const before = await everything();
      const input = templates[name];
      emit(sender, name, input);
      emit(sender, name);
      emit(sender, name, {});
      emit(sender, name, null);
      emit(sender, name, input, input);
      emit(sender, name, 'x'.repeat(10_000));
      // A function that is not the last argument is no acknowledgement: JSON makes null of it.
      emit(sender, name, () => {}, input);
      for (const more of [
        [input, input],
        [input, {}],
        [null, input],
        [() => {}, input],
        [1, 2, 3, 4, 5],
      ]) {
        expect(errorOf(await answerTo(sender, name, ...more))).toMatchObject({
          code: 'BAD_REQUEST',
          details: { issues: [{ path: [] }] },
        });
      }
      expect(await everything()).toEqual(before);
    },
  );

  it.each([
    'uploadKeys',
    'rotateSignedPreKey',
    'validateKeys',
    'requestBundle',
    'listDevices',
    'sendMessages',
    'refreshToken',
  ] as const)('%s needs an input', async (name) => {
    expect(errorOf(await answerTo(sender, name))).toMatchObject({
      code: 'BAD_REQUEST',
      details: { issues: [{ path: [] }] },
    });
    expect(errorOf(await answerTo(sender, name, {}))).toMatchObject({ code: 'BAD_REQUEST' });
  });

  it('lists every fault of one input', async () => {
    const reply = await answerTo(sender, 'uploadKeys', {
      registrationId: -1,
      identityKey: 'x',
      signedPreKey: { keyId: 2 ** 32, publicKey: '', signature: null, privateKey: 'x' },
      oneTimePreKeys: [{ keyId: '1' }],
      owner: 'somebody',
    });
    const { details } = errorOf(reply) as { details: { issues: { path: Path }[] } };
    expect(new Set(details.issues.map((issue) => issue.path.join('.')))).toEqual(
      new Set([
        'registrationId',
        'identityKey',
        'signedPreKey.keyId',
        'signedPreKey.publicKey',
        'signedPreKey.signature',
        'signedPreKey.privateKey',
        'oneTimePreKeys.0.keyId',
        'oneTimePreKeys.0.publicKey',
        'owner',
      ]),
    );
  });

  it('answers a thousand faults with a bounded list of them', async () => {
    const oneTimePreKeys = ids(0, 2000).map(() => ({ a: 1, b: 2 }));
    const extra = Object.fromEntries(ids(0, 50_000).map((index) => [`field${index}`, 1]));
    for (const input of [{ oneTimePreKeys }, { ...extra, oneTimePreKeys }, { ['x'.repeat(500_000)]: 1 }]) {
      expect(errorOf(await answerTo(sender, 'addPreKeys', input))).toMatchObject({ code: 'BAD_REQUEST' });
    }
  });
});

describe('strings that are too much for something', () => {
  it('are refused by name where the gateway would have to keep them, and never break it', async () => {
    for (const token of ['\0', 'a\ud800', 'a.b.c', '', ' ', '🌊'.repeat(1000), 'a'.repeat(8 * KIB)]) {
      expect(errorOf(await answerTo(sender, 'refreshToken', { token }))).toMatchObject({
        code: 'UNAUTHENTICATED',
      });
      expect(errorOf(await answerTo(sender, 'clientReady', { validation: token }))).toMatchObject({
        code: 'KEYS_NOT_VALIDATED',
      });
    }
    for (const character of ['\0', '\ud800', '\udfff']) {
      const inputs: [RequestName, object][] = [
        ['resetKeys', { reason: `a${character}` }],
        ['listDevices', { userId: `a${character}` }],
        ['listDevices', { userId: 'a', [character]: 1 }],
        ['requestBundle', { claimId: randomUUID(), userId: character }],
        ['requestBundle', { claimId: character, userId: 'a' }],
        ['sendMessages', { ...templates.sendMessages, onMismatch: character }],
        ['keyStatus', { [`${character}key`]: 1 }],
      ];
      for (const [name, input] of inputs) {
        expect(errorOf(await answerTo(sender, name, input))).toMatchObject({ code: 'BAD_REQUEST' });
      }
    }
    expect(await sender.call('keyStatus')).toMatchObject({ identityKey: keys.identityKey() });
  });

  it('pass where they are not', async () => {
    const somebody = await gateway.connect({ userId: 'talker', deviceId: 1 });
    for (const reason of ['', 'a'.repeat(256), 'pairs 🌊 and accents é', '\u0001\t\n']) {
      expect(await somebody.call('resetKeys', { reason })).toEqual({ keyVersion: 0 });
    }
    expect(await somebody.refusal('listDevices', { userId: 'a'.repeat(128) })).toMatchObject({
      code: 'USER_NOT_FOUND',
    });
    expect(await somebody.refusal('listDevices', { userId: 'constructor' })).toMatchObject({
      code: 'USER_NOT_FOUND',
    });
    expect(await somebody.refusal('listDevices', { userId: 'A1_.:@-z' })).toMatchObject({
      code: 'USER_NOT_FOUND',
    });
  });
});

describe('bytes where base64 is asked for', () => {
  const bytes = (length: number) => Buffer.alloc(length, 5);

  it.each([
    [
      'in a full upload',
      'uploadKeys',
      {
        registrationId: 77,
        identityKey: bytes(33),
        signedPreKey: { keyId: 1, publicKey: bytes(33), signature: bytes(64) },
        pqLastResortPreKey: { keyId: 1, publicKey: bytes(1569), signature: bytes(64) },
        oneTimePreKeys: ids(1, 100).map((keyId) => ({ keyId, publicKey: bytes(33) })),
        pqOneTimePreKeys: ids(1, 100).map((keyId) => ({
          keyId,
          publicKey: bytes(1569),
          signature: bytes(64),
        })),
      },
      'has too many fields, or binary data',
    ],
    [
      'for each device of a recipient',
      'sendMessages',
      {
        messageId: randomUUID(),
        userId: 'recipient',
        envelopes: ids(1, 127).map((deviceId) => ({
          ...{ deviceId, registrationId: 77, type: 3, content: bytes(100) },
        })),
      },
      'envelopes.0.content',
    ],
  ])('are refused %s', async (_, name, input, saying) => {
    const { code, message } = errorOf(await answerTo(sender, name, input));
    expect(code).toBe('BAD_REQUEST');
    expect(message).toContain(saying);
  });
});

describe('size', () => {
  const envelope = (deviceId: number, bytes: number) => ({
    deviceId,
    registrationId: 77,
    type: 3,
    content: base64(bytes),
  });
  const message = (...envelopes: ReturnType<typeof envelope>[]) => ({
    messageId: randomUUID(),
    userId: 'recipient',
    envelopes,
  });

  it('of one ciphertext is at most 96 KiB', async () => {
    for (const bytes of [CONTENT_BYTES_MAX + 1, 97 * KIB]) {
      expect(errorOf(await answerTo(sender, 'sendMessages', message(envelope(1, bytes))))).toMatchObject({
        code: 'PAYLOAD_TOO_LARGE',
        details: { issues: [{ path: ['envelopes', 0, 'content'] }] },
      });
    }
    expect(await waitingForRecipient()).toBe(0);
    expect(await sender.call('sendMessages', message(envelope(1, CONTENT_BYTES_MAX)))).toMatchObject({
      accepted: [1],
    });
    await eventually(() => expect(recipient.envelopes).toHaveLength(1));
  });

  it('of one request is at most 1 MiB', async () => {
    const eleven = ids(1, 11).map((deviceId) => envelope(deviceId, CONTENT_BYTES_MAX));
    expect(errorOf(await answerTo(sender, 'sendMessages', message(...eleven)))).toMatchObject({
      code: 'PAYLOAD_TOO_LARGE',
      details: { issues: [{ path: ['envelopes'] }] },
    });
    // Ten and two thirds of one are exactly a MiB: what is wrong is something else.
    const full = [...eleven.slice(1), envelope(12, 1024 * KIB - 10 * CONTENT_BYTES_MAX)];
    expect(errorOf(await answerTo(sender, 'sendMessages', message(...full)))).toMatchObject({
      code: 'DEVICES_MISMATCHED',
    });
  });

  it('is not the answer where something else is wrong as well', async () => {
    const bad = { ...envelope(1, 97 * KIB), type: 256 };
    expect(errorOf(await answerTo(sender, 'sendMessages', message(bad)))).toMatchObject({
      code: 'BAD_REQUEST',
      details: {
        issues: expect.arrayContaining([expect.objectContaining({ path: ['envelopes', 0, 'type'] })]),
      },
    });
  });
});

const ODD_NAMES = [
  'nothing',
  '',
  ' ',
  '__proto__',
  'constructor',
  'prototype',
  'toString',
  'valueOf',
  'hasOwnProperty',
  'isPrototypeOf',
  '__defineGetter__',
  'error',
  'message',
  'messages',
  'displaced',
  'end',
  'close',
  'keystatus',
  'keyStatus ',
  'keyStatus\0',
  '\ud800',
  'x'.repeat(100_000),
];

describe('an unknown event', () => {
  it.each(ODD_NAMES.map((name) => [name.slice(0, 20), name]))('called %o is refused', async (_, name) => {
    for (const args of [[], [{}], [null], [1, 2, 3], [Buffer.from('x')]]) {
      expect(errorOf(await answerTo(sender, name, ...args))).toMatchObject({
        code: 'BAD_REQUEST',
        details: { issues: [{ path: [] }] },
      });
      emit(sender, name, ...args);
    }
  });
});

describe('ten thousand bad requests on one socket', () => {
  it('are answered every one, and the good ones between them too', async () => {
    const before = await everything();
    const small = [...tables.values()]
      .flat()
      .filter((one) => JSON.stringify(one.input ?? null).length < 10_000);
    const flood = Array.from({ length: 10_000 }, (_, index) => small[(index * 7919) % small.length]!);
    let bad = 0;
    let good = 0;
    const complaints: string[] = [];
    for (let start = 0; start < flood.length; start += 500) {
      const burst = flood.slice(start, start + 500);
      const replies = Promise.all(burst.map((one) => answerTo(sender, one.name, one.input)));
      const between = Promise.all([
        sender.ask('keyStatus'),
        bystander.ask('listDevices', { userId: 'sender' }),
      ]);
      for (const [index, reply] of (await replies).entries()) {
        const text = complaint(burst[index]!, reply);
        if (text !== null) complaints.push(text);
        bad += 1;
      }
      good += (await between).filter((reply) => reply.ok).length;
    }
    expect(complaints).toEqual([]);
    expect([bad, good]).toEqual([10_000, 40]);
    expect(await everything()).toEqual(before);
    expect(sender.socket.connected).toBe(true);
  });
});

/** A connection below the client library: what it writes are packets as they are. */
interface Wire {
  /** One Socket.IO packet, with attachments; in one Engine.IO packet each. */
  packet(...parts: (string | Buffer)[]): void;
  /** One WebSocket message. */
  raw(message: string | Buffer): void;
  /** Asks a good request, and tells what came of it. */
  ask(): Promise<'answered' | 'closed'>;
  isOpen(): boolean;
  close(): void;
}

async function openWire({ admitted }: { admitted: boolean }): Promise<Wire> {
  const manager = new Manager(gateway.url, {
    transports: ['websocket'],
    reconnection: false,
    autoConnect: false,
    forceNew: true,
  });
  await new Promise<void>((resolve, reject) =>
    manager.open((error) => (error === undefined ? resolve() : reject(error))),
  );
  const { engine } = manager;
  const wire: Wire = {
    packet: (...parts) => {
      for (const part of parts) engine.write(part);
    },
    raw: (message) => {
      (engine.transport as unknown as { ws: { send(message: string | Buffer): void } }).ws.send(message);
    },
    ask: () =>
      new Promise((resolve) => {
        if (engine.readyState !== 'open') resolve('closed');
        engine.on('close', () => resolve('closed'));
        engine.on('data', (data: unknown) => {
          if (String(data).startsWith('377[{"ok":true')) resolve('answered');
        });
        engine.write('277["keyStatus",{}]');
      }),
    isOpen: () => engine.readyState === 'open',
    close: () => engine.close(),
  };
  if (admitted) {
    const token = await gateway.token({ userId: `wire-${randomUUID()}`, deviceId: 1 });
    const welcomed = new Promise<void>((resolve) =>
      engine.on('data', (data: unknown) => {
        if (String(data).startsWith('0')) resolve();
      }),
    );
    wire.packet(`0${JSON.stringify({ token })}`);
    await welcomed;
  }
  return wire;
}

const deep = (depth: number) => '['.repeat(depth) + ']'.repeat(depth);

const BAD_PACKETS: (string | Buffer)[][] = [
  ['9'],
  ['x'],
  ['2'],
  ['2['],
  ['2[]'],
  ['2{}'],
  ['2null'],
  ['2[null]'],
  ['2[1]'],
  ['2[[]]'],
  ['2[{}]'],
  ['2[true,{}]'],
  ['2"x"'],
  ['2abc'],
  ['2-1["keyStatus"]'],
  ['2999999999999999999999999999999["keyStatus",{}]'],
  [`2${'9'.repeat(1000)}["keyStatus",{}]`],
  ['2/other,1["keyStatus",{}]'],
  ['2/'],
  ['2/,'],
  ['21[1e400,{}]'],
  ['21["keyStatus",1e400]'],
  ['21["keyStatus",{"__proto__":{"polluted":1}}]'],
  ['3'],
  ['3["x"]'],
  ['31'],
  ['31["x"]'],
  ['31{}'],
  ['3999999999["x"]'],
  ['4'],
  ['4{}'],
  ['4"x"'],
  ['0'],
  ['0{}'],
  ['0null'],
  ['0[]'],
  ['0"x"'],
  ['0{"token":{"__proto__":1}}'],
  ['0/other,{}'],
  ['1'],
  ['1["x"]'],
  ['1/other,'],
  ['5'],
  ['5-["x"]'],
  ['51-'],
  ['51-["x"]'],
  ['51-["keyStatus",{"_placeholder":true,"num":0}]', '2["keyStatus"]'],
  ['511-["keyStatus",{"_placeholder":true,"num":0}]', Buffer.from('x'), '21["keyStatus"]'],
  ['51-1["keyStatus",{"_placeholder":true,"num":5}]', Buffer.from('x')],
  ['51-1["keyStatus",{"_placeholder":true,"num":-1}]', Buffer.from('x')],
  ['51-1["keyStatus",{"_placeholder":true,"num":"__proto__"}]', Buffer.from('x')],
  ['51-1["keyStatus",{"_placeholder":true}]', Buffer.from('x')],
  ['51-1["uploadKeys",{"identityKey":{"_placeholder":true,"num":0}}]', Buffer.alloc(33, 5)],
  ['52-1["keyStatus",{"_placeholder":true,"num":0}]', Buffer.from('x')],
  ['5999999999-1["keyStatus"]'],
  ['50-1["keyStatus",{}]'],
  ['5-1-1["keyStatus"]'],
  ['6'],
  ['61-1["x"]', Buffer.from('x')],
  ['7'],
  [Buffer.from('21["keyStatus"]')],
  [Buffer.alloc(0)],
  ['2["connect"]'],
  ['2["connect_error",{}]'],
  ['2["disconnect"]'],
  ['2["disconnecting"]'],
  ['2["newListener",{}]'],
  ['2["removeListener"]'],
  ['21["error",{}]'],
  [`21["keyStatus",${deep(100_000)}]`],
  [`21["sendMessages",{"envelopes":${deep(100_000)}}]`],
  [`21["x",${'{"a":'.repeat(50_000)}1${'}'.repeat(50_000)}]`],
  [`51-1["keyStatus",${deep(100_000)}]`, Buffer.from('x')],
  [`2${'['.repeat(500_000)}`],
  // More arguments than the stack can hold.
  [`21["keyStatus",{}${',{}'.repeat(100_000)}]`],
  [`21["keyStatus"${',0'.repeat(1_000_000)}]`],
];

const BAD_MESSAGES: (string | Buffer)[] = [
  '',
  '9',
  'x',
  '0',
  '0{"sid":"x"}',
  '1',
  '2',
  '2probe',
  '3',
  '3probe',
  '5',
  '6',
  'b',
  'bAAAA',
  'b====',
  Buffer.alloc(0),
  Buffer.alloc(100, 0xff),
  Buffer.from('42["keyStatus"]'),
];

describe('what is no request at all', () => {
  it.each(BAD_PACKETS.map((parts) => [String(parts[0]).slice(0, 50), parts]))(
    'as %o harms nobody but the socket that it came by',
    async (_, parts) => {
      const wire = await openWire({ admitted: true });
      wire.packet(...(parts as (string | Buffer)[]));
      expect(['answered', 'closed']).toContain(await wire.ask());
      wire.close();
      const early = await openWire({ admitted: false });
      early.packet(...(parts as (string | Buffer)[]));
      // Nobody is served who has shown no token.
      expect(await early.ask()).toBe('closed');
      expect({}).not.toHaveProperty('polluted');
    },
  );

  it.each(BAD_MESSAGES.map((message) => [String(message).slice(0, 50), message]))(
    'as message %o harms nobody but the socket that it came by',
    async (_, message) => {
      const wire = await openWire({ admitted: true });
      wire.raw(message);
      expect(['answered', 'closed']).toContain(await wire.ask());
      wire.close();
      const early = await openWire({ admitted: false });
      early.raw(message);
      expect(await early.ask()).toBe('closed');
    },
  );

  it('as requests on the heels of the token, and the token again and again, changes nothing', async () => {
    const token = await gateway.token({ userId: 'hasty', deviceId: 1 });
    const admission = `0${JSON.stringify({ token })}`;
    const outcomes = await Promise.all(
      Array.from({ length: 5 }, async () => {
        const wire = await openWire({ admitted: false });
        wire.packet(admission, '21["keyStatus",{}]', admission, '22["resetKeys",{}]', '1', admission);
        return await wire.ask();
      }),
    );
    expect(outcomes).toEqual(outcomes.map(() => 'closed'));
  });

  it('ends a socket that acknowledges a push with more arguments than the stack can hold', async () => {
    const address = { userId: 'overflow', deviceId: 1 };
    const own = new KeyMaker();
    const client = await gateway.connect(address);
    await client.call('uploadKeys', own.keySet());
    client.onMessages = () => null;
    const { engine } = client.socket.io;
    const pushed = new Promise<string>((resolve) => {
      engine.on('data', (data: unknown) => {
        const [, id] = /^2(\d+)\["messages"/.exec(String(data)) ?? [];
        if (id !== undefined) resolve(id);
      });
    });
    const { validation } = await client.call('validateKeys', {
      localIdentityKey: own.identityKey(),
      localSignedPreKeyId: 1,
    });
    await client.call('clientReady', { validation: validation! });
    await sender.call('sendMessages', {
      messageId: randomUUID(),
      userId: address.userId,
      envelopes: [{ deviceId: 1, registrationId: 77, type: 3, content: 'AAAA' }],
    });
    engine.write(`3${await pushed}[0${',0'.repeat(500_000)}]`);
    expect(await client.disconnected).toBe('transport close');
  });

  it('ends a socket whose frame is larger than any request, and that one only', async () => {
    const wire = await openWire({ admitted: true });
    wire.packet(`21["listDevices",{"userId":"${'a'.repeat(FRAME_BYTES_MAX - 100)}"}]`);
    expect(await bystander.call('keyStatus')).toMatchObject({ keyVersion: 0 });
    expect(wire.isOpen()).toBe(true);
    wire.packet(`21["listDevices",{"userId":"${'a'.repeat(FRAME_BYTES_MAX)}"}]`);
    await eventually(() => !wire.isOpen(), { that: 'the connection ended' });
    expect(sender.socket.connected).toBe(true);
    expect(bystander.socket.connected).toBe(true);
  });

  it('ends a socket whose attachments pile up to more than any request, before the last of them has come', async () => {
    const wire = await openWire({ admitted: true });
    wire.packet('55-1["keyStatus",{"_placeholder":true,"num":0}]', Buffer.alloc(FRAME_BYTES_MAX / 2));
    expect(await bystander.call('keyStatus')).toMatchObject({ keyVersion: 0 });
    expect(wire.isOpen()).toBe(true);
    wire.packet(Buffer.alloc(FRAME_BYTES_MAX / 2));
    await eventually(() => !wire.isOpen(), { that: 'the connection ended' });
  });

  it('answers as many keys as an upload may hold, sent as bytes, and ends a socket that announces more', async () => {
    const bytesInPlaceOf = (count: number) => [
      `5${count}-1["addPreKeys",{"oneTimePreKeys":${JSON.stringify(
        Array.from({ length: count }, (_, num) => ({ keyId: num, publicKey: { _placeholder: true, num } })),
      )}}]`,
      ...Array.from({ length: count }, () => Buffer.alloc(33)),
    ];
    const wire = await openWire({ admitted: true });
    wire.packet(...bytesInPlaceOf(301));
    expect(await wire.ask()).toBe('answered');
    wire.packet(...bytesInPlaceOf(513).slice(0, 1));
    await eventually(() => !wire.isOpen(), { that: 'the connection ended' });
  });

  it('gives no namespace but the one', async () => {
    const token = await gateway.token({ userId: 'wanderer', deviceId: 1 });
    const manager = new Manager(gateway.url, {
      transports: ['websocket'],
      reconnection: false,
      forceNew: true,
    });
    const refused = await Promise.all(
      ['/admin', '/__proto__', `/${'x'.repeat(10_000)}`].map(
        (namespace) =>
          new Promise<string>((resolve) => {
            const socket = manager.socket(namespace, { auth: { token } });
            socket.once('connect', () => resolve('connected'));
            socket.once('connect_error', (error) => resolve(error.message));
          }),
      ),
    );
    expect(refused).toEqual(['Invalid namespace', 'Invalid namespace', 'Invalid namespace']);
    const socket = manager.socket('/', { auth: { token } });
    expect(await socket.timeout(5_000).emitWithAck('keyStatus', {})).toMatchObject({ ok: true });
    manager.engine.close();
  });
});
