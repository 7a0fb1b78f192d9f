/** Commands for those who run gateways: they work on the configured store, beside running gateways or without any. */
import {
  answer,
  BadNewsError,
  type Command,
  DEVICE_OPTIONS,
  deviceOf,
  faultOf,
  JSON_OPTION,
  print,
  progressBar,
  type Values,
} from './command.ts';
import type { EngineFacts } from './compose/doctor.ts';
import type { Operator } from './compose/operator.ts';
import { parseConfig, parseStoreConfig, type StoreConfig } from './config.ts';
import { configReference } from './config-reference.ts';
import { messagesCut, sweepMessages } from './delivery/retention.ts';
import { createIdleSweep, idleCut } from './keys/idle.ts';
import { withdrawAfterRestore } from './keys/restored.ts';
import { keysCut, sweepKeys } from './keys/retention.ts';
import { systemClock } from './lib/clock.ts';
import { markdownTable } from './lib/markdown-table.ts';
import type { PoolTotals } from './ports/maintenance.ts';
import { addressKey, type DeviceAddress } from './protocol/ids.ts';

export const operatorCommands: Record<string, Command> = {
  stats: {
    summary: 'count devices, one-time prekeys and waiting messages',
    help: `Usage: keygate stats [--user <user id> --device <1-127>] [--json]

Counts what the store holds, of all devices or of one. Exact, so it takes seconds where there are millions.

  --user, --device  of this device only
  --json            print the counts as JSON`,
    options: { ...DEVICE_OPTIONS, ...JSON_OPTION },
    run: stats,
  },
  sweep: {
    summary: 'clean up now what is past its time, as gateways do each minute',
    help: `Usage: keygate sweep [--dry-run] [--json]

Folds claims that are older than CLAIMED_PREKEY_RETENTION_DAYS into used ids, drops signed prekeys that were replaced
more than 30 days ago, sends expired messages back to their senders, forgets message ids that were finished more than a
day ago, and takes the keys of devices that were idle for IDLE_DEVICE_RETENTION_DAYS. Running gateways do so too, one of
them at a time, in small batches. Ids stay used for ever.

  --dry-run  only count what is due
  --json     print the counts as JSON`,
    options: { 'dry-run': { type: 'boolean' }, ...JSON_OPTION },
    run: sweep,
  },
  restored: {
    summary: 'make a store safe to serve after a backup was restored into it',
    help: `Usage: keygate restored [--json]

To be run once after a backup was restored, before the gateways are started again. In the time that was lost,
keys that the backup still offers may have been handed out. So every unclaimed one-time prekey is withdrawn for good,
the versions of every device rise beyond all that clients have seen, and every gate closes (serverRestored): each
client compares its keys, and uploads new one-time prekeys under new ids.
Safe to be run again.

  --json  print the counts as JSON`,
    options: JSON_OPTION,
    run: restored,
  },
  doctor: {
    summary: 'look whether everything that the gateway needs is there and in step',
    help: `Usage: keygate doctor [--json]

Asks PostgreSQL, Redis and the token keys' address, whichever are configured: can they be reached, are they new
enough, is the schema in step, do the clocks agree. An embedded PostgreSQL that is there and does not run is started
for it, and ended again. Ends with 1 where something is wrong.

  --json  print the findings as JSON`,
    options: JSON_OPTION,
    run: doctor,
  },
  'config-reference': {
    summary: 'list every environment variable, its default and its meaning',
    help: `Usage: keygate config-reference [--json]

Prints a table in Markdown. Reads nothing of the environment.

  --json  print the list as JSON`,
    options: JSON_OPTION,
    run: async (values) =>
      answer(values, configReference(), [
        markdownTable(
          ['variable', 'default', 'meaning'],
          configReference().map(({ name, byDefault, meaning }) => [`\`${name}\``, byDefault, meaning]),
        ),
      ]),
  },
  revoke: {
    summary: 'shut a device out: its tokens, its sockets, its keys',
    help: `Usage: keygate revoke --user <user id> --device <1-127> [--json]

Ends every token of the device that was issued until now and those that do not say when, closes its sockets on all
nodes, removes its keys, and returns what waits for it to its senders (DEVICE_REVOKED). A token issued later lets the
device start afresh. Gateways without REDIS_URL notice within 15 seconds.

  --user    the user id, as in alice
  --device  the device id, a number from 1 to 127
  --json    print what was done as JSON`,
    options: { ...DEVICE_OPTIONS, ...JSON_OPTION },
    run: revoke,
  },
};

/** Runs `action` on the configured store, and closes it however it ends. */
async function withOperator(
  env: NodeJS.ProcessEnv,
  how: { migrates: boolean },
  action: (operator: Operator, config: StoreConfig) => Promise<void>,
): Promise<void> {
  const config = parseStoreConfig(env);
  // Loaded only here: help and faults of usage are told without waiting for it.
  const { openOperator } = await import('./compose/operator.ts');
  const operator = await openOperator(config, how);
  try {
    await action(operator, config);
  } finally {
    await operator.close();
  }
}

async function stats(values: Values, env: NodeJS.ProcessEnv): Promise<void> {
  const device = values.user === undefined && values.device === undefined ? null : deviceOf(values);
  await withOperator(env, { migrates: false }, async ({ maintenance }) => {
    if (device === null) {
      const totals = await maintenance.totals();
      answer(values, { ...totals, ec: withTotal(totals.ec), pq: withTotal(totals.pq) }, [
        `devices             ${totals.deviceCount}, of them with keys ${totals.deviceWithKeysCount}`,
        `one-time prekeys    ${poolLine(totals.ec)}`,
        `  post-quantum      ${poolLine(totals.pq)}`,
        `messages that wait  ${totals.pendingCount}`,
      ]);
      return;
    }
    const totals = await maintenance.totalsOf(device);
    if (totals === null) throw new Error(`${addressKey(device)} is unknown: it has never uploaded keys`);
    const { ec, pq, updatedAtMs, restoredAtMs, ...rest } = totals;
    const gate = gateOf(totals);
    const lastUpdated = updatedAtMs === null ? null : new Date(updatedAtMs).toISOString();
    answer(
      values,
      {
        ...device,
        ...rest,
        ec: withTotal(ec),
        pq: withTotal(pq),
        gate,
        lastUpdated,
        mustCompareKeys: restoredAtMs !== null,
      },
      [
        `device              ${addressKey(device)}, ${totals.hasKeys ? `key version ${totals.keyVersion}` : 'no keys'}`,
        `one-time prekeys    ${poolLine(ec)}`,
        `  post-quantum      ${poolLine(pq)}`,
        `last updated        ${lastUpdated ?? 'never'}`,
        `gate                ${gate}`,
        `messages that wait  ${totals.pendingCount}`,
      ],
    );
  });
}

function withTotal(pool: PoolTotals): PoolTotals & { total: number } {
  return { total: pool.available + pool.consumed, ...pool };
}

function poolLine(pool: PoolTotals): string {
  return `${pool.available + pool.consumed} in all, ${pool.available} available, ${pool.consumed} consumed`;
}

/** What the store knows of it: whether an open gate still stands, the gateway knows that serves the device. */
function gateOf(totals: {
  hasKeys: boolean;
  servedAtMs: number | null;
  restoredAtMs: number | null;
}): string {
  if (!totals.hasKeys) return 'closed: there are no keys';
  if (totals.restoredAtMs !== null)
    return 'closed: a backup was restored, and the client has not compared its keys';
  if (totals.servedAtMs === null) return 'never opened';
  return `last found open ${new Date(totals.servedAtMs).toISOString()}`;
}

async function sweep(values: Values, env: NodeJS.ProcessEnv): Promise<void> {
  await withOperator(env, { migrates: false }, async (operator, config) => {
    const { maintenance, store, locks, messages, bounces } = operator;
    const nowMs = systemClock.nowMs();
    const claimedPreKeyRetentionMs = config.preKeys.claimedRetentionMs;
    const retentionMs = config.preKeys.idleDeviceRetentionMs;
    const due = await maintenance.dueForSweep({
      nowMs,
      ...keysCut(nowMs, claimedPreKeyRetentionMs),
      ...messagesCut(nowMs),
      idleBeforeMs: idleCut({ nowMs, retentionMs }),
    });
    if (values['dry-run'] === true) {
      answer(values, due, [
        `claims to be folded into used ids  ${due.claimCount}`,
        `replaced signed prekeys to drop    ${due.signedPreKeyCount}`,
        `expired messages to bounce         ${due.expiredMessageCount}`,
        `finished message ids to forget     ${due.rememberedMessageCount}`,
        `idle devices to lose their keys    ${due.idleDeviceCount}`,
      ]);
      return;
    }
    await operator.refuseUnsoundClock();
    const bar = progressBar(
      'rows',
      Object.values(due).reduce((sum, count) => sum + count, 0),
    );
    const onBatch = (rowCount: number): void => bar.advance(rowCount);
    const clock = systemClock;
    try {
      const keyRowCount = await sweepKeys({ store, clock, claimedPreKeyRetentionMs, onBatch });
      const messageRowCount = await sweepMessages({ messages, bounces, clock, onBatch });
      const onWiped = async (device: DeviceAddress): Promise<void> => {
        onBatch(1);
        await bounces.bounceStale(device);
      };
      const idleSweep = createIdleSweep({ store, locks, clock, retentionMs, onWiped });
      let idleDeviceCount = 0;
      for (let isAtEnd = false; !isAtEnd; ) {
        const run = await idleSweep.run();
        idleDeviceCount += run.wipedCount;
        isAtEnd = run.isAtEnd;
      }
      bar.end();
      answer(values, { keyRowCount, messageRowCount, idleDeviceCount }, [
        `swept ${keyRowCount} rows of keys, ${messageRowCount} of messages, and the keys of ${idleDeviceCount} idle devices`,
      ]);
    } finally {
      bar.end();
    }
  });
}

async function restored(values: Values, env: NodeJS.ProcessEnv): Promise<void> {
  await withOperator(env, { migrates: true }, async ({ maintenance, refuseUnsoundClock }) => {
    // What was handed out before is told from what comes after by the time of now.
    await refuseUnsoundClock();
    const bar = progressBar('devices', await maintenance.countDevices());
    const { deviceCount, withdrawnCount } = await withdrawAfterRestore({
      maintenance,
      clock: systemClock,
      onBatch: (devices) => bar.advance(devices.length),
    }).finally(() => bar.end());
    answer(values, { deviceCount, withdrawnCount }, [
      `${withdrawnCount} unclaimed one-time prekeys of ${deviceCount} devices are withdrawn for good`,
      'open gates close within 15 seconds; each client compares its keys and uploads new ones when it comes back',
    ]);
  });
}

interface Finding {
  what: string;
  good: boolean;
  found: string;
}

/** Tokens are checked to the second, and proofs between nodes last ten minutes. */
const CLOCK_DIFFERENCE_MAX_MS = 2_000;
const JWKS_WAIT_MAX_MS = 5_000;

async function doctor(values: Values, env: NodeJS.ProcessEnv): Promise<void> {
  const config = parseConfig(env);
  const { examineStore, examineRedisOf } = await import('./compose/doctor.ts');
  const findings: Finding[] = [];
  const look = async (what: string, examine: () => Promise<Omit<Finding, 'what'>[]>): Promise<void> => {
    const found = await examine().catch((error: unknown) => [{ good: false, found: faultOf(error) }]);
    findings.push(...found.map((finding) => ({ what, ...finding })));
  };
  await look('postgres', async () => {
    const found = await examineStore(config);
    if (found === 'notMade') return [{ good: true, found: 'embedded: the first start makes it' }];
    if (found === 'inUse') return [{ good: true, found: 'embedded: a gateway runs on it' }];
    const { missingMigrations, troubles, ...facts } = found;
    return [
      ...engineFindings('PostgreSQL', 14, facts),
      ...troubles.map((trouble) => ({ good: false, found: trouble })),
      missingMigrations === 0
        ? { good: true, found: 'the schema is in step' }
        : { good: false, found: `${missingMigrations} migrations are missing: run keygate migrate` },
    ];
  });
  await look('redis', async () => {
    const facts = await examineRedisOf(config);
    return facts === null
      ? [{ good: true, found: 'not configured: one node' }]
      : engineFindings('Redis', 6.2, facts);
  });
  const { keys } = config.tokens;
  if (keys.kind === 'jwks') {
    await look('tokens', async () => {
      const response = await fetch(keys.url, { signal: AbortSignal.timeout(JWKS_WAIT_MAX_MS) });
      const body = (await response.json().catch(() => null)) as { keys?: unknown[] } | null;
      const count = Array.isArray(body?.keys) ? body.keys.length : 0;
      return [
        {
          good: response.ok && count > 0,
          found: `JWT_JWKS_URL answers ${response.status} with ${count} keys`,
        },
      ];
    });
  }
  const good = findings.every((finding) => finding.good);
  if (values.json === true) print(JSON.stringify({ good, findings }));
  else
    print(
      findings
        .map(({ what, good, found }) => `${good ? 'good' : 'BAD '}  ${what.padEnd(8)}  ${found}`)
        .join('\n'),
    );
  if (!good) throw new BadNewsError();
}

function engineFindings(
  name: string,
  versionMin: number,
  { version, isNewEnough, clockDifferenceMs }: EngineFacts,
): Omit<Finding, 'what'>[] {
  const differenceMs = Math.round(clockDifferenceMs);
  return [
    {
      good: isNewEnough,
      found: `${name} ${version}${isNewEnough ? '' : `: needs ${versionMin} or newer`}`,
    },
    {
      good: Math.abs(differenceMs) <= CLOCK_DIFFERENCE_MAX_MS,
      found: `its clock differs by ${differenceMs} ms`,
    },
  ];
}

async function revoke(values: Values, env: NodeJS.ProcessEnv): Promise<void> {
  const device = deviceOf(values);
  await withOperator(env, { migrates: false }, async (operator) => {
    const { keyVersion, revokedAtMs, hadKeys, untold } = await operator.revoke(device);
    const revokedAt = new Date(revokedAtMs).toISOString();
    answer(values, { ...device, revokedAt, keyVersion, hadKeys, untold }, [
      `device ${device.deviceId} of ${device.userId} is revoked: tokens issued until ${revokedAt} are refused`,
      hadKeys ? 'its keys are gone, and what waited for it returns to its senders' : 'it had no keys',
      ...(untold === null ? [] : [`gateways notice within 15 seconds: they could not be told (${untold})`]),
    ]);
  });
}
