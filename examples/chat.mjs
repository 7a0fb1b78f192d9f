// node chat.mjs "<token of alice>" "<token of bob>" [gateway]
// Alice writes to Bob, who is away, and Bob reads it when he comes back: end-to-end encrypted, each key used once.
// A real client leaves keys and ciphertext to a Signal library; here X25519 and AES-GCM of Node stand for it.
import {
  createCipheriv,
  createDecipheriv,
  createPublicKey,
  diffieHellman,
  generateKeyPairSync,
  hkdfSync,
  randomUUID,
  sign,
} from 'node:crypto';
import { io } from 'socket.io-client';

const [aliceToken, bobToken, gateway = 'http://127.0.0.1:3000'] = process.argv.slice(2);

const raw = (publicKey) => publicKey.export({ format: 'der', type: 'spki' }).subarray(-32);
const x25519 = (bytes) =>
  createPublicKey({
    key: Buffer.concat([Buffer.from('302a300506032b656e032100', 'hex'), bytes]),
    format: 'der',
    type: 'spki',
  });

/** What a device makes once and keeps: only the public halves ever leave it. */
function makeDevice() {
  const identity = generateKeyPairSync('x25519');
  const signer = generateKeyPairSync('ed25519');
  const keys = new Map(Array.from({ length: 20 }, (_, id) => [id, generateKeyPairSync('x25519')]));
  const publicKey = (id) => raw(keys.get(id).publicKey).toString('base64');
  return {
    keys,
    upload: {
      registrationId: 1,
      identityKey: raw(identity.publicKey).toString('base64'),
      identityKeyEd25519: raw(signer.publicKey).toString('base64'),
      signedPreKey: {
        keyId: 0,
        publicKey: publicKey(0),
        signature: sign(null, raw(keys.get(0).publicKey), signer.privateKey).toString('base64'),
      },
      oneTimePreKeys: [...keys.keys()].slice(1).map((keyId) => ({ keyId, publicKey: publicKey(keyId) })),
    },
  };
}

const secret = (privateKey, publicKey) =>
  Buffer.from(hkdfSync('sha256', diffieHellman({ privateKey, publicKey }), '', 'chat', 32));

/** For one reader, under one one-time prekey of his. */
function seal(text, { keyId, publicKey }) {
  const once = generateKeyPairSync('x25519');
  const cipher = createCipheriv(
    'aes-256-gcm',
    secret(once.privateKey, x25519(Buffer.from(publicKey, 'base64'))),
    Buffer.alloc(12),
  );
  const body = Buffer.concat([cipher.update(text, 'utf8'), cipher.final(), cipher.getAuthTag()]);
  return Buffer.concat([Buffer.from([keyId]), raw(once.publicKey), body]).toString('base64');
}

function unseal(content, keys) {
  const bytes = Buffer.from(content, 'base64');
  const keyId = bytes[0];
  const key = secret(keys.get(keyId).privateKey, x25519(bytes.subarray(1, 33)));
  const decipher = createDecipheriv('aes-256-gcm', key, Buffer.alloc(12)).setAuthTag(bytes.subarray(-16));
  const text = Buffer.concat([decipher.update(bytes.subarray(33, -16)), decipher.final()]).toString();
  keys.delete(keyId); // Nobody can read this message ever again.
  return text;
}

/** A socket whose requests give their data, or throw why not. */
function connect(token) {
  const socket = io(gateway, { transports: ['websocket'], auth: { token }, forceNew: true });
  socket.on('connect_error', (error) => console.error('refused:', error.data ?? error.message));
  const call = async (name, input = {}) => {
    const reply = await socket.emitWithAck(name, input);
    if (!reply.ok) throw new Error(`${name}: ${reply.error.code}: ${reply.error.message}`);
    return reply.data;
  };
  return { socket, call };
}

const bob = makeDevice();
let line = connect(bobToken);
await line.call('uploadKeys', { ...bob.upload, replaceIdentity: true });
console.log('bob    uploads his public keys, and goes away');
line.socket.close();

const alice = makeDevice();
const aliceLine = connect(aliceToken);
await aliceLine.call('uploadKeys', { ...alice.upload, replaceIdentity: true });
const bundle = await aliceLine.call('requestBundle', { claimId: randomUUID(), userId: 'bob' });
const envelopes = bundle.devices.map(({ deviceId, registrationId, oneTimePreKey, signedPreKey }) => {
  console.log(
    `alice  gets the one-time prekey ${oneTimePreKey?.keyId ?? '(none left)'} of bob's device ${deviceId}`,
  );
  return { deviceId, registrationId, type: 3, content: seal('hello, bob', oneTimePreKey ?? signedPreKey) };
});
await aliceLine.call('sendMessages', { messageId: randomUUID(), userId: 'bob', envelopes });
console.log('alice  sends; the gateway keeps ciphertext until bob has proven his keys');
aliceLine.socket.close();

line = connect(bobToken);
const read = new Promise((resolve) => {
  line.socket.on('messages', ({ envelopes }, acknowledge) => {
    for (const { sender, content } of envelopes)
      console.log(`bob    reads of ${sender.userId}: ${unseal(content, bob.keys)}`);
    acknowledge({ processed: envelopes.map(({ id }) => id) });
  });
  line.socket.on('queueEmpty', resolve);
});
const { keysValid, validation } = await line.call('validateKeys', {
  localIdentityKey: bob.upload.identityKey,
  localSignedPreKeyId: 0,
  localPreKeyIds: [...bob.keys.keys()].slice(1),
});
console.log(`bob    comes back; his keys are ${keysValid ? 'in step' : 'not in step'}`);
await line.call('clientReady', { validation });
await read;
console.log('bob    has read everything');
line.socket.close();
