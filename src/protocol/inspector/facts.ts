/** Served sockets, key sets, claims and queues, as they stand. */
import { z } from 'zod';
import { bounceReason } from '../envelope.ts';
import { gateClosedReason } from '../events.ts';
import { time } from '../ids.ts';
import { count, deviceKey, gateName, socketNumber } from './values.ts';

export const gateStep = z.object({
  time,
  to: gateName,
  keyVersion: z.int().nullable(),
  reason: gateClosedReason.nullable(),
});
export type GateStepSeen = z.infer<typeof gateStep>;

/** One served socket, as its node sees it. */
export const socketFacts = z.object({
  node: z.string(),
  socket: socketNumber,
  device: deviceKey,
  openedAt: time,
  gate: gateName,
  /** What the gate stands on; null while nothing is proven. */
  keyVersion: z.int().nullable(),
  /** The latest steps, oldest first; at most {@link GATE_HISTORY_MAX}. */
  gateHistory: z.array(gateStep),
  /** Pushed and not yet acknowledged. */
  windowCount: count,
  windowBytes: count,
  /** Nothing more is pushed until an acknowledgement makes room. */
  windowFull: z.boolean(),
  /** When the oldest push without an acknowledgement left; null where there is none. */
  oldestPushAt: time.nullable(),
  /** Of the latest ping; null before the first. */
  roundTripMs: z.number().nullable(),
  /** Written and not yet taken by the network. */
  bufferedBytes: count,
  tokenExpiresAt: time,
  /** The token ran out: nothing is handed out until a new one comes. */
  paused: z.boolean(),
});
export type SocketFacts = z.infer<typeof socketFacts>;
export const GATE_HISTORY_MAX = 16;

/** Sockets in one answer. */
export const SOCKETS_MAX = 500;

/** A device's key set: ids, counts, versions and times; never a key. */
export const keySetFacts = z.object({
  registrationId: z.int(),
  signedPreKeyId: z.int().nullable(),
  signedPreKeyExpiresAt: time.nullable(),
  pqLastResortPreKeyId: z.int().nullable(),
  availableCount: count,
  pqAvailableCount: count,
  /** Handed out under the present identity. */
  claimedCount: count,
  pqClaimedCount: count,
  /** Below it, a pool is low. */
  lowThreshold: count,
  updatedAt: time.nullable(),
});
export type KeySetFacts = z.infer<typeof keySetFacts>;

export const claimFacts = z.object({
  claimer: deviceKey,
  claimId: z.string(),
  claimedAt: time,
  signedPreKeyId: z.int(),
  /** Null where none was left. */
  keyId: z.int().nullable(),
  /** Null where it went out with the last-resort key, or with none. */
  pqKeyId: z.int().nullable(),
  pqFallback: z.boolean(),
});
export type ClaimFacts = z.infer<typeof claimFacts>;

/** An envelope that waits in a device's queue; its content is a number of bytes. */
export const pendingFacts = z.object({
  envelopeId: z.string(),
  messageId: z.string(),
  kind: z.enum(['message', 'bounce']),
  /** The sender of a message; the recipient that a bounce tells of. */
  peer: deviceKey,
  bytes: count,
  storedAt: time,
  expiresAt: time,
  /** Set after it failed: not offered before then. */
  dueAt: time.nullable(),
  undecryptableCount: count,
  temporaryCount: count,
  /** Set while it is on its way back to its sender. */
  bounceReason: bounceReason.nullable(),
});
export type PendingFacts = z.infer<typeof pendingFacts>;
