/**
 * How such a server is usually written: it looks the recipient's device up, inserts the message, emits it where the
 * device is connected, and deletes it on acknowledgement, one Drizzle query each. The token is the user's id.
 */
import { randomUUID } from 'node:crypto';
import { and, eq } from 'drizzle-orm';
import { drizzle } from 'drizzle-orm/postgres-js';
import postgres from 'postgres';
import type { Socket } from 'socket.io';
import { serveSockets } from './socket-server.ts';
import { usualDevices, usualMessages } from './usual-way-schema.ts';

interface Sent {
  messageId: string;
  userId: string;
  envelopes: { deviceId: number; registrationId: number; type: number; content: string }[];
}

const CONNECTIONS = 10;

const db = drizzle(postgres(process.env.BENCH_DATABASE_URL ?? '', { max: CONNECTIONS }));
const sockets = new Map<string, Socket>();

async function store(senderUserId: string, { messageId, userId, envelopes }: Sent): Promise<Date> {
  let storedAt = new Date();
  for (const { deviceId, registrationId, type, content } of envelopes) {
    const [device] = await db
      .select()
      .from(usualDevices)
      .where(and(eq(usualDevices.userId, userId), eq(usualDevices.deviceId, deviceId)));
    if (device?.registrationId !== registrationId) throw new Error('no such device');
    const [stored] = await db
      .insert(usualMessages)
      .values({
        id: randomUUID(),
        messageId,
        senderUserId,
        senderDeviceId: 1,
        recipientUserId: userId,
        recipientDeviceId: deviceId,
        type,
        content,
      })
      .returning({ id: usualMessages.id, storedAt: usualMessages.storedAt });
    const { id } = stored!;
    storedAt = stored!.storedAt;
    const sender = { userId: senderUserId, deviceId: 1 };
    const envelope = { id, kind: 'message', messageId, sender, type, content, storedAt };
    sockets.get(userId)?.emit('messages', { envelopes: [envelope] }, async () => {
      await db.delete(usualMessages).where(eq(usualMessages.id, id));
    });
  }
  return storedAt;
}

serveSockets((socket) => {
  const userId: string = socket.handshake.auth.token;
  sockets.set(userId, socket);
  socket.on('sendMessages', async (sent: Sent, acknowledge) => {
    try {
      acknowledge({ ok: true, data: { storedAt: await store(userId, sent) } });
    } catch (error) {
      acknowledge({ ok: false, error: { code: 'INTERNAL', message: String(error) } });
    }
  });
});
