/** What must be true of the key tables at every moment at which nothing is under way, however it came to it. */
import postgres from 'postgres';

const RULES: Record<string, string> = {
  'the counters of a device are its pool’s rows': `
    SELECT user_id, device_id FROM devices d
    CROSS JOIN LATERAL (
      SELECT count(*) FILTER (WHERE kind = 0) AS ec, count(*) FILTER (WHERE kind = 1) AS pq
      FROM one_time_prekeys o WHERE o.user_id = d.user_id AND o.device_id = d.device_id
    ) pool
    WHERE ec_available <> pool.ec OR pq_available <> pool.pq`,
  'what was counted as claimed is recorded or folded': `
    SELECT user_id, device_id FROM devices d
    CROSS JOIN LATERAL (
      SELECT count(ec_key_id) AS ec, count(pq_key_id) AS pq FROM prekey_claims c
      WHERE c.user_id = d.user_id AND c.device_id = d.device_id
    ) recorded
    WHERE (ec_claimed <> recorded.ec OR pq_claimed <> recorded.pq)
      AND NOT EXISTS (
        SELECT 1 FROM used_prekey_ids u
        WHERE u.user_id = d.user_id AND u.device_id = d.device_id AND u.identity_canonical = d.identity_canonical
          AND NOT u.signed)`,
  'no key is both handed out and waiting': `
    SELECT o.user_id, o.device_id, o.kind, o.key_id FROM one_time_prekeys o JOIN prekey_claims c
      ON c.user_id = o.user_id AND c.device_id = o.device_id
        AND o.key_id = CASE o.kind WHEN 0 THEN c.ec_key_id ELSE c.pq_key_id END`,
  'no used id waits under the identity that used it': `
    SELECT o.user_id, o.device_id, o.kind, o.key_id FROM one_time_prekeys o
    JOIN devices d ON d.user_id = o.user_id AND d.device_id = o.device_id
    JOIN used_prekey_ids u ON u.user_id = o.user_id AND u.device_id = o.device_id AND u.kind = o.kind
      AND NOT u.signed AND u.identity_canonical = d.identity_canonical AND u.ids @> o.key_id`,
  'nothing belongs to a device without keys': `
    SELECT r.user_id, r.device_id FROM (
      SELECT user_id, device_id FROM one_time_prekeys
      UNION SELECT user_id, device_id FROM signed_prekeys
      UNION SELECT user_id, device_id FROM prekey_claims
    ) r LEFT JOIN devices d ON d.user_id = r.user_id AND d.device_id = r.device_id
    WHERE d.identity_key IS NULL`,
  'a device with keys has the one signed prekey that its row names': `
    SELECT d.user_id, d.device_id FROM devices d
    WHERE d.identity_key IS NOT NULL AND NOT EXISTS (
      SELECT 1 FROM signed_prekeys s
      WHERE s.user_id = d.user_id AND s.device_id = d.device_id AND s.kind = 0 AND s.key_id = d.signed_prekey_id
        AND s.replaced_at IS NULL)`,
  'a claim is of the present identity': `
    SELECT c.user_id, c.device_id FROM prekey_claims c
    JOIN devices d ON d.user_id = c.user_id AND d.device_id = c.device_id
    WHERE c.identity_version <> d.identity_version`,
};

/** @returns a line for each rule that is broken, with the first rows that break it; nothing where all hold */
export async function brokenKeyInvariants(databaseUrl: string): Promise<string[]> {
  const sql = postgres(databaseUrl, { max: 1, onnotice: () => {} });
  try {
    const broken: string[] = [];
    for (const [rule, query] of Object.entries(RULES)) {
      const rows = await sql.unsafe(`${query} LIMIT 3`);
      if (rows.length > 0) broken.push(`not so: ${rule}: ${JSON.stringify([...rows])}`);
    }
    return broken;
  } finally {
    await sql.end();
  }
}
