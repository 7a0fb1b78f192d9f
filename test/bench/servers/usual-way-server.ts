/**
 * How such a server is usually written: a Redis lock for the device, then a Drizzle transaction that selects the
 * oldest unclaimed prekey FOR UPDATE and marks it, for every single request.
 */
import { randomUUID } from 'node:crypto';
import { setTimeout as wait } from 'node:timers/promises';
import { and, asc, eq } from 'drizzle-orm';
import { drizzle } from 'drizzle-orm/postgres-js';
import { Redis } from 'ioredis';
import postgres from 'postgres';
import { serveSockets } from './socket-server.ts';
import { usualDevices, usualPreKeys } from './usual-way-schema.ts';

const LOCK_MS = 10_000;
const LOCK_RETRY_MS = 10;
const CONNECTIONS = 10;

const db = drizzle(postgres(process.env.BENCH_DATABASE_URL ?? '', { max: CONNECTIONS }));
const redis = new Redis(process.env.BENCH_REDIS_URL ?? '');

async function underLock<Result>(key: string, action: () => Promise<Result>): Promise<Result> {
  const token = randomUUID();
  while ((await redis.set(key, token, 'PX', LOCK_MS, 'NX')) === null) await wait(LOCK_RETRY_MS);
  try {
    return await action();
  } finally {
    if ((await redis.get(key)) === token) await redis.del(key);
  }
}

async function bundleOf(userId: string, deviceId: number): Promise<object> {
  return await underLock(`usual:${userId}.${deviceId}`, () =>
    db.transaction(async (tx) => {
      const [device] = await tx
        .select()
        .from(usualDevices)
        .where(and(eq(usualDevices.userId, userId), eq(usualDevices.deviceId, deviceId)));
      const [preKey] = await tx
        .select()
        .from(usualPreKeys)
        .where(
          and(
            eq(usualPreKeys.userId, userId),
            eq(usualPreKeys.deviceId, deviceId),
            eq(usualPreKeys.claimed, false),
          ),
        )
        .orderBy(asc(usualPreKeys.userId), asc(usualPreKeys.deviceId), asc(usualPreKeys.sequence))
        .limit(1)
        .for('update');
      if (preKey !== undefined) {
        await tx
          .update(usualPreKeys)
          .set({ claimed: true })
          .where(eq(usualPreKeys.sequence, preKey.sequence));
      }
      return {
        userId,
        devices: [
          {
            deviceId,
            registrationId: device!.registrationId,
            identityKey: device!.identityKey,
            signedPreKey: {
              keyId: device!.signedPreKeyId,
              publicKey: device!.signedPreKey,
              signature: device!.signature,
            },
            oneTimePreKey: preKey === undefined ? null : { keyId: preKey.keyId, publicKey: preKey.publicKey },
            pqPreKey: null,
          },
        ],
      };
    }),
  );
}

serveSockets((socket) => {
  socket.on('requestBundle', async ({ userId, deviceId }, acknowledge) => {
    try {
      acknowledge({ ok: true, data: await bundleOf(userId, deviceId) });
    } catch (error) {
      acknowledge({ ok: false, error: { code: 'INTERNAL', message: String(error) } });
    }
  });
});
