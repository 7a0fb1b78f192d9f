/** One prepared statement for every request, without any lock but the row's: what answers a lone request soonest. */
import postgres from 'postgres';
import { serveSockets } from './socket-server.ts';

const CONNECTIONS = 10;

const sql = postgres(process.env.BENCH_DATABASE_URL ?? '', { max: CONNECTIONS });

async function bundleOf(userId: string, deviceId: number): Promise<object> {
  const [row] = await sql`
    WITH claimed AS (
      DELETE FROM usual_prekeys
      WHERE sequence = (
        SELECT sequence FROM usual_prekeys
        WHERE user_id = ${userId} AND device_id = ${deviceId} AND NOT claimed
        ORDER BY user_id, device_id, sequence LIMIT 1 FOR UPDATE SKIP LOCKED)
      RETURNING key_id, public_key)
    SELECT d.*, c.key_id, c.public_key FROM usual_devices d LEFT JOIN claimed c ON true
    WHERE d.user_id = ${userId} AND d.device_id = ${deviceId}`;
  return {
    userId,
    devices: [
      {
        deviceId,
        registrationId: row!.registration_id,
        identityKey: row!.identity_key,
        signedPreKey: {
          keyId: row!.signed_prekey_id,
          publicKey: row!.signed_prekey,
          signature: row!.signature,
        },
        oneTimePreKey: row!.key_id === null ? null : { keyId: row!.key_id, publicKey: row!.public_key },
        pqPreKey: null,
      },
    ],
  };
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
