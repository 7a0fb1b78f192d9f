/**
 * Queues in PostgreSQL: every read and deletion proves, in its own statement, who is asking and for which key set.
 * What is gathered into one statement is decided here; the statements have a file for each kind.
 */
import { randomUUID } from 'node:crypto';
import { steadyClock } from '../../lib/clock.ts';
import { createGatherer, type Line } from '../../lib/gather.ts';
import { createSlots } from '../../lib/slots.ts';
import type {
  DeviceProof,
  MessageStore,
  Page,
  StoreRequest,
  StoreResult,
} from '../../ports/message-store.ts';
import { GatewayError } from '../../protocol/errors.ts';
import { addressKey, type DeviceAddress } from '../../protocol/ids.ts';
import { numberArray, textArray } from './array-literal.ts';
import { type Database, select } from './database.ts';
import { createDeviceTurns } from './device-turns.ts';
import {
  type AcknowledgeRequest,
  acknowledgeStatement,
  type BouncedRow,
  bindAcknowledge,
  bouncedStatement,
  bounceStatement,
  copyBounceStatement,
  fewOfOne,
  inOrder,
  putOffStatement,
  removeBouncedStatement,
} from './end-statements.ts';
import { staleStatement, sweepStatements } from './message-retention.ts';
import {
  bindRead,
  connectStatement,
  lookStatement,
  noteServedStatement,
  proveStatement,
  type ReadRequest,
  readStatement,
  revokedStatement,
  toPages,
  toProof,
} from './reader-statements.ts';
import {
  bindServeMany,
  type HeldRow,
  type ServedRow,
  type ServeRequest,
  serveManyStatement,
  serveStatement,
} from './serve-statements.ts';
import { bindStore, contentBytes, storeStatement, toStoreResults } from './store-statement.ts';

/** Requests in one statement, and the bytes and rows that they bring or ask for. */
const STORE_BATCH = { requests: 512, bytes: 1 << 20 };
/** What a row weighs without its content: some 4,000 empty ones fill a statement. */
const ROW_BYTES = 256;
const READ_BATCH = { requests: 64, bytes: 4 << 20 };
const CONNECT_BATCH = 128;
const SERVE_BATCH = 64;
/** Times that a connection asks to be served whose device is being changed, which mostly ends soon, before it waits for it. */
const SERVE_TRIES_MAX = 3;
/** Devices that are waited for at once, on a connection each. */
const SERVED_LATER = { slotCount: 3, waitingMax: 1_000, waitMaxMs: 5_000 };
const ACKNOWLEDGE_BATCH = { requests: 512, rows: 1_024 };
/** Of all that waits to be stored. */
const STORE_LINE_BYTES_MAX = 64 << 20;

const LINE: Line = { refusal: () => new GatewayError('UNAVAILABLE', undefined, { retryAfterMs: 1_000 }) };

type Connected = Awaited<ReturnType<MessageStore['connect']>>;

export function createMessageStore(database: Database): MessageStore {
  const stores = createGatherer<StoreRequest, StoreResult | null>({
    batchMax: STORE_BATCH.requests,
    weight: { of: storeBytes, max: STORE_BATCH.bytes },
    line: { ...LINE, weightMax: STORE_LINE_BYTES_MAX },
    run: async (requests) =>
      toStoreResults(requests, await database.hot(storeStatement, bindStore(requests))),
  });
  const reads = createGatherer<ReadRequest, Page | null>({
    batchMax: READ_BATCH.requests,
    weight: { of: ({ page }) => page.bytesMax, max: READ_BATCH.bytes },
    line: LINE,
    run: async (requests) => toPages(requests, await database.hot(readStatement, bindRead(requests))),
  });
  const acknowledgements = createGatherer<AcknowledgeRequest, number>({
    batchMax: ACKNOWLEDGE_BATCH.requests,
    weight: { of: ({ sequences }) => sequences.length, max: ACKNOWLEDGE_BATCH.rows },
    line: LINE,
    async run(requests) {
      const rows = await database.hot(acknowledgeStatement, bindAcknowledge(requests));
      const counts = requests.map(() => 0);
      for (const { ord, deleted } of rows) counts[ord] = deleted;
      return counts;
    },
  });

  const connects = createGatherer<DeviceAddress, Connected>({
    batchMax: CONNECT_BATCH,
    lingersBy: steadyClock,
    line: LINE,
    async run(connecting) {
      const rows = await database.hot(connectStatement, {
        ords: numberArray(connecting.map((_, ord) => ord)),
        userIds: textArray(connecting.map((device) => device.userId)),
        deviceIds: numberArray(connecting.map((device) => device.deviceId)),
      });
      return rows.map((row) => ({
        fence: row.fence,
        lowNoticeVersion: row.low_notice_version,
        revokedAtMs: row.revoked_at_ms,
      }));
    },
  });

  /** Null for what is not to be served. */
  const serves = createGatherer<ServeRequest, ServedRow | HeldRow | null>({
    batchMax: SERVE_BATCH,
    lingersBy: steadyClock,
    line: LINE,
    async run(requests) {
      const rows = await database.hot(serveManyStatement, bindServeMany(requests));
      const served: (ServedRow | HeldRow | null)[] = requests.map(() => null);
      for (const row of rows) served[row.ord] = row;
      return served;
    },
  });
  const inTurn = createDeviceTurns();
  const servedLater = createSlots({ clock: steadyClock, ...SERVED_LATER });

  async function serve(request: ServeRequest): Promise<ServedRow | null> {
    for (let tries = 0; tries < SERVE_TRIES_MAX; tries++) {
      const row = await serves.submit(request);
      if (row === null || row.key_version !== null) return row;
    }
    // Beside the hot statements: what is sent behind one that waits for a row waits for it too.
    const [row] = await servedLater.run(() =>
      database.run((db) => select<ServedRow>(db, serveStatement(request))),
    );
    return row ?? null;
  }

  async function prove(device: DeviceAddress): Promise<DeviceProof | null> {
    const [row] = await database.hot(proveStatement, { ...device });
    return row === undefined ? null : toProof(row);
  }

  return {
    store: (request) => stores.submit(request),

    connect: (device) => connects.submit(device),

    async serve(reader, keyVersion, nowMs) {
      const row = await inTurn(reader.device, () => serve({ reader, keyVersion, nowMs }));
      if (row !== null) {
        const { pending_count: pendingCount, newest_sequence: newestSequence } = row;
        return { proof: toProof(row), served: true, pendingCount, newestSequence };
      }
      // A new statement: the one before may have waited for the very change that refuses it, and has not seen it.
      const proof = await prove(reader.device);
      return proof === null ? null : { proof, served: false, pendingCount: 0, newestSequence: 0 };
    },

    read: (reader, page) => reads.submit({ reader, page }),

    prove,

    acknowledge: (reader, sequences) => acknowledgements.submit({ reader, sequences }),

    async putOff({ device, fence }, unsorted, nowMs) {
      const failures = inOrder(unsorted);
      const rows = await database.hot(putOffStatement, {
        ...device,
        fence,
        sequences: numberArray(failures.map((failure) => failure.sequence)),
        undecryptable: `{${failures.map((failure) => failure.reason === 'undecryptable').join(',')}}`,
        nowMs,
      });
      const dueTimes = rows.filter((row) => row.pending).map((row) => row.due_at_ms!);
      return {
        nextDueAtMs: dueTimes.length === 0 ? null : Math.min(...dueTimes),
        bounced: rows.some((row) => !row.pending),
      };
    },

    async bounce(device, unsorted) {
      const unreadable = inOrder(unsorted);
      await database.hot(bounceStatement, {
        ...device,
        sequences: numberArray(unreadable.map((item) => item.sequence)),
        reasons: textArray(unreadable.map((item) => item.reason)),
      });
    },

    async settleBounces(of, { nowMs, expiresAtMs, limit }) {
      const found = await database.run(
        async (db) => (await db.execute(bouncedStatement(of, limit))) as unknown as BouncedRow[],
      );
      const bounced = inOrder(found);
      const senders = new Map<string, DeviceAddress>();
      // One sender's rows, then one recipient's rows: no statement spans two users.
      for (const [userId, rows] of fewOfOne(bounced, (row) => row.peer_user_id)) {
        await database.hot(copyBounceStatement, {
          userId,
          deviceIds: numberArray(rows.map((row) => row.peer_device_id)),
          recipientUserIds: textArray(rows.map((row) => row.user_id)),
          recipientDeviceIds: numberArray(rows.map((row) => row.device_id)),
          messageIds: textArray(rows.map((row) => row.message_id)),
          reasons: textArray(rows.map((row) => row.bounce_reason)),
          ids: textArray(rows.map(() => randomUUID())),
          nowMs,
          expiresAtMs,
        });
        for (const row of rows) {
          const sender = { userId, deviceId: row.peer_device_id };
          senders.set(addressKey(sender), sender);
        }
      }
      const home: BouncedRow[] = [];
      for (const [userId, rows] of fewOfOne(bounced, (row) => row.user_id)) {
        const removed = await database.hot(removeBouncedStatement, {
          userId,
          deviceIds: numberArray(rows.map((row) => row.device_id)),
          sequences: numberArray(rows.map((row) => row.sequence)),
        });
        // What another node settled at the same time is not counted twice.
        const sequences = new Set(removed.map((row) => row.sequence));
        home.push(...rows.filter((row) => sequences.has(row.sequence)));
      }
      return {
        bounced: home.map((row) => ({
          recipient: { userId: row.user_id, deviceId: row.device_id },
          sender: { userId: row.peer_user_id, deviceId: row.peer_device_id },
          messageId: row.message_id,
          reason: row.bounce_reason,
        })),
        senders: [...senders.values()],
        more: bounced.length === limit,
      };
    },

    async bounceStale(of, cut) {
      return await database.upkeep(async (tx) => (await tx.execute(staleStatement(of, cut))).count);
    },

    async sweep({ nowMs, forgetBeforeMs, limit }) {
      let touched = 0;
      const failures: unknown[] = [];
      for (const statement of sweepStatements({ nowMs, forgetBeforeMs, limit })) {
        try {
          touched += await database.upkeep(async (tx) => (await tx.execute(statement)).count);
        } catch (error) {
          failures.push(error);
        }
      }
      if (failures.length > 0) throw failures[0];
      return touched;
    },

    async revokedSince(sinceMs, limit) {
      const rows = await database.hot(revokedStatement, { sinceMs, limit });
      return rows.map((row) => ({ userId: row.user_id, deviceId: row.device_id }));
    },

    async noteServed(readers, nowMs) {
      if (readers.length === 0) return;
      await database.run(async (db) => await db.execute(noteServedStatement(readers, nowMs)));
    },

    async inNeedOfALook(readers, nowMs) {
      if (readers.length === 0) return [];
      const rows = await database.hot(lookStatement, {
        userIds: textArray(readers.map((reader) => reader.device.userId)),
        deviceIds: numberArray(readers.map((reader) => reader.device.deviceId)),
        fences: numberArray(readers.map((reader) => reader.fence)),
        keyVersions: numberArray(readers.map((reader) => reader.keyVersion)),
        noticeVersions: numberArray(readers.map((reader) => reader.lowNoticeVersion)),
        inFlightCounts: numberArray(readers.map((reader) => reader.inFlight)),
        nowMs,
      });
      return rows.map((row) => ({ userId: row.user_id, deviceId: row.device_id }));
    },
  };
}

function storeBytes(request: StoreRequest): number {
  return contentBytes(request) + request.messages.length * ROW_BYTES;
}
