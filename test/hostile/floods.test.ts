/**
 * Peers that write as fast as they can what nobody should, at a gateway with the limits that it has by itself: the node
 * keeps its memory, and everybody else is served.
 */
import { randomUUID } from 'node:crypto';
import { gzipSync } from 'node:zlib';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { FRAME_BYTES_MAX, TOKEN_LENGTH_MAX } from '../../src/protocol/limits.ts';
import { connectClient, tokenFor } from '../support/gateway.ts';
import { KeyMaker } from '../support/key-maker.ts';
import {
  frame,
  OPCODE,
  openAdmittedPeer,
  openPeer,
  openWebSocketPeer,
  type RawPeer,
  text,
  upgradeRequest,
} from './raw-peer.ts';
import { attackerToken, DEFAULT_LIMITS, startTarget, type Target } from './target.ts';

const MIB = 1024 * 1024;

let target: Target;
let url: string;

beforeAll(async () => {
  target = await startTarget(DEFAULT_LIMITS);
  ({ url } = target.gateway);
});
afterAll(() => target?.stop());

let attackers = 0;

/** A peer that has a token of its own, as every user has. */
async function admitted(): Promise<RawPeer> {
  attackers += 1;
  return await openAdmittedPeer(
    url,
    await attackerToken(String(attackers)),
    `127.0.2.${1 + (attackers % 250)}`,
  );
}

/** Writes as fast as the peer's connection takes it, until all is written or the connection is cut. */
async function pour(peer: RawPeer, chunk: Buffer, bytesMax: number): Promise<void> {
  for (let written = 0; written < bytesMax && !peer.isCut; written += chunk.length) await peer.write(chunk);
}

/** As much of one thing as fits into a chunk that is worth a system call. */
function repeated(one: Buffer): Buffer {
  return Buffer.concat(Array.from({ length: Math.max(1, Math.floor((64 * 1024) / one.length)) }, () => one));
}

/** Whether the peer is answered after all that it wrote. */
async function isServed(peer: RawPeer): Promise<boolean> {
  await peer.write(text('42777["keyStatus",{}]'));
  return await peer.seen('43777[');
}

const placeholder = '{"_placeholder":true,"num":0}';
const deep = (depth: number): string => '['.repeat(depth) + ']'.repeat(depth);

/** What ten peers pour, each; the frames of a chunk begin and end with it. */
const FLOODS: Record<string, { one: Buffer; bytes: number }> = {
  'requests without an acknowledgement': { one: text('42["keyStatus",{}]'), bytes: MIB },
  'unknown events': { one: text('421["__proto__",{}]'), bytes: MIB },
  'acknowledgements of nothing': { one: text('431[{"processed":[]}]'), bytes: MIB },
  'attachments announced and never sent': {
    one: text(`451-1["keyStatus",${placeholder}]`),
    bytes: MIB,
  },
  'attachments that nobody announced': { one: frame(OPCODE.binary, Buffer.alloc(100)), bytes: MIB },
  'large attachments, the last of ten never sent': {
    one: Buffer.concat([
      text(`4510-1["keyStatus",${placeholder}]`),
      ...Array.from({ length: 9 }, () => frame(OPCODE.binary, Buffer.alloc(FRAME_BYTES_MAX))),
    ]),
    bytes: 1,
  },
  'other namespaces': { one: text('40/somewhere,{}'), bytes: MIB },
  'pings of the engine': { one: text('2'), bytes: MIB },
  'pongs of the engine': { one: text('3'), bytes: MIB },
  'packets of no known kind': { one: text('9'), bytes: MIB },
  'upgrades that lead nowhere': { one: text('5'), bytes: MIB },
  'base64 that is none': { one: text('b====%%%'), bytes: MIB },
  'empty messages': { one: text(''), bytes: MIB },
  'broken UTF-8': { one: frame(OPCODE.text, Buffer.from([0xff, 0xfe])), bytes: MIB },
  'pings of the WebSocket': { one: frame(OPCODE.ping, ''), bytes: MIB },
  'pongs of the WebSocket': { one: frame(OPCODE.pong, ''), bytes: MIB },
  'a message in fragments of one byte': {
    one: frame(OPCODE.continuation, 'x', { isLast: false }),
    bytes: MIB,
  },
  'opcodes that are reserved': { one: frame(0xb, ''), bytes: MIB },
  'JSON nested 400,000 deep': { one: text(`421["keyStatus",${deep(400_000)}]`), bytes: 4 * MIB },
  'JSON as large as a frame': {
    one: text(`421["uploadKeys",{"oneTimePreKeys":[${'{"keyId":1},'.repeat(150_000)}{}]}]`),
    bytes: 8 * MIB,
  },
};

describe('ten peers that pour', () => {
  it.each(Object.entries(FLOODS))('%s keep nobody from being served', async (name, { one, bytes }) => {
    await target.attack(`ten times ${name}`, async () => {
      const peers = await Promise.all(Array.from({ length: 10 }, admitted));
      if (name.includes('fragments')) {
        await Promise.all(peers.map((peer) => peer.write(frame(OPCODE.text, '4', { isLast: false }))));
      }
      const chunk = repeated(one);
      await Promise.all(peers.map((peer) => pour(peer, chunk, bytes)));
      const served = await Promise.all(peers.map(isServed));
      process.stdout.write(
        `  hostile: ${peers.filter((peer) => peer.isCut).length} of ten were cut, ${served.filter(Boolean).length} served on\n`,
      );
      for (const peer of peers) peer.destroy();
    });
  });
});

describe('a peer that reads nothing', () => {
  it.each([
    ['pings of the WebSocket', frame(OPCODE.ping, Buffer.alloc(125))],
    ['requests', text('421["keyStatus",{}]')],
  ])('and pours %s is cut before the answers take the node’s memory', async (name, one) => {
    await target.attack(`unread answers to ${name}`, async () => {
      const peer = await admitted();
      peer.socket.pause();
      const chunk = repeated(one);
      while (!peer.isClosed) await peer.write(chunk);
    });
  });

  it('can’t get past that bound by moving its session to another WebSocket', async () => {
    const peer = await admitted();
    const [, sid] = /"sid":"([^"]+)"/.exec(peer.received) ?? [];
    const second = await openPeer(url, '127.0.2.251');
    await second.write(upgradeRequest(url, { query: `&sid=${sid}` }));
    expect(await second.seen('HTTP/1.1 400')).toBe(true);
    await second.closed;
    expect(await isServed(peer)).toBe(true);
    peer.destroy();
  });
});

describe('a stranger', () => {
  it('who sends more than a token takes is cut, and two hundred of them cost nothing', async () => {
    await target.attack('200 strangers with 2 MiB each', async () => {
      const peers = await Promise.all(
        Array.from({ length: 200 }, (_, index) => openWebSocketPeer(url, `127.0.3.${1 + index}`)),
      );
      const payload = Buffer.alloc(FRAME_BYTES_MAX - 100, 'x');
      const started = frame(OPCODE.text, payload, { announcedBytes: FRAME_BYTES_MAX });
      await Promise.all(peers.map((peer) => peer.write(started)));
      await Promise.all(peers.map((peer) => peer.closed));
    });
  });

  it('may show a token as long as tokens are', async () => {
    const peer = await openWebSocketPeer(url);
    await peer.write(text(`40${JSON.stringify({ token: 'x'.repeat(TOKEN_LENGTH_MAX) })}`));
    expect(await peer.seen('UNAUTHENTICATED')).toBe(true);
    peer.destroy();
  });
});

describe('compression', () => {
  it('is not agreed to, so that no message can be larger than it came', async () => {
    const peer = await openPeer(url);
    await peer.write(
      upgradeRequest(url, {
        headers: [
          'Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits, x-webkit-deflate-frame',
        ],
      }),
    );
    expect(await peer.seen('"maxPayload"')).toBe(true);
    expect(peer.received).toContain('HTTP/1.1 101');
    expect(peer.received.toLowerCase()).not.toContain('sec-websocket-extensions');
    // A frame that says it is compressed, all the same.
    await peer.write(frame(0x40 | OPCODE.text, Buffer.alloc(100)));
    await peer.closed;
  });

  it('is not undone in HTTP bodies either', async () => {
    const answer = await fetch(`${url}/api/keys/add-prekeys`, {
      method: 'POST',
      headers: {
        authorization: `Bearer ${await attackerToken('gzip')}`,
        'content-type': 'application/json',
        'content-encoding': 'gzip',
      },
      body: gzipSync('{"preKeys":[]}'),
    });
    expect([answer.status, await answer.json()]).toMatchObject([400, { error: { code: 'BAD_REQUEST' } }]);
  });
});

async function fiveNewcomers(): Promise<void> {
  for (let n = 0; n < 5; n++) await target.serveNewcomer();
}

describe('HTTP bodies', () => {
  const post = async (body: string, path = '/api/keys/add-prekeys'): Promise<number> => {
    const answer = await fetch(url + path, {
      method: 'POST',
      headers: {
        authorization: `Bearer ${await attackerToken('http')}`,
        'content-type': 'application/json',
      },
      body,
    });
    await answer.arrayBuffer();
    return answer.status;
  };

  it.each([
    ['nested 900,000 deep', deep(900_000), 400],
    ['as large as may be', `{"preKeys":[${'{"keyId":1},'.repeat(170_000)}{}]}`, 400],
    ['with 100,000 names', `{${Array.from({ length: 100_000 }, (_, n) => `"n${n}":1`).join()}}`, 400],
    ['with one name 400,000 times', `{${'"a":1,'.repeat(300_000)}"a":1}`, 400],
    ['larger than may be', `"${'x'.repeat(FRAME_BYTES_MAX)}"`, 413],
    ['a number of a million digits', '9'.repeat(1_000_000), 400],
  ])('%s are refused, thirty at once', async (name, body, status) => {
    await target.attack(`30 bodies ${name}`, async () => {
      const statuses = await Promise.all(
        Array.from({ length: 30 }, () => post(body, '/signal/validate-and-sync')),
      );
      expect(new Set(statuses)).toEqual(new Set([status]));
    });
  });

  it('that strangers send are not read', async () => {
    await target.attack('100 strangers with bodies', async () => {
      const peers = await Promise.all(
        Array.from({ length: 100 }, async (_, index) => {
          const peer = await openPeer(url, `127.0.4.${1 + index}`);
          await peer.write(
            `POST /api/keys/upload HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: ${FRAME_BYTES_MAX}\r\n\r\n{`,
          );
          expect(await peer.seen('HTTP/1.1 401')).toBe(true);
          return peer;
        }),
      );
      for (const peer of peers) peer.destroy();
    });
  });

  it('by the thousand on one connection whose answers nobody reads are not piled up', async () => {
    await target.attack('pipelined requests, unread', async () => {
      const peer = await openPeer(url, '127.0.4.200');
      peer.socket.pause();
      const chunk = repeated(Buffer.from('GET /api/keys/stats HTTP/1.1\r\nHost: x\r\n\r\n'));
      // The node stops reading where its answers are not read, and cuts the connection when nothing moves.
      let isTaken = true;
      for (let written = 0; written < 64 * MIB && isTaken; written += chunk.length) {
        isTaken = await Promise.race([
          peer.write(chunk).then(() => !peer.isClosed),
          fiveNewcomers().then(() => false),
        ]);
      }
      expect(isTaken).toBe(false);
      peer.destroy();
    });
  });
});

describe('requests for the engine by plain HTTP', () => {
  it('of every kind are answered or cut', async () => {
    await target.attack('odd requests to the engine', async () => {
      const peer = await admitted();
      const [, sid] = /"sid":"([^"]+)"/.exec(peer.received) ?? [];
      const queries = [
        '',
        '?EIO=4',
        '?EIO=3&transport=websocket',
        '?EIO=4&transport=polling',
        '?EIO=4&transport=__proto__',
        '?EIO=4&transport=constructor',
        `?EIO=4&transport=websocket&sid=${sid}`,
        `?EIO=4&transport=websocket&sid=${randomUUID()}`,
        '?EIO=4&transport=websocket&sid=__proto__',
        '?%00&%ff=%fe',
      ];
      for (const query of queries) {
        for (const method of ['GET', 'POST', 'PUT', 'DELETE', 'OPTIONS']) {
          const answer = await fetch(`${url}/socket.io/${query}`, { method });
          expect(answer.status, `${method} ${query}`).toBe(400);
          await answer.arrayBuffer();
        }
      }
      expect(await isServed(peer)).toBe(true);
      peer.destroy();
    });
  });
});

describe('acknowledgements', () => {
  it.each(['processed', 'failed'])('whose %s list is as long as a frame are not looked at', async (field) => {
    const alice = { address: { userId: `alice-${field}`, deviceId: 1 }, keys: new KeyMaker() };
    const bob = { address: { userId: `bob-${field}`, deviceId: 1 }, keys: new KeyMaker() };
    const connectAs = async ({ address, keys }: typeof alice) => {
      const client = await connectClient(url, await tokenFor(address));
      await client.call('uploadKeys', keys.keySet());
      return client;
    };
    const [sender, reader] = [await connectAs(alice), await connectAs(bob)];
    reader.onMessages = () => null;
    reader.socket.on('messages', (_, acknowledge) => {
      const lists = { processed: [], failed: [], [field]: Array(600_000).fill({}) };
      acknowledge(lists as never);
    });
    const { registrationId, signedPreKey } = bob.keys.keySet();
    const { validation } = await reader.call('validateKeys', {
      localIdentityKey: bob.keys.identityKey(),
      localSignedPreKeyId: signedPreKey.keyId,
    });
    await target.attack(`an acknowledgement of 600,000 ${field}`, async () => {
      await reader.call('clientReady', { validation: validation! });
      await sender.call('sendMessages', {
        messageId: randomUUID(),
        userId: bob.address.userId,
        envelopes: [{ deviceId: 1, registrationId, type: 3, content: 'eA==' }],
      });
      // As one that says nothing: it may come back, and gets the message again.
      expect(await reader.disconnected).toBe('transport close');
    });
    sender.close();
  });
});
